//! Series of bandwidth runs.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use pathmeter_proto::bandwidth::{RunDirection, StopReason};

use super::block::Series;
use super::labels::{Labelled, labels};
use super::text::{CLOSE, Cell, Family, Suffix, counter, gauge, label};

/// Bandwidth runs of one path in one direction. Written by the task of the path, read by scrapes. A run that
/// fails leaves the results of the last one, with their time.
#[derive(Debug, Default)]
pub struct BandwidthSeries {
    labels: String,
    runs: Labelled<StopReason, 9>,
    skipped: Labelled<SkipReason, 8>,
    failures: Labelled<FailureReason, 3>,
    /// Bytes of payload that were received.
    bytes: Cell,
    retransmits: Cell,
    /// In nanoseconds.
    duration: Cell,
    /// The interval of the probe in nanoseconds.
    pub interval: Cell,
    /// 1 while a run loads the path.
    pub running: Cell,
    /// Bytes that the budgets of this host left at the last attempt, plus one; 0: there is no budget, or
    /// there was no attempt.
    budget_left: Cell,
    last: Mutex<Option<LastRun>>,
    /// The dispersion rates of the last runs, the latest last.
    dispersions: Mutex<VecDeque<u64>>,
}

/// Runs whose dispersion rates are kept. Chosen: the last hour of a run each three minutes.
const DISPERSIONS_MAX: usize = 20;

/// The results of the last run.
#[derive(Debug, Clone, PartialEq)]
pub struct LastRun {
    /// The end of the run in nanoseconds since 1970.
    pub at: u64,
    /// Bytes of payload per second; `None` if too little was received.
    pub throughput: Option<u64>,
    /// Whether that is the capacity; otherwise the capacity is at least that.
    pub is_capacity: bool,
    /// The part of the payload that was retransmitted, in millionths; `None` if nothing was received.
    pub loss_millionths: Option<u64>,
    /// Median round trip before the run, and added delay by the run, in nanoseconds; `None` if they were not
    /// measured.
    pub latency: Option<RunLatency>,
    /// Dispersion rate in bytes of payload per second; `None` if the trains did not agree, or of other
    /// methods.
    pub dispersion: Option<u64>,
    /// Bytes per second that a token bucket admits after its burst; `None`: none was seen.
    pub sustained: Option<u64>,
    /// Whether the path carries the rate of a check; `None` if it is not known, or of other methods.
    pub has_passed: Option<bool>,
    /// All results, for the API.
    pub json: serde_json::Value,
}

/// Latency of a run in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunLatency {
    /// Median round trip of the idle path.
    pub idle: u64,
    /// Median round trip under load.
    pub loaded: u64,
    /// 95th percentile under load, above the idle median.
    pub added: u64,
}

labels!(StopReason, "reason", {
    Bytes => "bytes",
    Time => "time",
    Delay => "delay",
    Loss => "loss",
    Congestion => "congestion",
    Host => "host",
    Lease => "lease",
    Peer => "peer",
    Operator => "operator",
});

/// Why a run was not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkipReason {
    /// A budget of this host or of the peer has too few bytes left.
    Budget,
    /// Other runs took a quarter of the interval, and at least a minute.
    Busy,
    /// Runs are switched off, here or at the peer.
    Disabled,
    /// This host or the peer has quiet hours.
    QuietHours,
    /// The peer does not grant this host a lease.
    NotAllowed,
    /// This host or the peer does not allow a run of this size or rate.
    Invalid,
    /// The idle path did not answer echo requests, so harm could not be seen.
    NoReplies,
    /// Another reason of the peer.
    Other,
}

labels!(SkipReason, "reason", {
    Budget => "budget",
    Busy => "busy",
    Disabled => "disabled",
    QuietHours => "quiet_hours",
    NotAllowed => "not_allowed",
    Invalid => "invalid",
    NoReplies => "no_replies",
    Other => "other",
});

/// Why a run failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureReason {
    /// The request for a lease.
    Request,
    /// The connections of the run.
    Connect,
    /// Nothing was received.
    NothingReceived,
}

