//! The supervisor's side: vouching, revoking, ends, and a supervisor that does not keep to the list.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use common::{
    Act, CANARY, Egress, PLACEHOLDER, RUN, Raw, chunk, credential, embedded, finish, request, resolv_conf,
    stream_head, streamed,
};
use gaoler_protocol::{Empty, Level, Message, RunId, Scheme, Serve};
use gaoler_seal::Vault;
use gaoler_sys::memfd;

const HOSTILE: i32 = 2;

fn serve(vouch: bool) -> Serve {
    Serve {
        run: RUN,
        placeholder: PLACEHOLDER,
        level: Level::Balanced,
        vouch,
        requests_max: 0,
        egress_mib: 0,
        peer_uid: 0,
        tenant: [0; 16],
    }
}

#[test]
fn the_upstream_vouches_for_a_credential() {
    let upstream = embedded();
    let check = |url: &str, token: &str, accepted: bool, status: u16| {
        let mut egress = Egress::start(url, &[]);
        egress.serve(true, Scheme::OAuth, token, None);
        let vouched = egress.hear_vouched();
        assert_eq!((vouched.run, vouched.accepted, vouched.status), (RUN, accepted, status), "{token}");
        assert_eq!(egress.revoke().requests, 0);
        assert_eq!(egress.exit(), 0);
    };
    check(&upstream, CANARY, true, 200);
    check(&upstream, "sk-ant-oat01-refused", false, 401);
    check(&upstream, "sk-ant-oat01-forbidden", false, 403);
    check("http://127.0.0.1:1", CANARY, false, 0);
    check(&Raw::answering("500 Oops", "", "").url(), CANARY, false, 500);
    check(&Raw::answering("302 Found", "location: /\r\n", "").url(), CANARY, false, 302);
}

#[test]
fn r06_only_200_is_a_yes() {
    let ask = |status: &str, head: &'static str| {
        let mut egress = Egress::start(&Raw::answering(status, head, "{}").url(), &[]);
        egress.serve(true, Scheme::OAuth, CANARY, None);
        let vouched = egress.hear_vouched();
        (vouched.accepted, vouched.status, vouched.after)
    };
    assert_eq!(ask("200 OK", ""), (true, 200, 0), "the control");
    // Who is limited by their address is not known for that, and neither is who meets something before the API.
    for (status, head, number, after) in [
        ("429 Too Many Requests", "retry-after: 17\r\n", 429, 17),
        ("429 Too Many Requests", "retry-after: 86400\r\n", 429, 255),
        ("429 Too Many Requests", "retry-after: Sun, 06 Nov 1994 08:49:37 GMT\r\n", 429, 0),
        ("429 Too Many Requests", "retry-after: -5\r\n", 429, 0),
        ("429 Too Many Requests", "", 429, 0),
        ("529 Overloaded", "retry-after: 3\r\n", 529, 3),
        ("503 Service Unavailable", "", 503, 0),
        ("201 Created", "", 201, 0),
        ("202 Accepted", "", 202, 0),
        ("204 No Content", "", 204, 0),
        ("206 Partial Content", "", 206, 0),
        ("304 Not Modified", "", 304, 0),
        ("402 Payment Required", "", 402, 0),
        ("404 Not Found", "", 404, 0),
    ] {
        assert_eq!(ask(status, head), (false, number, after), "{status} {head}");
    }
}

