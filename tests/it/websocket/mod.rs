//! What comes to `/ws` comes back as it was, whoever asks and however badly it behaves.

mod foreign;
mod raw;

use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::{Request, StatusCode};
use nix::sys::signal::Signal;
use pathmeter::api::routes::{AppState, metrics_renderer};
use pathmeter::api::status::Status;
use pathmeter::config;
use pathmeter::http::auth::{Signer, Verifier};
use pathmeter::metrics::{Exporter, Responders};
use pathmeter::websocket::WebSocketResponder;
use pathmeter_proto::key::{Key, Keys};
use serde_json::json;
use tokio::sync::mpsc;

use crate::fixture::{Agent, Host, Page, get};
use raw::{BINARY, CLOSE, PING, Raw, TEXT, frame};

const CLIENTS: &str = "pathmeter_websocket_clients";
const ACCEPTED: &str = "pathmeter_websocket_clients_accepted_total";
const CLOSED: &str = "pathmeter_websocket_closed_total";
const REFUSED: &str = "pathmeter_websocket_refused_total";
const MESSAGES: &str = "pathmeter_websocket_messages_total";
const BYTES: &str = "pathmeter_websocket_bytes_total";

fn agent(host: &Host, websocket: &str) -> Agent {
    Agent::start(host, &host.config("a", &format!("websocket: {{{websocket}}}")))
}

fn because(page: &Page, name: &str, reason: &str) -> u64 {
    page.count(name, &[&format!("reason=\"{reason}\"")])
}

/// Waits until nobody is connected, and checks that everybody who was let in has ended once.
fn when_all_left(agent: &Agent) -> Page {
    let page = agent.page_when("all have left", |page| page.count(CLIENTS, &[]) == 0);
    assert_eq!(page.count(ACCEPTED, &[]), page.count(CLOSED, &[]), "{page}");
    page
}

#[test]
fn a_message_comes_back_byte_for_byte() {
    let host = Host::claim();
    let agent = agent(&host, "");
    let mut client = Raw::open(&host);
    let message = r#"{"seq": 123, "ts": 1678886400100}"#;
    client.echo(message);
    client.send(PING, b"?").unwrap();
    assert_eq!(client.receive().unwrap(), (0x8a, b"?".to_vec()));
    client.send(CLOSE, &1000_u16.to_be_bytes()).unwrap();
    assert_eq!(client.closed(), 1000);
    let page = when_all_left(&agent);
    let told = [MESSAGES, BYTES, ACCEPTED].map(|name| page.count(name, &[]));
    assert_eq!(told, [1, message.len() as u64, 1], "{page}");
    assert_eq!(because(&page, CLOSED, "client"), 1, "{page}");
}

#[test]
fn what_begins_no_connection_is_told_why() {
    let host = Host::claim();
    let agent = agent(&host, "");
    let plain = get(host.front(), "/ws").unwrap();
    assert_eq!((plain.status, plain.header("upgrade")), (426, Some("websocket")));
    assert_eq!(plain.body, "/ws is a WebSocket echo endpoint; connect with a WebSocket client\n");
    let near: IpAddr = "127.0.0.1".parse().unwrap();
    for (header, value, status, words) in [
        ("Sec-WebSocket-Version", "8", 426, "version 13"),
        ("Sec-WebSocket-Key", "tooshort", 400, "16 bytes in base64"),
        ("Upgrade", "", 426, "/ws is a WebSocket echo endpoint"),
        ("Origin", "https://page.example.net", 403, "add it to websocket.origins on this agent"),
        ("Origin", "null", 403, "add it to websocket.origins on this agent"),
    ] {
        let (_, told) = Raw::ask(&host, near, &[(header, value)]);
        assert_eq!(told.status, status, "{told:?}");
        assert!(told.words.contains(words) && told.words.ends_with('\n'), "{told:?}");
        assert_eq!(status == 426, told.head.contains("sec-websocket-version: 13"), "{told:?}");
    }
    for page in ["http://localhost:3000".to_owned(), format!("http://{}", host.front())] {
        let (_, told) = Raw::ask(&host, near, &[("Origin", &page)]);
        assert_eq!(told.status, 101, "{told:?}");
    }
    let page = when_all_left(&agent);
    assert_eq!(because(&page, REFUSED, "bad_request"), 4, "{page}");
    assert_eq!(because(&page, REFUSED, "origin"), 2, "{page}");
}

