//! The proxy of the real binary, confined, between three networks of the test's own: what a cage reaches through it,
//! and what it does not, though the host could. It must never reach a real network.
#![allow(missing_docs)]

mod common;

use std::io::{ErrorKind, Read, Seek, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::net::{HOST, INNER, Net, PROXY, Proxied, WORLD, WORLD_V6, With};
use common::{CANARY, PATIENCE, PLACEHOLDER, Reply, finish};
use gaoler_protocol::Denial;

/// A refusal is a decision: it waits for nobody, least of all for the ten seconds that a connection may take.
const QUICK: Duration = Duration::from_secs(5);

/// What a denial and its status are, each with its word in `Proxy-Status`.
fn refused(proxied: &mut Proxied, reply: &Reply, status: u16, what: Denial, name: &str) {
    assert_eq!(reply.status, status, "{name}: {reply:?}");
    assert!(reply.body.starts_with("gaoler: ") && reply.body.lines().count() == 1, "{name}: {reply:?}");
    assert!(reply.header("proxy-status").is_some_and(|text| text.starts_with("gaoler; error=")), "{name}");
    assert_eq!(proxied.egress.hear_denied(), what, "{name}");
}

/// The other side has closed, with or without bytes of ours that it did not read.
fn ended(stream: &mut TcpStream) {
    match stream.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("not the end: {other:?}"),
    }
}

#[test]
fn t01_what_the_level_or_the_operator_names_is_reached_and_nothing_else() {
    let net = Net::new(&[
        "github.com",
        "deb.debian.org",
        "mirror.corp.example",
        "evil.example",
        "api.github.com.evil.example",
    ]);
    net.put("github.com", "hello", b"hello over TLS");
    net.put("mirror.corp.example", "hello", b"hello from the mirror");
    let mut proxied = net.egress(With { hosts: "*.corp.example:80\n", ..With::default() });
    let (reply, stream) = net.tunnel("github.com:443", "");
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(net.over_tls(stream, "github.com", "/hello").expect("TLS").body, "hello over TLS");
    assert!(
        net.get("http://deb.debian.org/echo")
            .body
            .starts_with("GET /echo HTTP/1.1\r\nhost: deb.debian.org\r\n")
    );
    assert_eq!(net.get("http://mirror.corp.example/hello").body, "hello from the mirror");

    // The operator's hosts are one open file for all runs: who reads them leaves its offset where it was.
    assert_eq!(proxied.hosts.stream_position().expect("an offset"), 0);

    // From the host all of these are reached.
    for port in [22, 80, 443] {
        drop(net.host.connect(&format!("{WORLD}:{port}")).expect("the host reaches it"));
    }
    for to in [
        "evil.example:443",
        "github.com:22",
        "github.com:80",
        "mirror.corp.example:443",
        "corp.example:80",
        "api.github.com.evil.example:443",
        "sub.github.com:443",
        &format!("{WORLD}:443"),
        &format!("[{WORLD_V6}]:443"),
    ] {
        let begin = Instant::now();
        refused(&mut proxied, &net.tunnel(to, "").0, 403, Denial::Host, to);
        assert!(begin.elapsed() < QUICK, "{to}");
    }
    for url in ["http://evil.example/echo", "http://github.com/echo", "http://11.0.0.2/"] {
        refused(&mut proxied, &net.get(url), 403, Denial::Host, url);
    }
    let asked = net.asked();
    assert!(asked.contains(&"github.com".into()), "{asked:?}");
    assert!(!asked.contains(&"evil.example".into()), "a host that is not listed is not asked for");
}

#[test]
fn t02_an_address_that_is_not_public_is_refused_whoever_names_it() {
    let net = Net::new(&["github.com"]);
    let mut proxied = net.egress(With {
        hosts: "*.test.example:443\n*.test.example:80\n127.0.0.1:80\n169.254.169.254:80\n10.0.0.5:80\n\
                [::1]:80\n[fd00:ec2::254]:80\n[::ffff:10.0.0.5]:80\n[64:ff9b::a00:5]:80\na.localhost:80\n11.0.0.1:80\n",
        ..With::default()
    });
    // The positive control: the host itself reaches all of these, and the proxy what is public.
    for inner in INNER {
        let inner = if inner.contains(':') { format!("[{inner}]:443") } else { format!("{inner}:443") };
        drop(net.host.connect(&inner).unwrap_or_else(|error| panic!("{inner}: {error}")));
    }
    let own = net.host.run(|| std::net::TcpListener::bind("0.0.0.0:80").expect("a port"));
    drop(net.host.connect(&format!("{HOST}:80")).expect("the host reaches itself"));
    own.accept().expect("that was it");
    own.set_nonblocking(true).expect("non-blocking");
    net.resolves("good.test.example", &[&[WORLD, WORLD_V6]]);
    assert_eq!(net.tunnel("good.test.example:443", "").0.status, 200);
    net.resolves("six.test.example", &[&[WORLD_V6]]);
    assert_eq!(net.tunnel("six.test.example:443", "").0.status, 200);

    let before = net.seen().len();
    let rows: &[&[&str]] = &[
        &["10.0.0.5"],
        &["100.64.0.5"],
        &["169.254.169.254"],
        &["192.168.0.5"],
        &["fd00:ec2::254"],
        &["64:ff9b::a00:5"],
        &["127.0.0.1"],
        &["127.8.8.8"],
        &["0.0.0.0"],
        &["::1"],
        &["::"],
        &["::ffff:10.0.0.5"],
        &["::ffff:11.0.0.2"],
        &["2002:a00:5::1"],
        &["fe80::1"],
        &["224.0.0.1"],
        &["255.255.255.255"],
        // Its own address is public, and no business of a cage.
        &[HOST],
        &["2600::1"],
        // One bad answer among good ones, in any place and family.
        &[WORLD, "10.0.0.5"],
        &["10.0.0.5", WORLD],
        &[WORLD, "::1"],
        &[
            WORLD,
            "11.0.0.3",
            "11.0.0.4",
            "11.0.0.5",
            "11.0.0.6",
            "11.0.0.7",
            "11.0.0.8",
            "11.0.0.9",
            "11.0.0.10",
            "127.0.0.1",
        ],
    ];
    for (number, answer) in rows.iter().enumerate() {
        let name = format!("n{number}.test.example");
        net.resolves(&name, &[answer]);
        let begin = Instant::now();
        let reply = match number % 2 {
            0 => net.tunnel(&format!("{name}:443"), "").0,
            _ => net.get(&format!("http://{name}/echo")),
        };
        refused(&mut proxied, &reply, 403, Denial::Address, &format!("{answer:?}"));
        assert!(begin.elapsed() < QUICK, "{answer:?}");
    }
    for literal in [
        "127.0.0.1",
        "169.254.169.254",
        "10.0.0.5",
        "[::1]",
        "[fd00:ec2::254]",
        "[::ffff:10.0.0.5]",
        "[64:ff9b::a00:5]",
        "a.localhost",
        "11.0.0.1",
    ] {
        refused(&mut proxied, &net.get(&format!("http://{literal}/echo")), 403, Denial::Address, literal);
        refused(&mut proxied, &net.tunnel(&format!("{literal}:80"), "").0, 403, Denial::Address, literal);
    }
    assert_eq!(net.seen().len(), before, "nobody heard of it");
    assert!(own.accept().is_err(), "nor did the host itself");
}