#[test]
fn a_stored_credential_opens_for_its_own_tenant_alone() {
    let (vault, other) = (Vault::draw(), Vault::draw());
    let plain = [&[Scheme::OAuth as u8], CANARY.as_bytes()].concat();
    let sealed = gaoler_seal::seal(&vault.public().expect("a key"), &[7; 16], &plain).expect("sealed");
    let file = || {
        memfd::sealed("credential", &[&[gaoler_seal::SEALED], sealed.as_slice()].concat())
            .expect("a memory file")
    };
    let raw = Raw::answering("200 OK", "", "");
    let ask = |vault: Option<&Vault>, tenant: [u8; 16]| {
        let mut egress = Egress::start_with(&raw.url(), &[], vault);
        egress.say(Message::Serve(Serve { tenant, ..serve(true) }), &[file(), resolv_conf()]);
        egress
    };
    let mut own = ask(Some(&vault), [7; 16]);
    assert!(own.hear_vouched().accepted);
    assert!(raw.seen()[0].contains(&format!("Bearer {CANARY}")), "the upstream gets what was sealed");
    // Not in another tenant's run, not with another key, not without one: it ends, and nothing went upstream.
    for (vault, tenant) in [(Some(&vault), [8; 16]), (Some(&other), [7; 16]), (None, [7; 16])] {
        let mut egress = ask(vault, tenant);
        assert!(egress.hear().is_none());
        assert_eq!(egress.exit(), HOSTILE);
    }
    assert_eq!(raw.seen().len(), 1);
    // After vouching it is opened once more, for the run.
    let listener = own.listener();
    let (_, ledger) = std::io::pipe().expect("a pipe");
    let fds = [
        file(),
        resolv_conf(),
        memfd::sealed("hosts", b"").expect("a memory file"),
        OwnedFd::from(ledger),
        listener,
    ];
    own.say(Message::Serve(Serve { tenant: [7; 16], ..serve(false) }), &fds);
    assert_eq!(own.ask("hello").status, 200);
}

#[test]
fn after_vouching_it_serves() {
    let mut egress = Egress::start(&embedded(), &[]);
    egress.serve(true, Scheme::ApiKey, CANARY, None);
    assert!(egress.hear_vouched().accepted);
    let listener = egress.listener();
    egress.serve(false, Scheme::ApiKey, CANARY, Some(listener));
    assert_eq!(egress.ask("hello").text(), "[embedded] hello");
}

