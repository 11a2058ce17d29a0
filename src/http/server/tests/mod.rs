#[cfg(feature = "tls")]
mod tls;

use super::*;
use std::collections::VecDeque;
use std::sync::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;

/// Limits every wait, so that a bug causes a failure and not a hang.
const DEADLINE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(50);

/// A server on loopback with these paths: `/hello`, `/slow` (answers when `release` has a permit), `/panic`,
/// `/peer`, `/open` (number of open connections), `/large` (more than the kernel buffers); any other path
/// returns the length of the body.
struct Served {
    address: SocketAddr,
    counters: Arc<Counters>,
    /// Notified when `/slow` begins.
    begun: Arc<Notify>,
    release: Arc<Semaphore>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Served {
    fn with(limits: ServerLimits) -> Self {
        Self::at("127.0.0.1:0", limits)
    }

    fn at(address: &str, limits: ServerLimits) -> Self {
        let listener = listen(address);
        let address = listener.local_addr().unwrap();
        Self::from(listener, address, limits)
    }

    fn from<A: Accept + 'static>(source: A, address: SocketAddr, limits: ServerLimits) -> Self {
        Self::behind(Arc::default(), source, address, limits)
    }

    fn behind<A: Accept + 'static>(
        web_config: Arc<ArcSwap<LoadedWebConfig>>,
        source: A,
        address: SocketAddr,
        limits: ServerLimits,
    ) -> Self {
        let counters = Arc::new(Counters::default());
        let begun = Arc::new(Notify::new());
        let release = Arc::new(Semaphore::new(0));
        let handler = {
            let (begun, release, counters) =
                (Arc::clone(&begun), Arc::clone(&release), Arc::clone(&counters));
            move |request: Request<Bytes>, peer: SocketAddr| {
                let (begun, release, counters) =
                    (Arc::clone(&begun), Arc::clone(&release), Arc::clone(&counters));
                async move {
                    match request.uri().path() {
                        "/hello" => plain(StatusCode::OK, "hello".to_owned()),
                        "/slow" => {
                            begun.notify_one();
                            release.acquire().await.unwrap().forget();
                            plain(StatusCode::OK, "slow".to_owned())
                        }
                        "/large" => Response::new(Full::from(vec![0; 32 * 1024 * 1024]).boxed_unsync()),
                        "/panic" => panic!("a handler with a bug"),
                        "/peer" => plain(StatusCode::OK, peer.to_string()),
                        "/open" => plain(StatusCode::OK, counters.connections().to_string()),
                        _ => plain(StatusCode::OK, request.body().len().to_string()),
                    }
                }
            }
        };
        let (stop, stopped) = watch::channel(false);
        let server =
            Server { limits, handler: Arc::new(handler), counters: Arc::clone(&counters), web_config };
        let task = tokio::spawn(serve_from(vec![source], server, stopped));
        Self { address, counters, begun, release, stop, task }
    }

    async fn connect(&self) -> Client {
        Client { stream: within(TcpStream::connect(self.address)).await.unwrap(), read: Vec::new() }
    }

    /// Returns the response to one request on a new connection.
    async fn request(&self, request: &str) -> String {
        let mut client = self.connect().await;
        client.send(request).await;
        client.response().await
    }
}

fn listen(address: &str) -> TcpListener {
    TcpListener::from_std(bind(address.parse().unwrap()).unwrap().remove(0)).unwrap()
}

struct Client {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Client {
    async fn send(&mut self, text: &str) {
        within(self.stream.write_all(text.as_bytes())).await.unwrap();
    }

    /// Reads the next response, by its `content-length`.
    async fn response(&mut self) -> String {
        loop {
            let text = String::from_utf8_lossy(&self.read).into_owned();
            if let Some(head) = text.find("\r\n\r\n") {
                let length =
                    text.split("content-length: ").nth(1).expect("every response has a content-length");
                let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
                let end = head + 4 + length;
                if text.len() >= end {
                    self.read.drain(..end);
                    return text[..end].to_owned();
                }
            }
            let count = within(self.stream.read_buf(&mut self.read)).await.unwrap();
            assert_ne!(count, 0, "closed in a response: {text:?}");
        }
    }

