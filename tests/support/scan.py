"""Looks for a token in everything that a process can read: files, and of each process that it sees the
environment, the command line, open files and memory. Prints `hits` and where; never the token.

usage: scan.py NAME PIDS FOLDER...   PIDS is `all` or numbers with commas
The expression is written so that neither this text nor a command line that runs it matches.
"""
import os
import re
import stat
import sys

PAGE = os.sysconf("SC_PAGE_SIZE")
# Bytes of an area that are read where nobody says which of them are there: to read one is to make it.
AREA = 1 << 26
TOKEN = re.compile(b"sk-ant-oat01-te[s]t-" + sys.argv[1].encode())
hits, looked = [], {"files": 0, "processes": 0, "pages": 0}


def look(place, data):
    if TOKEN.search(data):
        hits.append(place)


def file(path, place=None):
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as opened:
                tail = b""
                while block := opened.read(1 << 22):
                    look(place or path, tail + block)
                    tail = block[-256:]
            looked["files"] += 1
    except OSError:
        pass


def memory(pid):
    """Every page that is there. The CLI reserves a hundred times more than it touches, and /proc/PID/pagemap
    says what it has touched; gVisor has none, and there each readable area is read from its beginning."""
    with open(f"/proc/{pid}/maps") as maps:
        areas = [line.split() for line in maps]
    mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    except FileNotFoundError:
        pagemap = None
    for area in areas:
        if "r" not in area[1] or area[-1] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            continue
        start, end = (int(part, 16) for part in area[0].split("-"))
        entry, tail = start // PAGE, b""
        while pagemap is None and start < min(end, entry * PAGE + AREA):
            try:
                data = os.pread(mem, min(1 << 22, end - start), start)
            except OSError:
                data = b""
            if not data:
                break
            looked["pages"] += len(data) // PAGE
            look(f"memory of {pid}", tail + data)
            start, tail = start + len(data), data[-256:]
        if pagemap is None:
            continue
        while entry < end // PAGE:
            count = min(1 << 20, end // PAGE - entry)
            words = os.pread(pagemap, count * 8, entry * 8)
            count = len(words) // 8
            if count == 0:
                break
            if words.count(0) != len(words):
                there = [n for n in range(count) if words[n * 8 + 7] & 0xC0]
                runs = []
                for n in there:
                    if runs and runs[-1][1] == n and n - runs[-1][0] < 1024:
                        runs[-1][1] = n + 1
                    else:
                        runs.append([n, n + 1])
                for first, last in runs:
                    try:
                        data = os.pread(mem, (last - first) * PAGE, (entry + first) * PAGE)
                    except OSError:
                        continue
                    looked["pages"] += last - first
                    look(f"memory of {pid}", tail + data)
                    tail = data[-256:]
            entry += count
    os.close(mem)
    if pagemap is not None:
        os.close(pagemap)


pids = [p for p in os.listdir("/proc") if p.isdigit()] if sys.argv[2] == "all" else sys.argv[2].split(",")
for pid in pids:
    for name in ("environ", "cmdline", "comm"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as opened:
                look(f"{name} of {pid}", opened.read())
        except OSError:
            pass
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            file(f"/proc/{pid}/fd/{fd}", f"descriptor {fd} of {pid}")
        memory(pid)
        looked["processes"] += 1
    except OSError:
        pass
for folder in sys.argv[3:]:
    for where, _, names in os.walk(folder):
        for name in names:
            file(os.path.join(where, name))
print("hits", sorted(set(hits)))
print("looked", looked)
