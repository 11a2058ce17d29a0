//! Requests at a fixed rate, independent of replies.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use pathmeter_proto::wire::stamp::{Mode, Reply};

use super::super::batch::{Batch, Timestamps, socket_at};
use super::super::load;

/// Number of source sockets.
pub(super) const SOURCES: u32 = 16;

/// Datagrams per system call.
const BATCH: usize = 64;

/// One reply in this many is parsed.
const READ_EVERY: u32 = 16;

/// Longest delay that is caught up. Requests that this process could not send in time are skipped, so that it
/// sends no burst.
const CATCH_UP_MAX: Duration = Duration::from_millis(2);

/// Pause when no request is due.
const PAUSE: Duration = Duration::from_micros(100);

/// Time until the last replies have arrived.
const SETTLED: Duration = Duration::from_millis(300);

/// Sources of requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestSources {
    /// Number of source addresses, at most one per socket.
    pub(super) addresses: u32,
    /// Number of sessions, used in turn; a multiple of [`SOURCES`].
    pub(super) sessions: u32,
}

/// Requests sent and replies received.
#[derive(Debug, Default)]
pub(super) struct GeneratorResult {
    pub(super) requests: f64,
    pub(super) replies: f64,
    pub(super) span: Duration,
    /// Turnarounds from the replies: of one reply in 16, sorted.
    pub(super) turnarounds: Vec<Duration>,
    /// Parsed replies of sessions with an earlier parsed reply.
    pub(super) repeated: f64,
    /// Those of them that claim to be the first of their session.
    pub(super) restarted: f64,
    /// Sessions with a parsed reply.
    seen_sessions: HashSet<u32>,
}

/// Generates requests.
pub(super) struct LoadGenerator {
    sources: Vec<Source>,
    inbox: Batch,
    result: GeneratorResult,
    read: u32,
    /// Offset of the session number in a datagram.
    session_at: usize,
}

struct Source {
    socket: UdpSocket,
    outbox: Batch,
    /// First session; the others follow.
    first: u32,
    sessions: u32,
    sent_count: u32,
}

impl LoadGenerator {
    pub(super) fn new(sources: RequestSources, to: SocketAddrV4) -> io::Result<Self> {
        let sessions = sources.sessions / SOURCES;
        let sources = (0..SOURCES).map(|n| {
            // Below the addresses of targets.
            let address = Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + n % sources.addresses);
            let mut outbox = Batch::new(BATCH);
            (0..BATCH).for_each(|index| outbox.put(index, to, &load::request(0, 0)));
            let socket = socket_at(address, Timestamps::None)?;
            Ok(Source { socket, outbox, first: load::sessions(sessions), sessions, sent_count: 0 })
        });
        let sources = sources.collect::<io::Result<_>>()?;
        Ok(Self {
            sources,
            inbox: Batch::new(BATCH),
            result: GeneratorResult::default(),
            read: 0,
            session_at: session_at(),
        })
    }

    /// Sends requests at `rate` per second for `span`; calls `on_window` once per `window`.
    pub(super) fn run(
        mut self,
        rate: u32,
        span: Duration,
        window: Duration,
        mut on_window: impl FnMut() -> io::Result<()>,
    ) -> io::Result<GeneratorResult> {
        let begin = Instant::now();
        let (mut turn, mut settled_until, mut next_window) = (0, Duration::ZERO, window);
        loop {
            let now = begin.elapsed();
            if now >= next_window {
                on_window()?;
                next_window += window;
                settled_until = begin.elapsed();
                continue;
            }
            if now >= span {
                break;
            }
            settled_until = settled_until.max(now.saturating_sub(CATCH_UP_MAX));
            let due = (now - settled_until).as_secs_f64() * f64::from(rate);
            let count = whole(due).min(BATCH);
            if count == 0 {
                std::thread::sleep(PAUSE);
                continue;
            }
            turn = (turn + 1) % self.sources.len();
            // Replies to the requests of the previous round.
            self.receive(turn);
            let sent = self.sources[turn].send(count, self.session_at);
            self.result.requests += f64::from(sent);
            settled_until += Duration::from_secs_f64(f64::from(sent) / f64::from(rate));
            if count < BATCH {
                std::thread::sleep(PAUSE);
            }
        }
        self.result.span = begin.elapsed();
        let settled = Instant::now();
        while settled.elapsed() < SETTLED {
            (0..self.sources.len()).for_each(|turn| self.receive(turn));
            std::thread::sleep(PAUSE);
        }
        self.result.turnarounds.sort_unstable();
        Ok(self.result)
    }

    fn receive(&mut self, turn: usize) {
        loop {
            let count = self.inbox.receive(&self.sources[turn].socket, 0);
            for index in 0..count {
                self.result.replies += 1.0;
                self.read = (self.read + 1) % READ_EVERY;
                if self.read == 0
                    && let Ok(reply) = Reply::decode(self.inbox.bytes(index), Mode::Open)
                {
                    let session = &self.inbox.bytes(index)[self.session_at..self.session_at + 4];
                    let session = u32::from_be_bytes(session.try_into().expect("four bytes"));
                    self.result.record(session, &reply);
                }
            }
            if count < BATCH {
                return;
            }
        }
    }
}

impl GeneratorResult {
    fn record(&mut self, session: u32, reply: &Reply) {
        let turnaround = u64::try_from(reply.turnaround()).unwrap_or(0);
        self.turnarounds.push(Duration::from_nanos(turnaround));
        if !self.seen_sessions.insert(session) {
            self.repeated += 1.0;
            self.restarted += f64::from(u8::from(reply.sequence == 0));
        }
    }
}

impl Source {
    /// Returns how many were sent.
    fn send(&mut self, count: usize, session_at: usize) -> u32 {
        for index in 0..count {
            let number = self.sent_count.wrapping_add(u32::try_from(index).expect("at most a batch"));
            let (session, sequence) = (self.first + number % self.sessions, number / self.sessions);
            let datagram = self.outbox.bytes_mut(index);
            datagram[..4].copy_from_slice(&sequence.to_be_bytes());
            datagram[session_at..session_at + 4].copy_from_slice(&session.to_be_bytes());
        }
        let sent = u32::try_from(self.outbox.send(&self.socket, count)).expect("at most a batch");
        self.sent_count = self.sent_count.wrapping_add(sent);
        sent
    }
}

/// Offset of the session number in a request.
fn session_at() -> usize {
    const MARK: u32 = 0xfeed_f00d;
    let request = load::request(MARK, 0);
    request.windows(4).position(|bytes| bytes == MARK.to_be_bytes()).expect("a request names its session")
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few hundred, never negative")]
fn whole(value: f64) -> usize {
    value as usize
}
