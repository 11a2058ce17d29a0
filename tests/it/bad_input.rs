//! Invalid input from the network or the operator is rejected and counted, and the agent keeps running.

use std::net::UdpSocket;
use std::thread;

use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host, MetricsPage, run};

const REQUESTS: &str = "pathmeter_responder_requests_total";
const REPLIES: &str = "pathmeter_responder_replies_total";
const REJECTED: &str = "pathmeter_responder_rejected_total";
const MISMATCHED: &str = "pathmeter_echo_mismatched_total";

/// Invalid datagrams: empty, too short, almost a request, not a request, and too long.
fn garbage() -> [Vec<u8>; 6] {
    [vec![], vec![0], vec![0xff; 43], b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 9_217], vec![0x55; 65_507]]
}

/// How many of them are longer than anything the agent reads.
const OVERSIZED: u64 = 2;

/// A plain STAMP request (RFC 8762 section 4.2.1): all zero but the sequence number.
fn plain_request(sequence: u32) -> [u8; 44] {
    let mut request = [0; 44];
    request[..4].copy_from_slice(&sequence.to_be_bytes());
    request
}

/// Sends a request and returns its reply, which must come from `to` and contain the request's sequence
/// number.
fn exchange(socket: &UdpSocket, to: &Host, sequence: u32) -> Vec<u8> {
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send_to(&plain_request(sequence), to.service_address()).unwrap();
    let mut reply = vec![0; 2_000];
    let (length, from) = socket.recv_from(&mut reply).unwrap();
    reply.truncate(length);
    assert_eq!(from, to.service_address());
    assert_eq!(reply.len(), 44, "a reply is as long as its request");
    assert_eq!(reply[24..28], sequence.to_be_bytes());
    reply
}

fn open_responder(host: &Host) -> Agent {
    Agent::start(host, &host.config("b", "responder: {allow: [127.0.0.0/8]}"))
}

