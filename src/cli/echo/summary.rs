//! The summary of one measurement, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use pathmeter_proto::echo::{Direction, EchoReport, Verdict};
use pathmeter_proto::machine::{NotSent, TimestampSource};
use pathmeter_proto::stats::quantile;
use serde::Serialize;

/// Counts and durations from all reports of one path.
#[derive(Debug, Default)]
pub(in crate::cli) struct EchoSummary {
    sent: u64,
    received: u64,
    late: u64,
    lost: Lost,
    host_dropped: u64,
    withdrawn: u64,
    unsent: u64,
    /// By reason.
    send_errors: BTreeMap<NotSent, u64>,
    duplicates: u64,
    reordered: u64,
    mismatched: u64,
    /// HTTP responses with an unexpected status or body.
    pub(super) unexpected: u64,
    icmp: Option<String>,
    round_trips: Vec<Duration>,
    variations: Vec<Duration>,
    turnaround: Duration,
    hops: Hops,
    timestamps: [Option<TimestampOrigin>; 2],
    last: Option<Duration>,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Lost {
    forward: u64,
    reverse: u64,
    unknown: u64,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Hops {
    forward: Option<u8>,
    reverse: Option<u8>,
}

/// Who took the timestamps of all datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum TimestampOrigin {
    Kernel,
    User,
    Mixed,
}

impl TimestampOrigin {
    fn add(known: Option<Self>, by: TimestampSource) -> Option<Self> {
        let source = match by {
            TimestampSource::Kernel => Self::Kernel,
            TimestampSource::User => Self::User,
        };
        match known {
            Some(known) if known != source => Some(Self::Mixed),
            Some(_) | None => Some(source),
        }
    }

    fn name(timestamps: Option<Self>) -> &'static str {
        match timestamps {
            None => "none",
            Some(Self::Kernel) => "kernel",
            Some(Self::User) => "user",
            Some(Self::Mixed) => "mixed",
        }
    }
}

/// The object of `--json`.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct SummaryJson {
    target: String,
    address: String,
    sent: u64,
    received: u64,
    late: u64,
    duplicates: u64,
    reordered: u64,
    unsent: u64,
    send_errors: u64,
    host_dropped: u64,
    withdrawn: u64,
    unexpected: u64,
    lost: Lost,
    rtt_seconds: RttSummary,
    ipdv_seconds: IpdvSummary,
    hops: Hops,
    timestamps: Timestamps,
}

#[derive(Debug, Serialize)]
struct RttSummary {
    min: Option<f64>,
    mean: Option<f64>,
    stddev: Option<f64>,
    p50: Option<f64>,
    p90: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

#[derive(Debug, Serialize)]
struct IpdvSummary {
    mean: Option<f64>,
    p99: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Timestamps {
    transmit: Option<TimestampOrigin>,
    receive: Option<TimestampOrigin>,
}

/// The verdict on one datagram, as JSON.
#[derive(Debug, Serialize)]
pub(super) struct DecidedJson {
    flow: u8,
    sequence: u64,
    verdict: &'static str,
    /// Only of a loss.
    direction: Option<&'static str>,
    /// Only of a reply, in time or late.
    rtt_seconds: Option<f64>,
}

impl DecidedJson {
    /// Returns `None` for a report without a verdict.
    pub(super) fn of(report: &EchoReport) -> Option<Self> {
        let EchoReport::Decided { flow, sequence, verdict, sample } = report else { return None };
        let (verdict, direction) = match verdict {
            Verdict::Ok => ("ok", None),
            Verdict::Late => ("late", None),
            Verdict::Lost(Direction::Forward) => ("lost", Some("forward")),
            Verdict::Lost(Direction::Reverse) => ("lost", Some("reverse")),
            Verdict::Lost(Direction::Unknown) => ("lost", Some("unknown")),
            Verdict::HostDropped => ("host_dropped", None),
            Verdict::Withdrawn => ("withdrawn", None),
        };
        let rtt_seconds = sample.as_ref().map(|sample| sample.rtt.as_secs_f64());
        Some(Self { flow: *flow, sequence: *sequence, verdict, direction, rtt_seconds })
    }
}

impl EchoSummary {
    /// Adds a report.
    pub(super) fn add(&mut self, report: &EchoReport) {
        match report {
            EchoReport::Sent { .. } => self.sent += 1,
            EchoReport::Unsent(slots) => self.unsent += slots,
            EchoReport::SendError(reason) => *self.send_errors.entry(*reason).or_default() += 1,
            EchoReport::Decided { verdict, sample, .. } => {
                match verdict {
                    Verdict::Ok => self.received += 1,
                    Verdict::Late => {
                        self.received += 1;
                        self.late += 1;
                    }
                    Verdict::Lost(Direction::Forward) => self.lost.forward += 1,
                    Verdict::Lost(Direction::Reverse) => self.lost.reverse += 1,
                    Verdict::Lost(Direction::Unknown) => self.lost.unknown += 1,
                    Verdict::HostDropped => self.host_dropped += 1,
                    Verdict::Withdrawn => self.withdrawn += 1,
                }
                let Some(sample) = sample else { return };
                self.round_trips.push(sample.rtt);
                self.last = Some(sample.rtt);
                self.turnaround += sample.turnaround;
                self.hops.forward = sample.hops_forward.or(self.hops.forward);
                self.hops.reverse = sample.hops_reverse.or(self.hops.reverse);
                self.timestamps[0] = TimestampOrigin::add(self.timestamps[0], sample.transmit);
                self.timestamps[1] = TimestampOrigin::add(self.timestamps[1], sample.receive);
            }
            EchoReport::Ipdv(difference) => self.variations.push(*difference),
            EchoReport::Duplicate => self.duplicates += 1,
            EchoReport::Reordered => self.reordered += 1,
            EchoReport::Mismatched(_) => self.mismatched += 1,
            EchoReport::Icmp(kind) => {
                self.icmp = Some(crate::metrics::echo::icmp_error_name(*kind).to_owned())
            }
            EchoReport::VeryLate
            | EchoReport::BurstBegan
            | EchoReport::BurstEnded(_)
            | EchoReport::TransmitLag(_)
            | EchoReport::TurnaroundInvalid
            | EchoReport::LossyFlows(_) => {}
        }
    }

