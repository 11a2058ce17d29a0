//! Who there is: the peers and targets of the configuration, and those that providers know of.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::config::discovery::{Finds, PeerPattern, TargetPattern};
use crate::config::inventory::Member;
use crate::config::{Config, Peer, Provider, Target};
use crate::discovery::UnidentifiedAgent;

/// Who there is at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roster {
    /// The other agents, by name.
    pub peers: BTreeMap<String, Peer>,
    /// Hosts without an agent, by name.
    pub targets: BTreeMap<String, Target>,
    /// All addresses of peers that were found by these and not by a name.
    pub addresses: BTreeMap<String, Vec<IpAddr>>,
    /// Agents that have not told their names yet, with the provider that knows of them.
    pub unidentified: BTreeMap<UnidentifiedAgent, String>,
    /// Sentences about members that were left out.
    pub skipped: Vec<String>,
    /// Which run of which agent has the addresses of a name.
    boot_ids: BTreeMap<String, String>,
}

/// Peers and targets together; further ones are left out, and told. Chosen: twice the 10,000 paths that one agent is built for.
pub const HOSTS_MAX: usize = 20_000;

/// Sentences that are kept.
const SKIPPED_MAX: usize = 100;

/// What is known besides the configuration.
#[derive(Debug, Default)]
pub struct RosterInputs {
    /// What each provider said last when it said something, by its name.
    pub members_by_provider: BTreeMap<String, Vec<Member>>,
    /// What unidentified agents said of themselves.
    pub known_agents: BTreeMap<UnidentifiedAgent, KnownAgent>,
    /// Names under which we are known to others, with the hosts that turned out to be us.
    pub own_names: BTreeMap<String, String>,
    /// Which run of an agent we are.
    pub own_boot_id: String,
}

/// An agent of which only the address was known, and which has told its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownAgent {
    /// What it is called.
    pub name: String,
    /// Which run of it: two addresses with the same one are one agent.
    pub boot_id: String,
}

impl RosterInputs {
    /// Forgets what the configuration and the providers have no use for any more.
    pub fn retain_configured(&mut self, config: &Config) {
        self.members_by_provider
            .retain(|name, _| config.providers.iter().any(|provider| provider.name == *name));
        let unidentified: BTreeSet<UnidentifiedAgent> = config
            .providers
            .iter()
            .flat_map(|provider| self.of(provider).filter_map(move |member| unidentified(provider, member)))
            .collect();
        self.known_agents.retain(|agent, _| unidentified.contains(agent));
    }

    fn of<'a>(&'a self, provider: &Provider) -> impl Iterator<Item = &'a Member> + use<'a> {
        self.members_by_provider.get(&provider.name).into_iter().flatten()
    }
}

/// A member that has no name by which it can be measured.
fn unidentified(provider: &Provider, member: &Member) -> Option<UnidentifiedAgent> {
    let Finds::Peers(pattern) = &provider.finds else { return None };
    member.name.is_none().then(|| UnidentifiedAgent {
        host: member.host.clone(),
        http_port: member.port.unwrap_or(pattern.http_port),
        https: pattern.https.as_ref().map(|secured| secured.of(&member.host)),
    })
}

