//! The series of paths whose MTU is looked for.

use pathmeter_proto::mtu::Report;

use super::text::{CLOSE, Cell, Family, Suffix, counter, gauge, label};

/// Lines that one such path adds to a scrape; counted by a test.
pub const SERIES_PER_PATH_MTU: usize = 5;

/// What was found on one path. Written by the loop that owns the path, read by scrapes.
#[derive(Debug, Default)]
pub struct PathMtuSeries {
    labels: String,
    /// 0: not known.
    bytes: Cell,
    changes: Cell,
    probes: [Cell; OUTCOMES.len()],
}

const OUTCOMES: [(Report, &str); 3] = [
    (Report::Acknowledged, r#",outcome="acknowledged"} "#),
    (Report::Lost, r#",outcome="lost"} "#),
    (Report::TooBig, r#",outcome="too_big"} "#),
];

impl PathMtuSeries {
    /// The series of one path, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("peer", peer), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }

    /// The longest IP packet that gets there in one piece; `None` until it is known.
    #[must_use]
    pub fn bytes(&self) -> Option<u16> {
        u16::try_from(self.bytes.get()).ok().filter(|bytes| *bytes > 0)
    }

    /// Another search goes on with this, which looks no further than `ceiling`.
    pub fn begin_again(&self, ceiling: u16) {
        self.bytes.set(self.bytes.get().min(ceiling.into()));
    }

    /// Takes note of a report.
    pub fn record(&self, report: &Report) {
        match report {
            Report::Changed { from, to } => {
                self.bytes.set(u64::from(*to));
                self.changes.add(u64::from(from.is_some()));
            }
            Report::Sent => {}
            Report::Acknowledged | Report::Lost | Report::TooBig => {
                let outcome = OUTCOMES.iter().zip(&self.probes).find(|((known, _), _)| known == report);
                outcome.expect("the table lists every outcome").1.inc();
            }
        }
    }
}

/// In alphabetical order.
pub(super) const PATH_MTU_FAMILIES: [Family<PathMtuSeries>; 3] = [
    gauge(
        "pathmeter_path_mtu_bytes",
        "Longest IP packet that gets to the peer in one piece, or the ceiling of the search. Absent until it is known.",
        |w, name, s| {
            if let Some(bytes) = s.bytes() {
                w.count(name, Suffix::None, &s.labels, CLOSE, bytes.into());
            }
        },
    ),
    counter("pathmeter_path_mtu_changes_total", "Changes of a path MTU that was known.", |w, name, s| {
        w.count(name, Suffix::None, &s.labels, CLOSE, s.changes.get());
    }),
    counter(
        "pathmeter_path_mtu_probes_total",
        "Packets that were sent to find a path MTU, or that our own host refused as too long.",
        |w, name, s| {
            for (cell, (_, more)) in s.probes.iter().zip(&OUTCOMES) {
                w.count(name, Suffix::None, &s.labels, more, cell.get());
            }
        },
    ),
];