#[test]
fn t03_a_host_that_is_spelt_oddly_is_refused_and_never_looked_up() {
    let net = Net::new(&["github.com", "deb.debian.org"]);
    let mut proxied =
        net.egress(With { hosts: "github.com:80\n[2600::2]:443\n11.0.0.2:80\n", ..With::default() });
    // The positive control: each of them in its one spelling.
    for to in ["github.com:443", "[2600::2]:443"] {
        assert_eq!(net.tunnel(to, "").0.status, 200, "{to}");
    }
    for url in ["http://github.com/echo", "http://11.0.0.2/echo"] {
        assert_eq!(net.get(url).status, 200, "{url}");
    }
    for host in [
        "localhost",
        "metadata",
        "github",
        "a..b",
        // Names that mean the same to whoever looks them up.
        "GitHub.com",
        "github.COM",
        "github.com.",
        "GITHUB.COM.",
        ".github.com",
        "github.com..",
        "xn--GTHUB-4xa.com",
        // Addresses.
        "11.0.0.2.",
        "11.0.2",
        "0x0b.0.0.2",
        "0x0b000002",
        "013.0.0.2",
        "184549378",
        "11.0.0.02",
        "127.1",
        "0x7f.1",
        "2130706433",
        "017700000001",
        "127.0.0.1.",
        "[2600:0::2]",
        "[2600:0:0:0:0:0:0:2]",
        "[2600::0002]",
        "[2600::0.0.0.2]",
        "[::FFFF:11.0.0.2]",
        "[::ffff:b00:2]",
    ] {
        let begin = Instant::now();
        refused(&mut proxied, &net.tunnel(&format!("{host}:443"), "").0, 400, Denial::Host, host);
        refused(&mut proxied, &net.get(&format!("http://{host}/")), 400, Denial::Host, host);
        assert!(begin.elapsed() < QUICK, "{host}");
    }
    for to in [
        "github.com",
        "github.com:",
        "github.com:0",
        "github.com:0443",
        "github.com:+443",
        "github.com:65536",
        "github.com:https",
        "github.com:443:443",
        "github.com :443",
        "github.com: 443",
        "github.com\t:443",
        "github.com%00:443",
        "github.com%2e:443",
        "git%68ub.com:443",
        "github.com:443/",
        "github.com:443?",
        "github.com:443#",
        "/github.com:443",
        "//github.com:443",
        "http://github.com:443",
        "https://github.com:443",
        "https://github.com:443/",
        "user@github.com:443",
        "user:password@github.com:443",
        "@github.com:443",
        "[github.com]:443",
        "[11.0.0.2]:443",
        "[2600::2%25eth0]:443",
        "[2600::2%lo]:443",
        "2600::2:443",
        "[2600::2]443",
        "*.github.com:443",
        "github.com\\:443",
        "g\u{0456}thub.com:443",
        "github\u{3002}com:443",
        "",
        "*",
    ] {
        // Some of these are no target at all to the parser of HTTP, which says 400 by itself.
        let reply = net.tunnel(to, "").0;
        assert_eq!(reply.status, 400, "{to}: {reply:?}");
        assert!([Denial::Host, Denial::Path].contains(&proxied.egress.hear_denied()), "{to}");
    }
    for url in [
        "http://user@github.com/",
        "http://github.com:080/",
        "http://github.com:+80/",
        "http://github.com:/",
        "http://git%68ub.com/",
        "http://github.com\\/",
        "http://[2600::2%25lo]/",
        "http://github.com/#fragment",
        "http:github.com/",
        "http:///github.com/",
        "HTTP:/github.com/",
        "github.com/",
        "//github.com/",
        "https://github.com/",
        "ftp://github.com/",
    ] {
        let reply = net.raw(&format!("GET {url} HTTP/1.1\r\nhost: github.com\r\n\r\n"));
        assert_eq!(reply.status, 400, "{url}: {reply:?}");
        assert!([Denial::Host, Denial::Path].contains(&proxied.egress.hear_denied()), "{url}");
    }
    assert!(net.asked().iter().all(|name| name == "github.com"), "{:?}", net.asked());
}

