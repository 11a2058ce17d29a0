//! The responder of echo over TCP, on the agent port.

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use pathmeter_proto::admission::{Policy, Rates, rate_limit_key};
use pathmeter_proto::key::Keys;
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::bandwidth::is_bandwidth;
use pathmeter_proto::wire::stream::{
    GREETING_BYTES, GreetingProof, Hello, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN, PURPOSE, Seal, Welcome,
    WelcomeStatus,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::arrivals::Arrivals;
use super::bulk::{BulkConnection, BulkHandler};
use super::kernel;
use crate::clock::Clock;
use crate::metrics::agent::{RefusalOrEnd, StreamResponderSeries};

/// Limits of a TCP responder.
#[derive(Debug, Clone, Copy)]
pub struct ResponderLimits {
    /// Maximum number of connections; further ones are refused as full.
    pub connections: usize,
    /// Maximum number of connections per source address; further ones are refused as full.
    pub connections_per_source: usize,
    /// Maximum number of connections whose source is not listed and has not proven a key; further ones are
    /// closed without a reply.
    pub unverified: usize,
    /// The same per source address.
    pub unverified_per_source: usize,
    /// Time limit of the greeting.
    pub greeting: Duration,
    /// A client that does not read its replies for this long is disconnected.
    pub stall: Duration,
}

impl Default for ResponderLimits {
    /// Chosen: each connection may hold a message of 64 KiB, and many probes and agents may share one source
    /// address.
    fn default() -> Self {
        Self {
            connections: 4_096,
            connections_per_source: 256,
            unverified: 256,
            unverified_per_source: 32,
            greeting: Duration::from_secs(10),
            stall: Duration::from_secs(60),
        }
    }
}

/// TCP keepalive: the kernel probes a connection after one idle minute, and closes it after another minute
/// without an answer.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Pause before a source that exceeds its rate is checked again.
const RATE_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Pause after a local accept error: the listener stays readable, so accepting at once again would be a busy
/// loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The allowed sources and the keys. Replaced as a whole on a change.
#[derive(Debug, Clone, Default)]
pub struct StreamAccess {
    policy: Policy,
    keys: Option<Keys>,
}

impl StreamAccess {
    /// Access rules with a policy and the keys of the mesh.
    #[must_use]
    pub fn new(policy: Policy, keys: Option<&Keys>) -> Self {
        Self { policy, keys: keys.map(|keys| keys.derive(PURPOSE)) }
    }
}

/// A TCP responder: the state that its connections share.
#[derive(Debug)]
pub struct StreamResponder {
    access: ArcSwap<StreamAccess>,
    limits: ResponderLimits,
    rates: Mutex<Rates>,
    open: Mutex<ConnectionLimits>,
    /// Receives the connections of bandwidth runs; `None`: they are refused.
    bulk: Option<BulkHandler>,
    /// Whether replies have stopped.
    has_stopped_replying: AtomicBool,
    series: Arc<StreamResponderSeries>,
}

impl StreamResponder {
    /// A responder with these access rules and limits.
    #[must_use]
    pub fn new(access: StreamAccess, limits: ResponderLimits, series: Arc<StreamResponderSeries>) -> Self {
        Self {
            access: ArcSwap::from_pointee(access),
            limits,
            rates: Mutex::new(Rates::new()),
            open: Mutex::default(),
            bulk: None,
            has_stopped_replying: AtomicBool::new(false),
            series,
        }
    }

    /// Passes the connections of bandwidth runs to `bulk`.
    #[must_use]
    pub fn with_bulk(self, bulk: BulkHandler) -> Self {
        Self { bulk: Some(bulk), ..self }
    }

    /// Stops sending replies, because a reply after the goodbye would revoke it. Connections stay open until
    /// the stop: closing one before the peer receives the goodbye would lose the messages in flight.
    pub fn stop_answering(&self) {
        self.has_stopped_replying.store(true, Relaxed);
    }

    /// Replaces the access rules. A connection that the new rules refuse ends with its next message.
    pub fn change(&self, access: StreamAccess) {
        self.access.store(Arc::new(access));
    }

    /// Serves until `stop` is true or its sender is dropped, and then closes all connections.
    pub async fn serve(self: Arc<Self>, listeners: Vec<TcpListener>, mut stop: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(Arc::clone(&self).accept(listener));
        }
        // A dropped sender is the same as a stop.
        let _ = stop.wait_for(|is_stopped| *is_stopped).await;
        tasks.shutdown().await;
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut is_failing = false;
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, source)) => {
                        is_failing = false;
                        connections.spawn(Arc::clone(&self).handle_connection(stream, source));
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        self.series.accept_errors.inc();
                        if !std::mem::replace(&mut is_failing, true) {
                            warn!(%error, "cannot accept connections on the agent port");
                        }
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn handle_connection(self: Arc<Self>, stream: TcpStream, source: SocketAddr) {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let outcome = match OpenConnection::open(&self, source.ip()) {
            Some(mut connection) => self.serve_connection(stream, source, &mut connection).await,
            None => Err(RefusalOrEnd::Full),
        };
        if let Err(why) = outcome {
            self.series.unanswered(why);
            debug!(%source, ?why, "connection to the agent port ended");
        }
    }

    async fn serve_connection(
        &self,
        mut stream: TcpStream,
        source: SocketAddr,
        connection: &mut OpenConnection<'_>,
    ) -> Result<(), RefusalOrEnd> {
        let broken = |_: io::Error| RefusalOrEnd::Broken;
        set_options(&stream, self.limits.stall).map_err(broken)?;
        let mut greeting = [0; GREETING_BYTES];
        match timeout(self.limits.greeting, stream.read_exact(&mut greeting)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(RefusalOrEnd::Malformed),
            Err(_) => return Err(RefusalOrEnd::Silent),
        }
        if is_bandwidth(&greeting) {
            return self.pass_on(stream, source, greeting);
        }
        let mut access = self.access.load_full();
        let (hello, proof) =
            Hello::decode(&greeting, access.keys.as_ref()).map_err(|_| RefusalOrEnd::Malformed)?;
        let key = match (proof, &access.keys) {
            (GreetingProof::By(id), Some(keys)) => Some(keys.key(id).clone()),
            (GreetingProof::By(_) | GreetingProof::None | GreetingProof::Wrong, _) => None,
        };
        let lengths = MESSAGE_BYTES_MIN..=MESSAGE_BYTES_MAX;
        let (status, refusal) = match proof {
            GreetingProof::Wrong => (WelcomeStatus::Unauthentic, Some(RefusalOrEnd::Unauthentic)),
            GreetingProof::None if !access.policy.lists(source.ip()) => {
                (WelcomeStatus::Unlisted, Some(RefusalOrEnd::Unlisted))
            }
            GreetingProof::None | GreetingProof::By(_) if !connection.has_room => {
                (WelcomeStatus::Full, Some(RefusalOrEnd::Full))
            }
            GreetingProof::None | GreetingProof::By(_) if !lengths.contains(&hello.message_bytes) => {
                (WelcomeStatus::Length, Some(RefusalOrEnd::Malformed))
            }
            GreetingProof::None | GreetingProof::By(_) => (WelcomeStatus::Granted, None),
        };
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|_| RefusalOrEnd::Broken)?;
        let welcome = Welcome { status, nonce };
        stream.write_all(&welcome.encode(&hello, key.as_ref())).await.map_err(broken)?;
        if let Some(why) = refusal {
            return Err(why);
        }
        // Without kernel timestamps the replies contain times of this process's clock.
        let _ = kernel::request_rx_timestamps(&stream);
        let seal = Seal::of(key.as_ref(), &hello, &welcome);
        let mut clock = Clock::new();
        let mut arrivals = Arrivals::new(Clock::now());
        let mut frame = vec![0; hello.message_bytes as usize];
        while let Some(timestamp) = read(&stream, &mut frame, &mut arrivals).await? {
            let (at, _) = arrivals.arrival(&stream, timestamp, &mut clock);
            let received = clock.offset().wall(at);
            seal.check_request(&frame).map_err(|_| RefusalOrEnd::Malformed)?;
            if key.is_some() {
                connection.mark_verified();
            }
            let latest = self.access.load();
            if !Arc::ptr_eq(&access, &latest) {
                access = Arc::clone(&latest);
                let (_, proof) =
                    Hello::decode(&greeting, access.keys.as_ref()).map_err(|_| RefusalOrEnd::Malformed)?;
                match proof {
                    GreetingProof::By(_) => {}
                    GreetingProof::Wrong => return Err(RefusalOrEnd::Unauthentic),
                    GreetingProof::None if access.policy.lists(source.ip()) => {}
                    GreetingProof::None => return Err(RefusalOrEnd::Unlisted),
                }
            }
            self.wait_for_turn(&access.policy, source.ip()).await;
            if self.has_stopped_replying.load(Relaxed) {
                pending::<()>().await;
            }
            let (now, _) = clock.read();
            seal.reply(&mut frame, received, clock.offset().wall(now));
            match timeout(self.limits.stall, stream.write_all(&frame)).await {
                Ok(written) => written.map_err(broken)?,
                Err(_) => return Err(RefusalOrEnd::Stalled),
            }
            self.series.messages.inc();
        }
        Ok(())
    }

    /// Passes a connection of a bandwidth run to its thread, which verifies it.
    fn pass_on(
        &self,
        stream: TcpStream,
        source: SocketAddr,
        greeting: [u8; GREETING_BYTES],
    ) -> Result<(), RefusalOrEnd> {
        let Some(bulk) = &self.bulk else { return Err(RefusalOrEnd::Malformed) };
        let stream = stream.into_std().map_err(|_| RefusalOrEnd::Broken)?;
        (bulk.0)(BulkConnection { stream, source, greeting });
        Ok(())
    }

    /// Waits until the source is within its rate: messages of a stream are delayed, not dropped.
    async fn wait_for_turn(&self, policy: &Policy, source: IpAddr) {
        loop {
            let outcome = {
                let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
                rates.take(policy, source, Clock::now())
            };
            if outcome.is_ok() {
                return;
            }
            sleep(RATE_RETRY_INTERVAL).await;
        }
    }
}

