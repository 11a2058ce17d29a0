//! Members that providers list, and the names of those that are listed without one.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;
use tracing::{info, warn};

use super::membership::Membership;
use super::pending::PendingWork;
use crate::api::status::ProviderStatus;
use crate::config::discovery::Source;
use crate::config::{Config, Provider};
use crate::discovery::{IdentifyResult, PollTask, ProviderUpdate, UnidentifiedAgent};
use crate::http::client::{Client, authority};
use crate::metrics::ProviderCounts;
use crate::roster::KnownAgent;
use crate::settings::Settings;

/// How long names of agents are collected: those of a fleet arrive within a second, and each changes the
/// neighbours in a ring.
const GATHER: Duration = Duration::from_secs(1);

impl Membership {
    /// Polls the configured providers.
    pub(super) fn update_providers(&mut self, settings: &Settings) {
        let config = &settings.config;
        self.inputs.retain_configured(config);
        self.provider_health.retain(|name, _| config.providers.iter().any(|provider| provider.name == *name));
        for provider in &config.providers {
            self.provider_health.entry(provider.name.clone()).or_default();
        }
        let tasks = config.providers.iter().map(|provider| PollTask {
            provider: provider.clone(),
            secure: match &provider.source {
                Source::Http { https, .. } => https.as_ref().map(|https| settings.secure(https)),
                Source::Files(_) | Source::Dns { .. } => None,
            },
        });
        self.provider_poller.follow(tasks.collect::<Vec<_>>());
    }

    /// Asks the agents without a name what they are called.
    pub(super) fn identify_agents(&mut self, settings: &Settings, client: &Client, renew: bool) {
        let agents = self.roster.unidentified.keys().map(|agent| {
            let secure = agent.https.as_ref().map(|https| settings.secure(https));
            (agent.clone(), secure)
        });
        self.agent_identifier.follow(agents.collect(), client, renew);
    }

    /// Takes the members that a provider lists; if it fails, its last members stay.
    pub(super) fn on_provider_update(
        &mut self,
        provider: String,
        update: ProviderUpdate,
        pending: &mut PendingWork,
    ) {
        let Some(health) = self.provider_health.get_mut(&provider) else { return };
        match update {
            Ok(members) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                health.last_success = nanos(now);
                if health.error.take().is_some() {
                    info!(provider, members = members.len(), "provider answers again");
                }
                if self.inputs.members_by_provider.get(&provider) != Some(&members) {
                    info!(provider, members = members.len(), "members of provider have changed");
                    self.inputs.members_by_provider.insert(provider, members);
                    pending.note(|pending| pending.rebuild_roster = true);
                }
            }
            Err(why) => {
                health.failures += 1;
                if health.error.as_ref() != Some(&why) {
                    warn!(provider, why, "polling provider failed; keeping its last members");
                    health.error = Some(why);
                }
            }
        }
        pending.note(|pending| pending.publish = true);
    }

    /// Takes the name that an agent says it has.
    pub(super) fn on_identified(
        &mut self,
        agent: UnidentifiedAgent,
        result: IdentifyResult,
        own_name: &str,
        pending: &mut PendingWork,
    ) {
        if !self.roster.unidentified.contains_key(&agent) {
            return;
        }
        match result {
            Ok(identity) if identity.boot_id == self.inputs.own_boot_id => {
                let name = own_name.to_owned();
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
                return pending.note(|pending| pending.publish = true);
            }
        }
        pending.note_within(GATHER, |pending| pending.rebuild_roster = true);
    }

    fn unidentified(&self, provider: &Provider) -> impl Iterator<Item = &UnidentifiedAgent> {
        self.roster.unidentified.iter().filter(|(_, of)| **of == provider.name).map(|(agent, _)| agent)
    }

    fn members(&self, provider: &Provider) -> usize {
        self.inputs.members_by_provider.get(&provider.name).map_or(0, Vec::len)
    }

    /// All providers as metrics count them.
    pub(super) fn provider_counts<'a>(&self, config: &'a Config) -> Vec<ProviderCounts<'a>> {
        let counts = config.providers.iter().filter_map(|provider| {
            let health = self.provider_health.get(&provider.name)?;
            Some(ProviderCounts {
                name: &provider.name,
                members: self.members(provider),
                unidentified: self.unidentified(provider).count(),
                last_success: Duration::from_nanos(health.last_success),
                failures: health.failures,
                interval: provider.refresh,
            })
        });
        counts.collect()
    }

    /// All providers as they are shown.
    pub(super) fn providers(&self, config: &Config) -> Vec<ProviderStatus> {
        let shown = config.providers.iter().map(|provider| {
            let health = self.provider_health.get(&provider.name);
            let unidentified: BTreeMap<String, String> = self
                .unidentified(provider)
                .map(|agent| {
                    let why = self.identify_errors.get(agent).cloned();
                    let place = authority(&agent.host, agent.http_port);
                    (place, why.unwrap_or_else(|| "no answer yet".to_owned()))
                })
                .collect();
            ProviderStatus {
                name: provider.name.clone(),
                members: self.members(provider),
                last_success: health.map_or(0, |health| health.last_success),
                failures: health.map_or(0, |health| health.failures),
                reason: health.and_then(|health| health.error.clone()),
                unidentified,
            }
        });
        shown.collect()
    }
}
