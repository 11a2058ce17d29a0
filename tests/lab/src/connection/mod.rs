//! The true events on TCP connections, from the log of the wire that they crossed.
//!
//! A stream is followed byte by byte: when each byte first entered the wire, and when it and all bytes before
//! it had been delivered. Bytes behind a gap wait in the receiver's kernel and do not count as delivered to
//! the reader.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::websocket::MessageFormat;
use pathmeter_proto::wire::{NtpTime, PeerTimestamp};

use crate::wire::{LogEntry, Wire, WireDirection};

/// A TCP connection across a wire.
#[derive(Debug)]
pub struct Connection {
    /// Address of the client.
    pub client: SocketAddr,
    /// Type of service of the first segment.
    pub tos: u8,
    /// Bytes from the client to the server.
    pub to_server: Stream,
    /// Bytes from the server to the client.
    pub to_client: Stream,
}

/// One direction of a connection. Times are CLOCK_REALTIME, in nanoseconds.
#[derive(Debug, Default)]
pub struct Stream {
    /// Sequence number of the first byte.
    first: Option<u32>,
    bytes: Vec<u8>,
    /// By end position: when all bytes before it had entered the wire for the first time.
    entered: Vec<(usize, u64)>,
    /// Segments that entered before an earlier part of the stream, because two processors send frames of one
    /// stream into a veth.
    pending: BTreeMap<usize, Box<[u8]>>,
    /// By end position: when all bytes before it had been delivered.
    arrived: Vec<(usize, ArrivedPrefix)>,
    /// Delivered ranges behind a gap: start and end position.
    arrived_ahead: BTreeMap<usize, usize>,
    /// Counts of the segments that entered the wire.
    pub segments: SegmentCounts,
}

/// When a position in the stream, and everything before it, was delivered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct ArrivedPrefix {
    at: TimeBounds,
    /// Whether later bytes were delivered earlier, or others so soon before or after that the receiver need
    /// not have run in between. The receiver's kernel joins such segments and keeps one timestamp for both;
    /// a program that finds one of them out of order does not trust the timestamps of any.
    is_joined: bool,
}

/// Lower and upper bound of a time in nanoseconds, such as the clock readings before and after an event.
pub type TimeBounds = (u64, u64);

/// Counts of the segments of a stream that entered the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentCounts {
    /// Segments with payload.
    pub data: u64,
    /// Segments with payload or SYN that had entered before.
    pub retransmitted: u64,
    /// Payload bytes of those segments.
    pub retransmitted_bytes: u64,
    /// Segments with payload of which no copy was delivered.
    pub dropped: u64,
    /// Payload bytes of those segments.
    pub dropped_bytes: u64,
}

/// The protocol on a connection: a preamble, then messages of a fixed length each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageProtocol {
    /// pathmeter's echo over TCP.
    Tcp {
        /// Length of a message in bytes.
        bytes: usize,
    },
    /// Messages over a WebSocket.
    WebSocket {
        /// Message format.
        format: MessageFormat,
        /// Length of a message in bytes.
        bytes: usize,
    },
}

/// A message and its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageExchange {
    /// Sequence number, from the message.
    pub sequence: u64,
    /// When the message was scheduled to leave, from the message. CLOCK_REALTIME, in nanoseconds.
    pub scheduled_at: u64,
    /// Transfer to the server.
    to_server: Transfer,
    /// Transfer to the client.
    to_client: Transfer,
    /// When the responder wrote the reply, from the reply; `None` if the protocol does not carry it.
    reply_sent_at: Option<u64>,
}

/// Transfer of one message in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Transfer {
    /// When all of it had entered the wire for the first time.
    entered: Option<u64>,
    /// When all of it, and all bytes before it, had been delivered.
    arrived: Option<ArrivedPrefix>,
}

impl Connection {
    /// Connections to `server` across the wire, in opening order; `forward` is the direction towards the
    /// server.
    #[must_use]
    pub fn read(wire: &Wire, forward: WireDirection, server: SocketAddr) -> Vec<Self> {
        wire.read(|log| Self::of(log, forward, server))
    }

