//! Admission to `/ws` from another host. On loopback every client is admitted.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use pathmeter_lab::{DEADLINE, Net, NetPlan};
use serde_json::json;

use crate::agent::NodeAgent;
use crate::testbed::seed;

/// Unlisted clients are refused with a reason; listed clients get their message back across the wire, over
/// IPv4 and IPv6.
pub(crate) fn admission() {
    let net = NetPlan::pair().build(seed());
    let refused = NodeAgent::start(net.node("b"), json!({"agent": {"name": "b"}}), &[]);
    for to in [net.v4("b"), net.v6("b")] {
        let (_, head, rest) = net.node("a").within(|| request_upgrade(SocketAddr::new(to, 9_862)));
        assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
        assert!(rest.contains("at /ws: add it to responder.allow there, or set websocket.open"), "{rest}");
    }
    let page = refused.page();
    assert_eq!(
        page.count("pathmeter_websocket_clients_refused_total", &["reason=\"admission\""]),
        2,
        "{page}"
    );
    drop(refused);

    let listed = json!({"responder": {"allow": [net.v4("a").to_string(), net.v6("a").to_string()]}});
    assert_echoed(&net, listed);
    assert_echoed(&net, json!({"websocket": {"open": true}}));
}

fn assert_echoed(net: &Net, config: serde_json::Value) {
    let agent = NodeAgent::start(net.node("b"), config, &[]);
    for to in [net.v4("b"), net.v6("b")] {
        let (mut stream, head, _) = net.node("a").within(|| request_upgrade(SocketAddr::new(to, 9_862)));
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        // Masked with zeros: clients must mask, servers do not.
        stream.write_all(b"\x81\x85\0\0\0\0hello").unwrap();
        let mut echo = [0; 7];
        stream.read_exact(&mut echo).unwrap();
        assert_eq!(&echo, b"\x81\x05hello");
    }
    let page = agent.page();
    assert_eq!(page.count("pathmeter_websocket_messages_total", &[]), 2, "{page}");
}

/// Sends an upgrade request. Returns the connection, the head of the response, and the body of a refusal.
fn request_upgrade(to: SocketAddr) -> (TcpStream, String, String) {
    let mut stream = TcpStream::connect_timeout(&to, DEADLINE).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(
        stream,
        "GET /ws HTTP/1.1\r\nHost: {to}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut rest = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut rest).unwrap();
    (stream, head, String::from_utf8(rest).unwrap())
}
