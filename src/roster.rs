//! The roster: the peers and targets of the configuration, and the members that providers list.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::config::discovery::{PeerTemplate, ProviderRole, TargetTemplate};
use crate::config::file_sd::Member;
use crate::config::{Config, Peer, Provider, Target};
use crate::discovery::UnidentifiedAgent;

/// All peers and targets, from the configuration and from providers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roster {
    /// The other agents, by name.
    pub peers: BTreeMap<String, Peer>,
    /// Hosts without an agent, by name.
    pub targets: BTreeMap<String, Target>,
    /// Addresses of the peers that providers list by address, not by name.
    pub addresses: BTreeMap<String, Vec<IpAddr>>,
    /// Agents whose names are not known yet, with the provider that lists them.
    pub unidentified: BTreeMap<UnidentifiedAgent, String>,
    /// Messages about members that were skipped.
    pub skipped: Vec<String>,
    /// The boot id of each peer in `addresses`, by name.
    boot_ids: BTreeMap<String, String>,
}

/// Maximum peers and targets together; further ones are skipped and logged. Chosen: twice the 10,000 paths
/// that one agent is built for.
pub const HOSTS_MAX: usize = 20_000;

/// Maximum messages about skipped members; further members are skipped without a message.
const SKIPPED_MAX: usize = 100;

/// The inputs from which the roster is computed, in addition to the configuration.
#[derive(Debug, Default)]
pub struct RosterInputs {
    /// The last list of each provider, by the name of the provider.
    pub members_by_provider: BTreeMap<String, Vec<Member>>,
    /// Agents that are listed without a name and have reported it.
    pub known_agents: BTreeMap<UnidentifiedAgent, KnownAgent>,
    /// Names under which this agent is listed as a peer of itself, with their hosts.
    pub own_names: BTreeMap<String, String>,
    /// The boot id of this agent.
    pub own_boot_id: String,
}

/// An agent that is listed by its address and has reported its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownAgent {
    /// Its name.
    pub name: String,
    /// Its boot id: two addresses with the same one are one agent.
    pub boot_id: String,
}

impl RosterInputs {
    /// Removes providers that are not configured, and agents that no provider lists.
    pub fn retain_configured(&mut self, config: &Config) {
        self.members_by_provider
            .retain(|name, _| config.providers.iter().any(|provider| provider.name == *name));
        let unidentified: BTreeSet<UnidentifiedAgent> = config
            .providers
            .iter()
            .flat_map(|provider| {
                self.members_of(provider).filter_map(move |member| unidentified(provider, member))
            })
            .collect();
        self.known_agents.retain(|agent, _| unidentified.contains(agent));
    }

    fn members_of<'a>(&'a self, provider: &Provider) -> impl Iterator<Item = &'a Member> + use<'a> {
        self.members_by_provider.get(&provider.name).into_iter().flatten()
    }
}

/// The agent whose name must be requested; `None`: the member has a name, or is not an agent.
fn unidentified(provider: &Provider, member: &Member) -> Option<UnidentifiedAgent> {
    let ProviderRole::Peers(pattern) = &provider.role else { return None };
    member.name.is_none().then(|| UnidentifiedAgent {
        host: member.host.clone(),
        http_port: member.port.unwrap_or(pattern.http_port),
        https: pattern.https.as_ref().map(|template| template.for_host(&member.host)),
    })
}

impl Roster {
    /// Computes the roster. Members of the configuration go first, then those of providers in the order of
    /// the configuration.
    ///
    /// An agent never measures itself. If two members share a name, the first is used and the other is
    /// skipped.
    #[must_use]
    pub fn new(config: &Config, inputs: &RosterInputs) -> Self {
        let mut roster = Self::default();
        for peer in &config.peers {
            roster.peers.insert(peer.name.clone(), peer.clone());
        }
        for target in &config.targets {
            roster.targets.insert(target.name.clone(), target.clone());
        }
        for (name, host) in &inputs.own_names {
            if roster.peers.get(name).is_some_and(|peer| peer.address == *host) {
                roster.peers.remove(name);
            }
        }
        for provider in &config.providers {
            for member in inputs.members_of(provider) {
                roster.add(config, inputs, provider, member);
            }
        }
        roster
    }

