"""Writes the OCI bundle of one environment: config.json, for crun and for runsc.

usage: bundle.py ENVIRONMENT FOLDER [--uid UID] [--kit DIR] [--rootfs DIR] [--profile FILE]
       [--add-cap CAP]... [--drop-cap CAP]... [--cgroup ro|rw|host] [--unmask] [--read-only]
       [--env NAME=VALUE]... -- COMMAND...
FOLDER holds what may be written: tmp, state and home. The kit is seen inside as /opt/gaoler, read-only.
It must never grant more than the environment's table here says: what a container lacks is what is tested.
"""
import argparse
import errno
import json
import os
import platform
import sys

# What Docker gives a container by default, in its own order.
DOCKER = """CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE
SYS_CHROOT KILL AUDIT_WRITE""".split()
# Every capability that Debian's runsc knows: what `runsc do` gives to root.
ALL = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE
SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL
SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ""".split()
MASKED = """/proc/acpi /proc/asound /proc/kcore /proc/keys /proc/latency_stats /proc/sched_debug /proc/scsi
/proc/timer_list /proc/timer_stats /sys/firmware /sys/devices/virtual/powercap""".split()
READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()
# uid (None: the one that is given), capabilities, whether privilege can be gained by execve, whether the runtime filters system calls.
ENVIRONMENTS = {
    "docker-root": (0, DOCKER, True, True),
    "docker-user": (None, [], False, True),
    # Replaced by what deploy/compose.yaml says.
    "docker-kernel": (0, DOCKER, True, True),
    # The same with a kernel from before the calls that mount by descriptor.
    "docker-old": (0, DOCKER, True, True),
    "gvisor-root": (0, ALL, True, False),
    "gvisor-user": (None, [], False, False),
}


def arguments():
    given = sys.argv[1:]
    at = given.index("--")
    parser = argparse.ArgumentParser()
    for name in ("environment", "folder"):
        parser.add_argument(name)
    for name in ("--kit", "--rootfs", "--uid"):
        parser.add_argument(name)
    parser.add_argument("--profile", default=os.path.join(os.path.dirname(__file__), "docker.json"))
    for name in ("--add-cap", "--drop-cap"):
        parser.add_argument(name, action="append", default=[])
    for name in ("--unmask", "--read-only"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--cgroup", default="ro")
    parser.add_argument("--env", action="append", default=[])
    return parser.parse_args(given[:at]), given[at + 1 :]


def filters(path, capabilities):
    """A profile in Docker's form, for these capabilities and this machine, in the runtime's form."""
    with open(path) as opened:
        profile = json.load(opened)
    names = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
    native = names[platform.machine()]
    row = next(row for row in profile["archMap"] if row["architecture"] == native)
    rules = []
    for rule in profile["syscalls"]:
        held = lambda part: set(rule.get(part, {}).get("caps", []))
        if not held("includes") <= capabilities or held("excludes") & capabilities:
            continue
        rules.append({key: rule[key] for key in ("names", "action", "errnoRet", "args") if key in rule})
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [native] + row["subArchitectures"],
        "syscalls": rules,
    }


def compose(given):
    """What deploy/compose.yaml gives its service: the file itself is what is tested."""
    import yaml

    deploy = os.path.join(os.path.dirname(__file__), "../../deploy")
    with open(os.path.join(deploy, "compose.yaml")) as opened:
        service = yaml.safe_load(opened)["services"]["gaoler"]
    security = [tuple(option.replace("=", ":", 1).split(":", 1)) for option in service["security_opt"]]
    security = dict(security)
    given.profile = os.path.join(deploy, security["seccomp"])
    given.drop_cap = service["cap_drop"]
    given.add_cap = ["CAP_" + name for name in service["cap_add"]]
    given.read_only = service["read_only"]
    if service["cgroup"] == "host" and "/sys/fs/cgroup:/sys/fs/cgroup:rw" in service["volumes"]:
        given.cgroup = "host"
    if not {"/tmp"} <= set(service["tmpfs"]) or "state:/var/lib/gaoler" not in service["volumes"]:
        sys.exit("compose.yaml does not give what the bundle has: a writable /tmp and /var/lib/gaoler")
    return security["no-new-privileges"] != "true"


def older(profile, folder):
    """The profile of a kernel that does not have the calls of 5.2 and 5.12 for mounts."""
    absent = ["open_tree", "move_mount", "mount_setattr", "fsopen", "fsconfig", "fsmount", "fspick"]
    with open(profile) as opened:
        profile = json.load(opened)
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in absent]
    profile["syscalls"].append({"names": absent, "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS})
    path = os.path.join(folder, "older.json")
    with open(path, "w") as opened:
        json.dump(profile, opened)
    return path


def mount(kind, place, source, *options):
    return {"type": kind, "destination": place, "source": source, "options": list(options)}


def bind(source, place, *options):
    return mount("bind", place, source, "rbind", *options)


def root(folder, whole):
    """A root with the host's programs, or the one that is given."""
    if whole:
        return [], whole
    bare = os.path.join(folder, "root")
    for name in ("usr", "etc", "proc", "dev", "sys", "tmp", "run", "root", "home", "opt", "var/lib", "var/tmp"):
        os.makedirs(os.path.join(bare, name), exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink("/" + name) and not os.path.lexists(os.path.join(bare, name)):
            os.symlink("usr/" + name, os.path.join(bare, name))
    return [bind("/usr", "/usr", "ro"), bind("/etc", "/etc", "ro")], bare


def main():
    given, command = arguments()
    given.folder = os.path.abspath(given.folder)
    uid, capabilities, gains, filtered = ENVIRONMENTS[given.environment]
    uid = int(given.uid) if uid is None else uid
    if given.environment in ("docker-kernel", "docker-old"):
        gains = compose(given)
    if given.environment == "docker-old":
        given.profile = older(given.profile, given.folder)
    # As Docker reads them: `ALL` dropped leaves what is added.
    kept = [] if "ALL" in given.drop_cap else ["CAP_" + name for name in capabilities]
    capabilities = [name for name in kept if name not in given.drop_cap] + given.add_cap
    host, rootfs = root(given.folder, given.rootfs)
    gvisor = not filtered
    mounts = [
        mount("proc", "/proc", "proc", "nosuid", "noexec", "nodev"),
        mount("tmpfs", "/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("tmpfs", "/dev/shm", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        mount("sysfs", "/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
    ]
    if not gvisor:
        pts = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
        mounts.insert(2, mount("devpts", "/dev/pts", "devpts", *pts))
        mounts.append(mount("mqueue", "/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"))
        if given.cgroup == "host":
            mounts.append(bind("/sys/fs/cgroup", "/sys/fs/cgroup", "rw"))
        else:
            options = ("nosuid", "noexec", "nodev", "relatime", given.cgroup)
            mounts.append(mount("cgroup", "/sys/fs/cgroup", "cgroup", *options))
    mounts += host
    if given.kit:
        mounts.append(bind(given.kit, "/opt/gaoler", "ro"))
    mounts += [
        bind(os.path.join(given.folder, "tmp"), "/tmp", "rw"),
        bind(os.path.join(given.folder, "state"), "/var/lib/gaoler", "rw"),
    ]
    # An image is run as it is: nothing is made in it, and its own places must do.
    if not given.rootfs:
        mounts.append(bind(os.path.join(given.folder, "var-tmp"), "/var/tmp", "rw"))
        mounts.append(bind(os.path.join(given.folder, "home"), "/home/user", "rw"))
    sets = ("bounding", "effective", "permitted") if uid == 0 else ("bounding",)
    if gvisor:
        sets += ("inheritable",) if uid == 0 else ()
    linux = {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]}
    if not gvisor:
        linux["seccomp"] = filters(given.profile, set(capabilities))
        if not given.unmask:
            linux["maskedPaths"], linux["readonlyPaths"] = MASKED, READ_ONLY
    config = {
        "ociVersion": "1.0.2",
        "hostname": "environment",
        "root": {"path": rootfs, "readonly": given.read_only},
        "mounts": mounts,
        "linux": linux,
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": uid},
            "cwd": "/tmp" if given.rootfs else "/home/user",
            "args": command,
            "env": given.env,
            "noNewPrivileges": not gains,
            "capabilities": {name: capabilities for name in sets},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 16384, "hard": 16384}],
        },
    }
    with open(os.path.join(given.folder, "config.json"), "w") as opened:
        json.dump(config, opened, indent=1)


main()
