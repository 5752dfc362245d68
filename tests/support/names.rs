//! A name server of a test's own, which knows every name as 127.0.0.1.
//! It must never answer before it was told to, nor for another test: each has an address of its own on loopback.

use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};

/// It, for as long as the test lasts.
pub struct Names {
    /// Where it listens: port 53, which is root's.
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    socket: UdpSocket,
}

#[derive(Default)]
struct State {
    answers: bool,
    asked: Vec<String>,
    waiting: Vec<(Vec<u8>, SocketAddr)>,
}

impl Names {
    /// One at this address, which hears and says nothing yet.
    pub fn silent(address: &str) -> Names {
        let socket = UdpSocket::bind((address, 53)).expect("port 53 can be bound, as root");
        let names = Names {
            address: socket.local_addr().expect("an address"),
            state: Arc::default(),
            socket: socket.try_clone().expect("a copy"),
        };
        let state = Arc::clone(&names.state);
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                let (name, answer) = answer(&buffer[..length]);
                let mut state = state.lock().expect("no panic");
                state.asked.push(name);
                match state.answers {
                    true => drop(socket.send_to(&answer, peer)),
                    false => state.waiting.push((answer, peer)),
                }
            }
        });
        names
    }

    /// One that answers.
    pub fn new(address: &str) -> Names {
        let names = Names::silent(address);
        names.answer();
        names
    }

    /// It answers from now on, and what it was asked before.
    pub fn answer(&self) {
        let mut state = self.state.lock().expect("no panic");
        state.answers = true;
        for (answer, peer) in state.waiting.drain(..) {
            let _ = self.socket.send_to(&answer, peer);
        }
    }

    /// The names that it was asked for, in order.
    pub fn asked(&self) -> Vec<String> {
        self.state.lock().expect("no panic").asked.clone()
    }

    /// A resolv.conf that names it alone.
    pub fn resolv_conf(&self) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let text = format!("search example.com\nnameserver {}\n", self.address.ip());
        std::fs::write(file.path(), text).expect("written");
        file
    }
}

/// The name that a question asks for, and the answer to it.
fn answer(question: &[u8]) -> (String, Vec<u8>) {
    let (mut name, mut at) = (String::new(), 12);
    while question[at] != 0 {
        let label = usize::from(question[at]);
        name.push_str(&String::from_utf8_lossy(&question[at + 1..=at + label]));
        name.push('.');
        at += 1 + label;
    }
    let is_a = question[at + 1..at + 3] == [0, 1];
    let mut answer = vec![question[0], question[1], 0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
    answer.extend_from_slice(&question[12..at + 5]);
    if is_a {
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
    }
    (name.to_ascii_lowercase(), answer)
}
