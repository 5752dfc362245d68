// The official TypeScript SDK, unmodified, against a server that runs the real CLI. It never looks behind
// the API.  usage: node suite.mjs BASE_URL [raw]   (raw: the embedded upstream itself answers)

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import Anthropic from "@anthropic-ai/sdk";

const [baseURL, kind] = process.argv.slice(2);
const raw = kind === "raw";
const model = "claude-sonnet-5";
const token = `sk-ant-oat01-matrix-${randomUUID()}`;
const pixel =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const checks = [];
const check = (name, body) => checks.push([name, body]);
// A check that only an agent passes.
const agent = (name, body) => raw || check(name, body);

const client = (authToken = token, options = {}) =>
  new Anthropic({ authToken, apiKey: null, baseURL, timeout: 120_000, maxRetries: 0, ...options });
const say = (content, extra = {}) => ({
  model,
  max_tokens: 1024,
  messages: [{ role: "user", content }],
  ...extra,
});
const ask = (content, extra) => client().messages.create(say(content, extra));
const text = (message) =>
  message.content
    .filter((block) => block.type === "text")
    .map((block) => block.text)
    .join("");

// The error that a call ends with, in the class and form that users catch.
async function refused(className, status, call) {
  const error = await call().then(
    () => assert.fail("no error"),
    (error) => error,
  );
  assert.ok(error instanceof Anthropic[className], `${error?.constructor?.name}: ${error}`);
  assert.equal(error.status, status);
  assert.equal(error.error.type, "error");
  assert.ok(error.error.error.message);
  assert.ok(error.requestID ?? error.request_id, "no request-id");
  assert.ok(!JSON.stringify(error.error).includes(token));
  return error.error.error.type;
}

check("a message has every field", async () => {
  const message = await ask("ECHO: good morning");
  assert.equal(text(message), "[embedded] good morning");
  assert.deepEqual([message.type, message.role, message.stop_reason], ["message", "assistant", "end_turn"]);
  assert.match(message.id, /^msg_/);
  assert.ok(message._request_id);
  assert.ok(message.usage.input_tokens > 0 && message.usage.output_tokens > 0);
});

check("an API key is a credential too", async () => {
  const byKey = new Anthropic({ apiKey: token, authToken: null, baseURL, timeout: 120_000, maxRetries: 0 });
  assert.equal(text(await byKey.messages.create(say("ECHO: by key"))), "[embedded] by key");
});

check("the stream helper gets one message", async () => {
  const stream = client().messages.stream(say("ECHO: one two three"));
  let streamed = "";
  stream.on("text", (part) => (streamed += part));
  const message = await stream.finalMessage();
  assert.equal(streamed, "[embedded] one two three");
  assert.equal(text(message), streamed);
  assert.equal(message.stop_reason, "end_turn");
});

check("the raw stream is well formed", async () => {
  const events = [];
  for await (const event of await client().messages.create(say("ECHO: events", { stream: true }))) {
    if (event.type !== "ping") events.push(event);
  }
  const kinds = events.map((event) => event.type);
  assert.equal(kinds[0], "message_start");
  assert.deepEqual(kinds.slice(-2), ["message_delta", "message_stop"]);
  assert.equal(kinds.filter((kind) => kind === "message_start").length, 1);
  const starts = events.filter((event) => event.type === "content_block_start").map((event) => event.index);
  assert.deepEqual(starts, [...starts.keys()]);
});

check("images reach the model", async () => {
  const source = { type: "base64", media_type: "image/png", data: pixel };
  const answer = text(await ask([{ type: "image", source }, { type: "text", text: "IMAGE?" }]));
  assert.match(answer, /1 images[^]*image\/png/);
});

check("the system prompt reaches the model", async () => {
  assert.match(text(await ask("SYSTEM?", { system: "CANARY-SYSTEM-A" })), /CANARY-SYSTEM-A/);
  const system = [{ type: "text", text: "CANARY-SYSTEM-B" }];
  assert.match(text(await ask("SYSTEM?", { system })), /CANARY-SYSTEM-B/);
});

