//! A small HTTP/1.1 server: connections, their limits, a graceful stop. What is answered is the [`Handler`]'s.

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
use hyper::header::{CONNECTION, HeaderValue};
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
    /// The answer to a request whose body was read whole, from the address `peer`.
    ///
    /// An IPv4 client is an IPv4 address, whatever socket it came by. A handler that panics costs its connection; one
    /// that takes longer than [`ServerLimits::handler_timeout`] is dropped. To upgrade a connection, answer 101 and let a task of
    /// your own wait for [`hyper::upgrade::on`] the request: from then on the connection counts for no limit here
    /// and is not part of the stop.
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

/// What is answered: bytes that are there, or that are made as the client takes them.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What a client may take from us, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections at once, over all listeners. Further ones wait in the kernel until one has ended.
    pub connections: usize,
    /// From the connection to the end of TLS's handshake; then it is closed.
    pub handshake_timeout: Duration,
    /// From when a connection could send a request to the end of the request's head; then it is closed. So this is
    /// how slow a head may be, and how long a connection may be kept alive without a request.
    pub head_timeout: Duration,
    /// From the head to the end of the body; then 408.
    pub body_timeout: Duration,
    /// The most bytes a request's body may have; beyond, 413.
    pub body_bytes_max: usize,
    /// The longest a handler may think; then 503.
    pub handler_timeout: Duration,
    /// How long a client may leave what was sent to it unread or unacknowledged; then it is disconnected.
    pub stall_timeout: Duration,
    /// How long running requests may go on after the stop.
    pub grace: Duration,
}

impl Default for ServerLimits {
    /// 512 connections, 10 s for a handshake, 20 s for a head (a scraper that comes every 15 s keeps its connection), 10 s and 64 KiB for a body,
    /// 30 s to answer, 30 s of stall, 5 s of grace.
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

/// What the server counts, for one call of [`serve`].
#[derive(Debug, Default)]
pub struct Counters {
    connections: AtomicU64,
    accept_errors: AtomicU64,
    handshake_errors: AtomicU64,
    responses: [AtomicU64; 5],
}

impl Counters {
    /// Connections that are open; those that were upgraded are not counted.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Times that accepting a connection failed.
    #[must_use]
    pub fn accept_errors(&self) -> u64 {
        self.accept_errors.load(Relaxed)
    }

    /// Connections that did not get through TLS's handshake, plain HTTP among them.
    #[must_use]
    pub fn handshake_errors(&self) -> u64 {
        self.handshake_errors.load(Relaxed)
    }

    /// Responses by class of status: 1xx to 5xx. A request that was never understood, or whose handler panicked, has none.
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

/// Serves until `stop` holds true or its sender is gone, and returns when all connections have ended.
///
/// Each connection is taken as `web_config` says at that moment, and stays so. Survives every error of accepting. At the stop the listeners are closed, idle connections too, and running requests
/// get [`ServerLimits::grace`] to finish; what still runs then is dropped.
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
    let mut door = Listeners { sources, turn: 0, trouble: None };
    let mut connections = JoinSet::new();
    loop {
        server.counters.connections.store(connections.len() as u64, Relaxed);
        let has_room = connections.len() < server.limits.connections;
        tokio::select! {
            () = stopped(&mut stop) => break,
            Some(ended) = connections.join_next() => report(ended),
            (stream, peer) = door.next(&server.counters), if has_room => {
                connections.spawn(connection(Arc::clone(&server), stream, peer, stop.clone()));
            }
        }
    }

    drop(door);
    let drained = timeout(server.limits.grace, async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
            server.counters.connections.store(connections.len() as u64, Relaxed);
        }
    });
    if drained.await.is_err() {
        warn!(requests = connections.len(), grace = ?server.limits.grace, "dropping requests that still run");
        connections.shutdown().await;
        server.counters.connections.store(0, Relaxed);
    }
}

/// What all connections share.
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
        debug!(%peer, %error, "setting the options of a connection");
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
        debug!(%peer, %error, "a connection ended early");
    }
}

