//! `/api/v1/events` as a stream: server-sent events, and a WebSocket.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::raw_client::{CLOSE, PING, RawClient, TEXT};
use crate::fixture::{Agent, DEADLINE, Host, eventually};

/// An agent whose probes over TCP find no open port: each of them is one event.
struct Eventful {
    host: Host,
    silent: Host,
    agent: Agent,
    probes: usize,
}

impl Eventful {
    fn start() -> Self {
        let (host, silent) = (Host::claim(), Host::claim());
        let agent = Agent::start(&host, &Self::config(&host, &silent, 1));
        let eventful = Self { host, silent, agent, probes: 1 };
        eventful.wait();
        eventful
    }

    fn config(host: &Host, silent: &Host, probes: usize) -> String {
        let probes: Vec<String> =
            (0..probes).map(|index| format!("{{name: p{index}, protocol: tcp, interval: 1h}}")).collect();
        let peers = format!("peers: [{{name: b, address: {silent}}}]\nprobes: [{}]", probes.join(", "));
        host.config("a", &peers)
    }

    fn wait(&self) {
        eventually("there is one event for each probe", || {
            let events = self.agent.json("/api/v1/events")["events"].as_array().unwrap().len();
            (events == self.probes).then_some(())
        });
    }

    /// Causes one more event.
    fn cause(&mut self) {
        self.probes += 1;
        self.agent.rewrite(&Self::config(&self.host, &self.silent, self.probes));
        assert_eq!(self.agent.reload().status, 200);
        self.wait();
    }
}

/// A connection with server-sent events.
struct EventStream(BufReader<TcpStream>);

impl EventStream {
    fn open(host: &Host, path: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(host.service_address()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n{headers}\r\n")
            .unwrap();
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "{head}");
        }
        let head = head.to_ascii_lowercase();
        assert!(head.contains("200 ok") && head.contains("content-type: text/event-stream"), "{head}");
        Self(reader)
    }

    /// The identifier and the data of the next event.
    fn next(&mut self) -> (u64, Value) {
        let mut id = None;
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "the stream has ended");
            if let Some(number) = line.strip_prefix("id: ") {
                id = Some(number.trim().parse().unwrap());
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return (id.expect("an event has an identifier"), serde_json::from_str(data).unwrap());
            }
        }
    }
}

#[test]
fn server_sent_events_are_those_of_the_list_and_continue_where_a_client_was() {
    let mut eventful = Eventful::start();
    let mut all = EventStream::open(&eventful.host, "/api/v1/events?after=0", "");
    let mut new = EventStream::open(&eventful.host, "/api/v1/events", "");
    let mut again = EventStream::open(&eventful.host, "/api/v1/events?after=0", "Last-Event-ID: 1\r\n");
    assert_eq!(all.next().0, 1);
    eventful.cause();
    let listed = eventful.agent.json("/api/v1/events")["events"][1].clone();
    for stream in [&mut all, &mut new, &mut again] {
        assert_eq!(stream.next(), (2, listed.clone()));
    }
    drop(new);
    eventful.agent.signal(Signal::SIGTERM);
    let mut rest = String::new();
    all.0.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("0\r\n\r\n"), "the last chunk: {rest:?}");
    eventful.agent.wait();
    assert!(!eventful.agent.log().contains("dropping"), "{}", eventful.agent.log());
}

#[test]
fn websocket_receives_events_and_is_closed_when_the_agent_stops() {
    let mut eventful = Eventful::start();
    let from = "127.0.0.1".parse().unwrap();
    let open = |path: &str| RawClient::request_upgrade_of(path, &eventful.host, from, &[]);
    let (mut client, response) = open("/api/v1/events?after=0");
    assert_eq!(response.status, 101, "{response:?}");
    let (mut leaving, _) = open("/api/v1/events");
    let number = |client: &mut RawClient| {
        let (kind, text) = client.receive().unwrap();
        assert_eq!(kind, TEXT);
        serde_json::from_slice::<Value>(&text).unwrap()["number"].as_u64().unwrap()
    };
    assert_eq!(number(&mut client), 1);
    client.send(PING, b"?").unwrap();
    assert_eq!(client.receive().unwrap(), (0x8a, b"?".to_vec()));
    leaving.send(CLOSE, &1000_u16.to_be_bytes()).unwrap();
    assert_eq!(leaving.closed(), 1000);
    eventful.cause();
    assert_eq!(number(&mut client), 2);
    eventful.agent.signal(Signal::SIGTERM);
    assert_eq!(client.closed(), 1001);
    eventful.agent.wait();
}

#[test]
fn refused_streams_are_explained() {
    let eventful = Eventful::start();
    let upgraded = |from: &str, changed: &[(&str, &str)], path: &str| {
        let from = from.parse().unwrap();
        let (_, response) = RawClient::request_upgrade_of(path, &eventful.host, from, changed);
        (response.status, response.body)
    };
    let refused = |changed: &[(&str, &str)], path: &str| upgraded("127.0.0.1", changed, path);
    let origin = [("Origin", "https://page.example.net")];
    assert_eq!(refused(&origin, "/api/v1/events").0, 403);
    assert_eq!(refused(&[("Connection", "close")], "/api/v1/events").0, 426);
    assert_eq!(refused(&[], "/api/v1/events?after=x").0, 400);
    // As curl asks for HTTP/2.
    assert_eq!(refused(&[("Upgrade", "h2c")], "/api/v1/events").0, 200);
    let streams: Vec<EventStream> =
        (0..16).map(|_| EventStream::open(&eventful.host, "/api/v1/events", "")).collect();
    let (status, body) = refused(&[], "/api/v1/events");
    let expected = "limit of 16 clients of one address that follow events reached\n";
    assert_eq!((status, body.as_str()), (429, expected));
    assert_eq!(upgraded("127.0.0.2", &[], "/api/v1/events").0, 101, "others are not excluded");
    drop(streams);
    eventually("a client that has left makes room", || {
        (refused(&[], "/api/v1/events").0 == 101).then_some(())
    });
}
