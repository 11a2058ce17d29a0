//! The task of a bandwidth path: it waits, gets leases, and runs.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use pathmeter_proto::bandwidth::harm::HarmLimits;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::load::check::CheckVerdict;
use pathmeter_proto::schedule::mix;
use pathmeter_proto::time::nanos;
use tokio::time::sleep;
use tracing::debug;

use super::latency::{LatencyWatch, PathEchoes};
use super::plan::{BandwidthPlan, DirectionSeries};
use super::run::measure;
use crate::bulk::{
    Bulk, Grant, LeaseAnswer, LeaseClient, LeaseRequest, RefusalReason, Run, RunMethod, RunOutcome,
    repeat_after,
};
use crate::clock::Clock;
use crate::metrics::bandwidth::{BandwidthSeries, FailureReason, LastRun, RunLatency, SkipReason};

#[derive(Debug)]
pub(super) struct BandwidthTask {
    /// The path, as the ledger names it.
    pub(super) name: String,
    pub(super) plan: BandwidthPlan,
    pub(super) leases: LeaseClient,
    pub(super) echoes: PathEchoes,
    pub(super) bulk: Bulk,
    pub(super) series: DirectionSeries,
    pub(super) seed: u64,
}

/// The first run begins within this time, at a random moment. Chosen: agents that start together do not wait
/// for each other, and an operator sees a result.
const FIRST_RUN_WITHIN: Duration = Duration::from_secs(300);

/// A run waits for its leases for a quarter of the interval, or for this long if that is longer. Chosen: a
/// few runs of others.
const WAIT_MIN: Duration = Duration::from_secs(60);

/// The next attempt after one that failed or was skipped begins about this much later, if the interval is
/// longer. Chosen: a restart of the peer, or a full day's budget, costs few requests.
const RETRY_AFTER: Duration = Duration::from_secs(600);

/// A lease of this agent for a run that it begins. Dropping it ends the lease.
struct OwnLease<'a> {
    bulk: &'a Bulk,
    id: LeaseId,
}

impl Drop for OwnLease<'_> {
    fn drop(&mut self) {
        self.bulk.leases.end(self.id);
    }
}

impl BandwidthTask {
    /// Runs in each direction once per interval, without end.
    pub(super) async fn run(self) {
        let mut random = self.seed;
        sleep(self.fraction_of(&mut random, self.plan.interval.min(FIRST_RUN_WITHIN))).await;
        loop {
            let (began, mut interval) = (Clock::now(), self.plan.interval);
            for (direction, series) in &self.series {
                let attempted = self.attempt(*direction, series, &mut random).await;
                series.set_budget_left(self.bulk.leases.bytes_left(&self.name));
                if let Err(reason) = attempted {
                    debug!(path = self.name, direction = direction.as_str(), ?reason, "no bandwidth run");
                    interval = interval.min(RETRY_AFTER);
                    match reason {
                        NoRun::Skipped(reason) => series.skipped(reason),
                        NoRun::Failed(reason) => series.failed(reason),
                    }
                }
            }
            // Three quarters to five quarters of the interval, so that agents do not stay in step.
            let pause = interval * 3 / 4 + self.fraction_of(&mut random, interval / 2);
            sleep(pause.saturating_sub(Clock::now().since(began))).await;
        }
    }

    /// A random part of `whole`.
    fn fraction_of(&self, random: &mut u64, whole: Duration) -> Duration {
        *random = mix(random.wrapping_add(1));
        Duration::from_nanos(nanos(whole) / 1_000 * (*random % 1_000))
    }

    fn request(&self, direction: RunDirection) -> LeaseRequest {
        let bandwidth = &self.plan.bandwidth;
        LeaseRequest {
            lease: None,
            method: bandwidth.method,
            direction,
            connections: bandwidth.streams,
            bytes_max: Some(bandwidth.bytes),
            seconds_max: bandwidth.time.as_secs() + u64::from(bandwidth.time.subsec_nanos() > 0),
            rate_bytes_per_second: bandwidth.rate.map(|bits| bits / 8),
            dscp: self.plan.dscp.value(),
        }
    }

    /// Gets a lease of this host and one of the peer, waiting for both in turn, and runs.
    async fn attempt(
        &self,
        direction: RunDirection,
        series: &BandwidthSeries,
        random: &mut u64,
    ) -> Result<(), NoRun> {
        let (mut own_request, mut request) = (self.request(direction), self.request(direction));
        let (began, wait_max) = (Clock::now(), (self.plan.interval / 4).max(WAIT_MIN));
        let mut own: Option<OwnLease<'_>> = None;
        loop {
            if Clock::now().since(began) > wait_max {
                return Err(NoRun::Skipped(SkipReason::Busy));
            }
            let (place, seconds) = match self.bulk.leases.request_own(&self.name, own_request.clone()) {
                LeaseAnswer::Refused { reason, .. } => return Err(NoRun::Skipped(skip_reason(reason))),
                LeaseAnswer::Waiting { lease, repeat_after_seconds, .. } => (lease, repeat_after_seconds),
                LeaseAnswer::Granted(granted) => {
                    let (id, _) = granted.decode().expect("an agent can read its own grants");
                    if own.as_ref().is_none_or(|own| own.id != id) {
                        own = Some(OwnLease { bulk: &self.bulk, id });
                    }
                    let rate_max = [granted.rate_bytes_per_second, request.rate_bytes_per_second];
                    request.rate_bytes_per_second = rate_max.into_iter().flatten().min();
                    match self.leases.request(&request).await {
                        Err(_) => return Err(NoRun::Failed(FailureReason::Request)),
                        Ok(LeaseAnswer::Refused { reason, .. }) => {
                            return Err(NoRun::Skipped(skip_reason(reason)));
                        }
                        Ok(LeaseAnswer::Granted(grant)) => {
                            let bytes_max = granted.bytes_max.min(grant.bytes_max);
                            let grant = Grant { bytes_max, ..grant };
                            return self.measure(direction, series, id, &grant, random).await;
                        }
                        Ok(LeaseAnswer::Waiting { lease, repeat_after_seconds, .. }) => {
                            request.lease = Some(lease);
                            self.bulk.leases.defer(id);
                            (granted.lease, repeat_after_seconds)
                        }
                    }
                }
            };
            own_request.lease = Some(place);
            // Two agents that wait for each other must not ask at the same moments.
            let pause = repeat_after(seconds);
            sleep(pause + self.fraction_of(random, pause / 4)).await;
        }
    }

