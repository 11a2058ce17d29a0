//! Rounds in which every hop of a known route is probed once per interval.

use std::collections::VecDeque;
use std::time::Duration;

use crate::schedule::mix;
use crate::time::{Timestamp, nanos};
use crate::trace::burst::BurstProbe;

/// The rounds of one flow. The probes of a round are spread evenly over the interval.
#[derive(Debug)]
pub(super) struct Rounds {
    interval: Duration,
    seed: u64,
    /// The hops of the current round that were not probed yet, in the order of their probes.
    waiting: VecDeque<u8>,
    /// Number of hops of the current round.
    hops: u64,
    began: Timestamp,
    /// When the next round begins.
    next: Timestamp,
    /// The probes of the current round that left the host.
    probes: Vec<BurstProbe>,
    /// Number of rounds so far.
    count: u64,
}

/// Maximum delay of a probe in a round, in nanoseconds. At most a quarter of the time between two probes.
const JITTER_MAX: u64 = 1_000_000_000;

impl Rounds {
    /// The first round begins at `at`.
    pub(super) fn new(interval: Duration, seed: u64, at: Timestamp) -> Self {
        let (waiting, probes) = (VecDeque::new(), Vec::new());
        Self { interval, seed, waiting, hops: 0, began: at, next: at, probes, count: 0 }
    }

    /// Ends the current round, because a trace has probed all hops. The next round begins at `now`.
    pub(super) fn restart(&mut self, now: Timestamp) {
        self.clear();
        self.next = now;
    }

