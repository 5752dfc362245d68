"""Makes a snapshot of what `gaoler doctor --json`, and then `gaoler doctor`, said in an environment.

usage: table.py LOG   LOG holds both outputs, each with a line `status N`, and `----` between them
It must never leave out a layer, and fails where the table and the JSON do not say the same.
"""
import json
import re
import sys

with open(sys.argv[1]) as opened:
    machine, people = opened.read().split("----\n")


def status(text):
    body, number = re.fullmatch(r"(.*?)status (\d+)\n", text, re.DOTALL).groups()
    return body, int(number)


(machine, code), (people, again) = status(machine), status(people)
if code != again:
    sys.exit(f"doctor --json ends with {code}, doctor with {again}")
try:
    host = json.loads(machine)
except ValueError:
    # It could not look at all; its message is the snapshot.
    print(f"no tier, status {code}")
    print(people.strip())
    sys.exit(0 if code != 0 and people.strip() else "doctor printed no JSON and ended with 0")
# The first paragraphs of the table, word by word: NAME STATE [ERRNO], then NAME yes|no BECAUSE.
words = [line.split() for line in people.partition("\nTo mend:")[0].splitlines()]
shown = {row[0]: row[1:] for row in words if len(row) > 1}
lines = [f"tier: {host['tier']}, status {code}", ""]
if shown["tier:"] != [host["tier"]]:
    sys.exit(f"the table says tier {shown['tier:']}, the JSON {host['tier']}")
for row in host["layers"]:
    said = [row["state"]] + ([row["errno"]] if row["errno"] else [])
    if shown.get(row["name"]) != said:
        sys.exit(f"{row['name']}: the table says {shown.get(row['name'])}, the JSON {said}")
    if (row["state"] == "enforced") != (row["fix"] is None):
        sys.exit(f"{row['name']}: {row['state']}, and its fix is {row['fix']}")
    lines.append(f"{row['name']:<24}{row['state']:<11}{row['errno'] or ''}".rstrip())
lines.append("")
for row in host["guarantees"]:
    said = row["held"]
    if shown.get(row["name"], [""])[0] != said:
        sys.exit(f"{row['name']}: the table says {shown.get(row['name'])}, the JSON {said}")
    lines.append(f"{row['name']:<24}{said}")
print("\n".join(lines))
