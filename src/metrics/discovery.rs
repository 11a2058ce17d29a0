//! Metrics of service discovery, by provider.

use std::time::Duration;

use prometheus::{CounterVec, GaugeVec, Registry};

use super::registry::{counters, gauges};

/// Exported values of one provider.
#[derive(Debug, Clone, Copy)]
pub struct ProviderCounts<'a> {
    /// Name of the provider.
    pub name: &'a str,
    /// Members in its last successful result.
    pub members: usize,
    /// Of those, agents whose name is not known yet.
    pub unidentified: usize,
    /// Time of the last successful poll since the Unix epoch; zero if there was none.
    pub last_success: Duration,
    /// Failed polls.
    pub failures: u64,
    /// Time between polls.
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
                "Peers or targets in the last successful result of a provider.",
            ),
            unidentified: gauges(
                "pathmeter_discovery_unidentified",
                "Discovered agents whose name is not known yet and which are not measured.",
            ),
            last_success: gauges(
                "pathmeter_discovery_last_success_timestamp_seconds",
                "Unix time of the last successful poll of a provider; 0 if there was none.",
            ),
            interval: gauges("pathmeter_discovery_interval_seconds", "Time between polls of a provider."),
            failures: counters(
                registry,
                "pathmeter_discovery_failures_total",
                "Failed polls of a provider. Its last known members stay in use.",
                &["provider"],
            ),
        }
    }

    /// Replaces the values of all providers. Removed providers lose their series.
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
