"""The official Python SDK, unmodified, against a server that runs the real CLI. It never looks behind the API.

usage: suite.py BASE_URL [raw]      (raw: the embedded upstream itself answers, no agent and no sessions)
"""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid

import anthropic

BASE_URL = sys.argv[1]
RAW = sys.argv[2:] == ["raw"]
MODEL = "claude-sonnet-5"
TOKEN = "sk-ant-oat01-matrix-" + uuid.uuid4().hex
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def agent(function):
    """A check that only an agent passes."""
    return function if RAW else check(function)


def client(token=TOKEN, **options):
    options.setdefault("max_retries", 0)
    return anthropic.Anthropic(auth_token=token, base_url=BASE_URL, timeout=120, **options)


def ask(text, **options):
    messages = options.pop("messages", [{"role": "user", "content": text}])
    options = {"model": MODEL, "max_tokens": 1024, "messages": messages, **options}
    return client().messages.create(**options)


def text_of(message):
    return "".join(block.text for block in message.content if block.type == "text")


def expect(found, expected):
    assert found == expected, f"found {found!r}, expected {expected!r}"


def refused(kind, status, call):
    """The error that a call ends with, in the class and form that users catch."""
    try:
        call()
    except anthropic.APIStatusError as error:
        expect((type(error).__name__, error.status_code), (kind, status))
        expect(error.body["type"], "error")
        assert error.body["error"]["message"], error.body
        assert error.request_id, "no request-id"
        assert TOKEN not in str(error.body)
        return error.body["error"]["type"]
    raise AssertionError("no error")


@check
def a_message_has_every_field():
    message = ask("ECHO: good morning")
    expect(text_of(message), "[embedded] good morning")
    expect((message.type, message.role, message.stop_reason), ("message", "assistant", "end_turn"))
    assert message.id.startswith("msg_"), message.id
    assert message._request_id, "no request-id"
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0, message.usage


@check
def an_api_key_is_a_credential_too():
    with_key = anthropic.Anthropic(api_key=TOKEN, base_url=BASE_URL, timeout=120, max_retries=0)
    messages = [{"role": "user", "content": "ECHO: by key"}]
    message = with_key.messages.create(model=MODEL, max_tokens=64, messages=messages)
    expect(text_of(message), "[embedded] by key")


@check
def the_stream_helper_gets_one_message():
    messages = [{"role": "user", "content": "ECHO: one two three"}]
    with client().messages.stream(model=MODEL, max_tokens=64, messages=messages) as stream:
        streamed = "".join(stream.text_stream)
        message = stream.get_final_message()
    expect(streamed, "[embedded] one two three")
    expect(text_of(message), streamed)
    expect(message.stop_reason, "end_turn")
    assert message.usage.output_tokens > 0, message.usage


@check
def the_raw_stream_is_well_formed():
    messages = [{"role": "user", "content": "ECHO: events"}]
    stream = client().messages.create(model=MODEL, max_tokens=64, messages=messages, stream=True)
    events = [event for event in stream if event.type != "ping"]
    kinds = [event.type for event in events]
    expect(kinds[0], "message_start")
    expect(kinds[-2:], ["message_delta", "message_stop"])
    expect(kinds.count("message_start"), 1)
    expect(kinds.count("message_delta"), 1)
    starts = [event.index for event in events if event.type == "content_block_start"]
    stops = [event.index for event in events if event.type == "content_block_stop"]
    expect(starts, list(range(len(starts))))
    expect(sorted(stops), starts)


@check
def images_reach_the_model():
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}}
    message = ask("", messages=[{"role": "user", "content": [image, {"type": "text", "text": "IMAGE?"}]}])
    assert "1 images" in text_of(message) and "image/png" in text_of(message), text_of(message)


@check
def the_system_prompt_reaches_the_model():
    assert "CANARY-SYSTEM-A" in text_of(ask("SYSTEM?", system="CANARY-SYSTEM-A"))
    blocks = [{"type": "text", "text": "CANARY-SYSTEM-B"}]
    assert "CANARY-SYSTEM-B" in text_of(ask("SYSTEM?", system=blocks))


