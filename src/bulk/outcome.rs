//! The outcome of a run, and what it says about the path.

use std::time::Duration;

use pathmeter_proto::bandwidth::harm::LoadedLatency;
use pathmeter_proto::bandwidth::throughput::{SteadyRate, steady_rate};
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::wire::bandwidth::{RunResult, SenderStatistics};
use serde_json::{Value, json};

use super::endpoint::EndpointOutcome;
use crate::config::bandwidth::Method;

/// The outcome of a run in one direction.
#[derive(Debug, Clone, PartialEq)]
pub struct RunOutcome {
    /// The direction that was loaded.
    pub direction: RunDirection,
    /// How it was measured.
    pub method: Method,
    /// Data connections.
    pub streams: u16,
    /// Bytes of payload per second after the slow start, and the time that it is the mean of; `None` if too
    /// little was received.
    pub steady: Option<SteadyRate>,
    /// Bytes of payload that the receiver received.
    pub bytes: u64,
    /// From the start to the last byte, by the clock of the receiver.
    pub duration: Duration,
    /// Why it ended.
    pub stop_reason: StopReason,
    /// What limited it.
    pub limited_by: LimitedBy,
    /// What the kernel of the sender counted.
    pub sender: SenderStatistics,
    /// Latency of the path, idle and under this load; `None` if it was not measured.
    pub latency: Option<LoadedLatency>,
}

/// What limited the throughput of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LimitedBy {
    /// The path: data was lost, or waited in a queue.
    Path,
    /// The send buffer of the sender.
    Sender,
    /// The receiver: its window.
    Receiver,
    /// The limit of the rate.
    RateMax,
    /// Not known: for example the processor of one end, or a congestion window that was still growing.
    Unknown,
}

impl LimitedBy {
    /// The value of the label and of the JSON field `limited_by`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Path => "path",
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::RateMax => "rate_max",
            Self::Unknown => "unknown",
        }
    }
}

/// A limit is one if it applied for this part of the run, in percent. Chosen: TCP fills the rest of the time.
const LIMITED_PERCENT: u64 = 20;

/// A run is limited by loss if so many segments, and one byte in so many, were sent again. Chosen: congestion
/// controls that fill a queue lose more.
const LOST_SEGMENTS_MIN: u32 = 10;
const LOSS_LIMITED_ONE_IN: u64 = 1_000;

/// A run has filled a queue of the path if it added so much delay. Chosen: a host under load delays replies
/// by less.
const QUEUE_DELAY_MIN: Duration = Duration::from_millis(2);

/// A shorter part of a run says too little about the capacity. Chosen: within some percent of it in the lab.
const CAPACITY_SPAN_MIN: Duration = Duration::from_millis(80);
const CAPACITY_BYTES_MIN: u128 = 50 * 1_448;

/// A run has reached its limit of the rate from this part of it on, in percent. Chosen: the kernel counts
/// headers, which the throughput leaves out.
const RATE_PERCENT: u64 = 90;

impl RunOutcome {
    /// The outcome of a run from what its prober learnt. `rate_max`: the limit of the rate in bytes per
    /// second.
    pub(super) fn new(
        direction: RunDirection,
        streams: u16,
        rate_max: Option<u64>,
        end: EndpointOutcome,
    ) -> Self {
        let EndpointOutcome { own, other, samples } = end;
        let last = samples.last().copied().unwrap_or_default();
        let (sender, received) = match direction {
            RunDirection::Forward => (Some(&own), other.as_ref()),
            RunDirection::Reverse => (other.as_ref(), Some(&own)),
        };
        let steady = steady_rate(&samples).filter(|_| last.bytes > 0);
        let statistics = sender.map(|sender| sender.sender.clone()).unwrap_or_default();
        let stop_reason = stop_reason(&own, other.as_ref());
        let duration = Duration::from_nanos(received.map_or(last.at.as_nanos(), |result| result.nanos));
        let is_at_rate_max = |throughput: u64| {
            rate_max
                .is_some_and(|max| u128::from(throughput) * 100 >= u128::from(max) * u128::from(RATE_PERCENT))
        };
        let bytes = received.map_or(last.bytes, |result| result.bytes);
        let limited_by = match (stop_reason, steady) {
            (StopReason::Delay | StopReason::Loss, _) => LimitedBy::Path,
            (_, Some(steady)) if is_at_rate_max(steady.bytes_per_second) => LimitedBy::RateMax,
            (_, _) => limit_of(&statistics, bytes, duration),
        };
        Self {
            direction,
            method: Method::Tcp,
            streams,
            steady,
            bytes,
            duration,
            stop_reason,
            limited_by,
            sender: statistics,
            latency: None,
        }
    }

