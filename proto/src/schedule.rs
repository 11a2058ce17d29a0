//! The send schedule: absolute slots with a random phase and jitter. Missed slots are skipped, not made up
//! for.

use std::time::Duration;

use crate::time::{Timestamp, nanos};

/// A schedule of slots at absolute times.
///
/// Slot `i` is due at `start + phase + i · interval + jitter(i)`. The phase is uniform in one interval; the
/// jitter is uniform in ±25 % of the interval. Periodic streams must start at a random time (RFC 3432 section
/// 4) and synchronise with periodic events in the network unless they are jittered (Baccelli, Machiraju,
/// Veitch, Bolot 2006). The jitter is relative to the slot, not to the previous send, so delays do not
/// accumulate.
#[derive(Debug, Clone)]
pub struct Schedule {
    origin: Timestamp,
    interval: u64,
    seed: u64,
    next: u64,
}

/// The result of [`Schedule::take`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Slots since the last call that were missed by more than half an interval.
    pub skipped: u64,
    /// Due time of the slot to send in; `None`: no slot is due yet.
    pub slot: Option<Timestamp>,
}

impl Schedule {
    /// A schedule whose first slot is less than 1.5 intervals after `start`. An `interval` below 1 µs counts
    /// as 1 µs; `seed` determines phase and jitter.
    #[must_use]
    pub fn new(start: Timestamp, interval: Duration, seed: u64) -> Self {
        let interval = nanos(interval).max(1_000);
        let phase = mix(seed) % interval;
        Self { origin: start + Duration::from_nanos(interval / 4 + phase), interval, seed, next: 0 }
    }

    /// Due time of the next slot.
    #[must_use]
    pub fn next(&self) -> Timestamp {
        self.due(self.next)
    }

    /// Takes the slots that are due at `now`: at most one to send in, and the number of slots that are too
    /// old.
    pub fn take(&mut self, now: Timestamp) -> Due {
        let first = self.next;
        let half = Duration::from_nanos(self.interval / 2);
        // The jitter is below half an interval, so only the last few candidates need to be checked one by
        // one.
        let whole = nanos(now.since(self.origin)) / self.interval;
        self.next = self.next.max(whole.saturating_sub(2));
        while self.due(self.next) + half < now {
            self.next += 1;
        }
        let skipped = self.next - first;
        let due = self.due(self.next);
        if due > now {
            return Due { skipped, slot: None };
        }
        self.next += 1;
        Due { skipped, slot: Some(due) }
    }

    fn due(&self, slot: u64) -> Timestamp {
        let half = self.interval / 2;
        let jitter = mix(self.seed ^ slot.wrapping_mul(0x9e37_79b9_7f4a_7c15)) % (half + 1);
        let base = self.origin + Duration::from_nanos(self.interval.saturating_mul(slot));
        base + Duration::from_nanos(jitter) - Duration::from_nanos(self.interval / 4)
    }
}

