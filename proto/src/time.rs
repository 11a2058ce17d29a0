//! One type per clock, so that times of different clocks cannot be mixed.
//!
//! [`Timestamp`] is a reading of this host's monotonic clock; schedules, deadlines and round trips use it.
//! [`WallTime`] is a reading of the wall clock, which the kernel uses for packet timestamps and which packets
//! carry; it can step. [`Timeline`] converts between the two. Timestamps of a peer
//! ([`crate::wire::PeerTimestamp`]) can only be subtracted from each other.

use std::time::Duration;

/// Nanoseconds on this host's monotonic clock, from an arbitrary origin. The clock never steps and does not
/// run during a suspend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(u64);

impl Timestamp {
    /// A deadline that is never reached.
    pub const NEVER: Self = Self(u64::MAX);

    /// A timestamp from nanoseconds since the clock's origin.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the clock's origin.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time since `earlier`; zero if `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Nanoseconds from `other` to `self`, negative if `other` is later; saturates at ±292 years.
    #[must_use]
    pub fn signed_since(self, other: Self) -> i64 {
        i64::try_from(i128::from(self.0) - i128::from(other.0)).unwrap_or(if self > other {
            i64::MAX
        } else {
            i64::MIN
        })
    }
}

impl std::ops::Add<Duration> for Timestamp {
    type Output = Self;

    /// Saturates at [`Timestamp::NEVER`].
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(nanos(span)))
    }
}

impl std::ops::Sub<Duration> for Timestamp {
    type Output = Self;

    /// Saturates at the clock's origin.
    fn sub(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(span)))
    }
}

/// A duration in whole nanoseconds; saturates at 584 years.
#[must_use]
pub fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds since 1970-01-01 UTC on this host's wall clock (CLOCK_REALTIME). The clock can step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WallTime(u64);

impl WallTime {
    /// A wall time from nanoseconds since 1970.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since 1970.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }
}

/// How far this host's wall clock is ahead of its monotonic clock. Constant until the wall clock is stepped,
/// because both clocks are slewed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallOffset(i64);

impl WallOffset {
    /// The offset from one reading of both clocks.
    #[must_use]
    pub fn between(at: Timestamp, wall: WallTime) -> Self {
        Self(i64::try_from(i128::from(wall.0) - i128::from(at.0)).expect("both clocks count from after 1678"))
    }

    /// The wall clock's reading at `at`.
    #[must_use]
    pub fn wall(self, at: Timestamp) -> WallTime {
        WallTime(at.0.saturating_add_signed(self.0))
    }

    /// The monotonic clock's reading when the wall clock read `wall`.
    #[must_use]
    pub fn monotonic(self, wall: WallTime) -> Timestamp {
        Timestamp(wall.0.saturating_add_signed(self.0.saturating_neg()))
    }
}

/// Converts the kernel's wall-clock timestamps to the monotonic clock, across steps of the wall clock.
///
/// For a short time after a step, a timestamp may belong to the offset before or after it. Each timestamp was
/// taken in a known window: after its datagram was passed to the kernel or the socket was last found empty,
/// and before the current time. The offset that places the timestamp in that window is used. The error is
/// zero unless the step is smaller than the window; then it is at most the step.
#[derive(Debug, Clone)]
pub struct Timeline {
    offset: WallOffset,
    before: Option<(WallOffset, Timestamp)>,
    steps: u64,
}

impl Timeline {
    /// Differences up to this are noise from reading two clocks one after the other, not a step. Chosen: 10
    /// µs, a hundred times the cost of reading a vDSO clock, a hundredth of the smallest step that a clock
    /// daemon makes.
    pub const GRAIN: Duration = Duration::from_micros(10);

    /// A timeline that starts with one reading of both clocks.
    #[must_use]
    pub fn new(at: Timestamp, wall: WallTime) -> Self {
        Self { offset: WallOffset::between(at, wall), before: None, steps: 0 }
    }

    /// Takes another reading of both clocks, made within `window` of each other. Returns by how many
    /// nanoseconds the wall clock stepped; `None` if it did not.
    pub fn observe(&mut self, at: Timestamp, wall: WallTime, window: Duration) -> Option<i64> {
        let found = WallOffset::between(at, wall);
        let moved = found.0.saturating_sub(self.offset.0);
        if moved.unsigned_abs() <= nanos(Self::GRAIN.max(window)) {
            return None;
        }
        self.before = Some((std::mem::replace(&mut self.offset, found), at));
        self.steps += 1;
        Some(moved)
    }