    /// Whether a reply was received.
    pub(in crate::cli) fn has_answer(&self) -> bool {
        self.received > 0
    }

    /// Whether a datagram was sent or due.
    pub(in crate::cli) fn has_sent(&self) -> bool {
        self.sent + self.unsent + self.not_sent() > 0
    }

    /// Number of datagrams that this host could not send.
    fn not_sent(&self) -> u64 {
        self.send_errors.values().sum()
    }

    /// The progress of the measurement in one line.
    pub(super) fn line(&self, count: u64) -> String {
        let lost = self.lost.forward + self.lost.reverse + self.lost.unknown;
        let last = self.last.map_or_else(|| "-".to_owned(), milliseconds);
        format!("{}/{count} sent, {} received, {lost} lost, last rtt {last} ms", self.sent, self.received)
    }

    /// The summary as one JSON object.
    pub(in crate::cli) fn json(&mut self, target: &str, address: &str) -> SummaryJson {
        self.round_trips.sort_unstable();
        self.variations.sort_unstable();
        let rtt = |q| quantile(&self.round_trips, q).map(|rtt| rtt.as_secs_f64());
        SummaryJson {
            target: target.to_owned(),
            address: address.to_owned(),
            sent: self.sent,
            received: self.received,
            late: self.late,
            duplicates: self.duplicates,
            reordered: self.reordered,
            unsent: self.unsent,
            send_errors: self.not_sent(),
            host_dropped: self.host_dropped,
            withdrawn: self.withdrawn,
            unexpected: self.unexpected,
            lost: self.lost,
            rtt_seconds: RttSummary {
                min: self.round_trips.first().map(Duration::as_secs_f64),
                mean: mean(&self.round_trips).map(|mean| mean.as_secs_f64()),
                stddev: standard_deviation(&self.round_trips).map(|deviation| deviation.as_secs_f64()),
                p50: rtt(0.5),
                p90: rtt(0.9),
                p99: rtt(0.99),
                max: self.round_trips.last().map(Duration::as_secs_f64),
            },
            ipdv_seconds: IpdvSummary {
                mean: mean(&self.variations).map(|mean| mean.as_secs_f64()),
                p99: quantile(&self.variations, 0.99).map(|p99| p99.as_secs_f64()),
            },
            hops: self.hops,
            timestamps: Timestamps { transmit: self.timestamps[0], receive: self.timestamps[1] },
        }
    }

