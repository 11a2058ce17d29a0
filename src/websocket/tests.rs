use super::*;

use futures_util::{SinkExt as _, StreamExt as _};
use hyper::header::{HeaderName, HeaderValue};
use hyper::{StatusCode, Version};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

use crate::config::{self, LoadContext, Origins};

fn rules(yaml: &str) -> WebSocketRules {
    let host = LoadContext {
        name_override: None,
        hostname: "fra-1".to_owned(),
        labels: std::collections::BTreeMap::new(),
        state_dir: None,
    };
    config::load(format!("websocket: {{{yaml}}}").as_bytes(), &host).unwrap().config.websocket
}

/// A client served in a separate task, and the client's end of the connection.
struct Served {
    stream: DuplexStream,
    series: Arc<WebSocketSeries>,
    ended: JoinHandle<CloseReason>,
    close: oneshot::Sender<()>,
}

/// Serves a client over a pipe with a capacity of `capacity` bytes in each direction.
fn serve(rules: &WebSocketRules, capacity: usize) -> Served {
    serve_traced(rules, capacity, None)
}

fn serve_traced(rules: &WebSocketRules, capacity: usize, trace: Option<ClientTrace>) -> Served {
    let (stream, server_stream) = duplex(capacity);
    let served = ClientStream { stream: server_stream, read: Bytes::new() };
    let (client_rules, series) =
        (ClientRules::of(rules, &Arc::default()), Arc::new(WebSocketSeries::default()));
    let (close, close_requested) = oneshot::channel();
    let counted = Arc::clone(&series);
    let ended = tokio::spawn(async move {
        client::serve(served, client_rules, &counted, trace, async { close_requested.await.unwrap_or(()) })
            .await
    });
    Served { stream, series, ended, close }
}

async fn open(served: DuplexStream) -> WebSocketStream<DuplexStream> {
    WebSocketStream::from_raw_socket(served, Role::Client, None).await
}

