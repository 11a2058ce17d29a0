//! The peers and targets, with their addresses and identities.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;
use pathmeter_proto::wire::Goodbye;
use tokio::sync::mpsc;
use tracing::warn;

use super::measuring::Measuring;
use super::pending::PendingWork;
use crate::discovery::{AgentIdentifier, IdentifyResult, ProviderPoller, ProviderUpdate, UnidentifiedAgent};
use crate::fleet::{Addresses, Fleet, PlanInputs};
use crate::http::auth::Signer;
use crate::http::client::{Client, authority};
use crate::identity::{self, Identity};
use crate::identity_poller::{Endpoint, IdentityError, IdentityPoller, PeerReport, ReportResult};
use crate::metrics::Exporter;
use crate::resolver::{Resolution, Resolver};
use crate::roster::{KnownAgent, Roster, RosterInputs};
use crate::route_record::{PeerRoutes, ReportChange};
use crate::settings::Settings;

/// Maintains the roster, and the addresses and identities of its members, from the results of the pollers.
#[derive(Debug)]
pub(super) struct Membership {
    pub(super) roster: Roster,
    /// The inputs from which the roster is computed, in addition to the settings.
    pub(super) inputs: RosterInputs,
    pub(super) provider_health: BTreeMap<String, ProviderHealth>,
    /// The last error of identifying each agent without a name.
    pub(super) identify_errors: BTreeMap<UnidentifiedAgent, String>,
    pub(super) addresses: Addresses,
    pub(super) identities: BTreeMap<String, Identity>,
    /// The time of the last identity of each peer, in nanoseconds since 1970.
    pub(super) identified: BTreeMap<String, u64>,
    /// The routes that peers reported with their last identity, of their flows to this agent.
    pub(super) reported_routes: BTreeMap<String, PeerRoutes>,
    /// The reason for each peer whose identity is not available because one side does not trust the other.
    refusals: BTreeMap<String, String>,
    /// The last goodbye of each peer.
    pub(super) goodbyes: BTreeMap<String, Goodbye>,
    resolver: Resolver,
    identity_poller: IdentityPoller,
    pub(super) provider_poller: ProviderPoller,
    pub(super) agent_identifier: AgentIdentifier,
}

/// The health of a provider: the outcomes of its polls.
#[derive(Debug, Default)]
pub(super) struct ProviderHealth {
    /// The time of the last success in nanoseconds since 1970; 0: none yet.
    pub(super) last_success: u64,
    pub(super) failures: u64,
    /// The error of the last poll; `None`: it succeeded.
    pub(super) error: Option<String>,
}

/// The receivers of the results of the pollers.
#[derive(Debug)]
pub(super) struct PollResults {
    /// Addresses of peers and targets, by name.
    pub(super) resolved: mpsc::Receiver<(String, Resolution)>,
    /// What peers report about themselves, by name.
    pub(super) reports: mpsc::Receiver<(String, ReportResult)>,
    /// Members that providers list, by provider.
    pub(super) provider_updates: mpsc::Receiver<(String, ProviderUpdate)>,
    /// Identities of agents that providers list without a name.
    pub(super) identified: mpsc::Receiver<(UnidentifiedAgent, IdentifyResult)>,
}

impl Membership {
    /// A membership without members, and the receivers of its pollers. `boot_id` is that of this agent.
    pub(super) fn new(boot_id: u64) -> (Self, PollResults) {
        let (resolver, resolved) = Resolver::new();
        let (identity_poller, reports) = IdentityPoller::new();
        let (provider_poller, provider_updates) = ProviderPoller::new();
        let (agent_identifier, identified) = AgentIdentifier::new();
        let membership = Self {
            roster: Roster::default(),
            inputs: RosterInputs {
                own_boot_id: identity::format_boot_id(boot_id),
                ..RosterInputs::default()
            },
            provider_health: BTreeMap::new(),
            identify_errors: BTreeMap::new(),
            addresses: Addresses::new(),
            identities: BTreeMap::new(),
            identified: BTreeMap::new(),
            reported_routes: BTreeMap::new(),
            refusals: BTreeMap::new(),
            goodbyes: BTreeMap::new(),
            resolver,
            identity_poller,
            provider_poller,
            agent_identifier,
        };
        (membership, PollResults { resolved, reports, provider_updates, identified })
    }

    /// The inputs from which the paths are computed.
    pub(super) fn plan_inputs<'a>(&'a self, settings: &'a Settings) -> PlanInputs<'a> {
        let Self { roster, addresses, identities, .. } = self;
        PlanInputs { settings, roster, addresses, identities }
    }

    /// Computes the roster from its inputs, and resolves the addresses of its members.
    pub(super) fn rebuild_roster(&mut self, settings: &Settings) {
        let roster = Roster::new(&settings.config, &self.inputs);
        for message in roster.skipped.iter().filter(|message| !self.roster.skipped.contains(message)) {
            warn!("{message}");
        }
        let by_name = roster.hosts().filter(|(name, _)| !roster.addresses.contains_key(*name));
        let literal = self.resolver.follow(by_name);
        self.addresses.retain(|name, _| roster.contains(name));
        self.identities.retain(|name, _| roster.contains(name));
        self.identified.retain(|name, _| roster.contains(name));
        self.reported_routes.retain(|name, _| roster.contains(name));
        self.refusals.retain(|name, _| roster.contains(name));
        self.goodbyes.retain(|name, _| roster.contains(name));
        self.addresses.extend(literal.into_iter().map(|(name, address)| (name, Ok(vec![address]))));
        let listed = roster.addresses.iter().map(|(name, known)| (name.clone(), Ok(known.clone())));
        self.addresses.extend(listed);
        self.identify_errors.retain(|agent, _| roster.unidentified.contains_key(agent));
        self.roster = roster;
    }

