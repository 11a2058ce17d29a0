//! The contract between a protocol, which decides, and its driver, which does the I/O.
//!
//! A driver reports events with [`received`](Machine::received), [`sent`](Machine::sent) and
//! [`not_sent`](Machine::not_sent). After each event it calls [`step`](Machine::step) until that returns
//! [`Step::Wait`] or [`Step::Finished`]. `Wait` is the only normal way out of this loop and carries the
//! deadline, so a driver cannot forget the deadline.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::time::{Timestamp, WallOffset};

/// A protocol without I/O: it receives events and returns what to do next.
///
/// # Examples
///
/// A machine that sends one datagram and reports the time until the reply, and the loop of a driver:
///
/// ```
/// use std::time::Duration;
///
/// use pathmeter_proto::machine::{
///     Arrival, HostDrops, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
/// };
/// use pathmeter_proto::time::{Timestamp, WallOffset, WallTime};
///
/// #[derive(Default)]
/// struct Ping {
///     is_requested: bool,
///     sent: Option<Timestamp>,
///     rtt: Option<Duration>,
///     is_stopping: bool,
/// }
///
/// impl Machine for Ping {
///     type Report = Duration;
///
///     fn received(&mut self, _: &[u8], arrival: &Arrival) {
///         self.rtt = self.sent.take().map(|sent| arrival.at.since(sent));
///     }
///
///     fn sent(&mut self, _: SendId, at: Timestamp, _: TimestampSource) {
///         self.sent = Some(at);
///     }
///
///     fn not_sent(&mut self, _: SendId, _: NotSent) {}
///
///     fn stop(&mut self) {
///         self.is_stopping = true;
///     }
///
///     fn withdraw(&mut self) {
///         self.sent = None;
///     }
///
///     fn peer_leaving(&mut self, _: Timestamp) {}
///
///     fn in_flight(&self) -> usize {
///         usize::from(self.sent.is_some())
///     }
///
///     fn step(&mut self, _: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<Duration> {
///         if let Some(rtt) = self.rtt.take() {
///             return Step::Report(rtt);
///         }
///         if self.is_stopping && self.sent.is_none() {
///             return Step::Finished;
///         }
///         if std::mem::replace(&mut self.is_requested, true) {
///             return Step::Wait(Timestamp::NEVER);
///         }
///         arena.extend_from_slice(b"ping");
///         Step::Send(Send {
///             id: SendId(0),
///             flow: 0,
///             from: None,
///             to: ([192, 0, 2, 1], 7).into(),
///             tos: 0,
///             ttl: 64,
///             dont_fragment: false,
///             segment: None,
///             timestamp: false,
///         })
///     }
/// }
///
/// /// Steps a machine until it waits or has finished, and returns its reports.
/// fn drive<M: Machine>(machine: &mut M, at: Timestamp) -> Vec<M::Report> {
///     let now = Now { at, drained: at, wall: WallOffset::between(at, WallTime::from_nanos(0)) };
///     let (mut drops, mut arena, mut reports) = (HostDrops::default(), Vec::new(), Vec::new());
///     loop {
///         arena.clear();
///         match machine.step(now, &mut drops, &mut arena) {
///             // A real driver passes the arena to a socket here.
///             Step::Send(send) => machine.sent(send.id, at, TimestampSource::User),
///             Step::Report(report) => reports.push(report),
///             Step::Wait(_) | Step::Finished => return reports,
///         }
///     }
/// }
///
/// let mut ping = Ping::default();
/// let start = Timestamp::from_nanos(0);
/// assert_eq!(drive(&mut ping, start), []);
/// assert_eq!(ping.in_flight(), 1);
///
/// let at = start + Duration::from_millis(20);
/// let arrival = Arrival {
///     at,
///     by: TimestampSource::Kernel,
///     from: ([192, 0, 2, 1], 7).into(),
///     to: None,
///     flow: 0,
///     ttl: None,
///     tos: None,
///     icmp: None,
/// };
/// ping.received(b"ping", &arrival);
/// assert_eq!(drive(&mut ping, at), [Duration::from_millis(20)]);
/// ```
pub trait Machine {
    /// What it reports to the driver.
    type Report;

