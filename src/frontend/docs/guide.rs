//! The guide at `/`: all that is needed to use this server, as JSON and, made of that, as a page.
//! It must never write a text into the page without escaping it, nor say what /openapi.json does not.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::{errors, openapi};

/// The token of examples where answers come from the embedded upstream.
const DEMO_TOKEN: &str = "sk-ant-oat01-demo-0000000000000000000000000000000000000000";
/// The session of the examples.
const SESSION: &str = "6f1c0f0e-8d2b-4c7e-9a51-0c2d3e4f5a6b";
/// The conversation by which both patterns are compared: turns, and tokens of one question or answer.
const TURNS: u64 = 10;
const TOKENS: u64 = 100;

/// What is known of the server when the guide is asked for.
pub struct Posture {
    /// `GET /health`.
    pub health: Value,
    /// `GET /v1/security`.
    pub security: Value,
    /// Where the client found this server.
    pub base: String,
}

/// The guide.
pub fn guide(posture: Posture) -> Value {
    let is_embedded = posture.health["embedded"] == true;
    json!({
        "name": "gaoler",
        "version": posture.health["version"],
        "status": posture.health["status"],
        "what": "The Messages API, answered by the real Claude Code CLI: one run for each request, in a cage of its own. Official \
                 Anthropic SDKs work unmodified with this address as their base URL.",
        "authentication": authentication(is_embedded),
        "endpoints": endpoints(),
        "parameters": parameters(),
        "examples": examples(&posture.base, is_embedded),
        "patterns": patterns(),
        "errors": rows_of_errors(),
        "security": posture.security,
        "documentation": {"openapi": "/openapi.json", "try it": "/docs", "security": "/v1/security"},
    })
}

fn authentication(is_embedded: bool) -> Value {
    let mut ways = vec![
        "authorization: Bearer TOKEN, the header".to_owned(),
        "x-api-key: TOKEN, the header".to_owned(),
        "oauth_credentials.access_token, in the body".to_owned(),
        "TOKEN is your own, sk-ant-oat... or sk-ant-api...; it is who you are here: another token has other files and sessions. It \
         is never stored unless you ask for that, and never enters the run's cage."
            .to_owned(),
        "Or TOKEN is a key that the operator has issued, gaol_t_...: it is who you are, whichever token your runs use. That comes as \
         x-claude-credential, as oauth_credentials, or is stored with PUT /v1/credential."
            .to_owned(),
    ];
    if is_embedded {
        ways.push(format!(
            "This server answers with its embedded upstream, which takes any token of the right form, such as {DEMO_TOKEN}"
        ));
    }
    json!(ways)
}

/// Every operation of the document.
fn endpoints() -> Value {
    let mut rows = Vec::new();
    for (path, item) in openapi::document()["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            rows.push(json!({
                "method": method.to_ascii_uppercase(),
                "path": path,
                "summary": operation["summary"],
                "credential": operation.get("security").is_some(),
            }));
        }
    }
    // What asks for a credential is what people come for.
    rows.sort_by_key(|row| row["credential"] == false);
    json!(rows)
}

/// What a message can say: the fields with an effect, then the headers.
fn parameters() -> Value {
    let document = openapi::document();
    let request = &document["components"]["schemas"]["MessagesRequest"];
    let is_required =
        |name: &str| request["required"].as_array().is_some_and(|all| all.contains(&json!(name)));
    let fields = request["properties"].as_object().into_iter().flatten();
    let fields = fields.filter(|(_, field)| field.get(super::messages::IGNORED).is_none()).map(|(name, field)| {
        json!({"name": name, "type": kind(field), "required": is_required(name), "about": about(field)})
    });
    let headers = document["paths"]["/v1/messages"]["post"]["parameters"].as_array().into_iter().flatten();
    let headers = headers.map(
        |header| json!({"name": header["name"], "type": "header", "required": false, "about": about(header)}),
    );
    let mut rows: Vec<Value> = fields.collect();
    rows.sort_by_key(|row| row["required"] == false);
    rows.extend(headers);
    json!(rows)
}

/// What is said of a field, where it is or where it refers to.
fn about(field: &Value) -> Value {
    let there = |field: &Value| field["description"].as_str().map(ToOwned::to_owned);
    let referred = || field["anyOf"].as_array()?.iter().find_map(|one| there(target(one)));
    let listed = |field: &Value| -> Option<String> {
        let inside = target(field)["properties"].as_object()?;
        Some(format!("An object of {}.", inside.keys().cloned().collect::<Vec<_>>().join(", ")))
    };
    let objects = || field["anyOf"].as_array()?.iter().find_map(listed);
    json!(there(field).or_else(referred).or_else(objects).unwrap_or_default())
}

