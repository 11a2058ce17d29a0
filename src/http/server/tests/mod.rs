#[cfg(feature = "tls")]
mod tls;

use super::*;
use std::collections::VecDeque;
use std::sync::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;

/// Bounds every wait, so that a bug is a failure and not a hang.
const DEADLINE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(50);

/// A server on loopback with these paths: `/hello`, `/slow` (answers when `release` has a permit), `/panic`, `/peer`,
/// `/open` (how many connections are), `/large` (more than the kernel buffers); anything else answers with the length of
/// the body.
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

    /// The response to one request on a connection of its own.
    async fn ask(&self, request: &str) -> String {
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

    /// The next response, by its `content-length`.
    async fn response(&mut self) -> String {
        loop {
            let text = String::from_utf8_lossy(&self.read).into_owned();
            if let Some(head) = text.find("\r\n\r\n") {
                let length = text.split("content-length: ").nth(1).expect("every response says its length");
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

    /// Waits until the server closes; what it had still to say.
    async fn closed(mut self) -> String {
        // A reset is a close too.
        let _ = within(self.stream.read_to_end(&mut self.read)).await;
        String::from_utf8_lossy(&self.read).into_owned()
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    timeout(DEADLINE, future).await.expect("happens within the deadline")
}

/// Waits for a condition that another task makes true.
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
async fn a_connection_is_kept_for_the_next_request() {
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
async fn a_handler_sees_the_clients_address_and_the_whole_body() {
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
async fn a_mapped_peer_is_an_ipv4_peer() {
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
    assert!(served.ask("GET /peer HTTP/1.1\r\nhost: x\r\n\r\n").await.ends_with("\r\n\r\n192.0.2.1:7"));
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_announced_or_not() {
    let served = Served::with(ServerLimits { body_bytes_max: 10, ..ServerLimits::default() });
    for request in [
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nb\r\n12345678901\r\n",
    ] {
        let mut client = served.connect().await;
        client.send(request).await;
        let response = client.response().await;
        assert!(is(&response, 413) && response.ends_with("the body is larger than 10 bytes\n"), "{response}");
        assert_eq!(client.closed().await, "");
    }
    let exactly = served.ask("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n1234567890").await;
    assert!(is(&exactly, 200), "{exactly}");
    assert_eq!(served.counters.responses()[3], ("4xx", 2));
}

#[tokio::test]
async fn a_body_that_does_not_come_is_a_408() {
    let served = Served::with(ServerLimits { body_timeout: SHORT, ..ServerLimits::default() });
    let response = served.ask("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n12345").await;
    assert!(is(&response, 408), "{response}");
}

#[tokio::test]
async fn a_handler_that_does_not_answer_is_a_503() {
    let served = Served::with(ServerLimits { handler_timeout: SHORT, ..ServerLimits::default() });
    let response = served.ask(SLOW).await;
    assert!(is(&response, 503), "{response}");
    assert_eq!(served.counters.responses()[4], ("5xx", 1));
}

#[tokio::test]
async fn a_head_that_does_not_end_is_closed() {
    let served = Served::with(ServerLimits { head_timeout: SHORT, ..ServerLimits::default() });
    let mut client = served.connect().await;
    client.send("GET /hello HTTP/1.1\r\nhost:").await;
    assert!(!client.closed().await.contains("hello"));
    until(|| served.counters.connections() == 0).await;
}

#[tokio::test]
async fn idle_connections_cannot_hold_all_places() {
    let limits = ServerLimits { connections: 2, head_timeout: SHORT, ..ServerLimits::default() };
    let served = Served::with(limits);
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(served.connect().await);
    }
    // Our own connection is as short-lived: on a busy machine the request may come too late for it.
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
async fn a_client_that_does_not_read_is_disconnected() {
    let served = Served::with(ServerLimits { stall_timeout: SHORT, ..ServerLimits::default() });
    let mut client = served.connect().await;
    client.send("GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(|| served.counters.responses()[1] == ("2xx", 1)).await;
    until(|| served.counters.connections() == 0).await;
}

#[tokio::test]
async fn a_head_beyond_the_limit_is_refused() {
    let served = Served::with(ServerLimits::default());
    let mut client = served.connect().await;
    // Not a byte more: what the server leaves unread would reset the connection, and with it the answer.
    client.send(&format!("GET /{}", "x".repeat(HEAD_BYTES_MAX - 5))).await;
    assert!(is(&client.closed().await, 431));
}

#[tokio::test]
async fn no_more_connections_are_open_than_the_limit() {
    let served = Arc::new(Served::with(ServerLimits { connections: 2, ..ServerLimits::default() }));
    let mut clients = JoinSet::new();
    for _ in 0..16 {
        let served = Arc::clone(&served);
        clients.spawn(async move { served.ask("GET /open HTTP/1.1\r\nhost: x\r\n\r\n").await });
    }
    while let Some(response) = clients.join_next().await {
        let response = response.unwrap();
        assert!(response.ends_with("\r\n\r\n1") || response.ends_with("\r\n\r\n2"), "{response}");
    }
}

#[tokio::test]
async fn a_place_is_given_to_the_next_when_a_connection_ends() {
    let served = Served::with(ServerLimits { connections: 1, ..ServerLimits::default() });
    let mut first = served.connect().await;
    first.send(SLOW).await;
    within(served.begun.notified()).await;

    // Connected by the kernel, not by us: its request waits.
    let mut second = served.connect().await;
    second.send(HELLO).await;
    served.release.add_permits(1);
    assert!(is(&first.response().await, 200));
    assert_eq!(served.counters.responses()[1], ("2xx", 1));
    drop(first);
    assert!(is(&second.response().await, 200));
}

#[tokio::test]
async fn a_handler_that_panics_costs_one_connection() {
    let served = Served::with(ServerLimits::default());
    let mut client = served.connect().await;
    client.send("GET /panic HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(client.closed().await, "");
    assert!(is(&served.ask(HELLO).await, 200));
}

#[tokio::test]
async fn a_stop_lets_running_requests_finish_and_closes_idle_connections() {
    // An address of its own, so that no other test can take the port when it is free.
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
async fn a_stop_drops_what_outlasts_the_grace() {
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
async fn a_server_whose_owner_is_gone_stops() {
    let Served { stop, task, .. } = Served::with(ServerLimits::default());
    drop(stop);
    within(task).await.unwrap();
}

#[tokio::test]
async fn errors_of_accepting_are_survived_and_counted() {
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
    assert!(is(&served.ask(HELLO).await, 200));
    assert_eq!(served.counters.accept_errors(), 4);
}

/// A handler that switches protocols: to one in which a byte comes back one higher.
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

/// Asks for the upgrade, and tries what it leads to.
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
async fn a_connection_can_be_upgraded() {
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
