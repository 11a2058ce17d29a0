//! Enumerations of the equal-cost paths to peers and targets, on request.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::schedule::mix;
use pathmeter_proto::trace::{Enumerated, EnumerationReport};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Sleep, sleep};
use tracing::{info, warn};

use crate::event_log::{EventLog, EventType};
use crate::fleet::Fleet;
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, StartContext};
use crate::settings::Settings;
use crate::trace::{can_be_enumerated, enumerate_path, enumerated_json};

/// The requested enumerations. One runs at a time, because all share the rates at which routers answer; the
/// others wait.
#[derive(Debug)]
pub(super) struct Enumerations {
    /// Secret: with the session numbers that follow from it, answers could be forged.
    seed: u64,
    started: u64,
    waiting: VecDeque<PathKey>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    id: PathId,
    path: PathKey,
    reports: UnboundedReceiver<EnumerationReport>,
    /// Why it could not be started; `None`: it could, or has not begun.
    failure: Option<String>,
    /// Ends after [`DURATION_MAX`].
    timeout: Pin<Box<Sleep>>,
}

/// Identifiers of configured paths are smaller, those of traces to clients larger.
const FIRST_ID: u64 = 1 << 62;

/// Paths that wait to be enumerated; further ones are not added. Chosen: an enumeration takes minutes, so the
/// last of them waits for hours.
const WAITING_MAX: usize = 64;

/// Longest time of an enumeration; then it has failed, and the next one begins. Chosen: 1 h. One takes
/// minutes; what starves behind many traces must not keep all others waiting.
const DURATION_MAX: Duration = Duration::from_secs(3_600);

/// Number of enumerations that are kept as events; the oldest is dropped. Chosen: each is up to tens of
/// kilobytes.
const EVENTS_MAX: usize = 64;

impl Enumerations {
    /// No enumerations. `seed` must be random.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, started: 0, waiting: VecDeque::new(), running: None }
    }

    /// Adds the paths to a peer or target that can be enumerated. Returns the number of those that run or
    /// wait.
    ///
    /// # Errors
    /// None of these paths could be added.
    pub(super) fn request(
        &mut self,
        target: &str,
        fleet: &Fleet,
        settings: &Settings,
        loops: &Loops,
        events: &EventLog,
    ) -> Result<usize, String> {
        let paths = fleet.paths_to(target).filter(|(_, plan)| can_be_enumerated(*plan));
        let mut count = 0;
        for (path, _) in paths {
            let is_known = self.waiting.contains(path)
                || self.running.as_ref().is_some_and(|running| running.path == *path);
            if !is_known && self.waiting.len() == WAITING_MAX {
                if count > 0 {
                    break;
                }
                return Err(format!("{WAITING_MAX} paths wait to be enumerated already; try again later"));
            }
            count += 1;
            if !is_known {
                self.waiting.push_back(path.clone());
            }
        }
        self.start_next(fleet, settings, loops, events);
        Ok(count)
    }

    /// Starts the next one unless one is running.
    fn start_next(&mut self, fleet: &Fleet, settings: &Settings, loops: &Loops, events: &EventLog) {
        while self.running.is_none() {
            let Some(path) = self.waiting.pop_front() else { return };
            let plan = fleet.plan(&path).filter(|plan| can_be_enumerated(*plan));
            let Some(plan) = plan else {
                report(&path, Err("the path has ended before its turn".to_owned()), events);
                continue;
            };
            let id = PathId(FIRST_ID + self.started);
            self.started += 1;
            let start = StartContext {
                id,
                key: &path,
                settings,
                loops,
                peer_left_at: None,
                seed: mix(self.seed ^ mix(id.0)),
                followed: Arc::default(),
            };
            let (sender, reports) = unbounded_channel();
            enumerate_path(plan, &start, sender);
            info!(probe = %path.probe, peer = %path.peer, family = path.family, "enumerating equal-cost paths");
            let timeout = Box::pin(sleep(DURATION_MAX));
            self.running = Some(Running { id, path, reports, failure: None, timeout });
        }
    }

    /// Whether a path is one of these.
    pub(super) fn has(&self, id: PathId) -> bool {
        self.running.as_ref().is_some_and(|running| running.id == id)
    }

    /// A path could not be started. Returns whether it is one of these.
    pub(super) fn not_started(&mut self, id: PathId, reason: &str) -> bool {
        let Some(running) = self.running.as_mut().filter(|running| running.id == id) else { return false };
        running.failure = Some(reason.to_owned());
        true
    }

    /// Waits for the end of the running one; `None`: none is running. Nothing is lost if the future is
    /// dropped.
    pub(super) async fn next_ended(&mut self) -> Option<Result<Enumerated, String>> {
        let Running { reports, failure, timeout, .. } = self.running.as_mut()?;
        if let Some(reason) = failure.take() {
            return Some(Err(reason));
        }
        loop {
            let report = tokio::select! {
                report = reports.recv() => report,
                () = &mut *timeout => {
                    let minutes = DURATION_MAX.as_secs() / 60;
                    return Some(Err(format!("the enumeration was not complete after {minutes} minutes")));
                }
            };
            match report {
                Some(EnumerationReport::Enumerated(enumerated)) => return Some(Ok(*enumerated)),
                Some(_) => {}
                None => return Some(Err("the enumeration was stopped".to_owned())),
            }
        }
    }

    /// The paths may have changed: ends the running one if its path has ended. Those that wait are checked
    /// when it is their turn.
    pub(super) fn paths_changed(&mut self, fleet: &Fleet) {
        if let Some(running) = &mut self.running
            && !fleet.plan(&running.path).is_some_and(can_be_enumerated)
        {
            running.failure = Some("the path has ended".to_owned());
        }
    }

    /// Reports the result of the one that has ended, and starts the next.
    pub(super) fn ended(
        &mut self,
        result: Result<Enumerated, String>,
        fleet: &Fleet,
        settings: &Settings,
        loops: &Loops,
        events: &EventLog,
    ) {
        if let Some(Running { id, path, .. }) = self.running.take() {
            loops.prober.remove(id);
            report(&path, result, events);
        }
        self.start_next(fleet, settings, loops, events);
    }
}

fn report(path: &PathKey, result: Result<Enumerated, String>, events: &EventLog) {
    let PathKey { probe, peer, family } = path;
    match result {
        Ok(enumerated) => {
            let (flows, probes) = (enumerated.paths.flows, enumerated.paths.probes);
            info!(%probe, %peer, family, flows, probes, "equal-cost paths enumerated");
            let Value::Object(result) = enumerated_json(&enumerated) else { return };
            events.add(&PathsEnumerated { probe, peer, family, result });
        }
        Err(reason) => {
            warn!(%probe, %peer, family, reason, "equal-cost paths not enumerated");
            events.add(&EnumerationFailed { probe, peer, family, reason });
        }
    }
}

/// The equal-cost paths to a peer or target.
#[derive(Serialize)]
struct PathsEnumerated<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    #[serde(flatten)]
    result: Map<String, Value>,
}

impl EventType for PathsEnumerated<'_> {
    const NAME: &'static str = "paths_enumerated";
    const KEPT_MAX: Option<usize> = Some(EVENTS_MAX);
}

/// The equal-cost paths to a peer or target could not be enumerated.
#[derive(Serialize)]
struct EnumerationFailed<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    reason: String,
}

impl EventType for EnumerationFailed<'_> {
    const NAME: &'static str = "enumeration_failed";
    const KEPT_MAX: Option<usize> = Some(EVENTS_MAX);
}
