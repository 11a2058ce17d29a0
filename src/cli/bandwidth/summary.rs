//! The results of `probe bandwidth`, as text and as JSON.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::load::check::CheckVerdict;
use pathmeter_proto::wire::load::Dispersion;
use serde_json::{Value, json};

use crate::bulk::{LimitedBy, RunOutcome};
use crate::config::bandwidth::Method;

/// The name of a direction in texts.
pub(in crate::cli) type DirectionName = fn(RunDirection) -> &'static str;

/// The results of all runs.
#[derive(Debug)]
pub(in crate::cli) struct Summary {
    target: String,
    address: SocketAddr,
    /// Results of single runs, or of clients that measured at the same time.
    results: Vec<ClientResult>,
    is_concurrent: bool,
    name_of: DirectionName,
}

/// The result of one client.
#[derive(Debug)]
pub(super) struct ClientResult {
    /// Its number, from 1.
    pub(super) client: u16,
    pub(super) direction: RunDirection,
    /// The outcome, or why there is none.
    pub(super) outcome: Result<RunOutcome, String>,
}

impl ClientResult {
    /// Whether the run did not begin, or nothing was received.
    fn has_failed(&self) -> bool {
        !self.outcome.as_ref().is_ok_and(|run| run.bytes > 0)
    }
}

impl Summary {
    pub(super) fn new(target: &str, address: SocketAddr, name_of: DirectionName) -> Self {
        Self { target: target.to_owned(), address, results: Vec::new(), is_concurrent: false, name_of }
    }

    /// Adds a single run.
    pub(super) fn add(&mut self, direction: RunDirection, outcome: Result<RunOutcome, String>) {
        self.results.push(ClientResult { client: 1, direction, outcome });
    }

    /// Adds the results of clients that measured at the same time.
    pub(super) fn add_clients(&mut self, mut results: Vec<ClientResult>) {
        results.sort_by_key(|result| result.client);
        self.results.extend(results);
        self.is_concurrent = true;
    }

    /// Whether there is no result, because it was interrupted.
    pub(in crate::cli) fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Whether a run did not begin, or nothing was received.
    pub(in crate::cli) fn has_failures(&self) -> bool {
        self.results.is_empty() || self.results.iter().any(ClientResult::has_failed)
    }

    /// What went wrong: why runs did not begin, or that nothing was received.
    pub(in crate::cli) fn failure(&self) -> Option<String> {
        let failed: Vec<&ClientResult> = self.results.iter().filter(|result| result.has_failed()).collect();
        let first =
            failed.first()?.outcome.as_ref().map_or_else(String::as_str, |_| "no payload was received");
        Some(match self.is_concurrent {
            true => format!("{} of {} clients failed: {first}", failed.len(), self.results.len()),
            false => first.to_owned(),
        })
    }

    /// The results of one direction.
    pub(in crate::cli) fn text_of(&self, direction: RunDirection) -> String {
        let results = self.results.iter().filter(|result| result.direction == direction);
        let name = (self.name_of)(direction);
        match self.is_concurrent {
            true => clients_text(name, results),
            false => {
                let runs = results.filter_map(|result| result.outcome.as_ref().ok());
                runs.map(|run| run_text(name, run)).collect()
            }
        }
    }

    /// Why the single run of a direction did not begin.
    pub(super) fn error_of(&self, direction: RunDirection) -> Option<&str> {
        let mut errors = self.results.iter().filter(|result| result.direction == direction);
        errors
            .find_map(|result| result.outcome.as_ref().err())
            .filter(|_| !self.is_concurrent)
            .map(String::as_str)
    }

    pub(in crate::cli) fn json(&self) -> Value {
        let result = |result: &ClientResult| {
            let mut value = match &result.outcome {
                Ok(outcome) => outcome.json(),
                Err(error) => json!({"direction": result.direction.as_str(), "error": error}),
            };
            if self.is_concurrent {
                value["client"] = result.client.into();
            }
            value
        };
        let results: Vec<Value> = self.results.iter().map(result).collect();
        json!({"target": self.target, "address": self.address.ip().to_string(), "results": results})
    }
}

