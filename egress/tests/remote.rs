//! Remote MCP servers, and hosts of repositories, through the real binary, confined: the cage asks for `sN.mcp.invalid` or
//! `sN.git.invalid`, and what opens the server is added where the cage cannot see it. It must never reach a real network.
#![allow(missing_docs)]

mod common;

use common::Reply;
use common::net::{Net, With};
use gaoler_protocol::Denial;

/// What opens the servers of these tests.
const SECRET: &str = "jwt-of-the-tenant-0123456789abcdef";
const ONE: &str = r#"[{"secure":true,"authority":"mcp.example.com","path":"/bytes/2?a=1","headers":[["authorization","Bearer jwt-of-the-tenant-0123456789abcdef"],["x-team","red"]]}]"#;

fn post(net: &Net, url: &str, more: &str) -> Reply {
    let host = url.split('/').nth(2).unwrap_or_default();
    net.raw(&format!("POST {url} HTTP/1.1\r\nhost: {host}\r\n{more}content-length: 2\r\n\r\n{{}}"))
}

#[test]
fn t01_a_server_that_the_request_named_is_reached_over_tls_with_what_opens_it() {
    let net = Net::new(&["mcp.example.com"]);
    let proxied = net.egress(With { remotes: Some(ONE), ..With::default() });
    let reply = post(&net, "http://s0.mcp.invalid/bytes/2?a=1", "authorization: Bearer of-the-cage\r\n");
    assert_eq!(reply.status, 200, "{reply:?}");
    let seen = net.seen().pop().expect("a request");
    assert!(seen.starts_with("POST /bytes/2?a=1 HTTP/1.1\r\n"), "{seen}");
    for line in
        ["host: mcp.example.com\r\n", &format!("authorization: Bearer {SECRET}\r\n"), "x-team: red\r\n"]
    {
        assert!(seen.contains(line), "{line}: {seen}");
    }
    assert!(!seen.contains("of-the-cage") && !seen.contains("mcp.invalid"), "{seen}");
    assert_eq!(net.called().len(), 1);
    let ledger = proxied.ledger();
    let row = ledger.iter().find(|row| row["host"] == "mcp.example.com").expect("a row");
    assert!(row["port"] == 443 && row["bytes_up"].as_u64() > Some(0), "{row}");
    assert!(!format!("{ledger:?}").contains(SECRET));
}

#[test]
fn t02_its_name_opens_nothing_else_and_no_tool_gets_there_by_itself() {
    let net = Net::new(&["mcp.example.com", "other.example.com"]);
    let mut proxied = net.egress(With { remotes: Some(ONE), ..With::default() });
    let mut refused = |reply: Reply, status: u16, what: Denial, name: &str| {
        assert_eq!(reply.status, status, "{name}: {reply:?}");
        assert_eq!(proxied.egress.hear_denied(), what, "{name}");
    };
    refused(net.tunnel("s0.mcp.invalid:443", "").0, 400, Denial::Path, "another port, as a tunnel");
    refused(net.tunnel("s0.mcp.invalid:80", "").0, 400, Denial::Path, "a tunnel");
    refused(net.get("http://s0.mcp.invalid:8080/echo"), 400, Denial::Path, "another port");
    for host in ["s1.mcp.invalid", "s00.mcp.invalid", "s.mcp.invalid", "mcp.invalid", "x.s0.mcp.invalid"] {
        refused(net.get(&format!("http://{host}/echo")), 403, Denial::Host, host);
    }
    for host in ["s+0.mcp.invalid", "S0.mcp.invalid", "s0.mcp.invalid.", "s0.MCP.invalid"] {
        refused(net.get(&format!("http://{host}/echo")), 400, Denial::Host, host);
    }
    refused(net.tunnel("mcp.example.com:443", "").0, 403, Denial::Host, "the server itself");
    assert_eq!(net.called(), [""; 0], "nobody was called");
    assert!(!net.asked().contains(&"mcp.example.com".into()));
}

