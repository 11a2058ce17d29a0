//! A small HTTP/1.1 server: connections, their limits, graceful shutdown. A [`Handler`] answers the requests.

mod listen;
#[cfg(test)]
mod tests;
mod tls_accept;

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::web_config::LoadedWebConfig;
pub use listen::{BindError, bind};
use tls_accept::{Accepted, accept};

/// Answers requests. Implemented by `Fn(Request<Bytes>, SocketAddr) -> impl Future<Output = Response<Body>>`.
pub trait Handler: Send + Sync + 'static {
    /// Returns the response to a request, whose body has been read completely, from the address `peer`.
    ///
    /// `peer` is never an IPv4-mapped IPv6 address. A handler that panics closes its connection; one that
    /// takes longer than [`ServerLimits::handler_timeout`] is dropped. To upgrade a connection, respond with
    /// 101 and spawn a task that awaits [`hyper::upgrade::on`] the request: from then on the connection is
    /// subject neither to the limits nor to the shutdown of the server.
    fn handle(
        &self,
        request: Request<Bytes>,
        peer: SocketAddr,
    ) -> impl Future<Output = Response<Body>> + Send;
}

impl<F, A> Handler for F
where
    F: Fn(Request<Bytes>, SocketAddr) -> A + Send + Sync + 'static,
    A: Future<Output = Response<Body>> + Send,
{
    fn handle(
        &self,
        request: Request<Bytes>,
        peer: SocketAddr,
    ) -> impl Future<Output = Response<Body>> + Send {
        self(request, peer)
    }
}

/// Body of a response: complete, or generated while the client reads it.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Resource limits and timeouts for clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerLimits {
    /// Maximum number of open connections, over all listeners. Further ones wait in the kernel until one is
    /// closed.
    pub connections: usize,
    /// Maximum time from accepting a connection to the end of the TLS handshake; then it is closed.
    pub handshake_timeout: Duration,
    /// Maximum time from when a connection can send a request to the end of the request's head; then it is
    /// closed. This limits both slow heads and idle keep-alive connections.
    pub head_timeout: Duration,
    /// Maximum time from the head to the end of the body; then the response is 408.
    pub body_timeout: Duration,
    /// Maximum size of a request body in bytes; above it the response is 413.
    pub body_bytes_max: usize,
    /// Maximum time for the handler to respond; then the response is 503.
    pub handler_timeout: Duration,
    /// Maximum time for which sent data may stay unread or unacknowledged; then the client is disconnected.
    pub stall_timeout: Duration,
    /// Maximum time for which running requests may continue after the shutdown began.
    pub grace: Duration,
}

impl Default for ServerLimits {
    /// 512 connections, 10 s for a handshake, 20 s for a head (so that scrapers with an interval of 15 s keep
    /// their connection), 10 s and 64 KiB for a body, 30 s for the handler, 30 s for stalled clients, 5 s of
    /// grace.
    fn default() -> Self {
        Self {
            connections: 512,
            handshake_timeout: Duration::from_secs(10),
            head_timeout: Duration::from_secs(20),
            body_timeout: Duration::from_secs(10),
            body_bytes_max: 64 * 1024,
            handler_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            grace: Duration::from_secs(5),
        }
    }
}

/// Counters of the server, for one call of [`serve`].
#[derive(Debug, Default)]
pub struct Counters {
    connections: AtomicU64,
    accept_errors: AtomicU64,
    handshake_errors: AtomicU64,
    responses: [AtomicU64; 5],
}

impl Counters {
    /// Returns the number of open connections, without upgraded ones.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Returns the number of errors while accepting connections.
    #[must_use]
    pub fn accept_errors(&self) -> u64 {
        self.accept_errors.load(Relaxed)
    }

    /// Returns the number of failed TLS handshakes, including plain HTTP requests to a TLS port.
    #[must_use]
    pub fn handshake_errors(&self) -> u64 {
        self.handshake_errors.load(Relaxed)
    }

