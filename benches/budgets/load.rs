//! Requests in the format of pathmeter's prober, at a fixed rate or as fast as they are answered.

use std::io;
use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::NtpTime;
use pathmeter_proto::wire::stamp::{ERROR_ESTIMATE, Mode, Request};
use pathmeter_proto::wire::tlv::{self, ClassOfService, FollowUp, SessionRecord};

use super::batch::{Batch, Timestamps, socket};
use super::process::wall;

/// Number of source ports.
const SOURCES: u32 = 8;
/// Most datagrams outstanding, and sent at once, per source.
const WINDOW: usize = 64;
/// Without a reply for this long, outstanding requests are lost.
const REPLY_TIMEOUT: Duration = Duration::from_millis(20);

/// Rate of requests.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RequestRate {
    PerSecond(u32),
    /// As fast as replies come.
    Saturated,
}

/// Replies received, in total and per second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoadResult {
    pub(crate) replies: f64,
    pub(crate) per_second: f64,
}

/// Reserves `count` unused session numbers and returns the first. A used number from a new port would be
/// refused as a replay.
pub(crate) fn sessions(count: u32) -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(count, Ordering::Relaxed)
}

/// A request of this session with all extensions.
pub(crate) fn request(session: u32, sequence: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let timestamp = NtpTime::from(WallTime::from_nanos(wall()));
    Request { sequence, timestamp, error: ERROR_ESTIMATE, ssid: 1 }.encode(Mode::Open, &mut out);
    let record = SessionRecord { session, count_or_first: sequence + 1, ..SessionRecord::default() };
    record.write(tlv::append(&mut out, tlv::SESSION, SessionRecord::BYTES).value_mut(&mut out));
    tlv::append(&mut out, tlv::CLASS_OF_SERVICE, ClassOfService::BYTES);
    tlv::append(&mut out, tlv::FOLLOW_UP, FollowUp::BYTES);
    out
}

/// Sends requests to `to` for `span`.
pub(crate) fn generate(to: SocketAddrV4, rate_limit: RequestRate, span: Duration) -> io::Result<LoadResult> {
    let first = sessions(SOURCES);
    let mut sources =
        (first..first + SOURCES).map(|session| Source::new(session, to)).collect::<io::Result<Vec<_>>>()?;
    let mut received = Batch::new(WINDOW);
    let begin = Instant::now();
    let (mut sent, mut turns) = (0_u32, (0..sources.len()).cycle());
    while begin.elapsed() < span {
        match rate_limit {
            RequestRate::PerSecond(rate) => {
                let due = begin.elapsed().as_secs_f64() * f64::from(rate);
                while f64::from(sent) < due {
                    let turn = turns.next().expect("it never ends");
                    sources[turn].send(1);
                    sent += 1;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            RequestRate::Saturated => sources.iter_mut().for_each(|source| source.send(WINDOW)),
        }
        for source in &mut sources {
            source.receive(&mut received);
        }
    }
    let replies = sources.iter().map(|source| f64::from(source.replies)).sum();
    Ok(LoadResult { replies, per_second: replies / begin.elapsed().as_secs_f64() })
}

/// One source port.
struct Source {
    socket: UdpSocket,
    requests: Batch,
    sequence: u32,
    outstanding: usize,
    replies: u32,
    last_reply_at: Instant,
}

impl Source {
    fn new(session: u32, to: SocketAddrV4) -> io::Result<Self> {
        let mut requests = Batch::new(WINDOW);
        for index in 0..WINDOW {
            requests.put(index, to, &request(session, 0));
        }
        let socket = socket(Timestamps::None)?;
        Ok(Self { socket, requests, sequence: 0, outstanding: 0, replies: 0, last_reply_at: Instant::now() })
    }

    /// Sends as many requests as the window allows, at most `count`.
    fn send(&mut self, count: usize) {
        let count = count.min(WINDOW - self.outstanding);
        for index in 0..count {
            let sequence = self.sequence.wrapping_add(u32::try_from(index).expect("at most the window"));
            self.requests.bytes_mut(index)[..4].copy_from_slice(&sequence.to_be_bytes());
        }
        let sent = if count > 0 { self.requests.send(&self.socket, count) } else { 0 };
        self.sequence = self.sequence.wrapping_add(u32::try_from(sent).expect("at most the window"));
        self.outstanding += sent;
    }

    fn receive(&mut self, received: &mut Batch) {
        if self.outstanding == 0 {
            self.last_reply_at = Instant::now();
            return;
        }
        let count = received.receive(&self.socket, 0);
        self.replies += u32::try_from(count).expect("at most the window");
        self.outstanding = self.outstanding.saturating_sub(count);
        if count > 0 {
            self.last_reply_at = Instant::now();
        } else if self.last_reply_at.elapsed() > REPLY_TIMEOUT {
            self.outstanding = 0;
        }
    }
}
