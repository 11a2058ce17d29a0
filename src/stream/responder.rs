//! The answering side of echo over TCP, on the agent port.

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
use pathmeter_proto::wire::stream::{
    Admittance, GREETING_BYTES, GreetingProof, Hello, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN, PURPOSE, Seal,
    Welcome,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::arrivals::Arrivals;
use super::kernel;
use crate::clock::Clock;
use crate::metrics::agent::{RefusalOrEnd, StreamResponderSeries};

/// How much a responder puts up with.
#[derive(Debug, Clone, Copy)]
pub struct ResponderLimits {
    /// Connections at once; further ones are told that there is no room.
    pub connections: usize,
    /// Connections of one source address; further ones are told that there is no room.
    pub connections_per_source: usize,
    /// Connections at once whose source is not listed and has not proven a key; further ones are dropped unread.
    pub unverified: usize,
    /// The same of one source address.
    pub unverified_per_source: usize,
    /// The greeting has this long.
    pub greeting: Duration,
    /// Who does not take its replies for this long is disconnected.
    pub stall: Duration,
}

impl Default for ResponderLimits {
    /// Chosen: each connection may hold a message of 64 KiB; behind one address there may be a host that is measured by every
    /// probe of every agent.
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

/// After an idle minute the kernel asks whether the other side still lives, and gives up after another one.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// A source that asks faster than it may is read again after this long.
const PACE: Duration = Duration::from_millis(5);

/// After an error of accepting that is about us: the queue stays readable, so without a pause we would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Whom we answer, and with which keys. Changed as a whole.
#[derive(Debug, Clone, Default)]
pub struct StreamAccess {
    policy: Policy,
    keys: Option<Keys>,
}

impl StreamAccess {
    /// These. `keys`: the mesh's.
    #[must_use]
    pub fn new(policy: Policy, keys: Option<&Keys>) -> Self {
        Self { policy, keys: keys.map(|keys| keys.derive(PURPOSE)) }
    }
}

/// What all connections share.
#[derive(Debug)]
pub struct StreamResponder {
    terms: ArcSwap<StreamAccess>,
    limits: ResponderLimits,
    rates: Mutex<Rates>,
    open: Mutex<ConnectionLimits>,
    /// Whether nobody is answered any more.
    is_silent: AtomicBool,
    series: Arc<StreamResponderSeries>,
}

impl StreamResponder {
    /// One that answers on these terms.
    #[must_use]
    pub fn new(terms: StreamAccess, limits: ResponderLimits, series: Arc<StreamResponderSeries>) -> Self {
        Self {
            terms: ArcSwap::from_pointee(terms),
            limits,
            rates: Mutex::new(Rates::new()),
            open: Mutex::default(),
            is_silent: AtomicBool::new(false),
            series,
        }
    }

    /// Answers nobody any more: an answer after the goodbye would take it back. Connections stay until the stop, for one that
    /// ends before the goodbye is heard loses what is on it.
    pub fn fall_silent(&self) {
        self.is_silent.store(true, Relaxed);
    }

    /// Changes the terms. Connections that would not be granted any more end with their next message.
    pub fn change(&self, terms: StreamAccess) {
        self.terms.store(Arc::new(terms));
    }

    /// Answers until `stop` holds true or its sender is gone; connections end with it.
    pub async fn serve(self: Arc<Self>, listeners: Vec<TcpListener>, mut stop: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(Arc::clone(&self).accept(listener));
        }
        // A sender that is gone cannot stop us later: the same as a stop.
        let _ = stop.wait_for(|is_stopped| *is_stopped).await;
        tasks.shutdown().await;
    }

    async fn accept(self: Arc<Self>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut is_troubled = false;
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, source)) => {
                        is_troubled = false;
                        connections.spawn(Arc::clone(&self).host(stream, source));
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        self.series.accept_errors.inc();
                        if !std::mem::replace(&mut is_troubled, true) {
                            warn!(%error, "accepting connections on the agent port");
                        }
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn host(self: Arc<Self>, stream: TcpStream, source: SocketAddr) {
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        let outcome = match OpenConnection::open(&self, source.ip()) {
            Some(mut connection) => self.converse(stream, source, &mut connection).await,
            None => Err(RefusalOrEnd::Full),
        };
        if let Err(why) = outcome {
            self.series.unanswered(why);
            debug!(%source, ?why, "a connection to the agent port ended");
        }
    }

    async fn converse(
        &self,
        mut stream: TcpStream,
        source: SocketAddr,
        connection: &mut OpenConnection<'_>,
    ) -> Result<(), RefusalOrEnd> {
        let lost = |_: io::Error| RefusalOrEnd::ConnectErrorKind;
        set_options(&stream, self.limits.stall).map_err(lost)?;
        let mut greeting = [0; GREETING_BYTES];
        match timeout(self.limits.greeting, stream.read_exact(&mut greeting)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(RefusalOrEnd::Malformed),
            Err(_) => return Err(RefusalOrEnd::Silent),
        }
        let mut terms = self.terms.load_full();
        let (hello, proof) =
            Hello::decode(&greeting, terms.keys.as_ref()).map_err(|_| RefusalOrEnd::Malformed)?;
        let key = match (proof, &terms.keys) {
            (GreetingProof::By(id), Some(keys)) => Some(keys.key(id).clone()),
            (GreetingProof::By(_) | GreetingProof::None | GreetingProof::Wrong, _) => None,
        };
        let lengths = MESSAGE_BYTES_MIN..=MESSAGE_BYTES_MAX;
        let (admittance, refusal) = match proof {
            GreetingProof::Wrong => (Admittance::Unauthentic, Some(RefusalOrEnd::Unauthentic)),
            GreetingProof::None if !terms.policy.lists(source.ip()) => {
                (Admittance::Unlisted, Some(RefusalOrEnd::Unlisted))
            }
            GreetingProof::None | GreetingProof::By(_) if !connection.has_room => {
                (Admittance::Full, Some(RefusalOrEnd::Full))
            }
            GreetingProof::None | GreetingProof::By(_) if !lengths.contains(&hello.message_bytes) => {
                (Admittance::Length, Some(RefusalOrEnd::Malformed))
            }
            GreetingProof::None | GreetingProof::By(_) => (Admittance::Granted, None),
        };
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|_| RefusalOrEnd::ConnectErrorKind)?;
        let welcome = Welcome { admittance, nonce };
        stream.write_all(&welcome.encode(&hello, key.as_ref())).await.map_err(lost)?;
        if let Some(why) = refusal {
            return Err(why);
        }
        // Without stamps the times in the replies are ours.
        let _ = kernel::ask_for_arrivals(&stream);
        let seal = Seal::of(key.as_ref(), &hello, &welcome);
        let mut clock = Clock::new();
        let mut arrivals = Arrivals::new(Clock::now());
        let mut frame = vec![0; hello.message_bytes as usize];
        while let Some(timestamp) = read(&stream, &mut frame, &mut arrivals).await? {
            let (at, _) = arrivals.arrived(&stream, timestamp, &mut clock);
            let received = clock.offset().wall(at);
            seal.check_request(&frame).map_err(|_| RefusalOrEnd::Malformed)?;
            if key.is_some() {
                connection.proved();
            }
            let latest = self.terms.load();
            if !Arc::ptr_eq(&terms, &latest) {
                terms = Arc::clone(&latest);
                let (_, proof) =
                    Hello::decode(&greeting, terms.keys.as_ref()).map_err(|_| RefusalOrEnd::Malformed)?;
                match proof {
                    GreetingProof::By(_) => {}
                    GreetingProof::Wrong => return Err(RefusalOrEnd::Unauthentic),
                    GreetingProof::None if terms.policy.lists(source.ip()) => {}
                    GreetingProof::None => return Err(RefusalOrEnd::Unlisted),
                }
            }
            self.wait_for_turn(&terms.policy, source.ip()).await;
            if self.is_silent.load(Relaxed) {
                pending::<()>().await;
            }
            let (now, _) = clock.look();
            seal.reply(&mut frame, received, clock.offset().wall(now));
            match timeout(self.limits.stall, stream.write_all(&frame)).await {
                Ok(written) => written.map_err(lost)?,
                Err(_) => return Err(RefusalOrEnd::Stalled),
            }
            self.series.messages.inc();
        }
        Ok(())
    }

    /// Over its rate a source waits: nothing of a stream is thrown away.
    async fn wait_for_turn(&self, policy: &Policy, source: IpAddr) {
        loop {
            let taken = {
                let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
                rates.take(policy, source, Clock::now())
            };
            if taken.is_ok() {
                return;
            }
            sleep(PACE).await;
        }
    }
}

