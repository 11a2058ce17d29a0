//! The clocks that measurements go by. (What is shown to people, and signatures, take the standard library's.)

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use pathmeter_proto::time::{Timeline, Timestamp, WallOffset, WallTime};

/// The clocks of this host as one thread sees them: a monotonic one for schedules and deadlines, and where the wall
/// clock, with which the kernel stamps datagrams, stands on it.
#[derive(Debug)]
pub struct Clock {
    timeline: Timeline,
    asleep: Duration,
}

/// Something happened to the clocks since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upset {
    /// The wall clock was stepped, by this many nanoseconds.
    Step(i64),
    /// The host was suspended for this long.
    Suspend(Duration),
}

/// A suspend below this is the noise of reading two clocks. Chosen: 10 ms; real ones last seconds.
const SUSPEND_MIN: Duration = Duration::from_millis(10);

impl Clock {
    /// Looks at the clocks for the first time.
    #[must_use]
    pub fn new() -> Self {
        let reading = Reading::take();
        Self {
            timeline: Timeline::new(reading.at, reading.wall),
            asleep: std::iter::repeat_with(asleep).find_map(|asleep| asleep).unwrap_or_default(),
        }
    }

    /// The monotonic clock.
    #[must_use]
    pub fn now() -> Timestamp {
        Timestamp::from_nanos(nanos(ClockId::CLOCK_MONOTONIC))
    }

    /// Looks at the clocks again. Called before stamps are read, so that those from both sides of a step can be placed.
    pub fn look(&mut self) -> (Timestamp, Option<Upset>) {
        let reading = Reading::take();
        let asleep = asleep().unwrap_or(self.asleep);
        let suspended = asleep.saturating_sub(self.asleep);
        self.asleep = asleep;
        let stepped = self.timeline.observe(reading.at, reading.wall, reading.window);
        let upset =
            if suspended >= SUSPEND_MIN { Some(Upset::Suspend(suspended)) } else { stepped.map(Upset::Step) };
        (reading.at, upset)
    }

    /// When a kernel stamp was made; see [`Timeline::place`].
    #[must_use]
    pub fn place(&self, stamp: WallTime, from: Timestamp, to: Timestamp) -> Timestamp {
        self.timeline.place(stamp, from, to)
    }

    /// How far the wall clock is ahead of the monotonic one.
    #[must_use]
    pub fn offset(&self) -> WallOffset {
        self.timeline.offset()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

/// Both clocks, read within `window` of each other.
struct Reading {
    at: Timestamp,
    wall: WallTime,
    window: Duration,
}

impl Reading {
    /// A second try nearly always does when the first was interrupted.
    const TRIES: usize = 3;
    /// Good enough to stop trying: what two vDSO calls take on a slow machine.
    const CLOSE: Duration = Duration::from_micros(2);

    fn take() -> Self {
        let mut best = Self::once();
        for _ in 1..Self::TRIES {
            if best.window <= Self::CLOSE {
                break;
            }
            let again = Self::once();
            if again.window < best.window {
                best = again;
            }
        }
        best
    }

    fn once() -> Self {
        let before = Clock::now();
        let wall = WallTime::from_nanos(nanos(ClockId::CLOCK_REALTIME));
        let after = Clock::now();
        let window = after.since(before);
        Self { at: before + window / 2, wall, window }
    }
}

/// How long the host has been suspended since it started; `None` when we were interrupted between the readings, which would
/// look like a suspend.
fn asleep() -> Option<Duration> {
    let before = Clock::now();
    let boot = nanos(ClockId::CLOCK_BOOTTIME);
    let is_close = Clock::now().since(before) < SUSPEND_MIN / 10;
    is_close.then(|| Duration::from_nanos(boot.saturating_sub(before.as_nanos())))
}

fn nanos(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).expect("Linux has had this clock since 2.6.39");
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_places_a_reading_of_the_wall_clock_between_two_of_the_monotonic_one() {
        let mut clock = Clock::new();
        clock.look();
        let before = Clock::now();
        let wall = WallTime::from_nanos(nanos(ClockId::CLOCK_REALTIME));
        let after = Clock::now();
        let placed = clock.place(wall, before, after);
        let slack = Timeline::GRAIN * 2;
        assert!(
            placed + slack >= before && placed <= after + slack,
            "{placed:?} between {before:?} and {after:?}"
        );
    }
}