fn target(schema: &Value) -> &Value {
    let name = schema["$ref"].as_str().and_then(|place| place.rsplit('/').next());
    name.map_or(schema, |name| &openapi::document()["components"]["schemas"][name])
}

/// A schema's type in a word or two.
fn kind(field: &Value) -> String {
    let schema = target(field);
    let either = schema["anyOf"].as_array().into_iter().flatten().map(kind);
    let own: Vec<String> = match &schema["type"] {
        Value::String(one) => vec![one.clone()],
        Value::Array(several) => several.iter().filter_map(Value::as_str).map(ToOwned::to_owned).collect(),
        _ => either.collect(),
    };
    own.into_iter().filter(|kind| !kind.is_empty() && kind != "null").collect::<Vec<_>>().join(" or ")
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn body(fields: Value, messages: &[Value]) -> Value {
    let mut body = json!({"model": "sonnet", "max_tokens": 1024});
    let fields = fields.as_object().cloned().unwrap_or_default();
    body.as_object_mut().into_iter().for_each(|body| body.extend(fields.clone()));
    body["messages"] = json!(messages);
    body
}

fn examples(base: &str, is_embedded: bool) -> Value {
    let token = match is_embedded {
        true => format!("'authorization: Bearer {DEMO_TOKEN}'"),
        false => "\"authorization: Bearer $TOKEN\"".to_owned(),
    };
    let post = |flags: &str, headers: &str, body: Value| {
        format!(
            "curl {flags}{base}/v1/messages \\\n  -H {token} \\\n  -H 'content-type: application/json' \\\n{headers}  -d '{body}'"
        )
    };
    // The embedded upstream has the CLI run what comes after RUN: a real model is asked in words.
    let work =
        if is_embedded { "RUN: id; pwd; ls /" } else { "Who are you here, and what is in your folder?" };
    json!([
        {"title": "One answer", "curl": post("", "", body(json!({}), &[user(work)]))},
        {"title": "A stream", "curl": post("-N ", "", body(json!({"stream": true}), &[user("Hello")]))},
        {"title": "A conversation that lasts", "curl":
            post("", "", body(json!({"session_id": SESSION}), &[user("My bird is a bittern.")]))},
        {"title": "A stricter run", "curl": post(
            "",
            "  -H 'x-gaoler-level: paranoid' \\\n  -H 'x-gaoler-limits: wall_ms=60000' \\\n",
            body(json!({}), &[user("Hello")]),
        )},
        {"title": "What keeps tenants apart", "curl": format!("curl {base}/v1/security")},
    ])
}

fn patterns() -> Value {
    let [first, second] = ["My bird is a bittern.", "Which bird?"].map(user);
    let said = json!({"role": "assistant", "content": "A bittern: noted."});
    let session = json!({"session_id": SESSION});
    // The nth request of a stateless conversation has n questions and n - 1 answers.
    let stateless: u64 = (1..=TURNS).map(|turn| (2 * turn - 1) * TOKENS).sum();
    let sent =
        |tokens: u64| json!({"turns": TURNS, "tokens_of_each_text": TOKENS, "tokens_in_requests": tokens});
    json!([
        {
            "title": "Stateless",
            "about": "Every request holds the whole conversation, and the server keeps nothing: no files, no transcript. For \
                      single questions, and for clients that keep the history themselves.",
            "requests": [
                body(json!({}), std::slice::from_ref(&first)),
                body(json!({}), &[first.clone(), said, second.clone()]),
            ],
            "sent": sent(stateless),
        },
        {
            "title": "Stateful",
            "about": "A session_id, a UUID that you choose: the agent goes on where it was, with its files and what it said, and \
                      each request holds the new message alone. One run at a time; another tenant's session is another session. \
                      PUT /v1/sessions/{id}/mcp gives each of its turns MCP servers. \
                      (What the model reads, and what it costs, is the whole conversation either way.)",
            "requests": [body(session.clone(), &[first]), body(session, &[second])],
            "sent": sent(TURNS * TOKENS),
        },
    ])
}

fn rows_of_errors() -> Value {
    let rows = errors::NO_ROUTE.iter().chain(errors::MESSAGES).chain(errors::KEPT).chain(errors::OPERATORS);
    rows.map(|row| json!({"status": row.status, "code": row.code, "means": row.means})).collect()
}

/// The guide as a page.
pub fn page(guide: &Value) -> String {
    let mut out = String::new();
    // A String takes everything that is written to it.
    let _ = write_page(&mut out, guide);
    out
}

fn write_page(out: &mut String, guide: &Value) -> std::fmt::Result {
    let security = &guide["security"];
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>gaoler</title>\n\
         <link rel=\"stylesheet\" href=\"docs/page.css\">\n</head>\n<body>\n<main>\n\
         <header>\n<h1>gaoler <small>{}</small></h1>\n<p>{}</p>\n\
         <nav><a href=\"docs\">Try it</a> <a href=\"openapi.json\">OpenAPI</a> <a href=\"v1/security\">Security</a> \
         <a href=\"health\">{}</a></nav>\n</header>\n",
        text(&guide["version"]),
        text(&guide["what"]),
        text(&guide["status"]),
    )?;
    out.push_str("<h2>Ask</h2>\n");
    let examples = guide["examples"].as_array().map(Vec::as_slice).unwrap_or_default();
    for (at, example) in examples.iter().enumerate() {
        let open = if at == 0 { " open" } else { "" };
        let (title, curl) = (text(&example["title"]), text(&example["curl"]));
        write!(out, "<details{open}><summary>{title}</summary>\n<pre>{curl}</pre></details>\n")?;
    }
    out.push_str("<h2>Your token</h2>\n<ul>\n");
    for way in guide["authentication"].as_array().into_iter().flatten() {
        writeln!(out, "<li>{}</li>", text(way))?;
    }
    out.push_str("</ul>\n<h2>Conversations</h2>\n");
    for pattern in guide["patterns"].as_array().into_iter().flatten() {
        write!(out, "<h3>{}</h3>\n<p>{}</p>\n", text(&pattern["title"]), text(&pattern["about"]))?;
        for request in pattern["requests"].as_array().into_iter().flatten() {
            writeln!(out, "<pre>{}</pre>", text(&json!(request.to_string())))?;
        }
        let sent = &pattern["sent"];
        writeln!(
            out,
            "<p>In {} turns, with {} tokens in each question and each answer, your requests hold {} tokens.</p>",
            text(&sent["turns"]),
            text(&sent["tokens_of_each_text"]),
            text(&sent["tokens_in_requests"])
        )?;
    }
    table(out, "Endpoints", &guide["endpoints"], &["method", "path", "summary"])?;
    table(out, "Parameters of a message", &guide["parameters"], &["name", "type", "about"])?;
    writeln!(
        out,
        "<p>Other fields of the API have no effect here; the answer's header <code>x-gaoler-ignored</code> names them.</p>"
    )?;
    writeln!(
        out,
        "<h2>Security in force</h2>\n<p>Tier <b>{}</b>, level <b>{}</b>, at most <b>{}</b>.</p>",
        text(&security["tier"]),
        text(&security["level"]),
        text(&security["level_maximum"])
    )?;
    rows(out, &security["guarantees"], &["name", "held", "means", "how"])?;
    out.push_str("<details><summary>Errors</summary>\n");
    rows(out, &guide["errors"], &["status", "code", "means"])?;
    out.push_str("</details>\n</main>\n</body>\n</html>\n");
    Ok(())
}

