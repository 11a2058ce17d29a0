//! Which peers an agent measures when a full mesh is too large.
//!
//! Every agent computes its own choice from the same list of names, without communication; the choices
//! together distribute the measurements evenly. When agents join or leave, few choices change, so most paths
//! keep their history.

use std::collections::BTreeMap;

use crate::schedule::mix;

/// The `k` peers that `me` measures in a ring. All agents, including `me`, are ordered by a hash of their
/// names, and each measures the `k` agents after it. So exactly `k` agents measure each one: the `k` agents
/// before it, or all others if there are no more than `k`. An agent that joins or leaves changes at most one
/// choice of each of the `k` agents before it.
///
/// `names` may contain `me`. The result is sorted by name.
#[must_use]
pub fn ring<'a>(me: &str, names: impl IntoIterator<Item = &'a str>, k: usize) -> Vec<&'a str> {
    let mut others: Vec<(u64, &str)> =
        names.into_iter().filter(|name| *name != me).map(|name| (hash(&[name]), name)).collect();
    others.sort_unstable();
    others.dedup();
    let after_me = others.partition_point(|other| *other < (hash(&[me]), me));
    others.rotate_left(after_me);
    let mut chosen: Vec<&str> = others.into_iter().take(k).map(|(_, name)| name).collect();
    chosen.sort_unstable();
    chosen
}

/// How many peers an agent chooses inside and outside its zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Zones {
    /// Peers of its own zone, chosen by [`ring`].
    pub within: usize,
    /// Peers of each other zone.
    pub across: usize,
}

/// The peers that `me` in `zone` measures: [`within`](Zones::within) peers of its own zone by [`ring`], so
/// that exactly that many neighbours measure each agent, and [`across`](Zones::across) peers of each other
/// zone, so that every agent measures every other zone.
///
/// In other zones, each agent ranks the peers by a hash of both names (rendezvous hashing: Thaler and
/// Ravishankar 1998). An agent that joins or leaves changes only the choices of agents that choose it. The
/// number of agents of another zone that measure a given agent is even only on average: `across` times the
/// size of their zone divided by the size of its own.
///
/// `peers` are pairs of name and zone and may contain `me`; peers with an empty zone form a zone of their
/// own. The result is sorted by name.
#[must_use]
pub fn zones<'a>(
    me: &str,
    zone: &str,
    peers: impl IntoIterator<Item = (&'a str, &'a str)>,
    choice: Zones,
) -> Vec<&'a str> {
    let mut by_zone: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, zone) in peers {
        by_zone.entry(zone).or_default().push(name);
    }
    let mut chosen = ring(me, by_zone.remove(zone).unwrap_or_default(), choice.within);
    for others in by_zone.into_values() {
        let mut ranked: Vec<_> =
            others.into_iter().filter(|name| *name != me).map(|name| (hash(&[me, name]), name)).collect();
        ranked.sort_unstable();
        ranked.dedup();
        chosen.extend(ranked.iter().rev().take(choice.across).map(|(_, name)| *name));
    }
    chosen.sort_unstable();
    chosen
}