impl Roster {
    /// Puts together who there is. What the configuration names itself goes first, then providers in its order; whoever has a
    /// name that is taken is left out.
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
            for member in inputs.of(provider) {
                roster.add(config, inputs, provider, member);
            }
        }
        roster
    }

    fn add(&mut self, config: &Config, inputs: &RosterInputs, provider: &Provider, member: &Member) {
        let agent = unidentified(provider, member);
        let introduced = agent.as_ref().and_then(|agent| inputs.known_agents.get(agent));
        let name = match (&member.name, introduced, agent) {
            (Some(name), ..) | (None, Some(KnownAgent { name, .. }), _) => name,
            (None, None, Some(agent)) => {
                self.unidentified.insert(agent, provider.name.clone());
                return;
            }
            (None, None, None) => {
                return self.skip(provider, member, "has no name: give it the label instance");
            }
        };
        if introduced.is_some_and(|other| *name == config.agent.name && other.boot_id != inputs.own_boot_id) {
            return self.skip(provider, member, "is another agent that is called as we are");
        }
        if *name == config.agent.name || inputs.own_names.get(name) == Some(&member.host) {
            return;
        }
        if let Some(introduced) = introduced
            && let Ok(address) = member.host.parse::<IpAddr>()
            && let Some(addresses) = self.addresses.get_mut(name)
        {
            if self.boot_ids.get(name) != Some(&introduced.boot_id) {
                let why = format!("is another agent that is called {name}");
                return self.skip(provider, member, &why);
            }
            addresses.push(address.to_canonical());
            return;
        }
        if self.peers.contains_key(name) || self.targets.contains_key(name) {
            return self.skip(provider, member, "has a name that another one has");
        }
        if self.peers.len() + self.targets.len() >= HOSTS_MAX {
            return self.skip(provider, member, &format!("is one more than {HOSTS_MAX}"));
        }
        match &provider.finds {
            Finds::Peers(pattern) => {
                if let (Some(introduced), Ok(address)) = (introduced, member.host.parse::<IpAddr>()) {
                    self.addresses.insert(name.clone(), vec![address.to_canonical()]);
                    self.boot_ids.insert(name.clone(), introduced.boot_id.clone());
                }
                self.peers.insert(name.clone(), peer(name, pattern, member));
            }
            Finds::Targets(pattern) => drop(self.targets.insert(name.clone(), target(name, pattern, member))),
        }
    }

    fn skip(&mut self, provider: &Provider, member: &Member, why: &str) {
        if self.skipped.len() < SKIPPED_MAX {
            let shown = member.name.as_ref().unwrap_or(&member.host);
            self.skipped.push(format!("{shown} of {} {why}", provider.name));
        }
    }

    /// Every name with its host.
    pub fn hosts(&self) -> impl Iterator<Item = (&str, &str)> {
        let peers = self.peers.values().map(|peer| (peer.name.as_str(), peer.address.as_str()));
        peers.chain(self.targets.values().map(|target| (target.name.as_str(), target.address.as_str())))
    }

    /// Whether somebody is called that.
    #[must_use]
    pub fn knows(&self, name: &str) -> bool {
        self.peers.contains_key(name) || self.targets.contains_key(name)
    }
}

fn peer(name: &str, pattern: &PeerPattern, member: &Member) -> Peer {
    Peer {
        name: name.to_owned(),
        address: member.host.clone(),
        http_port: member.port.unwrap_or(pattern.http_port),
        stamp_port: member.stamp_port.unwrap_or(pattern.stamp_port),
        agent_port: member.agent_port.unwrap_or(pattern.agent_port),
        https: pattern.https.as_ref().map(|secured| secured.of(&member.host)),
        labels: merged(&pattern.labels, &member.labels),
    }
}

fn target(name: &str, pattern: &TargetPattern, member: &Member) -> Target {
    let secure = member.url.as_ref().filter(|url| url.scheme.is_secure());
    Target {
        name: name.to_owned(),
        address: member.host.clone(),
        port: member.port.unwrap_or(pattern.port),
        quirks: pattern.quirks,
        url: member.url.clone(),
        https: secure.map(|url| pattern.https.of(&url.host)),
        key_file: None,
        labels: merged(&pattern.labels, &member.labels),
    }
}

