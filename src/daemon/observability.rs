//! What the agent exports: its metrics, and the events at `/api/v1/events`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;

use super::membership::Membership;
use crate::config::Probe;
use crate::fleet::{Exported, Fleet, Scene};
use crate::identity::Identity;
use crate::journal::Journal;
use crate::metrics::{Directory, Exporter, PeerState, ProbeInfo};
use crate::settings::Settings;

/// The metrics and the events of a running agent.
#[derive(Debug)]
pub(super) struct Observability {
    pub(super) exporter: Arc<Exporter>,
    pub(super) journal: Arc<Journal>,
}

impl Observability {
    /// Exports the series of all paths, and what is known of peers and targets.
    pub(super) fn publish(&self, membership: &Membership, settings: &Settings, fleet: &Fleet) {
        let config = &settings.config;
        let Exported { groups, paths, path_mtus, streams, dropped } = fleet.exported(&config.metrics);
        self.exporter.process.set_series_dropped(dropped);
        self.exporter.process.set_providers(membership.provider_counts(config).into_iter());
        let Membership { roster, addresses, identities, .. } = membership;
        let counts = Scene { settings, roster, addresses, identities }.counts();
        let probes =
            config.probes.iter().zip(counts).map(|(probe, targets)| probe_info(probe, targets)).collect();
        let attributes = |name: &str, address: &str, labels: &BTreeMap<String, String>| {
            let identity = identities.get(name);
            // What a peer says of itself goes above what the file says of it.
            let mut labels = labels.clone();
            labels.extend(identity.map(|identity| identity.labels.clone()).unwrap_or_default());
            let mut attributes = vec![("address".to_owned(), address.to_owned())];
            let said = |what: fn(&Identity) -> &String| identity.map(what).cloned().unwrap_or_default();
            attributes.push(("agent".to_owned(), said(|identity| &identity.name)));
            attributes.push(("version".to_owned(), said(|identity| &identity.version)));
            attributes.extend(labels.iter().map(|(key, value)| (format!("label_{key}"), value.clone())));
            (name.to_owned(), attributes)
        };
        let peers = roster.peers.values().map(|peer| attributes(&peer.name, &peer.address, &peer.labels));
        let targets = roster.targets.values();
        let targets = targets.map(|target| attributes(&target.name, &target.address, &target.labels));
        self.exporter.publish(Directory {
            groups,
            paths,
            path_mtus,
            streams,
            probes,
            peers: peers.chain(targets).collect(),
        });
    }

    /// Counts peers and targets by state; returns how many are up, and how many there are.
    pub(super) fn count_states(&self, fleet: &Fleet) -> (usize, usize) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let states = fleet.states(nanos(now));
        let count = |state: PeerState| states.values().filter(|known| **known == state).count();
        self.exporter.process.set_peers(count);
        (count(PeerState::Up), states.len())
    }
}

fn probe_info(probe: &Probe, targets: usize) -> ProbeInfo {
    let Probe::Echo(echo) = probe;
    ProbeInfo {
        name: echo.name.clone(),
        kind: "echo",
        targets,
        protocol: echo.transport.name(),
        dscp: echo.dscp.to_string(),
        interval: echo.interval,
        late_after: echo.late_after,
        lost_after: echo.lost_after,
    }
}