/// The line that shows a run in progress.
pub(super) fn live_line(name: &str, before: Progress, now: Progress, rtt: Option<Duration>) -> String {
    let nanos = now.at.since(before.at).as_nanos();
    let bytes = u128::from(now.bytes.saturating_sub(before.bytes));
    let rate = u64::try_from((bytes * 1_000_000_000).checked_div(nanos).unwrap_or(0)).unwrap_or(u64::MAX);
    let seconds = now.at.since(Default::default()).as_secs_f64();
    let mut line = format!("{name}: {seconds:.1} s, {}, {}", megabits(rate), megabytes(now.bytes));
    if let Some(rtt) = rtt {
        let _ = write!(line, ", rtt {} ms", millis(rtt));
    }
    line
}

/// A run, in a few lines.
fn run_text(name: &str, run: &RunOutcome) -> String {
    let mut text = match run.method {
        Method::Tcp => tcp_text(name, run),
        Method::Train => train_text(name, run),
        Method::Check => check_text(name, run),
    };
    match run.latency {
        Some(latency) => {
            let _ = write!(
                text,
                "  rtt {} ms idle, {} ms under load; added delay {} ms",
                millis(latency.idle_rtt),
                millis(latency.loaded_rtt),
                millis(latency.added_delay),
            );
            if let Some(one_way) = latency.added_one_way {
                let (forward, reverse) = (millis(one_way.forward), millis(one_way.reverse));
                let _ = write!(text, " (forward {forward}, reverse {reverse})");
            }
            let (rpm, confidence) = (latency.round_trips_per_minute, latency.confidence.as_str());
            let _ = writeln!(text, "; {rpm} round trips per minute ({confidence} confidence)");
        }
        None => text.push_str("  latency unknown: no replies\n"),
    }
    text
}

fn tcp_text(name: &str, run: &RunOutcome) -> String {
    let connections = match run.streams {
        1 => "1 connection".to_owned(),
        streams => format!("{streams} connections"),
    };
    let control = match run.sender.congestion_control.as_str() {
        "" => String::new(),
        name => format!(", {name}"),
    };
    let mut text = format!("{name}: {} (tcp, {connections}{control})\n{}", throughput(run), ending(run));
    let _ = write!(text, "  {} segments retransmitted", run.sender.retransmits);
    if let Some(ratio) = run.loss_ratio() {
        let _ = write!(text, " ({:.3} % of the bytes)", ratio * 100.0);
    }
    text.push('\n');
    text
}

/// Trains have a rate, a range, or nothing.
fn train_text(name: &str, run: &RunOutcome) -> String {
    let rate = match run.dispersion() {
        Some(Dispersion { rate: Some(rate), .. }) => format!("about {}", megabits(rate)),
        Some(Dispersion { low, high: Some(high), .. }) => format!("{} to {}", megabits(low), megabits(high)),
        Some(Dispersion { low, high: None, .. }) => format!("at least {}", megabits(low)),
        None => "unknown".to_owned(),
    };
    let mut text = format!("{name}: dispersion rate {rate} (train)\n{}", ending(run));
    if let Some(sustained) = run.dispersion().and_then(|dispersion| dispersion.sustained) {
        let _ = writeln!(text, "  a token bucket lets a burst pass, and then {}", megabits(sustained));
    }
    text + &lost_text(run)
}

fn check_text(name: &str, run: &RunOutcome) -> String {
    let verdict = match run.verdict() {
        Some(CheckVerdict::Passed) => "the path carries this rate",
        Some(CheckVerdict::Loss) => "the path does not carry this rate: datagrams were lost",
        Some(CheckVerdict::Delay) => "the path does not carry this rate: a queue grew",
        Some(CheckVerdict::Congestion) => "the path does not carry this rate: routers reported congestion",
        Some(CheckVerdict::Sender) => "unknown: the sender was slower than this rate",
        Some(CheckVerdict::Stopped) => "unknown: the run ended too soon",
        Some(CheckVerdict::Receiver) | None => "unknown: the receiver could not count everything",
    };
    let mut text = format!("{name}: {verdict}; {} (check)\n{}", throughput(run), ending(run));
    let growth = run.load.and_then(|load| load.result.delay_growth);
    if let Some(micros) = growth.and_then(|micros| u64::try_from(micros).ok()) {
        let _ = writeln!(text, "  delay grew by {} ms", millis(Duration::from_micros(micros)));
    }
    text + &lost_text(run)
}