#[test]
fn b10_a_head_that_two_readers_could_take_differently_is_refused_before_a_lookup() {
    let net = Net::new(&["github.com", "deb.debian.org"]);
    let mut proxied = net.egress(With::default());
    let (get, post) = ("GET http://deb.debian.org/echo HTTP/1.1", "POST http://deb.debian.org/echo HTTP/1.1");
    let (host, connect) = ("host: deb.debian.org", "CONNECT github.com:443 HTTP/1.1");
    // The positive control: what differs from the rows below in one thing.
    for (good, status) in [
        (format!("{get}\r\n{host}\r\n\r\n"), 200),
        (format!("{post}\r\n{host}\r\ncontent-length: 2\r\n\r\nab"), 200),
        (format!("{post}\r\n{host}\r\ntransfer-encoding: Chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"), 200),
    ] {
        assert_eq!(net.raw(&good).status, status, "{good}");
    }
    for more in ["host: github.com:443\r\n", "host: github.com\r\n", "", "content-length: 0\r\n"] {
        let mut stream = net.cage.connect(PROXY).expect("the proxy listens");
        write!(stream, "{connect}\r\n{more}\r\n").expect("sent");
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|length| length == 1) {
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 200"), "{more}: {}", String::from_utf8_lossy(&head));
    }
    let asked = net.asked().len();
    let body = "2\r\nab\r\n0\r\n\r\n";
    for (name, bytes) in [
        ("bare line feeds", format!("{get}\n{host}\n\n")),
        ("one bare line feed", format!("{get}\r\n{host}\nx: 1\r\n\r\n")),
        ("a bare line feed at the end", format!("{get}\r\n{host}\r\n\n")),
        ("a bare line feed after the request line", format!("{get}\n{host}\r\n\r\n")),
        ("a bare carriage return", format!("{get}\r\n{host}\r\nx: a\rb: c\r\n\r\n")),
        ("an empty line before it", format!("\r\n{get}\r\n{host}\r\n\r\n")),
        ("a line feed before it", format!("\n{get}\r\n{host}\r\n\r\n")),
        ("a folded line", format!("{get}\r\n{host}\r\nx: a\r\n b\r\n\r\n")),
        ("a line folded by a tab", format!("{get}\r\n{host}\r\nx: a\r\n\tb\r\n\r\n")),
        ("a folded first line", format!("{get}\r\n {host}\r\n\r\n")),
        ("a blank before the colon", format!("{get}\r\nhost : deb.debian.org\r\n\r\n")),
        ("no colon", format!("{get}\r\n{host}\r\nx\r\n\r\n")),
        ("no name", format!("{get}\r\n{host}\r\n: x\r\n\r\n")),
        ("two blanks in the request line", format!("{}\r\n{host}\r\n\r\n", get.replace(' ', "  "))),
        ("a blank at its end", format!("{get} \r\n{host}\r\n\r\n")),
        ("a tab in it", format!("{}\r\n{host}\r\n\r\n", get.replace(' ', "\t"))),
        ("two hosts", format!("{get}\r\n{host}\r\n{host}\r\n\r\n")),
        ("another host", format!("{get}\r\nhost: github.com\r\n\r\n")),
        ("a host in capitals", format!("{get}\r\nhost: DEB.debian.org\r\n\r\n")),
        ("a host with a dot", format!("{get}\r\nhost: deb.debian.org.\r\n\r\n")),
        ("a host with a user", format!("{get}\r\nhost: a@deb.debian.org\r\n\r\n")),
        ("two hosts in one", format!("{get}\r\nhost: deb.debian.org, deb.debian.org\r\n\r\n")),
        (
            "two equal lengths",
            format!("{post}\r\n{host}\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nab"),
        ),
        ("two lengths", format!("{post}\r\n{host}\r\ncontent-length: 2\r\nContent-Length: 1\r\n\r\nab")),
        ("a list of lengths", format!("{post}\r\n{host}\r\ncontent-length: 2, 2\r\n\r\nab")),
        ("a signed length", format!("{post}\r\n{host}\r\ncontent-length: +2\r\n\r\nab")),
        ("a padded length", format!("{post}\r\n{host}\r\ncontent-length: 02\r\n\r\nab")),
        ("a length in base 16", format!("{post}\r\n{host}\r\ncontent-length: 0x2\r\n\r\nab")),
        ("an empty length", format!("{post}\r\n{host}\r\ncontent-length: \r\n\r\nab")),
        ("an endless length", format!("{post}\r\n{host}\r\ncontent-length: {}\r\n\r\nab", u128::MAX)),
        (
            "TE and CL",
            format!("{post}\r\n{host}\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n{body}"),
        ),
        (
            "CL and TE",
            format!("{post}\r\n{host}\r\ncontent-length: 12\r\ntransfer-encoding: chunked\r\n\r\n{body}"),
        ),
        (
            "two TEs",
            format!(
                "{post}\r\n{host}\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n{body}"
            ),
        ),
        ("a list of codings", format!("{post}\r\n{host}\r\ntransfer-encoding: gzip, chunked\r\n\r\n{body}")),
        ("an unknown coding", format!("{post}\r\n{host}\r\ntransfer-encoding: xchunked\r\n\r\n{body}")),
        ("identity", format!("{post}\r\n{host}\r\ntransfer-encoding: identity\r\n\r\nab")),
        ("a tunnel to another host", format!("{connect}\r\nhost: gitlab.com:443\r\n\r\n")),
        ("a tunnel to another port", format!("{connect}\r\nhost: github.com:80\r\n\r\n")),
        (
            "a tunnel to two hosts",
            format!("{connect}\r\nhost: github.com:443\r\nhost: github.com:443\r\n\r\n"),
        ),
        ("a tunnel to a host in capitals", format!("{connect}\r\nhost: GitHub.com:443\r\n\r\n")),
        ("a tunnel with a body", format!("{connect}\r\ncontent-length: 2\r\n\r\nab")),
        ("a tunnel in chunks", format!("{connect}\r\ntransfer-encoding: chunked\r\n\r\n{body}")),
        ("another version", format!("{}\r\n{host}\r\n\r\n", get.replace("1.1", "1.2"))),
        (
            "two passwords",
            format!(
                "{get}\r\n{host}\r\nproxy-authorization: Basic YQ==\r\nproxy-authorization: Basic YQ==\r\n\r\n"
            ),
        ),
    ] {
        let reply = net.raw(&bytes);
        assert_eq!(reply.status, 400, "{name}: {reply:?}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Path, "{name}");
    }
    assert_eq!(net.asked().len(), asked, "nothing of it was looked up");
    // Piece by piece it is the same.
    for piece in [1, 7] {
        let mut stream = net.cage.connect(PROXY).expect("the proxy listens");
        stream.set_nodelay(true).expect("at once");
        let bytes = format!("{get}\r\n{host}\nx: 1\r\n\r\n");
        for piece in bytes.as_bytes().chunks(piece) {
            let _ = stream.write_all(piece);
        }
        assert_eq!(finish(stream).status, 400);
        assert_eq!(proxied.egress.hear_denied(), Denial::Path);
    }
}

#[test]
fn t04_the_address_that_was_judged_is_the_one_that_is_dialled() {
    let net = Net::new(&["github.com"]);
    net.put("github.com", "hello", b"the judged one");
    let proxied = net.egress(With::default());
    // Every answer differs from the one before: whoever looked twice would judge one and dial the other. How often
    // the resolver repeats a question that is answered late is its own business.
    let answers: [&[&str]; 2] = [&[WORLD], &["10.0.0.5"]];
    net.resolves("github.com", &answers.repeat(100));
    let (mut reached, mut refused) = (0, 0);
    for _ in 0..16 {
        let (reply, stream) = net.tunnel("github.com:443", "");
        match reply.status {
            200 => {
                let reply = net.over_tls(stream, "github.com", "/hello").expect("TLS");
                assert_eq!(reply.body, "the judged one");
                reached += 1;
            }
            status => {
                assert_eq!(status, 403, "{reply:?}");
                refused += 1;
            }
        }
    }
    assert!(reached > 0 && refused > 0, "{reached} and {refused}");
    assert_eq!(net.called(), vec![WORLD.to_owned(); reached]);
    let line = &proxied.ledger()[0];
    assert_eq!((&line["address"], &line["connections"]), (&WORLD.into(), &reached.into()));
    assert_eq!(line["refused"], refused);
}

/// A ClientHello for this name, as rustls writes it.
fn hello(name: &str) -> Vec<u8> {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = name.to_owned().try_into().expect("a server's name");
    let mut connection = rustls::ClientConnection::new(config.into(), name).expect("a connection");
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).expect("written");
    bytes
}