    /// How long after a step a timestamp from before it can still be read. Chosen: twice as long as a
    /// transmit timestamp is waited for.
    const MEMORY: Duration = Duration::from_millis(200);

    /// The monotonic time of a kernel timestamp that was taken between `from` and `to`.
    #[must_use]
    pub fn to_monotonic(&self, timestamp: WallTime, from: Timestamp, to: Timestamp) -> Timestamp {
        let placed = self.offset.monotonic(timestamp);
        if self.earlier(to).is_none() {
            return placed;
        }
        self.explain(timestamp, from, to).unwrap_or_else(|| placed.clamp(from, to.max(from)))
    }

    /// Whether a timestamp that was taken between `from` and `to` fits a known offset. If not, the wall clock
    /// may have stepped since the last reading.
    #[must_use]
    pub fn is_consistent_with(&self, timestamp: WallTime, from: Timestamp, to: Timestamp) -> bool {
        self.explain(timestamp, from, to).is_some()
    }

    /// The time between `from` and `to` at which the wall clock read `timestamp`.
    fn explain(&self, timestamp: WallTime, from: Timestamp, to: Timestamp) -> Option<Timestamp> {
        let fits = |at: &Timestamp| *at + Self::GRAIN >= from && *at <= to + Self::GRAIN;
        let placed = Some(self.offset.monotonic(timestamp)).filter(fits);
        placed.or_else(|| {
            let (before, stepped) = self.earlier(to)?;
            // A timestamp under the earlier offset was taken before the step was noticed.
            Some(before.monotonic(timestamp)).filter(|at| fits(at) && *at <= stepped)
        })
    }

    /// The offset before the last step and when the step was noticed, while timestamps from before it can
    /// still be read.
    fn earlier(&self, to: Timestamp) -> Option<(WallOffset, Timestamp)> {
        self.before.filter(|(_, stepped)| to.since(*stepped) <= Self::MEMORY)
    }

    /// The current offset.
    #[must_use]
    pub fn offset(&self) -> WallOffset {
        self.offset
    }

    /// Number of steps of the wall clock so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn at(nanos: u64) -> Timestamp {
        Timestamp::from_nanos(nanos)
    }

    fn wall(nanos: u64) -> WallTime {
        WallTime::from_nanos(1_700_000_000 * SECOND + nanos)
    }

    #[test]
    fn timestamp_is_converted_exactly_on_a_steady_clock() {
        let mut timeline = Timeline::new(at(5), wall(5));
        assert_eq!(timeline.observe(at(SECOND), wall(SECOND + 900), Duration::ZERO), None);
        assert_eq!(timeline.to_monotonic(wall(1_234_567), at(0), at(SECOND)), at(1_234_567));
    }

    #[test]
    fn timestamps_before_and_after_a_step_are_converted_exactly() {
        for step in [-(SECOND as i64), SECOND as i64, -20_000_000, 20_000_000] {
            let mut timeline = Timeline::new(at(0), wall(0));
            let after = |nanos: u64| WallTime::from_nanos(wall(nanos).as_nanos().saturating_add_signed(step));
            assert_eq!(timeline.observe(at(10_000_000), after(10_000_000), Duration::ZERO), Some(step));
            let (from, to) = (at(5_000_000), at(10_000_000));
            assert_eq!(
                timeline.to_monotonic(wall(6_000_000), from, to),
                at(6_000_000),
                "before the step of {step}"
            );
            assert_eq!(
                timeline.to_monotonic(after(8_000_000), from, to),
                at(8_000_000),
                "after the step of {step}"
            );
        }
    }

    #[test]
    fn error_of_a_step_inside_the_window_is_at_most_the_step() {
        let step = 2_000_000;
        let mut timeline = Timeline::new(at(0), wall(0));
        timeline.observe(at(10_000_000), wall(10_000_000 + step), Duration::ZERO);
        let placed = timeline.to_monotonic(wall(8_000_000), at(5_000_000), at(10_000_000));
        assert!(placed.signed_since(at(8_000_000)).unsigned_abs() <= step);
    }

    #[test]
    fn timestamp_that_fits_no_offset_is_clamped_to_the_window() {
        let mut timeline = Timeline::new(at(0), wall(0));
        timeline.observe(at(5), wall(SECOND), Duration::ZERO);
        assert_eq!(timeline.to_monotonic(wall(90 * SECOND), at(1), at(9)), at(9));
    }
}
