"""The official OpenAI SDK for Python, unmodified, against a server that runs the real CLI. It never looks behind
the API.

usage: openai_suite.py BASE_URL
"""

import asyncio
import json
import sys
import traceback
import urllib.request
import uuid

import openai

BASE_URL = sys.argv[1]
MODEL = "claude-sonnet-5"
TOKEN = "sk-ant-oat01-matrix-" + uuid.uuid4().hex
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def client(token=TOKEN, **options):
    options.setdefault("max_retries", 0)
    return openai.OpenAI(api_key=token, base_url=BASE_URL + "/v1", timeout=120, **options)


def said(content):
    return [{"role": "user", "content": content}]


def ask(content, **options):
    options = {"model": MODEL, "messages": said(content), **options}
    return client().chat.completions.create(**options)


def text_of(completion):
    return completion.choices[0].message.content


def expect(found, expected):
    assert found == expected, f"found {found!r}, expected {expected!r}"


def refused(kind, status, call):
    """The error that a call ends with, in the class and form that users catch: its code and its field."""
    try:
        call()
    except openai.APIStatusError as error:
        expect((type(error).__name__, error.status_code), (kind, status))
        assert error.body["message"] and error.type, error.body
        assert error.request_id, "no request-id"
        assert TOKEN not in str(error.body)
        return error.code, error.param
    raise AssertionError("no error")


@check
def a_completion_has_every_field():
    completion = ask("ECHO: good morning", max_completion_tokens=64)
    expect(text_of(completion), "[embedded] good morning")
    choice = completion.choices[0]
    expect((completion.object, choice.index, choice.finish_reason), ("chat.completion", 0, "stop"))
    expect((choice.message.role, choice.message.tool_calls, choice.message.refusal), ("assistant", None, None))
    assert completion.id.startswith("chatcmpl-") and completion.created > 1_600_000_000, completion
    assert completion._request_id, "no request-id"
    usage = completion.usage
    assert usage.prompt_tokens > 0 and usage.completion_tokens > 0, usage
    expect(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)


@check
def a_stream_has_one_role_one_reason_and_its_usage_where_asked():
    for options in [{}, {"stream_options": {"include_usage": True}}]:
        chunks = list(ask("ECHO: one two three", stream=True, **options))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        expect("".join(choice.delta.content or "" for choice in choices), "[embedded] one two three")
        expect([choice.delta.role for choice in choices if choice.delta.role], ["assistant"])
        expect([choice.finish_reason for choice in choices if choice.finish_reason], ["stop"])
        expect(len({chunk.id for chunk in chunks}), 1)
        told = [chunk.usage for chunk in chunks if chunk.usage]
        expect(len(told), len(options))
        assert all(usage.total_tokens > usage.completion_tokens > 0 for usage in told), told


@check
def the_stream_helper_gets_one_completion():
    with client().chat.completions.stream(model=MODEL, messages=said("STEPS: echo step-1 ;; echo step-2")) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert "content.delta" in kinds and "chunk" in kinds, kinds
    assert "step-2" in text_of(completion), text_of(completion)
    expect(completion.choices[0].finish_reason, "stop")


@check
def images_reach_the_model():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}
    answer = text_of(ask([image, {"type": "text", "text": "IMAGE?"}]))
    assert "1 images" in answer and "image/png" in answer, answer
    fetched = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    code, param = refused("BadRequestError", 400, lambda: ask([fetched]))
    expect((code, param), ("invalid_request", "messages[0].content[0].image_url.url"))


@check
def system_and_developer_messages_reach_the_model():
    roles = ["system", "developer"]
    instructions = [{"role": role, "content": "CANARY-" + role} for role in roles]
    answer = text_of(ask("", messages=[*instructions, *said("SYSTEM?")]))
    assert all("CANARY-" + role in answer for role in roles), answer


@check
def earlier_turns_reach_the_model():
    earlier = [*said("my word is heron"), {"role": "assistant", "content": "I shall remember heron"}]
    answer = text_of(ask("", messages=[*earlier, *said("HISTORY?")]))
    history = json.loads(answer.removeprefix("[embedded] "))
    found = [[role, text] for role, text in history if "heron" in text]
    expect(found, [["user", "my word is heron"], ["assistant", "I shall remember heron"]])


