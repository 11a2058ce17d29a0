//! The exported metrics of a path over connections, and the true values.

use pathmeter_lab::MetricsPage;
use pathmeter_lab::connection::{Connection, MessageExchange, MessageProtocol};
use pathmeter_proto::time::nanos;

use super::testbed::{ProbeProtocol, ProbedPath, StreamProbe};
use super::{MS, SECOND};
use crate::testbed::{Inconclusive, PAUSES, TIME_ERROR};

/// Longest delay between the arrival of a reply and the program's clock reading where the kernel does not
/// timestamp it: on average over all replies, and for one reply that falls above a bucket bound.
pub(super) const WAKE_UP: u64 = 2 * MS;
pub(super) const WAKE_UP_MAX: u64 = 15 * MS;

/// A run is inconclusive if more than one in this many slots went unsent: the machine did not run for too
/// long.
pub(super) const UNSENT_ONE_OF: u64 = 100;

/// Bucket bounds of the RTT histogram above the delay of the wires, in nanoseconds and as labels.
pub(super) const BOUNDS: [(u64, &str); 7] = [
    (50 * MS, "le=\"0.05\""),
    (100 * MS, "le=\"0.1\""),
    (200 * MS, "le=\"0.2\""),
    (500 * MS, "le=\"0.5\""),
    (SECOND, "le=\"1.0\""),
    (2 * SECOND, "le=\"2.0\""),
    (5 * SECOND, "le=\"5.0\""),
];

/// The exported metrics of a path at the end of a run, and its connections on the wire.
pub(super) struct StreamOutcome<'a> {
    pub(super) path: ProbedPath<'a>,
    pub(super) page: MetricsPage,
    /// The connections of the path, in opening order.
    pub(super) connections: Vec<Connection>,
}

/// Counters that must be 0 on a path that stays connected.
pub(super) const NONE_OF: [&str; 9] = [
    "reconnects_total",
    "lost_total",
    "host_dropped_total",
    "withdrawn_total",
    "send_errors_total",
    "mismatched_total",
    "duplicates_total",
    "very_late_total",
    "responder_turnaround_invalid_total",
];

