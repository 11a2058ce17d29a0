//! Events of the threads that measure: logged, and shown at `/api/v1/events`.

use pathmeter_proto::wire::Goodbye;
use tracing::{error, info, warn};

use super::Daemon;
use crate::datagram::{Event, PathId};
use crate::journal::Happening;

impl Daemon {
    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Started { id, sources } => {
                if let Some(key) = self.measuring.fleet.started(id, sources) {
                    info!(probe = %key.probe, peer = %key.peer, family = key.family, "connected");
                }
                self.pending.note(|pending| pending.publish = true);
            }
            Event::Broken { id, reason } => {
                if let Some(key) = self.measuring.fleet.broken(id, reason.clone()) {
                    warn!(probe = %key.probe, peer = %key.peer, family = key.family, reason, "no connection");
                    self.observability.journal.note(Happening::ConnectionLost {
                        probe: key.probe.to_string(),
                        peer: key.peer.to_string(),
                        family: key.family,
                        reason,
                    });
                }
                self.pending.note(|pending| pending.publish = true);
            }
            Event::Failed { id, error } => {
                if let Some(key) = self.measuring.fleet.failed(id, error.to_string()) {
                    error!(probe = %key.probe, peer = %key.peer, %error, "a path is not measured");
                    self.observability.journal.note(Happening::PathNotMeasured {
                        probe: key.probe.to_string(),
                        peer: key.peer.to_string(),
                        family: key.family,
                        reason: error.to_string(),
                    });
                }
                self.pending.note(|pending| pending.publish = true);
            }
            Event::Finished(_) => {}
            Event::PathMtu { id, from, to } => self.on_path_mtu(id, from, to),
            Event::Goodbye(goodbye) => self.on_goodbye(goodbye),
            Event::ClockStepped(nanos) => {
                #[expect(clippy::cast_precision_loss, reason = "precise enough for a log")]
                let seconds = nanos as f64 / 1e9;
                warn!(seconds, "the wall clock was stepped; round trips are not affected");
                self.observability.journal.note(Happening::ClockStepped { seconds });
            }
            Event::Suspended(span) => {
                warn!(?span, "the host was suspended; what was in flight is withdrawn");
                self.observability.journal.note(Happening::HostSuspended { seconds: span.as_secs_f64() });
            }
        }
    }

    fn on_path_mtu(&self, id: PathId, from: Option<u16>, to: u16) {
        let Some(key) = self.measuring.fleet.key(id) else { return };
        let (probe, peer, family) = (&key.probe, &key.peer, key.family);
        match from {
            None => info!(%probe, %peer, family, to, "the path MTU was found"),
            Some(from) if to < from => warn!(%probe, %peer, family, from, to, "the path MTU shrank"),
            Some(from) => info!(%probe, %peer, family, from, to, "the path MTU grew"),
        }
        let (probe, peer) = (probe.to_string(), peer.to_string());
        self.observability.journal.note(Happening::PathMtuChanged { probe, peer, family, from, to });
    }

    fn on_goodbye(&mut self, goodbye: Goodbye) {
        // Three copies are sent; and a replayed one of an earlier run is older than the last.
        let last = self.membership.goodbyes.get(&goodbye.name);
        if last.is_some_and(|last| last.boot_id == goodbye.boot_id || last.at >= goodbye.at) {
            return;
        }
        let paths = self.measuring.goodbye(&goodbye.name);
        info!(peer = ?goodbye.name, paths, "a peer is leaving");
        self.observability.journal.note(Happening::PeerLeaving { peer: goodbye.name.clone(), paths });
        if paths > 0 {
            self.membership.goodbyes.insert(goodbye.name.clone(), goodbye);
        }
    }
}