    /// Adds the latency of the path. A run that was not limited by anything else and has delayed other
    /// traffic has filled a queue of the path.
    #[must_use]
    pub fn with_latency(self, latency: Option<LoadedLatency>) -> Self {
        let has_queue = latency.is_some_and(|latency| latency.added_delay >= QUEUE_DELAY_MIN);
        let is_path = self.limited_by == LimitedBy::Unknown && has_queue;
        let limited_by = if is_path { LimitedBy::Path } else { self.limited_by };
        Self { latency, limited_by, ..self }
    }

    /// Whether the throughput is the capacity of the path. Otherwise the capacity is at least the throughput.
    #[must_use]
    pub fn is_capacity(&self) -> bool {
        let is_long = |steady: SteadyRate| {
            let bytes = u128::from(steady.bytes_per_second) * steady.span.as_millis() / 1_000;
            steady.span >= CAPACITY_SPAN_MIN && bytes >= CAPACITY_BYTES_MIN
        };
        self.limited_by == LimitedBy::Path && self.steady.is_some_and(is_long)
    }

    /// Bytes of payload per second after the slow start; `None` if too little was received.
    #[must_use]
    pub fn throughput(&self) -> Option<u64> {
        self.steady.map(|steady| steady.bytes_per_second)
    }

    /// The part of the payload that was sent again; `None` if nothing was received.
    #[must_use]
    pub fn loss_ratio(&self) -> Option<f64> {
        let sent = self.bytes.checked_add(self.sender.bytes_retransmitted).filter(|sent| *sent > 0)?;
        #[expect(clippy::cast_precision_loss, reason = "a ratio needs no more than 52 bits")]
        let ratio = self.sender.bytes_retransmitted as f64 / sent as f64;
        Some(ratio)
    }

    /// The JSON object of this direction.
    #[must_use]
    pub fn json(&self) -> Value {
        let seconds =
            |of: fn(&LoadedLatency) -> Duration| self.latency.as_ref().map(|found| of(found).as_secs_f64());
        let one_way = self.latency.and_then(|latency| latency.added_one_way);
        json!({
            "direction": self.direction.as_str(),
            "method": self.method.as_str(),
            "throughput_bytes_per_second": self.throughput(),
            "bytes": self.bytes,
            "duration_seconds": self.duration.as_secs_f64(),
            "stop_reason": self.stop_reason.as_str(),
            "is_capacity": self.is_capacity(),
            "limited_by": self.limited_by.as_str(),
            "streams": self.streams,
            "congestion_control": Some(&self.sender.congestion_control).filter(|name| !name.is_empty()),
            "retransmits": self.sender.retransmits,
            "loss_ratio": self.loss_ratio(),
            "idle_rtt_seconds": seconds(|latency| latency.idle_rtt),
            "loaded_rtt_seconds": seconds(|latency| latency.loaded_rtt),
            "added_delay_seconds": seconds(|latency| latency.added_delay),
            "added_delay_forward_seconds": one_way.map(|delay| delay.forward.as_secs_f64()),
            "added_delay_reverse_seconds": one_way.map(|delay| delay.reverse.as_secs_f64()),
            "round_trips_per_minute": self.latency.map(|latency| latency.round_trips_per_minute),
            "confidence": self.latency.map(|latency| latency.confidence.as_str()),
        })
    }
}

/// Why a run ended: the end that caused it knows.
fn stop_reason(own: &RunResult, other: Option<&RunResult>) -> StopReason {
    match (own.reason, other.map(|other| other.reason)) {
        // All bytes were received, but the sender may have ended for another reason.
        (StopReason::Bytes | StopReason::Peer, Some(reason)) => reason,
        (reason, _) => reason,
    }
}

/// What limited TCP, by the statistics of its sender. A window that limits is the receiver's. Data that was
/// sent again was lost on the path, but a few segments are lost on any busy host too.
fn limit_of(sender: &SenderStatistics, bytes: u64, duration: Duration) -> LimitedBy {
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let is_much = |part: u32| part > 0 && u64::from(part) * 100 >= duration_ms * LIMITED_PERCENT;
    let is_lossy = sender.retransmits >= LOST_SEGMENTS_MIN
        && sender.bytes_retransmitted.saturating_mul(LOSS_LIMITED_ONE_IN) >= bytes;
    match sender {
        _ if is_much(sender.window_limited_ms) => LimitedBy::Receiver,
        _ if is_much(sender.buffer_limited_ms) => LimitedBy::Sender,
        _ if is_lossy => LimitedBy::Path,
        _ => LimitedBy::Unknown,
    }
}