    /// A datagram arrived, or an ICMP error arrived that quotes a datagram of this machine
    /// ([`Arrival::icmp`]).
    fn received(&mut self, datagram: &[u8], arrival: &Arrival);

    /// A datagram is about to be passed to the kernel. This is the last chance to write the send time into
    /// it. Its length must not change.
    fn before_send(&mut self, _id: SendId, _datagram: &mut [u8], _now: Now) {}

    /// A datagram left the host. The driver calls this at once with the time at which it passed the datagram
    /// to the kernel, and a second time, with a more exact time, when the kernel's transmit timestamp
    /// arrives.
    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource);

    /// A datagram did not leave the host. The cause is this host, not the network, so it does not count as a
    /// loss.
    fn not_sent(&mut self, id: SendId, why: NotSent);

    /// Stops sending. [`Step::Finished`] follows when every sent datagram has a verdict; a machine that only
    /// replies finishes at once.
    fn stop(&mut self);

    /// Decides all datagrams in flight as withdrawn, because this host cannot know what became of them: after
    /// a suspend, or when it must stop without waiting. They do not count as losses.
    fn withdraw(&mut self);

    /// The peer announced at `at` that it is about to stop. Datagrams that it does not answer after that are
    /// not losses.
    fn peer_leaving(&mut self, at: Timestamp);

    /// Number of datagrams that left this host and have no verdict yet. Takes time linear in that number.
    fn in_flight(&self) -> usize;

    /// Returns what to do next. A datagram to send is appended to `arena`.
    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<Self::Report>;
}

/// What a machine wants its driver to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Step<R> {
    /// Send the bytes that were appended to the arena.
    Send(Send),
    /// A result for the driver's user.
    Report(R),
    /// Nothing to do until this time or the next event.
    Wait(Timestamp),
    /// The machine has stopped and must not be called again.
    Finished,
}

/// The driver's clock readings for one call.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Reading of the monotonic clock.
    pub at: Timestamp,
    /// All datagrams that had arrived by this time were passed to the machine. Later deadlines stay
    /// undecided, so a stalled process never turns a reply that waits in a socket into a loss.
    pub drained: Timestamp,
    /// Offset of the wall clock, for timestamps in packets.
    pub wall: WallOffset,
}

/// How to send a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Send {
    /// Identifies the datagram in [`Machine::sent`] and [`Machine::not_sent`]; unique within the machine
    /// while either can still be called.
    pub id: SendId,
    /// Index of the flow: which of the path's sockets.
    pub flow: u8,
    /// Source address; `None`: the socket's own.
    pub from: Option<IpAddr>,
    /// Destination.
    pub to: SocketAddr,
    /// IPv4 type of service or IPv6 traffic class.
    pub tos: u8,
    /// IPv4 time to live or IPv6 hop limit.
    pub ttl: u8,
    /// Whether fragmentation is forbidden, by routers and by this host, and the path MTU that the host has
    /// cached is ignored. `false`: the setting of the path's sockets applies.
    pub dont_fragment: bool,
    /// `Some(n)`: the bytes are several datagrams of `n` bytes each; the last one may be shorter. `None`: one
    /// datagram.
    pub segment: Option<u16>,
    /// Whether the driver should request the kernel's transmit timestamp.
    pub timestamp: bool,
}

/// Initial TTL or hop limit of sent packets, so that hops = 255 − received TTL.
pub const SENT_TTL: u8 = 255;

/// Identifies a datagram within its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SendId(pub u64);

/// Where a timestamp was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TimestampSource {
    /// In the kernel, when the datagram passed through it.
    Kernel,
    /// In this process, so it includes scheduling delay.
    User,
}

