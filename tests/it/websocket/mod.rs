//! `/ws` echoes every message, admits configured clients, and survives misbehaving ones.

mod client_trace;
mod event_feed;
mod other_clients;
mod raw_client;

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
use pathmeter::bulk::Leases;
use pathmeter::config;
use pathmeter::http::auth::{Signer, Verifier};
use pathmeter::metrics::{Exporter, Responders};
use pathmeter::websocket::WebSocketResponder;
use pathmeter_proto::key::{Key, Keys};
use serde_json::json;
use tokio::sync::mpsc;

use crate::fixture::{Agent, Host, MetricsPage, get};
use raw_client::{BINARY, CLOSE, PING, RawClient, TEXT, frame};

const CLIENTS: &str = "pathmeter_websocket_clients";
const ACCEPTED: &str = "pathmeter_websocket_clients_accepted_total";
const CLOSED: &str = "pathmeter_websocket_clients_closed_total";
const REFUSED: &str = "pathmeter_websocket_clients_refused_total";
const MESSAGES: &str = "pathmeter_websocket_messages_total";
const BYTES: &str = "pathmeter_websocket_bytes_total";

fn agent(host: &Host, websocket: &str) -> Agent {
    Agent::start(host, &host.config("a", &format!("websocket: {{{websocket}}}")))
}

fn count_reason(page: &MetricsPage, name: &str, reason: &str) -> u64 {
    page.count(name, &[&format!("reason=\"{reason}\"")])
}

/// Waits until no client is connected, and asserts that each accepted client was closed once.
fn when_all_closed(agent: &Agent) -> MetricsPage {
    let page = agent.page_when("all clients are closed", |page| page.count(CLIENTS, &[]) == 0);
    assert_eq!(page.count(ACCEPTED, &[]), page.count(CLOSED, &[]), "{page}");
    page
}

#[test]
fn message_is_echoed_byte_for_byte() {
    let host = Host::claim();
    let agent = agent(&host, "");
    let mut client = RawClient::open(&host);
    let message = r#"{"seq": 123, "ts": 1678886400100}"#;
    client.echo(message);
    client.send(PING, b"?").unwrap();
    assert_eq!(client.receive().unwrap(), (0x8a, b"?".to_vec()));
    client.send(CLOSE, &1000_u16.to_be_bytes()).unwrap();
    assert_eq!(client.closed(), 1000);
    let page = when_all_closed(&agent);
    let response = [MESSAGES, BYTES, ACCEPTED].map(|name| page.count(name, &[]));
    assert_eq!(response, [1, message.len() as u64, 1], "{page}");
    assert_eq!(count_reason(&page, CLOSED, "client"), 1, "{page}");
}

#[test]
fn refused_upgrade_is_explained() {
    let host = Host::claim();
    let agent = agent(&host, "");
    let plain = get(host.service_address(), "/ws").unwrap();
    assert_eq!((plain.status, plain.header("upgrade")), (426, Some("websocket")));
    assert_eq!(plain.body, "this is a WebSocket endpoint; connect with a WebSocket client\n");
    let near: IpAddr = "127.0.0.1".parse().unwrap();
    for (header, value, status, body) in [
        ("Sec-WebSocket-Version", "8", 426, "version 13"),
        ("Sec-WebSocket-Key", "tooshort", 400, "16 bytes in base64"),
        ("Upgrade", "", 426, "this is a WebSocket endpoint"),
        ("Origin", "https://page.example.net", 403, "add it to websocket.origins on this agent"),
        ("Origin", "null", 403, "add it to websocket.origins on this agent"),
    ] {
        let (_, response) = RawClient::request_upgrade(&host, near, &[(header, value)]);
        assert_eq!(response.status, status, "{response:?}");
        assert!(response.body.contains(body) && response.body.ends_with('\n'), "{response:?}");
        assert_eq!(status == 426, response.head.contains("sec-websocket-version: 13"), "{response:?}");
    }
    for page in ["http://localhost:3000".to_owned(), format!("http://{}", host.service_address())] {
        let (_, response) = RawClient::request_upgrade(&host, near, &[("Origin", &page)]);
        assert_eq!(response.status, 101, "{response:?}");
    }
    let page = when_all_closed(&agent);
    assert_eq!(count_reason(&page, REFUSED, "bad_request"), 4, "{page}");
    assert_eq!(count_reason(&page, REFUSED, "origin"), 2, "{page}");
}

