//! What a request may ask beside words, with the real CLI in its cage: JSON by a schema, a budget, tools of its own.
//! Needs root and the CLI. It must never judge by anything but what a client can see.

mod support;

use serde_json::{Value, json};
use support::{Options, Server, ask};

fn with(text: &str, more: Value) -> Value {
    let mut body = ask(text);
    for (name, value) in more.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

#[test]
fn t154_an_answer_follows_its_schema_or_is_refused() {
    let server = Server::start(Options::default());
    let client = server.client();
    let schema = json!({
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": false,
    });
    let format =
        |schema: &Value| json!({"output_config": {"format": {"type": "json_schema", "schema": schema}}});
    // The model's words beside it are not part of the answer.
    let call = r#"CALLS: StructuredOutput {"city":"Oslo"}"#;
    for stream in [false, true] {
        let mut body = with(call, format(&schema));
        body["stream"] = json!(stream);
        let response = client.messages("a", &body);
        assert_eq!(response.status, 200, "{response:?}");
        assert_eq!(response.text(), r#"{"city":"Oslo"}"#, "stream {stream}: {response:?}");
        assert_eq!(response.header("x-gaoler-ignored"), Some("max_tokens"));
    }
    let message = client.messages("a", &with(call, format(&schema))).json();
    assert_eq!(message["stop_reason"], "end_turn");
    assert_eq!(message["content"].as_array().map(Vec::len), Some(1), "{message}");
    // The other dialect's word for it.
    let body = json!({
        "model": "sonnet", "messages": [{"role": "user", "content": call}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    });
    let headers = [support::bearer("a")];
    let response = client.request("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes());
    assert_eq!(response.json()["choices"][0]["message"]["content"], r#"{"city":"Oslo"}"#, "{response:?}");
    // What does not follow it, and a model that gives none, is an error and no answer.
    for text in ["hello", r#"CALLS: StructuredOutput {"town":7}"#] {
        let response = client.messages("a", &with(text, format(&schema)));
        assert_eq!(
            (response.status, response.header("x-should-retry")),
            (500, Some("false")),
            "{response:?}"
        );
        assert_eq!(response.json()["error"]["details"]["error_code"], "schema_not_met");
    }
    // The CLI judges the schema, before the model is asked anything.
    for wrong in [json!({"type": "nonsense"}), json!({"type": "object", "properties": 7})] {
        let response = client.messages("a", &with(call, format(&wrong)));
        assert_eq!((response.status, response.error().as_str()), (400, "invalid_request_error"), "{wrong}");
        assert_eq!(response.json()["error"]["details"]["error_code"], "schema_refused", "{response:?}");
    }
}

#[test]
fn t155_a_budget_ends_a_run_with_what_there_is() {
    let server = Server::start(Options::default());
    let client = server.client();
    let steps = "STEPS: echo one ;; echo two ;; echo three";
    let whole = client.messages("a", &with(steps, json!({"max_budget_usd": 100})));
    assert_eq!((whole.status, &whole.json()["stop_reason"]), (200, &json!("end_turn")), "{whole:?}");
    let cost = whole.json()["x_cost"]["total_cost_usd"].as_f64().expect("a cost");
    assert!(cost > 0.0, "{whole:?}");
    // The first of the model's answers has used it up.
    let cut = client.messages("a", &with(steps, json!({"max_budget_usd": 0.000_001})));
    assert_eq!((cut.status, &cut.json()["stop_reason"]), (200, &json!("pause_turn")), "{cut:?}");
    let spent = cut.json()["x_cost"]["total_cost_usd"].as_f64().expect("a cost");
    assert!(spent < cost, "{spent} of {cost}");
}
