//! Series of echo paths.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::echo::{Class, Direction, EchoReport, Mismatch, RoundTrip, Verdict};
use pathmeter_proto::machine::{IcmpKind, NotSent, TimestampSource};
use pathmeter_proto::time::nanos;

use super::block::Series;
use super::distribution::{Buckets, RTT_BOUNDS, SumAndCount};
use super::host_load::HostLoad;
use super::labels::{Labelled, Labels as _, labels};
use super::text::{CLOSE, Cell, Family, Suffix, Writer, counter, gauge, histogram, label, summary};

/// Upper bounds of the burst-length histogram in datagrams.
const BURST_BOUNDS: [(u64, &str); 3] =
    [(1, r#",le="1.0"} "#), (3, r#",le="3.0"} "#), (10, r#",le="10.0"} "#)];

/// Measurements of one path. Written by the loop that owns the path, read by scrapes.
#[derive(Debug, Default)]
pub struct EchoSeries {
    labels: String,
    /// Datagrams sent.
    pub sent: Cell,
    /// Datagrams with the verdict ok.
    pub ok: Cell,
    late: Cell,
    lost: Labelled<Direction, 3>,
    host_dropped: Cell,
    withdrawn: Cell,
    unsent: Cell,
    send_errors: Labelled<NotSent, 5>,
    duplicates: Cell,
    reordered: Cell,
    very_late: Cell,
    mismatched: Labelled<Mismatch, 3>,
    icmp: Labelled<IcmpKind, 6>,
    bursts: Cell,
    burst_lengths: Buckets<{ BURST_BOUNDS.len() + 1 }>,
    rtt: Buckets<{ RTT_BOUNDS.len() + 1 }>,
    rtt_minimum: Cell,
    ipdv: SumAndCount,
    pdv: SumAndCount,
    turnaround: SumAndCount,
    turnaround_invalid: Cell,
    transmit_lag: SumAndCount,
    user_timestamps: Labelled<TimestampSide, 2>,
    last_reply: Cell,
    hops: [Cell; 2],
    remarked: [Cell; 2],
    congested: [Cell; 2],
    flows: Cell,
    flows_lossy: Cell,
    draining: Cell,
    /// The load of the destination by bandwidth runs; `None`: it is not known.
    load: Mutex<Option<Arc<HostLoad>>>,
}

labels!(NotSent, "error", {
    Unreachable => "unreachable",
    Buffer => "buffer",
    Permission => "permission",
    TooBig => "too_big",
    Other => "other",
});

labels!(Mismatch, "reason", {
    Malformed => "malformed",
    Unauthentic => "auth",
    Unsolicited => "unsolicited",
});

labels!(IcmpKind, "type", {
    PortUnreachable => "port_unreachable",
    Unreachable => "unreachable",
    Prohibited => "prohibited",
    TooBig => "too_big",
    TtlExceeded => "ttl_exceeded",
    Other => "other",
});

labels!(Direction, "direction", { Forward => "forward", Reverse => "reverse", Unknown => "unknown" });

/// The name of an ICMP error, as in the label `type`.
pub fn icmp_error_name(kind: IcmpKind) -> &'static str {
    kind.value()
}

/// The two directions of a path, without [`Direction::Unknown`].
const BOTH_DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::Reverse];

/// One of the two local timestamps of a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TimestampSide {
    Transmit,
    Receive,
}

labels!(TimestampSide, "timestamp", { Transmit => "transmit", Receive => "receive" });

const FORWARD: usize = 0;
const REVERSE: usize = 1;

/// Buckets of the RTT histogram. The last one has the values above all bounds.
const BUCKETS: usize = RTT_BOUNDS.len() + 1;

/// Counters summed over some paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    pub(super) requests: u64,
    pub(super) late: u64,
    pub(super) lost: [u64; 3],
    pub(super) host_dropped: u64,
    pub(super) withdrawn: u64,
    pub(super) rtt: [u64; BUCKETS],
    pub(super) rtt_sum: u64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            requests: 0,
            late: 0,
            lost: [0; 3],
            host_dropped: 0,
            withdrawn: 0,
            rtt: [0; BUCKETS],
            rtt_sum: 0,
        }
    }
}