    /// What became of the datagrams, in a line or more.
    pub(in crate::cli) fn counts(&self) -> String {
        let Lost { forward, reverse, unknown } = self.lost;
        let lost = forward + reverse + unknown;
        let decided = self.received + lost;
        #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
        let percent = if decided == 0 { 0.0 } else { lost as f64 * 100.0 / decided as f64 };
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{} sent, {} received, {lost} lost ({percent:.1} %: forward {forward}, reverse {reverse}, unknown {unknown})",
            self.sent, self.received
        );
        let others = [
            (self.late, "late"),
            (self.duplicates, "duplicates"),
            (self.reordered, "reordered"),
            (self.unsent, "unsent"),
            (self.host_dropped, "dropped by a host"),
            (self.withdrawn, "withdrawn"),
            (self.mismatched, "mismatched replies"),
            (self.unexpected, "with an unexpected status or body"),
        ];
        let others: Vec<String> =
            others.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if !others.is_empty() {
            let _ = writeln!(out, "{}", others.join(", "));
        }
        for (reason, count) in &self.send_errors {
            let _ = writeln!(out, "{count} could not be sent: {}", reason.as_text());
        }
        if let Some(kind) = &self.icmp {
            let _ = writeln!(out, "ICMP: {kind}");
        }
        out
    }

    /// The RTTs in a few numbers; `None` without a reply.
    pub(in crate::cli) fn rtts(&self) -> Option<String> {
        let (min, max) = (self.round_trips.iter().min()?, self.round_trips.iter().max()?);
        let (mean, deviation) = (mean(&self.round_trips)?, standard_deviation(&self.round_trips)?);
        let [min, mean, max, deviation] = [*min, mean, *max, deviation].map(milliseconds);
        Some(format!("rtt min/mean/max/stddev = {min}/{mean}/{max}/{deviation} ms"))
    }

    /// The summary as text of several lines.
    pub(super) fn text(&mut self, target: &str, address: &str) -> String {
        self.round_trips.sort_unstable();
        self.variations.sort_unstable();
        let mut out = format!("--- {target} ({address}) ---\n{}", self.counts());
        if let (Some(min), Some(max), Some(mean)) =
            (self.round_trips.first(), self.round_trips.last(), mean(&self.round_trips))
        {
            let shown = |q| quantile(&self.round_trips, q).map_or_else(|| "-".to_owned(), milliseconds);
            let _ = writeln!(
                out,
                "rtt min/mean/p50/p90/p99/max = {}/{}/{}/{}/{}/{} ms{}",
                milliseconds(*min),
                milliseconds(mean),
                shown(0.5),
                shown(0.9),
                shown(0.99),
                milliseconds(*max),
                if self.round_trips.len() < 1_000 {
                    " (-: too few replies; p50 needs 20, p90 100, p99 1000)"
                } else {
                    ""
                }
            );
        }
        if let Some(mean) = mean(&self.variations) {
            let p99 = quantile(&self.variations, 0.99).map_or_else(|| "-".to_owned(), milliseconds);
            let _ = writeln!(out, "ipdv mean/p99 = {}/{p99} ms", milliseconds(mean));
        }
        if self.received > 0 {
            let hops = |hops: Option<u8>| hops.map_or_else(|| "unknown".to_owned(), |hops| hops.to_string());
            let turnaround = match self.turnaround {
                Duration::ZERO => "unknown, included in the rtt".to_owned(),
                sum => {
                    let mean = sum / u32::try_from(self.received).unwrap_or(u32::MAX);
                    format!("{} ms, not included in the rtt", milliseconds(mean))
                }
            };
            let _ = writeln!(
                out,
                "hops {} forward, {} reverse; timestamps {} transmit, {} receive; responder turnaround {turnaround}",
                hops(self.hops.forward),
                hops(self.hops.reverse),
                TimestampOrigin::name(self.timestamps[0]),
                TimestampOrigin::name(self.timestamps[1]),
            );
        }
        out
    }
}

fn mean(values: &[Duration]) -> Option<Duration> {
    let count = u32::try_from(values.len()).ok().filter(|count| *count > 0)?;
    Some(values.iter().sum::<Duration>() / count)
}

/// The standard deviation of the values themselves, as of ping(8), not an estimate for further ones.
fn standard_deviation(values: &[Duration]) -> Option<Duration> {
    let mean = mean(values)?.as_secs_f64();
    let squares: f64 = values.iter().map(|value| (value.as_secs_f64() - mean).powi(2)).sum();
    #[expect(clippy::cast_precision_loss, reason = "counts of replies are far below 2^52")]
    let variance = squares / values.len() as f64;
    Some(Duration::from_secs_f64(variance.sqrt()))
}

/// Milliseconds with three decimals.
pub(super) fn milliseconds(span: Duration) -> String {
    format!("{:.3}", span.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_deviation_is_that_of_the_values() {
        let values = [2, 4, 4, 4, 5, 5, 7, 9].map(Duration::from_millis);
        let deviation = standard_deviation(&values).unwrap();
        assert!(deviation.abs_diff(Duration::from_millis(2)) < Duration::from_nanos(2), "{deviation:?}");
        assert_eq!(standard_deviation(&values[..1]), Some(Duration::ZERO));
        assert_eq!(standard_deviation(&[]), None);
    }
}