    /// Ends the current round.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.probes.clear();
    }

    /// Whether all probes of the round were sent and have become a trace.
    pub(super) fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.probes.is_empty()
    }

    /// Whether all probes of the round were sent.
    pub(super) fn is_sent(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Begins a round that probes the hops 1 to `routers`, and the destination with the TTL `destination`.
    pub(super) fn begin(&mut self, routers: u8, destination: u8, now: Timestamp) {
        self.count += 1;
        let is_late = now.since(self.next) > self.interval;
        self.began = if is_late { now } else { self.next };
        self.next = self.began + self.interval;
        let mut ttls: Vec<u8> = (1..=routers).collect();
        // The same order in every round, so that no hop waits longer than an interval.
        ttls.sort_by_key(|ttl| mix(self.seed ^ u64::from(*ttl)));
        ttls.push(destination);
        self.hops = u64::from(routers) + 1;
        self.waiting.extend(ttls);
    }

    /// The TTL of the next probe, or when it is due; [`Timestamp::NEVER`] if all were sent.
    pub(super) fn next(&mut self, now: Timestamp) -> Result<u8, Timestamp> {
        let Some(ttl) = self.waiting.front().copied() else { return Err(Timestamp::NEVER) };
        let index = self.hops - u64::try_from(self.waiting.len()).unwrap_or(self.hops).min(self.hops);
        let slot = nanos(self.interval) / self.hops;
        let jitter = mix(self.seed ^ mix(self.count) ^ index) % (slot / 4).clamp(1, JITTER_MAX);
        let due = self.began + Duration::from_nanos(slot * index + jitter);
        if due > now {
            return Err(due);
        }
        self.waiting.pop_front();
        Ok(ttl)
    }

    /// A probe is on its way to the kernel.
    pub(super) fn queued(&mut self, probe: BurstProbe) {
        self.probes.push(probe);
    }

    /// A probe did not leave the host.
    pub(super) fn not_sent(&mut self, sequence: u64) {
        self.probes.retain(|probe| probe.sequence != sequence);
    }

    /// The probes of the round.
    pub(super) fn probes_mut(&mut self) -> &mut [BurstProbe] {
        &mut self.probes
    }

    /// When the probes of the round have waited long enough for answers.
    pub(super) fn ends(&self, answer_timeout: Duration) -> Timestamp {
        let last = self.probes.iter().map(|probe| probe.sent_at).max();
        last.map_or(Timestamp::NEVER, |last| last + answer_timeout)
    }

    /// Takes the probes of a complete round, and when it began; `None` while it is not complete. All answers
    /// that arrived before `drained` are known.
    pub(super) fn take_complete(
        &mut self,
        answer_timeout: Duration,
        drained: Timestamp,
    ) -> Option<(Vec<BurstProbe>, Timestamp)> {
        if !self.waiting.is_empty() || self.probes.is_empty() || self.ends(answer_timeout) > drained {
            return None;
        }
        let probes = std::mem::take(&mut self.probes);
        // Probes that confirm a change may come before the round.
        let first = probes.iter().map(|probe| probe.sent_at).min();
        Some((probes, first.map_or(self.began, |first| self.began.min(first))))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::trace::DESTINATION;

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
    }

    const WAIT: Duration = Duration::from_millis(40);

    /// Sends the probes of a round that is due at `from`: their TTLs and times.
    fn send(rounds: &mut Rounds, from: Timestamp, count: usize) -> Vec<(u8, Timestamp)> {
        let (mut time, mut sent) = (from, Vec::new());
        while sent.len() < count {
            match rounds.next(time) {
                Ok(ttl) => {
                    rounds.queued(BurstProbe::new(u64::from(ttl), ttl, time));
                    sent.push((ttl, time));
                }
                Err(due) => time = due,
            }
        }
        sent
    }

    #[test]
    fn probes_are_spread_evenly_over_the_interval_with_delays_that_differ() {
        for (interval, routers, slot, delay_max) in [(1_000, 9, 100, 25), (80_000, 3, 20_000, 1_000)] {
            for seed in [0, 1, u64::MAX] {
                let mut rounds = Rounds::new(Duration::from_millis(interval), seed, at(0));
                let (mut delays, mut count) = (BTreeSet::new(), 0);
                for round in 0..20 {
                    let began = at(round * interval);
                    rounds.begin(routers, DESTINATION, began);
                    for (index, (_, time)) in (0..).zip(send(&mut rounds, began, usize::from(routers) + 1)) {
                        let delay = time.since(began + Duration::from_millis(slot * index));
                        assert!(time.since(began) >= Duration::from_millis(slot * index));
                        assert!(delay < Duration::from_millis(delay_max), "{index}: {delay:?}");
                        delays.insert(delay);
                        count += 1;
                    }
                    assert_eq!(rounds.next(began), Err(Timestamp::NEVER));
                    rounds.take_complete(WAIT, Timestamp::NEVER).expect("all were sent");
                }
                assert_eq!(delays.len(), count, "seed {seed}");
            }
        }
    }

    #[test]
    fn round_that_is_late_begins_at_its_time_unless_that_is_more_than_an_interval_ago() {
        for (late, began) in [(0, 0), (9_999, 0), (10_000, 0), (10_001, 10_001), (25_000, 25_000)] {
            let mut rounds = Rounds::new(Duration::from_millis(10_000), 1, at(0));
            rounds.begin(1, DESTINATION, at(late));
            let sent = send(&mut rounds, at(began), 2);
            let second = sent[1].1.since(at(began));
            assert!(
                second >= Duration::from_millis(5_000) && second < Duration::from_millis(6_000),
                "{late}"
            );
        }
    }

    #[test]
    fn trace_of_all_hops_ends_a_round_and_the_next_one_begins_after_it() {
        let mut rounds = Rounds::new(Duration::from_millis(10_000), 1, at(0));
        rounds.begin(4, DESTINATION, at(0));
        send(&mut rounds, at(0), 2);
        assert!(!rounds.is_sent() && !rounds.is_over());
        rounds.restart(at(5_000));
        assert!(rounds.is_sent() && rounds.is_over());
        rounds.begin(4, DESTINATION, at(5_000));
        let sent = send(&mut rounds, at(5_000), 5);
        assert!(sent[4].1.since(at(5_000)) >= Duration::from_millis(8_000), "{sent:?}");
        let (probes, _) = rounds.take_complete(WAIT, sent[4].1 + WAIT).expect("all were sent");
        assert_eq!(probes.len(), 5);
    }

    #[test]
    fn probe_that_did_not_leave_the_host_is_not_of_the_round() {
        let mut rounds = Rounds::new(Duration::from_millis(10_000), 1, at(0));
        rounds.begin(2, DESTINATION, at(0));
        let last = send(&mut rounds, at(0), 3)[2].1;
        rounds.not_sent(2);
        assert_eq!(rounds.ends(WAIT), last + WAIT);
        assert!(rounds.take_complete(WAIT, last).is_none(), "its probes wait for answers");
        let (probes, began) = rounds.take_complete(WAIT, last + WAIT).unwrap();
        let ttls: BTreeSet<u8> = probes.iter().map(|probe| probe.ttl).collect();
        assert_eq!((ttls, began), (BTreeSet::from([1, DESTINATION]), at(0)));
        assert!(rounds.is_over());
    }
}