/// FNV-1a over the words with a zero byte after each, then mixed, because FNV alone maps similar names to
/// similar values.
///
/// All agents of a fleet must compute the same value in every version, so this function must never change.
fn hash(words: &[&str]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
    mix(bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(size: usize) -> Vec<String> {
        (0..size).map(|number| format!("node-{number}")).collect()
    }

    fn names(fleet: &[String]) -> impl Iterator<Item = &str> + Clone {
        fleet.iter().map(String::as_str)
    }

    /// How many agents choose each agent.
    fn chosen_by<'a>(choices: impl Iterator<Item = Vec<&'a str>>) -> BTreeMap<&'a str, usize> {
        let mut counts = BTreeMap::new();
        for name in choices.flatten() {
            *counts.entry(name).or_default() += 1;
        }
        counts
    }

    #[test]
    fn ring_agent_measures_k_and_is_measured_by_k() {
        for (size, k) in [(1, 3), (2, 1), (2, 5), (10, 3), (100, 10), (257, 1), (1000, 10)] {
            let fleet = fleet(size);
            let expected = k.min(size - 1);
            let choices = names(&fleet).map(|me| ring(me, names(&fleet), k));
            assert!(choices.clone().all(|choice| choice.len() == expected), "{size}, {k}");
            let counts = chosen_by(choices);
            assert_eq!(counts.len(), if expected == 0 { 0 } else { size });
            assert!(counts.values().all(|count| *count == expected), "{size}, {k}: {counts:?}");
        }
    }

    #[test]
    fn agent_never_measures_itself_or_a_peer_twice() {
        let fleet = fleet(20);
        for me in names(&fleet) {
            let choice = ring(me, names(&fleet).chain(names(&fleet)), 19);
            assert!(!choice.contains(&me));
            assert_eq!(choice.len(), 19);
            assert!(choice.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn choice_is_the_same_without_own_name_in_the_list() {
        let fleet = fleet(50);
        for me in names(&fleet) {
            let others = names(&fleet).filter(|name| *name != me);
            assert_eq!(ring(me, others, 5), ring(me, names(&fleet), 5));
        }
    }

    #[test]
    fn new_ring_agent_changes_one_choice_of_each_of_the_k_before_it() {
        let (k, all) = (7, fleet(200));
        for newcomer in [0, 17, 99, 199] {
            let without: Vec<String> = all
                .iter()
                .enumerate()
                .filter(|(at, _)| *at != newcomer)
                .map(|(_, name)| name.clone())
                .collect();
            let mut changed = 0;
            for me in names(&without) {
                let (before, after) = (ring(me, names(&without), k), ring(me, names(&all), k));
                let new: Vec<_> = after.iter().filter(|name| !before.contains(name)).collect();
                assert!(new.is_empty() || new == [&all[newcomer].as_str()]);
                changed += usize::from(!new.is_empty());
            }
            assert_eq!(changed, k);
        }
    }

    /// Names with their zones: 60 in a, 30 in b, 10 in c.
    fn zoned(fleet: &[String]) -> impl Iterator<Item = (&str, &str)> + Clone {
        names(fleet)
            .enumerate()
            .map(|(at, name)| (name, ["a", "a", "b", "a", "b", "a", "c", "a", "a", "b"][at % 10]))
    }

    #[test]
    fn own_zone_is_a_ring_and_every_agent_measures_each_other_zone() {
        let fleet = fleet(100);
        let choice = Zones { within: 4, across: 2 };
        let choices: Vec<(&str, Vec<&str>)> =
            zoned(&fleet).map(|(me, zone)| (zone, zones(me, zone, zoned(&fleet), choice))).collect();
        let zone_of: BTreeMap<&str, &str> = zoned(&fleet).collect();
        for (zone, chosen) in &choices {
            assert_eq!(chosen.len(), 4 + 2 * 2);
            for other in ["a", "b", "c"] {
                let count = chosen.iter().filter(|name| zone_of[*name] == other).count();
                assert_eq!(count, if other == *zone { 4 } else { 2 });
            }
        }
        let within = choices
            .iter()
            .map(|(zone, chosen)| chosen.iter().copied().filter(|name| zone_of[name] == *zone).collect());
        let counts = chosen_by(within);
        assert!(counts.len() == 100 && counts.values().all(|count| *count == 4), "{counts:?}");
        let measured = chosen_by(choices.iter().map(|(_, chosen)| chosen.clone()));
        assert!(measured.len() == 100, "every agent is measured");
    }

    #[test]
    fn new_agent_changes_only_the_choices_of_agents_that_choose_it() {
        let all = fleet(100);
        let (newcomer, choice) = ("node-42", Zones { within: 3, across: 1 });
        let without = || zoned(&all).filter(|(name, _)| *name != newcomer);
        for (me, zone) in without() {
            let before = zones(me, zone, without(), choice);
            let after = zones(me, zone, zoned(&all), choice);
            let new: Vec<_> = after.iter().filter(|name| !before.contains(name)).collect();
            assert!(new.is_empty() || new == [&newcomer], "{me}: {new:?}");
        }
    }

    #[test]
    fn peers_without_a_zone_form_their_own_zone() {
        let peers = [("a-1", "a"), ("a-2", "a"), ("x-1", ""), ("x-2", "")];
        let choice = Zones { within: 1, across: 1 };
        let chosen = zones("x-1", "", peers, choice);
        assert_eq!(chosen.len(), 2);
        assert!(chosen.contains(&"x-2"));
    }

    #[test]
    fn choices_never_change_between_versions() {
        let fleet = fleet(12);
        assert_eq!(ring("node-0", names(&fleet), 3), PINNED_RING);
        let chosen = zones("node-0", "a", zoned(&fleet), Zones { within: 1, across: 1 });
        assert_eq!(chosen, PINNED_ZONES);
    }

    const PINNED_RING: [&str; 3] = ["node-10", "node-2", "node-6"];
    const PINNED_ZONES: [&str; 3] = ["node-10", "node-6", "node-9"];
}