    /// Returns the responses by class of status code, 1xx to 5xx. Requests that could not be parsed, or whose
    /// handler panicked, have none.
    #[must_use]
    pub fn responses(&self) -> [(&'static str, u64); 5] {
        let mut classes = ["1xx", "2xx", "3xx", "4xx", "5xx"].map(|class| (class, 0));
        for ((_, total), count) in classes.iter_mut().zip(&self.responses) {
            *total = count.load(Relaxed);
        }
        classes
    }

    fn answered(&self, status: StatusCode) {
        if let Some(class) = self.responses.get(usize::from(status.as_u16() / 100).wrapping_sub(1)) {
            class.fetch_add(1, Relaxed);
        }
    }
}

/// Serves until `stop` is true or its sender is dropped, and returns when all connections are closed.
///
/// A connection uses the `web_config` of the moment at which it was accepted. Errors while accepting are
/// logged and retried. On shutdown, listeners and idle connections are closed, and running requests have
/// [`ServerLimits::grace`] to finish; then they are dropped.
pub async fn serve<H: Handler>(
    listeners: Vec<TcpListener>,
    limits: ServerLimits,
    handler: Arc<H>,
    counters: Arc<Counters>,
    web_config: Arc<ArcSwap<LoadedWebConfig>>,
    stop: watch::Receiver<bool>,
) {
    serve_from(listeners, Server { limits, handler, counters, web_config }, stop).await;
}

async fn serve_from<A: Accept, H: Handler>(
    sources: Vec<A>,
    server: Server<H>,
    mut stop: watch::Receiver<bool>,
) {
    let server = Arc::new(server);
    let mut listeners = Listeners { sources, next_source: 0, failure: None };
    let mut connections = JoinSet::new();
    loop {
        server.counters.connections.store(connections.len() as u64, Relaxed);
        let has_room = connections.len() < server.limits.connections;
        tokio::select! {
            () = stopped(&mut stop) => break,
            Some(ended) = connections.join_next() => report(ended),
            (stream, peer) = listeners.next(&server.counters), if has_room => {
                connections.spawn(connection(Arc::clone(&server), stream, peer, stop.clone()));
            }
        }
    }

    drop(listeners);
    let drained = timeout(server.limits.grace, async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
            server.counters.connections.store(connections.len() as u64, Relaxed);
        }
    });
    if drained.await.is_err() {
        warn!(requests = connections.len(), grace = ?server.limits.grace, "dropping unfinished requests");
        connections.shutdown().await;
        server.counters.connections.store(0, Relaxed);
    }
}

/// State shared by all connections.
struct Server<H> {
    limits: ServerLimits,
    handler: Arc<H>,
    counters: Arc<Counters>,
    web_config: Arc<ArcSwap<LoadedWebConfig>>,
}