impl StreamOutcome<'_> {
    pub(super) fn count(&self, name: &str, labels: &[&str]) -> u64 {
        self.path.count(&self.page, name, labels)
    }

    /// Retransmitted segments and bytes, as exported.
    pub(super) fn retransmitted(&self) -> [u64; 2] {
        [self.count("tcp_retransmits_total", &[]), self.count("tcp_retransmitted_bytes_total", &[])]
    }

    /// Retransmitted segments and bytes, from the wire's log.
    pub(super) fn truly_retransmitted(&self) -> [u64; 2] {
        let segment_counts = || self.connections.iter().map(|connection| connection.to_server.segments);
        [
            segment_counts().map(|segments| segments.retransmitted).sum(),
            segment_counts().map(|segments| segments.retransmitted_bytes).sum(),
        ]
    }

    /// The messages in the RTT histogram. A stream keeps its order, so they are the first ones that were
    /// answered in time.
    pub(super) fn exchanges(&self) -> Vec<(MessageExchange, (u64, u64))> {
        let ProbeProtocol::Messages(protocol) = self.path.probe.protocol else { return Vec::new() };
        let all = self.connections.iter().flat_map(|connection| connection.exchanges(protocol));
        let in_time = |exchange: MessageExchange| {
            let is_in_time = exchange.elapsed()?.0 <= nanos(self.path.probe.lost_after);
            is_in_time.then_some((exchange, exchange.round_trip()?))
        };
        let count = usize::try_from(self.path.answered(&self.page)).unwrap();
        let found: Vec<_> = all.filter_map(in_time).take(count).collect();
        assert_eq!(found.len(), count, "{:?}: more replies were exported than arrived", self.path);
        found
    }

    /// The messages of the current connection.
    pub(super) fn last_connection(&self) -> impl Iterator<Item = MessageExchange> {
        let exchanges = match (self.path.probe.protocol, self.connections.last()) {
            (ProbeProtocol::Messages(protocol), Some(connection)) => connection.exchanges(protocol),
            (ProbeProtocol::Http, _) | (_, None) => Vec::new(),
        };
        exchanges.into_iter()
    }

    /// Describes every difference between the exported metrics and the truth for a path that stays connected.
    pub(super) fn differences(&self) -> Vec<String> {
        let mut differences: Vec<String> = NONE_OF
            .iter()
            .map(|name| (name, self.count(name, &[])))
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name}: {count}"))
            .collect();
        if self.connections.len() != 1 || self.count("connected", &[]) != 1 {
            differences.push(format!("{} connections were opened", self.connections.len()));
        }
        let (exported, truth) = (self.retransmitted(), self.truly_retransmitted());
        if exported != truth {
            differences
                .push(format!("retransmitted segments and bytes: exported {exported:?}, true {truth:?}"));
        }
        let exchanges = self.exchanges();
        if exchanges.iter().zip(0..).any(|((exchange, _), place)| exchange.sequence != place) {
            differences.push("a message is missing".to_owned());
        }
        differences.extend(self.times_differ(&exchanges));
        differences
    }

    /// Describes every bucket, sum and slot count that the wire contradicts.
    pub(super) fn times_differ(&self, exchanges: &[(MessageExchange, (u64, u64))]) -> Vec<String> {
        let ProbeProtocol::Messages(protocol) = self.path.probe.protocol else { return Vec::new() };
        // Tolerance above the true time: for one message, and in the sum.
        let allowed = |exchange: &MessageExchange| match protocol {
            MessageProtocol::Tcp { .. } => {
                let most = TIME_ERROR + exchange.lateness_max(WAKE_UP_MAX);
                (most, most)
            }
            MessageProtocol::WebSocket { .. } => (WAKE_UP_MAX, WAKE_UP),
        };
        let unsent = self.count("unsent_total", &[]);
        let lags = |name: &str, more: &str| {
            self.page.count(&format!("pathmeter_loop_lag_seconds_{name}"), &["loop=\"streams\"", more])
        };
        // Wake-ups of the loop that came more than 10 ms after their time.
        let late_wakeups = lags("count", "") - lags("bucket", "le=\"0.01\"");
        let interval = nanos(self.path.probe.interval);
        let mut differences = Vec::new();

        let (first, last) = (exchanges.first().expect("some came").0, exchanges.last().expect("some came").0);
        let slots = (last.scheduled_at - first.scheduled_at + interval / 2) / interval;
        if slots.abs_diff(last.sequence - first.sequence + unsent) > 2 {
            differences
                .push(format!("{slots} slots were due, {} messages and {unsent} unsent", last.sequence));
        }

        let answered = exchanges.len() as u64;
        for (bound, label) in BOUNDS {
            let count = |are_above: &mut dyn Iterator<Item = bool>| are_above.filter(|is| *is).count() as u64;
            let least = count(&mut exchanges.iter().map(|(_, span)| span.0 > bound));
            let most = count(&mut exchanges.iter().map(|(found, span)| span.1 + allowed(found).0 > bound));
            let exported = answered - self.count("rtt_seconds_bucket", &[label]);
            // A pause of the machine between two clock readings affects one message, and so does a late
            // wake-up: just before a bound there is one message of the hundreds that arrive together.
            if exported + unsent < least || exported > most + unsent + late_wakeups {
                differences.push(format!(
                    "above {label}: exported {exported}, true {least} to {most}, {unsent} unsent, \
                     {late_wakeups} late wake-ups"
                ));
            }
        }

        let least: u64 = exchanges.iter().map(|(_, span)| span.0).sum();
        let most: u64 = exchanges.iter().map(|(exchange, span)| span.1 + allowed(exchange).1).sum();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a sum of seconds")]
        let exported = (self.path.seconds(&self.page, "rtt_seconds_sum") * 1e9) as u64;
        let slack = PAUSES + unsent * interval;
        if exported + slack < least || exported > most + slack {
            differences.push(format!("sum: exported {exported}, true {least} to {most}, tolerance {slack}"));
        }
        differences
    }

    /// Compares a path whose connection timed out because of a blackout.
    pub(super) fn compare_after_timeout(&self, from: u64, to: u64) -> Result<(), Inconclusive> {
        self.path.check_stalls(&self.page)?;
        let StreamProbe { lost_after, interval, .. } = *self.path.probe;
        let (lost_after, interval) = (nanos(lost_after), nanos(interval));
        let path = &self.path;
        let is_expected = |name: &&str| ["reconnects_total", "lost_total", "very_late_total"].contains(name);
        for name in NONE_OF.into_iter().filter(|name| !is_expected(name)) {
            assert_eq!(self.count(name, &[]), 0, "{name} of {path:?}\n{}", self.page);
        }
        let by_timeout = self.count("reconnects_total", &["reason=\"timeout\""]);
        assert_eq!(self.count("reconnects_total", &[]), by_timeout, "{path:?}\n{}", self.page);
        // Each timeout ended a connection that had been opened; the last connection stands.
        assert_eq!(by_timeout + 1, self.connections.len() as u64, "{path:?}\n{}", self.page);
        // The first connection, and the attempts that began more than 5 s before the blackout ended.
        assert!(by_timeout >= 2, "{by_timeout}");
        assert_eq!(self.count("connected", &[]), 1, "{path:?}");

        let exchanges = self.exchanges();
        let (sent, lost) =
            (exchanges.last().expect("some came").0.sequence + 1, self.count("lost_total", &[]));
        assert_eq!(lost + exchanges.len() as u64, sent, "{path:?}\n{}", self.page);
        let differences = self.times_differ(&exchanges);
        assert!(differences.is_empty(), "{path:?}\n{}\n{}", differences.join("\n"), self.page);

        // There is one gap: from the blackout to the message that waited when the path was connected again.
        let gaps = exchanges.windows(2).filter(|pair| pair[0].0.sequence + 1 != pair[1].0.sequence);
        let gaps: Vec<_> = gaps.map(|pair| (pair[0].0, pair[1].0)).collect();
        let [(before, behind)] = gaps[..] else { panic!("{path:?}: {gaps:?}") };
        assert_eq!(behind.sequence - before.sequence - 1, lost, "{path:?}");
        // A message sent just in time may be answered after it was declared lost.
        let very_late = self
            .last_connection()
            .filter(|exchange| exchange.elapsed().is_some_and(|elapsed| elapsed.0 > lost_after));
        assert_eq!(self.count("very_late_total", &[]), very_late.count() as u64, "{path:?}\n{}", self.page);
        let unsent = self.count("unsent_total", &[]);
        let slack = (unsent + 3) * interval;
        // The last answered message left just before the blackout.
        assert!(
            before.scheduled_at < from && before.scheduled_at + slack + 40 * MS > from,
            "{path:?}: {before:?}, {from}"
        );
        // The first message on the new connection had waited almost as long as allowed.
        assert!(behind.scheduled_at < to + lost_after, "{path:?}: {behind:?}");
        let waited = behind.waited().unwrap_or_default();
        let is_in_time = waited <= lost_after + PAUSES && waited + slack >= lost_after;
        assert!(is_in_time, "{path:?}: {behind:?} waited {waited} ns");
        eprintln!("{}, {lost} lost, {by_timeout} timeouts", self.row());
        Ok(())
    }

    /// A line of results.
    pub(super) fn row(&self) -> String {
        let exchanges = self.exchanges();
        let segments =
            self.connections.first().map(|connection| connection.to_server.segments).unwrap_or_default();
        let waited = exchanges.iter().filter(|(exchange, _)| exchange.waited().is_some()).count();
        let above: Vec<u64> = BOUNDS
            .iter()
            .map(|(_, label)| self.path.answered(&self.page) - self.count("rtt_seconds_bucket", &[label]))
            .collect();
        format!(
            "{:?}: {} answered, {waited} waited, {above:?} above bounds, {segments:?}",
            self.path.labels,
            exchanges.len()
        )
    }
}