#[test]
fn t05_a_tunnel_that_asks_for_another_name_ends_before_a_byte_is_forwarded() {
    let net = Net::new(&["github.com", "evil.example"]);
    let mut proxied = net.egress(With { hosts: "11.0.0.2:443\n", ..With::default() });
    let to = |to: &str, bytes: &[u8], size: usize| {
        let (reply, mut stream) = net.tunnel(to, "");
        assert_eq!(reply.status, 200, "{reply:?}");
        for piece in bytes.chunks(size) {
            stream.set_nodelay(true).expect("no delay");
            if stream.write_all(piece).is_err() {
                break;
            }
        }
        let mut answer = [0; 7];
        let length = stream.read(&mut answer).unwrap_or(0);
        (answer[..length].to_vec(), stream)
    };
    let ask = |bytes: &[u8], size: usize| to("github.com:443", bytes, size);
    // The right name, in one piece and in many: the server's own handshake answers.
    let good = hello("github.com");
    for size in [good.len(), 100, 7, 1] {
        assert_eq!(ask(&good, size).0.first(), Some(&0x16), "pieces of {size}");
    }
    let at = good.windows(10).position(|window| window == b"github.com").expect("the name");
    let with = |name: &[u8; 10]| [&good[..at], name, &good[at + 10..]].concat();
    assert_eq!(ask(&with(b"GITHUB.com"), 4096).0.first(), Some(&0x16));
    let before = net.seen().len();
    for (name, bytes) in [
        ("another name", hello("evil.example")),
        ("a name below", hello("a.github.com")),
        ("no name", hello("192.0.2.1")),
        ("another of the same length", with(b"github.con")),
        ("a name with NUL", with(b"github.co\0")),
        ("plain HTTP", b"GET / HTTP/1.1\r\nhost: github.com\r\n\r\n".to_vec()),
        ("SSH", b"SSH-2.0-OpenSSH_9.9\r\n".to_vec()),
        (
            "half a hello and then something else",
            [&good[..at], b"GET / HTTP/1.1\r\n\r\n".repeat(100).as_slice()].concat(),
        ),
        ("an alert", vec![0x15, 3, 3, 0, 2, 1, 0]),
        ("a record that is too long", [[0x16, 3, 1, 0xff, 0xff].as_slice(), &[1; 70_000]].concat()),
        (
            "records without end",
            [0x16, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff].into_iter().cycle().take(40_000).collect(),
        ),
    ] {
        let (answer, mut stream) = ask(&bytes, 4096);
        // The alert, or the kernel's reset where more was on its way.
        assert!(answer == [0x15, 3, 3, 0, 2, 2, 112] || answer.is_empty(), "{name}: {answer:?}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Name, "{name}");
        ended(&mut stream);
    }
    // A hello that breaks off is none either; one that never begins is nobody's fault.
    let (_, mut stream) = net.tunnel("github.com:443", "");
    stream.write_all(&good[..50]).expect("sent");
    stream.shutdown(Shutdown::Write).expect("shut");
    assert_eq!(proxied.egress.hear_denied(), Denial::Name);
    drop(net.tunnel("github.com:443", ""));
    // An address has no name to ask for: with one, a tunnel to it is refused.
    assert_eq!(to("11.0.0.2:443", &hello(WORLD), 4096).0.first(), Some(&0x16));
    assert_eq!(to("11.0.0.2:443", &good, 4096).0.first(), Some(&0x15));
    assert_eq!(proxied.egress.hear_denied(), Denial::Name);
    let lines = proxied.ledger();
    assert_eq!(net.seen().len(), before, "the server has heard nothing");
    // What was forwarded is the five good hellos, byte for byte.
    assert_eq!(lines[0]["bytes_up"], 5 * good.len());
    assert_eq!((&lines[0]["connections"], &lines[0]["refused"]), (&18.into(), &12.into()));
}

#[test]
fn t06_plain_http_is_written_anew_and_its_answers_are_passed_back() {
    let net = Net::new(&["deb.debian.org", "github.com"]);
    let mut proxied = net.egress(With::default());
    let host = "host: deb.debian.org\r\n";
    let headers = "connection: x-mine, keep-alive, content-length\r\nx-mine: 1\r\nkeep-alive: 5\r\nte: trailers\r\n\
                   proxy-authorization: Basic cnVuOng=\r\nproxy-connection: keep-alive\r\nproxy-x: 1\r\n\
                   upgrade: websocket\r\nx-kept: 1\r\nauthorization: Bearer the-agents-own\r\n";
    let reply = net.raw(&format!(
        "POST http://deb.debian.org/echo?a=b HTTP/1.1\r\n{host}{headers}content-length: 4\r\n\r\nbody"
    ));
    assert_eq!(reply.status, 200, "{reply:?}");
    let expected = "POST /echo?a=b HTTP/1.1\r\nhost: deb.debian.org\r\nx-kept: 1\r\nauthorization: Bearer the-agents-own\r\ncontent-length: 4\r\n\r\nbody";
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines[1..].sort();
        lines
    };
    assert_eq!(sorted(&net.seen().pop().expect("a request")), sorted(expected));

    let reply = net.raw(&format!("POST http://deb.debian.org/echo HTTP/1.1\r\n{host}transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"));
    let seen = net.seen().pop().expect("a request");
    assert!(
        seen.contains("transfer-encoding: chunked\r\n")
            && seen.ends_with("3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"),
        "{seen}"
    );
    assert_eq!(reply.status, 200);
    assert_eq!(net.get("http://deb.debian.org/bytes/300000").body.len(), 300_000);
    let reply = net.get("http://deb.debian.org/chunks");
    assert_eq!((reply.body.as_str(), reply.whole), ("abcdef", true));
    let reply = net.raw(&format!("HEAD http://deb.debian.org/bytes/5 HTTP/1.1\r\n{host}\r\n"));
    assert_eq!((reply.status, reply.header("content-length"), reply.body.as_str()), (200, Some("5"), ""));
    // HTTP/1.0, without a Host; and a destination with its port.
    assert_eq!(net.raw("GET http://deb.debian.org:80/bytes/5 HTTP/1.0\r\n\r\n").body, "xxxxx");
    // A redirect is the client's to follow, and to be refused then.
    let reply = net.get("http://deb.debian.org/redirect");
    assert_eq!((reply.status, reply.header("location")), (302, Some("http://10.0.0.5/secret")));
    let reply = net.get("http://deb.debian.org/hop");
    assert_eq!((reply.status, reply.body.as_str(), reply.header("x-kept")), (200, "hop", Some("1")));
    for gone in ["x-hop", "keep-alive", "proxy-status", "proxy-authenticate"] {
        assert_eq!(reply.header(gone), None, "{gone}");
    }
    // No other protocol grows out of it.
    let reply = net.raw(&format!(
        "GET http://deb.debian.org/switch HTTP/1.1\r\n{host}connection: upgrade\r\nupgrade: websocket\r\n\r\n"
    ));
    assert_eq!(reply.status, 502, "{reply:?}");

    let before = net.seen().len();
    for (name, bytes, status) in [
        ("another host", "GET http://deb.debian.org/ HTTP/1.1\r\nhost: github.com\r\n\r\n".into(), 400),
        (
            "another port",
            "GET http://deb.debian.org/ HTTP/1.1\r\nhost: deb.debian.org:81\r\n\r\n".into(),
            400,
        ),
        ("two hosts", format!("GET http://deb.debian.org/ HTTP/1.1\r\n{host}{host}\r\n"), 400),
        ("an empty host", "GET http://deb.debian.org/ HTTP/1.1\r\nhost: \r\n\r\n".into(), 400),
        (
            "no TLS where TLS is",
            "GET http://deb.debian.org:443/ HTTP/1.1\r\nhost: deb.debian.org:443\r\n\r\n".into(),
            400,
        ),
        ("https", format!("GET https://deb.debian.org/ HTTP/1.1\r\n{host}\r\n"), 400),
        ("ftp", format!("GET ftp://deb.debian.org/ HTTP/1.1\r\n{host}\r\n"), 400),
        ("a path", format!("GET / HTTP/1.1\r\n{host}\r\n"), 400),
        ("a star", format!("OPTIONS * HTTP/1.1\r\n{host}\r\n"), 400),
        ("a trace", format!("TRACE http://deb.debian.org/ HTTP/1.1\r\n{host}\r\n"), 400),
        (
            "a large head",
            format!("GET http://deb.debian.org/ HTTP/1.1\r\n{host}x: {}\r\n\r\n", "y".repeat(70_000)),
            431,
        ),
        (
            "a folded header",
            format!("GET http://deb.debian.org/ HTTP/1.1\r\n{host}x: 1\r\n y: 2\r\n\r\n"),
            400,
        ),
        ("no HTTP", "hello\r\n\r\n".into(), 400),
        (
            "two lengths",
            format!(
                "POST http://deb.debian.org/ HTTP/1.1\r\n{host}content-length: 1\r\ncontent-length: 2\r\n\r\nab"
            ),
            400,
        ),
    ] {
        let reply = net.raw(&bytes);
        assert_eq!(reply.status, status, "{name}: {reply:?}");
        assert_eq!(proxied.egress.hear_denied(), Denial::Path, "{name}");
    }
    // What is smuggled behind a request is not read: one connection, one request.
    let bytes = format!(
        "GET http://deb.debian.org/bytes/1 HTTP/1.1\r\n{host}\r\nGET http://deb.debian.org/bytes/2 HTTP/1.1\r\n{host}\r\n"
    );
    assert_eq!(net.raw(&bytes).body, "x");
    assert_eq!(net.seen().len(), before + 1);
    for request in net.seen() {
        assert!(!request.contains(CANARY) && !request.to_ascii_lowercase().contains("proxy-"), "{request}");
    }
}

