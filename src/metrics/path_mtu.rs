//! Series of paths with path MTU discovery.

use pathmeter_proto::mtu::MtuReport;

use super::block::Series;
use super::labels::{Labelled, labels};
use super::text::{CLOSE, Cell, Family, Suffix, counter, gauge, label};

/// Path MTU of one path. Written by the loop that owns the path, read by scrapes.
#[derive(Debug, Default)]
pub struct PathMtuSeries {
    labels: String,
    /// 0 if not known.
    bytes: Cell,
    changes: Cell,
    probes: Labelled<MtuProbeOutcome, 3>,
}

/// Outcome of an MTU probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MtuProbeOutcome {
    Acknowledged,
    Lost,
    TooBig,
}

labels!(MtuProbeOutcome, "outcome", { Acknowledged => "acknowledged", Lost => "lost", TooBig => "too_big" });

impl PathMtuSeries {
    /// Returns the series of one path, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("peer", peer), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }

    /// Returns the path MTU in bytes, IP header included; `None` until it is known.
    #[must_use]
    pub fn bytes(&self) -> Option<u16> {
        u16::try_from(self.bytes.get()).ok().filter(|bytes| *bytes > 0)
    }

    /// Prepares the series for another search with the upper limit `ceiling`: counters continue.
    pub fn continue_with(&self, ceiling: u16) {
        self.bytes.set(self.bytes.get().min(ceiling.into()));
    }

    /// Counts what a report says.
    pub fn record(&self, report: &MtuReport) {
        match report {
            MtuReport::Changed { from, to } => {
                self.bytes.set(u64::from(*to));
                self.changes.add(u64::from(from.is_some()));
            }
            MtuReport::Sent => {}
            MtuReport::Acknowledged => self.probes.of(MtuProbeOutcome::Acknowledged).inc(),
            MtuReport::Lost => self.probes.of(MtuProbeOutcome::Lost).inc(),
            MtuReport::TooBig => self.probes.of(MtuProbeOutcome::TooBig).inc(),
        }
    }
}

impl Series for PathMtuSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 5;
}

/// In alphabetical order.
const FAMILIES: [Family<PathMtuSeries>; 3] = [
    gauge(
        "pathmeter_path_mtu_bytes",
        "Longest IP packet that reaches the peer unfragmented, up to the ceiling. Absent until known.",
        |w, name, s| {
            if let Some(bytes) = s.bytes() {
                w.count(name, Suffix::None, &s.labels, CLOSE, bytes.into());
            }
        },
    ),
    counter("pathmeter_path_mtu_changes_total", "Changes of a known path MTU.", |w, name, s| {
        w.count(name, Suffix::None, &s.labels, CLOSE, s.changes.get());
    }),
    counter(
        "pathmeter_path_mtu_probes_total",
        "Path MTU probes by outcome, including those that this host refused to send as too long.",
        |w, name, s| s.probes.write(w, name, &s.labels),
    ),
];