#[test]
fn clients_are_limited_in_all_and_by_source_and_a_reload_changes_that_at_once() {
    let host = Host::claim();
    let rules = "clients_max: 3, clients_per_source: 2";
    let agent = agent(&host, rules);
    let [one, other, third]: [IpAddr; 3] =
        ["127.0.0.1", "127.0.0.2", "127.0.0.3"].map(|address| address.parse().unwrap());
    let mut clients = [one, one, other].map(|source| Raw::open_from(&host, source));
    let (_, told) = Raw::ask(&host, third, &[]);
    assert_eq!(told.status, 503, "{told:?}");
    assert!(told.head.contains("retry-after: ") && told.words.contains("websocket.clients_max"), "{told:?}");

    agent.rewrite(&host.config("a", "websocket: {clients_max: 4, clients_per_source: 2}"));
    assert_eq!(agent.reload().status, 200);
    let (_, told) = Raw::ask(&host, one, &[]);
    assert_eq!(told.status, 429, "{told:?}");
    assert!(told.head.contains("retry-after: ") && told.words.contains("clients_per_source"), "{told:?}");
    let third_client = Raw::open_from(&host, third);

    // Fewer than there are: those stay.
    agent.rewrite(&host.config("a", "websocket: {clients_max: 1}"));
    assert_eq!(agent.reload().status, 200);
    clients.iter_mut().for_each(|client| client.echo("still here"));
    assert_eq!(Raw::ask(&host, third, &[]).1.status, 503);
    let page = agent.page();
    assert_eq!((page.count(CLIENTS, &[]), because(&page, REFUSED, "limit")), (4, 3), "{page}");

    agent.rewrite(&host.config("a", "websocket: {enabled: false}"));
    assert_eq!(agent.reload().status, 200);
    for mut client in clients {
        assert_eq!(client.closed(), 1001);
    }
    assert_eq!(get(host.front(), "/ws").unwrap().status, 404);
    drop(third_client);
    assert_eq!(because(&when_all_left(&agent), CLOSED, "going_away"), 4);
    let you = agent.json("/api/v1/agent")["you"]["websocket"].clone();
    assert_eq!(you, json!({"answers": false, "reason": "a has websocket.enabled: false"}));
}

#[test]
fn a_reload_changes_what_new_clients_may_send() {
    let host = Host::claim();
    let agent = agent(&host, "message_bytes_max: 200B");
    let mut old = Raw::open(&host);
    agent.rewrite(&host.config("a", "websocket: {message_bytes_max: 300B}"));
    assert_eq!(agent.reload().status, 200);
    let mut new = Raw::open(&host);
    new.echo(&"x".repeat(300));
    old.echo(&"x".repeat(200));
    old.send(TEXT, &[b'x'; 201]).unwrap();
    assert_eq!(old.closed(), 1009);
    drop((old, new));
    let page = when_all_left(&agent);
    assert_eq!(because(&page, CLOSED, "too_large"), 1, "{page}");
}

#[test]
fn one_that_sends_and_does_not_read_takes_no_memory_and_loses_nothing() {
    static MESSAGE: [u8; 65_536] = [7; 65_536];
    const SLOW: usize = 4;
    let host = Host::claim();
    let agent = agent(&host, "");
    Raw::open(&host).echo("before");
    let resident = |page: &Page| page.count("process_resident_memory_bytes", &[]);
    let before = resident(&agent.page());
    let mut clients: Vec<(Raw, usize)> = (0..SLOW).map(|_| (Raw::open(&host), 0)).collect();
    let whole = frame(BINARY, &MESSAGE);
    for (client, sent) in &mut clients {
        // Whether we stop because no more is taken or because the machine stands still, the rest holds.
        client.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        loop {
            match client.stream.write(&whole[*sent % whole.len()..]) {
                Ok(count) => *sent += count,
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
                    break;
                }
            }
        }
    }
    Raw::open(&host).echo("others are served");
    let taken: usize = clients.iter().map(|(_, sent)| sent).sum();
    let grown = resident(&agent.page()).saturating_sub(before);
    // A message being read, one being written, and what an allocator keeps.
    assert!(grown < SLOW as u64 * (1 << 20) + (4 << 20), "{grown} bytes more for {taken} bytes sent");

    for (client, sent) in &mut clients {
        for _ in 0..*sent / whole.len() {
            let (first, payload) = client.receive().unwrap();
            assert!(first == BINARY && payload == MESSAGE, "an echo in full");
        }
    }
    drop(clients);
    when_all_left(&agent);
}

