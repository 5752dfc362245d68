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

/// A tool of the client's, whose input is a city.
fn weather() -> Value {
    json!([{
        "name": "get_weather", "description": "The weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }])
}

/// What the model is made to call, under the names that the CLI gives a client's tools.
fn calls(cities: &[&str]) -> String {
    let call = |city: &&str| format!("mcp__client__get_weather {}", json!({ "city": city }));
    format!("CALLS: {}", cities.iter().map(call).collect::<Vec<_>>().join(" ;; "))
}

/// What the answer calls: ids and inputs.
fn called(message: &Value) -> Vec<(String, Value)> {
    let blocks = message["content"].as_array().expect("content").iter();
    blocks
        .filter(|block| block["type"] == "tool_use")
        .map(|block| {
            assert_eq!(block["name"], "get_weather", "{message}");
            (block["id"].as_str().expect("an id").to_owned(), block["input"].clone())
        })
        .collect()
}

/// The conversation so far, with these results.
fn answered(text: &str, message: &Value, results: &[(&str, &str)]) -> Value {
    let results: Vec<Value> = results
        .iter()
        .map(|(id, text)| json!({"type": "tool_result", "tool_use_id": id, "content": text}))
        .collect();
    json!({
        "model": "sonnet", "max_tokens": 1024, "tools": weather(),
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": message["content"]},
            {"role": "user", "content": results},
        ],
    })
}

#[test]
fn t156_a_clients_own_tools_are_called_by_the_run_and_answered_by_the_client() {
    let server = Server::start(Options::default());
    let client = server.client();
    let text = calls(&["Oslo", "Rome"]);
    let first = client.messages("a", &with(&text, json!({"tools": weather()})));
    assert_eq!(first.status, 200, "{first:?}");
    let message = first.json();
    assert_eq!(message["stop_reason"], "tool_use", "{message}");
    assert_eq!(first.header("x-gaoler-ignored"), Some("max_tokens"));
    let both = called(&message);
    assert_eq!(
        both.iter().map(|(_, input)| input.clone()).collect::<Vec<_>>(),
        [json!({"city": "Oslo"}), json!({"city": "Rome"})]
    );
    let (oslo, rome) = (both[0].0.as_str(), both[1].0.as_str());
    // Another tenant with the same ids is a stranger: its request is a run of its own.
    let body = answered(&text, &message, &[(oslo, "stolen"), (rome, "stolen")]);
    let stranger = client.messages("b", &body);
    assert_eq!(stranger.status, 200, "{stranger:?}");
    // In any order, and the same run goes on: the model is asked once for each turn.
    let body = answered(&text, &message, &[(rome, "rain in Rome"), (oslo, "snow in Oslo")]);
    let second = client.messages("a", &body);
    assert_eq!(second.status, 200, "{second:?}");
    assert_eq!(second.json()["stop_reason"], "end_turn");
    let said = second.text();
    assert!(
        said.contains("CALLS 1 ok:\nsnow in Oslo") && said.contains("CALLS 2 ok:\nrain in Rome"),
        "{said}"
    );
    assert!(!said.contains("stolen"), "{said}");
    let continued = server.log().lines().filter(|line| line.contains("\"continued\"")).count();
    assert_eq!(continued, 1, "{}", server.log());
    // As a stream: the call's input comes in pieces, and no index is left out.
    let mut body = with(&calls(&["Oslo"]), json!({"tools": weather()}));
    body["stream"] = json!(true);
    let streamed = client.messages("a", &body);
    let events = streamed.events();
    let pieces: String =
        events.iter().filter_map(|event| event.data["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&pieces).expect("JSON"), json!({"city": "Oslo"}));
    let delta = events.iter().find(|event| event.name == "message_delta").expect("an end");
    assert_eq!(delta.data["delta"]["stop_reason"], "tool_use");
    let start = events.iter().find(|event| event.name == "content_block_start").expect("a call");
    let id = start.data["content_block"]["id"].as_str().expect("an id").to_owned();
    // Its own tools the CLI still runs by itself, and a client that offers none is shown none.
    if support::environment().commands {
        let own = client.messages("a", &with("RUN: echo own", json!({"tools": weather()})));
        assert_eq!(own.json()["stop_reason"], "end_turn");
        assert!(own.text().contains("own"), "{own:?}");
    }
    let none = client.messages("a", &with(&calls(&["Oslo"]), json!({})));
    assert_eq!(none.json()["stop_reason"], "end_turn", "{none:?}");
    assert!(called(&none.json()).is_empty());
    let choice = json!({"tools": weather(), "tool_choice": {"type": "none"}});
    assert!(called(&client.messages("a", &with(&calls(&["Oslo"]), choice)).json()).is_empty());
    // The strictest level takes nothing of it away.
    let strict = json!({"tools": weather(), "security_level": "PARANOID"});
    let strict = client.messages("c", &with(&calls(&["Oslo"]), strict));
    assert_eq!(strict.json()["stop_reason"], "tool_use", "{strict:?}");
    // The run that waits is still there for its client.
    let message = json!({"content": [{"type": "tool_use", "id": id, "name": "get_weather", "input": {"city": "Oslo"}}]});
    let last = client.messages("a", &answered(&calls(&["Oslo"]), &message, &[(&id, "snow")]));
    assert!(last.text().contains("CALLS 1 ok:\nsnow"), "{last:?}");
}

#[test]
fn t157_calls_that_nobody_waits_for_any_more_begin_a_run_out_of_the_history() {
    let mut server = Server::start(Options::default());
    let client = server.client();
    let text = calls(&["Oslo"]);
    let message = client.messages("a", &with(&text, json!({"tools": weather()}))).json();
    let id = called(&message)[0].0.clone();
    // A drain waits for no client.
    assert_eq!(server.stop().code(), Some(0));
    let server = Server::start(server.options.clone());
    let mut body = answered(&text, &message, &[(&id, "snow in Oslo")]);
    let ask = json!({"type": "text", "text": "please USERRAW?"});
    body["messages"][2]["content"].as_array_mut().expect("results").push(ask);
    let last = server.client().messages("a", &body);
    assert_eq!((last.status, &last.json()["stop_reason"]), (200, &json!("end_turn")), "{last:?}");
    // What the model is told of it is judged where the transcript can be seen: t159.
    assert!(last.text().contains("please USERRAW?"), "{last:?}");
    // A session's own history says that it was; what came of it follows in words.
    body["session_id"] = json!("6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b");
    let said = server.client().messages("a", &body).text();
    assert!(said.contains(&format!("The call {id} gave:")) && said.contains("snow in Oslo"), "{said}");
}

#[test]
fn t158_a_run_that_waits_gives_way_to_what_its_client_says_next() {
    let server = Server::start(Options::default());
    let client = server.client();
    let session = json!({"tools": weather(), "session_id": "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b"});
    let first = client.messages("a", &with(&calls(&["Oslo"]), session.clone()));
    assert_eq!(first.json()["stop_reason"], "tool_use", "{first:?}");
    let next = client.messages("a", &with("never mind", session));
    assert_eq!((next.status, &next.json()["stop_reason"]), (200, &json!("end_turn")), "{next:?}");
    assert!(next.text().contains("never mind"), "{next:?}");
    // And one that is cancelled by its name waits no longer.
    let waiting = client.messages("a", &with(&calls(&["Oslo"]), json!({"tools": weather()})));
    let load =
        || client.request("GET", "/health", &[], b"").json()["runs"]["running"].as_u64().expect("a number");
    assert_eq!(load(), 1);
    let path = format!("/v1/runs/{}/cancel", waiting.header("x-gaoler-run").expect("a run"));
    assert_eq!(client.request("POST", &path, &[support::bearer("b")], b"").status, 404);
    assert_eq!(load(), 1);
    assert_eq!(client.request("POST", &path, &[support::bearer("a")], b"").status, 200);
    support::until("its end", || (load() == 0).then_some(()));
}

#[test]
fn b14_a_run_that_waits_for_its_client_gives_its_place_to_whoever_needs_it() {
    let options = Options::default().with("GAOLER_RUNS__MAX", 3).with("GAOLER_RUNS__TENANT_MAX", 2);
    let server = Server::start(options);
    let client = server.client();
    let running =
        || client.request("GET", "/health", &[], b"").json()["runs"]["running"].as_u64().expect("a number");
    let begun = |tenant: &str, city: &str| {
        let message = client.messages(tenant, &with(&calls(&[city]), json!({"tools": weather()})));
        assert_eq!(message.json()["stop_reason"], "tool_use", "{message:?}");
        message
    };
    let (first, second) = (begun("a", "Oslo"), begun("a", "Rome"));
    assert_eq!(running(), 2, "the control: each has a place and keeps it");
    // The tenant's own bound: the one that has waited longest gives its place, and the other goes on.
    let third = client.messages("a", &ask("hello"));
    assert_eq!(third.status, 200, "{third:?}");
    let gave_way = |message: &support::Response| {
        let run = message.header("x-gaoler-run").expect("a run");
        server.log().contains(&format!(r#""event":"gave_way","run":"{run}""#))
    };
    assert!(gave_way(&first) && !gave_way(&second), "{}", server.log());
    // What its client says late is history, and nothing of it is lost.
    let late = |message: &support::Response, city: &str, more: Option<&str>| {
        let message = message.json();
        let id = called(&message)[0].0.clone();
        let mut body = answered(&calls(&[city]), &message, &[(&id, "snow")]);
        let results = body["messages"][2]["content"].as_array_mut().expect("results");
        results.extend(more.map(|text| json!({"type": "text", "text": text})));
        let answer = client.messages("a", &body);
        assert_eq!((answer.status, &answer.json()["stop_reason"]), (200, &json!("end_turn")), "{answer:?}");
        answer
    };
    assert!(late(&first, "Oslo", Some("please USERRAW?")).text().contains("please USERRAW?"));
    late(&second, "Rome", None);
    // The server's bound: whoever has most that wait gives one, and nobody else does.
    let (_, _, other) = (begun("a", "Oslo"), begun("a", "Rome"), begun("b", "Bern"));
    assert_eq!(running(), 3);
    let fourth = client.messages("c", &ask("hello"));
    assert_eq!(fourth.status, 200, "{fourth:?}");
    assert!(running() <= 2, "c's has ended, and one of a's");
    assert!(!gave_way(&other), "b's goes on");
}

/// The same tool, and the same conversation, in the dialect of chat completions.
fn functions() -> Value {
    let tool = &weather()[0];
    json!([{"type": "function", "function": {
        "name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"],
    }}])
}

fn completions(client: &support::Client, token: &str, body: &Value) -> support::Response {
    let headers = [support::bearer(token)];
    client.request("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes())
}

/// The chunks of a stream, but for its last word.
fn chunks(response: &support::Response) -> Vec<Value> {
    let text = String::from_utf8(response.body.clone()).expect("UTF-8");
    let data: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(data.last(), Some(&"[DONE]"), "{text}");
    data[..data.len() - 1].iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

#[test]
fn t230_the_other_dialect_has_the_clients_own_functions_too() {
    let server = Server::start(Options::default());
    let client = server.client();
    let text = calls(&["Oslo", "Rome"]);
    let body = |messages: Value, more: Value| {
        let mut body = json!({"model": "sonnet", "tools": functions(), "messages": messages});
        for (name, value) in more.as_object().expect("fields") {
            body[name] = value.clone();
        }
        body
    };
    let said = |text: &str| json!([{"role": "user", "content": text}]);
    let result =
        |call: &Value, text: Value| json!({"role": "tool", "tool_call_id": call["id"], "content": text});
    let continued = || server.log().lines().filter(|line| line.contains("\"continued\"")).count();
    // Whole: both calls at once, and the same run goes on when they are answered, in any order.
    let choice = json!({"tool_choice": "required", "parallel_tool_calls": false});
    let first = completions(&client, "a", &body(said(&text), choice));
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.header("x-gaoler-ignored"), Some("parallel_tool_calls,tool_choice"));
    let answer = first.json();
    let asked = &answer["choices"][0]["message"];
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
    let found: Vec<(&str, Value)> = asked["tool_calls"]
        .as_array()
        .expect("calls")
        .iter()
        .map(|call| {
            assert_eq!(
                (&call["type"], &call["function"]["name"]),
                (&json!("function"), &json!("get_weather"))
            );
            let arguments = call["function"]["arguments"].as_str().expect("a string");
            (call["id"].as_str().expect("an id"), serde_json::from_str(arguments).expect("JSON"))
        })
        .collect();
    assert_eq!(
        found.iter().map(|(_, input)| input).collect::<Vec<_>>(),
        [&json!({"city": "Oslo"}), &json!({"city": "Rome"})]
    );
    let (oslo, rome) = (&asked["tool_calls"][0], &asked["tool_calls"][1]);
    let history = |results: [Value; 2]| {
        let [one, two] = results;
        json!([{"role": "user", "content": text}, asked, one, two])
    };
    // Another tenant with the same ids is a stranger.
    let stolen = history([result(oslo, json!("stolen")), result(rome, json!("stolen"))]);
    assert_eq!(completions(&client, "b", &body(stolen, json!({}))).status, 200);
    assert_eq!(continued(), 0);
    let parts = json!([{"type": "text", "text": "rain in Rome"}]);
    let answered = history([result(rome, parts), result(oslo, json!("snow in Oslo"))]);
    let second = completions(&client, "a", &body(answered, json!({})));
    let choice = &second.json()["choices"][0];
    assert_eq!((second.status, &choice["finish_reason"]), (200, &json!("stop")), "{second:?}");
    let words = choice["message"]["content"].as_str().expect("text");
    assert!(words.contains("CALLS 1 ok:\nsnow in Oslo"), "{words}");
    assert!(words.contains("CALLS 2 ok:\nrain in Rome") && !words.contains("stolen"), "{words}");
    assert_eq!(continued(), 1, "{}", server.log());
    // As a stream, and its answer as one.
    let streamed = completions(&client, "a", &body(said(&text), json!({"stream": true})));
    let (mut calls, mut reasons) = (Vec::<[String; 2]>::new(), Vec::new());
    for chunk in chunks(&streamed) {
        let choice = &chunk["choices"][0];
        reasons.extend(choice["finish_reason"].as_str().map(str::to_owned));
        for piece in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let at = piece["index"].as_u64().expect("an index") as usize;
            if let Some(id) = piece["id"].as_str() {
                assert_eq!((at, &piece["function"]["name"]), (calls.len(), &json!("get_weather")));
                calls.push([id.to_owned(), String::new()]);
            }
            calls[at][1].push_str(piece["function"]["arguments"].as_str().expect("a string"));
        }
    }
    assert_eq!(reasons, ["tool_calls"]);
    let inputs: Vec<Value> =
        calls.iter().map(|[_, text]| serde_json::from_str(text).expect("JSON")).collect();
    assert_eq!(inputs, [json!({"city": "Oslo"}), json!({"city": "Rome"})]);
    let mut messages = vec![json!({"role": "user", "content": text})];
    let told: Vec<Value> = calls
        .iter()
        .map(|[id, text]| {
            json!({"id": id, "type": "function", "function": {"name": "get_weather", "arguments": text}})
        })
        .collect();
    messages.push(json!({"role": "assistant", "content": null, "tool_calls": told}));
    messages.extend(told.iter().map(|call| result(call, json!("fog"))));
    let last = completions(&client, "a", &body(json!(messages), json!({"stream": true})));
    let words: String = chunks(&last)
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert!(words.contains("CALLS 1 ok:\nfog") && words.contains("CALLS 2 ok:\nfog"), "{words}");
    assert_eq!(continued(), 2, "{}", server.log());
    // Nobody is offered what was not sent, or was sent with `none`.
    for more in [json!({"tools": null}), json!({"tool_choice": "none"})] {
        let none = completions(&client, "a", &body(said(&text), more)).json();
        let choice = &none["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["tool_calls"]),
            (&json!("stop"), &Value::Null)
        );
    }
    // A run that is gone leaves a history that a new one reads.
    let gone = json!([
        {"role": "user", "content": text},
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"city\":\"Oslo\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "snow"},
        {"role": "user", "content": "please USERRAW?"},
    ]);
    let late = completions(&client, "a", &body(gone, json!({}))).json();
    let words = late["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(words.contains("please USERRAW?"), "{late}");
    assert_eq!(continued(), 2, "{}", server.log());
}
