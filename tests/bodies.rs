//! What a body costs while it is read, whoever sends it, whatever its shape; and whom that costs anything.
//! It must never send a body that it holds as a whole: what is measured is the frontend, in this process.

mod fake;

use std::time::{Duration, Instant};

use fake::{BEARER, House, LONG, Script, settings};
use gaoler_protocol::Refusal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const MIB: usize = 1024 * 1024;
/// What one body may have.
const LARGEST: usize = 32 * MIB;
/// What the reading of one may take.
const MOST_MIB: usize = 200;

/// A figure of this process' memory, in MiB.
fn memory_mib(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = status.lines().find(|line| line.starts_with(name)).expect("a line");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("a number") / 1024
}

/// From here on the peak is counted anew.
fn begin_peak() -> usize {
    std::fs::write("/proc/self/clear_refs", "5").expect("the peak begins anew");
    memory_mib("VmHWM")
}

/// A body that repeats something.
struct Shape {
    name: &'static str,
    before: &'static str,
    unit: fn(usize) -> String,
    after: &'static str,
    status: u16,
}

fn shape(
    name: &'static str,
    before: &'static str,
    unit: fn(usize) -> String,
    after: &'static str,
    status: u16,
) -> Shape {
    Shape { name, before, unit, after, status }
}

/// What is little to write and much to hold.
fn structures() -> Vec<Shape> {
    let deep = |_| format!("{}0{},", "{\"a\":".repeat(120), "}".repeat(120));
    vec![
        shape("objects of one name", r#"{"metadata":["#, |_| r#"{"":0},"#.into(), "0]}", 413),
        shape("objects 120 deep", r#"{"metadata":["#, deep, "0]}", 413),
        shape("empty arrays", r#"{"metadata":["#, |_| "[],".into(), "0]}", 413),
        shape("many names", r#"{"metadata":{"#, |n| format!(r#""{n:x}":0,"#), r#""a":0}}"#, 413),
        shape("many fields", "{", |n| format!(r#""{n:x}":0,"#), r#""a":0}"#, 400),
        shape("numbers for messages", r#"{"messages":["#, |_| "0,".into(), "0]}", 400),
    ]
}

/// What is as much as it is to write.
fn texts() -> Vec<Shape> {
    vec![
        shape(
            "one field again and again",
            "{",
            |_| r#""system":"once more","#.into(),
            r#""model":"none"}"#,
            404,
        ),
        shape(
            "one long text of escapes",
            r#"{"system":""#,
            |_| r"\u0041\n".into(),
            r#"","model":"none"}"#,
            404,
        ),
        shape("no JSON", "{", |_| "\\".into(), "", 400),
        shape(
            "a large image",
            r#"{"messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64","media_type":"image/png","data":""#,
            |_| "AAAA".into(),
            r#""}}]}]}"#,
            529,
        ),
        shape(
            "a long history",
            r#"{"messages":["#,
            |_| {
                let words = "some words that somebody has said ".repeat(30);
                let call =
                    r#"{"type":"tool_use","id":"a","name":"b","input":{"path":"a/b/c","command":"list"}}"#;
                format!(
                    r#"{{"role":"user","content":"{words}"}},{{"role":"assistant","content":[{{"type":"text","text":"Well."}},{call}]}},{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"a","content":"{words}"}}]}},"#
                )
            },
            r#"{"role":"user","content":"hi"}]}"#,
            529,
        ),
    ]
}

/// What a conversation may be made of.
fn conversations() -> Vec<Shape> {
    vec![
        shape("messages", r#"{"messages":["#, |_| r#"{"role":"user","content":"a"},"#.into(), "0]}", 400),
        shape(
            "messages of many blocks",
            r#"{"messages":["#,
            |_| {
                format!(
                    r#"{{"role":"user","content":[{}{{"type":"text","text":"a"}}]}},"#,
                    r#"{"type":"text","text":"a"},"#.repeat(9_000)
                )
            },
            "0]}",
            413,
        ),
        shape(
            "blocks",
            r#"{"messages":[{"role":"user","content":["#,
            |_| r#"{"type":"text","text":"a"},"#.into(),
            "0]}]}",
            413,
        ),
        shape(
            "inputs of calls",
            r#"{"messages":["#,
            |_| {
                let call = r#"{"type":"tool_use","id":"a","name":"b","input":{"":{"":{"":{"":0}}}}}"#;
                let calls = format!("{call},").repeat(99);
                format!(r#"{{"role":"assistant","content":[{calls}{call}]}},"#)
            },
            r#"{"role":"user","content":"hi"}]}"#,
            413,
        ),
        shape(
            "JSON in JSON",
            r#"{"messages":[{"role":"assistant","tool_calls":[{"id":"a","type":"function","function":{"name":"b","arguments":"["#,
            |_| r#"{\"\":0},"#.into(),
            r#"0]"}}]},{"role":"user","content":"hi"}]}"#,
            400,
        ),
    ]
}

/// Sends a body in pieces of 64 KiB, and reads the answer's status. One that is answered early is sent no further.
async fn send(port: u16, head: &str, length: usize, shape: &Shape) -> (u16, String) {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
    let (mut from, mut to) = stream.into_split();
    let ends = shape.before.len() + shape.after.len();
    // A multiple of four, as base64 is.
    let mut left = (length - ends) / 4 * 4;
    let length = left + ends;
    let head = format!("{head}host: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
    let sending = async {
        to.write_all(head.as_bytes()).await.expect("written");
        to.write_all(shape.before.as_bytes()).await.expect("written");
        let mut n = 0;
        let mut piece = String::new();
        let same = (shape.unit)(0) == (shape.unit)(1);
        while left > 0 {
            if !same || n == 0 {
                piece.clear();
            }
            while piece.len() < 64 * 1024 && (!same || n == 0 || piece.is_empty()) {
                piece += &(shape.unit)(n + piece.len());
            }
            n += piece.len();
            if left < piece.len() {
                // Blanks may be between any two values, and in a text; of an image they are letters.
                piece = if shape.name == "a large image" { "A" } else { " " }.repeat(left);
            }
            left -= piece.len();
            if to.write_all(piece.as_bytes()).await.is_err() {
                break;
            }
        }
        let _ = to.write_all(shape.after.as_bytes()).await;
    };
    let reading = async {
        let mut answer = Vec::new();
        let _ = from.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let both = async { tokio::join!(sending, reading).1 };
    let answer =
        tokio::time::timeout(LONG * 4, both).await.unwrap_or_else(|_| panic!("{}: no answer", shape.name));
    (answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0), answer)
}

/// Sends each of them on these routes.
async fn check(shapes: Vec<Shape>, routes: &[&str]) {
    let scripts = (0..16).map(|_| Script::Refuse(Refusal::Busy, 0)).collect();
    let house = House::new(settings(120), scripts).await;
    for shape in shapes {
        for (at, route) in routes.iter().enumerate() {
            let before = begin_peak();
            let head = format!("POST {route} HTTP/1.1\r\n{BEARER}");
            let (status, answer) = send(house.port, &head, LARGEST, &shape).await;
            let took = memory_mib("VmHWM").saturating_sub(before);
            println!("{took:5} MiB  {status}  {route}  {}", shape.name);
            assert!(took <= MOST_MIB, "{}, {route}: {took} MiB: {answer}", shape.name);
            if at == 0 {
                assert_eq!(status, shape.status, "{}: {answer}", shape.name);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_body_that_is_little_to_write_and_much_to_hold_takes_less_than_200_mib() {
    check(structures(), &["/v1/messages"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_body_of_long_texts_takes_less_than_200_mib_and_honest_ones_are_read() {
    check(texts(), &["/v1/messages"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_a_body_of_many_messages_takes_less_than_200_mib() {
    check(conversations(), &["/v1/messages"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r01_every_route_that_reads_a_body_takes_less_than_200_mib_for_it() {
    let worst =
        |shapes: Vec<Shape>, name| shapes.into_iter().find(|shape| shape.name == name).expect("a shape");
    let routes = ["/v1/chat/completions", "/v1/messages/count_tokens", "/v1/mcp/probe", "/v1/workspaces"];
    let mut json = worst(conversations(), "JSON in JSON");
    json.status = 413;
    check(vec![json], &routes).await;
    let mut objects = worst(structures(), "objects of one name");
    objects.status = 413;
    check(vec![objects], &routes).await;
}

async fn from(address: &str, port: u16) -> TcpStream {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(format!("{address}:0").parse().expect("an address")).expect("bound");
    let to = format!("127.0.0.1:{port}").parse().expect("an address");
    tokio::time::timeout(LONG, socket.connect(to)).await.expect("in time").expect("a connection")
}

/// Asks on a connection of this address, and how it was answered.
async fn asked(address: &str, port: u16, request: &[u8]) -> (u16, Duration) {
    let begun = Instant::now();
    let mut stream = from(address, port).await;
    stream.write_all(request).await.expect("written");
    let mut answer = Vec::new();
    tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await.expect("in time").expect("read");
    let text = String::from_utf8_lossy(&answer);
    (text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0), begun.elapsed())
}

fn post(headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST /v1/messages HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

const HELLO: &str = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b03_bodies_of_strangers_take_no_place_of_those_who_are_known() {
    // The supervisor refuses after the body was read: that is enough here.
    let house = House::new(settings(120), vec![Script::Refuse(Refusal::Busy, 0)]).await;
    // Half a million pieces of a byte, and forty bodies that are as large as may be: neither is ended by its sender.
    let mut tiny = from("127.0.0.2", house.port).await;
    let head = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    tiny.write_all(head).await.expect("written");
    tiny.write_all(&b"1\r\n \r\n".repeat(524_287)).await.expect("written");
    let (told, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let mut large = Vec::new();
    for _ in 0..40 {
        let mut stream = from("127.0.0.3", house.port).await;
        let head = format!("POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: {LARGEST}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("written");
        let (mut from, mut to) = stream.into_split();
        large.push(tokio::spawn(async move {
            let piece = vec![b' '; MIB];
            for _ in 0..31 {
                if to.write_all(&piece).await.is_err() {
                    break;
                }
            }
            to
        }));
        let told = told.clone();
        tokio::spawn(async move {
            let mut answer = [0; 12];
            let read = from.read_exact(&mut answer).await;
            let _ = told.send(read.is_ok_and(|_| answer == *b"HTTP/1.1 529"));
        });
    }
    // All but two of them do not fit, so most are told so; whoever sends on meets a connection that has ended.
    let mut refused = 0;
    while refused < 20 {
        let answer =
            tokio::time::timeout(LONG * 4, answers.recv()).await.expect("in time").expect("an answer");
        refused += usize::from(answer);
    }
    let (status, _) = asked("127.0.0.4", house.port, &post(BEARER, HELLO)).await;
    assert_eq!(status, 529, "read, and refused by the supervisor");
}

#[tokio::test]
async fn r01_a_credential_that_is_none_is_refused_before_the_body_is_sent() {
    let house = House::new(settings(120), vec![]).await;
    for head in ["authorization: Basic x\r\n", "x-api-key: gaol_t_nonsense\r\n", "x-claude-credential: x\r\n"]
    {
        for route in ["/v1/messages", "/v1/chat/completions", "/v1/messages/count_tokens", "/v1/mcp/probe"] {
            let head = format!("POST {route} HTTP/1.1\r\n{head}host: x\r\ncontent-length: {LARGEST}\r\n\r\n");
            let mut stream = from("127.0.0.1", house.port).await;
            stream.write_all(head.as_bytes()).await.expect("written");
            let mut answer = [0; 12];
            let read = stream.read_exact(&mut answer);
            tokio::time::timeout(LONG, read).await.expect("in time").expect("an answer");
            assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 401", "{head}");
        }
    }
}

/// What comes back for these bytes, to the connection's end.
async fn told(port: u16, request: &str) -> String {
    let mut stream = from("127.0.0.1", port).await;
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await.expect("in time");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b04_slow_bodies_of_one_address_leave_room_for_probes_and_for_tenants() {
    let house = House::new(settings(120), vec![Script::Refuse(Refusal::Busy, 0)]).await;
    let mut slow = Vec::new();
    for _ in 0..900 {
        let mut stream = from("127.0.0.2", house.port).await;
        let head = "POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\n\r\n ";
        // Those that find no place are closed, or wait.
        let _ = stream.write_all(head.as_bytes()).await;
        slow.push(stream);
    }
    let health = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    for _ in 0..20 {
        let (status, took) = asked("127.0.0.3", house.port, health).await;
        assert_eq!(status, 200);
        assert!(took < Duration::from_secs(2), "{took:?}: nobody waits for a slow one");
    }
    let (status, _) = asked("127.0.0.4", house.port, &post(BEARER, HELLO)).await;
    assert_eq!(status, 529, "read, and refused by the supervisor");
    drop(slow);
}

#[tokio::test]
async fn b09_a_request_that_can_be_read_in_two_ways_is_refused_before_its_route_in_the_form_of_every_error() {
    let house = House::new(settings(120), vec![]).await;
    for (head, says) in [
        ("GET /livez HTTP/1.1\nhost: x\n\n", "CRLF"),
        ("GET /livez HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", "host must be there once"),
        ("GET /livez HTTP/1.1\r\n\r\n", "host is missing"),
        ("GET /livez HTTP/1.1\r\nhost: x\r\nx-a: b\r\n c\r\n\r\n", "on one line"),
        ("GET /livez HTTP/1.1\r\nhost: x\r\nauthorization: a\r\nauthorization: a\r\n\r\n", "authorization"),
        (
            "GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ntransfer-encoding: chunked\r\n\r\n",
            "content-length",
        ),
        ("GET http://x/livez HTTP/1.1\r\nhost: x\r\n\r\n", "path"),
    ] {
        let answer = told(house.port, head).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{head:?}: {answer}");
        assert!(
            answer.contains(r#""error_code":"invalid_request""#) && answer.contains("request-id: "),
            "{answer}"
        );
        assert!(answer.contains(says), "{says}: {answer}");
    }
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n";
    let answer = told(house.port, head).await;
    assert!(answer.contains(r#""code":"invalid_request""#), "{answer}");
    // The one before it on the same connection is answered.
    let good = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    let answer = told(house.port, &format!("{good}{good}GET / HTTP/1.1\n\n{good}")).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 3, "{answer}");
}

#[tokio::test]
async fn b12_r15_r16_a_path_has_one_spelling_and_an_answer_is_its_askers() {
    let house = House::new(settings(120), vec![]).await;
    let get = |path: &str, fields: &str| {
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{fields}\r\n")
    };
    for path in
        ["/x/admin/v1/keys", "//admin/v1/keys", "/admin//v1/keys", "/admin/v1/../v1/keys", "/admin%2Fv1/keys"]
    {
        let answer = told(house.port, &get(path, BEARER)).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    assert!(
        told(house.port, &get("/admin/v1/keys", "")).await.starts_with("HTTP/1.1 401 "),
        "the one that it has"
    );
    assert!(told(house.port, &get("/some/where/v1/models", BEARER)).await.starts_with("HTTP/1.1 200 "));
    for path in ["/v1/runs/%ff", "/v1/models/%ff", "/v1/sessions/%zz"] {
        let answer = told(house.port, &get(path, "")).await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{path}: {answer}");
        let answer = told(house.port, &get(path, BEARER)).await;
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"invalid_request\""),
            "{path}: {answer}"
        );
    }
    for (path, fields) in [("/v1/models", BEARER), ("/v1/models", ""), ("/livez", ""), ("/nowhere", "")] {
        let answer = told(house.port, &get(path, fields)).await;
        assert!(answer.contains("cache-control: no-store\r\n"), "{path}: {answer}");
        assert!(
            answer.contains("vary: authorization, x-api-key, x-claude-credential\r\n"),
            "{path}: {answer}"
        );
    }
}

#[tokio::test]
async fn r17_a_strangers_slow_body_does_not_hold_a_drain() {
    let mut house = House::new(settings(120), vec![]).await;
    let mut stream = from("127.0.0.1", house.port).await;
    let head =
        "POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\nexpect: 100-continue\r\n\r\n";
    stream.write_all(head.as_bytes()).await.expect("written");
    let mut line = [0; 25];
    // It is told to go on when its body is waited for.
    tokio::time::timeout(LONG, stream.read_exact(&mut line)).await.expect("in time").expect("read");
    assert_eq!(&line, b"HTTP/1.1 100 Continue\r\n\r\n");
    fake::send(&house.control, &fake::drain(), &[]).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await.expect("in time");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("\"draining\""), "{answer}");
    let said = tokio::time::timeout(LONG, house.said.recv()).await.expect("in time");
    assert!(matches!(said, Some(gaoler_protocol::Message::Drained(_))), "{said:?}");
}
