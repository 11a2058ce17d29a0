//! Verdicts and reports of echo measurements.

use std::time::Duration;

use crate::machine::{IcmpKind, NotSent, TimestampSource};
use crate::time::Timestamp;
use crate::wire::PeerTimestamp;

/// The final outcome of a datagram that left the host. Each datagram gets exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// Answered, and the round trip was at most `late_after`.
    Ok,
    /// Answered within `lost_after`, but the round trip was longer than `late_after`.
    Late,
    /// Not answered within `lost_after`.
    Lost(Direction),
    /// Not answered, and a host at either end dropped received datagrams at that time.
    HostDropped,
    /// Undecided when the prober or the peer stopped. Not a loss.
    Withdrawn,
}

/// Where a datagram was lost. Claimed only with positive evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// On the way from prober to responder.
    Forward,
    /// On the way from responder to prober.
    Reverse,
    /// Not known.
    Unknown,
}

/// An event that a prober reports, in the order in which they happen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EchoReport {
    /// A datagram left the host.
    Sent {
        /// Flow index.
        flow: u8,
        /// Sequence number.
        sequence: u64,
    },
    /// Number of slots that passed without a send.
    Unsent(u64),
    /// A datagram did not leave the host.
    SendError(NotSent),
    /// The final verdict on a datagram.
    Decided {
        /// Flow index.
        flow: u8,
        /// Sequence number.
        sequence: u64,
        /// The verdict.
        verdict: Verdict,
        /// Present for [`Verdict::Ok`] and [`Verdict::Late`].
        sample: Option<RoundTrip>,
    },
    /// Difference between the round trips of two consecutive datagrams that are both ok (RFC 3393, absolute
    /// value).
    Ipdv(Duration),
    /// A duplicate reply (RFC 5560).
    Duplicate,
    /// A reply after one with a higher sequence number (RFC 4737).
    Reordered,
    /// A reply to a datagram that already had been given up. The verdict does not change.
    VeryLate,
    /// A received datagram that is not a valid reply.
    Mismatched(Mismatch),
    /// A loss after a datagram that was not lost: a burst began.
    BurstBegan,
    /// A burst ended; its length in datagrams.
    BurstEnded(u32),
    /// An earlier reply left the responder this much later than the time it carries.
    TransmitLag(Duration),
    /// The responder's timestamps are not plausible; its turnaround was not subtracted.
    TurnaroundInvalid,
    /// An ICMP error arrived.
    Icmp(IcmpKind),
    /// Number of the path's flows with recent loss. Reported when it changes.
    LossyFlows(u8),
}

/// Why a reply was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mismatch {
    /// It cannot be decoded.
    Malformed,
    /// Its HMAC is wrong.
    Unauthentic,
    /// It does not match a datagram that was sent.
    Unsolicited,
}

/// Measurements from one answered datagram.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundTrip {
    /// (T4 − T1) − (T3 − T2), the network's part; with ICMP T4 − T1.
    pub rtt: Duration,
    /// T1.
    pub sent: Timestamp,
    /// T2, on the responder's clock; `None` if the responder does not report it.
    pub responder_received: Option<PeerTimestamp>,
    /// T3 − T2, the responder's part; zero with ICMP.
    pub turnaround: Duration,
    /// `rtt` minus `minimum` (PDV, RFC 5481 section 4.2).
    pub variation: Duration,
    /// The smallest `rtt` of the last one to two minutes.
    pub minimum: Duration,
    /// Source of T1.
    pub transmit: TimestampSource,
    /// Source of T4.
    pub receive: TimestampSource,
    /// Routers from prober to responder; `None` if the responder does not report it or is not known to send
    /// with a TTL of 255.
    pub hops_forward: Option<u8>,
    /// Routers from responder to prober.
    pub hops_reverse: Option<u8>,
    /// Class of service as it arrived at the responder; `None` if the responder does not report it.
    pub class_forward: Option<Class>,
    /// Class of service as it arrived at the prober; `None` if the kernel did not report it.
    pub class_reverse: Option<Class>,
}

impl RoundTrip {
    /// A sample with only its receive source set; the times are filled in later.
    pub(super) const fn empty(receive: TimestampSource) -> Self {
        Self {
            rtt: Duration::ZERO,
            sent: Timestamp::from_nanos(0),
            responder_received: None,
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

/// Class of service on arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// Whether the DSCP differs from the one that was sent.
    pub is_remarked: bool,
    /// Whether a router marked congestion (ECN CE).
    pub is_congested: bool,
}
