//! Series of groups: the paths of a probe to all peers of a group, summed.

use std::sync::Arc;

use pathmeter_proto::echo::Direction;

use super::block::Series;
use super::distribution::{RTT_BOUNDS, write_buckets};
use super::echo::{EchoSeries, Totals};
use super::labels::Labels as _;
use super::text::{CLOSE, Family, Suffix, Writer, counter, gauge, histogram, label};

/// A path in a group. What it counted before it joined does not count for the group.
#[derive(Debug)]
pub struct GroupMember {
    series: Arc<EchoSeries>,
    since: Totals,
}

impl GroupMember {
    /// Returns a member that joins now.
    #[must_use]
    pub fn new(series: &Arc<EchoSeries>) -> Self {
        Self { series: Arc::clone(series), since: series.totals() }
    }
}

/// Measurements of a group. Counters never decrease: the counts of paths that former are kept.
#[derive(Debug, Clone, Default)]
pub struct GroupSeries {
    labels: String,
    members: Vec<Arc<GroupMember>>,
    former: Totals,
}

impl GroupSeries {
    /// Returns a group without paths, all zero.
    #[must_use]
    pub fn new(probe: &str, group: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("group", group), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }

    /// Adds a path.
    pub fn enter(&mut self, member: Arc<GroupMember>) {
        self.members.push(member);
    }

    /// Removes a path and keeps its counts.
    pub fn leave(&mut self, member: &Arc<GroupMember>) {
        self.members.retain(|known| !Arc::ptr_eq(known, member));
        self.former.add(&member.series.totals(), &member.since);
    }

    /// Returns whether the group has no paths.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Returns the counters summed over present and former paths.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = self.former;
        for member in &self.members {
            totals.add(&member.series.totals(), &member.since);
        }
        totals
    }
}

fn one(writer: &mut Writer<'_>, name: &str, group: &GroupSeries, value: u64) {
    writer.count(name, Suffix::None, &group.labels, CLOSE, value);
}

impl Series for GroupSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 27;
}

/// In alphabetical order.
const FAMILIES: [Family<GroupSeries>; 7] = [
    counter(
        "pathmeter_echo_group_host_dropped_total",
        "Sum of pathmeter_echo_host_dropped_total over the paths of a group.",
        |w, name, g| one(w, name, g, g.totals().host_dropped),
    ),
    counter(
        "pathmeter_echo_group_late_total",
        "Sum of pathmeter_echo_late_total over the paths of a group.",
        |w, name, g| one(w, name, g, g.totals().late),
    ),
    counter(
        "pathmeter_echo_group_lost_total",
        "Sum of pathmeter_echo_lost_total over the paths of a group.",
        |w, name, g| {
            for (lost, way) in g.totals().lost.into_iter().zip(Direction::ALL) {
                w.count(name, Suffix::None, &g.labels, way.rest(), lost);
            }
        },
    ),
    gauge("pathmeter_echo_group_paths", "Number of paths in a group.", |w, name, g| {
        one(w, name, g, g.members.len() as u64)
    }),
    counter(
        "pathmeter_echo_group_verdicts_total",
        "Sum of pathmeter_echo_verdicts_total over the paths of a group.",
        |w, name, g| one(w, name, g, g.totals().requests),
    ),
    histogram(
        "pathmeter_echo_group_rtt_seconds",
        "Sum of pathmeter_echo_rtt_seconds over the paths of a group.",
        |w, name, g| {
            let totals = g.totals();
            write_buckets(w, name, &g.labels, &RTT_BOUNDS, totals.rtt, |w| {
                w.seconds(name, Suffix::Sum, &g.labels, CLOSE, totals.rtt_sum);
            });
        },
    ),
    counter(
        "pathmeter_echo_group_withdrawn_total",
        "Sum of pathmeter_echo_withdrawn_total over the paths of a group.",
        |w, name, g| one(w, name, g, g.totals().withdrawn),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use pathmeter_proto::echo::{EchoReport, Verdict};

    fn series(lost: u32) -> Arc<EchoSeries> {
        let series = Arc::new(EchoSeries::new("p", "peer", "ipv4", 1));
        lose(&series, lost);
        series
    }

    fn lose(series: &EchoSeries, times: u32) {
        for sequence in 0..times {
            let verdict = Verdict::Lost(Direction::Forward);
            let (flow, sequence) = (0, sequence.into());
            series.record(&EchoReport::Decided { flow, sequence, verdict, sample: None });
        }
    }

    #[test]
    fn group_counts_a_path_only_while_it_is_a_member() {
        let (old, new) = (series(7), series(100));
        let mut group = GroupSeries::new("p", "zone", "ipv4");
        let [first, second] = [&old, &new].map(|series| Arc::new(GroupMember::new(series)));
        group.enter(Arc::clone(&first));
        group.enter(Arc::clone(&second));
        assert_eq!(group.totals(), Totals::default());
        lose(&old, 3);
        lose(&new, 5);
        assert_eq!((group.totals().requests, group.totals().lost), (8, [8, 0, 0]));
        group.leave(&first);
        lose(&old, 1_000);
        lose(&new, 1);
        assert_eq!((group.totals().requests, group.totals().lost), (9, [9, 0, 0]));
        group.leave(&second);
        assert!(group.is_empty());
        assert_eq!(group.totals().network_verdicts()[..2], [9, 9]);
    }

    #[test]
    fn group_has_exactly_as_many_lines_as_declared() {
        let mut group = GroupSeries::new("p", "zone", "ipv4");
        group.enter(Arc::new(GroupMember::new(&series(1))));
        let mut page = Vec::new();
        for family in GroupSeries::FAMILIES {
            family.write(&mut page, std::iter::once(&group));
        }
        assert_eq!(page.iter().filter(|byte| **byte == b'\n').count(), GroupSeries::LINES);
        let text = String::from_utf8(page).unwrap();
        assert!(
            text.contains("pathmeter_echo_group_paths{probe=\"p\",group=\"zone\",family=\"ipv4\"} 1\n"),
            "{text}"
        );
    }
}