check("earlier turns reach the model", async () => {
  const messages = [
    { role: "user", content: "my word is heron" },
    { role: "assistant", content: "I shall remember heron" },
    { role: "user", content: "HISTORY?" },
  ];
  const history = JSON.parse(text(await ask("", { messages })).replace("[embedded] ", ""));
  const said = history.filter(([, words]) => words.includes("heron"));
  assert.deepEqual(said, [
    ["user", "my word is heron"],
    ["assistant", "I shall remember heron"],
  ]);
});

check("a refused token is an authentication error", async () => {
  const stranger = client(`sk-ant-oat01-refused-${randomUUID()}`);
  const type = await refused("AuthenticationError", 401, () => stranger.messages.create(say("hello")));
  assert.equal(type, "authentication_error");
});

agent("a wrong body is a bad request", async () => {
  const wrong = [{ role: "nobody", content: "hello" }];
  const type = await refused("BadRequestError", 400, () => ask("", { messages: wrong }));
  assert.equal(type, "invalid_request_error");
  await refused("BadRequestError", 400, () => ask("x", { session_id: "../../etc" }));
});

agent("an unknown model or path is not found", async () => {
  assert.equal(await refused("NotFoundError", 404, () => ask("hello", { model: "gpt-4" })), "not_found_error");
  assert.equal(await refused("NotFoundError", 404, () => client().get("/v1/nothing")), "not_found_error");
});

agent("a body past the limit is too large", async () => {
  const error = await ask("x".repeat(33 * 1024 * 1024)).then(
    () => assert.fail("33 MB were taken"),
    (error) => error,
  );
  // The server may close before it has read 33 MB; what it must not do is answer.
  if (!(error instanceof Anthropic.APIConnectionError)) assert.equal(error.status, 413);
});

check("one overload is retried", async () => {
  const patient = client(token, { maxRetries: 2 });
  const message = await patient.messages.create(say(`FAIL: 529 once ${randomUUID()}`));
  assert.match(text(message), /^\[embedded\] /);
});

check("a lasting overload is told", async () => {
  const error = await ask("FAIL: 529").then(
    () => assert.fail("no error"),
    (error) => error,
  );
  assert.equal(error.status, 529);
  assert.equal(error.error.error.type, "overloaded_error");
});

agent("a failing stream is an error", async () => {
  const call = () => client().messages.stream(say("FAIL: 400")).finalMessage();
  assert.equal(await refused("BadRequestError", 400, call), "invalid_request_error");
});

agent("models are listed to the last page", async () => {
  const ids = [];
  for await (const listed of client().models.list({ limit: 1 })) ids.push(listed.id);
  assert.deepEqual(ids.slice(0, 3), ["opus", "sonnet", "haiku"]);
  const listed = await client().models.retrieve("opus");
  assert.deepEqual([listed.type, listed.display_name], ["model", "Claude Opus"]);
  const type = await refused("NotFoundError", 404, () => client().models.retrieve("gpt-4o"));
  assert.equal(type, "not_found_error");
});

agent("the agent runs commands in its cage", async () => {
  const message = await ask("RUN: echo $((6 * 7)); id -u; pwd");
  assert.match(text(message), /42[^]*\/workspace/);
  assert.ok(message.content.every((block) => block.type !== "tool_use"));
  assert.equal(message.stop_reason, "end_turn");
});

agent("agent turns stream as one message", async () => {
  const stream = client().messages.stream(say("STEPS: echo first-step ;; echo second-step"));
  let starts = 0;
  stream.on("streamEvent", (event) => (starts += event.type === "message_start"));
  const message = await stream.finalMessage();
  assert.equal(starts, 1);
  assert.match(text(message), /second-step/);
});

agent("a session remembers, and only its own tenant's", async () => {
  const session_id = randomUUID();
  const first = await ask("ECHO: my bird is a bittern", { session_id });
  assert.equal(first.session_id, session_id);
  assert.match(text(await ask("HISTORY?", { session_id })), /bittern/);
  const stranger = client(`sk-ant-oat01-stranger-${randomUUID()}`);
  const answer = text(await stranger.messages.create(say("HISTORY?", { session_id })));
  assert.doesNotMatch(answer, /bittern/);
});

check("concurrent requests get their own answers", async () => {
  const numbers = [0, 1, 2, 3];
  const answers = await Promise.all(numbers.map((number) => ask(`ECHO: number ${number}`).then(text)));
  assert.deepEqual(
    answers,
    numbers.map((number) => `[embedded] number ${number}`),
  );
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
