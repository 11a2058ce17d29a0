//! Exports the metrics of the agent, and its events at `/api/v1/events`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;

use super::membership::Membership;
use crate::config::Probe;
use crate::event_log::EventLog;
use crate::fleet::{ExportedSeries, Fleet};
use crate::identity::Identity;
use crate::metrics::{Exporter, PeerInfo, PeerState, ProbeInfo};
use crate::settings::Settings;

/// The metrics and the events of a running agent.
#[derive(Debug)]
pub(super) struct Observability {
    pub(super) exporter: Arc<Exporter>,
    pub(super) events: Arc<EventLog>,
}

impl Observability {
    /// Exports the series of all paths and probes, and the labels of peers and targets.
    pub(super) fn publish(&self, membership: &Membership, settings: &Settings, fleet: &Fleet) {
        let config = &settings.config;
        let ExportedSeries { mut blocks, dropped } = fleet.exported(&config.metrics);
        self.exporter.process.set_series_dropped(dropped);
        self.exporter.process.set_providers(membership.provider_counts(config).into_iter());
        let inputs = membership.plan_inputs(settings);
        for probe in &config.probes {
            blocks.add(Arc::new(probe_info(probe, inputs.count(probe))));
        }
        for series in Fleet::probe_series(&config.probes) {
            series.add_to(&mut blocks);
        }
        let Membership { roster, identities, .. } = membership;
        let peers = roster.peers.values().map(|peer| (&peer.name, &peer.address, &peer.labels));
        let targets = roster.targets.values().map(|target| (&target.name, &target.address, &target.labels));
        let mut hosts: Vec<_> = peers.chain(targets).collect();
        hosts.sort_unstable();
        for (name, address, labels) in hosts {
            blocks.add(Arc::new(peer_info(name, address, labels, identities.get(name))));
        }
        self.exporter.publish(blocks);
    }

    /// Counts peers and targets by state. Returns the number of those that are up, and of all.
    pub(super) fn count_states(&self, fleet: &Fleet, identified: &BTreeMap<String, u64>) -> (usize, usize) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let states = fleet.states(nanos(now), identified);
        let count = |state: PeerState| states.values().filter(|known| **known == state).count();
        self.exporter.process.set_peers(count);
        (count(PeerState::Up), states.len())
    }
}

fn probe_info(probe: &Probe, targets: usize) -> ProbeInfo {
    let kind = probe.kind.as_kind_config();
    let dscp = probe.dscp.to_string();
    ProbeInfo::new(&probe.name, kind.name(), kind.protocol(), &dscp, probe.interval, targets)
}

/// The labels of a peer or target. Labels that a peer reports override those of the configuration.
fn peer_info(
    name: &str,
    address: &str,
    labels: &BTreeMap<String, String>,
    identity: Option<&Identity>,
) -> PeerInfo {
    let mut labels: BTreeMap<String, &String> =
        labels.iter().map(|(key, value)| (format!("label_{key}"), value)).collect();
    let own = identity.iter().flat_map(|identity| &identity.labels);
    labels.extend(own.map(|(key, value)| (format!("label_{key}"), value)));
    let (agent, version) =
        identity.map_or(("", ""), |identity| (identity.name.as_str(), identity.version.as_str()));
    let fixed = [("address", address), ("agent", agent), ("version", version)];
    let labels = labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    PeerInfo::new(name, fixed.into_iter().chain(labels))
}
