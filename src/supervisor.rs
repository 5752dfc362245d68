//! The supervisor as the command line starts it: found beside this binary, given its settings in a sealed
//! memory file, spoken to over descriptor 3. It must never be looked for on a search path.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use gaoler_policy::settings::Settings;
use gaoler_protocol::{Empty, FRAME_BYTES, Message};
use gaoler_sys::{channel, memfd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};

/// The descriptor on which a supervisor finds its settings.
const SETTINGS_FD: i32 = 4;
/// Those on which a server finds the listener's certificate and key, how it was called, and the exporter's settings, which
/// it hands on unread.
const TLS_FD: i32 = 5;
const ORIGIN_FD: i32 = 6;
const TRACES_FD: i32 = 7;
/// A supervisor that was told to end has this long: its own teardown deadline is 2 s.
const END_WAIT: Duration = Duration::from_secs(5);

/// Becomes `gaoler-supervisor serve`, with the same process id.
///
/// # Errors
/// Always an error: on success this process is another program.
pub fn become_server(
    settings: &Settings,
    tls: OwnedFd,
    origin: OwnedFd,
    traces: Option<OwnedFd>,
) -> Result<Infallible, String> {
    let path = binary()?;
    let mut command = Command::new(&path);
    let mut mappings =
        vec![mapped(settings_file(settings)?, SETTINGS_FD), mapped(tls, TLS_FD), mapped(origin, ORIGIN_FD)];
    mappings.extend(traces.map(|traces| mapped(traces, TRACES_FD)));
    own_environment(&mut command).arg("serve").fd_mappings(mappings).map_err(collision)?;
    let error = command.exec();
    Err(format!("{}: {error}; build or install it again", path.display()))
}

/// What the environment said is in the settings by now; on some hosts (gVisor) a run can read the rest of it, and in a
/// container it is that of pid 1. Where the service manager listens is no secret.
fn own_environment(command: &mut Command) -> &mut Command {
    let kept = ["NOTIFY_SOCKET", "TMPDIR"];
    let kept = kept.into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
    command.env_clear().envs(kept)
}

/// A supervisor of our own, as a child.
pub struct Supervisor {
    child: Child,
    control: OwnedFd,
    sequence: u64,
}

impl Supervisor {
    /// Starts `gaoler-supervisor MODE`. Its messages to people go to our stderr.
    ///
    /// # Errors
    /// What was missing, as a sentence.
    pub fn start(mode: &str, settings: &Settings) -> Result<Supervisor, String> {
        let path = binary()?;
        let (control, theirs) = channel::pair().map_err(|error| format!("socketpair: {error}"))?;
        let mut command = Command::new(&path);
        own_environment(&mut command)
            .arg(mode)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // A group of its own: a Ctrl-C is for us, and we end the run in order.
            .process_group(0)
            .fd_mappings(vec![
                mapped(theirs, channel::CONTROL_FD),
                mapped(settings_file(settings)?, SETTINGS_FD),
            ])
            .map_err(collision)?;
        let child = command.spawn().map_err(|error| format!("{}: {error}", path.display()))?;
        // `command` holds our copy of the child's end; while it lived, no end of stream would ever be seen.
        drop(command);
        Ok(Supervisor { child, control, sequence: 0 })
    }

    /// The control socket, to wait on.
    pub fn control(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    /// Sends one message.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn tell(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), String> {
        self.sequence += 1;
        channel::send(self.control(), &message.encode(self.sequence), fds)
            .map_err(|error| format!("the supervisor cannot be told to start a run: {error}"))
    }

    /// Says that nothing more will be asked, and waits until it is gone, so that nothing of ours is left.
    /// Returns its exit status, or `None` where it is late and still cleaning up.
    pub fn end(mut self) -> Option<std::process::ExitStatus> {
        let _ = self.tell(&Message::Drained(Empty {}), &[]);
        let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(&self.control), Shutdown::Write);
        let deadline = Instant::now() + END_WAIT;
        // Whatever it still says is of no use any more; its closed end is what we wait for.
        while let Heard::Message(..) = hear(self.control(), None, Some(deadline)) {}
        match closed(self.control()) {
            true => self.child.wait().ok(),
            false => None,
        }
    }
}

