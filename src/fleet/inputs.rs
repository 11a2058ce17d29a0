//! The inputs from which the desired set of paths is computed.

use std::collections::BTreeMap;

use pathmeter_proto::selection::{ring, zones};

use super::Addresses;
use crate::config::{Probe, Selection};
use crate::identity::Identity;
use crate::probe::Remote;
use crate::roster::Roster;
use crate::settings::Settings;

/// The settings, the roster, and the addresses and identities of its members.
#[derive(Debug, Clone, Copy)]
pub struct PlanInputs<'a> {
    /// The configuration with its keys and certificates.
    pub settings: &'a Settings,
    /// The peers and targets.
    pub roster: &'a Roster,
    /// The addresses of peers and targets.
    pub addresses: &'a Addresses,
    /// The identities that peers report, by name.
    pub identities: &'a BTreeMap<String, Identity>,
}

impl<'a> PlanInputs<'a> {
    /// A label of a peer or target. A label that the peer reports overrides the configured one. Empty if
    /// there is none.
    #[must_use]
    pub fn label(&self, name: &str, label: &str) -> &'a str {
        let reported = self.identities.get(name).and_then(|identity| identity.labels.get(label));
        let configured = || {
            let peer = self.roster.peers.get(name).map(|peer| &peer.labels);
            peer.or_else(|| self.roster.targets.get(name).map(|target| &target.labels))?.get(label)
        };
        reported.or_else(configured).map_or("", String::as_str)
    }

    /// The peers and targets that a probe selects, by name. The [`Remote`] of a name that is not in the
    /// roster is `None`.
    pub(super) fn selected(&self, probe: &'a Probe) -> Vec<(&'a str, Option<Remote<'a>>)> {
        let (roster, agent) = (self.roster, &self.settings.config.agent);
        let all_peers = || roster.peers.keys().map(String::as_str);
        let peers: Vec<&str> = match &probe.peers {
            Selection::All => all_peers().collect(),
            Selection::Named(names) => names.iter().map(String::as_str).collect(),
            Selection::Ring { k } => ring(&agent.name, all_peers(), *k),
            Selection::Zones { choice, label } => {
                let own = agent.labels.get(label).map_or("", String::as_str);
                zones(&agent.name, own, all_peers().map(|name| (name, self.label(name, label))), *choice)
            }
        };
        let targets: Vec<&str> = match &probe.targets {
            Selection::All => roster.targets.keys().map(String::as_str).collect(),
            Selection::Named(names) => names.iter().map(String::as_str).collect(),
            // These rules divide the paths between agents, so they do not apply to targets.
            Selection::Ring { .. } | Selection::Zones { .. } => Vec::new(),
        };
        let of_peers = peers.into_iter().map(|name| (name, roster.peers.get(name).map(Remote::Peer)));
        let of_targets = targets.into_iter().map(|name| (name, roster.targets.get(name).map(Remote::Target)));
        of_peers.chain(of_targets).filter(|(name, _)| *name != agent.name).collect()
    }

    /// The number of peers and targets that a probe selects.
    #[must_use]
    pub fn count(&self, probe: &'a Probe) -> usize {
        self.selected(probe).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, LoadContext};
    use crate::identity::{CallerAccess, Ports, WouldAnswer};
    use crate::roster::RosterInputs;

    const TEXT: &str = "
peers:
  - {name: c, address: c, labels: {zone: y}}
  - {name: a, address: a, labels: {zone: x}}
  - {name: b, address: b, labels: {zone: x}}
targets: [{name: gw, address: 192.0.2.1}]
probes:
  - {name: peers}
  - {name: everything, peers: all, targets: all}
  - {name: some, peers: [b, a, b]}
  - {name: gateway, targets: [gw]}
  - {name: ring, peers: {select: ring, k: 1}}
  - {name: zones, peers: {select: zones, within: 1, across: 1}}
";

    fn settings(host: &str, text: &str) -> Settings {
        let labels = BTreeMap::from([("zone".to_owned(), "x".to_owned())]);
        let host = LoadContext { name_override: None, hostname: host.into(), labels, state_dir: None };
        let config =
            config::load(text.as_bytes(), &host).unwrap_or_else(|problems| panic!("{problems}")).config;
        Settings::complete(config, text.as_bytes()).unwrap()
    }

    fn selected_names(settings: &Settings, identities: &BTreeMap<String, Identity>) -> Vec<String> {
        let roster = Roster::new(&settings.config, &RosterInputs::default());
        let addresses = Addresses::new();
        let inputs = PlanInputs { settings, roster: &roster, addresses: &addresses, identities };
        let names =
            |probe| inputs.selected(probe).iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
        settings.config.probes.iter().map(names).collect()
    }

    #[test]
    fn same_file_makes_every_host_measure_the_others() {
        let identities = BTreeMap::new();
        let targets_of = |host| selected_names(&settings(host, TEXT), &identities);
        assert_eq!(targets_of("a")[..4], ["b c", "b c gw", "b", "gw"]);
        assert_eq!(targets_of("b")[..4], ["a c", "a c gw", "a", "gw"]);
        assert_eq!(targets_of("elsewhere")[..4], ["a b c", "a b c gw", "a b", "gw"]);
        assert_eq!(targets_of("a")[5], "b c", "one in the own zone and one in the other");
        let ring: Vec<String> = ["a", "b", "c"].map(|host| targets_of(host)[4].clone()).into();
        let mut measured = ring.clone();
        measured.sort();
        assert_eq!(measured, ["a", "b", "c"], "each is measured by one: {ring:?}");
    }

    #[test]
    fn zone_that_a_peer_reports_overrides_the_configured_one() {
        let settings = settings("a", TEXT);
        let answers = || WouldAnswer { answers: true, reason: None };
        let moved = Identity {
            name: "b".into(),
            labels: BTreeMap::from([("zone".to_owned(), "z".to_owned())]),
            version: String::new(),
            boot_id: String::new(),
            ports: Ports { http: 1, stamp: 2, agent: 3 },
            capabilities: Vec::new(),
            you: CallerAccess { address: String::new(), stamp: answers(), websocket: None },
        };
        assert_eq!(selected_names(&settings, &BTreeMap::new())[5], "b c");
        let reported = BTreeMap::from([("b".to_owned(), moved)]);
        assert_eq!(selected_names(&settings, &reported)[5], "b c", "each is alone in its zone");
        let within = self::settings("a", &TEXT.replace("across: 1", "across: 0"));
        assert_eq!(selected_names(&within, &BTreeMap::new())[5], "b");
        assert_eq!(selected_names(&within, &reported)[5], "", "no other agent is in the zone of this one");
    }
}
