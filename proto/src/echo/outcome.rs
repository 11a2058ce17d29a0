//! What became of a datagram, and what was learnt from it.

use std::time::Duration;

use crate::machine::{IcmpKind, NotSent, TimestampSource};

/// The one final outcome of one datagram that left the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// Answered in time.
    Ok,
    /// Answered before it was given up, after a longer round trip than is good.
    Late,
    /// Not answered.
    Lost(Direction),
    /// Not answered, while a host at either end dropped datagrams that had arrived.
    HostDropped,
    /// Undecided when we, or the peer, stopped.
    Withdrawn,
}

/// On which half of the way. Claimed from positive evidence only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From prober to responder.
    Forward,
    /// From responder to prober.
    Reverse,
    /// No evidence.
    Unknown,
}

/// What a prober learns, as it learns it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EchoReport {
    /// A datagram left the host.
    Sent {
        /// Which flow.
        flow: u8,
        /// Which sequence number.
        sequence: u64,
    },
    /// Slots that passed without a send.
    Unsent(u64),
    /// A datagram did not leave the host.
    SendError(NotSent),
    /// A datagram's one verdict.
    Decided {
        /// Which flow.
        flow: u8,
        /// Which sequence number.
        sequence: u64,
        /// The verdict.
        verdict: Verdict,
        /// Present with [`Verdict::Ok`] and [`Verdict::Late`].
        sample: Option<RoundTrip>,
    },
    /// The difference between the round trips of two neighbours, both ok (RFC 3393, unsigned).
    Ipdv(Duration),
    /// A further copy of a reply (RFC 5560).
    Duplicate,
    /// A reply behind one with a higher sequence number (RFC 4737).
    Reordered,
    /// A reply after its datagram had been given up. Its verdict stays.
    VeryLate,
    /// A reply that is not an answer to what was sent.
    Mismatched(Mismatch),
    /// A first datagram was lost after one that was not.
    BurstBegan,
    /// A run of losses ended; its length in datagrams.
    BurstEnded(u32),
    /// An earlier reply left the responder this much after the time it carries.
    TransmitLag(Duration),
    /// The responder's times made no sense; its turnaround was not subtracted.
    TurnaroundInvalid,
    /// A router or the host complained.
    Icmp(IcmpKind),
    /// How many of the path's flows lose datagrams of late.
    LossyFlows(u8),
}

/// Why a reply was not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mismatch {
    /// It cannot be read.
    Malformed,
    /// Its HMAC is wrong.
    Unauthentic,
    /// It answers something that was not sent.
    Unsolicited,
}

/// What one answered datagram tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundTrip {
    /// (T4 − T1) − (T3 − T2): the network's part. With ICMP T4 − T1.
    pub rtt: Duration,
    /// T3 − T2: the responder's part; with ICMP zero.
    pub turnaround: Duration,
    /// `rtt` above the smallest of the last minute or two (PDV, RFC 5481 section 4.2).
    pub variation: Duration,
    /// The smallest `rtt` of the last minute or two.
    pub minimum: Duration,
    /// Who stamped T1.
    pub transmit: TimestampSource,
    /// Who stamped T4.
    pub receive: TimestampSource,
    /// Routers on the way there; `None` where the responder does not say or did not start at 255.
    pub hops_forward: Option<u8>,
    /// Routers on the way back.
    pub hops_reverse: Option<u8>,
    /// What became of the class of service on the way there; `None` where the responder does not say.
    pub class_forward: Option<Class>,
    /// What became of the class of service on the way back; `None` where the kernel did not say.
    pub class_reverse: Option<Class>,
}

impl RoundTrip {
    /// Of a reply that says nothing but that it is one, before its times are known.
    pub(super) const fn bare(receive: TimestampSource) -> Self {
        Self {
            rtt: Duration::ZERO,
            turnaround: Duration::ZERO,
            variation: Duration::ZERO,
            minimum: Duration::ZERO,
            transmit: TimestampSource::User,
            receive,
            hops_forward: None,
            hops_reverse: None,
            class_forward: None,
            class_reverse: None,
        }
    }
}

/// A class of service on arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// Whether the DSCP is another one than was sent.
    pub is_remarked: bool,
    /// Whether a router marked congestion (ECN CE).
    pub is_congested: bool,
}
