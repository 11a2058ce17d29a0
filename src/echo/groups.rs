//! Groups of echo paths that are exported as aggregates. The worst paths are also exported individually.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::path::EchoPath;
use crate::metrics;
use crate::metrics::echo::EchoSeries;
use crate::metrics::group::{GroupMember, GroupSeries};
use crate::paths::PathKey;
use crate::probe::{Groups, Path};

/// The groups of all echo paths.
#[derive(Debug, Default)]
pub(super) struct EchoGroups {
    groups: BTreeMap<GroupKey, GroupSeries>,
    paths: BTreeMap<PathKey, GroupedPath>,
}

/// The key of a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct GroupKey {
    probe: Arc<str>,
    group: String,
    family: &'static str,
}

/// A path, its group, and its recent loss and RTT.
#[derive(Debug)]
struct GroupedPath {
    group: GroupKey,
    member: Arc<GroupMember>,
    series: Arc<EchoSeries>,
    /// The last value of [`Totals::network_verdicts`](crate::metrics::echo::Totals::network_verdicts).
    network_verdicts: [u64; 4],
    /// Smoothed loss ratio, and smoothed mean RTT in nanoseconds.
    loss: f64,
    rtt: f64,
}

/// Weight of the latest values of a path. Chosen: with one update every 30 s, values from five minutes ago
/// weigh a tenth.
const SMOOTHING_WEIGHT: f64 = 0.2;

impl EchoGroups {
    fn add(&mut self, key: PathKey, group: GroupKey, series: &Arc<EchoSeries>) {
        let member = Arc::new(GroupMember::new(series));
        let new = || GroupSeries::new(&group.probe, &group.group, group.family);
        self.groups.entry(group.clone()).or_insert_with(new).enter(Arc::clone(&member));
        let network_verdicts = series.totals().network_verdicts();
        let series = Arc::clone(series);
        self.paths.insert(key, GroupedPath { group, member, series, network_verdicts, loss: 0.0, rtt: 0.0 });
    }
}

impl Groups for EchoGroups {
    /// A removed path leaves its group; the group keeps its counts.
    fn arrange(&mut self, group_of: &dyn Fn(&str) -> String, paths: &[(&PathKey, &dyn Path)]) {
        let mut wanted: BTreeMap<&PathKey, (GroupKey, &Arc<EchoSeries>)> = paths
            .iter()
            .filter_map(|(key, path)| Some((*key, &path.as_any().downcast_ref::<EchoPath>()?.series)))
            .map(|(key, series)| {
                let group = group_of(&key.peer);
                (key, (GroupKey { probe: Arc::clone(&key.probe), group, family: key.family }, series))
            })
            .collect();
        self.paths.retain(|key, path| {
            let is_unchanged = wanted
                .get(key)
                .is_some_and(|(group, series)| *group == path.group && Arc::ptr_eq(series, &path.series));
            if is_unchanged {
                wanted.remove(key);
            } else if let Some(group) = self.groups.get_mut(&path.group) {
                group.leave(&path.member);
            }
            is_unchanged
        });
        for (key, (group, series)) in wanted {
            self.add(key.clone(), group, series);
        }
        self.groups.retain(|_, group| !group.is_empty());
    }

    fn refresh(&mut self) {
        for path in self.paths.values_mut() {
            let network_verdicts = path.series.totals().network_verdicts();
            let [decided, lost, answered, rtt] =
                std::array::from_fn(|at| network_verdicts[at].saturating_sub(path.network_verdicts[at]));
            path.network_verdicts = network_verdicts;
            #[expect(clippy::cast_precision_loss, reason = "used only for ranking")]
            let smooth = |old: f64, sum: u64, count: u64| match count {
                0 => old,
                count => old + SMOOTHING_WEIGHT * (sum as f64 / count as f64 - old),
            };
            path.loss = smooth(path.loss, lost, decided);
            path.rtt = smooth(path.rtt, rtt, answered);
        }
    }

    /// Ranks paths by loss, then by RTT.
    fn worst(&self, count: usize) -> (BTreeSet<PathKey>, BTreeSet<PathKey>) {
        let mut ranked: Vec<(&PathKey, &GroupedPath)> = self.paths.iter().collect();
        ranked.sort_by(|(_, a), (_, b)| b.loss.total_cmp(&a.loss).then(b.rtt.total_cmp(&a.rtt)));
        let worst = ranked.into_iter().take(count).map(|(key, _)| key.clone()).collect();
        (self.paths.keys().cloned().collect(), worst)
    }

    fn series(&self) -> Vec<Arc<dyn metrics::AnySeries>> {
        self.groups.values().cloned().map(|group| Arc::new(group) as _).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pathmeter_proto::echo::{Direction, EchoReport, Verdict};

    /// Records `lost` lost and `withdrawn` withdrawn datagrams.
    fn record_verdicts(series: &EchoSeries, lost: u32, withdrawn: u32) {
        let lost = (0..lost).map(|_| Verdict::Lost(Direction::Unknown));
        for verdict in lost.chain((0..withdrawn).map(|_| Verdict::Withdrawn)) {
            series.record(&EchoReport::Decided { flow: 0, sequence: 0, verdict, sample: None });
        }
    }

    #[test]
    fn worst_paths_have_the_highest_recent_loss_and_withdrawals_do_not_count() {
        let mut groups = EchoGroups::default();
        let paths = ["calm", "leaving", "lossy"].map(|peer| {
            let series = Arc::new(EchoSeries::new("p", peer, "ipv4", 1));
            let key = PathKey { probe: "p".into(), peer: peer.into(), family: "ipv4" };
            groups.add(key, GroupKey { probe: "p".into(), group: "g".into(), family: "ipv4" }, &series);
            series
        });
        let worst = |groups: &EchoGroups, count| -> Vec<String> {
            groups.worst(count).1.into_iter().map(|key| key.peer.to_string()).collect()
        };
        record_verdicts(&paths[1], 0, 100);
        record_verdicts(&paths[2], 10, 0);
        groups.refresh();
        assert_eq!(worst(&groups, 1), ["lossy"]);
        assert_eq!(worst(&groups, 5).len(), 3);
        assert_eq!(worst(&groups, 0), [""; 0]);
        // A path with worse loss takes first place after some updates.
        for _ in 0..10 {
            record_verdicts(&paths[0], 10, 0);
            record_verdicts(&paths[2], 0, 1);
            groups.refresh();
        }
        assert_eq!(worst(&groups, 1), ["calm"]);
    }
}
