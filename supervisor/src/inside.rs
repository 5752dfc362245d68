//! An ordinary user's way to namespaces: a user namespace in which that user is root, entered before anything else.
//! It must never go in with groups that it could not leave behind for its cages.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

use gaoler_policy::settings::Uids;
use gaoler_sys::clone::{Child, Side, fork, wait};
use gaoler_sys::process::{self, Strings};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid, getgroups, setgroups};

use crate::fault::{Doing, Fault};
use crate::notify;

/// The argument that says that it is done.
pub const WORD: &str = "inside";
/// The programs that map more ids than one's own, and the files with what they allow.
const MAPPERS: [(&str, &str); 2] =
    [("/usr/bin/newuidmap", "/etc/subuid"), ("/usr/bin/newgidmap", "/etc/subgid")];
/// With room for fewer tenants, ids of their own are not worth it.
const TENANTS_MIN: u32 = 256;

/// Starts this program anew as the root of a user namespace, where this host lets an ordinary user have one;
/// returns where it does not. Anew, because only a program that began inside is the namespace's to look at. Where the
/// host lends this user more ids, these are mapped to them.
///
/// # Errors
/// Supplementary groups, which nobody inside could drop; or a step that worked in the attempt and then did not.
pub fn enter(uids: &Uids) -> Result<(), Fault> {
    let lent = MAPPERS.map(|(_, file)| lent(file, uids));
    let lent = match &lent {
        [Some(uids), Some(gids)] => Some([uids.as_slice(), gids.as_slice()]),
        _ => None,
    };
    let mut chosen = None;
    for maps in lent.map(Some).into_iter().chain([None]) {
        let attempt = match fork(0, None).doing("try a user namespace")? {
            Side::Child => process::exit(u8::from(become_root(maps).and_then(|()| use_it()).is_err())),
            Side::Parent(child) => wait(child.pid, 0).doing("try a user namespace")?,
        };
        if attempt.is_some_and(|(_, ended)| ended.code == Some(0)) {
            chosen = Some(maps);
            break;
        }
    }
    let Some(maps) = chosen else { return Ok(()) };
    let own = getegid();
    if maps.is_none() && getgroups().doing("list groups")?.iter().any(|group| *group != own) {
        let why = "this user has supplementary groups, which a user namespace cannot drop and every cage would \
                   keep; start gaoler with the primary group alone (setpriv --clear-groups, or SupplementaryGroups= \
                   in the service file), or lend this user ids (newuidmap, /etc/subuid, /etc/subgid)";
        return Err(Fault::new("enter a user namespace", why));
    }
    become_root(maps).doing("enter a user namespace")?;
    let program = File::open("/proc/self/exe").doing("open the own program")?;
    let words = std::env::args_os().take(2).chain([WORD.into()]);
    let argv = Strings::new(words.filter_map(|word| CString::new(word.as_bytes()).ok()).collect());
    // Of the environment only the service manager's ear.
    let ear = std::env::var_os(notify::VARIABLE)
        .map(|name| [notify::VARIABLE.as_bytes(), b"=", name.as_bytes()].concat());
    let environment = Strings::new(ear.and_then(|ear| CString::new(ear).ok()).into_iter().collect());
    Err(process::execute_file(program.as_fd(), &argv, &environment)).doing("start anew inside")
}

/// Whether this really is one: root of it is one user of the host, and nobody in it is the host's root. The tenants'
/// range is cut to what is mapped of it.
///
/// # Errors
/// Another user namespace than gaoler makes, or the host's own.
pub fn check(uids: &mut Uids) -> Result<(), Fault> {
    let what = "start inside a user namespace";
    let map = fs::read_to_string("/proc/self/uid_map").doing(what)?;
    let numbers: Vec<u32> = map.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let rows: Vec<[u32; 3]> = numbers.as_chunks().0.to_vec();
    let wanted = wanted(uids);
    let known = |row: &&[u32; 3]| row[0] == 0 || wanted.iter().any(|[first, _]| *first == row[0]);
    let foreign = rows.iter().any(|row| row[1] == 0) || rows.iter().filter(known).count() != rows.len();
    if foreign || rows.first().is_none_or(|row| [row[0], row[2]] != [0, 1]) {
        return Err(Fault::new(what, "this is another one than gaoler makes; it is started by gaoler alone"));
    }
    if let Some(row) = rows.iter().find(|row| row[0] == uids.tenant[0]) {
        uids.tenant[1] = row[2].min(uids.tenant[1]);
    }
    Ok(())
}

/// The ranges of ids that gaoler uses, the tenants' last.
fn wanted(uids: &Uids) -> [[u32; 2]; 7] {
    let [frontend, upstream, ledger, exporter] =
        [uids.frontend, uids.upstream, uids.ledger, uids.exporter].map(|uid| [uid, 1]);
    [uids.run, uids.egress, frontend, upstream, ledger, exporter, uids.tenant]
}