    fn add(&mut self, config: &Config, inputs: &RosterInputs, provider: &Provider, member: &Member) {
        let agent = unidentified(provider, member);
        let known = agent.as_ref().and_then(|agent| inputs.known_agents.get(agent));
        let name = match (&member.name, known, agent) {
            (Some(name), ..) | (None, Some(KnownAgent { name, .. }), _) => name,
            (None, None, Some(agent)) => {
                self.unidentified.insert(agent, provider.name.clone());
                return;
            }
            (None, None, None) => {
                return self.skip(provider, member, "it has no name; set the label `instance`");
            }
        };
        if known.is_some_and(|other| *name == config.agent.name && other.boot_id != inputs.own_boot_id) {
            return self.skip(provider, member, "it is a different agent with the name of this agent");
        }
        if *name == config.agent.name || inputs.own_names.get(name) == Some(&member.host) {
            return;
        }
        if let Some(known) = known
            && let Ok(address) = member.host.parse::<IpAddr>()
            && let Some(addresses) = self.addresses.get_mut(name)
        {
            if self.boot_ids.get(name) != Some(&known.boot_id) {
                let reason = format!("it is a different agent with the name {name}");
                return self.skip(provider, member, &reason);
            }
            addresses.push(address.to_canonical());
            return;
        }
        if self.peers.contains_key(name) || self.targets.contains_key(name) {
            return self.skip(provider, member, "its name is already in use");
        }
        if self.peers.len() + self.targets.len() >= HOSTS_MAX {
            return self.skip(
                provider,
                member,
                &format!("there are more than {HOSTS_MAX} peers and targets"),
            );
        }
        match &provider.role {
            ProviderRole::Peers(pattern) => {
                if let (Some(known), Ok(address)) = (known, member.host.parse::<IpAddr>()) {
                    self.addresses.insert(name.clone(), vec![address.to_canonical()]);
                    self.boot_ids.insert(name.clone(), known.boot_id.clone());
                }
                self.peers.insert(name.clone(), peer(name, pattern, member));
            }
            ProviderRole::Targets(pattern) => {
                drop(self.targets.insert(name.clone(), target(name, pattern, member)))
            }
        }
    }

    fn skip(&mut self, provider: &Provider, member: &Member, reason: &str) {
        if self.skipped.len() < SKIPPED_MAX {
            let member = member.name.as_ref().unwrap_or(&member.host);
            self.skipped.push(format!("skipping {member} of {}: {reason}", provider.name));
        }
    }

    /// The names of all peers and targets, each with its host.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, &str)> {
        let peers = self.peers.values().map(|peer| (peer.name.as_str(), peer.address.as_str()));
        peers.chain(self.targets.values().map(|target| (target.name.as_str(), target.address.as_str())))
    }

    /// Whether there is a peer or target with this name.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.peers.contains_key(name) || self.targets.contains_key(name)
    }
}

fn peer(name: &str, pattern: &PeerTemplate, member: &Member) -> Peer {
    Peer {
        name: name.to_owned(),
        address: member.host.clone(),
        http_port: member.port.unwrap_or(pattern.http_port),
        stamp_port: member.stamp_port.unwrap_or(pattern.stamp_port),
        agent_port: member.agent_port.unwrap_or(pattern.agent_port),
        https: pattern.https.as_ref().map(|template| template.for_host(&member.host)),
        labels: merged(&pattern.labels, &member.labels),
    }
}

fn target(name: &str, pattern: &TargetTemplate, member: &Member) -> Target {
    let secure = member.url.as_ref().filter(|url| url.scheme.is_secure());
    Target {
        name: name.to_owned(),
        address: member.host.clone(),
        port: member.port.unwrap_or(pattern.port),
        quirks: pattern.quirks,
        url: member.url.clone(),
        https: secure.map(|url| pattern.https.for_host(&url.host)),
        key_file: None,
        labels: merged(&pattern.labels, &member.labels),
    }
}

/// The labels of the provider, overridden by those of the member.
fn merged(defaults: &BTreeMap<String, String>, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut labels = defaults.clone();
    labels.extend(own.clone());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, LoadContext};

    const CONFIG: &str = "