fn throughput(run: &RunOutcome) -> String {
    let relation = if run.is_capacity() { "" } else { "at least " };
    run.throughput().map_or_else(|| "unknown".to_owned(), |rate| relation.to_owned() + &megabits(rate))
}

/// What was received, and why it ended.
fn ending(run: &RunOutcome) -> String {
    let (bytes, seconds) = (megabytes(run.bytes), run.duration.as_secs_f64());
    format!("  {bytes} in {seconds:.2} s; {}; {}\n", stopped(run.stop_reason), limit(run.limited_by))
}

fn lost_text(run: &RunOutcome) -> String {
    run.loss_ratio().map(|ratio| format!("  {:.3} % lost\n", ratio * 100.0)).unwrap_or_default()
}

/// The clients of one direction: their sum, and what went wrong.
fn clients_text<'a>(name: &str, results: impl Iterator<Item = &'a ClientResult>) -> String {
    let (mut all, mut rates, mut bytes, mut failures) =
        (0_usize, Vec::new(), 0_u64, Vec::<(&str, usize)>::new());
    for result in results {
        all += 1;
        match &result.outcome {
            Ok(run) => {
                rates.extend(run.throughput());
                bytes = bytes.saturating_add(run.bytes);
            }
            Err(error) => match failures.iter_mut().find(|(known, _)| known == error) {
                Some((_, count)) => *count += 1,
                None => failures.push((error, 1)),
            },
        }
    }
    rates.sort_unstable();
    let failed: usize = failures.iter().map(|(_, count)| count).sum();
    let mut text = format!("{name}: {} of {all} clients measured, {}", all - failed, megabytes(bytes));
    if let (Some(least), Some(most)) = (rates.first(), rates.last()) {
        let median = rates[rates.len() / 2];
        let _ = write!(
            text,
            "\n  throughput min/median/max {}/{}/{}",
            megabits(*least),
            megabits(median),
            megabits(*most)
        );
    }
    text.push('\n');
    for (error, count) in failures {
        let _ = writeln!(text, "  {count} failed: {error}");
    }
    text
}

const fn stopped(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Bytes => "all bytes sent",
        StopReason::Time => "time over",
        StopReason::Delay => "stopped: other traffic was delayed",
        StopReason::Loss => "stopped: other traffic was lost",
        StopReason::Congestion => "stopped: routers reported congestion",
        StopReason::Host => "stopped: the receiving host was too slow",
        StopReason::Lease => "stopped: the lease has ended",
        StopReason::Peer => "stopped: the other agent ended it or stopped answering",
        StopReason::Operator => "stopped by the user",
    }
}

const fn limit(by: LimitedBy) -> &'static str {
    match by {
        LimitedBy::Path => "limited by the path",
        LimitedBy::Sender => "limited by the sending host",
        LimitedBy::Receiver => "limited by the receiving host",
        LimitedBy::RateMax => "limited by the maximum rate",
        LimitedBy::Unknown => "what limited it is unknown",
    }
}

/// A rate in Mbit/s.
fn megabits(bytes_per_second: u64) -> String {
    format!("{} Mbit/s", decimal(u128::from(bytes_per_second) * 8, 1_000_000))
}

fn megabytes(bytes: u64) -> String {
    format!("{} MB", decimal(bytes.into(), 1_000_000))
}

fn millis(span: Duration) -> String {
    decimal(span.as_nanos(), 1_000_000)
}

/// A quotient with about four digits.
fn decimal(value: u128, unit: u128) -> String {
    let (whole, thousandths) = (value / unit, value % unit * 1_000 / unit);
    match whole {
        0..10 => format!("{whole}.{thousandths:03}"),
        10..100 => format!("{whole}.{:02}", thousandths / 10),
        100..1_000 => format!("{whole}.{}", thousandths / 100),
        1_000.. => whole.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_about_four_digits() {
        for (bytes, text) in
            [(0, "0.000"), (1_234_567, "1.234"), (12_345_678, "12.34"), (123_456_789, "123.4")]
        {
            assert_eq!(megabytes(bytes), format!("{text} MB"));
        }
        assert_eq!(megabits(1_250_000_000), "10000 Mbit/s");
        assert_eq!(millis(Duration::from_micros(12)), "0.012");
    }
}