fn table(out: &mut String, title: &str, list: &Value, columns: &[&str]) -> std::fmt::Result {
    writeln!(out, "<h2>{title}</h2>")?;
    rows(out, list, columns)
}

/// A table with these columns of a list of objects. The first two are words, the others sentences.
fn rows(out: &mut String, list: &Value, columns: &[&str]) -> std::fmt::Result {
    out.push_str("<div class=\"wide\"><table>\n<tr>");
    for column in columns {
        write!(out, "<th>{column}</th>")?;
    }
    out.push_str("</tr>\n");
    for row in list.as_array().into_iter().flatten().filter_map(Value::as_object) {
        out.push_str("<tr>");
        for (at, column) in columns.iter().enumerate() {
            let cell = text(row.get(*column).unwrap_or(&Value::Null));
            match at {
                0 | 1 => write!(out, "<td><code>{cell}</code></td>")?,
                _ => write!(out, "<td>{}</td>", marked(&cell))?,
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
    Ok(())
}

/// Escaped text, with what stands between two backticks as code.
fn marked(text: &str) -> String {
    let parts = text.split('`').enumerate();
    parts
        .map(|(at, part)| if at % 2 == 0 { part.to_owned() } else { format!("<code>{part}</code>") })
        .collect()
}

/// A value as text that HTML takes for nothing else.
fn text(value: &Value) -> String {
    let plain = match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Object(fields) => Value::Object(Map::clone(fields)).to_string(),
        other => other.to_string(),
    };
    let mut out = String::with_capacity(plain.len());
    for c in plain.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}