    fn of(log: &[LogEntry], forward: WireDirection, server: SocketAddr) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        let mut current: BTreeMap<SocketAddr, usize> = BTreeMap::new();
        let mut arrivals: Vec<(TimeBounds, usize, WireDirection, usize, usize)> = Vec::new();
        for entry in log {
            let datagram = &entry.head.datagram;
            let Some(segment) = datagram.segment else { continue };
            let (own, other) = match entry.direction == forward {
                true => (datagram.source, datagram.destination),
                false => (datagram.destination, datagram.source),
            };
            if other != server {
                continue;
            }
            let begins = entry.direction == forward && segment.is_syn;
            let is_known = |index: &usize| {
                !begins || all[*index].to_server.first == Some(segment.sequence.wrapping_add(1))
            };
            let index = match current.get(&own).copied().filter(is_known) {
                Some(index) => index,
                None if begins => {
                    let (to_server, to_client) = (Stream::default(), Stream::default());
                    all.push(Self { client: own, tos: datagram.tos, to_server, to_client });
                    current.insert(own, all.len() - 1);
                    all.len() - 1
                }
                None => continue,
            };
            let Some((from, to)) = all[index].stream(entry.direction, forward).on_entered(entry) else {
                continue;
            };
            arrivals.extend(deliveries(entry).map(|span| (span, index, entry.direction, from, to)));
        }
        arrivals.sort_unstable_by_key(|(span, ..)| *span);
        for (span, index, way, from, to) in arrivals {
            all[index].stream(way, forward).on_delivered(span, from, to);
        }
        all
    }

    fn stream(&mut self, way: WireDirection, forward: WireDirection) -> &mut Stream {
        if way == forward { &mut self.to_server } else { &mut self.to_client }
    }

    /// The messages of the connection, in order.
    ///
    /// # Panics
    /// When the connection does not carry this protocol.
    #[must_use]
    pub fn exchanges(&self, protocol: MessageProtocol) -> Vec<MessageExchange> {
        let [to_server, to_client] =
            [&self.to_server, &self.to_client].map(|stream| protocol.preamble_bytes(&stream.bytes));
        let [step_there, step_back] = protocol.frame_bytes();
        let count = self.to_server.bytes.len().saturating_sub(to_server) / step_there;
        (0..count)
            .map(|index| {
                let request = to_server + index * step_there..to_server + (index + 1) * step_there;
                let reply = to_client + index * step_back..to_client + (index + 1) * step_back;
                let sent = self.to_server.transfer(request.end);
                let near = sent.entered.expect("every byte of the stream entered the wire");
                let (sequence, timestamp) = protocol.read(&self.to_server.bytes[request]);
                let reply_sent_at =
                    self.to_client.bytes.get(reply.clone()).and_then(|bytes| protocol.reply_time(bytes));
                MessageExchange {
                    sequence,
                    scheduled_at: wall(timestamp, near),
                    to_server: sent,
                    to_client: self.to_client.transfer(reply.end),
                    reply_sent_at: reply_sent_at.map(|timestamp| wall(timestamp, near)),
                }
            })
            .collect()
    }
}

/// Longest time between a program's last clock reading and the wire for a message that was sent at once. A
/// message that entered later had to wait in the stream. Chosen: the time slice of a busy machine.
const PROMPT_SEND_MAX: u64 = 5_000_000;