/// Metadata of a received datagram or ICMP error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Time of arrival.
    pub at: Timestamp,
    /// Where `at` was taken.
    pub by: TimestampSource,
    /// Source address. For an ICMP error: the destination of the quoted datagram.
    pub from: SocketAddr,
    /// Local destination address; `None` if the kernel did not report it.
    pub to: Option<IpAddr>,
    /// Index of the flow: which of the path's sockets.
    pub flow: u8,
    /// Time to live or hop limit on arrival; `None` if the kernel did not report it.
    pub ttl: Option<u8>,
    /// Type of service or traffic class on arrival; `None` if the kernel did not report it.
    pub tos: Option<u8>,
    /// Present if this is an ICMP error; the bytes are then the quoted datagram, and what the router
    /// attached.
    pub icmp: Option<IcmpError>,
}

/// An ICMP error about a datagram that this host sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpError {
    /// The router or host that sent the error.
    pub router: IpAddr,
    /// Cause.
    pub kind: IcmpKind,
    /// Code of the ICMP or ICMPv6 message, which says more about the cause.
    pub code: u8,
    /// MTU of the next hop in bytes, from "fragmentation needed" or "packet too big"; `None` if the error
    /// carries none.
    pub mtu: Option<u32>,
    /// Offset in the received bytes of what the router attached (RFC 4884); `None` if it attached nothing.
    /// The quoted datagram before it may be padded with zeros.
    pub extensions_at: Option<u16>,
}

impl IcmpError {
    /// The part of the received bytes that is quoted. Of a quotation that is nothing but padding, nothing is
    /// left: the router quoted only headers.
    #[must_use]
    pub fn quotation<'a>(&self, received: &'a [u8]) -> &'a [u8] {
        let Some(at) = self.extensions_at else { return received };
        let quoted = received.get(..usize::from(at)).unwrap_or(received);
        if quoted.iter().all(|byte| *byte == 0) { &[] } else { quoted }
    }

    /// The part of the received bytes that the router attached, unchecked; see
    /// [`IcmpExtensions`](crate::wire::icmp_extensions::IcmpExtensions).
    #[must_use]
    pub fn extensions<'a>(&self, received: &'a [u8]) -> Option<&'a [u8]> {
        received.get(usize::from(self.extensions_at?)..)
    }
}

/// Cause of an ICMP error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IcmpKind {
    /// The port is closed; the host itself is reachable.
    PortUnreachable,
    /// The network, host or protocol cannot be reached.
    Unreachable,
    /// A firewall rejected the datagram.
    Prohibited,
    /// The datagram is larger than the MTU of the next link.
    TooBig,
    /// The time to live reached 0.
    TtlExceeded,
    /// Anything else.
    Other,
}

/// Why a datagram did not leave the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NotSent {
    /// No route (ENETUNREACH, EHOSTUNREACH).
    Unreachable,
    /// No buffer (ENOBUFS, EAGAIN, ENOMEM).
    Buffer,
    /// Rejected by a local firewall (EPERM, EACCES).
    Permission,
    /// Larger than the MTU (EMSGSIZE).
    TooBig,
    /// Anything else.
    Other,
}

impl NotSent {
    /// The reason in words.
    #[must_use]
    pub const fn as_text(self) -> &'static str {
        match self {
            Self::Unreachable => "no route from this host",
            Self::Buffer => "no buffer space on this host",
            Self::Permission => "not permitted, for example by a firewall of this host",
            Self::TooBig => "larger than the MTU",
            Self::Other => "rejected by the kernel of this host",
        }
    }
}

/// Datagrams that a host dropped before the process could read them, per socket.
///
/// A socket's drop counter tells how many datagrams were dropped but not which. Each drop therefore excuses
/// one datagram that was undecided in the drop's time window. Machines that share a socket share its drops.
#[derive(Debug, Clone, Default)]
pub struct HostDrops {
    windows: Vec<DropWindow>,
    total: u32,
}

#[derive(Debug, Clone, Copy)]
struct DropWindow {
    flow: u8,
    from: Timestamp,
    to: Timestamp,
    left: u32,
}

