//! Requests at a rate that does not wait for answers.

use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use pathmeter_proto::wire::stamp::{Mode, Reply};

use super::super::batch::{Batch, Timestamps, socket_at};
use super::super::load;

/// Sockets from which requests come.
pub(super) const SOURCES: u32 = 16;

/// Datagrams that are handed over at once.
const BATCH: usize = 64;

/// One reply in so many is read.
const READ_EVERY: u32 = 16;

/// The longest that requests are made up for: what this process could not offer in time is not offered at all, and no burst
/// comes of it that nobody asked for.
const CATCH_UP_MAX: Duration = Duration::from_millis(2);

/// Between two turns, when nothing is due.
const PAUSE: Duration = Duration::from_micros(100);

/// Until the last answers have come.
const SETTLED: Duration = Duration::from_millis(300);

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestSources {
    /// Different addresses, at most one for each socket.
    pub(super) addresses: u32,
    /// Sessions, asked one after the other; a multiple of [`SOURCES`].
    pub(super) sessions: u32,
}

/// What was offered, and what came back.
#[derive(Debug, Default)]
pub(super) struct GeneratorResult {
    pub(super) requests: f64,
    pub(super) replies: f64,
    pub(super) span: Duration,
    /// Between arrival and reply, as the responder says; of one reply in 16, sorted.
    pub(super) turnarounds: Vec<Duration>,
    /// Replies that were read of sessions of which one had been read before.
    pub(super) repeated: f64,
    /// Those of them that say that they are the first of their session.
    pub(super) restarted: f64,
    /// Sessions of which a reply was read.
    seen_sessions: HashSet<u32>,
}

/// Sockets that ask.
pub(super) struct LoadGenerator {
    sources: Vec<Source>,
    inbox: Batch,
    result: GeneratorResult,
    read: u32,
    /// Where in a datagram its session stands.
    session_at: usize,
}

struct Source {
    socket: UdpSocket,
    outbox: Batch,
    /// Its first session; the others follow.
    first: u32,
    sessions: u32,
    sent_count: u32,
}

impl LoadGenerator {
    pub(super) fn new(sources: RequestSources, to: SocketAddrV4) -> io::Result<Self> {
        let sessions = sources.sessions / SOURCES;
        let sources = (0..SOURCES).map(|n| {
            // Below the targets of probers.
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

    /// Asks so often a second for so long; `on_window` is called once in a `window`.
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
            // Answers to what it asked a round ago.
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
    /// Returns how many left.
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

/// Where in a request its session stands.
fn session_at() -> usize {
    const MARK: u32 = 0xfeed_f00d;
    let request = load::request(MARK, 0);
    request.windows(4).position(|bytes| bytes == MARK.to_be_bytes()).expect("a request names its session")
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few hundred, never negative")]
fn whole(value: f64) -> usize {
    value as usize
}
