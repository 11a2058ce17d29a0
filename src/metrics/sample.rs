//! Series of the sample probe kind, which exists in tests only.

use super::block::Series;
use super::text::{CLOSE, Cell, Family, Suffix, counter, label};

/// Counters of one path of the sample kind.
#[derive(Debug, Default)]
pub struct SampleSeries {
    labels: String,
    /// Datagrams sent.
    pub sent: Cell,
    /// Datagrams answered.
    pub answered: Cell,
    /// Datagrams withdrawn.
    pub withdrawn: Cell,
}

impl SampleSeries {
    /// Returns the series of one path, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("peer", peer), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }
}

impl Series for SampleSeries {
    const FAMILIES: &'static [Family<Self>] = &[
        counter("pathmeter_sample_answered_total", "Datagrams answered.", |w, name, s| {
            w.count(name, Suffix::None, &s.labels, CLOSE, s.answered.get());
        }),
        counter("pathmeter_sample_sent_total", "Datagrams sent.", |w, name, s| {
            w.count(name, Suffix::None, &s.labels, CLOSE, s.sent.get());
        }),
        counter("pathmeter_sample_withdrawn_total", "Datagrams without a verdict.", |w, name, s| {
            w.count(name, Suffix::None, &s.labels, CLOSE, s.withdrawn.get());
        }),
    ];
    const LINES: usize = 3;
}
