//! Attributes of configured probes, and of peers and targets.

use std::time::Duration;

use super::block::Series;
use super::text::{CLOSE, Family, Suffix, gauge, label};

/// Attributes of one configured probe.
#[derive(Debug)]
pub struct ProbeInfo {
    probe: String,
    attributes: String,
    targets: u64,
}

impl ProbeInfo {
    /// Returns the attributes of `probe`. `targets` is the number of peers and targets that it selects.
    #[must_use]
    pub fn new(
        probe: &str,
        kind: &str,
        protocol: &str,
        dscp: &str,
        interval: Duration,
        targets: usize,
    ) -> Self {
        let probe = label("probe", probe);
        let attributes = [
            probe.clone(),
            label("kind", kind),
            label("protocol", protocol),
            label("dscp", dscp),
            label("interval_seconds", &interval.as_secs_f64().to_string()),
        ];
        Self { probe, attributes: attributes.join(","), targets: targets as u64 }
    }
}

impl Series for ProbeInfo {
    const FAMILIES: &'static [Family<Self>] = &[
        gauge("pathmeter_probe_info", "Attributes of configured probes.", |w, name, s| {
            w.count(name, Suffix::None, &s.attributes, CLOSE, 1);
        }),
        gauge("pathmeter_probe_targets", "Peers and targets that a probe selects.", |w, name, s| {
            w.count(name, Suffix::None, &s.probe, CLOSE, s.targets);
        }),
    ];
    const LINES: usize = 2;
}

/// Attributes of one peer or target.
#[derive(Debug)]
pub struct PeerInfo {
    labels: String,
}

impl PeerInfo {
    /// Returns the attributes of `peer`, given as label names and values.
    #[must_use]
    pub fn new<'a>(peer: &str, attributes: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        let mut labels = label("peer", peer);
        for (name, value) in attributes {
            labels.push(',');
            labels.push_str(&label(name, value));
        }
        Self { labels }
    }
}

impl Series for PeerInfo {
    const FAMILIES: &'static [Family<Self>] = &[gauge(
        "pathmeter_peer_info",
        "Attributes of peers and targets. Their own labels have the prefix label_.",
        |w, name, s| w.count(name, Suffix::None, &s.labels, CLOSE, 1),
    )];
    const LINES: usize = 1;
}