/// Labels of one above those of all.
fn merged(all: &BTreeMap<String, String>, own: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut labels = all.clone();
    labels.extend(own.clone());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Host};

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
        let host = Host { name_override: None, hostname: "a".into(), labels: BTreeMap::new() };
        config::load(CONFIG.as_bytes(), &host).unwrap_or_else(|problems| panic!("{problems}")).config
    }

    fn named(name: &str, host: &str) -> Member {
        Member { name: Some(name.into()), host: host.into(), ..Member::default() }
    }

    fn at(host: &str) -> Member {
        Member { host: host.into(), ..Member::default() }
    }

    fn unidentified_at(host: &str) -> UnidentifiedAgent {
        UnidentifiedAgent { host: host.into(), http_port: 9862, https: None }
    }

    /// Each name is that of one agent.
    fn knowing(members_by_provider: &[(&str, Vec<Member>)], known_agents: &[(&str, &str)]) -> RosterInputs {
        let told = |name: &str| KnownAgent { name: name.to_owned(), boot_id: format!("run of {name}") };
        RosterInputs {
            members_by_provider: members_by_provider
                .iter()
                .map(|(name, members)| ((*name).to_owned(), members.clone()))
                .collect(),
            known_agents: known_agents
                .iter()
                .map(|(host, name)| (unidentified_at(host), told(name)))
                .collect(),
            own_names: BTreeMap::new(),
            own_boot_id: "run of a".to_owned(),
        }
    }

    fn names<V>(all: &BTreeMap<String, V>) -> Vec<&str> {
        all.keys().map(String::as_str).collect()
    }

    #[test]
    fn what_is_found_joins_what_is_configured_with_the_ports_and_labels_of_its_provider() {
        let labels = BTreeMap::from([("zone".to_owned(), "z".to_owned())]);
        let found = Member { labels, port: Some(80), ..named("c", "192.0.2.3") };
        let gateway = named("gw-2", "192.0.2.2");
        let roster = Roster::new(&config(), &knowing(&[(FILES, vec![found]), (HTTP, vec![gateway])], &[]));
        assert_eq!((names(&roster.peers), names(&roster.targets)), (vec!["b", "c"], vec!["gw", "gw-2"]));
        let c = &roster.peers["c"];
        assert_eq!((c.http_port, c.stamp_port, c.agent_port), (80, 862, 9863));
        assert_eq!(c.labels.len(), 2);
        assert_eq!(roster.targets["gw-2"].port, 4000);
        assert!(roster.skipped.is_empty() && roster.unidentified.is_empty());
    }

    #[test]
    fn addresses_wait_until_their_agents_have_told_their_names_and_two_of_one_are_one_peer() {
        let found = vec![at("192.0.2.3"), at("192.0.2.4"), at("2001:db8::3"), at("192.0.2.1")];
        let told = [("192.0.2.3", "c"), ("2001:db8::3", "c"), ("192.0.2.1", "a")];
        let roster = Roster::new(&config(), &knowing(&[(DNS, found)], &told));
        assert_eq!(names(&roster.peers), ["b", "c"], "we are none of our peers");
        let both = ["192.0.2.3", "2001:db8::3"].map(|address| address.parse::<IpAddr>().unwrap());
        assert_eq!(roster.addresses["c"], both);
        assert_eq!(roster.unidentified.keys().collect::<Vec<_>>(), [&unidentified_at("192.0.2.4")]);
    }

    #[test]
    fn a_name_that_is_taken_is_left_out_and_told_and_so_is_a_target_without_one() {
        let found =
            [(FILES, vec![named("b", "192.0.2.3")]), (HTTP, vec![at("192.0.2.5"), named("b", "192.0.2.6")])];
        let roster = Roster::new(&config(), &knowing(&found, &[]));
        assert_eq!(roster.peers["b"].address, "b.example.net");
        assert_eq!(roster.skipped.len(), 3, "{:?}", roster.skipped);
        assert_eq!(
            roster.skipped[1],
            "192.0.2.5 of http:192.0.2.9/targets has no name: give it the label instance"
        );
    }

    #[test]
    fn who_turns_out_to_be_ourselves_is_no_peer() {
        let mut inputs = knowing(&[(FILES, vec![named("c", "192.0.2.3")])], &[]);
        let ours = [("b", "b.example.net"), ("c", "192.0.2.3")];
        inputs.own_names.extend(ours.map(|(name, host)| (name.to_owned(), host.to_owned())));
        assert_eq!(names(&Roster::new(&config(), &inputs).peers), [""; 0]);
        // Who has listed c at our address, and corrects it, has c.
        inputs.members_by_provider.insert(FILES.to_owned(), vec![named("c", "192.0.2.4")]);
        assert_eq!(names(&Roster::new(&config(), &inputs).peers), ["c"]);
    }

    #[test]
    fn two_agents_of_one_name_are_not_taken_for_one_and_are_told() {
        let found = ["192.0.2.3", "192.0.2.4", "192.0.2.5"].map(at).to_vec();
        let told = [("192.0.2.3", "c"), ("192.0.2.4", "c"), ("192.0.2.5", "a")];
        let mut inputs = knowing(&[(DNS, found)], &told);
        for host in ["192.0.2.4", "192.0.2.5"] {
            inputs.known_agents.get_mut(&unidentified_at(host)).unwrap().boot_id =
                "run of another".to_owned();
        }
        let roster = Roster::new(&config(), &inputs);
        assert_eq!(roster.addresses["c"].len(), 1);
        let skipped = [
            "192.0.2.4 of dns:agents.example.net is another agent that is called c",
            "192.0.2.5 of dns:agents.example.net is another agent that is called as we are",
        ];
        assert_eq!(roster.skipped, skipped);
    }

    #[test]
    fn what_nobody_finds_any_more_is_forgotten() {
        let found = [(DNS, vec![at("192.0.2.3")]), ("dns:gone.example.net", vec![at("192.0.2.4")])];
        let mut inputs = knowing(&found, &[("192.0.2.3", "c"), ("192.0.2.4", "d")]);
        inputs.retain_configured(&config());
        assert_eq!(inputs.members_by_provider.len(), 1);
        assert_eq!(inputs.known_agents.len(), 1);
    }
}