#[test]
fn reload_changes_client_limits_at_once() {
    let host = Host::claim();
    let rules = "clients_max: 3, clients_per_source: 2";
    let agent = agent(&host, rules);
    let [one, other, third]: [IpAddr; 3] =
        ["127.0.0.1", "127.0.0.2", "127.0.0.3"].map(|address| address.parse().unwrap());
    let mut clients = [one, one, other].map(|source| RawClient::open_from(&host, source));
    let (_, response) = RawClient::request_upgrade(&host, third, &[]);
    assert_eq!(response.status, 503, "{response:?}");
    assert!(
        response.head.contains("retry-after: ") && response.body.contains("websocket.clients_max"),
        "{response:?}"
    );

    agent.rewrite(&host.config("a", "websocket: {clients_max: 4, clients_per_source: 2}"));
    assert_eq!(agent.reload().status, 200);
    let (_, response) = RawClient::request_upgrade(&host, one, &[]);
    assert_eq!(response.status, 429, "{response:?}");
    assert!(
        response.head.contains("retry-after: ") && response.body.contains("clients_per_source"),
        "{response:?}"
    );
    let third_client = RawClient::open_from(&host, third);

    // A limit below the current number does not close clients.
    agent.rewrite(&host.config("a", "websocket: {clients_max: 1}"));
    assert_eq!(agent.reload().status, 200);
    clients.iter_mut().for_each(|client| client.echo("still here"));
    assert_eq!(RawClient::request_upgrade(&host, third, &[]).1.status, 503);
    let page = agent.page();
    assert_eq!((page.count(CLIENTS, &[]), count_reason(&page, REFUSED, "limit")), (4, 3), "{page}");

    agent.rewrite(&host.config("a", "websocket: {enabled: false}"));
    assert_eq!(agent.reload().status, 200);
    for mut client in clients {
        assert_eq!(client.closed(), 1001);
    }
    assert_eq!(get(host.service_address(), "/ws").unwrap().status, 404);
    drop(third_client);
    assert_eq!(count_reason(&when_all_closed(&agent), CLOSED, "going_away"), 4);
    let you = agent.json("/api/v1/agent")["you"]["websocket"].clone();
    assert_eq!(you, json!({"answers": false, "reason": "a has websocket.enabled: false"}));
}

#[test]
fn reload_changes_the_message_limit_of_new_clients() {
    let host = Host::claim();
    let agent = agent(&host, "message_bytes_max: 200B");
    let mut old = RawClient::open(&host);
    agent.rewrite(&host.config("a", "websocket: {message_bytes_max: 300B}"));
    assert_eq!(agent.reload().status, 200);
    let mut new = RawClient::open(&host);
    new.echo(&"x".repeat(300));
    old.echo(&"x".repeat(200));
    old.send(TEXT, &[b'x'; 201]).unwrap();
    assert_eq!(old.closed(), 1009);
    drop((old, new));
    let page = when_all_closed(&agent);
    assert_eq!(count_reason(&page, CLOSED, "too_large"), 1, "{page}");
}