/// Reads one message and returns the kernel's stamp of its last byte, if there is one; `None` at the end between two messages.
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
                stream.readable().await.map_err(|_| RefusalOrEnd::ConnectErrorKind)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(RefusalOrEnd::ConnectErrorKind),
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

/// The connections that are open, as the limits count them.
#[derive(Debug, Default)]
struct ConnectionLimits {
    all: usize,
    /// Those whose source is not listed, and that have not proven a key with a message.
    unverified: usize,
    by_source: HashMap<IpAddr, SourceConnections>,
}

/// The connections of one source address.
#[derive(Debug, Clone, Copy, Default)]
struct SourceConnections {
    all: usize,
    unverified: usize,
}

/// An open connection; dropping it makes room for another.
struct OpenConnection<'a> {
    responder: &'a StreamResponder,
    source: IpAddr,
    is_unverified: bool,
    /// Whether it is within the limits; one that is not is refused with [`Admittance::Full`].
    has_room: bool,
}

impl<'a> OpenConnection<'a> {
    /// `None` over the hard limit, where a connection is dropped without a refusal.
    fn open(responder: &'a StreamResponder, source: IpAddr) -> Option<Self> {
        let is_unverified = !responder.terms.load().policy.lists(source);
        let limits = responder.limits;
        let source = rate_limit_key(source);
        let mut open = responder.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_source = open.by_source.get(&source).copied().unwrap_or_default();
        let over_limit = of_source.all >= limits.connections_per_source || open.all >= limits.connections;
        let too_many_unverified =
            open.unverified >= limits.unverified || of_source.unverified >= limits.unverified_per_source;
        let over_hard_limit = of_source.all >= limits.connections_per_source + SPARE
            || open.all >= limits.connections + SPARE
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

    /// It proved that it knows the key.
    fn proved(&mut self) {
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

/// Connections beyond a limit that are still refused with a reason; further ones are dropped unread.
const SPARE: usize = 16;