labels!(FailureReason, "reason", {
    Request => "request",
    Connect => "connect",
    NothingReceived => "nothing_received",
});

impl BandwidthSeries {
    /// Returns the series of one path in one direction, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str, direction: RunDirection) -> Self {
        let labels = [
            label("probe", probe),
            label("peer", peer),
            label("family", family),
            label("direction", direction.as_str()),
        ];
        Self { labels: labels.join(","), ..Self::default() }
    }

    /// Counts a run that was not begun.
    pub fn skipped(&self, reason: SkipReason) {
        self.skipped.of(reason).inc();
    }

    /// Counts a run that failed.
    pub fn failed(&self, reason: FailureReason) {
        self.failures.of(reason).inc();
    }

    /// Counts a run, and keeps its results.
    pub fn measured(&self, reason: StopReason, bytes: u64, retransmits: u64, nanos: u64, last: LastRun) {
        self.runs.of(reason).inc();
        self.bytes.add(bytes);
        self.retransmits.add(retransmits);
        self.duration.add(nanos);
        if let Some(rate) = last.dispersion {
            let mut dispersions = self.dispersions.lock().unwrap_or_else(PoisonError::into_inner);
            if dispersions.len() == DISPERSIONS_MAX {
                dispersions.pop_front();
            }
            dispersions.push_back(rate);
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(last);
    }

    /// Sets the bytes that the budgets of this host leave to the path today; `None`: there is no limit.
    pub fn set_budget_left(&self, bytes: Option<u64>) {
        self.budget_left.set(bytes.map_or(0, |bytes| bytes.saturating_add(1)));
    }

    /// A quantile of the last dispersion rates by nearest rank; `None` if there are none.
    fn dispersion(&self, percent: usize) -> Option<u64> {
        let dispersions = self.dispersions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<u64> = dispersions.iter().copied().collect();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    /// Returns the results of the last run; `None` if there was none.
    #[must_use]
    pub fn last(&self) -> Option<LastRun> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the number of runs.
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.runs.total()
    }

    fn last_value(&self, value: impl FnOnce(&LastRun) -> Option<u64>) -> Option<u64> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(value)
    }

    fn last_latency(&self, value: impl FnOnce(RunLatency) -> u64) -> Option<u64> {
        self.last_value(|last| last.latency.map(value))
    }
}

impl Series for BandwidthSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 38;
}

/// Quantiles of the dispersion rates, in percent and as the rest of the labels.
const QUANTILES: [(usize, &str); 3] =
    [(10, ",quantile=\"0.1\"} "), (50, ",quantile=\"0.5\"} "), (90, ",quantile=\"0.9\"} ")];