impl Totals {
    /// Adds the difference between two readings, `since` and `until`, of the same path.
    pub(super) fn add(&mut self, until: &Self, since: &Self) {
        // Each field is read separately while the path continues to count, so a difference can be negative.
        let more = |until: u64, since: u64| until.saturating_sub(since);
        self.requests += more(until.requests, since.requests);
        self.late += more(until.late, since.late);
        self.host_dropped += more(until.host_dropped, since.host_dropped);
        self.withdrawn += more(until.withdrawn, since.withdrawn);
        self.rtt_sum += more(until.rtt_sum, since.rtt_sum);
        for (own, (until, since)) in self.lost.iter_mut().zip(until.lost.iter().zip(since.lost)) {
            *own += more(*until, since);
        }
        for (own, (until, since)) in self.rtt.iter_mut().zip(until.rtt.iter().zip(since.rtt)) {
            *own += more(*until, since);
        }
    }

    /// Returns `[network_verdicts, lost, answered, rtt_sum]`: verdicts without host drops and withdrawals,
    /// losses, answered datagrams, and the sum of their RTTs in nanoseconds.
    #[must_use]
    pub fn network_verdicts(&self) -> [u64; 4] {
        let lost = self.lost.iter().sum();
        [
            self.requests.saturating_sub(self.host_dropped + self.withdrawn),
            lost,
            self.rtt.iter().sum(),
            self.rtt_sum,
        ]
    }
}

/// A quantile estimated from a histogram, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantile {
    /// Below the first bound, which it carries; the histogram has no finer resolution there.
    Below(u64),
    /// Interpolated between two bounds.
    About(u64),
}