@check
def earlier_turns_reach_the_model():
    message = ask(
        "",
        messages=[
            {"role": "user", "content": "my word is heron"},
            {"role": "assistant", "content": "I shall remember heron"},
            {"role": "user", "content": "HISTORY?"},
        ],
    )
    history = json.loads(text_of(message).removeprefix("[embedded] "))
    said = [[role, text] for role, text in history if "heron" in text]
    expect(said, [["user", "my word is heron"], ["assistant", "I shall remember heron"]])


@check
def a_refused_token_is_an_authentication_error():
    def call():
        client("sk-ant-oat01-refused-" + uuid.uuid4().hex).messages.create(
            model=MODEL, max_tokens=64, messages=[{"role": "user", "content": "hello"}]
        )

    expect(refused("AuthenticationError", 401, call), "authentication_error")


@agent
def a_malformed_token_is_an_authentication_error():
    def call():
        client("not-a-token").messages.create(
            model=MODEL, max_tokens=64, messages=[{"role": "user", "content": "hello"}]
        )

    expect(refused("AuthenticationError", 401, call), "authentication_error")


@agent
def a_wrong_body_is_a_bad_request():
    expect(refused("BadRequestError", 400, lambda: ask("", messages=[])), "invalid_request_error")
    wrong = [{"role": "nobody", "content": "hello"}]
    expect(refused("BadRequestError", 400, lambda: ask("", messages=wrong)), "invalid_request_error")
    session = {"session_id": "../../etc"}
    expect(refused("BadRequestError", 400, lambda: ask("x", extra_body=session)), "invalid_request_error")


@agent
def an_unknown_model_or_path_is_not_found():
    expect(refused("NotFoundError", 404, lambda: ask("hello", model="gpt-4")), "not_found_error")
    expect(refused("NotFoundError", 404, lambda: client().get("/v1/nothing", cast_to=object)), "not_found_error")


@agent
def a_body_past_the_limit_is_too_large():
    def call():
        ask("x" * (33 * 1024 * 1024))

    try:
        call()
    except anthropic.APIStatusError as error:
        expect(error.status_code, 413)
        expect(error.body["error"]["type"], "request_too_large")
    except anthropic.APIConnectionError:
        # The server may close before it has read 33 MB; what it must not do is answer.
        pass
    else:
        raise AssertionError("33 MB were taken")


@check
def one_overload_is_retried():
    patient = client(max_retries=2)
    messages = [{"role": "user", "content": "FAIL: 529 once " + uuid.uuid4().hex}]
    message = patient.messages.create(model=MODEL, max_tokens=64, messages=messages)
    assert text_of(message).startswith("[embedded] "), text_of(message)


@check
def a_lasting_overload_is_told():
    def call():
        ask("FAIL: 529")

    kinds = {"OverloadedError", "InternalServerError"}  # The class has its own name since 0.76.
    try:
        call()
    except anthropic.APIStatusError as error:
        assert type(error).__name__ in kinds and error.status_code == 529, error
        expect(error.body["error"]["type"], "overloaded_error")
    else:
        raise AssertionError("no error")


@agent
def a_failing_stream_is_an_error():
    def call():
        messages = [{"role": "user", "content": "FAIL: 400"}]
        with client().messages.stream(model=MODEL, max_tokens=64, messages=messages) as stream:
            stream.get_final_message()

    expect(refused("BadRequestError", 400, call), "invalid_request_error")


