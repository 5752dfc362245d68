// The official OpenAI SDK for TypeScript, unmodified, against a server that runs the real CLI. It never looks
// behind the API.  usage: node openai_suite.mjs BASE_URL

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import OpenAI from "openai";

const baseURL = `${process.argv[2]}/v1`;
const model = "claude-sonnet-5";
const token = `sk-ant-oat01-matrix-${randomUUID()}`;
const pixel =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const checks = [];
const check = (name, body) => checks.push([name, body]);

const client = (apiKey = token, options = {}) =>
  new OpenAI({ apiKey, baseURL, timeout: 120_000, maxRetries: 0, ...options });
const say = (content, extra = {}) => ({ model, messages: [{ role: "user", content }], ...extra });
const ask = (content, extra) => client().chat.completions.create(say(content, extra));
const text = (completion) => completion.choices[0].message.content;

// The error that a call ends with, in the class and form that users catch: its code and its field.
async function refused(className, status, call) {
  const error = await call().then(
    () => assert.fail("no error"),
    (error) => error,
  );
  assert.ok(error instanceof OpenAI[className], `${error?.constructor?.name}: ${error}`);
  assert.equal(error.status, status);
  assert.ok(error.error.message && error.type, JSON.stringify(error.error));
  assert.ok(error.requestID, "no request-id");
  assert.ok(!JSON.stringify(error.error).includes(token));
  return [error.code, error.param];
}

check("a completion has every field", async () => {
  const completion = await ask("ECHO: good morning", { max_completion_tokens: 64 });
  assert.equal(text(completion), "[embedded] good morning");
  assert.deepEqual([completion.object, completion.choices[0].finish_reason], ["chat.completion", "stop"]);
  assert.match(completion.id, /^chatcmpl-/);
  assert.ok(completion._request_id);
  const { prompt_tokens, completion_tokens, total_tokens } = completion.usage;
  assert.ok(prompt_tokens > 0 && completion_tokens > 0);
  assert.equal(total_tokens, prompt_tokens + completion_tokens);
});

check("a stream ends with its usage", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await ask("ECHO: one two three", options)) chunks.push(chunk);
  const choices = chunks.flatMap((chunk) => chunk.choices);
  assert.equal(choices.map((choice) => choice.delta.content ?? "").join(""), "[embedded] one two three");
  assert.deepEqual(
    choices.map((choice) => choice.finish_reason).filter((reason) => reason),
    ["stop"],
  );
  assert.deepEqual([chunks.filter((chunk) => chunk.usage).length, chunks.at(-1).choices], [1, []]);
});

check("the stream helper gets one completion of several turns", async () => {
  const stream = client().chat.completions.stream(say("STEPS: echo first-step ;; echo second-step"));
  let streamed = "";
  stream.on("content", (part) => (streamed += part));
  const completion = await stream.finalChatCompletion();
  assert.equal(text(completion), streamed);
  assert.match(streamed, /second-step/);
  assert.equal(completion.choices[0].finish_reason, "stop");
});

check("images reach the model, and are never fetched", async () => {
  const image = (url) => [
    { type: "image_url", image_url: { url } },
    { type: "text", text: "IMAGE?" },
  ];
  assert.match(text(await ask(image(`data:image/png;base64,${pixel}`))), /1 images[^]*image\/png/);
  const place = "messages[0].content[0].image_url.url";
  const call = () => ask(image("https://example.com/a.png"));
  assert.deepEqual(await refused("BadRequestError", 400, call), ["invalid_request", place]);
});

check("earlier turns reach the model", async () => {
  const messages = [
    { role: "user", content: "my word is heron" },
    { role: "assistant", content: "I shall remember heron" },
    { role: "user", content: "HISTORY?" },
  ];
  const said = JSON.parse(text(await ask("", { messages })).replace("[embedded] ", ""));
  assert.deepEqual(
    said.filter(([, words]) => words.includes("heron")),
    [
      ["user", "my word is heron"],
      ["assistant", "I shall remember heron"],
    ],
  );
});

const calls = (cities) =>
  `CALLS: ${cities.map((city) => `mcp__client__get_weather ${JSON.stringify({ city })}`).join(" ;; ")}`;
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "The weather", parameters } }];
const sunny = "[embedded] CALLS 1 ok:\nsunny in Oslo\nCALLS 2 ok:\nsunny in Rome";

check("a tool loop ends with the model's answer, whole and as a stream", async () => {
  const api = () => client().chat.completions;
  for (const next of [
    (body) => api().create(body),
    (body) => api().stream(body).finalChatCompletion(),
  ]) {
    const messages = [{ role: "user", content: calls(["Oslo", "Rome"]) }];
    const asked = [];
    for (;;) {
      const [choice] = (await next({ model, tools, messages })).choices;
      messages.push(choice.message);
      if (choice.finish_reason !== "tool_calls") break;
      for (const call of choice.message.tool_calls) {
        assert.deepEqual([call.type, call.function.name], ["function", "get_weather"]);
        const { city } = JSON.parse(call.function.arguments);
        asked.push(city);
        messages.push({ role: "tool", tool_call_id: call.id, content: `sunny in ${city}` });
      }
    }
    assert.deepEqual(asked, ["Oslo", "Rome"]);
    assert.equal(messages.at(-1).content, sunny);
  }
});

check("the SDK's own tool runner works, whole and as a stream", async () => {
  for (const stream of [false, true]) {
    const asked = [];
    const run = ({ city }) => (asked.push(city), `sunny in ${city}`);
    const one = { type: "function", function: { ...tools[0].function, parse: JSON.parse, function: run } };
    const body = say(calls(["Oslo", "Rome"]), { tools: [one], stream });
    assert.equal(await client().chat.completions.runTools(body).finalContent(), sunny);
    assert.deepEqual(asked, ["Oslo", "Rome"]);
  }
});

check("errors have their classes, codes and fields", async () => {
  const stranger = client(`sk-ant-oat01-refused-${randomUUID()}`);
  const call = () => stranger.chat.completions.create(say("hello"));
  assert.deepEqual(await refused("AuthenticationError", 401, call), ["credential_refused", null]);
  const unknown = () => ask("x", { model: "gpt-4o" });
  assert.deepEqual(await refused("NotFoundError", 404, unknown), ["model_not_found", "model"]);
  const twice = () => ask("x", { n: 2 });
  assert.deepEqual(await refused("BadRequestError", 400, twice), ["invalid_request", "n"]);
});

check("one overload is retried", async () => {
  const patient = client(token, { maxRetries: 2 });
  const completion = await patient.chat.completions.create(say(`FAIL: 529 once ${randomUUID()}`));
  assert.match(text(completion), /^\[embedded\] /);
});

check("models are listed", async () => {
  const ids = [];
  for await (const listed of client().models.list()) ids.push(listed.id);
  assert.deepEqual(ids.slice(0, 3), ["opus", "sonnet", "haiku"]);
  assert.equal((await client().models.retrieve("sonnet")).object, "model");
  const call = () => client().models.retrieve("gpt-4o");
  assert.deepEqual(await refused("NotFoundError", 404, call), ["model_not_found", "model"]);
});

let failed = 0;
for (const [name, body] of checks) {
  try {
    await body();
    console.log(`ok   ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAIL ${name}\n${error?.stack ?? error}`);
  }
}
console.log(`${checks.length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
