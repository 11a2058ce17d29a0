//! The paths of a probe towards all peers of a group, as one.

use std::sync::Arc;

use super::distribution::{RTT_BOUNDS, write_buckets};
use super::echo::{DIRECTIONS, EchoSeries};
use super::text::{CLOSE, Family, Suffix, Writer, counter, gauge, histogram, label};

/// Buckets of the round-trip histogram, the last one what lies above all bounds.
const BUCKETS: usize = RTT_BOUNDS.len() + 1;

/// Lines that one group adds to a scrape; counted by a test.
pub const SERIES_PER_GROUP: usize = 27;

/// What was counted of some paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    pub(super) requests: u64,
    pub(super) late: u64,
    pub(super) lost: [u64; 3],
    pub(super) host_dropped: u64,
    pub(super) withdrawn: u64,
    pub(super) rtt: [u64; BUCKETS],
    pub(super) rtt_sum: u64,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            requests: 0,
            late: 0,
            lost: [0; 3],
            host_dropped: 0,
            withdrawn: 0,
            rtt: [0; BUCKETS],
            rtt_sum: 0,
        }
    }
}

impl Totals {
    /// Adds what was counted between `since` and `until`.
    fn add(&mut self, until: &Self, since: &Self) {
        // Both are read while the path counts on, field by field.
        let more = |until: u64, since: u64| until.saturating_sub(since);
        self.requests += more(until.requests, since.requests);
        self.late += more(until.late, since.late);
        self.host_dropped += more(until.host_dropped, since.host_dropped);
        self.withdrawn += more(until.withdrawn, since.withdrawn);
        self.rtt_sum += more(until.rtt_sum, since.rtt_sum);
        for (own, (until, since)) in self.lost.iter_mut().zip(until.lost.iter().zip(since.lost)) {
            *own += more(*until, since);
        }
        for (own, (until, since)) in self.rtt.iter_mut().zip(until.rtt.iter().zip(since.rtt)) {
            *own += more(*until, since);
        }
    }

    /// Datagrams that the network is judged by, how many of them it lost, how many were answered, and their round trips in
    /// nanoseconds.
    #[must_use]
    pub fn judged(&self) -> [u64; 4] {
        let lost = self.lost.iter().sum();
        [
            self.requests.saturating_sub(self.host_dropped + self.withdrawn),
            lost,
            self.rtt.iter().sum(),
            self.rtt_sum,
        ]
    }
}

/// A path in a group: what it counted before it came is not the group's.
#[derive(Debug)]
pub struct Member {
    series: Arc<EchoSeries>,
    since: Totals,
}

impl Member {
    /// A path that comes at this moment.
    #[must_use]
    pub fn new(series: &Arc<EchoSeries>) -> Self {
        Self { series: Arc::clone(series), since: series.totals() }
    }
}

/// What a group has measured. A counter never falls: what paths counted that left stays.
#[derive(Debug, Clone, Default)]
pub struct GroupSeries {
    labels: String,
    members: Vec<Arc<Member>>,
    left: Totals,
}

impl GroupSeries {
    /// A group without paths, all zero.
    #[must_use]
    pub fn new(probe: &str, group: &str, family: &str) -> Self {
        let labels = [label("probe", probe), label("group", group), label("family", family)].join(",");
        Self { labels, ..Self::default() }
    }

    /// A path comes.
    pub fn enter(&mut self, member: Arc<Member>) {
        self.members.push(member);
    }

    /// A path goes.
    pub fn leave(&mut self, member: &Arc<Member>) {
        self.members.retain(|known| !Arc::ptr_eq(known, member));
        self.left.add(&member.series.totals(), &member.since);
    }

    /// Whether no path is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// What all have counted together.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = self.left;
        for member in &self.members {
            totals.add(&member.series.totals(), &member.since);
        }
        totals
    }
}

fn one(writer: &mut Writer<'_>, name: &str, group: &GroupSeries, value: u64) {
    writer.count(name, Suffix::None, &group.labels, CLOSE, value);
}

/// In alphabetical order.
pub(super) const GROUP_FAMILIES: [Family<GroupSeries>; 7] = [
    counter(
        "pathmeter_echo_group_host_dropped_total",
        "As pathmeter_echo_host_dropped_total, of all paths of a group.",
        |w, name, g| one(w, name, g, g.totals().host_dropped),
    ),
    counter(
        "pathmeter_echo_group_late_total",
        "As pathmeter_echo_late_total, of all paths of a group.",
        |w, name, g| one(w, name, g, g.totals().late),
    ),
    counter(
        "pathmeter_echo_group_lost_total",
        "As pathmeter_echo_lost_total, of all paths of a group.",
        |w, name, g| {
            for (lost, (_, more)) in g.totals().lost.into_iter().zip(&DIRECTIONS) {
                w.count(name, Suffix::None, &g.labels, more, lost);
            }
        },
    ),
    gauge("pathmeter_echo_group_paths", "Paths of a group.", |w, name, g| {
        one(w, name, g, g.members.len() as u64)
    }),
    counter(
        "pathmeter_echo_group_requests_total",
        "As pathmeter_echo_requests_total, of all paths of a group.",
        |w, name, g| one(w, name, g, g.totals().requests),
    ),
    histogram(
        "pathmeter_echo_group_rtt_seconds",
        "As pathmeter_echo_rtt_seconds, of all paths of a group.",
        |w, name, g| {
            let totals = g.totals();
            write_buckets(w, name, &g.labels, &RTT_BOUNDS, totals.rtt, |w| {
                w.seconds(name, Suffix::Sum, &g.labels, CLOSE, totals.rtt_sum);
            });
        },
    ),
    counter(
        "pathmeter_echo_group_withdrawn_total",
        "As pathmeter_echo_withdrawn_total, of all paths of a group.",
        |w, name, g| one(w, name, g, g.totals().withdrawn),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use pathmeter_proto::echo::{Direction, Report, Verdict};

    fn series(lost: u32) -> Arc<EchoSeries> {
        let series = Arc::new(EchoSeries::new("p", "peer", "ipv4", 1));
        lose(&series, lost);
        series
    }

    fn lose(series: &EchoSeries, times: u32) {
        for sequence in 0..times {
            let verdict = Verdict::Lost(Direction::Forward);
            let (flow, sequence) = (0, sequence.into());
            series.record(&Report::Decided { flow, sequence, verdict, sample: None });
        }
    }

    #[test]
    fn what_a_path_counted_elsewhere_is_not_the_groups_and_what_it_counted_here_stays() {
        let (old, new) = (series(7), series(100));
        let mut group = GroupSeries::new("p", "zone", "ipv4");
        let [first, second] = [&old, &new].map(|series| Arc::new(Member::new(series)));
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
        assert_eq!(group.totals().judged()[..2], [9, 9]);
    }

    #[test]
    fn a_group_takes_as_many_lines_as_are_planned_for_it() {
        let mut group = GroupSeries::new("p", "zone", "ipv4");
        group.enter(Arc::new(Member::new(&series(1))));
        let mut page = Vec::new();
        for family in &GROUP_FAMILIES {
            family.write(&mut page, std::iter::once(&group));
        }
        assert_eq!(page.iter().filter(|byte| **byte == b'\n').count(), SERIES_PER_GROUP);
        let text = String::from_utf8(page).unwrap();
        assert!(
            text.contains("pathmeter_echo_group_paths{probe=\"p\",group=\"zone\",family=\"ipv4\"} 1\n"),
            "{text}"
        );
    }
}