#[test]
fn t03_an_address_of_the_operators_network_is_reached_only_where_the_operator_named_it() {
    let net = Net::new(&["mcp.example.com"]);
    net.resolves("mcp.example.com", &[&["10.0.0.5"]]);
    let mut proxied = net.egress(With { remotes: Some(ONE), ..With::default() });
    let reply = post(&net, "http://s0.mcp.invalid/bytes/2?a=1", "");
    assert_eq!(reply.status, 403, "{reply:?}");
    assert_eq!(proxied.egress.hear_denied(), Denial::Address);
    drop(proxied);

    let net = Net::new(&[]);
    let remotes = r#"[{"secure":false,"authority":"10.0.0.5:80","path":"/echo","headers":[["authorization","Bearer in-house"]]}]"#;
    let mut proxied =
        net.egress(With { hosts: "mcp 10.0.0.5:80\n", remotes: Some(remotes), ..With::default() });
    let reply = post(&net, "http://s0.mcp.invalid/echo", "");
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.body.contains("authorization: Bearer in-house"), "{reply:?}");
    // A tool that asks for it by its address is no MCP client of this run.
    let reply = net.get("http://10.0.0.5/echo");
    assert_eq!(reply.status, 403, "{reply:?}");
    assert_eq!(proxied.egress.hear_denied(), Denial::Host);
}

#[test]
fn t04_a_list_that_names_what_no_run_may_reach_ends_egress() {
    let net = Net::new(&["mcp.example.com"]);
    for bad in [
        r#"[{"secure":false,"authority":"mcp.example.com","headers":[]}]"#,
        r#"[{"secure":true,"authority":"mcp.example.com:8443","headers":[]}]"#,
        r#"[{"secure":true,"authority":"user@mcp.example.com","headers":[]}]"#,
        r#"[{"secure":true,"authority":"localhost","headers":[]}]"#,
        r#"[{"secure":true,"authority":"mcp.example.com","headers":[["host","a"]]}]"#,
        r#"[{"secure":true,"authority":"mcp.example.com","headers":[["transfer-encoding","chunked"]]}]"#,
        r#"[{"secure":true,"authority":"mcp.example.com","headers":[["x","a\r\nb: c"]]}]"#,
        r#"{}"#,
    ] {
        let mut proxied = net.egress(With { remotes: Some(bad), ..With::default() });
        assert_eq!(proxied.egress.exit(), 2, "{bad}");
    }
}

#[test]
fn t05_a_server_without_its_certificate_gets_nothing_and_a_redirect_is_not_followed() {
    let net = Net::new(&["other.example.com"]);
    net.resolves("mcp.example.com", &[&["11.0.0.2"]]);
    let proxied = net.egress(With { remotes: Some(ONE), ..With::default() });
    let reply = post(&net, "http://s0.mcp.invalid/bytes/2?a=1", "");
    assert_eq!(reply.status, 502, "{reply:?}");
    assert!(net.seen().iter().all(|seen| !seen.contains(SECRET)), "{:?}", net.seen());
    drop(proxied);

    let net = Net::new(&["mcp.example.com"]);
    let remotes =
        r#"[{"secure":true,"authority":"mcp.example.com","path":"/redirect","headers":[["x-key","k"]]}]"#;
    let proxied = net.egress(With { remotes: Some(remotes), ..With::default() });
    let reply = post(&net, "http://s0.mcp.invalid/redirect", "");
    assert_eq!((reply.status, reply.header("location")), (302, Some("http://10.0.0.5/secret")), "{reply:?}");
    assert_eq!(net.seen().len(), 1);
    drop(proxied);
}

const REPOSITORY: &str = r#"[{"secure":true,"authority":"github.com:443","path":"/a","headers":[["authorization","Basic of-the-tenant-0123456789"]],"git":true}]"#;