#[test]
fn t07_the_bytes_of_a_run_are_bounded_and_the_last_one_ends_every_tunnel() {
    let net = Net::new(&["deb.debian.org", "github.com"]);
    let mut proxied = net.egress(With { egress_mib: 1, ..With::default() });
    assert_eq!(net.get("http://deb.debian.org/bytes/1000").body.len(), 1000);
    let (reply, mut open) = net.tunnel("deb.debian.org:80", "");
    assert_eq!(reply.status, 200, "{reply:?}");
    let reply = net.get("http://deb.debian.org/bytes/3000000");
    assert!(!reply.whole || reply.body.len() < 3_000_000, "{}", reply.body.len());
    assert!(reply.body.len() > 900_000 && reply.body.len() <= 1 << 20, "{}", reply.body.len());
    // The other tunnel ends with it, and nothing begins any more.
    ended(&mut open);
    assert_eq!(proxied.egress.hear_denied(), Denial::Quota);
    refused(&mut proxied, &net.get("http://deb.debian.org/bytes/1"), 429, Denial::Quota, "later");
    refused(&mut proxied, &net.tunnel("github.com:443", "").0, 429, Denial::Quota, "later");
    let lines = proxied.ledger();
    let sum = |field: &str| lines.iter().filter_map(|line| line[field].as_u64()).sum::<u64>();
    assert_eq!(sum("bytes_up") + sum("bytes_down"), 1 << 20);
}