impl HostDrops {
    /// Number of windows that are kept. At the limit the oldest is discarded, and datagrams it would excuse
    /// count as lost.
    pub const WINDOWS: usize = 256;
    /// Drops no further apart than this share a window. Chosen: a few polls of the drop counters.
    const GAP: Duration = Duration::from_millis(50);

    /// Records that the socket of `flow` dropped `count` datagrams between `from` and `to`.
    pub fn add(&mut self, flow: u8, from: Timestamp, to: Timestamp, count: u32) {
        if count == 0 {
            return;
        }
        self.total = self.total.wrapping_add(count);
        // Continuous drops are one long window: any datagram due in it may be one of them.
        let goes_on = |w: &&mut DropWindow| w.flow == flow && from <= w.to + Self::GAP && w.left > 0;
        if let Some(last) = self.windows.iter_mut().rev().find(goes_on) {
            last.to = last.to.max(to);
            last.left += count;
            return;
        }
        if self.windows.len() == Self::WINDOWS {
            self.windows.remove(0);
        }
        self.windows.push(DropWindow { flow, from, to, left: count });
    }

    /// Takes one drop that may have been a datagram due on `flow` between `from` and `to`. Returns false if
    /// there is none.
    pub fn claim(&mut self, flow: u8, from: Timestamp, to: Timestamp) -> bool {
        let fits = |w: &&mut DropWindow| w.flow == flow && w.left > 0 && w.from <= to && from <= w.to;
        match self.windows.iter_mut().find(fits) {
            Some(window) => {
                window.left -= 1;
                true
            }
            None => false,
        }
    }

    /// Discards windows that ended before `horizon`.
    pub fn forget(&mut self, horizon: Timestamp) {
        self.windows.retain(|w| w.to >= horizon && w.left > 0);
    }

    /// Number of all drops so far, modulo 2³².
    #[must_use]
    pub fn total(&self) -> u32 {
        self.total
    }
}

/// How long a reply waits for its datagram's kernel transmit timestamp before the user-space one is used.
/// Chosen: 100 ms; the timestamp normally arrives before the reply, and if the kernel dropped it, it never
/// arrives.
pub const TX_TIMESTAMP_WAIT: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotation_ends_where_the_extensions_begin_and_is_more_than_padding() {
        let error = |extensions_at| IcmpError {
            router: [192, 0, 2, 1].into(),
            kind: IcmpKind::TtlExceeded,
            code: 0,
            mtu: None,
            extensions_at,
        };
        let received = [0, 7, 0, 0, 1, 2];
        let [none, some, beyond] = [None, Some(4), Some(7)].map(error);
        assert_eq!((none.quotation(&received), none.extensions(&received)), (&received[..], None));
        let (quotation, extensions) = (&received[..4], &received[4..]);
        assert_eq!((some.quotation(&received), some.extensions(&received)), (quotation, Some(extensions)));
        assert_eq!((beyond.quotation(&received), beyond.extensions(&received)), (&received[..], None));
        let padding = [0, 0, 0, 0, 1, 2];
        assert_eq!((some.quotation(&padding), some.extensions(&padding)), (&[][..], Some(extensions)));
        assert_eq!(none.quotation(&[0; 4]), [0; 4], "a quotation without extensions is not padded");
    }

    #[test]
    fn drop_excuses_one_datagram_of_its_window_and_flow() {
        let at = Timestamp::from_nanos;
        let mut drops = HostDrops::default();
        drops.add(1, at(100), at(200), 2);
        assert!(!drops.claim(0, at(50), at(150)), "another socket");
        assert!(!drops.claim(1, at(201), at(300)), "sent after the drop");
        assert!(drops.claim(1, at(50), at(150)));
        assert!(drops.claim(1, at(150), at(400)));
        assert!(!drops.claim(1, at(150), at(400)), "both drops are used");
        assert_eq!(drops.total(), 2);
    }
}