    /// Measures the idle path, and then the run.
    async fn measure(
        &self,
        direction: RunDirection,
        series: &BandwidthSeries,
        own: LeaseId,
        grant: &Grant,
        random: &mut u64,
    ) -> Result<(), NoRun> {
        const FAILED: NoRun = NoRun::Failed(FailureReason::Connect);
        let bandwidth = &self.plan.bandwidth;
        let harm = bandwidth.added_delay_max.map(|added_delay_max| HarmLimits { added_delay_max });
        *random = mix(random.wrapping_add(1));
        let mut watch = LatencyWatch::start(self.echoes.clone(), harm, *random);
        if !watch.idle().await && harm.is_some() {
            return Err(NoRun::Skipped(SkipReason::NoReplies));
        }
        let (lease, secret) = grant.decode().ok_or(FAILED)?;
        // The lease ends before only if an operator stops all runs or switches them off.
        self.bulk.leases.attach(own, 0).map_err(|_| NoRun::Skipped(SkipReason::Disabled))?;
        let run = Run {
            to: self.plan.to,
            source: self.plan.source,
            dscp: self.plan.dscp,
            lease,
            secret,
            direction,
            method: RunMethod::of(&self.request(direction)).ok_or(FAILED)?,
            bytes_max: grant.bytes_max,
            duration: bandwidth.time,
            rate_max: grant.rate_bytes_per_second,
        };
        let counted = Arc::new(AtomicU64::new(0));
        let (leases, seen) = (Arc::clone(&self.bulk.leases), Arc::clone(&counted));
        let supervise = move |progress: Progress| {
            let new = progress.bytes.saturating_sub(seen.swap(progress.bytes, Relaxed));
            let is_within = leases.count_bytes(own, new) && leases.is_valid(own);
            (!is_within).then_some(StopReason::Lease)
        };
        let _running = Running::begin(series);
        let _loading = self.bulk.loads.of(self.plan.to.ip()).begin();
        let outcome = measure(run, &self.bulk.threads, &mut watch, supervise, |_, _| {}, pending()).await;
        let outcome = outcome.map_err(|_| FAILED)?;
        self.bulk.leases.count_bytes(own, outcome.bytes.saturating_sub(counted.load(Relaxed)));
        if outcome.bytes == 0 {
            return Err(NoRun::Failed(FailureReason::NothingReceived));
        }
        record(series, &outcome);
        Ok(())
    }
}

/// A run that loads a path, also if its task is aborted.
struct Running<'a>(&'a BandwidthSeries);

impl<'a> Running<'a> {
    fn begin(series: &'a BandwidthSeries) -> Self {
        series.running.set(1);
        Self(series)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.set(0);
    }
}

/// Why there was no run.
#[derive(Debug, Clone, Copy)]
enum NoRun {
    Skipped(SkipReason),
    Failed(FailureReason),
}

const fn skip_reason(reason: RefusalReason) -> SkipReason {
    match reason {
        RefusalReason::NotAllowed => SkipReason::NotAllowed,
        RefusalReason::Disabled | RefusalReason::Stopped => SkipReason::Disabled,
        RefusalReason::QuietHours => SkipReason::QuietHours,
        RefusalReason::Invalid => SkipReason::Invalid,
        RefusalReason::Budget => SkipReason::Budget,
        RefusalReason::QueueFull => SkipReason::Busy,
        RefusalReason::Stopping | RefusalReason::Other => SkipReason::Other,
    }
}

/// Counts a run and keeps its results.
fn record(series: &BandwidthSeries, outcome: &RunOutcome) {
    let (at, offset) = (Clock::now(), Clock::new().offset());
    let at = offset.wall(at).as_nanos();
    let mut json = outcome.json();
    #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 need fewer bits")]
    let seconds = at as f64 / 1e9;
    json["timestamp_seconds"] = seconds.into();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a ratio is from 0 to 1")]
    let loss_millionths = outcome.loss_ratio().map(|ratio| (ratio * 1e6) as u64);
    let latency = outcome.latency.map(|latency| RunLatency {
        idle: nanos(latency.idle_rtt),
        loaded: nanos(latency.loaded_rtt),
        added: nanos(latency.added_delay),
    });
    let last = LastRun {
        at,
        throughput: outcome.throughput(),
        is_capacity: outcome.is_capacity(),
        loss_millionths,
        latency,
        dispersion: outcome.dispersion().and_then(|dispersion| dispersion.rate),
        sustained: outcome.dispersion().and_then(|dispersion| dispersion.sustained),
        has_passed: outcome.verdict().and_then(CheckVerdict::has_passed),
        json,
    };
    let (bytes, retransmits) = (outcome.bytes, outcome.sender.retransmits.into());
    series.measured(outcome.stop_reason, bytes, retransmits, nanos(outcome.duration), last);
}