#[test]
fn t08_the_connections_of_a_run_are_bounded() {
    let net = Net::new(&["deb.debian.org", "github.com"]);
    let mut proxied = net.egress(With::default());
    let open: Vec<_> = (0..64).map(|_| net.tunnel("deb.debian.org:80", "")).collect();
    assert!(open.iter().all(|(reply, _)| reply.status == 200));
    refused(&mut proxied, &net.tunnel("github.com:443", "").0, 429, Denial::Quota, "one too many");
    drop(open);
    // They end one by one, and then there is room again.
    let begin = Instant::now();
    while net.tunnel("github.com:443", "").0.status != 200 {
        assert!(begin.elapsed() < PATIENCE, "no place came free");
    }
}

#[test]
fn t09_a_door_that_others_can_reach_asks_for_the_placeholder() {
    let net = Net::new(&["deb.debian.org", "github.com"]);
    let mut proxied = net.egress(With { peer_uid: 4_242, ..With::default() });
    let token = PLACEHOLDER.token();
    let basic = |text: &str| {
        use base64::Engine;
        format!("proxy-authorization: Basic {}\r\n", base64::engine::general_purpose::STANDARD.encode(text))
    };
    let right = basic(&format!("run:{token}"));
    for good in [right.clone(), format!("Proxy-Authorization: bearer {token}\r\n")] {
        assert_eq!(net.tunnel("github.com:443", &good).0.status, 200, "{good}");
        let reply = net.raw(&format!("GET http://deb.debian.org/echo HTTP/1.1\r\n{good}\r\n"));
        assert_eq!(reply.status, 200);
        assert!(
            !reply.body.contains(&token) && !reply.body.to_ascii_lowercase().contains("proxy-"),
            "{reply:?}"
        );
    }
    // Who shows nothing is asked, and counted nowhere: clients begin like that.
    let (reply, _) = net.tunnel("github.com:443", "");
    assert_eq!((reply.status, reply.header("proxy-authenticate")), (407, Some("basic realm=\"gaoler\"")));
    for wrong in [
        basic("run:"),
        basic(&format!("run:{token}x")),
        basic(&format!("run:{}", &token[..token.len() - 1])),
        basic(&format!("root:{token}")),
        format!("proxy-authorization: {token}\r\n"),
        format!("proxy-authorization: Basic {token}\r\n"),
        "proxy-authorization: \r\n".into(),
    ] {
        refused(&mut proxied, &net.tunnel("github.com:443", &wrong).0, 407, Denial::Placeholder, &wrong);
        let plain = format!("GET http://deb.debian.org/echo HTTP/1.1\r\n{wrong}\r\n");
        refused(&mut proxied, &net.raw(&plain), 407, Denial::Placeholder, &wrong);
    }
    // It comes first: a stranger learns nothing of the list.
    refused(
        &mut proxied,
        &net.tunnel("evil.example:443", &basic("run:x")).0,
        407,
        Denial::Placeholder,
        "order",
    );
    // On the API's side the kernel tells who comes. This test's uid is another one.
    assert!(finish(proxied.egress.connect()).head.is_empty());
    assert_eq!(proxied.egress.hear_denied(), Denial::Placeholder);
    // However often strangers come, the run goes on; the supervisor hears of them up to a bound.
    let heard = 7 * 2 + 2;
    for number in heard..300 {
        drop(finish(proxied.egress.connect()));
        if number < 256 {
            assert_eq!(proxied.egress.hear_denied(), Denial::Placeholder);
        }
    }
    assert_eq!(net.tunnel("github.com:443", &right).0.status, 200);
}

