//! The latency of the path before and during a run.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::Context as _;
use pathmeter_proto::bandwidth::harm::{
    EchoDelay, Harm, HarmLimits, HarmMonitor, IDLE_TIME, LoadedLatency, OneWay,
};
use pathmeter_proto::echo::{EchoReport, RoundTrip, Verdict};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::PeerTimestamp;

use super::super::target::ProbeTarget;
use super::super::{Failure, seed};
use crate::clock::Clock;
use crate::config::Probe;
use crate::config::echo::Echo;
use crate::datagram::{self, TimestampMatching};
use crate::echo::{EchoPath, EchoPlan, FiniteRun};
use crate::loops::EVENTS_PENDING_MAX;
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, OwnFlowPermission, StartContext};
use crate::stream;

/// Sends echo requests to the target and watches the replies. Dropping it stops them.
pub(super) struct LatencyWatch {
    reports: Receiver<EchoReport>,
    monitor: HarmMonitor,
    /// Whether harm stops the run.
    stops: bool,
    last_rtt: Option<Duration>,
    /// T1 and T2 of the first reply.
    reference: Option<(Timestamp, PeerTimestamp)>,
    loops: Loops,
    _path: EchoPath,
}

/// Echo requests of a run: one each 20 ms for longer than any run may take.
const ECHOES_MAX: u64 = 1_000_000;

impl LatencyWatch {
    /// Begins to send.
    pub(super) fn start(
        echo: &Probe,
        target: &ProbeTarget,
        address: IpAddr,
        harm: Option<HarmLimits>,
    ) -> Result<Self, Failure> {
        let kind = echo.kind.downcast::<Echo>().expect("the arguments describe an echo probe");
        let plan = EchoPlan::new(echo, &Arc::new(kind.clone()), &target.remote(), address, target.settings());
        let (tap, reports) = channel();
        let (sender, _) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
        let loops = Loops {
            prober: datagram::spawn("prober", Vec::new(), TimestampMatching::detect(), sender.clone())?,
            streams: stream::spawn(sender).context("starting the stream thread")?,
            probe_budget: Arc::default(),
            traces: Arc::default(),
            quoted_headers: Arc::default(),
            own_flow: OwnFlowPermission::default(),
        };
        let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
        let start = StartContext {
            id: PathId(1),
            key: &PathKey { probe: "once".into(), peer: target.name().into(), family },
            settings: target.settings(),
            loops: &loops,
            peer_left_at: None,
            seed: seed()?,
            followed: Arc::default(),
        };
        let path = EchoPath::start(plan, &start, None, Some(FiniteRun { count: ECHOES_MAX, reports: tap }));
        let (monitor, stops) = (HarmMonitor::new(harm.unwrap_or_default()), harm.is_some());
        Ok(Self { reports, monitor, stops, last_rtt: None, reference: None, loops, _path: path })
    }

    /// Measures the idle path.
    pub(super) async fn idle(&mut self) {
        tokio::time::sleep(IDLE_TIME).await;
        self.check();
    }

    /// The load begins. Returns whether harm can be seen.
    pub(super) fn load_begins(&mut self) -> bool {
        self.check();
        self.monitor.load_begins()
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
        let forward = received.signed_since(first_received) - sample.sent.signed_since(first_sent);
        let rtt = i64::try_from(sample.rtt.as_nanos()).unwrap_or(i64::MAX);
        Some(OneWay { forward, reverse: rtt.saturating_sub(forward) })
    }

    /// The last round trip.
    pub(super) fn last_rtt(&self) -> Option<Duration> {
        self.last_rtt
    }

    /// The latency idle and under load.
    pub(super) fn result(&self) -> Option<LoadedLatency> {
        self.monitor.latency()
    }
}

impl Drop for LatencyWatch {
    fn drop(&mut self) {
        self.loops.stop(Duration::ZERO);
    }
}