class Cut:
    """A proxy on loopback that cuts its first connection while the answer is waited for, and no other."""

    def __init__(self):
        address = urllib.parse.urlsplit(BASE_URL)
        self.server = (address.hostname, address.port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.connections = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.listener.accept()
            self.connections += 1
            threading.Thread(target=self.relay, args=(client, self.connections == 1), daemon=True).start()

    def relay(self, client, cut):
        server = socket.create_connection(self.server)
        threading.Thread(target=copy, args=(client, server), daemon=True).start()
        if cut:
            # The whole request has gone through once its run is known; the answer is seconds away.
            listed = {"authorization": "Bearer " + TOKEN}
            while True:
                with urllib.request.urlopen(urllib.request.Request(BASE_URL + "/v1/runs", headers=listed)) as response:
                    if any(run["status"] == "running" for run in json.load(response)["data"]):
                        break
            # Both ways at once, as a cable does it.
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            return
        copy(server, client)


def copy(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@agent
def a_retry_after_a_cut_runs_the_agent_once():
    for streamed in (False, True):
        proxy, name = Cut(), "joined-" + uuid.uuid4().hex
        cut = anthropic.Anthropic(auth_token=TOKEN, base_url=proxy.url, timeout=120, max_retries=2)
        options = {
            "model": MODEL,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": f"RUN: echo once >> {name}; sleep 2; wc -l < {name}"}],
        }
        if streamed:
            with cut.messages.stream(**options) as stream:
                message = stream.get_final_message()
        else:
            message = cut.messages.create(**options)
        expect(proxy.connections, 2)
        expect(text_of(message), "[embedded] RUN ok:\n1")
        # And nobody else ran it since.
        expect(text_of(ask(f"RUN: wc -l < {name}")), "[embedded] RUN ok:\n1")


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def weather_calls(cities):
    return "CALLS: " + " ;; ".join(f"mcp__client__get_weather {json.dumps({'city': city})}" for city in cities)


@agent
def a_plain_tool_loop_ends_with_the_models_answer():
    for streamed in (False, True):
        messages = [{"role": "user", "content": weather_calls(["Oslo", "Rome"])}]
        options = {"model": MODEL, "max_tokens": 64, "tools": [WEATHER]}
        asked = []
        while True:
            if streamed:
                with client().messages.stream(messages=messages, **options) as stream:
                    message = stream.get_final_message()
            else:
                message = client().messages.create(messages=messages, **options)
            messages.append({"role": "assistant", "content": message.content})
            if message.stop_reason != "tool_use":
                break
            calls = [block for block in message.content if block.type == "tool_use"]
            asked += [call.input["city"] for call in calls]
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": "sunny in " + call.input["city"]}
                for call in calls
            ]
            messages.append({"role": "user", "content": results})
        expect(asked, ["Oslo", "Rome"])
        expect(message.stop_reason, "end_turn")
        expect(text_of(message), "[embedded] CALLS 1 ok:\nsunny in Oslo\nCALLS 2 ok:\nsunny in Rome")


@agent
def the_sdks_own_tool_runner_works():
    asked = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        asked.append(city)
        return "sunny in " + city

    runner = client().beta.messages.tool_runner(
        model=MODEL,
        max_tokens=64,
        tools=[get_weather],
        messages=[{"role": "user", "content": weather_calls(["Oslo"])}],
    )
    message = runner.until_done()
    expect(asked, ["Oslo"])
    expect(text_of(message), "[embedded] CALLS 1 ok:\nsunny in Oslo")


@agent
def an_answer_follows_its_schema():
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    body = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    message = ask('CALLS: StructuredOutput {"city":"Oslo"}', extra_body=body)
    expect(json.loads(text_of(message)), {"city": "Oslo"})


@agent
def tokens_are_counted():
    messages = [{"role": "user", "content": "word " * 1000}]
    counted = client().messages.count_tokens(model=MODEL, messages=messages)
    assert 1000 < counted.input_tokens < 2000, counted


@agent
def models_are_listed_to_the_last_page():
    models = client().models
    ids = [model.id for model in models.list()]
    expect(ids[:3], ["opus", "sonnet", "haiku"])
    expect([model.id for model in models.list(limit=1)], ids)
    listed = models.retrieve("opus")
    expect((listed.type, listed.display_name, listed.created_at.year), ("model", "Claude Opus", 1970))
    expect(refused("NotFoundError", 404, lambda: models.retrieve("gpt-4o")), "not_found_error")
    expect(refused("BadRequestError", 400, lambda: models.list(limit=0)), "invalid_request_error")
    expect(refused("AuthenticationError", 401, lambda: client("nobody").models.list()), "authentication_error")


@agent
def the_agent_runs_commands_in_its_cage():
    message = ask("RUN: echo $((6 * 7)); id -u; pwd")
    answer = text_of(message)
    assert "42" in answer and "/workspace" in answer, answer
    expect([block.type for block in message.content if block.type == "tool_use"], [])
    expect(message.stop_reason, "end_turn")


@agent
def agent_turns_stream_as_one_message():
    messages = [{"role": "user", "content": "STEPS: echo first-step ;; echo second-step"}]
    with client().messages.stream(model=MODEL, max_tokens=64, messages=messages) as stream:
        starts = [event for event in stream if event.type == "message_start"]
        message = stream.get_final_message()
    expect(len(starts), 1)
    assert "second-step" in text_of(message), text_of(message)
    expect(message.stop_reason, "end_turn")


@agent
def a_session_remembers():
    session = {"session_id": str(uuid.uuid4())}
    first = ask("ECHO: my bird is a bittern", extra_body=session)
    expect(first.session_id, session["session_id"])
    second = ask("HISTORY?", extra_body=session)
    assert "bittern" in text_of(second), text_of(second)


@agent
def a_session_of_another_tenant_knows_nothing():
    session = {"session_id": str(uuid.uuid4())}
    ask("ECHO: my bird is a bittern", extra_body=session)
    stranger = client("sk-ant-oat01-stranger-" + uuid.uuid4().hex)
    messages = [{"role": "user", "content": "HISTORY?"}]
    message = stranger.messages.create(model=MODEL, max_tokens=64, messages=messages, extra_body=session)
    assert "bittern" not in text_of(message), text_of(message)


@agent
def fields_without_effect_are_named():
    messages = [{"role": "user", "content": "ECHO: warm"}]
    response = client().messages.with_raw_response.create(
        model=MODEL, max_tokens=64, messages=messages, extra_body={"temperature": 0.5}
    )
    assert "temperature" in response.headers.get("x-gaoler-ignored", ""), dict(response.headers)
    expect(text_of(response.parse()), "[embedded] warm")


@agent
def credentials_may_come_in_the_body():
    body = {
        "oauth_credentials": {"access_token": TOKEN, "refresh_token": "sk-ant-ort01-unused", "scopes": []},
        "messages": [{"role": "user", "content": "ECHO: in the body"}],
        "model": "sonnet",
    }
    request = urllib.request.Request(
        BASE_URL + "/v1/messages", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    expect(answer["content"][0]["text"], "[embedded] in the body")
    body["oauth_credentials"]["expires_at"] = 1000
    request.data = json.dumps(body).encode()
    try:
        urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        expect((error.code, json.load(error)["error"]["type"]), (401, "authentication_error"))
    else:
        raise AssertionError("an expired token was taken")


@check
def concurrent_requests_get_their_own_answers():
    async def all_of_them():
        many = anthropic.AsyncAnthropic(auth_token=TOKEN, base_url=BASE_URL, timeout=120, max_retries=0)

        async def one(number):
            messages = [{"role": "user", "content": f"ECHO: number {number}"}]
            async with many.messages.stream(model=MODEL, max_tokens=64, messages=messages) as stream:
                return text_of(await stream.get_final_message())

        return await asyncio.gather(*(one(number) for number in range(4)))

    expect(asyncio.run(all_of_them()), [f"[embedded] number {number}" for number in range(4)])


def main():
    failed = 0
    for function in CHECKS:
        try:
            function()
        except Exception:
            failed += 1
            print(f"FAIL {function.__name__}")
            traceback.print_exc(file=sys.stdout)
        else:
            print(f"ok   {function.__name__}")
        sys.stdout.flush()
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


main()
