#!/usr/bin/env python3
"""Records what the real CLI prints, one file a case, for the tests of the decoder and of the answer.

    tests/record/record.py --cli PATH --upstream PATH-OF-gaoler-upstream [--out DIR] [CASE...]

It runs the CLI without a cage, in a throw-away home and workspace, as an ordinary user (as uid 1000 where it is
started by root), against the embedded upstream; three cases that this does not speak come from a small double
in this file. Nothing here is part of the product: paths, ids of processes and times are replaced before a line
is written, so that a recording says nothing of the machine that it was made on.
"""

import argparse, base64, http.server, json, os, re, shutil, signal, subprocess, sys, threading, uuid

TOKEN = "sk-ant-oat01-" + "0" * 64
FLAGS = ["-p", "--setting-sources", "", "--strict-mcp-config", "--input-format", "stream-json",
         "--output-format", "stream-json", "--verbose", "--include-partial-messages"]
PIXEL = base64.b64encode(bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6364f8cf500f0003860180"
    "5a34d7ab0000000049454e44ae426082")).decode()


def user(*content):
    blocks = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"type": "user", "message": {"role": "user", "content": blocks}}


def control(request_id, **request):
    return {"type": "control_request", "request_id": request_id, "request": request}


INTERRUPT = control("interrupt", subtype="interrupt")
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}

# name: lines sent one by one, each after the result of the one before, and what differs from the usual
CASES = {
    "plain": dict(lines=[user("Hello")]),
    "slash_neutralised": dict(lines=[user(" /cost @note.txt")]),
    "slash_command": dict(lines=[user("/cost")]),
    "tool_use": dict(lines=[user("RUN: echo x")]),
    "tool_error": dict(lines=[user("RUN: exit 3")]),
    "read_tool": dict(lines=[user("READ: {ws}/note.txt")]),
    "parallel_tools": dict(lines=[user("TOOLS: echo one ;; echo two")]),
    "steps": dict(lines=[user("STEPS: echo one ;; echo two")]),
    "thinking": dict(lines=[user("THINK: deep")]),
    "image": dict(lines=[user(IMAGE, "IMAGE?")]),
    "big": dict(lines=[user("BIG: 4")]),
    "err400": dict(lines=[user("FAIL: 400")]),
    "err401": dict(lines=[user("FAIL: 401")]),
    "err403": dict(lines=[user("FAIL: 403")]),
    "err404": dict(lines=[user("FAIL: 404")]),
    "err413": dict(lines=[user("FAIL: 413")]),
    "err429": dict(lines=[user("FAIL: 429")]),
    "err500": dict(lines=[user("FAIL: 500")]),
    "err529": dict(lines=[user("FAIL: 529")]),
    "retry_then_success": dict(lines=[user("FAIL: 529 once")]),
    "midstream_error": dict(lines=[user("ERROR: overloaded_error")]),
    "cut_stream": dict(lines=[user("CUT: half an answer")]),
    "refused_connection": dict(lines=[user("Hello")], upstream="http://127.0.0.1:9"),
    "max_turns": dict(lines=[user("RUN: echo x")], args=["--max-turns", "1"]),
    "max_budget": dict(lines=[user("RUN: echo x")], args=["--max-budget-usd", "0.000001"]),
    "fallback_529": dict(lines=[user("FAIL: 529")], args=["--fallback-model", "haiku"]),
    "permission_denial": dict(lines=[user("RUN: touch denied")], mode="default"),
    "stdin_multi_turn": dict(lines=[user("one"), user("two"), user("HISTORY?")]),
    "stdin_replay": dict(lines=[user("Hello")], args=["--replay-user-messages"]),
    "control_initialize": dict(first=[control("init", subtype="initialize")], lines=[user("Hello")]),
    "control_interrupt": dict(lines=[user("SLOW: 200 " + "word " * 60)], during=INTERRUPT),
    "control_interrupt_tool": dict(lines=[user("RUN: sleep 1; sleep 20; echo done")], during=INTERRUPT, after=2.0),
    "control_interrupt_silent": dict(lines=[user("SILENT:")], during=INTERRUPT),
    "signal_SIGINT": dict(lines=[user("SLOW: 200 " + "word " * 60)], signal=signal.SIGINT),
    "signal_SIGTERM": dict(lines=[user("SLOW: 200 " + "word " * 60)], signal=signal.SIGTERM),
    "signal_SIGKILL": dict(lines=[user("SLOW: 200 " + "word " * 60)], signal=signal.SIGKILL),
    "garbage_on_stdin": dict(lines=["not a line of the protocol"]),
    "refusal": dict(lines=[user("refuse")], upstream="double"),
    "max_tokens": dict(lines=[user("max_tokens")], upstream="double"),
    "ratelimit_rejected": dict(lines=[user("rejected")], upstream="double"),
    "ratelimit_warning": dict(lines=[user("warning")], upstream="double"),
}