/// What newuidmap(1) is to be told, as far as this file (subuid(5)) lends this user enough: one's own id as root, and
/// each of our ranges with a part of the loan.
fn lent(file: &str, uids: &Uids) -> Option<Vec<[u32; 3]>> {
    let own = geteuid().as_raw().to_string();
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = users.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2) == Some(&own.as_str())).then(|| fields[0].to_owned())
    });
    let text = fs::read_to_string(file).ok()?;
    let [first, count] = text.lines().find_map(|line| {
        let [who, first, count] = line.trim().split(':').collect::<Vec<_>>()[..] else { return None };
        let ours = who == own || Some(who) == name.as_deref();
        if ours { Some([first.parse().ok()?, count.parse().ok()?]) } else { None }
    })?;
    shares(uids, first, count)
}

/// How a loan of ids is shared out; `None` where it is too small, or the host's root is in it.
fn shares(uids: &Uids, first: u32, count: u32) -> Option<Vec<[u32; 3]>> {
    let end = first.checked_add(count).filter(|_| first > 0)?;
    let own = if count == 0 { return None } else { geteuid().as_raw() };
    let (mut rows, mut next) = (vec![[0, own, 1]], first);
    for [inside, length] in wanted(uids) {
        let left = end - next;
        let tenants = inside == uids.tenant[0];
        let length = if tenants { length.min(left) } else { length };
        if length > left || tenants && length < TENANTS_MIN {
            return None;
        }
        rows.push([inside, next, length]);
        next += length;
    }
    Some(rows)
}

fn become_root(maps: Option<[&[[u32; 3]]; 2]>) -> std::io::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    let mapper = maps.map(|maps| mapper(maps, gid.as_raw())).transpose()?;
    unshare(CloneFlags::CLONE_NEWUSER)?;
    if let Some((mapper, ready)) = mapper {
        drop(ready);
        let ended = wait(mapper.pid, 0)?;
        if ended.is_none_or(|(_, ended)| ended.code != Some(0)) {
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        setgroups(&[])?;
    } else {
        // Some hosts have no such file, and then need no such word.
        match write("/proc/self/setgroups", "deny") {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
        write("/proc/self/gid_map", &format!("0 {gid} 1"))?;
    }
    // Mounts are made anew in it, and only what belongs to it can be copied. Where it refuses, nothing is mounted.
    let _ = unshare(CloneFlags::CLONE_NEWNS);
    Ok(())
}

/// A child that stays outside, and maps this process's ids as soon as the pipe's end says that it is inside.
fn mapper(maps: [&[[u32; 3]]; 2], gid: u32) -> std::io::Result<(Child, OwnedFd)> {
    let (inside, ready) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let pid = std::process::id().to_string();
    match fork(0, None)? {
        Side::Parent(child) => Ok((child, ready)),
        Side::Child => {
            drop(ready);
            // What is handed to this program, the listener's key among it, is not for another.
            if process::close_all_but(&[0, 1, 2, inside.as_raw_fd()]).is_err() {
                process::exit(1);
            }
            let _ = nix::unistd::read(&inside, &mut [0]);
            let done = MAPPERS.iter().zip(maps).all(|((program, _), rows)| {
                let mut command = Command::new(program);
                command
                    .arg(&pid)
                    .env_clear()
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                for [within, without, count] in rows {
                    // Of gids, root's is the user's own.
                    let own = program.ends_with("newgidmap") && *within == 0;
                    let without = if own { &gid } else { without };
                    command.args([within, without, count].map(u32::to_string));
                }
                command.status().is_ok_and(|status| status.success())
            });
            process::exit(u8::from(!done))
        }
    }
}

/// As `fs::write`, without the wish to make the file, which not every /proc takes.
fn write(path: &str, text: &str) -> std::io::Result<()> {
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// A namespace without rights in it is none: some hosts let anybody make one, and then deny what it is for.
fn use_it() -> std::io::Result<()> {
    Ok(unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNET)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loan_of_ids_is_shared_out_or_left_alone() {
        let uids = Uids {
            run: [70_000, 10],
            egress: [80_000, 10],
            frontend: 90_000,
            upstream: 90_001,
            ledger: 90_002,
            exporter: 90_003,
            tenant: [100_000, 1000],
        };
        let rows = shares(&uids, 500_000, 65_536).unwrap();
        let expected = [
            [70_000, 500_000, 10],
            [80_000, 500_010, 10],
            [90_000, 500_020, 1],
            [90_001, 500_021, 1],
            [90_002, 500_022, 1],
            [90_003, 500_023, 1],
            [100_000, 500_024, 1000],
        ];
        assert_eq!((rows[0][0], rows[0][2], &rows[1..]), (0, 1, &expected[..]));
        assert_eq!(shares(&uids, 500_000, 300).unwrap()[7], [100_000, 500_024, 276]);
        for (first, count) in [(500_000, 279), (500_000, 5), (500_000, 0), (0, 65_536), (u32::MAX, 65_536)] {
            assert_eq!(shares(&uids, first, count), None, "{first} {count}");
        }
    }
}
