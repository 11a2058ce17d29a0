//! What a run does.

use std::time::Duration;

use pathmeter_proto::load::Pattern;

use super::leases::LeaseRequest;
use super::load::Reception;
use crate::config::bandwidth::Method;

/// How a run measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMethod {
    /// Payload over so many TCP connections.
    Tcp {
        /// Their number.
        streams: u16,
    },
    /// Trains of datagrams.
    Train,
    /// Datagrams at a rate, in bytes of payload per second.
    Check {
        /// The rate.
        rate: u64,
    },
}

impl RunMethod {
    /// What a request asks for; `None` if it asks for a check without a rate.
    #[must_use]
    pub fn of(request: &LeaseRequest) -> Option<Self> {
        match request.method {
            Method::Tcp => Some(Self::Tcp { streams: request.connections }),
            Method::Train => Some(Self::Train),
            Method::Check => request.rate_bytes_per_second.map(|rate| Self::Check { rate }),
        }
    }

    /// The rate of a check, in bytes of payload per second; `None` of other methods.
    pub(super) fn check_rate(self) -> Option<u64> {
        match self {
            Self::Check { rate } => Some(rate),
            Self::Tcp { .. } | Self::Train => None,
        }
    }

    /// What is sent over UDP; `None`: it is sent over TCP.
    pub(super) fn pattern(self, bytes_max: u64) -> Option<Pattern> {
        match self {
            Self::Tcp { .. } => None,
            Self::Train => Some(Pattern::trains(bytes_max)),
            Self::Check { rate } => Some(Pattern::Steady { bytes_per_second: rate }),
        }
    }

    /// How the datagrams are received. Those of trains have a time each.
    pub(super) fn reception(self) -> Reception {
        match self {
            Self::Tcp { .. } | Self::Check { .. } => Reception::Merged,
            Self::Train => Reception::Single,
        }
    }
}

/// What one end of a run does.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndpointPlan {
    /// Whether this end has begun the run. Only that end watches for harm.
    pub(super) is_prober: bool,
    /// Whether this end sends. The other end receives.
    pub(super) is_sender: bool,
    /// Bytes of payload after which the sender ends.
    pub(super) bytes_max: u64,
    /// Bytes of payload per second that the sender may send; `None`: no limit.
    pub(super) rate_max: Option<u64>,
    /// Time after which the sender ends.
    pub(super) duration: Duration,
}