impl<H: Handler> Server<H> {
    /// The answer to plain HTTP where TLS is spoken.
    fn refuse_plain(&self) -> Response<Body> {
        let text = "this port speaks HTTPS: ask for https://…\n".to_owned();
        let response = closing(plain(StatusCode::BAD_REQUEST, text));
        self.counters.answered(response.status());
        response
    }

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
        let response = match self.read(request).await {
            Ok(request) => timeout(self.limits.handler_timeout, self.handler.handle(request, peer))
                .await
                .unwrap_or_else(|_| plain(StatusCode::SERVICE_UNAVAILABLE, "no answer in time\n".to_owned())),
            Err(refusal) => refusal,
        };
        self.counters.answered(response.status());
        response
    }

    /// The request with its whole body, or the answer to one that has no proper body.
    async fn read(&self, request: Request<Incoming>) -> Result<Request<Bytes>, Response<Body>> {
        let limit = self.limits.body_bytes_max;
        let too_large = || {
            let text = format!("the body is larger than {limit} bytes\n");
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
                Err(closing(plain(StatusCode::BAD_REQUEST, format!("reading the body: {error}\n"))))
            }
            Err(_) => {
                let text = format!("the body took longer than {:?}\n", self.limits.body_timeout);
                Err(closing(plain(StatusCode::REQUEST_TIMEOUT, text)))
            }
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(Full::from(text).boxed_unsync());
    *response.status_mut() = status;
    response
}

/// The rest of the body is not going to be read, so that no other request can follow.
fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone cannot stop us later: the same as a stop.
    let _ = stop.wait_for(|is_stopped| *is_stopped).await;
}

fn report(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        error!(%error, "a request was dropped: its handler panicked");
    }
}

/// Where connections come from.
trait Accept: Send + Sync {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>>;
}

impl Accept for TcpListener {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        Self::poll_accept(self, context)
    }
}

/// All listeners, with the patience to go on when the kernel has no room for a connection.
struct Listeners<A> {
    sources: Vec<A>,
    /// The source that is asked first: a busy one must not starve the others.
    turn: usize,
    trouble: Option<AcceptFailure>,
}

struct AcceptFailure {
    errno: Option<i32>,
    last: Instant,
}

impl<A: Accept> Listeners<A> {
    /// The next connection. May be dropped and called again at any time.
    async fn next(&mut self, counters: &Counters) -> (TcpStream, SocketAddr) {
        loop {
            match poll_fn(|context| self.poll(context)).await {
                Ok(connection) => {
                    if self.trouble.take_if(|trouble| trouble.last.elapsed() > TROUBLE_MEMORY).is_some() {
                        info!("accepting connections again");
                    }
                    return connection;
                }
                Err(error) => {
                    counters.accept_errors.fetch_add(1, Relaxed);
                    if error.kind() == io::ErrorKind::ConnectionAborted {
                        continue;
                    }
                    self.troubled(&error);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        let count = self.sources.len();
        for source in (0..count).map(|offset| (self.turn + offset) % count) {
            if let Poll::Ready(accepted) = self.sources[source].poll_accept(context) {
                self.turn = source + 1;
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    }

    /// Logs trouble when it begins or changes.
    fn troubled(&mut self, error: &io::Error) {
        let errno = error.raw_os_error();
        if self.trouble.as_ref().is_none_or(|trouble| trouble.errno != errno) {
            warn!(%error, "accepting connections");
        }
        self.trouble = Some(AcceptFailure { errno, last: Instant::now() });
    }
}

/// After an error that is about us and not about one connection (EMFILE, ENFILE, ENOBUFS, ENOMEM): the queue stays readable,
/// so without a pause we would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Trouble is over when connections were accepted this long without any: at the limit of open files successes and
/// failures alternate, and each change would be two lines in the log.
const TROUBLE_MEMORY: Duration = Duration::from_secs(10);

/// The most bytes of a request's head, and what a connection may buffer. Chosen: what most servers allow.
const HEAD_BYTES_MAX: usize = 16 * 1024;
