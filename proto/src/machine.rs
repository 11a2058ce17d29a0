//! The contract between a protocol, which decides, and its driver, which acts.
//!
//! A driver hands over what happened with [`received`](Machine::received), [`sent`](Machine::sent) and
//! [`not_sent`](Machine::not_sent), and after each of them calls [`step`](Machine::step) until it answers
//! [`Step::Wait`] or [`Step::Finished`]. `Wait` is the only normal way out and carries the deadline, so no driver can
//! forget it.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::time::{Timestamp, WallOffset};

/// A protocol that decides but never acts.
pub trait Machine {
    /// What it learns.
    type Report;

    /// A datagram came, or the quotation of one of ours in an ICMP error.
    fn received(&mut self, datagram: &[u8], arrival: &Arrival);

    /// A datagram is about to be handed to the kernel: the last chance to write into it when that is. Its length stays.
    fn leaving(&mut self, _id: SendId, _datagram: &mut [u8], _now: Now) {}

    /// A datagram left the host. Called at once with the time at which it was handed to the kernel, and again, better,
    /// when the kernel's own stamp arrives.
    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource);

    /// A datagram did not leave the host: our fault, never the network's.
    fn not_sent(&mut self, id: SendId, why: NotSent);

    /// Sends nothing more: [`Step::Finished`] follows when everything that left is decided. Ends a machine that only
    /// answers at once.
    fn stop(&mut self);

    /// Decides everything that is in flight without blaming the network, because this host cannot tell what became of it:
    /// after a suspend, or at a stop that cannot wait.
    fn withdraw(&mut self);

    /// The peer announced at `at` that it is leaving: what it does not answer from then on is not a loss.
    fn peer_leaving(&mut self, at: Timestamp);

    /// Datagrams that left this host and are neither answered nor given up, counted one by one.
    fn in_flight(&self) -> usize;

    /// What to do next. A datagram to send is appended to `arena`.
    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<Self::Report>;
}

/// What a machine asks of its driver.
#[derive(Debug, Clone, PartialEq)]
pub enum Step<R> {
    /// Send what was appended to the arena.
    Send(Send),
    /// Something was learnt.
    Report(R),
    /// Nothing to do until then, or until something happens.
    Wait(Timestamp),
    /// Nothing to do ever again.
    Finished,
}

/// What a driver knows about time when it calls.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// The monotonic clock.
    pub at: Timestamp,
    /// Everything that had arrived by then has been handed over: deadlines after it are not yet decided, so that a
    /// stalled process never turns a reply that waits in a socket into a loss.
    pub drained: Timestamp,
    /// The wall clock, for what travels on the wire.
    pub wall: WallOffset,
}

/// How a datagram is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Send {
    /// The machine's own name for it, unique within the machine while it matters.
    pub id: SendId,
    /// Which of the path's sockets.
    pub flow: u8,
    /// The address to send from; `None`: the socket's.
    pub from: Option<IpAddr>,
    /// Where to.
    pub to: SocketAddr,
    /// The IPv4 type of service or IPv6 traffic class.
    pub tos: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Whether it must arrive in one piece or not at all: neither routers nor our own host may fragment it, and what the host
    /// has heard of the path's MTU does not count. `false`: as the path's sockets have it.
    pub dont_fragment: bool,
    /// With `Some(n)`, the bytes are many datagrams of `n` bytes each, the last one possibly shorter.
    pub segment: Option<u16>,
    /// Whether the kernel's transmit stamp is worth its cost.
    pub timestamp: bool,
}

/// Time to live or hop limit of everything that is sent, so that a receiver knows the hops from what is left.
pub const SENT_TTL: u8 = 255;

/// A machine's own name for a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SendId(pub u64);

/// Who read the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TimestampSource {
    /// The kernel, where the datagram passed.
    Kernel,
    /// We, when we got round to it.
    User,
}

/// How and when something arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// When.
    pub at: Timestamp,
    /// By whose clock reading.
    pub by: TimestampSource,
    /// The sender. For an ICMP error, the destination of the quoted datagram.
    pub from: SocketAddr,
    /// The local address it was sent to; `None` where the kernel did not say.
    pub to: Option<IpAddr>,
    /// Which of the path's sockets.
    pub flow: u8,
    /// Time to live or hop limit as received; `None` where the kernel did not say.
    pub ttl: Option<u8>,
    /// Type of service or traffic class as received; `None` where the kernel did not say.
    pub tos: Option<u8>,
    /// Present when this is the quotation of a datagram of ours in an ICMP error.
    pub icmp: Option<IcmpError>,
}

/// An ICMP error about a datagram of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpError {
    /// The router or host that complains.
    pub router: IpAddr,
    /// What about.
    pub kind: IcmpKind,
    /// The next hop's MTU in bytes, from "too big".
    pub mtu: Option<u32>,
}

/// What an ICMP error says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IcmpKind {
    /// Nobody listens on that port: the host is there.
    PortUnreachable,
    /// The network, host or protocol cannot be reached.
    Unreachable,
    /// A firewall refused it.
    Prohibited,
    /// The datagram is larger than the next link.
    TooBig,
    /// The time to live ran out.
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
    /// Refused by a local firewall (EPERM, EACCES).
    Permission,
    /// Larger than the path's MTU (EMSGSIZE).
    TooBig,
    /// Anything else.
    Other,
}

/// What our own host dropped before we could read it, socket by socket.
///
/// A socket's drop counter says how many, never which. Each drop excuses one datagram that was undecided in that
/// window; the machines that share a socket share its drops.
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
    /// Windows that are remembered; at the limit the oldest is forgotten, and its datagrams count as lost.
    pub const WINDOWS: usize = 256;
    /// Drops that are no further apart than this share a window. Chosen: a few looks at the counters.
    const GAP: Duration = Duration::from_millis(50);

    /// The socket of `flow` dropped `count` datagrams between `from` and `to`.
    pub fn add(&mut self, flow: u8, from: Timestamp, to: Timestamp, count: u32) {
        if count == 0 {
            return;
        }
        self.total = self.total.wrapping_add(count);
        // Drops that go on are one long window: what was due in it may have been any of them.
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

    /// Takes one drop that may have been a datagram which was due on `flow` between `from` and `to`.
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

    /// Forgets windows that ended before `horizon`.
    pub fn forget(&mut self, horizon: Timestamp) {
        self.windows.retain(|w| w.to >= horizon && w.left > 0);
    }

    /// All drops so far, modulo 2³².
    #[must_use]
    pub fn total(&self) -> u32 {
        self.total
    }
}

/// How long a driver waits at most for a kernel transmit stamp before the user-space one is taken.
/// Chosen: 100 ms; the stamp normally arrives before the reply, and one that was dropped never comes.
pub const STAMP_WAIT: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_excuses_one_datagram_of_its_window_and_flow() {
        let at = Timestamp::from_nanos;
        let mut drops = HostDrops::default();
        drops.add(1, at(100), at(200), 2);
        assert!(!drops.claim(0, at(50), at(150)), "another socket");
        assert!(!drops.claim(1, at(201), at(300)), "sent after the drop");
        assert!(drops.claim(1, at(50), at(150)));
        assert!(drops.claim(1, at(150), at(400)));
        assert!(!drops.claim(1, at(150), at(400)), "both are spent");
        assert_eq!(drops.total(), 2);
    }
}
