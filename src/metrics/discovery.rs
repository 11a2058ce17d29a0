//! How asking for peers and targets goes.

use std::time::Duration;

use prometheus::{CounterVec, GaugeVec, Registry};

use super::registry::{counters, gauges};

/// What is exported of one provider.
#[derive(Debug, Clone, Copy)]
pub struct ProviderCounts<'a> {
    /// What it is called.
    pub name: &'a str,
    /// Of its last answer.
    pub members: usize,
    /// Of those, agents that have not told their names.
    pub unidentified: usize,
    /// When that was, since 1970; zero: there was none.
    pub last_success: Duration,
    /// How often it did not answer.
    pub failures: u64,
    /// How often it is asked.
    pub interval: Duration,
}

/// The metrics of all providers.
#[derive(Debug)]
pub(super) struct ProviderMetrics {
    members: GaugeVec,
    unidentified: GaugeVec,
    last_success: GaugeVec,
    interval: GaugeVec,
    failures: CounterVec,
}

impl ProviderMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let gauges = |name, help| gauges(registry, name, help, &["provider"]);
        Self {
            members: gauges(
                "pathmeter_discovery_members",
                "Peers or targets in the last answer of a provider.",
            ),
            unidentified: gauges(
                "pathmeter_discovery_unidentified",
                "Of those, agents that have not told their names and are not measured.",
            ),
            last_success: gauges(
                "pathmeter_discovery_last_success_timestamp_seconds",
                "When a provider last answered, in seconds since 1970; 0: never.",
            ),
            interval: gauges("pathmeter_discovery_interval_seconds", "How often a provider is asked."),
            failures: counters(
                registry,
                "pathmeter_discovery_failures_total",
                "How often a provider did not answer. Its last members stay.",
                &["provider"],
            ),
        }
    }

    /// Replaces everything: providers that are no more have no series.
    pub(super) fn set<'a>(&self, providers: impl Iterator<Item = ProviderCounts<'a>>) {
        for gauges in [&self.members, &self.unidentified, &self.last_success, &self.interval] {
            gauges.reset();
        }
        self.failures.reset();
        #[expect(clippy::cast_precision_loss, reason = "counts below 2⁵²")]
        for ProviderCounts { name, members, unidentified, last_success, failures, interval } in providers {
            let labels = &[name];
            self.members.with_label_values(labels).set(members as f64);
            self.unidentified.with_label_values(labels).set(unidentified as f64);
            self.last_success.with_label_values(labels).set(last_success.as_secs_f64());
            self.interval.with_label_values(labels).set(interval.as_secs_f64());
            self.failures.with_label_values(labels).inc_by(failures as f64);
        }
    }
}