/// What a socket brought.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "lives for one match; a box would be an allocation a message")]
pub enum Heard {
    /// A message of the list, with as many descriptors as it must have.
    Message(Message, Vec<OwnedFd>),
    /// The other end is closed.
    Ended,
    /// Not a message: why.
    Broken(String),
    /// `interrupt` became readable first.
    Interrupted,
    /// The deadline passed.
    Late,
}

/// Waits for a message on `socket`, for `interrupt` to become readable, or for the deadline.
pub fn hear(socket: BorrowedFd<'_>, interrupt: Option<BorrowedFd<'_>>, deadline: Option<Instant>) -> Heard {
    loop {
        match readable(&[Some(socket), interrupt], deadline) {
            Ok(Some(0)) => {}
            Ok(Some(_)) => return Heard::Interrupted,
            Ok(None) => return Heard::Late,
            Err(error) => return Heard::Broken(format!("poll: {error}")),
        }
        match channel::receive::<FRAME_BYTES>(socket) {
            Ok(got) if got.bytes.is_empty() => return Heard::Ended,
            Ok(got) if got.truncated => return Heard::Broken("a frame that the kernel cut".into()),
            Ok(got) => match Message::decode(&got.bytes) {
                Ok((_, message)) if message.fds().contains(&got.fds.len()) => {
                    return Heard::Message(message, got.fds);
                }
                Ok((_, message)) => {
                    return Heard::Broken(format!("{} with {} descriptors", message.name(), got.fds.len()));
                }
                Err(error) => return Heard::Broken(error.to_string()),
            },
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Heard::Ended,
            Err(error) => return Heard::Broken(format!("recvmsg: {error}")),
        }
    }
}

/// The place of the first of `fds` that is readable or closed; `None` at the deadline.
///
/// # Errors
/// Those of poll(2), but for EINTR.
pub fn readable(fds: &[Option<BorrowedFd<'_>>], deadline: Option<Instant>) -> std::io::Result<Option<usize>> {
    loop {
        let (places, mut polled): (Vec<_>, Vec<_>) = fds
            .iter()
            .enumerate()
            .filter_map(|(place, fd)| Some((place, PollFd::new((*fd)?, PollFlags::POLLIN))))
            .unzip();
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up, so that the last fraction of a millisecond is waited for and not spun away.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut polled, timeout) {
            Ok(0) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(None),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if let Some(at) = polled.iter().position(|fd| fd.any().unwrap_or(true)) {
            return Ok(places.get(at).copied());
        }
    }
}

fn closed(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    let count = poll(&mut polled, PollTimeout::ZERO);
    count.is_ok() && polled[0].revents().is_some_and(|seen| seen.contains(PollFlags::POLLHUP))
}

/// The supervisor's binary, in the folder of this one.
fn binary() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("/proc/self/exe: {error}; mount /proc"))?;
    let path = own.with_file_name("gaoler-supervisor");
    match path.is_file() {
        true => Ok(path),
        false => Err(format!(
            "{} is missing; the binaries of gaoler lie in one folder: build or install all of them",
            path.display()
        )),
    }
}

fn settings_file(settings: &Settings) -> Result<OwnedFd, String> {
    let text = toml::to_string(settings).map_err(|error| format!("settings: {error}"))?;
    memfd::sealed("settings", text.as_bytes()).map_err(|error| format!("memfd_create: {error}"))
}

fn mapped(parent_fd: OwnedFd, child_fd: i32) -> FdMapping {
    FdMapping { parent_fd, child_fd }
}

fn collision(_: command_fds::FdMappingCollision) -> String {
    "two descriptors for one number".to_owned()
}
