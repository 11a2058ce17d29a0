//! The latency of a path before and during a run.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pathmeter_proto::bandwidth::harm::{
    ECHO_INTERVAL, EchoDelay, Harm, HarmLimits, HarmMonitor, IDLE_TIME, LoadedLatency, OneWay,
};
use pathmeter_proto::echo::{EchoReport, RoundTrip, Verdict};
use pathmeter_proto::key::Keys;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::PeerTimestamp;
use tokio::time::sleep;

use crate::clock::Clock;
use crate::config::Probe;
use crate::config::probe_options::{Argument, probe_from_options};
use crate::config::units::display;
use crate::datagram::{self, Control, NewTask};
use crate::echo::EchoPlan;
use crate::loops::{LoopSender, NewPath};
use crate::paths::PathId;

/// The echoes that watch a path.
#[derive(Debug, Clone)]
pub struct PathEchoes {
    /// Where and how they are sent.
    pub plan: EchoPlan,
    /// The keys that authenticate them.
    pub keys: Option<Arc<Keys>>,
    /// The datagram loop that sends them.
    pub prober: LoopSender<NewTask, Control>,
    /// Identifies them on that loop.
    pub id: PathId,
}

/// The probe that describes the echoes of a path: STAMP over UDP, each 20 ms. `options` are options of the
/// configuration such as `dscp`.
///
/// # Errors
/// All problems of the options.
pub fn echo_probe(options: Vec<(&'static str, Argument)>) -> Result<Probe, String> {
    let text = |text: &str| Argument::Text(text.to_owned());
    let mut all = vec![("protocol", text("udp")), ("interval", Argument::Text(display(ECHO_INTERVAL)))];
    all.extend(options);
    probe_from_options(all)
}

/// Interval at which the replies are examined.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// How long the replies to the last echoes of a run are waited for.
const REPLY_WAIT: Duration = Duration::from_secs(1);

/// Sends echoes over a path and watches the replies. Dropping it stops them.
pub struct LatencyWatch {
    echoes: PathEchoes,
    reports: Receiver<EchoReport>,
    monitor: HarmMonitor,
    /// Whether harm stops the run.
    stops: bool,
    last_rtt: Option<Duration>,
    /// T1 and T2 of the first reply.
    reference: Option<(Timestamp, PeerTimestamp)>,
}

impl LatencyWatch {
    /// Begins to send. `harm`: when a run must stop; `None`: never.
    #[must_use]
    pub fn start(echoes: PathEchoes, harm: Option<HarmLimits>, seed: u64) -> Self {
        let (tap, reports) = channel();
        if let Some(task) = echoes.plan.observed_task(echoes.keys.clone(), seed, tap) {
            echoes.prober.start(NewPath { id: echoes.id, task, peer_left_at: None });
        }
        let (monitor, stops) = (HarmMonitor::new(harm.unwrap_or_default()), harm.is_some());
        Self { echoes, reports, monitor, stops, last_rtt: None, reference: None }
    }

    /// Measures the idle path, for [`IDLE_TIME`]. Returns whether harm can be seen: the path has answered.
    pub async fn idle(&mut self) -> bool {
        for _ in 0..IDLE_TIME.as_millis() / CHECK_INTERVAL.as_millis() {
            sleep(CHECK_INTERVAL).await;
            self.check();
        }
        self.monitor.has_baseline()
    }

    /// The load begins.
    pub(super) fn load_begins(&mut self) {
        self.check();
        self.monitor.load_begins();
    }

    /// The load has ended: waits for the replies that are on the way, for at most [`REPLY_WAIT`].
    pub(super) async fn load_ends(&mut self) {
        self.check();
        self.monitor.load_ends();
        for _ in 0..REPLY_WAIT.as_millis() / CHECK_INTERVAL.as_millis() {
            if !self.monitor.is_waiting() {
                break;
            }
            sleep(CHECK_INTERVAL).await;
            self.check();
        }
    }

    /// Examines the replies since the last call. Returns harm if the run must stop.
    pub(super) fn check(&mut self) -> Option<Harm> {
        // Replies that arrived before are among the reports.
        let drained = Clock::now() - datagram::RECEIVE_TICK_MAX;
        let mut harm = None;
        while let Ok(report) = self.reports.try_recv() {
            match report {
                EchoReport::Sent { sequence, .. } => self.monitor.sent(sequence, Clock::now()),
                EchoReport::Decided {
                    sequence,
                    verdict: Verdict::Ok | Verdict::Late,
                    sample: Some(sample),
                    ..
                } => {
                    self.last_rtt = Some(sample.rtt);
                    let delay = EchoDelay { rtt: sample.rtt, one_way: self.one_way(&sample) };
                    let found = self.monitor.answered(sequence, delay);
                    harm = harm.or(found);
                }
                EchoReport::Decided { .. }
                | EchoReport::Unsent(_)
                | EchoReport::SendError(_)
                | EchoReport::Ipdv(_)
                | EchoReport::Duplicate
                | EchoReport::Reordered
                | EchoReport::VeryLate
                | EchoReport::Mismatched(_)
                | EchoReport::BurstBegan
                | EchoReport::BurstEnded(_)
                | EchoReport::TransmitLag(_)
                | EchoReport::TurnaroundInvalid
                | EchoReport::Icmp(_)
                | EchoReport::LossyFlows(_) => {}
            }
        }
        let missing = self.monitor.check(drained);
        harm.or(missing).filter(|_| self.stops)
    }

    /// The differences of the clocks at both ends of each way, relative to those of the first reply.
    fn one_way(&mut self, sample: &RoundTrip) -> Option<OneWay> {
        let received = sample.responder_received?;
        let (first_sent, first_received) = *self.reference.get_or_insert((sample.sent, received));
        let forward =
            received.signed_since(first_received).saturating_sub(sample.sent.signed_since(first_sent));
        let rtt = i64::try_from(sample.rtt.as_nanos()).unwrap_or(i64::MAX);
        Some(OneWay { forward, reverse: rtt.saturating_sub(forward) })
    }

    /// The last round trip.
    #[must_use]
    pub fn last_rtt(&self) -> Option<Duration> {
        self.last_rtt
    }

    /// The latency idle and under load; `None` if no echo was answered in one of the two.
    #[must_use]
    pub fn result(&self) -> Option<LoadedLatency> {
        self.monitor.latency()
    }
}

impl Drop for LatencyWatch {
    fn drop(&mut self) {
        self.echoes.prober.remove(self.echoes.id);
    }
}

impl fmt::Debug for LatencyWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatencyWatch").field("to", &self.echoes.plan.to()).finish_non_exhaustive()
    }
}