    /// Waits until the server closes the connection. Returns what it sent before.
    async fn closed(mut self) -> String {
        // A reset also counts as closed.
        let _ = within(self.stream.read_to_end(&mut self.read)).await;
        String::from_utf8_lossy(&self.read).into_owned()
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    timeout(DEADLINE, future).await.expect("completes within the deadline")
}

/// Waits until another task makes the condition true.
async fn until(condition: impl Fn() -> bool) {
    within(async {
        while !condition() {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

fn is(response: &str, status: u16) -> bool {
    response.starts_with(&format!("HTTP/1.1 {status} "))
}

const HELLO: &str = "GET /hello HTTP/1.1\r\nhost: x\r\n\r\n";
const SLOW: &str = "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn connection_is_kept_alive_for_the_next_request() {
    let served = Served::with(ServerLimits::default());
    let mut client = served.connect().await;
    for _ in 0..3 {
        client.send(HELLO).await;
        let response = client.response().await;
        assert!(is(&response, 200) && response.ends_with("hello"), "{response}");
    }
    assert_eq!(served.counters.connections(), 1);
    assert_eq!(served.counters.responses()[1], ("2xx", 3));
}

#[tokio::test]
async fn handler_receives_the_clients_address_and_the_whole_body() {
    let served = Served::with(ServerLimits::default());
    let mut client = served.connect().await;
    client.send("GET /peer HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(client.response().await.ends_with(&client.stream.local_addr().unwrap().to_string()));
    client
        .send("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n")
        .await;
    assert!(client.response().await.ends_with("\r\n\r\n5"));
}

#[tokio::test]
async fn ipv4_mapped_peer_is_an_ipv4_peer() {
    struct Mapped(TcpListener);
    impl Accept for Mapped {
        fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
            self.0
                .poll_accept(context)
                .map_ok(|(stream, _)| (stream, "[::ffff:192.0.2.1]:7".parse().unwrap()))
        }
    }
    let listener = listen("127.0.0.1:0");
    let address = listener.local_addr().unwrap();
    let served = Served::from(Mapped(listener), address, ServerLimits::default());
    assert!(served.request("GET /peer HTTP/1.1\r\nhost: x\r\n\r\n").await.ends_with("\r\n\r\n192.0.2.1:7"));
}

#[tokio::test]
async fn body_above_the_limit_is_rejected_with_and_without_content_length() {
    let served = Served::with(ServerLimits { body_bytes_max: 10, ..ServerLimits::default() });
    for request in [
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nb\r\n12345678901\r\n",
    ] {
        let mut client = served.connect().await;
        client.send(request).await;
        let response = client.response().await;
        assert!(
            is(&response, 413) && response.ends_with("request body is larger than 10 bytes\n"),
            "{response}"
        );
        assert_eq!(client.closed().await, "");
    }
    let exactly = served.request("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n1234567890").await;
    assert!(is(&exactly, 200), "{exactly}");
    assert_eq!(served.counters.responses()[3], ("4xx", 2));
}

#[tokio::test]
async fn missing_body_is_a_408() {
    let served = Served::with(ServerLimits { body_timeout: SHORT, ..ServerLimits::default() });
    let response = served.request("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n12345").await;
    assert!(is(&response, 408), "{response}");
}

#[tokio::test]
async fn handler_timeout_is_a_503() {
    let served = Served::with(ServerLimits { handler_timeout: SHORT, ..ServerLimits::default() });
    let response = served.request(SLOW).await;
    assert!(is(&response, 503), "{response}");
    assert_eq!(served.counters.responses()[4], ("5xx", 1));
}

#[tokio::test]
async fn incomplete_head_closes_the_connection() {
    let served = Served::with(ServerLimits { head_timeout: SHORT, ..ServerLimits::default() });
    let mut client = served.connect().await;
    client.send("GET /hello HTTP/1.1\r\nhost:").await;
    assert!(!client.closed().await.contains("hello"));
    until(|| served.counters.connections() == 0).await;
}

#[tokio::test]
async fn idle_connections_cannot_exhaust_the_limit() {
    let limits = ServerLimits { connections: 2, head_timeout: SHORT, ..ServerLimits::default() };
    let served = Served::with(limits);
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(served.connect().await);
    }
    // This connection has the same short timeout: on a busy machine the request may arrive too late.
    within(async {
        loop {
            let mut client = served.connect().await;
            client.send(HELLO).await;
            if client.closed().await.ends_with("hello") {
                break;
            }
        }
    })
    .await;
    for client in silent {
        client.closed().await;
    }
}

#[tokio::test]
async fn client_that_does_not_read_is_disconnected() {
    let served = Served::with(ServerLimits { stall_timeout: SHORT, ..ServerLimits::default() });
    let mut client = served.connect().await;
    client.send("GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(|| served.counters.responses()[1] == ("2xx", 1)).await;
    until(|| served.counters.connections() == 0).await;
}

#[tokio::test]
async fn head_above_the_limit_is_rejected() {
    let served = Served::with(ServerLimits::default());
    let mut client = served.connect().await;
    // Exactly at the limit: unread bytes would reset the connection and discard the response.
    client.send(&format!("GET /{}", "x".repeat(HEAD_BYTES_MAX - 5))).await;
    assert!(is(&client.closed().await, 431));
}

#[tokio::test]
async fn number_of_open_connections_is_limited() {
    let served = Arc::new(Served::with(ServerLimits { connections: 2, ..ServerLimits::default() }));
    let mut clients = JoinSet::new();
    for _ in 0..16 {
        let served = Arc::clone(&served);
        clients.spawn(async move { served.request("GET /open HTTP/1.1\r\nhost: x\r\n\r\n").await });
    }
    while let Some(response) = clients.join_next().await {
        let response = response.unwrap();
        assert!(response.ends_with("\r\n\r\n1") || response.ends_with("\r\n\r\n2"), "{response}");
    }
}

#[tokio::test]
async fn next_connection_is_accepted_when_one_ends() {
    let served = Served::with(ServerLimits { connections: 1, ..ServerLimits::default() });
    let mut first = served.connect().await;
    first.send(SLOW).await;
    within(served.begun.notified()).await;

    // The kernel completes the connection, but the server has not accepted it: its request waits.
    let mut second = served.connect().await;
    second.send(HELLO).await;
    served.release.add_permits(1);
    assert!(is(&first.response().await, 200));
    assert_eq!(served.counters.responses()[1], ("2xx", 1));
    drop(first);
    assert!(is(&second.response().await, 200));
}

#[tokio::test]
async fn panicking_handler_closes_only_its_connection() {
    let served = Served::with(ServerLimits::default());
    let mut client = served.connect().await;
    client.send("GET /panic HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(client.closed().await, "");
    assert!(is(&served.request(HELLO).await, 200));
}

#[tokio::test]
async fn shutdown_finishes_running_requests_and_closes_idle_connections() {
    // A separate address, so that no other test can bind the port after the shutdown.
    let served = Served::at("127.77.0.1:0", ServerLimits { grace: DEADLINE, ..ServerLimits::default() });
    let mut idle = served.connect().await;
    idle.send(HELLO).await;
    idle.response().await;
    let silent = served.connect().await;
    let mut running = served.connect().await;
    running.send(SLOW).await;
    within(served.begun.notified()).await;

    served.stop.send(true).unwrap();
    assert_eq!(idle.closed().await, "");
    assert_eq!(silent.closed().await, "");
    let refused = within(TcpStream::connect(served.address)).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert!(!served.task.is_finished());

    served.release.add_permits(1);
    let response = running.response().await;
    assert!(is(&response, 200) && response.contains("connection: close"), "{response}");
    assert_eq!(running.closed().await, "");
    within(served.task).await.unwrap();
    assert_eq!(served.counters.connections(), 0);
}

#[tokio::test]
async fn shutdown_drops_requests_after_the_grace_period() {
    let served = Served::with(ServerLimits { grace: SHORT, ..ServerLimits::default() });
    let mut running = served.connect().await;
    running.send(SLOW).await;
    within(served.begun.notified()).await;
    served.stop.send(true).unwrap();
    assert_eq!(running.closed().await, "");
    within(served.task).await.unwrap();
    assert_eq!(served.counters.connections(), 0);
}

#[tokio::test]
async fn server_stops_when_its_stop_sender_is_dropped() {
    let Served { stop, task, .. } = Served::with(ServerLimits::default());
    drop(stop);
    within(task).await.unwrap();
}

#[tokio::test]
async fn accept_errors_are_counted_and_retried() {
    struct Failing {
        listener: TcpListener,
        errors: Mutex<VecDeque<i32>>,
    }
    impl Accept for Failing {
        fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
            match self.errors.lock().unwrap().pop_front() {
                Some(errno) => Poll::Ready(Err(io::Error::from_raw_os_error(errno))),
                None => self.listener.poll_accept(context),
            }
        }
    }
    let listener = listen("127.0.0.1:0");
    let address = listener.local_addr().unwrap();
    let errors = [libc::EMFILE, libc::EMFILE, libc::ECONNABORTED, libc::ENOMEM];
    let source = Failing { listener, errors: Mutex::new(errors.into()) };
    let served = Served::from(source, address, ServerLimits::default());
    assert!(is(&served.request(HELLO).await, 200));
    assert_eq!(served.counters.accept_errors(), 4);
}

/// A handler that switches to a protocol that returns a received byte plus one.
async fn counter(mut request: Request<Bytes>, _: SocketAddr) -> Response<Body> {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        let byte = stream.read_u8().await.unwrap();
        stream.write_u8(byte + 1).await.unwrap();
        stream.flush().await.unwrap();
    });
    let mut response = plain(StatusCode::SWITCHING_PROTOCOLS, String::new());
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(hyper::header::UPGRADE, HeaderValue::from_static("counter"));
    response
}

/// Requests the upgrade and exchanges a byte over the new protocol.
async fn count_up<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let request = "GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: counter\r\n\r\n";
    within(stream.write_all(request.as_bytes())).await.unwrap();
    within(stream.flush()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert_ne!(within(stream.read_buf(&mut head)).await.unwrap(), 0);
    }
    within(stream.write_u8(41)).await.unwrap();
    within(stream.flush()).await.unwrap();
    assert_eq!(within(stream.read_u8()).await.unwrap(), 42);
}

#[tokio::test]
async fn connection_can_be_upgraded() {
    let listener = vec![listen("127.0.0.1:0")];
    let address = listener[0].local_addr().unwrap();
    let (_stop, stopped) = watch::channel(false);
    let counters = Arc::new(Counters::default());
    let counted = Arc::clone(&counters);
    let served =
        serve(listener, ServerLimits::default(), Arc::new(counter), counted, Arc::default(), stopped);
    tokio::spawn(served);

    count_up(within(TcpStream::connect(address)).await.unwrap()).await;
    assert_eq!(counters.responses()[0], ("1xx", 1));
    until(|| counters.connections() == 0).await;
}