#[test]
fn t06_what_opens_a_repository_goes_to_its_host_alone_wherever_that_points() {
    let net = Net::new(&["github.com", "gitlab.com", "mcp.example.com"]);
    let proxied = net.egress(With { remotes: Some(REPOSITORY), ..With::default() });
    let reply = net.get("http://s0.git.invalid/a/info/refs?service=git-upload-pack");
    assert_eq!(reply.status, 404, "{reply:?}");
    let seen = net.seen().pop().expect("a request");
    assert!(seen.starts_with("GET /a/info/refs?service=git-upload-pack HTTP/1.1\r\n"), "{seen}");
    assert!(seen.contains("host: github.com\r\n"), "{seen}");
    assert!(seen.contains("authorization: Basic of-the-tenant-0123456789\r\n"), "{seen}");
    assert_eq!(net.called().len(), 1, "over TLS");
    assert!(!format!("{:?}", proxied.ledger()).contains("of-the-tenant"));
    // A place of its own is told in the cage's words, and is the repository's from then on.
    let at = |path: &str| -> &'static str { REPOSITORY.replace("\"/a\"", &format!("\"{path}\"")).leak() };
    let mut proxied = net.egress(With { remotes: Some(at("/moved")), ..With::default() });
    let there = "http://s0.git.invalid/bytes/3/info/refs?service=git-upload-pack";
    assert_eq!(net.get(there).status, 403);
    assert_eq!(proxied.egress.hear_denied(), Denial::Path);
    let reply = net.get("http://s0.git.invalid/moved/info/refs?service=git-upload-pack");
    assert_eq!((reply.status, reply.header("location")), (301, Some(there)));
    assert_eq!(net.get(there).status, 404);
    let before = net.seen().len();
    assert!(net.seen()[before - 1].starts_with("GET /bytes/3/info/refs?"), "{:?}", net.seen());
    drop(proxied);
    // Another host's stays what it is, and nothing opens that.
    let proxied = net.egress(With { remotes: Some(at("/away")), ..With::default() });
    let reply = net.get("http://s0.git.invalid/away/info/refs?service=git-upload-pack");
    assert_eq!((reply.status, reply.header("location")), (302, Some("https://gitlab.com/echo")));
    let (reply, stream) = net.tunnel("gitlab.com:443", "");
    assert_eq!(reply.status, 200, "{reply:?}");
    let echo = net.over_tls(stream, "gitlab.com", "/echo").expect("an answer");
    assert!(echo.body.contains("host: gitlab.com"), "{echo:?}");
    let others = net.seen().into_iter().filter(|seen| !seen.contains("host: github.com\r\n"));
    assert!(others.clone().count() > 0 && others.into_iter().all(|seen| !seen.contains("of-the-tenant")));
    assert!(!format!("{:?}", proxied.ledger()).contains("of-the-tenant"));
}