agent: {name: a}
peers:
  - {name: b, address: b.example.net}
  - {files: [/nowhere/*.yaml], labels: {site: x}, stamp_port: 862}
  - {dns: agents.example.net}
targets:
  - {name: gw, address: 192.0.2.1}
  - {http: 'http://192.0.2.9/targets', port: 4000}
";
    const FILES: &str = "files:/nowhere/*.yaml";
    const DNS: &str = "dns:agents.example.net";
    const HTTP: &str = "http:192.0.2.9/targets";

    fn config() -> Config {
        let host = LoadContext {
            name_override: None,
            hostname: "a".into(),
            labels: BTreeMap::new(),
            state_dir: None,
        };
        config::load(CONFIG.as_bytes(), &host).unwrap_or_else(|problems| panic!("{problems}")).config
    }

    fn named(name: &str, host: &str) -> Member {
        Member { name: Some(name.into()), host: host.into(), ..Member::default() }
    }

    fn unnamed(host: &str) -> Member {
        Member { host: host.into(), ..Member::default() }
    }

    fn unidentified_at(host: &str) -> UnidentifiedAgent {
        UnidentifiedAgent { host: host.into(), http_port: 9862, https: None }
    }

    /// Inputs in which each known name is that of one agent.
    fn roster_inputs(
        members_by_provider: &[(&str, Vec<Member>)],
        known_agents: &[(&str, &str)],
    ) -> RosterInputs {
        let known_agent =
            |name: &str| KnownAgent { name: name.to_owned(), boot_id: format!("run of {name}") };
        RosterInputs {
            members_by_provider: members_by_provider
                .iter()
                .map(|(name, members)| ((*name).to_owned(), members.clone()))
                .collect(),
            known_agents: known_agents
                .iter()
                .map(|(host, name)| (unidentified_at(host), known_agent(name)))
                .collect(),
            own_names: BTreeMap::new(),
            own_boot_id: "run of a".to_owned(),
        }
    }

    fn names<V>(all: &BTreeMap<String, V>) -> Vec<&str> {
        all.keys().map(String::as_str).collect()
    }

    #[test]
    fn listed_members_get_the_ports_and_labels_of_their_provider() {
        let labels = BTreeMap::from([("zone".to_owned(), "z".to_owned())]);
        let found = Member { labels, port: Some(80), ..named("c", "192.0.2.3") };
        let gateway = named("gw-2", "192.0.2.2");
        let roster =
            Roster::new(&config(), &roster_inputs(&[(FILES, vec![found]), (HTTP, vec![gateway])], &[]));
        assert_eq!((names(&roster.peers), names(&roster.targets)), (vec!["b", "c"], vec!["gw", "gw-2"]));
        let c = &roster.peers["c"];
        assert_eq!((c.http_port, c.stamp_port, c.agent_port), (80, 862, 9863));
        assert_eq!(c.labels.len(), 2);
        assert_eq!(roster.targets["gw-2"].port, 4000);
        assert!(roster.skipped.is_empty() && roster.unidentified.is_empty());
    }

    #[test]
    fn agents_without_a_name_are_unidentified_and_two_addresses_of_one_agent_are_one_peer() {
        let found =
            vec![unnamed("192.0.2.3"), unnamed("192.0.2.4"), unnamed("2001:db8::3"), unnamed("192.0.2.1")];
        let known = [("192.0.2.3", "c"), ("2001:db8::3", "c"), ("192.0.2.1", "a")];
        let roster = Roster::new(&config(), &roster_inputs(&[(DNS, found)], &known));
        assert_eq!(names(&roster.peers), ["b", "c"], "an agent is not a peer of itself");
        let both = ["192.0.2.3", "2001:db8::3"].map(|address| address.parse::<IpAddr>().unwrap());
        assert_eq!(roster.addresses["c"], both);
        assert_eq!(roster.unidentified.keys().collect::<Vec<_>>(), [&unidentified_at("192.0.2.4")]);
    }

    #[test]
    fn members_with_a_used_name_and_targets_without_a_name_are_skipped() {
        let found = [
            (FILES, vec![named("b", "192.0.2.3")]),
            (HTTP, vec![unnamed("192.0.2.5"), named("b", "192.0.2.6")]),
        ];
        let roster = Roster::new(&config(), &roster_inputs(&found, &[]));
        assert_eq!(roster.peers["b"].address, "b.example.net");
        assert_eq!(roster.skipped.len(), 3, "{:?}", roster.skipped);
        assert_eq!(
            roster.skipped[1],
            "skipping 192.0.2.5 of http:192.0.2.9/targets: it has no name; set the label `instance`"
        );
    }

    #[test]
    fn agent_that_is_listed_as_its_own_peer_is_not_measured() {
        let mut inputs = roster_inputs(&[(FILES, vec![named("c", "192.0.2.3")])], &[]);
        let own_names = [("b", "b.example.net"), ("c", "192.0.2.3")];
        inputs.own_names.extend(own_names.map(|(name, host)| (name.to_owned(), host.to_owned())));
        assert_eq!(names(&Roster::new(&config(), &inputs).peers), [""; 0]);
        // A corrected list applies.
        inputs.members_by_provider.insert(FILES.to_owned(), vec![named("c", "192.0.2.4")]);
        assert_eq!(names(&Roster::new(&config(), &inputs).peers), ["c"]);
    }

    #[test]
    fn second_agent_with_the_same_name_is_skipped() {
        let found = ["192.0.2.3", "192.0.2.4", "192.0.2.5"].map(unnamed).to_vec();
        let known = [("192.0.2.3", "c"), ("192.0.2.4", "c"), ("192.0.2.5", "a")];
        let mut inputs = roster_inputs(&[(DNS, found)], &known);
        for host in ["192.0.2.4", "192.0.2.5"] {
            inputs.known_agents.get_mut(&unidentified_at(host)).unwrap().boot_id =
                "run of another".to_owned();
        }
        let roster = Roster::new(&config(), &inputs);
        assert_eq!(roster.addresses["c"].len(), 1);
        let skipped = [
            "skipping 192.0.2.4 of dns:agents.example.net: it is a different agent with the name c",
            "skipping 192.0.2.5 of dns:agents.example.net: it is a different agent with the name of this agent",
        ];
        assert_eq!(roster.skipped, skipped);
    }

    #[test]
    fn agents_that_no_provider_lists_are_removed() {
        let found = [(DNS, vec![unnamed("192.0.2.3")]), ("dns:gone.example.net", vec![unnamed("192.0.2.4")])];
        let mut inputs = roster_inputs(&found, &[("192.0.2.3", "c"), ("192.0.2.4", "d")]);
        inputs.retain_configured(&config());
        assert_eq!(inputs.members_by_provider.len(), 1);
        assert_eq!(inputs.known_agents.len(), 1);
    }
}