#[test]
fn client_that_does_not_read_takes_no_memory_and_loses_nothing() {
    static MESSAGE: [u8; 65_536] = [7; 65_536];
    const SLOW: usize = 4;
    let host = Host::claim();
    let agent = agent(&host, "");
    RawClient::open(&host).echo("before");
    let resident = |page: &MetricsPage| page.count("process_resident_memory_bytes", &[]);
    let before = resident(&agent.page());
    let mut clients: Vec<(RawClient, usize)> = (0..SLOW).map(|_| (RawClient::open(&host), 0)).collect();
    let whole = frame(BINARY, &MESSAGE);
    for (client, sent) in &mut clients {
        // The write may also time out because the machine paused; the assertions below hold either way.
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
    RawClient::open(&host).echo("others are served");
    let sent_bytes: usize = clients.iter().map(|(_, sent)| sent).sum();
    let grown = resident(&agent.page()).saturating_sub(before);
    // For each client: a message being read, one being written, and what an allocator keeps.
    assert!(grown < SLOW as u64 * (1 << 20) + (4 << 20), "{grown} bytes more for {sent_bytes} bytes sent");

    for (client, sent) in &mut clients {
        for _ in 0..*sent / whole.len() {
            let (first, payload) = client.receive().unwrap();
            assert!(first == BINARY && payload == MESSAGE, "the whole message is echoed");
        }
    }
    drop(clients);
    when_all_closed(&agent);
}

#[test]
fn idle_client_is_pinged_and_then_closed() {
    let host = Host::claim();
    let agent = agent(&host, "idle_timeout: 1s");
    let mut client = RawClient::open(&host);
    assert_eq!(client.receive().unwrap(), (PING, Vec::new()));
    assert_eq!(client.closed(), 1001);
    drop(client);
    assert_eq!(count_reason(&when_all_closed(&agent), CLOSED, "idle"), 1);
}

#[test]
fn connection_that_breaks_in_mid_message_is_dropped() {
    let host = Host::claim();
    let agent = agent(&host, "");
    let whole = frame(TEXT, b"only half of it");
    for sent in [&whole[..1], &whole[..10], &frame(0x01, b"more to come")] {
        let mut client = RawClient::open(&host);
        client.stream.write_all(sent).unwrap();
    }
    let page = agent.page_when("all clients were accepted", |page| page.count(ACCEPTED, &[]) == 3);
    assert_eq!(page.count(MESSAGES, &[]), 0, "{page}");
    assert_eq!(count_reason(&when_all_closed(&agent), CLOSED, "error"), 3);
}

#[test]
fn shutdown_closes_all_clients_without_waiting_for_unresponsive_ones() {
    let host = Host::claim();
    let mut agent = agent(&host, "");
    let mut clients: Vec<RawClient> = (0..20).map(|_| RawClient::open(&host)).collect();
    let mut unresponsive = RawClient::open(&host);
    clients.iter_mut().for_each(|client| client.echo("before"));
    agent.signal(Signal::SIGTERM);
    for client in &mut clients {
        assert_eq!(client.closed(), 1001);
        // The agent may have closed the connection already.
        let _ = client.send(CLOSE, &1001_u16.to_be_bytes());
    }
    assert_eq!(agent.wait().code(), Some(0), "{}", agent.log());
    assert!(!agent.log().contains("did not stop in time"), "{}", agent.log());
    assert_eq!(unresponsive.closed(), 1001);
}

/// The response to an upgrade from an address outside of loopback.
#[tokio::test]
async fn client_is_admitted_by_address_or_key() {
    let keys = Keys::only(Key::new(b"the key of this year"));
    let context = config::LoadContext {
        name_override: None,
        hostname: "fra-1".to_owned(),
        labels: std::collections::BTreeMap::new(),
        state_dir: None,
    };
    let rules = config::load(b"", &context).unwrap().config;
    let exporter = Arc::new(Exporter::new(Vec::new(), Responders::default()));
    let series = Arc::clone(&exporter.websocket);
    let mut status = Status { name: "fra-1".to_owned(), has_key: true, ..Status::default() };
    status.policy.prefixes = vec!["198.51.100.0/24".parse().unwrap()];
    let app_state = Arc::new(AppState {
        websocket: WebSocketResponder::new(rules.websocket, Arc::clone(&series)),
        leases: Arc::new(Leases::new(rules.bandwidth, 3)),
        events: Arc::default(),
        traces: Arc::default(),
        trace_requests: mpsc::channel(1).0,
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
        assert_eq!(Arc::clone(&app_state).answer(request, from).await.status(), expected, "from {from}");
    }
    app_state.websocket.leave(crate::fixture::DEADLINE).await;
    assert_eq!((series.accepted.get(), series.clients.get()), (3, 0));
}