impl EchoSeries {
    /// Returns the series of one path, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str, flows: u64) -> Self {
        let labels = [label("probe", probe), label("peer", peer), label("family", family)].join(",");
        let series = Self { labels, ..Self::default() };
        series.flows.set(flows);
        series
    }

    /// Prepares the series for another echo machine with `flows` flows: counters continue, gauges that
    /// belonged to the previous machine are reset.
    pub fn continue_with(&self, flows: u64) {
        self.flows.set(flows);
        self.flows_lossy.set(0);
        self.draining.set(0);
    }

    /// Sets where the load of the destination is found.
    pub fn set_load(&self, load: Arc<HostLoad>) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = Some(load);
    }

    fn is_loaded(&self) -> bool {
        self.load.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|load| load.is_loaded())
    }

    /// Sets whether the peer announced its shutdown (goodbye).
    pub fn set_draining(&self, is_draining: bool) {
        self.draining.set(u64::from(is_draining));
    }

    /// Returns whether the peer announced its shutdown and has not returned.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.get() != 0
    }

    /// Returns the number of datagrams with a verdict.
    #[must_use]
    pub fn decided(&self) -> u64 {
        self.ok.get() + self.late.get() + self.lost.total() + self.host_dropped.get() + self.withdrawn.get()
    }

    /// Returns the counters that a group sums.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut rtt = self.rtt.counts();
        Totals {
            requests: self.decided(),
            late: self.late.get(),
            lost: self.lost(),
            host_dropped: self.host_dropped.get(),
            withdrawn: self.withdrawn.get(),
            rtt: std::array::from_fn(|_| rtt.next().unwrap_or_default()),
            rtt_sum: self.rtt.sum(),
        }
    }

    /// Returns the lost datagrams by direction, in the order forward, reverse, unknown.
    #[must_use]
    pub fn lost(&self) -> [u64; 3] {
        [Direction::Forward, Direction::Reverse, Direction::Unknown].map(|way| self.lost.of(way).get())
    }

    /// Returns the ICMP errors by type, without types that have none.
    pub fn icmp_errors(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.icmp.iter().filter(|(_, count)| *count > 0).map(|(kind, count)| (kind.value(), count))
    }

    /// Returns the datagrams that this host could not send by reason, without reasons that have none.
    pub fn send_errors(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.send_errors.iter().filter(|(_, count)| *count > 0).map(|(reason, count)| (reason.value(), count))
    }

    /// Returns the time of the last reply in nanoseconds since the Unix epoch; 0 if there was none.
    #[must_use]
    pub fn last_reply(&self) -> u64 {
        self.last_reply.get()
    }

    /// Returns the sum, in nanoseconds, and the count of the RTT differences between consecutive datagrams.
    #[must_use]
    pub fn ipdv(&self) -> (u64, u64) {
        self.ipdv.totals()
    }

    /// Estimates the `q`-quantile of the RTT in nanoseconds by linear interpolation within a bucket. `None`
    /// if fewer than ten RTTs are above it.
    #[must_use]
    pub fn rtt_quantile(&self, q: f64) -> Option<Quantile> {
        let counts: Vec<u64> = self.rtt.counts().collect();
        let total: u64 = counts.iter().sum();
        #[expect(clippy::cast_precision_loss, reason = "displayed only")]
        let wanted = total as f64 * q;
        #[expect(clippy::cast_precision_loss, reason = "displayed only")]
        if (total as f64) - wanted < 10.0 - 1e-6 {
            return None;
        }
        let mut below = 0.0;
        for (index, count) in counts.iter().enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "displayed only")]
            let count = *count as f64;
            if below + count >= wanted && count > 0.0 {
                let Some(below_it) = index.checked_sub(1) else {
                    return Some(Quantile::Below(RTT_BOUNDS[0].0));
                };
                let low = RTT_BOUNDS[below_it].0;
                let high = RTT_BOUNDS.get(index).map_or(low, |(bound, _)| *bound);
                #[expect(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "between two bounds"
                )]
                let inside = ((high - low) as f64 * (wanted - below) / count) as u64;
                return Some(Quantile::About(low + inside));
            }
            below += count;
        }
        None
    }

    /// Counts what a report says.
    pub fn record(&self, report: &EchoReport) {
        match report {
            EchoReport::Sent { .. } => self.sent.inc(),
            EchoReport::Unsent(slots) => self.unsent.add(*slots),
            EchoReport::SendError(error) => self.send_errors.of(*error).inc(),
            EchoReport::Decided { verdict, sample, .. } => self.decide(*verdict, sample.as_ref()),
            EchoReport::Ipdv(difference) => self.ipdv.add(*difference),
            EchoReport::Duplicate => self.duplicates.inc(),
            EchoReport::Reordered => self.reordered.inc(),
            EchoReport::VeryLate => self.very_late.inc(),
            EchoReport::Mismatched(reason) => self.mismatched.of(*reason).inc(),
            EchoReport::BurstBegan => self.bursts.inc(),
            EchoReport::BurstEnded(length) => self.burst_lengths.add(&BURST_BOUNDS, u64::from(*length)),
            EchoReport::TransmitLag(lag) => self.transmit_lag.add(*lag),
            EchoReport::TurnaroundInvalid => self.turnaround_invalid.inc(),
            EchoReport::Icmp(kind) => self.icmp.of(*kind).inc(),
            EchoReport::LossyFlows(flows) => self.flows_lossy.set(u64::from(*flows)),
        }
    }

    fn decide(&self, verdict: Verdict, sample: Option<&RoundTrip>) {
        match verdict {
            Verdict::Ok => self.ok.inc(),
            Verdict::Late => self.late.inc(),
            Verdict::Lost(direction) => self.lost.of(direction).inc(),
            Verdict::HostDropped => self.host_dropped.inc(),
            Verdict::Withdrawn => self.withdrawn.inc(),
        }
        let Some(sample) = sample else { return };
        self.rtt.add(&RTT_BOUNDS, nanos(sample.rtt));
        if verdict == Verdict::Ok {
            self.rtt_minimum.set(nanos(sample.minimum));
            self.pdv.add(sample.variation);
        }
        self.turnaround.add(sample.turnaround);
        for (side, by) in
            [(TimestampSide::Transmit, sample.transmit), (TimestampSide::Receive, sample.receive)]
        {
            self.user_timestamps.of(side).add(u64::from(by == TimestampSource::User));
        }
        for (direction, hops) in [(FORWARD, sample.hops_forward), (REVERSE, sample.hops_reverse)] {
            if let Some(hops) = hops {
                self.hops[direction].set(u64::from(hops) + 1);
            }
        }
        for (direction, class) in [(FORWARD, sample.class_forward), (REVERSE, sample.class_reverse)] {
            if let Some(Class { is_remarked, is_congested }) = class {
                self.remarked[direction].add(u64::from(is_remarked));
                self.congested[direction].add(u64::from(is_congested));
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_reply.set(nanos(now));
    }
}

fn one(writer: &mut Writer<'_>, name: &str, series: &EchoSeries, value: u64) {
    writer.count(name, Suffix::None, &series.labels, CLOSE, value);
}

fn both_ways(writer: &mut Writer<'_>, name: &str, series: &EchoSeries, values: &[Cell; 2]) {
    for (cell, way) in values.iter().zip(BOTH_DIRECTIONS) {
        writer.count(name, Suffix::None, &series.labels, way.rest(), cell.get());
    }
}

fn mean(writer: &mut Writer<'_>, name: &str, series: &EchoSeries, mean: &SumAndCount) {
    mean.write(writer, name, &series.labels, CLOSE);
}

impl Series for EchoSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 71;
}