@check
def a_token_that_is_refused_or_is_none_is_an_authentication_error():
    def call(token):
        return lambda: client(token).chat.completions.create(model=MODEL, messages=said("hello"))

    stranger = "sk-ant-oat01-refused-" + uuid.uuid4().hex
    expect(refused("AuthenticationError", 401, call(stranger)), ("credential_refused", None))
    expect(refused("AuthenticationError", 401, call("sk-proj-of-another-house")), ("invalid_token_format", None))


@check
def a_wrong_body_is_a_bad_request():
    expect(refused("BadRequestError", 400, lambda: ask("", messages=[])), ("invalid_request", "messages"))
    expect(refused("BadRequestError", 400, lambda: ask("x", n=2)), ("invalid_request", "n"))
    session = {"x-session-id": "../../etc"}
    expect(
        refused("BadRequestError", 400, lambda: ask("x", extra_headers=session)),
        ("invalid_session_id", "x-session-id"),
    )


@check
def an_unknown_model_is_not_found():
    expect(refused("NotFoundError", 404, lambda: ask("hello", model="gpt-4o")), ("model_not_found", "model"))


@check
def one_overload_is_retried():
    patient = client(max_retries=2).chat.completions.with_raw_response
    response = patient.create(model=MODEL, messages=said("FAIL: 529 once " + uuid.uuid4().hex))
    assert text_of(response.parse()).startswith("[embedded] ")


@check
def a_lasting_overload_is_told():
    try:
        ask("FAIL: 529")
    except openai.InternalServerError as error:
        expect((error.status_code, error.code), (529, "upstream_overloaded"))
        expect(error.response.headers["retry-after"], "10")
    else:
        raise AssertionError("no error")


@check
def what_must_not_be_repeated_is_not():
    headers = {"x-session-id": str(uuid.uuid4())}
    stream = ask("RUN: sleep 3; echo done", stream=True, extra_headers=headers)
    first = next(iter(stream))
    expect(first.choices[0].delta.role, "assistant")
    impatient = client(max_retries=2)
    try:
        impatient.chat.completions.create(model=MODEL, messages=said("ECHO: x"), extra_headers=headers)
    except openai.ConflictError as error:
        expect((error.code, error.response.headers["x-should-retry"]), ("session_busy", "false"))
        expect(error.response.request.headers["x-stainless-retry-count"], "0")
    else:
        raise AssertionError("two runs in one session")
    rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "done" in rest, rest


@check
def a_failing_stream_is_an_error():
    code, _ = refused("BadRequestError", 400, lambda: list(ask("FAIL: 400", stream=True)))
    expect(code, "upstream_invalid_request")


@check
def the_agent_runs_commands_in_its_cage():
    completion = ask("RUN: echo $((6 * 7)); id -u; pwd")
    assert "42" in text_of(completion) and "/workspace" in text_of(completion), text_of(completion)
    expect((completion.choices[0].message.tool_calls, completion.choices[0].finish_reason), (None, "stop"))


@check
def a_session_remembers_and_only_its_own_tenants():
    session = str(uuid.uuid4())
    first = ask("ECHO: my bird is a bittern", extra_headers={"x-session-id": session})
    expect(first.session_id, session)
    assert "bittern" in text_of(ask("HISTORY?", extra_body={"session_id": session}))
    stranger = client("sk-ant-oat01-stranger-" + uuid.uuid4().hex)
    answer = stranger.chat.completions.create(
        model=MODEL, messages=said("HISTORY?"), extra_headers={"x-session-id": session}
    )
    assert "bittern" not in text_of(answer), text_of(answer)


@check
def fields_without_effect_are_named():
    function = {"name": "weather", "parameters": {"type": "object"}}
    response = client().chat.completions.with_raw_response.create(
        model=MODEL, messages=said("ECHO: warm"), temperature=0.5, functions=[function], function_call="auto"
    )
    named = response.headers["x-gaoler-ignored"].split(",")
    expect(sorted(named), ["function_call", "functions", "temperature"])
    expect(text_of(response.parse()), "[embedded] warm")


@check
def thinking_is_shown_where_it_is_asked_for():
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    message = ask("THINK: deep", extra_body=thinking).choices[0].message
    expect((message.content, message.reasoning_content), ("[embedded] deep", "deep"))
    plain = ask("THINK: deep", reasoning_effort="high").choices[0].message
    expect((plain.content, getattr(plain, "reasoning_content", None)), ("[embedded] deep", None))