/// A hash of `seed` (the finaliser of SplitMix64; Steele, Lea, Flood 2014).
#[must_use]
pub const fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn at(nanos: u64) -> Timestamp {
        Timestamp::from_nanos(nanos)
    }

    #[test]
    fn every_slot_is_within_a_quarter_interval_of_its_nominal_time() {
        for seed in 0..100 {
            let mut schedule = Schedule::new(at(7), Duration::from_millis(20), seed);
            let mut last = at(0);
            for i in 0..1_000_u64 {
                let due = schedule.next();
                assert_eq!(schedule.take(due), Due { skipped: 0, slot: Some(due) }, "seed {seed} slot {i}");
                let nominal = schedule.origin.as_nanos() + i * 20 * MS;
                assert!(due.as_nanos().abs_diff(nominal) <= 5 * MS, "seed {seed} slot {i}");
                assert!(due > last, "slots come in order");
                last = due;
            }
        }
    }

    #[test]
    fn fired_plus_skipped_is_everything_that_was_due() {
        for seed in 0..1_000 {
            let mut schedule = Schedule::new(at(0), Duration::from_millis(10), seed);
            let (mut now, mut fired, mut skipped) = (0, 0, 0);
            for i in 0..200_u64 {
                now += mix(seed * 1_000 + i) % (25 * MS);
                loop {
                    let due = schedule.take(at(now));
                    skipped += due.skipped;
                    let Some(slot) = due.slot else { break };
                    assert!(
                        slot <= at(now) && at(now).since(slot) <= Duration::from_millis(5),
                        "seed {seed}"
                    );
                    fired += 1;
                }
            }
            assert_eq!(fired + skipped, schedule.next, "seed {seed}");
            let due = (0..).take_while(|i| schedule.due(*i) <= at(now)).count() as u64;
            assert!(schedule.next == due, "seed {seed}: {} slots taken, {due} due", schedule.next);
        }
    }

    #[test]
    fn eight_hours_of_slots_are_skipped_in_one_call() {
        let mut schedule = Schedule::new(at(0), Duration::from_millis(1), 3);
        let due = schedule.take(at(8 * 3_600_000 * MS));
        assert!(due.skipped >= 8 * 3_600_000 - 3);
    }

    #[test]
    fn phase_differs_between_seeds() {
        let phases: std::collections::BTreeSet<u64> = (0..100)
            .map(|seed| Schedule::new(at(0), Duration::from_secs(1), seed).next().as_nanos() / (100 * MS))
            .collect();
        assert!(phases.len() > 8, "{phases:?}");
    }

    #[test]
    fn slot_up_to_half_an_interval_late_is_sent_and_a_later_one_is_skipped() {
        for seed in 0..100 {
            let schedule = Schedule::new(at(0), Duration::from_millis(20), seed);
            let due = schedule.next();
            let half = due + Duration::from_millis(10);
            assert_eq!(schedule.clone().take(half), Due { skipped: 0, slot: Some(due) }, "seed {seed}");
            let mut late = schedule;
            let taken = late.take(half + Duration::from_nanos(1));
            assert_eq!(taken.skipped, 1, "seed {seed}");
            assert!(taken.slot.is_none_or(|slot| slot > due), "seed {seed}");
        }
    }

    #[test]
    fn jitter_covers_half_an_interval_for_every_seed() {
        for seed in [0, 1, 77, u64::MAX - 1, u64::MAX] {
            let mut schedule = Schedule::new(at(0), Duration::from_micros(1), seed);
            let start = schedule.origin.as_nanos();
            let offsets = (0..10_000_u64).map(|slot| {
                let due = schedule.next();
                schedule.take(due);
                i64::try_from(due.as_nanos()).unwrap() - i64::try_from(start + slot * 1_000).unwrap()
            });
            let mut jitter: Vec<i64> = offsets.collect();
            let mean = jitter.iter().sum::<i64>() / 10_000;
            jitter.sort_unstable();
            jitter.dedup();
            assert_eq!((jitter[0], jitter[jitter.len() - 1]), (-250, 250), "seed {seed}");
            assert!(jitter.len() > 490 && mean.abs() < 10, "seed {seed}: {} of 501, {mean} ns", jitter.len());
        }
    }

    #[test]
    fn phase_covers_one_interval_after_the_start() {
        let interval = Duration::from_micros(1);
        let origins = (0..20_000).map(|seed| Schedule::new(at(5), interval, seed).origin.as_nanos() - 5);
        let (least, most) =
            origins.fold((u64::MAX, 0), |(least, most), found| (least.min(found), most.max(found)));
        assert_eq!((least, most), (250, 1_249), "a quarter more, for the jitter");
        assert_eq!(Schedule::new(at(5), Duration::ZERO, 1).interval, 1_000);
    }

    #[test]
    fn mix_agrees_with_the_splitmix64_reference() {
        assert_eq!([0, 1_234_567].map(mix), [0xe220_a839_7b1d_cdaf, 6_457_827_717_110_365_317]);
    }
}