async fn connection<H: Handler>(
    server: Arc<Server<H>>,
    stream: TcpStream,
    peer: SocketAddr,
    mut stop: watch::Receiver<bool>,
) {
    let options = SockRef::from(&stream);
    let set = options
        .set_tcp_nodelay(true)
        .and_then(|()| options.set_tcp_user_timeout(Some(server.limits.stall_timeout)));
    if let Err(error) = set {
        debug!(%peer, %error, "cannot set socket options");
    }
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let web_config = server.web_config.load_full();
    let accepted = tokio::select! {
        accepted = accept(&web_config, &server.limits, &server.counters, stream, peer) => accepted,
        () = stopped(&mut stop) => return,
    };
    let Some(Accepted { stream, is_plaintext }) = accepted else { return };

    let service = service_fn(|request| {
        let server = Arc::clone(&server);
        async move {
            Ok::<_, Infallible>(if is_plaintext {
                server.refuse_plain()
            } else {
                server.answer(request, peer).await
            })
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(server.limits.head_timeout)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%peer, %error, "connection ended early");
    }
}

impl<H: Handler> Server<H> {
    /// Returns the response to plain HTTP on a TLS port.
    fn refuse_plain(&self) -> Response<Body> {
        let text = "this port requires HTTPS; use https://…\n".to_owned();
        let response = closing(plain(StatusCode::BAD_REQUEST, text));
        self.counters.answered(response.status());
        response
    }

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
        let response = match self.read(request).await {
            Ok(request) => timeout(self.limits.handler_timeout, self.handler.handle(request, peer))
                .await
                .unwrap_or_else(|_| plain(StatusCode::SERVICE_UNAVAILABLE, "request timed out\n".to_owned())),
            Err(refusal) => refusal,
        };
        self.counters.answered(response.status());
        response
    }

    /// Reads the whole body of a request. Returns an error response if that fails.
    async fn read(&self, request: Request<Incoming>) -> Result<Request<Bytes>, Response<Body>> {
        let limit = self.limits.body_bytes_max;
        let too_large = || {
            let text = format!("request body is larger than {limit} bytes\n");
            closing(plain(StatusCode::PAYLOAD_TOO_LARGE, text))
        };
        let (head, body) = request.into_parts();
        if body.size_hint().lower() > limit as u64 {
            return Err(too_large());
        }
        match timeout(self.limits.body_timeout, Limited::new(body, limit).collect()).await {
            Ok(Ok(body)) => Ok(Request::from_parts(head, body.to_bytes())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => {
                Err(closing(plain(StatusCode::BAD_REQUEST, format!("reading request body: {error}\n"))))
            }
            Err(_) => {
                let text = format!("request body not received within {:?}\n", self.limits.body_timeout);
                Err(closing(plain(StatusCode::REQUEST_TIMEOUT, text)))
            }
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Full::from(text).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Closes the connection after the response: the rest of the body is not read, so no other request can
/// follow.
fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A dropped sender counts as a stop, since it cannot request one later.
    let _ = stop.wait_for(|is_stopped| *is_stopped).await;
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!(%error, "request dropped: handler panicked");
    }
}

/// Source of connections.
trait Accept: Send + Sync {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>>;
}

impl Accept for TcpListener {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        Self::poll_accept(self, context)
    }
}

/// All listeners. Continues after errors such as an exhausted limit of open files.
struct Listeners<A> {
    sources: Vec<A>,
    /// Index of the source to poll first, so that a busy one does not starve the others.
    next_source: usize,
    failure: Option<AcceptFailure>,
}

struct AcceptFailure {
    errno: Option<i32>,
    last: Instant,
}

impl<A: Accept> Listeners<A> {
    /// Returns the next connection. Cancel safe.
    async fn next(&mut self, counters: &Counters) -> (TcpStream, SocketAddr) {
        loop {
            match poll_fn(|context| self.poll(context)).await {
                Ok(connection) => {
                    if self.failure.take_if(|failure| failure.last.elapsed() > RECOVERY_TIME).is_some() {
                        info!("accepting connections again");
                    }
                    return connection;
                }
                Err(error) => {
                    counters.accept_errors.fetch_add(1, Relaxed);
                    if error.kind() == io::ErrorKind::ConnectionAborted {
                        continue;
                    }
                    self.log_failure(&error);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        let count = self.sources.len();
        for source in (0..count).map(|offset| (self.next_source + offset) % count) {
            if let Poll::Ready(accepted) = self.sources[source].poll_accept(context) {
                self.next_source = source + 1;
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    }

    /// Logs a failure when it begins or changes.
    fn log_failure(&mut self, error: &io::Error) {
        let errno = error.raw_os_error();
        if self.failure.as_ref().is_none_or(|failure| failure.errno != errno) {
            warn!(%error, "cannot accept connections");
        }
        self.failure = Some(AcceptFailure { errno, last: Instant::now() });
    }
}

/// Pause after an error that does not concern a single connection (EMFILE, ENFILE, ENOBUFS, ENOMEM). The
/// queue stays readable, so without a pause the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A failure has ended when connections were accepted without errors for this long. At the limit of open
/// files, successes and failures alternate, and each change would log two lines.
const RECOVERY_TIME: Duration = Duration::from_secs(10);

/// Maximum size of a request's head in bytes, and of a connection's buffer. Chosen: the limit of most
/// servers.
const HEAD_BYTES_MAX: usize = 16 * 1024;