/// Reads one message. Returns the kernel timestamp of its last byte, if there is one, or `None` if the stream
/// ended before a message.
async fn read(
    stream: &TcpStream,
    frame: &mut [u8],
    arrivals: &mut Arrivals,
) -> Result<Option<Option<WallTime>>, RefusalOrEnd> {
    let mut filled = 0;
    loop {
        match arrivals.receive(stream, &mut frame[filled..]) {
            Ok((0, _)) if filled == 0 => return Ok(None),
            Ok((0, _)) => return Err(RefusalOrEnd::Malformed),
            Ok((count, timestamp)) => {
                filled += count;
                if filled == frame.len() {
                    return Ok(Some(timestamp));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stream.readable().await.map_err(|_| RefusalOrEnd::Broken)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(RefusalOrEnd::Broken),
        }
    }
}

fn set_options(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    let options = SockRef::from(stream);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_user_timeout(Some(stall))?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 6).with_retries(6);
    options.set_tcp_keepalive(&keepalive)
}

/// Counts of open connections, for the limits.
#[derive(Debug, Default)]
struct ConnectionLimits {
    all: usize,
    /// Connections whose source is not listed, and that have not proven a key with a message.
    unverified: usize,
    by_source: HashMap<IpAddr, SourceConnections>,
}

/// Counts of one source address.
#[derive(Debug, Clone, Copy, Default)]
struct SourceConnections {
    all: usize,
    unverified: usize,
}

/// An open connection. Dropping it releases its count.
struct OpenConnection<'a> {
    responder: &'a StreamResponder,
    source: IpAddr,
    is_unverified: bool,
    /// Whether it is within the limits; otherwise it is refused with [`WelcomeStatus::Full`].
    has_room: bool,
}