@check
def models_are_listed():
    listed = client().models.list().data
    expect([model.id for model in listed][:3], ["opus", "sonnet", "haiku"])
    expect({(model.object, model.owned_by) for model in listed}, {("model", "anthropic")})
    expect(client().models.retrieve("opus").id, "opus")
    code, _ = refused("NotFoundError", 404, lambda: client().models.retrieve("gpt-4o"))
    expect(code, "model_not_found")
    code, _ = refused("AuthenticationError", 401, lambda: client("nobody").models.list())
    expect(code, "invalid_token_format")


@check
def a_chat_front_end_is_understood():
    """What the likes of Open WebUI send: fields of their own, a history, usage, and a plain reader of lines."""
    last = [{"type": "text", "text": "ECHO: from a front end", "cache_control": {"type": "ephemeral"}}]
    body = {
        "model": "sonnet",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello", "reasoning_content": "hm"},
            {"role": "user", "content": last},
        ],
        "chat_id": str(uuid.uuid4()),
        "id": str(uuid.uuid4()),
        "session_id": "lJ2xk9Zq-A_socketAAAB",
        "user": {"name": "eve", "id": "1", "email": "eve@example.com", "role": "user"},
        "background_tasks": {"title_generation": True},
        "features": {"web_search": False},
        "logit_bias": None,
    }
    headers = {"content-type": "application/json", "authorization": "Bearer " + TOKEN}
    request = urllib.request.Request(BASE_URL + "/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        named = response.headers["x-gaoler-ignored"]
        lines = [line.decode().rstrip("\n") for line in response]
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    expect(data.pop(), "[DONE]")
    chunks = [json.loads(line) for line in data]
    words = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    expect("".join(words), "[embedded] from a front end")
    expect((chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"] > 0), ([], True))
    for name in ["session_id", "chat_id", "user", "background_tasks"]:
        assert name in named.split(","), named


FUNCTION = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def weather_calls(cities):
    return "CALLS: " + " ;; ".join(f"mcp__client__get_weather {json.dumps({'city': city})}" for city in cities)


def created(**options):
    return client().chat.completions.create(model=MODEL, tools=[FUNCTION], **options).choices[0]


def streamed(**options):
    with client().chat.completions.stream(model=MODEL, tools=[FUNCTION], **options) as stream:
        kinds = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    if choice.message.tool_calls:
        assert "tool_calls.function.arguments.done" in kinds, kinds
    return choice


@check
def a_tool_loop_ends_with_the_models_answer():
    for asked_by in [created, streamed]:
        messages, asked = said(weather_calls(["Oslo", "Rome"])), []
        while True:
            choice = asked_by(messages=messages)
            messages.append(choice.message.to_dict())
            if choice.finish_reason != "tool_calls":
                break
            for call in choice.message.tool_calls:
                expect((call.type, call.function.name), ("function", "get_weather"))
                city = json.loads(call.function.arguments)["city"]
                asked.append(city)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny in " + city})
        expect(asked, ["Oslo", "Rome"])
        expect(choice.finish_reason, "stop")
        answer = "[embedded] CALLS 1 ok:\nsunny in Oslo\nCALLS 2 ok:\nsunny in Rome"
        expect(choice.message.content, answer)


@check
def a_choice_that_insists_on_a_call_is_named_and_none_offers_no_tools():
    raw = client().chat.completions.with_raw_response.create(
        model=MODEL, messages=said("hello"), tools=[FUNCTION], tool_choice="required", parallel_tool_calls=False
    )
    expect(raw.headers["x-gaoler-ignored"], "parallel_tool_calls,tool_choice")
    choice = created(messages=said(weather_calls(["Oslo"])), tool_choice="none")
    expect((choice.finish_reason, choice.message.tool_calls), ("stop", None))


@check
def concurrent_requests_get_their_own_answers():
    async def all_of_them():
        many = openai.AsyncOpenAI(api_key=TOKEN, base_url=BASE_URL + "/v1", timeout=120, max_retries=0)

        async def one(number):
            stream = await many.chat.completions.create(
                model=MODEL, messages=said(f"ECHO: number {number}"), stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

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
