//! What the daemon hears from its loops, its resolver and its peers.

use pathmeter_proto::wire::Goodbye;
use tracing::{error, info, warn};

use super::Daemon;
use crate::clock::Clock;
use crate::datagram::{Event, PathId};
use crate::identity_poller::{IdentityError, IdentityResult};
use crate::journal::Happening;
use crate::resolver::Resolution;
use crate::roster::KnownAgent;

impl Daemon {
    pub(super) fn on_resolved(&mut self, name: String, addresses: Resolution) {
        let known = self.addresses.get(&name);
        if let Err(reason) = &addresses {
            self.exporter.process.resolve_failed();
            match known {
                // An address that worked is better than none.
                Some(Ok(_)) => {
                    warn!(name, reason, "keeping the last address");
                    return;
                }
                Some(Err(old)) if old == reason => return,
                Some(Err(_)) | None => warn!(name, reason, "not measured until its name has an address"),
            }
        }
        if known == Some(&addresses) {
            return;
        }
        self.addresses.insert(name, addresses);
        self.pending.note(|pending| pending.measure = true);
    }

    pub(super) fn on_identity(&mut self, name: String, result: IdentityResult) {
        let identity = match result {
            Ok(identity) => identity,
            Err(error) => return self.on_identity_error(name, &error),
        };
        self.refusals.remove(&name);
        if identity.boot_id == self.inputs.own_boot_id {
            warn!(
                name,
                own = self.settings.config.agent.name,
                "a peer is this agent itself, and is not measured"
            );
            if let Some(peer) = self.roster.peers.get(&name) {
                self.inputs.own_names.insert(name, peer.address.clone());
            }
            return self.pending.note(|pending| pending.rebuild_roster = true);
        }
        if identity.name != name && self.roster.addresses.contains_key(&name) {
            // Its address went to another agent.
            self.inputs.known_agents.retain(|_, known| known.name != name);
            return self.pending.note(|pending| pending.rebuild_roster = true);
        }
        let known = self.identities.get(&name);
        if known == Some(&identity) {
            return;
        }
        if let Some(known) = known.filter(|known| known.boot_id != identity.boot_id) {
            // It was restarted, and all its addresses with it.
            let its = |other: &&mut KnownAgent| other.name == name && other.boot_id == known.boot_id;
            for known_agent in self.inputs.known_agents.values_mut().filter(its) {
                known_agent.boot_id.clone_from(&identity.boot_id);
            }
            // An address that told of this run already was taken for another agent.
            self.pending.note(|pending| pending.rebuild_roster = true);
        }
        if identity.name != name && known.is_none_or(|known| known.name != identity.name) {
            warn!(peer = name, calls_itself = ?identity.name, "a peer has another name than the configuration gives it");
        }
        let reason = &identity.you.stamp.reason;
        let is_news = known.is_none_or(|known| known.you.stamp.answers) && !self.fleet.has_heard(&name);
        if let Some(reason) = reason.as_ref().filter(|_| is_news) {
            warn!(peer = name, %reason, "a peer will not answer us");
        }
        // Zones are made of labels.
        let is_elsewhere = known.is_none_or(|known| known.labels != identity.labels);
        self.identities.insert(name, identity);
        self.pending.note(|pending| {
            pending.publish = true;
            pending.measure |= is_elsewhere;
        });
    }

    /// A peer that does not tell may still be measured: nothing is changed. That it is not reached is told by its paths.
    fn on_identity_error(&mut self, name: String, why: &IdentityError) {
        if !why.is_refusal() {
            return;
        }
        let reason = why.to_string();
        if self.refusals.get(&name) != Some(&reason) {
            warn!(peer = name, reason, "a peer cannot be asked who it is");
            self.refusals.insert(name, reason);
        }
    }

    pub(super) fn on_event(&mut self, event: Event) {
        match event {
            Event::Started { id, sources } => {
                if let Some(key) = self.fleet.started(id, sources) {
                    info!(probe = %key.probe, peer = %key.peer, family = key.family, "connected");
                }
                self.pending.note(|pending| pending.publish = true);
            }
            Event::Broken { id, reason } => {
                if let Some(key) = self.fleet.broken(id, reason.clone()) {
                    warn!(probe = %key.probe, peer = %key.peer, family = key.family, reason, "no connection");
                    self.journal.note(Happening::ConnectionLost {
                        probe: key.probe.to_string(),
                        peer: key.peer.to_string(),
                        family: key.family,
                        reason,
                    });
                }
                self.pending.note(|pending| pending.publish = true);
            }
            Event::Failed { id, error } => {
                if let Some(key) = self.fleet.failed(id, error.to_string()) {
                    error!(probe = %key.probe, peer = %key.peer, %error, "a path is not measured");
                    self.journal.note(Happening::PathNotMeasured {
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
                #[expect(clippy::cast_precision_loss, reason = "for people")]
                let seconds = nanos as f64 / 1e9;
                warn!(seconds, "the wall clock was stepped; round trips are not affected");
                self.journal.note(Happening::ClockStepped { seconds });
            }
            Event::Suspended(span) => {
                warn!(?span, "the host was suspended; what was in flight is withdrawn");
                self.journal.note(Happening::HostSuspended { seconds: span.as_secs_f64() });
            }
        }
    }

    fn on_path_mtu(&self, id: PathId, from: Option<u16>, to: u16) {
        let Some(key) = self.fleet.key(id) else { return };
        let (probe, peer, family) = (&key.probe, &key.peer, key.family);
        match from {
            None => info!(%probe, %peer, family, to, "the path MTU was found"),
            Some(from) if to < from => warn!(%probe, %peer, family, from, to, "the path MTU shrank"),
            Some(from) => info!(%probe, %peer, family, from, to, "the path MTU grew"),
        }
        let (probe, peer) = (probe.to_string(), peer.to_string());
        self.journal.note(Happening::PathMtuChanged { probe, peer, family, from, to });
    }

    fn on_goodbye(&mut self, goodbye: Goodbye) {
        // Three copies are sent; and one that was captured from an earlier life is older than the last.
        let last = self.goodbyes.get(&goodbye.name);
        if last.is_some_and(|last| last.boot_id == goodbye.boot_id || last.at >= goodbye.at) {
            return;
        }
        let paths = self.fleet.goodbye(&goodbye.name, Clock::now(), &self.loops);
        info!(peer = ?goodbye.name, paths, "a peer is leaving");
        self.journal.note(Happening::PeerLeaving { peer: goodbye.name.clone(), paths });
        if paths > 0 {
            self.goodbyes.insert(goodbye.name.clone(), goodbye);
        }
    }
}
