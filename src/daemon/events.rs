//! Handles the events of the measuring threads: logs them, and shows them at `/api/v1/events`.

use pathmeter_proto::wire::Goodbye;
use serde::Serialize;
use tracing::{error, info, warn};

use super::Daemon;
use crate::event_log::EventType;
use crate::loops::LoopEvent;
use crate::paths::PathKey;

impl Daemon {
    pub(super) fn on_event(&mut self, event: LoopEvent) {
        match event {
            LoopEvent::Started { id, .. } if self.client_traces.has(id) || self.enumerations.has(id) => {}
            LoopEvent::Started { id, sources } => {
                if let Some(key) = self.measuring.fleet.started(id, sources) {
                    info!(probe = %key.probe, peer = %key.peer, family = key.family, "connected");
                }
                self.pending.add(|pending| pending.publish = true);
            }
            LoopEvent::Disconnected { id, reason } => {
                if let Some(key) = self.measuring.fleet.disconnected(id, reason.clone()) {
                    let PathKey { probe, peer, family } = &key;
                    warn!(%probe, %peer, family, reason, "no connection");
                    self.observability.events.add(&ConnectionLost { probe, peer, family, reason });
                }
                self.pending.add(|pending| pending.publish = true);
            }
            LoopEvent::NotStarted { id, reason }
                if self.client_traces.not_started(id, &reason)
                    || self.enumerations.not_started(id, &reason) => {}
            LoopEvent::NotStarted { id, reason } => {
                if let Some(key) = self.measuring.fleet.not_started(id, reason.clone()) {
                    let PathKey { probe, peer, family } = &key;
                    error!(%probe, %peer, family, reason, "a path is not measured");
                    self.observability.events.add(&PathNotMeasured { probe, peer, family, reason });
                }
                self.pending.add(|pending| pending.publish = true);
            }
            LoopEvent::Finished(_) => {}
            LoopEvent::OfPath { id, event } => {
                if let Some(key) = self.measuring.fleet.key(id) {
                    event.report(key, &self.observability.events);
                }
            }
            LoopEvent::PeerLeaving(goodbye) => self.on_goodbye(goodbye),
            LoopEvent::ClockStepped(nanos) => {
                #[expect(clippy::cast_precision_loss, reason = "precise enough for a log")]
                let seconds = nanos as f64 / 1e9;
                warn!(seconds, "the wall clock was stepped; RTTs are not affected");
                self.observability.events.add(&ClockStepped { seconds });
            }
            LoopEvent::Suspended(span) => {
                warn!(?span, "the host was suspended; packets in flight are withdrawn");
                self.observability.events.add(&HostSuspended { seconds: span.as_secs_f64() });
            }
        }
    }

    fn on_goodbye(&mut self, goodbye: Goodbye) {
        // A goodbye is sent three times. A replayed goodbye of an earlier run is older than the last one.
        let last = self.membership.goodbyes.get(&goodbye.name);
        if last.is_some_and(|last| last.boot_id == goodbye.boot_id || last.at >= goodbye.at) {
            return;
        }
        let paths = self.measuring.peer_leaving(&goodbye.name);
        info!(peer = ?goodbye.name, paths, "a peer is leaving");
        self.observability.events.add(&PeerLeaving { peer: &goodbye.name, paths });
        if paths > 0 {
            self.membership.goodbyes.insert(goodbye.name.clone(), goodbye);
        }
    }
}

/// A path could not be started. Starting it is retried.
#[derive(Serialize)]
struct PathNotMeasured<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    reason: String,
}

impl EventType for PathNotMeasured<'_> {
    const NAME: &'static str = "path_not_measured";
}

/// A path lost its connection, or could not establish one. Connecting is retried.
#[derive(Serialize)]
struct ConnectionLost<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    reason: String,
}

impl EventType for ConnectionLost<'_> {
    const NAME: &'static str = "connection_lost";
}

/// A peer announced that it is leaving. `paths` is the number of paths to it.
#[derive(Serialize)]
struct PeerLeaving<'a> {
    peer: &'a str,
    paths: usize,
}

impl EventType for PeerLeaving<'_> {
    const NAME: &'static str = "peer_leaving";
}

/// A loop detected a step of the wall clock; a negative one is backwards.
#[derive(Serialize)]
struct ClockStepped {
    seconds: f64,
}

impl EventType for ClockStepped {
    const NAME: &'static str = "clock_stepped";
}

/// A loop detected that the host was suspended.
#[derive(Serialize)]
struct HostSuspended {
    seconds: f64,
}

impl EventType for HostSuspended {
    const NAME: &'static str = "host_suspended";
}