/// In alphabetical order.
const FAMILIES: [Family<EchoSeries>; 32] = [
    gauge(
        "pathmeter_echo_draining",
        "1 if the peer announced its shutdown and has not returned, else 0.",
        |w, name, s| one(w, name, s, s.draining.get()),
    ),
    counter(
        "pathmeter_echo_dscp_remarked_total",
        "Datagrams that arrived with a DSCP different from the one they were sent with.",
        |w, name, s| both_ways(w, name, s, &s.remarked),
    ),
    counter(
        "pathmeter_echo_duplicates_total",
        "Duplicate replies (RFC 5560). They do not change any verdict.",
        |w, name, s| one(w, name, s, s.duplicates.get()),
    ),
    counter(
        "pathmeter_echo_ecn_ce_total",
        "Datagrams that a router marked as having met congestion (ECN CE).",
        |w, name, s| both_ways(w, name, s, &s.congested),
    ),
    gauge("pathmeter_echo_flows", "Flows (source ports) that the path uses.", |w, name, s| {
        one(w, name, s, s.flows.get())
    }),
    gauge(
        "pathmeter_echo_flows_lossy",
        "Flows that lost at least two datagrams, and at least 1 %, in the last 30 to 60 s.",
        |w, name, s| one(w, name, s, s.flows_lossy.get()),
    ),
    gauge(
        "pathmeter_echo_hops",
        "Number of routers on the path, from the received TTL. Absent if not known.",
        |w, name, s| {
            for (cell, way) in s.hops.iter().zip(BOTH_DIRECTIONS) {
                if let Some(hops) = cell.get().checked_sub(1) {
                    w.count(name, Suffix::None, &s.labels, way.rest(), hops);
                }
            }
        },
    ),
    counter(
        "pathmeter_echo_host_dropped_total",
        "Datagrams without a reply while one of the hosts dropped received datagrams. Not network loss.",
        |w, name, s| one(w, name, s, s.host_dropped.get()),
    ),
    counter(
        "pathmeter_echo_icmp_errors_total",
        "ICMP errors received for datagrams of this path; /api/v1/paths lists them by type.",
        |w, name, s| one(w, name, s, s.icmp.total()),
    ),
    gauge("pathmeter_echo_in_flight", "Datagrams sent that have no verdict yet.", |w, name, s| {
        one(w, name, s, s.sent.get().saturating_sub(s.decided()))
    }),
    summary(
        "pathmeter_echo_ipdv_seconds",
        "Absolute difference between the RTTs of two consecutive datagrams (IPDV, RFC 3393).",
        |w, name, s| mean(w, name, s, &s.ipdv),
    ),
    gauge(
        "pathmeter_echo_last_reply_timestamp_seconds",
        "Unix time of the last reply; 0 if there was none.",
        |w, name, s| w.seconds(name, Suffix::None, &s.labels, CLOSE, s.last_reply.get()),
    ),
    counter(
        "pathmeter_echo_late_total",
        "Datagrams answered in time, but with an RTT above pathmeter_echo_late_after_seconds.",
        |w, name, s| one(w, name, s, s.late.get()),
    ),
    gauge(
        "pathmeter_echo_loaded",
        "1 while a bandwidth run of this agent with the peer loads the path, and for a minute after, else 0.",
        |w, name, s| one(w, name, s, s.is_loaded().into()),
    ),
    histogram(
        "pathmeter_echo_loss_burst_length",
        "Lengths of completed loss bursts, in datagrams.",
        |w, name, s| s.burst_lengths.write(w, name, &s.labels, &BURST_BOUNDS, Writer::count),
    ),
    counter(
        "pathmeter_echo_loss_bursts_total",
        "Loss bursts (runs of consecutive losses) that have begun.",
        |w, name, s| one(w, name, s, s.bursts.get()),
    ),
    counter(
        "pathmeter_echo_lost_total",
        "Datagrams lost in the network, by direction; unknown where there is no evidence for either.",
        |w, name, s| s.lost.write(w, name, &s.labels),
    ),
    counter(
        "pathmeter_echo_mismatched_total",
        "Received datagrams that are not valid replies: malformed, not authentic, or matching no request.",
        |w, name, s| s.mismatched.write(w, name, &s.labels),
    ),
    summary(
        "pathmeter_echo_pdv_seconds",
        "RTT minus the smallest RTT of the last one to two minutes (PDV, RFC 5481).",
        |w, name, s| mean(w, name, s, &s.pdv),
    ),
    counter(
        "pathmeter_echo_reordered_total",
        "Replies received after one with a higher sequence number (RFC 4737).",
        |w, name, s| one(w, name, s, s.reordered.get()),
    ),
    counter(
        "pathmeter_echo_verdicts_total",
        "Datagrams with a verdict: ok, late, lost, host_dropped or withdrawn. Counted when decided.",
        |w, name, s| one(w, name, s, s.decided()),
    ),
    summary(
        "pathmeter_echo_responder_transmit_lag_seconds",
        "Delay from the timestamp in a reply to its transmission by the responder's kernel. Sampled.",
        |w, name, s| mean(w, name, s, &s.transmit_lag),
    ),
    counter(
        "pathmeter_echo_responder_turnaround_invalid_total",
        "Replies with impossible responder timestamps. Their turnaround time was not subtracted.",
        |w, name, s| one(w, name, s, s.turnaround_invalid.get()),
    ),
    summary(
        "pathmeter_echo_responder_turnaround_seconds",
        "Time between receiving a request and replying to it at the responder. Not part of the RTT.",
        |w, name, s| mean(w, name, s, &s.turnaround),
    ),
    gauge(
        "pathmeter_echo_rtt_minimum_seconds",
        "Smallest RTT of the last one to two minutes; 0 if there was no reply.",
        |w, name, s| w.seconds(name, Suffix::None, &s.labels, CLOSE, s.rtt_minimum.get()),
    ),
    histogram(
        "pathmeter_echo_rtt_seconds",
        "RTT without the responder's turnaround time, of answered datagrams (ok and late).",
        |w, name, s| s.rtt.write(w, name, &s.labels, &RTT_BOUNDS, Writer::seconds),
    ),
    counter(
        "pathmeter_echo_send_errors_total",
        "Datagrams that this host could not send. Counted neither as sent nor as lost.",
        |w, name, s| s.send_errors.write(w, name, &s.labels),
    ),
    counter("pathmeter_echo_sent_total", "Datagrams sent.", |w, name, s| one(w, name, s, s.sent.get())),
    counter(
        "pathmeter_echo_unsent_total",
        "Scheduled sends missed because the process was not running in time. Not counted as lost.",
        |w, name, s| one(w, name, s, s.unsent.get()),
    ),
    counter(
        "pathmeter_echo_user_timestamps_total",
        "Timestamps taken by the process because the kernel provided none.",
        |w, name, s| s.user_timestamps.write(w, name, &s.labels),
    ),
    counter(
        "pathmeter_echo_very_late_total",
        "Replies received after their datagram counted as lost. The verdict does not change.",
        |w, name, s| one(w, name, s, s.very_late.get()),
    ),
    counter(
        "pathmeter_echo_withdrawn_total",
        "Datagrams undecided when the agent or peer stopped or the configuration changed. Not lost.",
        |w, name, s| one(w, name, s, s.withdrawn.get()),
    ),
];

/// Time limits of one configured echo probe.
#[derive(Debug)]
pub struct EchoLimits {
    labels: String,
    late_after: Duration,
    lost_after: Duration,
}

impl EchoLimits {
    /// Returns the limits of `probe`.
    #[must_use]
    pub fn new(probe: &str, late_after: Duration, lost_after: Duration) -> Self {
        Self { labels: label("probe", probe), late_after, lost_after }
    }
}

impl Series for EchoLimits {
    const FAMILIES: &'static [Family<Self>] = &[
        gauge(
            "pathmeter_echo_late_after_seconds",
            "A reply with a longer RTT counts as late.",
            |w, name, s| w.seconds(name, Suffix::None, &s.labels, CLOSE, nanos(s.late_after)),
        ),
        gauge(
            "pathmeter_echo_lost_after_seconds",
            "A datagram without a reply within this time counts as lost.",
            |w, name, s| w.seconds(name, Suffix::None, &s.labels, CLOSE, nanos(s.lost_after)),
        ),
    ];
    const LINES: usize = 2;
}
