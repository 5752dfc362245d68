//! Makes another process make a system call, so that what it may do can be tried and need not be believed.
//! It must never leave that process otherwise than it was.

use std::net::SocketAddr;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Bytes below the stack that the process does not use: far past the 128 that the x86-64 ABI keeps for it.
const BELOW: u64 = 4096;

#[cfg(target_arch = "x86_64")]
mod arch {
    pub use nix::libc::user_regs_struct as Registers;
    /// `syscall`.
    pub const CALL: &[u8] = &[0x0f, 0x05];

    pub fn place(registers: &Registers) -> [u64; 2] {
        [registers.rip, registers.rsp]
    }

    pub fn set(registers: &mut Registers, call: u64, with: [u64; 6]) {
        registers.rip -= CALL.len() as u64;
        registers.rax = call;
        forget(registers);
        let [a, b, c, d, e, f] = with;
        (registers.rdi, registers.rsi, registers.rdx) = (a, b, c);
        (registers.r10, registers.r8, registers.r9) = (d, e, f);
    }

    /// No call is under way that the kernel would begin again.
    pub fn forget(registers: &mut Registers) {
        registers.orig_rax = u64::MAX;
    }

    pub fn result(registers: &Registers) -> i64 {
        registers.rax.cast_signed()
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    pub use nix::libc::user_regs_struct as Registers;
    /// `svc #0`.
    pub const CALL: &[u8] = &[0x01, 0x00, 0x00, 0xd4];

    pub fn place(registers: &Registers) -> [u64; 2] {
        [registers.pc, registers.sp]
    }

    pub fn set(registers: &mut Registers, call: u64, with: [u64; 6]) {
        registers.pc -= CALL.len() as u64;
        registers.regs[8] = call;
        registers.regs[..6].copy_from_slice(&with);
    }

    pub fn forget(_: &mut Registers) {}

    pub fn result(registers: &Registers) -> i64 {
        registers.regs[0].cast_signed()
    }
}

/// A process that is held, between two of its own calls.
pub struct Hand {
    pid: Pid,
    before: arch::Registers,
    /// Where there is room for what a call points to.
    room: u64,
}

impl Hand {
    /// Stops it where it waits. The test that asks must be root, and stay on one thread.
    pub fn on(pid: i32) -> Hand {
        let pid = Pid::from_raw(pid);
        ptrace::attach(pid).expect("root may hold any process");
        let stopped = waitpid(pid, None).expect("it stops");
        assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
        let before = ptrace::getregset::<ptrace::regset::NT_PRSTATUS>(pid).expect("its registers");
        let [next, stack] = arch::place(&before);
        let hand = Hand { pid, before, room: (stack - BELOW) & !15 };
        let word = ptrace::read(pid, (next - arch::CALL.len() as u64) as *mut _).expect("its code");
        assert!(word.to_ne_bytes().starts_with(arch::CALL), "it does not wait in a system call");
        hand
    }

    /// What this call gives there.
    fn call(&self, call: i64, with: [u64; 6]) -> Result<u64, Errno> {
        let mut registers = self.before;
        arch::set(&mut registers, call.cast_unsigned(), with);
        self.set(registers);
        // To its beginning, and to its end.
        for _ in 0..2 {
            ptrace::syscall(self.pid, None).expect("it goes on");
            let stopped = waitpid(self.pid, None).expect("it stops");
            assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
        }
        let registers = ptrace::getregset::<ptrace::regset::NT_PRSTATUS>(self.pid).expect("its registers");
        let result = arch::result(&registers);
        match u64::try_from(result) {
            Ok(result) => Ok(result),
            Err(_) => Err(Errno::from_raw(i32::try_from(-result).expect("an errno"))),
        }
    }

    fn set(&self, registers: arch::Registers) {
        ptrace::setregset::<ptrace::regset::NT_PRSTATUS>(self.pid, registers).expect("its registers");
    }

    /// Writes these bytes below its stack.
    fn write(&self, bytes: &[u8]) {
        for (at, piece) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            let place = (self.room + 8 * at as u64) as *mut _;
            ptrace::write(self.pid, place, i64::from_ne_bytes(word)).expect("its memory");
        }
    }

    fn close(&self, fd: u64) {
        self.call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]).expect("closed");
    }

    fn socket(&self, kind: i32) -> Result<u64, Errno> {
        self.call(libc::SYS_socket, [libc::AF_INET as u64, kind as u64, 0, 0, 0, 0])
    }

    /// Whether it can connect there.
    pub fn connects(&self, to: SocketAddr) -> Result<(), Errno> {
        let SocketAddr::V4(to) = to else { panic!("{to} is no address of IPv4") };
        let socket = self.socket(libc::SOCK_STREAM)?;
        let family = (libc::AF_INET as u16).to_ne_bytes();
        let address = [&family[..], &to.port().to_be_bytes(), &to.ip().octets(), &[0; 8]].concat();
        self.write(&address);
        let connected = self.call(libc::SYS_connect, [socket, self.room, address.len() as u64, 0, 0, 0]);
        self.close(socket);
        connected.map(drop)
    }

    /// Whether it can make a socket for datagrams.
    pub fn makes_datagrams(&self) -> Result<(), Errno> {
        self.socket(libc::SOCK_DGRAM).map(|socket| self.close(socket))
    }

    /// Whether it can open this file.
    pub fn opens(&self, path: &str) -> Result<(), Errno> {
        self.write(&[path.as_bytes(), &[0]].concat());
        let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
        let with = [(libc::AT_FDCWD as i64).cast_unsigned(), self.room, flags, 0, 0, 0];
        self.call(libc::SYS_openat, with).map(|fd| self.close(fd))
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        let mut registers = self.before;
        arch::forget(&mut registers);
        let _ = ptrace::setregset::<ptrace::regset::NT_PRSTATUS>(self.pid, registers);
        let _ = ptrace::detach(self.pid, None);
    }
}
