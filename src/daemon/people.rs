//! Who there is, as providers and strangers tell.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::nanos;
use tracing::{info, warn};

use super::Daemon;
use crate::api::status::ProviderStatus;
use crate::config::Provider;
use crate::config::discovery::Source;
use crate::discovery::{Errand, Finding, Introduced, Stranger};
use crate::http::auth::Signer;
use crate::http::client::Client;
use crate::metrics::ProviderCounts;
use crate::roster::{Acquaintance, Roster};

/// How asking a provider has gone.
#[derive(Debug, Default)]
pub(super) struct Experience {
    /// Nanoseconds since 1970; 0: it never said anything.
    last_success: u64,
    failures: u64,
    /// Why it did not say anything the last time.
    trouble: Option<String>,
}

/// How long introductions are collected: those of a fleet come within a second, and each changes who is next to whom.
const GATHER: Duration = Duration::from_secs(1);

impl Daemon {
    /// Asks the providers that are configured.
    pub(super) fn look_around(&mut self) {
        let config = &self.settings.config;
        self.knowledge.tidy(config);
        self.experience.retain(|name, _| config.providers.iter().any(|provider| provider.name == *name));
        for provider in &config.providers {
            self.experience.entry(provider.name.clone()).or_default();
        }
        let errands = config.providers.iter().map(|provider| Errand {
            provider: provider.clone(),
            secure: match &provider.source {
                Source::Http { https, .. } => https.as_ref().map(|https| self.settings.secure(https)),
                Source::Files(_) | Source::Dns { .. } => None,
            },
        });
        self.scout.follow(errands.collect::<Vec<_>>());
    }

    /// Puts together anew who there is, and looks for their addresses.
    pub(super) fn enroll(&mut self) {
        let roster = Roster::new(&self.settings.config, &self.knowledge);
        for sentence in roster.left_out.iter().filter(|sentence| !self.roster.left_out.contains(sentence)) {
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
    pub(super) fn introduce(&mut self, client: &Client, renew: bool) {
        let strangers = self.roster.strangers.keys().cloned().collect();
        self.introductions.follow(strangers, client, |https| self.settings.secure(https), renew);
    }

    /// How agents are asked.
    pub(super) fn client(&self) -> Client {
        let signer = self.settings.keys.mesh.as_deref().map(Signer::new);
        Client { signer, ..Client::default() }
    }

    pub(super) fn found(&mut self, Finding { provider, members }: Finding) {
        let Some(experience) = self.experience.get_mut(&provider) else { return };
        match members {
            Ok(members) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                experience.last_success = nanos(now);
                if experience.trouble.take().is_some() {
                    info!(provider, members = members.len(), "a provider can be asked again");
                }
                if self.knowledge.findings.get(&provider) != Some(&members) {
                    info!(provider, members = members.len(), "a provider knows of other members");
                    self.knowledge.findings.insert(provider, members);
                    self.overdue.note(|overdue| overdue.enroll = true);
                }
            }
            Err(why) => {
                experience.failures += 1;
                if experience.trouble.as_ref() != Some(&why) {
                    warn!(provider, why, "a provider cannot be asked; its last members stay");
                    experience.trouble = Some(why);
                }
            }
        }
        self.count_providers();
        self.overdue.note(|overdue| overdue.publish = true);
    }

    pub(super) fn introduced(&mut self, Introduced { stranger, identity }: Introduced) {
        if !self.roster.strangers.contains_key(&stranger) {
            return;
        }
        match identity {
            Ok(identity) if identity.boot_id == self.knowledge.own_boot_id => {
                let name = self.settings.config.agent.name.clone();
                let ourselves = Acquaintance { name, boot_id: identity.boot_id };
                self.knowledge.introductions.insert(stranger, ourselves);
            }
            Ok(identity) => {
                self.reticent.remove(&stranger);
                let (name, boot_id) = (identity.name.clone(), identity.boot_id.clone());
                self.knowledge.introductions.insert(stranger, Acquaintance { name, boot_id });
                self.identities.entry(identity.name.clone()).or_insert(identity);
            }
            Err(why) => {
                self.reticent.insert(stranger, why);
                return self.overdue.note(|overdue| overdue.publish = true);
            }
        }
        self.overdue.note_within(GATHER, |overdue| overdue.enroll = true);
    }

    fn unnamed(&self, provider: &Provider) -> impl Iterator<Item = &Stranger> {
        self.roster.strangers.iter().filter(|(_, of)| **of == provider.name).map(|(stranger, _)| stranger)
    }

    fn members(&self, provider: &Provider) -> usize {
        self.knowledge.findings.get(&provider.name).map_or(0, Vec::len)
    }

    pub(super) fn count_providers(&self) {
        let counts = self.settings.config.providers.iter().filter_map(|provider| {
            let experience = self.experience.get(&provider.name)?;
            Some(ProviderCounts {
                name: &provider.name,
                members: self.members(provider),
                unnamed: self.unnamed(provider).count(),
                last_success: Duration::from_nanos(experience.last_success),
                failures: experience.failures,
                interval: provider.refresh,
            })
        });
        self.exporter.process.set_providers(counts);
    }

    /// All providers as they are shown.
    pub(super) fn providers(&self) -> Vec<ProviderStatus> {
        let shown = self.settings.config.providers.iter().map(|provider| {
            let experience = self.experience.get(&provider.name);
            let unnamed: BTreeMap<String, String> = self
                .unnamed(provider)
                .map(|stranger| {
                    let why = self.reticent.get(stranger).cloned();
                    let place = crate::peers::authority(&stranger.host, stranger.http_port);
                    (place, why.unwrap_or_else(|| "it is being asked".to_owned()))
                })
                .collect();
            ProviderStatus {
                name: provider.name.clone(),
                members: self.members(provider),
                last_success: experience.map_or(0, |experience| experience.last_success),
                failures: experience.map_or(0, |experience| experience.failures),
                reason: experience.and_then(|experience| experience.trouble.clone()),
                unnamed,
            }
        });
        shown.collect()
    }

    /// Forgets why strangers did not tell who are strangers no more.
    pub(super) fn forget_reasons(&mut self) {
        let strangers: BTreeSet<&Stranger> = self.roster.strangers.keys().collect();
        self.reticent.retain(|stranger, _| strangers.contains(stranger));
    }
}