#[test]
fn vouching_asks_the_cheapest_question() {
    let upstream = Raw::answering("200 OK", "", "{}");
    let mut egress = Egress::start(&upstream.url(), &[]);
    egress.serve(true, Scheme::OAuth, CANARY, None);
    assert!(egress.hear_vouched().accepted);
    let seen = upstream.seen().pop().expect("a request");
    assert!(seen.starts_with("GET /v1/models?limit=1 HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains(&format!("authorization: Bearer {CANARY}\r\n")));
    assert!(seen.contains("anthropic-beta: oauth-2025-04-20\r\n"));
}

#[test]
fn revoking_ends_a_stream_in_the_middle() {
    let start =
        "event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":5,\"output_tokens\":1}}}\n\n";
    let upstream = Raw::start(&[stream_head(), chunk(start), Act::Hang]);
    let mut egress = Egress::serving(&upstream.url(), &[], Scheme::OAuth, CANARY);
    let mut stream = egress.connect();
    let bytes = request("POST /v1/messages", "", &streamed("hello").to_string());
    stream.write_all(&bytes).expect("sent");
    let mut begun = Vec::new();
    while !begun.ends_with(b"}}}\n\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer begins");
        begun.push(byte[0]);
    }
    // The counts are read before the bytes go on, so they are there now.
    let totals = egress.revoke();
    assert_eq!((totals.requests, totals.input_tokens, totals.output_tokens), (1, 5, 1));
    assert_eq!(totals.bytes_down, start.len() as u64);
    assert!(!finish(begun.as_slice().chain(stream)).whole);
    assert_eq!(egress.exit(), 0);
    assert!(std::os::unix::net::UnixStream::connect(egress.socket()).is_err());
}

#[test]
fn revoking_while_vouching_is_prompt() {
    let upstream = Raw::start(&[Act::Hang]);
    let mut egress = Egress::start(&upstream.url(), &[]);
    egress.serve(true, Scheme::OAuth, CANARY, None);
    assert_eq!(egress.revoke().requests, 0);
    assert_eq!(egress.exit(), 0);
}

#[test]
fn it_ends_with_its_supervisor() {
    let mut idle = Egress::start("http://127.0.0.1:1", &[]);
    idle.hang_up();
    assert_eq!(idle.exit(), 0);
    let mut serving = Egress::serving(&embedded(), &[], Scheme::OAuth, CANARY);
    let mut stream = serving.connect();
    let bytes = request("POST /v1/messages", "", &streamed("STALL: for ever").to_string());
    stream.write_all(&bytes).expect("sent");
    stream.read_exact(&mut [0; 12]).expect("an answer begins");
    serving.hang_up();
    assert_eq!(serving.exit(), 0);
    assert!(!finish(stream).whole);
}

#[test]
fn a_supervisor_that_is_none_ends_it() {
    let fds = || vec![credential(Scheme::OAuth, CANARY), resolv_conf()];
    let check = |name: &str, bytes: &[u8], fds: Vec<OwnedFd>| {
        let mut egress = Egress::start("http://127.0.0.1:1", &[]);
        egress.send(bytes, &fds);
        assert_eq!(egress.exit(), HOSTILE, "{name}");
    };
    let good = Message::Serve(serve(true)).encode(1);
    let with = |at: usize, byte: u8| {
        let mut bytes = good;
        bytes[at] = byte;
        bytes
    };
    check("truncated", &good[..255], fds());
    check("too long", &[good.as_slice(), b"x"].concat(), fds());
    check("magic", &with(0, 0), fds());
    check("version", &with(4, 9), fds());
    check("kind", &with(6, 200), fds());
    check("a level without a name", &with(16 + 16 + 32, 77), fds());
    check("padding", &with(255, 1), fds());
    check("no descriptors", &good, vec![]);
    check("too many descriptors", &good, fds().into_iter().chain(fds()).collect());
    check("another message", &Message::Drain(Empty {}).encode(1), vec![]);
    check("its own message", &Message::Revoked(common_totals()).encode(1), vec![]);
    check("a file that is not sealed", &good, vec![resolv_conf(), resolv_conf()]);
    check("an empty credential", &good, vec![credential(Scheme::OAuth, ""), resolv_conf()]);
    check(
        "a credential with a line feed",
        &good,
        vec![credential(Scheme::OAuth, "a\r\nb: c"), resolv_conf()],
    );
    check("nothing to do", &Message::Serve(serve(false)).encode(1), fds());
    let door = || {
        let hosts = memfd::sealed("hosts", b"mirror.example:443\n").expect("a memory file");
        let listener =
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("{:?}", hosts)).expect("a name"));
        let (_, ledger) = std::io::pipe().expect("a pipe");
        [hosts, ledger.into(), listener.expect("a socket").into()]
    };
    let serving = Message::Serve(serve(false)).encode(1);
    let check_door = |name: &str, change: &dyn Fn(&mut Vec<OwnedFd>)| {
        let mut all: Vec<OwnedFd> = fds().into_iter().chain(door()).collect();
        change(&mut all);
        check(name, &serving, all);
    };
    let tcp = |at: &str| -> OwnedFd { TcpListener::bind(at).expect("a port").into() };
    let text = |text: &str| memfd::sealed("hosts", text.as_bytes()).expect("a memory file");
    check_door("no ledger and no listener", &|all| all.truncate(3));
    check_door("no listener", &|all| all.truncate(4));
    check_door("a listener that is none", &|all| all[4] = resolv_conf());
    check_door("a listener of another family", &|all| all[4] = tcp("127.0.0.1:0"));
    check_door("a ledger that is none", &|all| all[3] = resolv_conf());
    check_door("hosts that are not sealed", &|all| all[2] = resolv_conf());
    check_door("hosts that are none", &|all| all[2] = text("localhost:443"));
    check_door("hosts that are too long", &|all| all[2] = text(&"\n".repeat(64 * 1024 + 1)));
    check_door("a proxy's listener that is none", &|all| all.push(resolv_conf()));
    check_door("a proxy's listener that all the world can reach", &|all| all.push(tcp("0.0.0.0:0")));
}

#[test]
fn a_second_run_ends_it() {
    let mut egress = Egress::start(&embedded(), &[]);
    egress.serve(true, Scheme::OAuth, CANARY, None);
    assert!(egress.hear_vouched().accepted);
    let other = Serve { run: RunId([8; 16]), ..serve(false) };
    let (_, ledger) = std::io::pipe().expect("a pipe");
    let hosts = memfd::sealed("hosts", b"").expect("a memory file");
    let fds = [credential(Scheme::OAuth, CANARY), resolv_conf(), hosts, ledger.into(), egress.listener()];
    egress.say(Message::Serve(other), &fds);
    assert_eq!(egress.exit(), HOSTILE);
}

fn common_totals() -> gaoler_protocol::Totals {
    let mut egress = Egress::start("http://127.0.0.1:1", &[]);
    egress.revoke()
}