#[test]
fn t10_the_ledger_tells_where_a_run_went() {
    let net = Net::new(&["deb.debian.org", "github.com"]);
    let mut proxied = net.egress(With::default());
    for _ in 0..2 {
        assert_eq!(net.get("http://deb.debian.org/bytes/1000").body.len(), 1000);
    }
    assert_eq!(net.tunnel("evil.example:443", "").0.status, 403);
    assert_eq!(net.tunnel("127.1:443", "").0.status, 400);
    net.resolves("github.com", &[&["10.0.0.5"]]);
    assert_eq!(net.tunnel("github.com:443", "").0.status, 403);
    for _ in 0..3 {
        proxied.egress.hear_denied();
    }
    let lines = proxied.ledger();
    let row = |number: usize| {
        let line = &lines[number];
        assert!(
            line["first_ms"].as_u64() <= line["last_ms"].as_u64() && line["last_ms"].as_u64() < Some(60_000)
        );
        let text = |field: &str| line[field].to_string();
        let fields = ["host", "port", "address", "connections", "refused"];
        fields.map(text).join(" ")
    };
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!(row(0), "\"deb.debian.org\" 80 \"11.0.0.2\" 2 0");
    assert_eq!(row(1), "\"evil.example\" 443 null 0 1");
    assert_eq!(row(2), "\"(unreadable)\" 0 null 0 1");
    assert_eq!(row(3), "\"github.com\" 443 null 0 1");
    // Heads count, as they are bytes that went.
    assert!(lines[0]["bytes_down"].as_u64() > Some(2000) && lines[0]["bytes_up"].as_u64() > Some(60));
    // When nobody says Revoke, it is told all the same.
    let mut proxied = net.egress(With::default());
    assert_eq!(net.tunnel("evil.example:443", "").0.status, 403);
    proxied.egress.hear_denied();
    proxied.egress.hang_up();
    let mut text = String::new();
    proxied.ledger.read_to_string(&mut text).expect("text");
    assert!(text.starts_with("{\"host\":\"evil.example\",\"port\":443,"), "{text}");
}

#[test]
fn t11_failures_are_told_from_refusals_and_told_soon() {
    let net = Net::new(&["github.com"]);
    let hosts = "*.test.example:443\n*.test.example:80\n*.test.example:8443\n";
    let mut proxied = net.egress(With { hosts, ..With::default() });
    let check = |to: &str, status: u16, error: &str| {
        let begin = Instant::now();
        let (reply, _) = net.tunnel(to, "");
        assert_eq!((reply.status, reply.header("proxy-status")), (status, Some(error)), "{to}: {reply:?}");
        assert!(begin.elapsed() < QUICK, "{to}");
    };
    check("none.test.example:443", 502, "gaoler; error=dns_error");
    net.resolves("empty.test.example", &[&[]]);
    check("empty.test.example:443", 502, "gaoler; error=dns_error");
    net.resolves("up.test.example", &[&[WORLD]]);
    assert_eq!(net.tunnel("up.test.example:80", "").0.status, 200);
    // The operator named this port, and Landlock was not told: the confinement holds by itself.
    net.world.run(|| {
        std::thread::spawn(|| std::net::TcpListener::bind("0.0.0.0:8443").map(|listener| listener.accept()))
    });
    check("up.test.example:8443", 502, "gaoler; error=connection_refused");
    assert_eq!(proxied.egress.revoke().denials, 0);
}

#[test]
fn t12_the_end_of_a_run_ends_its_tunnels() {
    let net = Net::new(&["deb.debian.org"]);
    let mut proxied = net.egress(With::default());
    let (_, mut first) = net.tunnel("deb.debian.org:80", "");
    proxied.egress.revoke();
    ended(&mut first);
    assert_eq!(proxied.egress.exit(), 0);
    assert!(net.cage.connect(PROXY).is_err());
    let mut proxied = net.egress(With::default());
    let (_, mut second) = net.tunnel("deb.debian.org:80", "");
    proxied.egress.hang_up();
    ended(&mut second);
    assert_eq!(proxied.egress.exit(), 0);
}

#[test]
fn t13_the_proxy_knows_no_credential() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/proxy");
    let mut sources = 0;
    for entry in std::fs::read_dir(folder).expect("the proxy's sources") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("a source");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for line in code {
            let knows = ["Credential", "credential::", "relay", "upstream", "Job"]
                .iter()
                .any(|word| line.contains(word));
            assert!(!knows, "{}: {line}", path.display());
        }
        sources += 1;
    }
    assert!(sources >= 8, "{sources}");
}

/// A client of everyday use, in the cage's network, with the proxy in its environment and nothing else.
fn client(net: &Net, folder: &Path, line: &[&str], more: &[(&str, &str)]) -> Output {
    let ca = net.ca_file().to_str().expect("a path").to_owned();
    let url = format!("http://run:{}@{PROXY}", PLACEHOLDER.token());
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).current_dir(folder).env_clear();
    command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HOME", folder).env("LANG", "C.UTF-8");
    for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
        command.env(name, &url);
    }
    for name in [
        "GIT_SSL_CAINFO",
        "CURL_CA_BUNDLE",
        "NODE_EXTRA_CA_CERTS",
        "npm_config_cafile",
        "PIP_CERT",
        "SSL_CERT_FILE",
    ] {
        command.env(name, &ca);
    }
    command.envs(more.iter().copied());
    let output =
        net.cage.run(move || command.output()).unwrap_or_else(|error| panic!("{}: {error}", line[0]));
    println!("{line:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    output
}

