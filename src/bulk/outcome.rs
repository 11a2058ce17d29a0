//! The outcome of a run, and what it says about the path.

use std::time::Duration;

use pathmeter_proto::bandwidth::harm::LoadedLatency;
use pathmeter_proto::bandwidth::throughput::{SteadyRate, steady_rate};
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::load::DATAGRAM_BYTES;
use pathmeter_proto::load::check::{CheckVerdict, CheckedLoad};
use pathmeter_proto::wire::bandwidth::{RunResult, SenderStatistics};
use pathmeter_proto::wire::load::Dispersion;
use pathmeter_proto::wire::load::LoadResult;
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
    /// What the kernel of the sender counted; zeros over UDP.
    pub sender: SenderStatistics,
    /// What a run over UDP has measured; `None` over TCP, and if the other end did not say.
    pub load: Option<LoadOutcome>,
    /// Latency of the path, idle and under this load; `None` if it was not measured.
    pub latency: Option<LoadedLatency>,
}

/// What a run over UDP has measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOutcome {
    /// Bytes of payload that were sent; `None`: the sender did not say.
    pub sent: Option<u64>,
    /// What its receiver has measured.
    pub result: LoadResult,
    /// Whether the path carries the rate of a check; `None`: it is none.
    pub verdict: Option<CheckVerdict>,
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

/// Bytes that may have arrived out of order when a run ends. Chosen: more than any receive buffer holds.
const OUT_OF_ORDER_MAX: u64 = 64 << 20;

/// A run is limited by loss if so many segments, and one byte in so many, were retransmitted. Chosen:
/// congestion controls that fill a queue lose more.
const LOST_SEGMENTS_MIN: u32 = 10;
const LOSS_LIMITED_ONE_IN: u64 = 1_000;