impl<'a> OpenConnection<'a> {
    /// Counts a connection. `None` above the hard limit, where connections are closed without a refusal.
    fn open(responder: &'a StreamResponder, source: IpAddr) -> Option<Self> {
        let is_unverified = !responder.access.load().policy.lists(source);
        let limits = responder.limits;
        let source = rate_limit_key(source);
        let mut open = responder.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_source = open.by_source.get(&source).copied().unwrap_or_default();
        let over_limit = of_source.all >= limits.connections_per_source || open.all >= limits.connections;
        let too_many_unverified =
            open.unverified >= limits.unverified || of_source.unverified >= limits.unverified_per_source;
        let over_hard_limit = of_source.all >= limits.connections_per_source + REFUSALS_ABOVE_LIMIT
            || open.all >= limits.connections + REFUSALS_ABOVE_LIMIT
            || is_unverified && too_many_unverified;
        if over_hard_limit {
            return None;
        }
        open.all += 1;
        open.unverified += usize::from(is_unverified);
        let of_source = open.by_source.entry(source).or_default();
        of_source.all += 1;
        of_source.unverified += usize::from(is_unverified);
        responder.series.connections.set(u64::try_from(open.all).unwrap_or(u64::MAX));
        drop(open);
        Some(Self { responder, source, is_unverified, has_room: !over_limit })
    }

    /// Marks the connection as verified after a message with a valid key.
    fn mark_verified(&mut self) {
        if std::mem::take(&mut self.is_unverified) {
            let mut open = self.responder.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.unverified -= 1;
            if let Some(of_source) = open.by_source.get_mut(&self.source) {
                of_source.unverified -= 1;
            }
        }
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        let mut open = self.responder.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.all -= 1;
        open.unverified -= usize::from(self.is_unverified);
        if let Some(of_source) = open.by_source.get_mut(&self.source) {
            of_source.all -= 1;
            of_source.unverified -= usize::from(self.is_unverified);
            if of_source.all == 0 {
                open.by_source.remove(&self.source);
            }
        }
        self.responder.series.connections.set(u64::try_from(open.all).unwrap_or(u64::MAX));
    }
}

/// Connections above a limit that still get a refusal with a reason; further ones are closed without a reply.
const REFUSALS_ABOVE_LIMIT: usize = 16;