/// A run of a program at home, to make what the world serves.
fn make(folder: &Path, line: &[&str]) {
    let output = Command::new(line[0]).args(&line[1..]).current_dir(folder).output().expect(line[0]);
    assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const CLIENTS: [&str; 6] = [
    "github.com",
    "registry.npmjs.org",
    "pypi.org",
    "files.pythonhosted.org",
    "deb.debian.org",
    "evil.example",
];

#[test]
fn t14_git_curl_pip_and_npm_work_through_the_proxy() {
    let net = Net::new(&CLIENTS);
    // Debian's Python has no pip of its own; an environment has one, without a network.
    let tools = tempfile::tempdir().expect("a folder");
    make(tools.path(), &["python3", "-m", "venv", "own"]);
    let python = tools.path().join("own/bin/python");
    let python = python.to_str().expect("a path");
    // Once as the cage's own, once where others can reach it and every request must show the placeholder.
    for peer_uid in [0, 4_242] {
        let mut proxied = net.egress(With { peer_uid, ..With::default() });
        let home = tempfile::tempdir().expect("a folder");
        curl(&net, home.path());
        assert_eq!(proxied.egress.hear_denied(), Denial::Host);
        git(&net, home.path());
        pip(&net, home.path(), python);
        npm(&net, home.path());
        let totals = proxied.egress.revoke();
        assert_eq!(totals.denials, 1, "honest clients are denied nothing");
        assert_eq!(proxied.egress.exit(), 0);
    }
}

fn curl(net: &Net, home: &Path) {
    net.put("github.com", "big", &vec![b'x'; 3_000_000]);
    let output = client(net, home, &["curl", "-sS", "--fail", "https://github.com/big"], &[]);
    assert_eq!(output.stdout.len(), 3_000_000);
    let output =
        client(net, home, &["curl", "-sS", "--fail", "-d", "body", "http://deb.debian.org/echo"], &[]);
    let echo = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(echo.starts_with("POST /echo HTTP/1.1\r\n") && echo.ends_with("\r\n\r\nbody"), "{echo}");
    assert!(!echo.to_ascii_lowercase().contains("proxy"), "{echo}");
    let output = client(net, home, &["curl", "-sS", "https://evil.example/"], &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("403"), "{text}");
}

fn git(net: &Net, home: &Path) {
    let served = net.files.path().join("github.com/owner/repository.git");
    if !served.exists() {
        let work = tempfile::tempdir().expect("a folder");
        std::fs::write(work.path().join("README"), "from the world\n").expect("written");
        make(work.path(), &["git", "init", "-q", "-b", "main"]);
        make(work.path(), &["git", "add", "README"]);
        make(work.path(), &["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first"]);
        let served = served.to_str().expect("a path");
        make(work.path(), &["git", "clone", "-q", "--bare", ".", served]);
        make(work.path(), &["git", "-C", served, "update-server-info"]);
    }
    let output =
        client(net, home, &["git", "clone", "-q", "https://github.com/owner/repository.git", "cloned"], &[]);
    assert!(output.status.success());
    let text = std::fs::read_to_string(home.join("cloned/README")).expect("it was cloned");
    assert_eq!(text, "from the world\n");
}

fn pip(net: &Net, home: &Path, python: &str) {
    let wheel = "gaolerprobe-1.0-py3-none-any.whl";
    if !net.files.path().join("pypi.org").exists() {
        let made = tempfile::tempdir().expect("a folder");
        let script = "import zipfile; z = zipfile.ZipFile('w', 'w'); \
            z.writestr('gaolerprobe.py', 'word = 42'); i = 'gaolerprobe-1.0.dist-info/'; \
            z.writestr(i + 'METADATA', 'Metadata-Version: 2.1\\nName: gaolerprobe\\nVersion: 1.0\\n'); \
            z.writestr(i + 'WHEEL', 'Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n'); \
            z.writestr(i + 'RECORD', ''); z.close()";
        make(made.path(), &[python, "-c", script]);
        let bytes = std::fs::read(made.path().join("w")).expect("a wheel");
        net.put("files.pythonhosted.org", &format!("packages/{wheel}"), &bytes);
        let page = format!("<a href=\"https://files.pythonhosted.org/packages/{wheel}\">{wheel}</a>");
        net.put("pypi.org", "simple/gaolerprobe/index.html", page.as_bytes());
    }
    let line = [
        python,
        "-m",
        "pip",
        "install",
        "--isolated",
        "--no-input",
        "--no-deps",
        "--index-url",
        "https://pypi.org/simple",
        "--target",
        "packages",
        "--cert",
    ];
    let ca = net.ca_file();
    let line: Vec<&str> = line.into_iter().chain([ca.to_str().expect("a path"), "gaolerprobe"]).collect();
    assert!(client(net, home, &line, &[]).status.success());
    assert_eq!(
        std::fs::read_to_string(home.join("packages/gaolerprobe.py")).expect("it was installed"),
        "word = 42"
    );
}

fn npm(net: &Net, home: &Path) {
    if !net.files.path().join("registry.npmjs.org").exists() {
        let made = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(made.path().join("package")).expect("a folder");
        let package = r#"{"name": "gaoler-probe", "version": "1.0.0"}"#;
        std::fs::write(made.path().join("package/package.json"), package).expect("written");
        make(made.path(), &["tar", "czf", "probe.tgz", "package"]);
        let bytes = std::fs::read(made.path().join("probe.tgz")).expect("an archive");
        net.put("registry.npmjs.org", "archives/probe.tgz", &bytes);
        let version = r#"{"name": "gaoler-probe", "version": "1.0.0", "dist": {"tarball": "https://registry.npmjs.org/archives/probe.tgz"}}"#;
        let document = format!(
            r#"{{"name": "gaoler-probe", "dist-tags": {{"latest": "1.0.0"}}, "versions": {{"1.0.0": {version}}}}}"#
        );
        net.put("registry.npmjs.org", "gaoler-probe", document.as_bytes());
    }
    std::fs::write(home.join("package.json"), "{}").expect("written");
    let line = [
        "npm",
        "install",
        "--no-audit",
        "--no-fund",
        "--no-update-notifier",
        "--registry",
        "https://registry.npmjs.org/",
        "gaoler-probe",
    ];
    assert!(client(net, home, &line, &[]).status.success());
    let text = std::fs::read_to_string(home.join("node_modules/gaoler-probe/package.json"))
        .expect("it was installed");
    assert!(text.contains("1.0.0"), "{text}");
}