impl MessageExchange {
    /// Whether the reply was delivered.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.to_client.arrived.is_some()
    }

    /// Bounds of the time from the scheduled departure to the delivery of the reply. `None` without a reply.
    #[must_use]
    pub fn elapsed(&self) -> Option<TimeBounds> {
        let (from, to) = self.to_client.arrived?.at;
        Some((from.saturating_sub(self.scheduled_at), to.saturating_sub(self.scheduled_at)))
    }

    /// How much later than it arrived a program may take the message, or its reply, to have arrived: it does
    /// not trust the timestamps of joined bytes, and knows only when it read them. The responder had read the
    /// message when it replied; the client reads a reply within `wake_up_max`.
    #[must_use]
    pub fn lateness_max(&self, wake_up_max: u64) -> u64 {
        let is_joined = |transfer: Transfer| transfer.arrived.is_some_and(|arrival| arrival.is_joined);
        let reached = self.to_server.arrived.map_or(0, |arrival| arrival.at.0);
        let replied_after = self.reply_sent_at.map_or(0, |at| at.saturating_sub(reached));
        // What arrived before a late read was read together with the message.
        let is_doubtful = is_joined(self.to_server) || replied_after > PROMPT_SEND_MAX;
        let at_server = if is_doubtful { replied_after } else { 0 };
        at_server + if is_joined(self.to_client) { wake_up_max } else { 0 }
    }

    /// How long the message waited before it entered the wire, if longer than 5 ms.
    #[must_use]
    pub fn waited(&self) -> Option<u64> {
        let waited = self.to_server.entered?.saturating_sub(self.scheduled_at);
        (waited > PROMPT_SEND_MAX).then_some(waited)
    }

    /// Bounds of the round trip, from the scheduled departure to the delivery of the reply and all bytes
    /// before it. Excludes the responder's time if the reply carries its send time. `None` without a reply.
    ///
    /// A message sent at once may have left as late as it entered the wire; one that had to wait counts from
    /// its scheduled departure.
    ///
    /// # Panics
    /// When the message left before its schedule, or the reply was written before the message arrived.
    #[must_use]
    pub fn round_trip(&self) -> Option<TimeBounds> {
        const EARLY: u64 = 1_000_000;
        let (reached, came) = (self.to_server.arrived?.at, self.to_client.arrived?.at);
        let began = start_bounds(self.scheduled_at, self.to_server.entered?);
        assert!(self.scheduled_at <= began.1 + EARLY, "{self:?} left before its schedule");
        let Some(reply_sent_at) = self.reply_sent_at else {
            return Some((came.0 - began.1, came.1 - began.0));
        };
        assert!(reached.0 <= reply_sent_at + EARLY, "{self:?} was answered before it arrived");
        let replied = start_bounds(reply_sent_at, self.to_client.entered?);
        let sum = |to_server: u64, to_client: u64| to_server + to_client;
        let least = sum(reached.0.saturating_sub(began.1), came.0.saturating_sub(replied.1));
        Some((least, sum(reached.1 - began.0.min(reached.1), came.1 - replied.0.min(came.1))))
    }
}

/// Bounds of the true departure of something that was scheduled at one time and entered the wire at another.
fn start_bounds(scheduled_at: u64, entered: u64) -> TimeBounds {
    if entered.saturating_sub(scheduled_at) > PROMPT_SEND_MAX {
        (scheduled_at, scheduled_at)
    } else {
        (scheduled_at.min(entered), entered)
    }
}

impl MessageProtocol {
    /// Length of a stream before its first message.
    fn preamble_bytes(self, bytes: &[u8]) -> usize {
        match self {
            Self::Tcp { .. } => pathmeter_proto::wire::stream::GREETING_BYTES,
            Self::WebSocket { .. } => {
                let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
                end.map_or(usize::MAX / 2, |at| at + 4)
            }
        }
    }

    /// Bytes from one message to the next, to the server and to the client.
    fn frame_bytes(self) -> [usize; 2] {
        match self {
            Self::Tcp { bytes } => [bytes, bytes],
            // RFC 6455 section 5.2; clients mask their frames.
            Self::WebSocket { bytes, .. } => {
                let head = if bytes < 126 { 2 } else { 4 };
                [head + 4 + bytes, head + bytes]
            }
        }
    }

