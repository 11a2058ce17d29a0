//! The JSON bodies of requests for leases, and of the responses.

use pathmeter_proto::bandwidth::RunDirection;
use pathmeter_proto::bandwidth::lease::LeaseId;
use serde::{Deserialize, Serialize};

use crate::config::bandwidth::Method;

/// The body of a request for a lease. Fields may be added, for compatibility between versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The lease or place of an earlier response; `None` in the first request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// How the run measures.
    pub method: Method,
    /// The direction that it loads: `forward` is from the client to this agent.
    #[serde(with = "direction")]
    pub direction: RunDirection,
    /// Number of data connections, 1 to 16.
    pub connections: u16,
    /// Bytes of payload after which it ends; `None`: as many as this agent allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_max: Option<u64>,
    /// Seconds of sending after which it ends.
    pub seconds_max: u64,
    /// Bytes of payload per second that it may use; `None`: as many as the responder allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<u64>,
    /// DSCP of what this agent sends, 0 to 63.
    #[serde(default)]
    pub dscp: u8,
}

/// The response to a request for a lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum LeaseAnswer {
    /// The run may begin.
    Granted(Grant),
    /// Other runs come first. The client must repeat its request with `lease`.
    Waiting {
        /// The place in the queue.
        lease: String,
        /// 1 for the next one.
        position: usize,
        /// The time until the run can begin if those before it take as long as they may.
        expected_start_seconds: f64,
        /// When the request must be repeated.
        repeat_after_seconds: f64,
    },
    /// The run is refused.
    Refused {
        /// The cause.
        reason: RefusalReason,
        /// The cause and the remedy in words.
        detail: String,
        /// When a request may succeed; `None`: not without a change of this agent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_seconds: Option<f64>,
    },
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    /// Identifies the lease, as 16 hexadecimal digits.
    pub lease: String,
    /// The secret that the connections of the run prove, as 32 hexadecimal digits.
    pub secret: String,
    /// The port to connect to.
    pub agent_port: u16,
    /// When the lease expires if no connection is opened.
    pub activate_within_seconds: f64,
    /// Bytes of payload that the run may use.
    pub bytes_max: u64,
    /// Bytes of payload per second that the run may use; `None`: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_bytes_per_second: Option<u64>,
}

impl Grant {
    /// The lease and its secret; `None` if they are malformed.
    #[must_use]
    pub fn decode(&self) -> Option<(LeaseId, [u8; 16])> {
        let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex(&self.lease) || !is_hex(&self.secret) || self.secret.len() != 32 {
            return None;
        }
        let lease = u64::from_str_radix(&self.lease, 16).ok()?;
        let secret = u128::from_str_radix(&self.secret, 16).ok()?;
        Some((LeaseId(lease), secret.to_be_bytes()))
    }
}

/// Why a lease is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalReason {
    /// The client is not a peer, is not in an allowed network, and did not prove the key.
    NotAllowed,
    /// Runs are switched off.
    Disabled,
    /// No run begins in these hours.
    QuietHours,
    /// The agent is about to stop.
    Stopping,
    /// An operator has stopped all runs.
    Stopped,
    /// A value of the request is outside of what this agent allows.
    Invalid,
    /// The budget of the day has too few bytes left.
    Budget,
    /// Too many clients wait.
    QueueFull,
    /// A reason that this version does not know.
    #[serde(other)]
    Other,
}

mod direction {
    use pathmeter_proto::bandwidth::RunDirection;
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
    pub(super) fn serialize<S: Serializer>(direction: &RunDirection, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(direction.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<RunDirection, D::Error> {
        let text = String::deserialize(from)?;
        let known = [RunDirection::Forward, RunDirection::Reverse];
        let found = known.into_iter().find(|direction| direction.as_str() == text);
        found.ok_or_else(|| de::Error::unknown_variant(&text, &["forward", "reverse"]))
    }
}
