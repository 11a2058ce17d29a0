//! Requests of peers are answered while the agent is busy with other work.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::Request;
use pathmeter::api::renderer::{RENDERED_AT_ONCE, Renderer};
use pathmeter::api::routes::AppState;
use pathmeter::api::status::Status;
use pathmeter::bulk::Leases;
use pathmeter::http::server::{Counters, ServerLimits, serve};
use pathmeter::identity::Ports;
use pathmeter::websocket::WebSocketResponder;
use pathmeter::{answering, config};
use tokio::sync::mpsc;

use crate::fixture::{DEADLINE, eventually, get};

/// An HTTP server with the given metrics pages, on a thread of its own.
struct TestServer {
    address: SocketAddr,
    counters: Arc<Counters>,
    handle: answering::AnsweringHandle,
}

/// Must be called in a runtime, which becomes the control plane's.
fn serve_pages(renderer: Renderer) -> TestServer {
    let host = config::LoadContext {
        name_override: None,
        hostname: "fra-1".to_owned(),
        labels: BTreeMap::new(),
        state_dir: None,
    };
    let rules = config::load(b"", &host).unwrap().config;
    let ports = Some(Ports { http: 1, stamp: 2, agent: 3 });
    let app = Arc::new(AppState {
        websocket: WebSocketResponder::new(rules.websocket, Arc::default()),
        leases: Arc::new(Leases::new(rules.bandwidth, 3)),
        events: Arc::default(),
        traces: Arc::default(),
        trace_requests: mpsc::channel(1).0,
        status: ArcSwap::from_pointee(Status { ports, ..Status::default() }),
        verifier: ArcSwap::default(),
        reloads: mpsc::channel(1).0,
        web_config: Arc::default(),
        control: tokio::runtime::Handle::current(),
        renderer,
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let counters = Arc::new(Counters::default());
    let counted = Arc::clone(&counters);
    let handler = Arc::new(move |request: Request<Bytes>, peer| Arc::clone(&app).answer(request, peer));
    let handle = answering::AnsweringHandle::spawn(|stopped| {
        let listeners = answering::register(vec![listener])?;
        Ok(serve(listeners, ServerLimits::default(), handler, counted, Arc::default(), stopped))
    });
    TestServer { address, counters, handle: handle.unwrap() }
}

/// Pages that end when the sender is used or dropped. The receiver gets a message when a page is started.
fn slow_pages() -> (Renderer, Sender<()>, Receiver<()>) {
    let ((release, released), (started, is_started)) = (channel::<()>(), channel());
    let released = Arc::new(Mutex::new(released));
    let renderer = Renderer::new(move |_| {
        let released = Arc::clone(&released);
        started.send(()).unwrap();
        Box::new(move |_: &mut Vec<u8>| {
            // A dropped sender releases the page as well.
            let _ = released.lock().unwrap().recv();
            false
        })
    });
    (renderer, release, is_started)
}

/// Requests a compressed page in the format `accept`, and does not wait for it. It is answered when all of it
/// is rendered.
fn request_page(to: SocketAddr, accept: &str) -> TcpStream {
    let mut stream = TcpStream::connect(to).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: a\r\naccept: {accept}\r\naccept-encoding: gzip\r\n\r\n")
        .unwrap();
    stream
}

const FORMATS: [&str; RENDERED_AT_ONCE] = ["text/plain", "application/openmetrics-text"];

#[tokio::test(flavor = "multi_thread")]
async fn everything_but_pages_is_answered_while_all_renderers_are_busy() {
    let (renderer, release, started) = slow_pages();
    let server = serve_pages(renderer);
    let requests = FORMATS.map(|format| request_page(server.address, format));
    for _ in FORMATS {
        started.recv_timeout(DEADLINE).unwrap();
    }
    for path in ["/api/v1/ping", "/api/v1/ping", "/api/v1/paths", "/-/ready"] {
        assert_eq!(get(server.address, path).unwrap().status, 200, "{path}");
    }
    assert_eq!(server.counters.responses()[1], ("2xx", 4), "no page was answered");
    drop((release, requests));
    server.handle.stop().await;
}

#[tokio::test]
async fn ping_is_answered_while_the_control_plane_is_blocked() {
    let (renderer, _release, _begun) = slow_pages();
    let server = serve_pages(renderer);
    // This thread is the control plane, and is blocked.
    assert_eq!(get(server.address, "/api/v1/ping").unwrap().status, 200);
    server.handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn panic_in_a_page_closes_only_its_connection() {
    let server = serve_pages(Renderer::new(|_| panic!("a page with a bug")));
    let mut response = Vec::new();
    request_page(server.address, FORMATS[0]).read_to_end(&mut response).unwrap();
    assert_eq!(response, b"");
    for path in ["/api/v1/ping", "/-/healthy"] {
        assert_eq!(get(server.address, path).unwrap().status, 200, "{path}");
    }
    server.handle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_waits_for_the_page_being_rendered() {
    let (renderer, release, started) = slow_pages();
    let server = serve_pages(renderer);
    let address = server.address;
    let requests = std::thread::spawn(move || get(address, "/metrics"));
    started.recv_timeout(DEADLINE).unwrap();
    let stopping = tokio::spawn(server.handle.stop());
    eventually("the listener is closed", || TcpStream::connect(address).is_err().then_some(()));
    assert!(!stopping.is_finished());
    release.send(()).unwrap();
    assert_eq!(requests.join().unwrap().unwrap().status, 200);
    stopping.await.unwrap();
    assert_eq!(server.counters.connections(), 0);
}