/// A run has filled a queue of the path if half of its round trips were longer by this than 95 % of those of
/// the idle path. Chosen: a host under load delays replies by less.
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
        let EndpointOutcome { local, remote, mut samples, bytes: at_this_end } = end;
        let stop_reason = stop_reason(&local, remote.as_ref());
        // The peer may report what it likes, but no more than this end has sent or received.
        let believable = at_this_end.saturating_add(OUT_OF_ORDER_MAX);
        samples.retain(|sample| sample.bytes <= believable);
        if stop_reason == StopReason::Peer {
            // Without the time in which the peer was silent.
            let last = samples.last().map_or(0, |last| last.bytes);
            let first = samples.partition_point(|sample| sample.bytes < last);
            samples.truncate(first + 1);
        }
        let last = samples.last().copied().unwrap_or_default();
        let (sender, received) = match direction {
            RunDirection::Forward => (Some(&local), remote.as_ref()),
            RunDirection::Reverse => (remote.as_ref(), Some(&local)),
        };
        let steady = steady_rate(&samples).filter(|_| last.bytes > 0);
        let statistics = sender.map(|sender| sender.sender.clone()).unwrap_or_default();
        let duration = Duration::from_nanos(received.map_or(last.at.as_nanos(), |result| result.nanos));
        let is_at_rate_max = |throughput: u64| {
            rate_max
                .is_some_and(|max| u128::from(throughput) * 100 >= u128::from(max) * u128::from(RATE_PERCENT))
        };
        let bytes = received.map_or(last.bytes, |result| result.bytes).min(at_this_end);
        let limited_by = match (stop_reason, steady) {
            (_, Some(steady)) if is_at_rate_max(steady.bytes_per_second) => LimitedBy::RateMax,
            (StopReason::Delay | StopReason::Loss, _) => LimitedBy::Path,
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
            load: None,
            latency: None,
        }
    }

    /// The outcome of a run over UDP from what its prober learnt. `rate`: that of a check, in bytes of
    /// payload per second; `None`: the run sent trains.
    pub(super) fn of_load(direction: RunDirection, rate: Option<u64>, end: EndpointOutcome) -> Self {
        let EndpointOutcome { local, remote, bytes: at_this_end, .. } = end;
        let stop_reason = stop_reason(&local, remote.as_ref());
        let (sender, receiver) = match direction {
            RunDirection::Forward => (Some(&local), remote.as_ref()),
            RunDirection::Reverse => (remote.as_ref(), Some(&local)),
        };
        // The peer may report what it likes, but no more than this end has sent or received.
        let bytes = receiver.map_or(0, |receiver| receiver.bytes).min(at_this_end);
        let sent = sender.map(|sender| sender.bytes.max(bytes));
        let result = receiver.and_then(|receiver| receiver.load);
        let span = Duration::from_nanos(receiver.map_or(0, |receiver| receiver.nanos));
        let load = result.map(|result| {
            let duration = Duration::from_nanos(sender.map_or(0, |sender| sender.nanos));
            let checked = |rate| Some(CheckedLoad { rate, sent: sent?, duration, received: bytes });
            let counted =
                |rate| checked(rate).map_or(CheckVerdict::Stopped, |load| CheckVerdict::of(&load, &result));
            let verdict = rate.map(|rate| verdict(stop_reason, counted(rate)));
            LoadOutcome { sent, result, verdict }
        });
        let (method, bytes_per_second) = match rate {
            None => (Method::Train, result.and_then(|result| result.dispersion?.rate)),
            // The first datagram begins the time.
            Some(_) => (Method::Check, rate_of(bytes.saturating_sub(DATAGRAM_BYTES as u64), span)),
        };
        let limited_by = match (stop_reason, load.and_then(|load| load.verdict)) {
            (StopReason::Host, _) | (_, Some(CheckVerdict::Receiver)) => LimitedBy::Receiver,
            (StopReason::Delay | StopReason::Loss | StopReason::Congestion, _) => LimitedBy::Path,
            (_, Some(CheckVerdict::Loss | CheckVerdict::Delay | CheckVerdict::Congestion)) => LimitedBy::Path,
            (_, Some(CheckVerdict::Passed)) => LimitedBy::RateMax,
            (_, Some(CheckVerdict::Sender)) => LimitedBy::Sender,
            (_, Some(CheckVerdict::Stopped) | None) => LimitedBy::Unknown,
        };
        Self {
            direction,
            method,
            streams: 1,
            steady: bytes_per_second.map(|bytes_per_second| SteadyRate { bytes_per_second, span }),
            bytes,
            duration: span,
            stop_reason,
            limited_by,
            sender: SenderStatistics::default(),
            load,
            latency: None,
        }
    }

    /// Adds the latency of the path. A run that was not limited by anything else, and during which a queue
    /// stood in its direction, was limited by the path.
    #[must_use]
    pub fn with_latency(self, latency: Option<LoadedLatency>) -> Self {
        let has_queue = latency.is_some_and(|latency| {
            let queue = match (latency.standing_one_way, self.direction) {
                (Some(one_way), RunDirection::Forward) => one_way.forward,
                (Some(one_way), RunDirection::Reverse) => one_way.reverse,
                (None, _) => latency.standing_delay,
            };
            queue >= QUEUE_DELAY_MIN
        });
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
        // The dispersion of trains is not what a longer load would get, and routers mark datagrams before a
        // path is full.
        let has_marks =
            self.stop_reason == StopReason::Congestion || self.verdict() == Some(CheckVerdict::Congestion);
        let is_limit = self.method != Method::Train && !has_marks;
        self.limited_by == LimitedBy::Path && is_limit && self.steady.is_some_and(is_long)
    }

    /// Bytes of payload per second after the slow start; `None` if too little was received.
    #[must_use]
    pub fn throughput(&self) -> Option<u64> {
        self.steady.map(|steady| steady.bytes_per_second)
    }

    /// The part of the payload that was retransmitted, or over UDP lost; `None` if it is not known.
    #[must_use]
    pub fn loss_ratio(&self) -> Option<f64> {
        let (lost, sent) = match (self.method, self.load) {
            (Method::Tcp, _) => {
                let retransmitted = self.sender.bytes_retransmitted;
                (retransmitted, self.bytes.checked_add(retransmitted)?)
            }
            (Method::Train | Method::Check, load) => {
                let sent = load?.sent?;
                (sent.saturating_sub(self.bytes), sent)
            }
        };
        #[expect(clippy::cast_precision_loss, reason = "a ratio needs no more than 52 bits")]
        let ratio = (sent > 0).then(|| lost as f64 / sent as f64);
        ratio
    }

    /// What the trains tell; `None` of other methods, and if they tell nothing.
    #[must_use]
    pub fn dispersion(&self) -> Option<Dispersion> {
        self.load?.result.dispersion
    }

    /// Whether the path carries the rate of a check; `None` of other methods.
    #[must_use]
    pub fn verdict(&self) -> Option<CheckVerdict> {
        self.load?.verdict
    }

    /// The JSON object of this direction.
    #[must_use]
    pub fn json(&self) -> Value {
        let seconds =
            |of: fn(&LoadedLatency) -> Duration| self.latency.as_ref().map(|found| of(found).as_secs_f64());
        let one_way = self.latency.and_then(|latency| latency.added_one_way);
        let (is_tcp, dispersion) = (self.method == Method::Tcp, self.dispersion());
        let growth = self.load.and_then(|load| load.result.delay_growth);
        let delay_growth = growth.map(|micros| f64::from(micros) / 1e6);
        json!({
            "direction": self.direction.as_str(),
            "method": self.method.as_str(),
            "throughput_bytes_per_second": self.throughput(),
            "bytes": self.bytes,
            "duration_seconds": self.duration.as_secs_f64(),
            "stop_reason": self.stop_reason.as_str(),
            "is_capacity": self.is_capacity(),
            "limited_by": self.limited_by.as_str(),
            "streams": is_tcp.then_some(self.streams),
            "congestion_control": Some(&self.sender.congestion_control).filter(|name| !name.is_empty()),
            "retransmits": is_tcp.then_some(self.sender.retransmits),
            "dispersion_low_bytes_per_second": dispersion.map(|dispersion| dispersion.low),
            "dispersion_high_bytes_per_second": dispersion.and_then(|dispersion| dispersion.high),
            "sustained_bytes_per_second": dispersion.and_then(|dispersion| dispersion.sustained),
            "check": self.verdict().map(CheckVerdict::as_str),
            "delay_growth_seconds": delay_growth,
            "congestion_marks": self.load.map(|load| load.result.congestion_marks),
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

/// The verdict about a check that ended for this reason: one that did harm has not passed.
const fn verdict(stop_reason: StopReason, counted: CheckVerdict) -> CheckVerdict {
    match (stop_reason, counted) {
        (StopReason::Delay, CheckVerdict::Passed | CheckVerdict::Sender) => CheckVerdict::Delay,
        (StopReason::Loss, CheckVerdict::Passed | CheckVerdict::Sender) => CheckVerdict::Loss,
        (StopReason::Congestion, CheckVerdict::Passed | CheckVerdict::Sender) => CheckVerdict::Congestion,
        (
            StopReason::Peer | StopReason::Lease | StopReason::Operator,
            CheckVerdict::Passed | CheckVerdict::Sender,
        ) => CheckVerdict::Stopped,
        (_, counted) => counted,
    }
}

/// Bytes per second; `None` of nothing or no time.
fn rate_of(bytes: u64, span: Duration) -> Option<u64> {
    let rate = (u128::from(bytes) * 1_000_000_000).checked_div(span.as_nanos())?;
    u64::try_from(rate).ok().filter(|rate| *rate > 0)
}

/// Why a run ended. A receiver that has received everything does not know why the sender has ended.
fn stop_reason(local: &RunResult, remote: Option<&RunResult>) -> StopReason {
    match (local.reason, remote.map(|remote| remote.reason)) {
        (StopReason::Bytes | StopReason::Peer, Some(reason)) => reason,
        (reason, _) => reason,
    }
}

/// What limited TCP, by the statistics of its sender. A window that limits is the receiver's. Data that was
/// retransmitted was lost on the path, but a few segments are lost on any busy host too.
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

#[cfg(test)]
mod tests {
    use super::*;
    use pathmeter_proto::bandwidth::harm::{AddedOneWay, Confidence};
    use pathmeter_proto::bandwidth::throughput::Progress;
    use pathmeter_proto::time::Timestamp;

    const MS: Duration = Duration::from_millis(1);

    fn result(reason: StopReason, bytes: u64) -> RunResult {
        RunResult { reason, bytes, nanos: 1_000_000_000, sender: SenderStatistics::default(), load: None }
    }

    /// A run of a second at 10 MB/s, as the prober sees it.
    fn end(local: RunResult, remote: Option<RunResult>) -> EndpointOutcome {
        let sample = |number: u64| Progress {
            at: Timestamp::from_nanos(number * 10_000_000),
            bytes: number * 100_000,
        };
        EndpointOutcome { local, remote, samples: (0..=100).map(sample).collect(), bytes: 10_000_000 }
    }

    fn forward(reasons: (StopReason, StopReason), sender: SenderStatistics) -> RunOutcome {
        let local = RunResult { sender, ..result(reasons.0, 10_000_000) };
        let end = end(local, Some(result(reasons.1, 10_000_000)));
        RunOutcome::new(RunDirection::Forward, 1, None, end)
    }

    fn sender(retransmits: u32, window_ms: u32, buffer_ms: u32) -> SenderStatistics {
        SenderStatistics {
            bytes_retransmitted: u64::from(retransmits) * 1_448,
            retransmits,
            busy_ms: 1_000,
            window_limited_ms: window_ms,
            buffer_limited_ms: buffer_ms,
            congestion_control: "cubic".to_owned(),
        }
    }

    const BY_BYTES: (StopReason, StopReason) = (StopReason::Bytes, StopReason::Bytes);

    #[test]
    fn only_what_the_path_has_limited_is_its_capacity() {
        for (sender, limited_by) in [
            (sender(0, 0, 0), LimitedBy::Unknown),
            (sender(9, 0, 0), LimitedBy::Unknown),
            (sender(10, 0, 0), LimitedBy::Path),
            (sender(100, 199, 199), LimitedBy::Path),
            (sender(100, 200, 0), LimitedBy::Receiver),
            (sender(100, 0, 200), LimitedBy::Sender),
        ] {
            let outcome = forward(BY_BYTES, sender.clone());
            assert_eq!(outcome.limited_by, limited_by, "{sender:?}");
            assert_eq!(outcome.is_capacity(), limited_by == LimitedBy::Path, "{sender:?}");
            assert_eq!(outcome.throughput(), Some(10_000_000));
        }
        let at_its_limit = end(result(StopReason::Bytes, 10_000_000), None);
        let outcome = RunOutcome::new(RunDirection::Forward, 1, Some(11_000_000), at_its_limit);
        assert_eq!(outcome.limited_by, LimitedBy::RateMax);
        let harmful = end(result(StopReason::Delay, 10_000_000), None);
        let outcome = RunOutcome::new(RunDirection::Forward, 1, Some(11_000_000), harmful);
        assert!(!outcome.is_capacity(), "the rate was limited too: {outcome:?}");
        let harm = forward((StopReason::Delay, StopReason::Delay), sender(0, 900, 900));
        assert!(harm.is_capacity(), "{harm:?}");
    }

    #[test]
    fn reason_is_that_of_the_end_that_has_one() {
        for (local, remote, reason) in [
            (StopReason::Bytes, StopReason::Bytes, StopReason::Bytes),
            (StopReason::Bytes, StopReason::Time, StopReason::Time),
            (StopReason::Peer, StopReason::Lease, StopReason::Lease),
            (StopReason::Delay, StopReason::Bytes, StopReason::Delay),
            (StopReason::Operator, StopReason::Peer, StopReason::Operator),
        ] {
            assert_eq!(forward((local, remote), sender(0, 0, 0)).stop_reason, reason, "{local:?} {remote:?}");
        }
    }

    #[test]
    fn peer_is_not_believed_more_than_was_sent_or_received() {
        let absurd = result(StopReason::Bytes, u64::MAX);
        let outcome = RunOutcome::new(
            RunDirection::Forward,
            1,
            None,
            end(result(StopReason::Bytes, 10_000_000), Some(absurd.clone())),
        );
        assert_eq!(outcome.bytes, 10_000_000);
        let mut reverse = end(result(StopReason::Bytes, 10_000_000), Some(absurd));
        reverse.samples.push(Progress { at: Timestamp::from_nanos(1_000_000_001), bytes: u64::MAX });
        let outcome = RunOutcome::new(RunDirection::Reverse, 1, None, reverse);
        assert_eq!((outcome.bytes, outcome.throughput()), (10_000_000, Some(10_000_000)));
    }

    #[test]
    fn silence_of_a_dead_peer_is_not_part_of_the_rate() {
        let mut silent = end(result(StopReason::Peer, 10_000_000), None);
        let last = silent.samples[100];
        silent
            .samples
            .extend((1..400).map(|number: u32| Progress { at: last.at + 10 * MS * number, ..last }));
        let outcome = RunOutcome::new(RunDirection::Forward, 1, None, silent);
        assert_eq!((outcome.throughput(), outcome.stop_reason), (Some(10_000_000), StopReason::Peer));
    }

    #[test]
    fn queue_in_the_loaded_direction_shows_that_the_path_limits() {
        let latency = |forward: Duration, reverse: Duration| LoadedLatency {
            idle_rtt: 5 * MS,
            loaded_rtt: 30 * MS,
            added_delay: 40 * MS,
            added_one_way: None,
            standing_delay: 20 * MS,
            standing_one_way: Some(AddedOneWay { forward, reverse }),
            round_trips_per_minute: 2_000,
            confidence: Confidence::High,
            missing: 0,
        };
        let limited_by = |latency: LoadedLatency| {
            forward(BY_BYTES, sender(0, 0, 0)).with_latency(Some(latency)).limited_by
        };
        assert_eq!(limited_by(latency(20 * MS, Duration::ZERO)), LimitedBy::Path);
        assert_eq!(
            limited_by(latency(MS, 20 * MS)),
            LimitedBy::Unknown,
            "the queue is in the other direction"
        );
        let unknown = LoadedLatency { standing_one_way: None, ..latency(MS, MS) };
        assert_eq!(limited_by(unknown), LimitedBy::Path);
        let jitter = LoadedLatency { standing_delay: MS, standing_one_way: None, ..unknown };
        assert_eq!(limited_by(jitter), LimitedBy::Unknown);
        let receiver = forward(BY_BYTES, sender(0, 900, 0)).with_latency(Some(unknown));
        assert_eq!(receiver.limited_by, LimitedBy::Receiver);
    }

    #[test]
    fn check_that_ended_too_soon_has_no_verdict() {
        let load = LoadResult { delay_growth: Some(0), ..LoadResult::default() };
        let received = |reason| RunResult { load: Some(load), ..result(reason, 1_000_000) };
        let outcome = |local, remote| {
            RunOutcome::of_load(RunDirection::Reverse, Some(1_000_000), end(received(local), remote))
        };
        let passed = outcome(StopReason::Time, Some(result(StopReason::Time, 1_000_000)));
        assert_eq!((passed.verdict(), passed.loss_ratio()), (Some(CheckVerdict::Passed), Some(0.0)));
        // The sender died and did not say what it had sent.
        let silent = outcome(StopReason::Peer, None);
        assert_eq!((silent.verdict(), silent.loss_ratio()), (Some(CheckVerdict::Stopped), None));
        for (reason, verdict) in [
            (StopReason::Lease, CheckVerdict::Stopped),
            (StopReason::Operator, CheckVerdict::Stopped),
            (StopReason::Loss, CheckVerdict::Loss),
            (StopReason::Delay, CheckVerdict::Delay),
        ] {
            let stopped = outcome(reason, Some(result(StopReason::Time, 1_000_000)));
            assert_eq!(stopped.verdict(), Some(verdict), "{reason:?}");
            assert_eq!(stopped.is_capacity(), verdict != CheckVerdict::Stopped, "{reason:?}");
        }
        let marked = outcome(StopReason::Congestion, Some(result(StopReason::Time, 1_000_000)));
        assert!(!marked.is_capacity(), "routers mark before a path is full");
    }

    #[test]
    fn short_run_is_no_capacity() {
        let mut short = end(result(StopReason::Delay, 700_000), None);
        short.samples.truncate(8);
        let outcome = RunOutcome::new(RunDirection::Forward, 1, None, short);
        assert_eq!(outcome.limited_by, LimitedBy::Path);
        assert!(!outcome.is_capacity(), "70 ms");
        assert!(outcome.throughput().is_some());
    }
}