    /// Polls the identities of the peers with an address, and of the agents without a name. If the keys have
    /// changed, `renew` must be true: it restarts all polls.
    pub(super) fn poll_identities(&mut self, settings: &Settings, renew: bool) {
        let address_of = |name: &str| self.addresses.get(name)?.as_ref().ok()?.first().copied();
        let peers = self.roster.peers.values();
        let known = peers.filter_map(|peer| {
            let address = SocketAddr::new(address_of(&peer.name)?, peer.http_port);
            let secure = peer.https.as_ref().map(|https| settings.secure(https));
            Some((
                peer.name.clone(),
                Endpoint { address, host: authority(&peer.address, peer.http_port), secure },
            ))
        });
        let client = client(settings);
        let own_name = &settings.config.agent.name;
        self.identity_poller.follow(known.collect(), &client, own_name, renew);
        self.identify_agents(settings, &client, renew);
    }

    /// Handles a resolution of a peer or target. If it failed, the last known addresses are kept.
    pub(super) fn on_resolved(
        &mut self,
        name: String,
        addresses: Resolution,
        exporter: &Exporter,
        pending: &mut PendingWork,
    ) {
        let known = self.addresses.get(&name);
        if let Err(reason) = &addresses {
            exporter.process.resolve_failed();
            match known {
                // A possibly outdated address is better than none.
                Some(Ok(_)) => {
                    warn!(name, reason, "name resolution failed; using the last address");
                    return;
                }
                Some(Err(old)) if old == reason => return,
                Some(Err(_)) | None => {
                    warn!(name, reason, "name resolution failed; not measured until it succeeds")
                }
            }
        }
        if known == Some(&addresses) {
            return;
        }
        self.addresses.insert(name, addresses);
        pending.add(|pending| pending.update_paths = true);
    }

    /// Handles a result of polling what a peer reports about itself.
    pub(super) fn on_report(
        &mut self,
        name: String,
        result: ReportResult,
        own_name: &str,
        measuring: &Measuring,
        pending: &mut PendingWork,
    ) {
        match result {
            Ok(PeerReport { identity, routes }) => {
                let change = self.reported_routes.entry(name.clone()).or_default().reported(routes);
                if change == ReportChange::Route {
                    // What changed the peer's route may have changed that of this agent as well.
                    measuring.peer_routes_changed(&name);
                }
                if change != ReportChange::None {
                    pending.add(|pending| pending.publish = true);
                }
                self.on_identity(name, identity, own_name, &measuring.fleet, pending);
            }
            Err(error) => {
                if let Some(routes) = self.reported_routes.get_mut(&name)
                    && routes.failed() != ReportChange::None
                {
                    pending.add(|pending| pending.publish = true);
                }
                self.on_identity_error(name, &error);
            }
        }
    }

    fn on_identity(
        &mut self,
        name: String,
        identity: Identity,
        own_name: &str,
        fleet: &Fleet,
        pending: &mut PendingWork,
    ) {
        self.refusals.remove(&name);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.identified.insert(name.clone(), nanos(now));
        if identity.boot_id == self.inputs.own_boot_id {
            warn!("peer {name} is this host, which calls itself {own_name}; start with `--name {name}`");
            if let Some(peer) = self.roster.peers.get(&name) {
                self.inputs.own_names.insert(name, peer.address.clone());
            }
            return pending.add(|pending| pending.rebuild_roster = true);
        }
        if identity.name != name && self.roster.addresses.contains_key(&name) {
            // The address belongs to a different agent.
            self.inputs.known_agents.retain(|_, known| known.name != name);
            return pending.add(|pending| pending.rebuild_roster = true);
        }
        let known = self.identities.get(&name);
        if known == Some(&identity) {
            return;
        }
        if let Some(known) = known.filter(|known| known.boot_id != identity.boot_id) {
            // The agent was restarted: all its addresses belong to the new run.
            let is_same_agent =
                |other: &&mut KnownAgent| other.name == name && other.boot_id == known.boot_id;
            for known_agent in self.inputs.known_agents.values_mut().filter(is_same_agent) {
                known_agent.boot_id.clone_from(&identity.boot_id);
            }
            // An address that reported the new boot id earlier was skipped as that of a different agent.
            pending.add(|pending| pending.rebuild_roster = true);
        }
        if identity.name != name && known.is_none_or(|known| known.name != identity.name) {
            warn!(
                peer = name,
                calls_itself = ?identity.name,
                "peer reports another name than the configured one"
            );
        }
        let reason = &identity.you.stamp.reason;
        let is_new = known.is_none_or(|known| known.you.stamp.answers) && !fleet.has_answered(&name);
        if let Some(reason) = reason.as_ref().filter(|_| is_new) {
            warn!(peer = name, %reason, "peer does not answer this agent");
        }
        // Probes may select peers by the labels of their zones.
        let has_new_labels = known.is_none_or(|known| known.labels != identity.labels);
        self.identities.insert(name, identity);
        pending.add(|pending| {
            pending.publish = true;
            pending.update_paths |= has_new_labels;
        });
    }

    /// Handles an identity that is not available. The peer is still measured. Its paths show if it cannot be
    /// reached; only what an operator has to correct is logged.
    fn on_identity_error(&mut self, name: String, error: &IdentityError) {
        if !error.is_refusal() {
            return;
        }
        let reason = error.to_string();
        if self.refusals.get(&name) != Some(&reason) {
            warn!(peer = name, reason, "identity of peer is not available");
            self.refusals.insert(name, reason);
        }
    }
}

/// The client for requests to agents; it signs them with the mesh key.
fn client(settings: &Settings) -> Client {
    let signer = settings.keys.mesh.as_deref().map(Signer::new);
    Client { signer, ..Client::default() }
}