class Double(http.server.BaseHTTPRequestHandler):
    """What the embedded upstream does not say: refusals, cut answers, and the state of a plan."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_HEAD = do_GET

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        texts = [b["text"] for m in body["messages"] if m["role"] == "user" and not isinstance(m["content"], str)
                 for b in m["content"] if b.get("type") == "text" and not b["text"].startswith("<system-reminder>")]
        wish = texts[0].strip() if texts else ""
        plan = {"anthropic-ratelimit-unified-status": {"rejected": "rejected", "warning": "allowed_warning"}.get(wish),
                "anthropic-ratelimit-unified-reset": "4102444800",
                "anthropic-ratelimit-unified-representative-claim": "five_hour"}
        if wish == "rejected":
            error = {"type": "error", "error": {"type": "rate_limit_error", "message": "limit"}}
            return self.answer(429, "application/json", json.dumps(error).encode(),
                               {**plan, "x-should-retry": "false"})
        stop = {"refuse": "refusal", "max_tokens": "max_tokens"}.get(wish, "end_turn")
        usage = {"input_tokens": 10, "output_tokens": 1}
        events = [{"type": "message_start", "message": {
            "id": "msg_double", "type": "message", "role": "assistant", "model": body["model"], "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": usage}}]
        if stop != "refusal":
            events += [{"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
                       {"type": "content_block_delta", "index": 0,
                        "delta": {"type": "text_delta", "text": "[double] " + wish}},
                       {"type": "content_block_stop", "index": 0}]
        events += [{"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None},
                    "usage": {"output_tokens": 7}}, {"type": "message_stop"}]
        text = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)
        self.answer(200, "text/event-stream", text.encode(), plan if wish == "warning" else {})

    def answer(self, status, kind, body, headers):
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def record(name, case, cli, upstream, root):
    # Constant paths: a stream cuts them in pieces, so that not every one can be replaced afterwards.
    home, ws = "/tmp/gaoler-record/home", "/tmp/gaoler-record/workspace"
    shutil.rmtree("/tmp/gaoler-record", ignore_errors=True)
    os.makedirs(home)
    os.makedirs(ws)
    with open(f"{ws}/note.txt", "w") as note:
        note.write("a note\n")
    ids = {}
    if root:
        for folder in (home, ws):
            os.chmod(folder, 0o755)
            subprocess.run(["chown", "-R", "1000:1000", folder], check=True)
        ids = dict(user=1000, group=1000, extra_groups=[])
    env = {"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", "ANTHROPIC_BASE_URL": upstream,
           "CLAUDE_CODE_OAUTH_TOKEN": TOKEN, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
           "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
           "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1", "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
           "CLAUDE_CODE_TMPDIR": f"{home}/tmp", "CLAUDE_CODE_MAX_RETRIES": "2"}
    args = [cli, *FLAGS, "--permission-mode", case.get("mode", "bypassPermissions"),
            "--session-id", str(uuid.uuid4()), *case.get("args", [])]
    process = subprocess.Popen(args, cwd=ws, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True, **ids)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    pending = list(case["lines"])
    disturbed = []

    def send(line):
        text = line if isinstance(line, str) else json.dumps(line)
        try:
            process.stdin.write(text.replace("{ws}", ws).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    def disturb():
        if "during" in case:
            send(case["during"])
        if "signal" in case:
            process.send_signal(case["signal"])

    for line in case.get("first", []):
        send(line)
    send(pending.pop(0))
    out = []
    for raw in process.stdout:
        text = raw.decode()
        out.append(scrub(text, home, ws))
        kind = json.loads(text).get("type") if text.startswith("{") else None
        subtype = json.loads(text).get("subtype") if text.startswith("{") else None
        if ("during" in case or "signal" in case) and not disturbed and subtype == "status":
            disturbed.append(threading.Timer(case.get("after", 1.0), disturb))
            disturbed[0].start()
        if kind == "result":
            if pending:
                send(pending.pop(0))
            else:
                process.stdin.close()
    status = process.wait()
    watchdog.cancel()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    shutil.rmtree("/tmp/gaoler-record", ignore_errors=True)
    return out, status


def scrub(text, home, ws):
    for path, shown in ((ws, "/workspace"), (home, "/home/agent")):
        text = text.replace(path, shown).replace(re.sub(r"[^A-Za-z0-9]", "-", path), shown.replace("/", "-"))
    text = re.sub(r"127\.0\.0\.1:\d{4,}", "127.0.0.1:8000", text)
    text = re.sub(r"/tmp/cc-socks-\d+/\d+\.sock", "/tmp/cc-socks/1.sock", text)
    text = re.sub(r'("timestamp":\s*)"[^"]*"', r'\1"2026-01-01T00:00:00.000Z"', text)
    text = re.sub(r'uid=\d+\([^)]*\)|gid=\d+\([^)]*\)', lambda m: m.group(0).split("=")[0] + "=1000(agent)", text)
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cli", required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "..", "cli-events"))
    parser.add_argument("cases", nargs="*")
    asked = parser.parse_args()
    embedded = subprocess.Popen([asked.upstream, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE)
    address = embedded.stdout.readline().decode().split()[-1]
    double = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Double)
    threading.Thread(target=double.serve_forever, daemon=True).start()
    upstreams = {None: f"http://{address}", "double": f"http://127.0.0.1:{double.server_address[1]}"}
    try:
        for name in asked.cases or CASES:
            case = CASES[name]
            wish = case.get("upstream")
            lines, status = record(name, case, asked.cli, upstreams.get(wish, wish), os.geteuid() == 0)
            with open(os.path.join(asked.out, f"{name}.jsonl"), "w") as file:
                file.writelines(lines)
            print(f"{name}: {len(lines)} lines, status {status}", flush=True)
    finally:
        embedded.kill()


if __name__ == "__main__":
    sys.exit(main())