#[test]
fn r10_what_opens_a_server_is_for_its_own_requests_alone_and_no_answer_tells_it() {
    let net = Net::new(&["mcp.example.com", "github.com"]);
    let one = |path: &str, more: &str| -> &'static str {
        let path = format!("\"path\":\"{path}\"{more}");
        ONE.replace("\"path\":\"/bytes/2?a=1\"", &path).leak()
    };
    // The positive control: its own place, by each of its methods.
    let mut proxied = net.egress(With { remotes: Some(ONE), ..With::default() });
    let ask = |method: &str, path: &str| {
        net.raw(&format!("{method} http://s0.mcp.invalid{path} HTTP/1.1\r\nhost: s0.mcp.invalid\r\n\r\n"))
    };
    for method in ["GET", "POST", "DELETE"] {
        assert_eq!(ask(method, "/bytes/2?a=1").status, 200, "{method}");
    }
    let called = net.called().len();
    for (method, path) in [
        ("GET", "/"),
        ("GET", "/bytes/2"),
        ("GET", "/bytes/2?a=2"),
        ("GET", "/bytes/2?a=1&b"),
        ("GET", "/bytes/2/?a=1"),
        ("GET", "//bytes/2?a=1"),
        ("GET", "/%62ytes/2?a=1"),
        ("GET", "/x/../bytes/2?a=1"),
        ("POST", "/admin/rotate"),
        ("DELETE", "/"),
        ("PUT", "/bytes/2?a=1"),
        ("PATCH", "/bytes/2?a=1"),
        ("HEAD", "/bytes/2?a=1"),
        ("OPTIONS", "/bytes/2?a=1"),
        ("PROPFIND", "/bytes/2?a=1"),
    ] {
        let reply = ask(method, path);
        assert_eq!(reply.status, 403, "{method} {path}: {reply:?}");
        assert!(
            reply.header("proxy-status").is_some_and(|text| text.starts_with("gaoler; error=")),
            "{path}"
        );
        assert_eq!(proxied.egress.hear_denied(), Denial::Path, "{method} {path}");
    }
    assert_eq!(net.called().len(), called, "nobody was called");
    drop(proxied);

    // An older server names a second place, in its stream; another line of it names nothing.
    let mut proxied = net.egress(With { remotes: Some(one("/sse", ",\"sse\":true")), ..With::default() });
    assert_eq!(ask("POST", "/bytes/4?id=7").status, 403);
    assert_eq!(proxied.egress.hear_denied(), Denial::Path);
    assert!(ask("GET", "/sse").body.contains("data: /bytes/5"));
    assert_eq!(ask("POST", "/bytes/4?id=7").body, "xxxx");
    for (method, path) in [("POST", "/bytes/5"), ("POST", "/bytes/4"), ("GET", "/bytes/4?id=7")] {
        assert_eq!(ask(method, path).status, 403, "{method} {path}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Path);
    }
    drop(proxied);

    // An answer with what opens the server, in its body or its head, is not passed on; nor is one that cannot be searched.
    for (path, status, denied) in [("/echo", 0, true), ("/tell", 502, true), ("/packed", 502, false)] {
        let mut proxied = net.egress(With { remotes: Some(one(path, "")), ..With::default() });
        let reply = ask("GET", path);
        assert_eq!(reply.status, status, "{path}: {reply:?}");
        assert!(!format!("{reply:?}").contains(SECRET), "{path}: {reply:?}");
        if denied {
            assert_eq!(proxied.egress.hear_denied(), Denial::Body, "{path}");
        }
        assert!(net.seen().pop().is_some_and(|seen| seen.contains(SECRET)), "it was sent there");
    }
    // Of a repository's host nothing but what fetches this one repository.
    let mut proxied = net.egress(With { remotes: Some(REPOSITORY), ..With::default() });
    assert_eq!(net.get("http://s0.git.invalid/a/info/refs?service=git-upload-pack").status, 404);
    let called = net.called().len();
    for path in
        ["/", "/echo", "/a", "/a/info/refs?service=git-receive-pack", "/b/info/refs?service=git-upload-pack"]
    {
        assert_eq!(net.get(&format!("http://s0.git.invalid{path}")).status, 403, "{path}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Path, "{path}");
    }
    let push = post(&net, "http://s0.git.invalid/a/git-receive-pack", "");
    assert_eq!((push.status, proxied.egress.hear_denied()), (403, Denial::Path));
    assert_eq!(post(&net, "http://s0.git.invalid/a/git-upload-pack", "").status, 404);
    assert_eq!(net.called().len(), called + 1);
}

#[test]
fn t07_a_repositorys_host_is_one_that_the_level_lets_through_and_no_mcp_server() {
    let net = Net::new(&["github.com", "mcp.example.com"]);
    let mut proxied = net.egress(With { remotes: Some(REPOSITORY), ..With::default() });
    for url in ["http://s0.mcp.invalid/echo", "http://s1.git.invalid/echo"] {
        assert_eq!(net.get(url).status, 403, "{url}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Host, "{url}");
    }
    drop(proxied);
    for (remotes, name) in [
        (r#"[{"secure":true,"authority":"mcp.example.com","headers":[],"git":true}]"#, "s0.git.invalid"),
        (ONE, "s0.git.invalid"),
    ] {
        let mut proxied = net.egress(With { remotes: Some(remotes), ..With::default() });
        let reply = net.get(&format!("http://{name}/echo"));
        assert_eq!(reply.status, 403, "{remotes}: {reply:?}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Host);
        drop(proxied);
    }
    assert_eq!(net.called(), [""; 0], "nobody was called");
}