#[test]
fn garbage_is_counted_and_valid_requests_are_still_answered() {
    const ROUNDS: u64 = 20;
    let (own, host) = (Host::claim(), Host::claim());
    let agent = open_responder(&host);
    let socket = own.socket(0);
    let readable = u64::try_from(garbage().len()).unwrap() - OVERSIZED;
    for round in 0..ROUNDS {
        for datagram in garbage() {
            socket.send_to(&datagram, host.service_address()).unwrap();
            socket.send_to(&datagram, host.at(Host::AGENT_PORT)).unwrap();
        }
        // The reply shows that all earlier datagrams were read, so none is dropped for lack of buffer space.
        exchange(&socket, &host, round.try_into().unwrap());
    }
    let page = agent.page_when("all garbage is counted", |page| {
        page.count("pathmeter_agent_port_rejected_total", &[]) >= ROUNDS * readable
            && page.count("pathmeter_socket_oversized_total", &[r#"loop="responder""#])
                >= 2 * ROUNDS * OVERSIZED
    });
    assert_eq!(page.count(REJECTED, &[r#"reason="malformed""#]), ROUNDS * readable, "{page}");
    assert_eq!(page.count(REPLIES, &[]), ROUNDS, "{page}");
    assert_eq!(page.count(REQUESTS, &[]), ROUNDS * (readable + 1), "{page}");
    assert_eq!(page.count("pathmeter_agent_port_rejected_total", &[]), ROUNDS * readable, "{page}");
    assert_eq!(agent.get("/-/ready").status, 200);
}

#[test]
fn request_from_a_reflector_port_is_not_answered() {
    let (reflector, valid, host) = (Host::claim(), Host::claim(), Host::claim());
    let agent = open_responder(&host);
    // One forged datagram could make two reflectors answer each other endlessly.
    let forged = reflector.socket(Host::PORT);
    forged.send_to(&plain_request(1), host.service_address()).unwrap();
    exchange(&valid.socket(0), &host, 2);
    let page = agent.page();
    assert_eq!(page.count(REJECTED, &[r#"reason="reflection""#]), 1, "{page}");
    // Requests are answered in order, so there will be no further reply.
    assert_eq!((page.count(REQUESTS, &[]), page.count(REPLIES, &[])), (2, 1), "{page}");
    forged.set_nonblocking(true).unwrap();
    assert_eq!(forged.recv(&mut [0; 100]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

/// Starts a responder that answers each request with all of these replies.
fn spawn_false_responder(socket: UdpSocket, replies: fn(&[u8]) -> Vec<Vec<u8>>) {
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    thread::spawn(move || {
        let mut request = [0; 2_000];
        while let Ok((length, from)) = socket.recv_from(&mut request) {
            for reply in replies(&request[..length]) {
                // The prober may have exited.
                let _ = socket.send_to(&reply, from);
            }
        }
    });
}

/// A valid unauthenticated reply to `request` (RFC 8762 section 4.3.1).
fn valid_reply(request: &[u8]) -> Vec<u8> {
    let mut reply = vec![0; 44];
    reply[..16].copy_from_slice(&request[..16]);
    reply[16..24].copy_from_slice(&request[4..12]);
    reply[24..38].copy_from_slice(&request[..14]);
    reply[40] = 255;
    reply
}

fn with_bit_flipped(mut reply: Vec<u8>, at: usize) -> Vec<u8> {
    reply[at] ^= 0x40;
    reply
}

/// The metrics page of an agent with a false responder, once all of `reasons` were counted.
fn page_after_false_replies(replies: fn(&[u8]) -> Vec<Vec<u8>>, key: bool, reasons: &[&str]) -> MetricsPage {
    let (own, host) = (Host::claim(), Host::claim());
    spawn_false_responder(host.socket(10_862), replies);
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "the key of this year").unwrap();
    let key = if key { format!(", key_file: {}", file.display()) } else { String::new() };
    let more = format!(
        "targets: [{{name: liar, address: {host}, port: 10862{key}}}]\n\
         probes: [{{name: fast, targets: all, interval: 20ms, flows: 2, late_after: 200ms, lost_after: 200ms}}]"
    );
    let agent = Agent::start(&own, &own.config("a", &more));
    agent.page_when("false replies and losses", |page| {
        page.count("pathmeter_echo_lost_total", &[]) >= 5
            && reasons.iter().all(|reason| page.count(MISMATCHED, &[&format!("reason=\"{reason}\"")]) >= 5)
    })
}

#[test]
fn false_replies_are_never_ok() {
    let false_replies = |request: &[u8]| {
        let valid = valid_reply(request);
        // Truncated; empty; mirrored; with another sequence number, T1 or session.
        let sequence = with_bit_flipped(valid.clone(), 25);
        vec![
            valid[..40].to_vec(),
            vec![],
            request.to_vec(),
            sequence,
            with_bit_flipped(valid.clone(), 30),
            with_bit_flipped(valid, 14),
        ]
    };
    let page = page_after_false_replies(false_replies, false, &["malformed", "unsolicited"]);
    assert_eq!(page.count("pathmeter_echo_rtt_seconds_count", &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_echo_late_total", &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_echo_last_reply_timestamp_seconds", &[]), 0, "{page}");
}

#[test]
fn reply_without_the_key_is_never_ok() {
    let false_replies = |request: &[u8]| {
        let mut reply = request.to_vec();
        reply[32..40].copy_from_slice(&request[16..24]);
        reply[48..52].copy_from_slice(&request[..4]);
        reply[64..74].copy_from_slice(&request[16..26]);
        vec![reply, valid_reply(request)]
    };
    let page = page_after_false_replies(false_replies, true, &["auth", "malformed"]);
    assert_eq!(page.count("pathmeter_echo_rtt_seconds_count", &[]), 0, "{page}");
}

#[test]
fn copy_of_a_reply_only_adds_a_duplicate() {
    let (own, host) = (Host::claim(), Host::claim());
    spawn_false_responder(host.socket(10_862), |request| vec![valid_reply(request); 3]);
    let more = format!(
        "targets: [{{name: twice, address: {host}, port: 10862}}]\n\
         probes: [{{name: fast, targets: all, interval: 20ms, late_after: 60s, lost_after: 60s}}]"
    );
    let agent = Agent::start(&own, &own.config("a", &more));
    let page = agent.page_when("duplicates", |page| page.count("pathmeter_echo_duplicates_total", &[]) >= 40);
    assert!(page.count("pathmeter_echo_rtt_seconds_count", &[]) >= 20, "{page}");
    assert_eq!(page.count(MISMATCHED, &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn invalid_configuration_is_refused_with_line_and_column() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("config.yaml");
    let path = file.to_str().unwrap();
    for (text, problems) in [
        ("agent: {nmae: a}", &["line 1, column 9: agent.nmae: unknown key", "did you mean name?"][..]),
        ("agent: {name: a}\nagent: {name: b}", &["line 2, column 1: agent: duplicate key"]),
        (
            "probes:\n  - {name: x, interval: 5}",
            &["line 2, column 25: probes[0].interval: `5` has no unit", "20ms"],
        ),
        (
            "probes:\n  - {name: x, peers: [b]}",
            &["line 2, column 23: probes[0].peers[0]: no peer is named `b`"],
        ),
        ("peers: [{name: b}]", &["line 1, column 9: peers[0].address: missing"]),
        ("responder: {allow: [10.0.0.0/33]}", &["line 1, column 21: responder.allow[0]:"]),
        ("listen: {http: 9862}", &["line 1, column 16: listen.http:"]),
        ("agent: [a", &["line 2, column 1: did not find expected"]),
        ("- a", &["write a mapping of keys to values"]),
        (
            "a: 1\nb: 2",
            &["2 problems", "line 1, column 1: a: unknown key", "line 2, column 1: b: unknown key"],
        ),
    ] {
        std::fs::write(&file, text).unwrap();
        for arguments in [&["check", path][..], &["run", "--config", path]] {
            let output = run(arguments);
            assert_eq!(output.code, Some(78), "{text}\n{output}");
            assert!(output.stderr.starts_with(&format!("error: {path}: ")), "{text}\n{output}");
            for problem in problems {
                assert!(output.stderr.contains(problem), "{text}: {problem}\n{output}");
            }
        }
    }
}

#[test]
fn missing_file_is_named() {
    for arguments in [&["check", "/nowhere/config.yaml"][..], &["run", "--config", "/nowhere/config.yaml"]] {
        let output = run(arguments);
        assert_eq!(output.code, Some(78), "{output}");
        assert_eq!(
            output.stderr,
            "error: reading /nowhere/config.yaml: No such file or directory (os error 2)\n"
        );
    }
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("config.yaml");
    std::fs::write(&file, "key_file: /nowhere/mesh.key").unwrap();
    let output = run(&["run", "--config", file.to_str().unwrap()]);
    assert_eq!(output.code, Some(78), "{output}");
    assert!(
        output.stderr.contains("reading key file /nowhere/mesh.key: No such file or directory"),
        "{output}"
    );
}

#[test]
fn invalid_command_line_exits_with_2() {
    for arguments in [
        &[][..],
        &["frob"],
        &["run", "--confg", "x"],
        &["check"],
        &["probe"],
        &["probe", "echo"],
        &["probe", "echo", "host", "--count", "0"],
        &["probe", "echo", "host", "--interval", "5"],
        &["probe", "echo", "host", "--size", "43B"],
        &["probe", "echo", "host", "--dscp", "64"],
        &["probe", "echo", "host", "--port", "0"],
        &["demo", "--seconds", "0"],
        &["healthcheck", "--address", "here"],
        &["completions", "cmd"],
    ] {
        let output = run(arguments);
        assert_eq!(output.code, Some(2), "{arguments:?}\n{output}");
        assert!(
            output.stderr.contains("Usage:") || output.stderr.contains("--help"),
            "{arguments:?}\n{output}"
        );
    }
}

#[test]
fn address_in_use_is_named_with_a_likely_cause() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("config.yaml");
    for (is_tcp, port) in [(true, Host::PORT), (false, Host::PORT), (false, Host::AGENT_PORT)] {
        let host = Host::claim();
        let tcp = is_tcp.then(|| std::net::TcpListener::bind(host.at(port)).unwrap());
        let udp = (!is_tcp).then(|| host.socket(port));
        std::fs::write(&file, host.config("a", "")).unwrap();
        let output = run(&["run", "--config", file.to_str().unwrap()]);
        assert_eq!(output.code, Some(1), "{output}");
        let last_line = output.stderr.lines().last().unwrap();
        assert!(
            last_line.starts_with(&format!("error: binding {}: ", host.at(port))),
            "{tcp:?} {udp:?}\n{output}"
        );
        assert!(last_line.ends_with("(is another pathmeter running?)"), "{output}");
        assert_eq!(last_line.matches("already in use").count(), 1, "{output}");
    }
}