#[test]
fn a_silent_client_is_asked_and_then_told_to_go() {
    let host = Host::claim();
    let agent = agent(&host, "idle_timeout: 1s");
    let mut client = Raw::open(&host);
    assert_eq!(client.receive().unwrap(), (PING, Vec::new()));
    assert_eq!(client.closed(), 1001);
    drop(client);
    assert_eq!(because(&when_all_left(&agent), CLOSED, "idle"), 1);
}

#[test]
fn a_connection_that_breaks_off_in_the_middle_of_a_message_is_forgotten() {
    let host = Host::claim();
    let agent = agent(&host, "");
    let whole = frame(TEXT, b"only half of it");
    for sent in [&whole[..1], &whole[..10], &frame(0x01, b"more to come")] {
        let mut client = Raw::open(&host);
        client.stream.write_all(sent).unwrap();
    }
    let page = agent.page_when("all were let in", |page| page.count(ACCEPTED, &[]) == 3);
    assert_eq!(page.count(MESSAGES, &[]), 0, "{page}");
    assert_eq!(because(&when_all_left(&agent), CLOSED, "error"), 3);
}

#[test]
fn at_a_stop_all_are_told_and_one_that_does_not_answer_does_not_hold_it_up() {
    let host = Host::claim();
    let mut agent = agent(&host, "");
    let mut clients: Vec<Raw> = (0..20).map(|_| Raw::open(&host)).collect();
    let mut deaf = Raw::open(&host);
    clients.iter_mut().for_each(|client| client.echo("before"));
    agent.signal(Signal::SIGTERM);
    for client in &mut clients {
        assert_eq!(client.closed(), 1001);
        // It does not wait for ever.
        let _ = client.send(CLOSE, &1001_u16.to_be_bytes());
    }
    assert_eq!(agent.ended().code(), Some(0), "{}", agent.log());
    assert!(!agent.log().contains("did not stop in time"), "{}", agent.log());
    assert_eq!(deaf.closed(), 1001);
}

/// What the agent answers to an upgrade from an address that loopback does not have.
#[tokio::test]
async fn a_stranger_is_let_in_by_its_address_or_by_the_key() {
    let keys = Keys::only(Key::new(b"the key of this year"));
    let nobody = config::LoadContext {
        name_override: None,
        hostname: "fra-1".to_owned(),
        labels: std::collections::BTreeMap::new(),
    };
    let rules = config::load(b"", &nobody).unwrap().config.websocket;
    let exporter = Arc::new(Exporter::new(Vec::new(), Responders::default()));
    let series = Arc::clone(&exporter.websocket);
    let mut status = Status { name: "fra-1".to_owned(), has_key: true, ..Status::default() };
    status.policy.prefixes = vec!["198.51.100.0/24".parse().unwrap()];
    let site = Arc::new(AppState {
        websocket: WebSocketResponder::new(rules, Arc::clone(&series)),
        events: Arc::default(),
        web_config: Arc::default(),
        status: ArcSwap::from_pointee(status),
        verifier: ArcSwap::from_pointee(Some(Verifier::new(&keys))),
        reloads: mpsc::channel(1).0,
        control: tokio::runtime::Handle::current(),
        renderer: metrics_renderer(exporter, Arc::default(), Arc::default()),
    });
    let plain = || {
        let request = Request::get("/ws").header("host", "fra-1").header("upgrade", "websocket");
        let request = request.header("connection", "Upgrade").header("sec-websocket-version", "13");
        request.header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==").body(Bytes::new()).unwrap()
    };
    let signed = |keys: &Keys| {
        let mut request = plain();
        Signer::new(keys).sign(&mut request, SystemTime::now()).unwrap();
        request
    };
    let other = Keys::only(Key::new(b"the key of last year"));
    for (request, from, expected) in [
        (plain(), "127.0.0.1:9", StatusCode::SWITCHING_PROTOCOLS),
        (plain(), "198.51.100.9:9", StatusCode::SWITCHING_PROTOCOLS),
        (plain(), "192.0.2.1:9", StatusCode::FORBIDDEN),
        (signed(&other), "192.0.2.1:9", StatusCode::FORBIDDEN),
        (signed(&keys), "192.0.2.1:9", StatusCode::SWITCHING_PROTOCOLS),
    ] {
        let from: SocketAddr = from.parse().unwrap();
        assert_eq!(Arc::clone(&site).answer(request, from).await.status(), expected, "from {from}");
    }
    site.websocket.leave(crate::fixture::DEADLINE).await;
    assert_eq!((series.accepted.get(), series.clients.get()), (3, 0));
}