    /// Sequence number and scheduled departure of a message.
    fn read(self, frame: &[u8]) -> (u64, u64) {
        match self {
            Self::Tcp { .. } => (number(frame, 8), number(frame, 16)),
            Self::WebSocket { format, bytes } => {
                let (head, body) = frame.split_at(frame.len() - bytes);
                let mask = &head[head.len() - 4..];
                let body: Vec<u8> = body.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b).collect();
                let message = format.decode(&body, bytes).expect("the frame carries a pathmeter message");
                (message.sequence, message.timestamp.0)
            }
        }
    }

    /// When a reply was written, if it carries that.
    fn reply_time(self, frame: &[u8]) -> Option<u64> {
        match self {
            Self::Tcp { .. } => Some(number(frame, 32)),
            Self::WebSocket { .. } => None,
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

/// Converts an NTP timestamp to nanoseconds since 1970; `near` is a time in the same era.
fn wall(timestamp: u64, near: u64) -> u64 {
    let other = PeerTimestamp::from_ntp(NtpTime::from(WallTime::from_nanos(near)).0);
    near.saturating_add_signed(PeerTimestamp::from_ntp(timestamp).signed_since(other))
}

impl Stream {
    /// Records a segment. Returns the start and end position of its payload, if it has one.
    fn on_entered(&mut self, entry: &LogEntry) -> Option<(usize, usize)> {
        let segment = entry.head.datagram.segment?;
        if segment.is_syn {
            self.segments.retransmitted += u64::from(self.first.is_some());
            self.first = Some(segment.sequence.wrapping_add(1));
        }
        let tcp_payload = entry.tcp_payload.as_deref()?;
        // Streams in the lab are shorter than the sequence number space.
        let from = segment.sequence.wrapping_sub(self.first?) as usize;
        let to = from + tcp_payload.len();
        let is_again = from < self.bytes.len() || self.pending.contains_key(&from);
        let bytes = tcp_payload.len() as u64;
        self.segments.data += 1;
        self.segments.retransmitted += u64::from(is_again);
        self.segments.retransmitted_bytes += if is_again { bytes } else { 0 };
        if deliveries(entry).next().is_none() && !is_under_way(entry) {
            self.segments.dropped += 1;
            self.segments.dropped_bytes += bytes;
        }
        if to > self.bytes.len() {
            self.pending.insert(from, tcp_payload.into());
            self.append(entry.at);
        }
        Some((from, to))
    }

    /// Appends pending segments that are now in order.
    fn append(&mut self, at: u64) {
        let before = self.bytes.len();
        while let Some(entry) = self.pending.first_entry().filter(|entry| *entry.key() <= self.bytes.len()) {
            let (from, tcp_payload) = entry.remove_entry();
            let known = (self.bytes.len() - from).min(tcp_payload.len());
            self.bytes.extend_from_slice(&tcp_payload[known..]);
        }
        if self.bytes.len() > before {
            self.entered.push((self.bytes.len(), at));
        }
    }

    /// Records a delivery. Must be called in time order.
    fn on_delivered(&mut self, span: TimeBounds, from: usize, to: usize) {
        let (contiguous_end, ArrivedPrefix { at: latest, .. }) =
            self.arrived.last().copied().unwrap_or_default();
        let end = self.arrived_ahead.entry(from).or_default();
        *end = to.max(*end);
        let mut next = contiguous_end;
        while let Some(entry) = self.arrived_ahead.first_entry().filter(|entry| *entry.key() <= next) {
            next = next.max(entry.remove());
        }
        if next > contiguous_end {
            let at = (span.0.max(latest.0), span.1.max(latest.1));
            self.arrived.push((next, ArrivedPrefix { at, is_joined: next > to }));
        }
    }

    /// The transfer of everything before a position.
    fn transfer(&self, end: usize) -> Transfer {
        let entered = self.entered.get(index_of(&self.entered, end)).map(|(_, at)| *at);
        let (earlier, reached) = self.arrived.split_at(index_of(&self.arrived, end));
        let arrived = reached.split_first().map(|((_, arrival), later)| {
            let is_soon = |from: &ArrivedPrefix, to: &ArrivedPrefix| to.at.0 - from.at.0 < PROMPT_SEND_MAX;
            let is_followed = later.first().is_some_and(|(_, next)| is_soon(arrival, next));
            let is_preceded = earlier.last().is_some_and(|(_, previous)| is_soon(previous, arrival));
            ArrivedPrefix { is_joined: arrival.is_joined || is_followed || is_preceded, ..*arrival }
        });
        Transfer { entered, arrived }
    }
}

/// The index of the first entry that reaches `end`, of entries sorted by end position.
fn index_of<T>(all: &[(usize, T)], end: usize) -> usize {
    all.partition_point(|(to, _)| *to < end)
}

/// When undamaged copies were delivered.
fn deliveries(entry: &LogEntry) -> impl Iterator<Item = TimeBounds> + '_ {
    let copies = entry.outcome.iter().flatten().flatten();
    copies.filter(|exit| exit.damage.is_none()).filter_map(|exit| exit.delivered_at)
}

fn is_under_way(entry: &LogEntry) -> bool {
    entry.outcome.iter().flatten().flatten().any(|exit| exit.delivered_at.is_none())
}

#[cfg(test)]
mod tests;
