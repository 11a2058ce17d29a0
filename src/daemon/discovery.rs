//! Who there is, as providers and unidentified agents tell.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;
use tracing::{info, warn};

use super::Daemon;
use crate::config::Provider;
use crate::config::discovery::Source;
use crate::discovery::{IdentifyResult, PollTask, ProviderUpdate, UnidentifiedAgent};
use crate::http::auth::Signer;
use crate::http::client::{Client, authority};
use crate::metrics::ProviderCounts;
use crate::roster::{KnownAgent, Roster};
use crate::status::ProviderStatus;

/// How asking a provider has gone.
#[derive(Debug, Default)]
pub(super) struct ProviderHealth {
    /// Nanoseconds since 1970; 0: it never said anything.
    last_success: u64,
    failures: u64,
    /// Why it did not say anything the last time.
    trouble: Option<String>,
}

/// How long names of agents are collected: those of a fleet come within a second, and each changes who is next to whom.
const GATHER: Duration = Duration::from_secs(1);

impl Daemon {
    /// Asks the providers that are configured.
    pub(super) fn update_providers(&mut self) {
        let config = &self.settings.config;
        self.inputs.retain_configured(config);
        self.provider_health.retain(|name, _| config.providers.iter().any(|provider| provider.name == *name));
        for provider in &config.providers {
            self.provider_health.entry(provider.name.clone()).or_default();
        }
        let tasks = config.providers.iter().map(|provider| PollTask {
            provider: provider.clone(),
            secure: match &provider.source {
                Source::Http { https, .. } => https.as_ref().map(|https| self.settings.secure(https)),
                Source::Files(_) | Source::Dns { .. } => None,
            },
        });
        self.provider_poller.follow(tasks.collect::<Vec<_>>());
    }

    /// Puts together anew who there is, and looks for their addresses.
    pub(super) fn rebuild_roster(&mut self) {
        let roster = Roster::new(&self.settings.config, &self.inputs);
        for sentence in roster.skipped.iter().filter(|sentence| !self.roster.skipped.contains(sentence)) {
            warn!("{sentence}");
        }
        let by_name = roster.hosts().filter(|(name, _)| !roster.addresses.contains_key(*name));
        let literal = self.resolver.follow(by_name);
        self.addresses.retain(|name, _| roster.knows(name));
        self.identities.retain(|name, _| roster.knows(name));
        self.refusals.retain(|name, _| roster.knows(name));
        self.goodbyes.retain(|name, _| roster.knows(name));
        self.addresses.extend(literal.into_iter().map(|(name, address)| (name, Ok(vec![address]))));
        let found = roster.addresses.iter().map(|(name, known)| (name.clone(), Ok(known.clone())));
        self.addresses.extend(found);
        self.roster = roster;
        self.count_providers();
    }

    /// Asks those without a name what they are called.
    pub(super) fn identify_agents(&mut self, client: &Client, renew: bool) {
        let agents = self.roster.unidentified.keys().map(|agent| {
            let secure = agent.https.as_ref().map(|https| self.settings.secure(https));
            (agent.clone(), secure)
        });
        self.agent_identifier.follow(agents.collect(), client, renew);
    }

    /// How agents are asked.
    pub(super) fn client(&self) -> Client {
        let signer = self.settings.keys.mesh.as_deref().map(Signer::new);
        Client { signer, ..Client::default() }
    }

    pub(super) fn on_provider_update(&mut self, provider: String, update: ProviderUpdate) {
        let Some(health) = self.provider_health.get_mut(&provider) else { return };
        match update {
            Ok(members) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                health.last_success = nanos(now);
                if health.trouble.take().is_some() {
                    info!(provider, members = members.len(), "a provider can be asked again");
                }
                if self.inputs.members_by_provider.get(&provider) != Some(&members) {
                    info!(provider, members = members.len(), "a provider knows of other members");
                    self.inputs.members_by_provider.insert(provider, members);
                    self.pending.note(|pending| pending.rebuild_roster = true);
                }
            }
            Err(why) => {
                health.failures += 1;
                if health.trouble.as_ref() != Some(&why) {
                    warn!(provider, why, "a provider cannot be asked; its last members stay");
                    health.trouble = Some(why);
                }
            }
        }
        self.count_providers();
        self.pending.note(|pending| pending.publish = true);
    }

    pub(super) fn on_identified(&mut self, agent: UnidentifiedAgent, result: IdentifyResult) {
        if !self.roster.unidentified.contains_key(&agent) {
            return;
        }
        match result {
            Ok(identity) if identity.boot_id == self.inputs.own_boot_id => {
                let name = self.settings.config.agent.name.clone();
                let ourselves = KnownAgent { name, boot_id: identity.boot_id };
                self.inputs.known_agents.insert(agent, ourselves);
            }
            Ok(identity) => {
                self.identify_errors.remove(&agent);
                let (name, boot_id) = (identity.name.clone(), identity.boot_id.clone());
                self.inputs.known_agents.insert(agent, KnownAgent { name, boot_id });
                self.identities.entry(identity.name.clone()).or_insert(identity);
            }
            Err(why) => {
                self.identify_errors.insert(agent, why);
                return self.pending.note(|pending| pending.publish = true);
            }
        }
        self.pending.note_within(GATHER, |pending| pending.rebuild_roster = true);
    }

    fn unnamed(&self, provider: &Provider) -> impl Iterator<Item = &UnidentifiedAgent> {
        self.roster.unidentified.iter().filter(|(_, of)| **of == provider.name).map(|(agent, _)| agent)
    }

    fn members(&self, provider: &Provider) -> usize {
        self.inputs.members_by_provider.get(&provider.name).map_or(0, Vec::len)
    }

    pub(super) fn count_providers(&self) {
        let counts = self.settings.config.providers.iter().filter_map(|provider| {
            let health = self.provider_health.get(&provider.name)?;
            Some(ProviderCounts {
                name: &provider.name,
                members: self.members(provider),
                unnamed: self.unnamed(provider).count(),
                last_success: Duration::from_nanos(health.last_success),
                failures: health.failures,
                interval: provider.refresh,
            })
        });
        self.exporter.process.set_providers(counts);
    }

    /// All providers as they are shown.
    pub(super) fn providers(&self) -> Vec<ProviderStatus> {
        let shown = self.settings.config.providers.iter().map(|provider| {
            let health = self.provider_health.get(&provider.name);
            let unnamed: BTreeMap<String, String> = self
                .unnamed(provider)
                .map(|agent| {
                    let why = self.identify_errors.get(agent).cloned();
                    let place = authority(&agent.host, agent.http_port);
                    (place, why.unwrap_or_else(|| "it is being asked".to_owned()))
                })
                .collect();
            ProviderStatus {
                name: provider.name.clone(),
                members: self.members(provider),
                last_success: health.map_or(0, |health| health.last_success),
                failures: health.map_or(0, |health| health.failures),
                reason: health.and_then(|health| health.trouble.clone()),
                unnamed,
            }
        });
        shown.collect()
    }

    /// Forgets the errors of agents that are identified or gone.
    pub(super) fn forget_reasons(&mut self) {
        let unidentified: BTreeSet<&UnidentifiedAgent> = self.roster.unidentified.keys().collect();
        self.identify_errors.retain(|agent, _| unidentified.contains(agent));
    }
}