/// A frame of a client, masked with zeros.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        len @ ..126 => frame.push(0x80 | u8::try_from(len).unwrap()),
        len @ 126..65_536 => {
            frame.push(0xfe);
            frame.extend(u16::try_from(len).unwrap().to_be_bytes());
        }
        len => {
            frame.push(0xff);
            frame.extend((len as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const PING: u8 = 9;
const LAST: u8 = 0x80;

/// Returns all bytes received until the connection ends.
async fn rest(mut stream: DuplexStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    all
}

/// Returns the code of a close frame sent by the server, which must be the only frame.
fn close_code(bytes: &[u8]) -> u16 {
    assert!(bytes.len() >= 4 && bytes[0] == 0x88 && bytes.len() == 2 + usize::from(bytes[1]), "{bytes:?}");
    u16::from_be_bytes([bytes[2], bytes[3]])
}

#[tokio::test]
async fn text_and_binary_messages_are_echoed_unchanged() {
    let served = serve(&rules(""), 256 << 10);
    let mut client = open(served.stream).await;
    let mut bytes = 0;
    for size in [0, 1, 16, 125, 126, 4096, 65_535, 65_536] {
        let text = "é".repeat(size / 2) + &"x".repeat(size % 2);
        let binary: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
        for message in [Message::text(text), Message::binary(binary)] {
            client.send(message.clone()).await.unwrap();
            assert_eq!(client.next().await.unwrap().unwrap(), message);
            bytes += message.len() as u64;
        }
    }
    client.close(None).await.unwrap();
    assert!(matches!(client.next().await, Some(Ok(Message::Close(None)))));
    assert_eq!(served.ended.await.unwrap(), CloseReason::Client);
    assert_eq!((served.series.messages.get(), served.series.bytes.get()), (16, bytes));
}

#[tokio::test]
async fn fragments_are_echoed_as_one_message_after_the_pong() {
    let mut served = serve(&rules(""), 1 << 10);
    for part in [frame(TEXT, b"\xe2\x82"), frame(LAST | PING, b"now"), frame(LAST, b"\xac!")] {
        served.stream.write_all(&part).await.unwrap();
    }
    let mut answer = [0; 11];
    served.stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"\x8a\x03now\x81\x04\xe2\x82\xac!");
    assert_eq!(served.series.messages.get(), 1);
}

#[tokio::test]
async fn protocol_violation_is_answered_with_its_close_code() {
    let limited = rules("message_bytes_max: 200B");
    for (sent, code, reason) in [
        (frame(LAST | BINARY, &[0; 201]), 1009, CloseReason::TooLarge),
        ([frame(BINARY, &[0; 150]), frame(LAST, &[0; 51])].concat(), 1009, CloseReason::TooLarge),
        (frame(LAST | TEXT, b"\xff"), 1007, CloseReason::Protocol),
        (frame(LAST | TEXT, b"\xe2\x82"), 1007, CloseReason::Protocol),
        (frame(LAST, b"continues nothing"), 1002, CloseReason::Protocol),
        (frame(LAST | 0x40 | TEXT, b"compressed"), 1002, CloseReason::Protocol),
        (frame(LAST | 3, b"of no kind"), 1002, CloseReason::Protocol),
        (frame(PING, b"in parts"), 1002, CloseReason::Protocol),
        (frame(LAST | PING, &[0; 126]), 1002, CloseReason::Protocol),
        (b"\x81\x01x".to_vec(), 1002, CloseReason::Protocol),
        (frame(LAST | 8, &[3]), 1002, CloseReason::Protocol),
        (frame(LAST | 8, &999_u16.to_be_bytes()), 1002, CloseReason::Client),
        (frame(LAST | 8, &1000_u16.to_be_bytes()), 1000, CloseReason::Client),
    ] {
        // More data than the pipe holds follows, as from a client that ignores the close frame.
        let served = serve(&limited, 128);
        let mut sender = sent.clone();
        sender.extend(frame(LAST | BINARY, &[0; 300]));
        let (mut reading, mut writing) = tokio::io::split(served.stream);
        let sending = tokio::spawn(async move {
            let _ = writing.write_all(&sender).await;
            let _ = writing.shutdown().await;
        });
        let mut received = Vec::new();
        reading.read_to_end(&mut received).await.unwrap();
        assert_eq!(close_code(&received), code, "{sent:x?}");
        assert_eq!(served.ended.await.unwrap(), reason, "{sent:x?}");
        sending.await.unwrap();
    }
}

#[tokio::test]
async fn connection_that_ends_without_close_frame_is_an_error() {
    for sent in [Vec::new(), frame(LAST | TEXT, b"half")[..8].to_vec(), frame(TEXT, b"more to come")] {
        let mut served = serve(&rules(""), 1 << 10);
        served.stream.write_all(&sent).await.unwrap();
        drop(served.stream);
        assert_eq!(served.ended.await.unwrap(), CloseReason::Error);
        assert_eq!(served.series.messages.get(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn silent_client_is_pinged_once_and_then_closed() {
    let served = serve(&rules("idle_timeout: 10s"), 1 << 10);
    let begin = Instant::now();
    let received = rest(served.stream).await;
    assert_eq!(&received[..2], b"\x89\x00", "a ping without payload");
    assert_eq!(close_code(&received[2..]), 1001);
    assert_eq!(served.ended.await.unwrap(), CloseReason::Idle);
    let took = begin.elapsed();
    let expected = Duration::from_secs(10) + client::CLOSE_TIMEOUT;
    assert!(took >= expected && took < expected + Duration::from_millis(10), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn pause_of_this_process_does_not_count_as_idle_time() {
    let served = serve(&rules("idle_timeout: 10s"), 1 << 10);
    let mut client = open(served.stream).await;
    client.send(Message::text("before")).await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap(), Message::text("before"));
    tokio::time::advance(Duration::from_secs(3600)).await;
    assert_eq!(client.next().await.unwrap().unwrap(), Message::Ping(Bytes::new()));
    client.send(Message::text("after")).await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap(), Message::text("after"));
}

#[tokio::test(start_paused = true)]
async fn client_that_only_answers_pings_stays_connected() {
    let served = serve(&rules("idle_timeout: 10s"), 1 << 10);
    let mut client = open(served.stream).await;
    let end = Instant::now() + Duration::from_secs(100);
    let mut pings = 0;
    while Instant::now() < end {
        assert_eq!(client.next().await.unwrap().unwrap(), Message::Ping(Bytes::new()));
        pings += 1;
    }
    assert_eq!(pings, 20);
    assert!(!served.ended.is_finished());
}

#[tokio::test(start_paused = true)]
async fn client_that_reads_nothing_is_not_read_from_and_disconnected() {
    const PIPE: usize = 8 << 10;
    for message in [frame(LAST | BINARY, &[7; 1000]), frame(LAST | PING, &[7; 100])] {
        let mut served = serve(&rules("idle_timeout: 1h, messages_per_second: 1000000"), PIPE);
        let begin = Instant::now();
        let mut taken = 0;
        while served.stream.write_all(&message).await.is_ok() {
            taken += message.len();
        }
        // Both directions of the pipe, the read buffer, and the message being written.
        assert!(taken <= 2 * PIPE + (4 << 10) + 3 * message.len(), "{taken} bytes were taken");
        assert_eq!(served.ended.await.unwrap(), CloseReason::Stalled);
        assert!(begin.elapsed() >= client::STALL_TIMEOUT);
    }
}

#[tokio::test(start_paused = true)]
async fn messages_above_the_rate_are_delayed_and_not_lost() {
    let served = serve(&rules("messages_per_second: 10"), 1 << 20);
    let mut client = open(served.stream).await;
    let begin = Instant::now();
    for number in 0..66 {
        client.feed(Message::text(number.to_string())).await.unwrap();
    }
    client.flush().await.unwrap();
    for number in 0..66 {
        assert_eq!(client.next().await.unwrap().unwrap(), Message::text(number.to_string()));
    }
    // The first 16 are a burst.
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(4800) && took <= Duration::from_millis(5100), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn close_request_sends_a_close_frame_unless_the_client_reads_nothing() {
    let served = serve(&rules(""), 1 << 10);
    let mut client = open(served.stream).await;
    client.send(Message::text("before")).await.unwrap();
    assert_eq!(client.next().await.unwrap().unwrap(), Message::text("before"));
    served.close.send(()).unwrap();
    let Some(Ok(Message::Close(Some(CloseFrame { code, .. })))) = client.next().await else {
        panic!("no close frame")
    };
    assert_eq!(code, CloseCode::Away);
    assert_eq!(served.ended.await.unwrap(), CloseReason::GoingAway);

    let mut served = serve(&rules("idle_timeout: 1h"), 64);
    let writing = async { while served.stream.write_all(&frame(LAST | BINARY, &[0; 100])).await.is_ok() {} };
    assert!(timeout(Duration::from_secs(1), writing).await.is_err(), "the pipe is full");
    let begin = Instant::now();
    served.close.send(()).unwrap();
    assert_eq!(served.ended.await.unwrap(), CloseReason::GoingAway);
    assert!(begin.elapsed() <= client::CLOSE_TIMEOUT + Duration::from_millis(10));
}

#[tokio::test]
async fn client_whose_connection_stalled_in_its_trace_is_disconnected() {
    for is_asked in [true, false] {
        let (sender, messages) = mpsc::channel(trace::MESSAGES_MAX);
        let served = serve_traced(&rules(""), 1 << 10, Some(ClientTrace { messages, is_asked }));
        let reason = "stalled".to_owned();
        sender.send(ClientMessage::Update(TraceUpdate::Error { reason })).await.unwrap();
        sender.send(ClientMessage::Close).await.unwrap();
        let mut client = open(served.stream).await;
        if is_asked {
            assert!(matches!(client.next().await, Some(Ok(Message::Text(_)))));
        }
        let Some(Ok(Message::Close(Some(CloseFrame { code, .. })))) = client.next().await else {
            panic!("no close frame")
        };
        assert_eq!(code, CloseCode::Error);
        assert_eq!(served.ended.await.unwrap(), CloseReason::Stalled);
    }
}

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

/// The request of RFC 6455 section 1.3 with changed headers; an empty value removes a header.
fn request(changed: &[(&'static str, &str)]) -> Request<Bytes> {
    let mut request = Request::get("/ws").body(Bytes::new()).unwrap();
    let usual = [
        ("host", "fra-1:9862"),
        ("upgrade", "websocket"),
        ("connection", "Upgrade"),
        ("sec-websocket-key", KEY),
        ("sec-websocket-version", "13"),
    ];
    for (name, value) in usual.iter().chain(changed) {
        let name = HeaderName::from_static(name);
        request.headers_mut().remove(&name);
        if !value.is_empty() {
            request.headers_mut().insert(name, HeaderValue::from_str(value).unwrap());
        }
    }
    request
}

fn responder(yaml: &str) -> WebSocketResponder {
    WebSocketResponder::new(rules(yaml), Arc::default())
}

const OUTSIDE_PEER: &str = "192.0.2.1:40000";

fn allow_all(_: &Request<Bytes>) -> WouldAnswer {
    WouldAnswer { answers: true, reason: None }
}

/// Returns a permit for a client from `peer`, or the refusal.
fn admit(
    responder: &WebSocketResponder,
    request: &Request<Bytes>,
    peer: &str,
) -> Result<ConnectionPermit, HandshakeRefusal> {
    responder.admit(request, peer.parse().unwrap(), allow_all).map(|(_, permit)| permit)
}

#[test]
fn handshake_of_the_rfc_example_gets_the_response_of_the_rfc() {
    let (response, _permit) =
        responder("").admit(&request(&[]), OUTSIDE_PEER.parse().unwrap(), allow_all).unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    assert_eq!(response.headers()["upgrade"], "websocket");
    assert_eq!(response.headers()["connection"], "Upgrade");
}

#[test]
fn invalid_handshake_is_refused_with_a_remedy() {
    let responder = responder("");
    let mut old = request(&[]);
    *old.version_mut() = Version::HTTP_10;
    let mut twice = request(&[]);
    twice.headers_mut().append("sec-websocket-key", HeaderValue::from_static(KEY));
    for (request, refusal, status) in [
        (request(&[("upgrade", "")]), HandshakeRefusal::NoUpgrade, 426),
        (request(&[("upgrade", "h2c")]), HandshakeRefusal::NoUpgrade, 426),
        (request(&[("connection", "keep-alive")]), HandshakeRefusal::NoUpgrade, 426),
        (old, HandshakeRefusal::NoUpgrade, 426),
        (request(&[("sec-websocket-version", "8")]), HandshakeRefusal::Version, 426),
        (request(&[("sec-websocket-version", "")]), HandshakeRefusal::Version, 426),
        (request(&[("sec-websocket-key", "")]), HandshakeRefusal::Key, 400),
        (request(&[("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=")]), HandshakeRefusal::Key, 400),
        (request(&[("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZTE=")]), HandshakeRefusal::Key, 400),
        (request(&[("sec-websocket-key", "dGhlIHNhbXBsZSB!b25jZQ==")]), HandshakeRefusal::Key, 400),
        (twice, HandshakeRefusal::Key, 400),
    ] {
        let found = admit(&responder, &request, OUTSIDE_PEER).unwrap_err();
        assert_eq!(found, refusal);
        let response = found.response();
        assert_eq!(response.status().as_u16(), status);
        let version = response.headers().get("sec-websocket-version").map(HeaderValue::as_bytes);
        assert_eq!(version, (status == 426).then_some(&b"13"[..]));
    }
    let listed = [("connection", "keep-alive, UPGRADE"), ("upgrade", "h2c, WebSocket")];
    admit(&responder, &request(&listed), OUTSIDE_PEER).unwrap();
}

#[test]
fn page_may_connect_to_its_own_origin_or_where_its_origin_is_listed() {
    let same = rules("").origins;
    let these = rules("origins: ['https://page.example.net']").origins;
    let (near, far) = ("127.0.0.1", "192.0.2.1");
    for (origin, origins, peer, is_allowed) in [
        ("", &same, far, true),
        ("http://fra-1:9862", &same, far, true),
        ("http://fra-1", &same, far, false),
        ("https://page.example.net", &same, far, false),
        ("http://localhost:3000", &same, far, false),
        ("http://localhost:3000", &same, near, true),
        ("http://evil.example", &same, near, false),
        ("null", &same, near, false),
        ("https://page.example.net", &these, far, true),
        ("http://page.example.net", &these, far, false),
        ("http://fra-1:9862", &these, far, true),
        ("null", &these, far, false),
        ("null", &Origins::Any, far, true),
    ] {
        let found = handshake::check_origin(&request(&[("origin", origin)]), origins, peer.parse().unwrap());
        assert_eq!(found.is_ok(), is_allowed, "{origin} from {peer}: {found:?}");
    }
    let mut two = request(&[("origin", "http://fra-1:9862")]);
    two.headers_mut().append("origin", HeaderValue::from_static("http://fra-1:9862"));
    assert!(handshake::check_origin(&two, &same, far.parse().unwrap()).is_err());
}

#[test]
fn number_of_clients_is_limited_in_total_and_per_source() {
    let responder = responder("clients_max: 3, clients_per_source: 2");
    let from = |peer: &str| admit(&responder, &request(&[]), peer);
    let (a, b) = (from("[2001:db8::1]:1").unwrap(), from("[2001:db8::2]:1").unwrap());
    let source_limit = from("[2001:db8::3]:1").unwrap_err();
    assert_eq!(source_limit, HandshakeRefusal::LimitReached(connection_limit::LimitReached::Source(2)));
    let c = from("192.0.2.1:1").unwrap();
    let total_limit = from("192.0.2.2:1").unwrap_err();
    assert_eq!(total_limit, HandshakeRefusal::LimitReached(connection_limit::LimitReached::Total(3)));
    for (refusal, status) in [(source_limit, 429), (total_limit, 503)] {
        let response = refusal.response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["retry-after"]),
            (status, &"10".parse().unwrap())
        );
    }
    assert_eq!(responder.series.clients.get(), 3);
    drop((a, c));
    let _again = from("[2001:db8::3]:1").unwrap();
    // The new limit applies immediately to new clients.
    responder.set_rules(rules("clients_max: 2"));
    assert_eq!(
        from("192.0.2.2:1").unwrap_err(),
        HandshakeRefusal::LimitReached(connection_limit::LimitReached::Total(2))
    );
    drop(b);
    from("192.0.2.2:1").unwrap();
    assert_eq!(responder.series.clients.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_clients_up_to_the_grace_period() {
    let responder = responder("");
    let permit = admit(&responder, &request(&[]), OUTSIDE_PEER).unwrap();
    let begin = Instant::now();
    responder.leave(Duration::from_secs(3)).await;
    assert_eq!(begin.elapsed(), Duration::from_secs(3));
    assert_eq!(admit(&responder, &request(&[]), OUTSIDE_PEER).unwrap_err(), HandshakeRefusal::ShuttingDown);
    let waiting = responder.leave(Duration::from_secs(3600));
    let freeing = async {
        sleep(Duration::from_secs(1)).await;
        drop(permit);
    };
    tokio::join!(waiting, freeing);
    assert_eq!(begin.elapsed(), Duration::from_secs(4));
}