/// In alphabetical order.
const FAMILIES: [Family<BandwidthSeries>; 19] = [
    gauge(
        "pathmeter_bandwidth_added_delay_seconds",
        "Delay that the last run added: p95 of the RTT under load above the idle median.",
        |w, name, s| {
            if let Some(nanos) = s.last_latency(|latency| latency.added) {
                w.seconds(name, Suffix::None, &s.labels, CLOSE, nanos);
            }
        },
    ),
    gauge(
        "pathmeter_bandwidth_budget_left_bytes",
        "Bytes that the budgets of this host left to the path today, at the last attempt. Absent without a budget.",
        |w, name, s| {
            if let Some(bytes) = s.budget_left.get().checked_sub(1) {
                w.count(name, Suffix::None, &s.labels, CLOSE, bytes);
            }
        },
    ),
    gauge(
        "pathmeter_bandwidth_capacity",
        "1 if the throughput of the last run is the capacity of the path, 0 if the capacity is at least that.",
        |w, name, s| {
            if let Some(is_capacity) = s.last_value(|last| Some(last.is_capacity.into())) {
                w.count(name, Suffix::None, &s.labels, CLOSE, is_capacity);
            }
        },
    ),
    gauge(
        "pathmeter_bandwidth_check_passed",
        "1 if the path carried the rate of the last check, 0 if not. Absent if that is not known.",
        |w, name, s| {
            if let Some(has_passed) = s.last_value(|last| last.has_passed.map(u64::from)) {
                w.count(name, Suffix::None, &s.labels, CLOSE, has_passed);
            }
        },
    ),
    gauge(
        "pathmeter_bandwidth_dispersion_bytes_per_second",
        "Quantiles of the dispersion rates of the last 20 runs whose trains agreed.",
        |w, name, s| {
            for (percent, rest) in QUANTILES {
                if let Some(rate) = s.dispersion(percent) {
                    w.count(name, Suffix::None, &s.labels, rest, rate);
                }
            }
        },
    ),
    counter("pathmeter_bandwidth_failures_total", "Runs that failed, by reason.", |w, name, s| {
        s.failures.write(w, name, &s.labels);
    }),
    gauge("pathmeter_bandwidth_idle_rtt_seconds", "Median RTT before the last run.", |w, name, s| {
        if let Some(nanos) = s.last_latency(|latency| latency.idle) {
            w.seconds(name, Suffix::None, &s.labels, CLOSE, nanos);
        }
    }),
    gauge("pathmeter_bandwidth_interval_seconds", "Interval of the probe.", |w, name, s| {
        w.seconds(name, Suffix::None, &s.labels, CLOSE, s.interval.get());
    }),
    gauge("pathmeter_bandwidth_loaded_rtt_seconds", "Median RTT during the last run.", |w, name, s| {
        if let Some(nanos) = s.last_latency(|latency| latency.loaded) {
            w.seconds(name, Suffix::None, &s.labels, CLOSE, nanos);
        }
    }),
    gauge(
        "pathmeter_bandwidth_loss_ratio",
        "Part of the payload that the last run retransmitted, or over UDP lost.",
        |w, name, s| {
            if let Some(millionths) = s.last_value(|last| last.loss_millionths) {
                w.seconds(name, Suffix::None, &s.labels, CLOSE, millionths * 1_000);
            }
        },
    ),
    counter(
        "pathmeter_bandwidth_received_bytes_total",
        "Payload of runs that its receiver received.",
        |w, name, s| w.count(name, Suffix::None, &s.labels, CLOSE, s.bytes.get()),
    ),
    counter(
        "pathmeter_bandwidth_retransmits_total",
        "Segments of runs that were retransmitted.",
        |w, name, s| {
            w.count(name, Suffix::None, &s.labels, CLOSE, s.retransmits.get());
        },
    ),
    counter("pathmeter_bandwidth_run_seconds_total", "Time in which runs loaded the path.", |w, name, s| {
        w.seconds(name, Suffix::None, &s.labels, CLOSE, s.duration.get());
    }),
    gauge(
        "pathmeter_bandwidth_run_timestamp_seconds",
        "End of the last run, in seconds since 1970. Absent before it.",
        |w, name, s| {
            if let Some(nanos) = s.last_value(|last| Some(last.at)) {
                w.seconds(name, Suffix::None, &s.labels, CLOSE, nanos);
            }
        },
    ),
    gauge("pathmeter_bandwidth_running", "1 while a run loads the path.", |w, name, s| {
        w.count(name, Suffix::None, &s.labels, CLOSE, s.running.get());
    }),
    counter("pathmeter_bandwidth_runs_total", "Runs, by the reason for which they ended.", |w, name, s| {
        s.runs.write(w, name, &s.labels);
    }),
    counter("pathmeter_bandwidth_skipped_total", "Runs that were not begun, by reason.", |w, name, s| {
        s.skipped.write(w, name, &s.labels);
    }),
    gauge(
        "pathmeter_bandwidth_sustained_bytes_per_second",
        "Rate that a token bucket admits after its burst, as the last run saw it. Absent if it saw none.",
        |w, name, s| {
            if let Some(rate) = s.last_value(|last| last.sustained) {
                w.count(name, Suffix::None, &s.labels, CLOSE, rate);
            }
        },
    ),
    gauge(
        "pathmeter_bandwidth_throughput_bytes_per_second",
        "Payload per second of the last run: over TCP after its slow start, of trains their dispersion rate.",
        |w, name, s| {
            if let Some(throughput) = s.last_value(|last| last.throughput) {
                w.count(name, Suffix::None, &s.labels, CLOSE, throughput);
            }
        },
    ),
];
