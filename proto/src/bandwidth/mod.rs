//! Bandwidth runs: who may run when, what a run may cost, and when it must stop.
//!
//! A run loads one direction of a path. It needs a lease of the responder ([`lease`]) and bytes of the
//! budgets of both ends ([`ledger`]), does not begin in [`quiet_hours`], never exceeds its rate
//! ([`rate_cap`]), and ends when it does harm ([`harm`]). [`throughput`] computes the result of a run over
//! TCP; what a run over UDP sends and measures is in [`load`](crate::load).

pub mod harm;
pub mod lease;
pub mod ledger;
pub mod quiet_hours;
pub mod rate_cap;
pub mod throughput;

/// The direction that a run loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RunDirection {
    /// From the prober to the responder.
    Forward,
    /// From the responder to the prober.
    Reverse,
}

impl RunDirection {
    /// The value of the label and of the JSON field `direction`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Reverse => "reverse",
        }
    }
}

/// An end of a run. Each signs with a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// The agent that requested the lease.
    Prober,
    /// The agent that granted it.
    Responder,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StopReason {
    /// It had sent all its bytes.
    Bytes,
    /// Its time was over.
    Time,
    /// It added too much delay for other traffic.
    Delay,
    /// Other traffic was lost.
    Loss,
    /// Routers marked its datagrams because of congestion (ECN).
    Congestion,
    /// The host of the receiver dropped its datagrams.
    Host,
    /// The lease ended before the run: it was revoked, or its time was over.
    Lease,
    /// The other end stopped answering or closed the connection.
    Peer,
    /// An operator stopped it.
    Operator,
}

impl StopReason {
    /// All reasons.
    pub const ALL: [Self; 9] = [
        Self::Bytes,
        Self::Time,
        Self::Delay,
        Self::Loss,
        Self::Congestion,
        Self::Host,
        Self::Lease,
        Self::Peer,
        Self::Operator,
    ];

    /// The value of the label and of the JSON field `stop_reason`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Time => "time",
            Self::Delay => "delay",
            Self::Loss => "loss",
            Self::Congestion => "congestion",
            Self::Host => "host",
            Self::Lease => "lease",
            Self::Peer => "peer",
            Self::Operator => "operator",
        }
    }
}

impl From<harm::Harm> for StopReason {
    fn from(harm: harm::Harm) -> Self {
        match harm {
            harm::Harm::Delay => Self::Delay,
            harm::Harm::Loss => Self::Loss,
        }
    }
}
