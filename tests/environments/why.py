"""Prints from a suite's log why its tests failed: of each the panics' words, and the last that its server said.

usage: why.py LOG
It must never print a log as a whole: CI shows what it prints, and a line of a flood has no end.
"""
import collections
import sys

# Lines of a panic, lines of a server, characters of a line.
PANIC, SERVER, WIDTH = 16, 8, 500
SERVERS = "---- stderr of the server ----"


def tell(lines):
    for line in lines:
        print(line if len(line) <= WIDTH else line[:WIDTH] + "...")


with open(sys.argv[1], errors="replace") as opened:
    lines = [line.rstrip("\n") for line in opened]
begin = next((at for at, line in enumerate(lines) if line.startswith("---- t")), None)
if begin is None:
    # It did not come to its end: a crash, a limit of time, an environment that did not start.
    tell(lines[-2 * PANIC :])
    sys.exit()
left, server = 0, collections.deque(maxlen=SERVER)
for line in lines[begin:]:
    ends = line == SERVERS or line == "failures:" or line.startswith("---- ") or "panicked at " in line
    if ends:
        tell(server)
        server.clear()
        left = 0
    if line == "failures:":
        break
    if "panicked at " in line:
        left = PANIC
    if line == SERVERS:
        left = -1
    if ends and left == 0 or left > 0 and line:
        tell([line])
        left -= left > 0
    elif left < 0 and line and not ends:
        server.append(line)
    elif left < 0:
        tell([line] if line else [])
tell(server)
