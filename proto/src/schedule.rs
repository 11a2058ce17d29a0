//! The send schedule: absolute slots with a random phase and jitter; what is missed is skipped, never caught up.

use std::time::Duration;

use crate::time::{Timestamp, nanos};

/// Slots on an absolute grid.
///
/// Slot `i` is due at `start + phase + i · interval + jitter(i)` with a phase uniform in one interval and a jitter
/// uniform in ±25 % of it. Periodic streams must start at random (RFC 3432 section 4) and phase-lock with what they
/// measure unless they are jittered (Baccelli, Machiraju, Veitch, Bolot 2006). The jitter belongs to the slot, not to
/// the previous send, so lateness never accumulates.
#[derive(Debug, Clone)]
pub struct Schedule {
    origin: Timestamp,
    interval: u64,
    seed: u64,
    next: u64,
}

/// What the grid asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Slots that were missed by more than half an interval since the last call.
    pub skipped: u64,
    /// The slot to fire; its due time. `None`: nothing is due yet.
    pub slot: Option<Timestamp>,
}

impl Schedule {
    /// A grid that begins within one interval after `start`. `interval` is at least 1 µs; `seed` decides phase and jitter.
    #[must_use]
    pub fn new(start: Timestamp, interval: Duration, seed: u64) -> Self {
        let interval = nanos(interval).max(1_000);
        let phase = mix(seed) % interval;
        Self { origin: start + Duration::from_nanos(interval / 4 + phase), interval, seed, next: 0 }
    }

    /// When the next slot is due.
    #[must_use]
    pub fn next(&self) -> Timestamp {
        self.due(self.next)
    }

    /// Takes what is due at `now`: at most one slot to fire, and how many are past firing.
    pub fn take(&mut self, now: Timestamp) -> Due {
        let first = self.next;
        let half = Duration::from_nanos(self.interval / 2);
        // The jitter is below half an interval, so only the last few candidates need a look each.
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

/// One well-mixed number from another (SplitMix64's finaliser; Steele, Lea, Flood 2014).
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
    fn every_slot_is_within_a_quarter_interval_of_its_place() {
        for seed in 0..100 {
            let mut schedule = Schedule::new(at(7), Duration::from_millis(20), seed);
            let mut last = at(0);
            for i in 0..1_000_u64 {
                let due = schedule.next();
                assert_eq!(schedule.take(due), Due { skipped: 0, slot: Some(due) }, "seed {seed} slot {i}");
                let place = schedule.origin.as_nanos() + i * 20 * MS;
                assert!(due.as_nanos().abs_diff(place) <= 5 * MS, "seed {seed} slot {i}");
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
    fn a_night_asleep_is_skipped_at_once() {
        let mut schedule = Schedule::new(at(0), Duration::from_millis(1), 3);
        let due = schedule.take(at(8 * 3_600_000 * MS));
        assert!(due.skipped >= 8 * 3_600_000 - 3);
    }

    #[test]
    fn the_phase_differs_between_seeds() {
        let phases: std::collections::BTreeSet<u64> = (0..100)
            .map(|seed| Schedule::new(at(0), Duration::from_secs(1), seed).next().as_nanos() / (100 * MS))
            .collect();
        assert!(phases.len() > 8, "{phases:?}");
    }

    #[test]
    fn slot_that_is_late_by_half_an_interval_is_fired_and_one_that_is_later_is_skipped() {
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
    fn jitter_is_spread_over_the_whole_of_half_an_interval_whatever_the_seed() {
        for seed in [0, 1, 77, u64::MAX - 1, u64::MAX] {
            let mut schedule = Schedule::new(at(0), Duration::from_micros(1), seed);
            let start = schedule.origin.as_nanos();
            let places = (0..10_000_u64).map(|slot| {
                let due = schedule.next();
                schedule.take(due);
                i64::try_from(due.as_nanos()).unwrap() - i64::try_from(start + slot * 1_000).unwrap()
            });
            let mut jitter: Vec<i64> = places.collect();
            let mean = jitter.iter().sum::<i64>() / 10_000;
            jitter.sort_unstable();
            jitter.dedup();
            assert_eq!((jitter[0], jitter[jitter.len() - 1]), (-250, 250), "seed {seed}");
            assert!(jitter.len() > 490 && mean.abs() < 10, "seed {seed}: {} of 501, {mean} ns", jitter.len());
        }
    }

    #[test]
    fn phase_is_spread_over_one_interval_after_the_start() {
        let interval = Duration::from_micros(1);
        let origins = (0..20_000).map(|seed| Schedule::new(at(5), interval, seed).origin.as_nanos() - 5);
        let (least, most) =
            origins.fold((u64::MAX, 0), |(least, most), found| (least.min(found), most.max(found)));
        assert_eq!((least, most), (250, 1_249), "a quarter more, for the jitter");
        assert_eq!(Schedule::new(at(5), Duration::ZERO, 1).interval, 1_000);
    }

    #[test]
    fn numbers_are_mixed_as_the_reference_mixes_them() {
        assert_eq!([0, 1_234_567].map(mix), [0xe220_a839_7b1d_cdaf, 6_457_827_717_110_365_317]);
    }
}
