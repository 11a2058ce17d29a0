//! Handles provider updates, and the identities of agents that are listed without a name.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;
use tracing::{info, warn};

use super::membership::Membership;
use super::pending::PendingWork;
use crate::api::status::ProviderStatus;
use crate::config::discovery::ProviderSource;
use crate::config::{Config, Provider};
use crate::discovery::{IdentifyResult, PollTask, ProviderUpdate, UnidentifiedAgent};
use crate::http::client::{Client, authority};
use crate::metrics::ProviderCounts;
use crate::roster::KnownAgent;
use crate::settings::Settings;

/// The period over which the names of agents are collected: those of a fleet arrive within a second, and each
/// name changes the neighbours in a ring.
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
                ProviderSource::Http { https, .. } => https.as_ref().map(|https| settings.secure(https)),
                ProviderSource::Files(_) | ProviderSource::Dns { .. } => None,
            },
        });
        self.provider_poller.follow(tasks.collect::<Vec<_>>());
    }

    /// Requests the names of the agents that are listed without one.
    pub(super) fn identify_agents(&mut self, settings: &Settings, client: &Client, renew: bool) {
        let agents = self.roster.unidentified.keys().map(|agent| {
            let secure = agent.https.as_ref().map(|https| settings.secure(https));
            (agent.clone(), secure)
        });
        self.agent_identifier.follow(agents.collect(), client, renew);
    }

    /// Handles a result of polling a provider. If it failed, the last members of the provider are kept.
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
                    info!(provider, members = members.len(), "polling provider succeeded again");
                }
                if self.inputs.members_by_provider.get(&provider) != Some(&members) {
                    info!(provider, members = members.len(), "members of provider have changed");
                    self.inputs.members_by_provider.insert(provider, members);
                    pending.add(|pending| pending.rebuild_roster = true);
                }
            }
            Err(reason) => {
                health.failures += 1;
                if health.error.as_ref() != Some(&reason) {
                    warn!(provider, reason, "polling provider failed; keeping its last members");
                    health.error = Some(reason);
                }
            }
        }
        pending.add(|pending| pending.publish = true);
    }

    /// Handles a result of identifying an agent.
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
                let this_agent = KnownAgent { name, boot_id: identity.boot_id };
                self.inputs.known_agents.insert(agent, this_agent);
            }
            Ok(identity) => {
                self.identify_errors.remove(&agent);
                let (name, boot_id) = (identity.name.clone(), identity.boot_id.clone());
                self.inputs.known_agents.insert(agent, KnownAgent { name, boot_id });
                self.identities.entry(identity.name.clone()).or_insert(identity);
            }
            Err(reason) => {
                self.identify_errors.insert(agent, reason);
                return pending.add(|pending| pending.publish = true);
            }
        }
        pending.add_within(GATHER, |pending| pending.rebuild_roster = true);
    }

    fn unidentified(&self, provider: &Provider) -> impl Iterator<Item = &UnidentifiedAgent> {
        self.roster.unidentified.iter().filter(|(_, of)| **of == provider.name).map(|(agent, _)| agent)
    }

    fn members(&self, provider: &Provider) -> usize {
        self.inputs.members_by_provider.get(&provider.name).map_or(0, Vec::len)
    }

    /// The counts of all providers for the metrics.
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

    /// The status of all providers for the API.
    pub(super) fn providers(&self, config: &Config) -> Vec<ProviderStatus> {
        let status = config.providers.iter().map(|provider| {
            let health = self.provider_health.get(&provider.name);
            let unidentified: BTreeMap<String, String> = self
                .unidentified(provider)
                .map(|agent| {
                    let error = self.identify_errors.get(agent).cloned();
                    let endpoint = authority(&agent.host, agent.http_port);
                    (endpoint, error.unwrap_or_else(|| "no response yet".to_owned()))
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
        status.collect()
    }
}
