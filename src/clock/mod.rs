//! The clocks that measurements use. (Displayed times and signatures use the clocks of the standard library.)

#[cfg(feature = "clock-faults")]
pub mod fault_injection;

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use pathmeter_proto::time::{Timeline, Timestamp, WallOffset, WallTime};

/// The clocks of this host as seen by one thread: the monotonic clock, for schedules and deadlines, and its
/// offset from the wall clock, which the kernel uses for the timestamps of datagrams.
#[derive(Debug)]
pub struct Clock<S = HostClockSource> {
    source: S,
    timeline: Timeline,
    suspended_total: Duration,
    /// An event that was noticed while a timestamp was converted, and is not yet reported.
    unreported: Option<ClockEvent>,
}

/// A discontinuity of the clocks since the last reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockEvent {
    /// The wall clock was stepped by this many nanoseconds.
    Step(i64),
    /// The host was suspended for this long.
    Suspend(Duration),
}

impl ClockEvent {
    /// Merges two events between two readings into one.
    fn merge(self, later: Self) -> Self {
        match (self, later) {
            (Self::Step(by), Self::Step(further)) => Self::Step(by.saturating_add(further)),
            (Self::Suspend(span), Self::Suspend(more)) => Self::Suspend(span + more),
            (Self::Suspend(span), Self::Step(_)) | (Self::Step(_), Self::Suspend(span)) => {
                Self::Suspend(span)
            }
        }
    }
}

/// Shorter suspends are noise of reading two clocks. Chosen: 10 ms; real suspends last seconds.
const SUSPEND_MIN: Duration = Duration::from_millis(10);

impl Clock {
    /// Creates a clock from the first reading of the host's clocks.
    #[must_use]
    pub fn new() -> Self {
        Self::with_source(HostClockSource::default())
    }

    /// The current monotonic time.
    #[must_use]
    pub fn now() -> Timestamp {
        HostClockSource::default().monotonic()
    }
}

impl<S: ClockSource> Clock<S> {
    /// Creates a clock from the first reading of `source`.
    #[must_use]
    pub fn with_source(source: S) -> Self {
        let reading = Reading::take(&source);
        let suspended_total = std::iter::repeat_with(|| suspended_total(&source))
            .find_map(|suspended_total| suspended_total)
            .unwrap_or_default();
        Self { source, timeline: Timeline::new(reading.at, reading.wall), suspended_total, unreported: None }
    }

    /// Reads the clocks. Returns the monotonic time and the event since the last reading, if any. Call this
    /// before reading timestamps, so that timestamps from both sides of a step can be converted.
    pub fn read(&mut self) -> (Timestamp, Option<ClockEvent>) {
        let at = self.update();
        (at, self.unreported.take())
    }

    fn update(&mut self) -> Timestamp {
        let reading = Reading::take(&self.source);
        let suspended_total = suspended_total(&self.source).unwrap_or(self.suspended_total);
        let suspended = suspended_total.saturating_sub(self.suspended_total);
        self.suspended_total = suspended_total;
        let stepped = self.timeline.observe(reading.at, reading.wall, reading.window);
        let event = if suspended >= SUSPEND_MIN {
            Some(ClockEvent::Suspend(suspended))
        } else {
            stepped.map(ClockEvent::Step)
        };
        if let Some(event) = event {
            self.unreported = Some(self.unreported.map_or(event, |earlier| earlier.merge(event)));
        }
        reading.at
    }

    /// Converts a kernel timestamp, which was made between `from` and `to`, to the monotonic clock; see
    /// [`Timeline::to_monotonic`].
    #[must_use]
    pub fn monotonic_of(&mut self, timestamp: WallTime, from: Timestamp, to: Timestamp) -> Timestamp {
        let timestamp = self.source.timestamped(timestamp);
        if !self.timeline.is_consistent_with(timestamp, from, to) {
            // The timestamp may be later than a step that came after the last reading.
            self.update();
        }
        self.timeline.to_monotonic(timestamp, from, to)
    }

    /// The offset of the wall clock from the monotonic clock.
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

/// A source of clock readings.
pub trait ClockSource {
    /// Reads CLOCK_MONOTONIC.
    fn monotonic(&self) -> Timestamp;

    /// Reads CLOCK_REALTIME.
    fn wall(&self) -> WallTime;

    /// Reads CLOCK_BOOTTIME: the monotonic clock plus the time for which the host was suspended.
    fn boot(&self) -> Timestamp;

    /// The reading of this source's wall clock when the kernel made a timestamp.
    fn timestamped(&self, timestamp: WallTime) -> WallTime;
}

/// The clock source of this process.
#[cfg(not(feature = "clock-faults"))]
pub type HostClockSource = KernelClock;
/// The clock source of this process.
#[cfg(feature = "clock-faults")]
pub type HostClockSource = fault_injection::FaultyClock<'static, KernelClock>;

/// The clocks of the kernel.
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelClock;

impl ClockSource for KernelClock {
    fn monotonic(&self) -> Timestamp {
        Timestamp::from_nanos(nanos(ClockId::CLOCK_MONOTONIC))
    }

    fn wall(&self) -> WallTime {
        WallTime::from_nanos(nanos(ClockId::CLOCK_REALTIME))
    }

    fn boot(&self) -> Timestamp {
        Timestamp::from_nanos(nanos(ClockId::CLOCK_BOOTTIME))
    }

    fn timestamped(&self, timestamp: WallTime) -> WallTime {
        timestamp
    }
}

/// A reading of both clocks, taken within `window`.
struct Reading {
    at: Timestamp,
    wall: WallTime,
    window: Duration,
}

impl Reading {
    /// Chosen: if the first reading was interrupted, the second is nearly always good.
    const TRIES: usize = 3;
    /// A window that is good enough: the duration of two vDSO calls on a slow machine.
    const CLOSE: Duration = Duration::from_micros(2);

    fn take(source: &impl ClockSource) -> Self {
        let mut best = Self::once(source);
        for _ in 1..Self::TRIES {
            if best.window <= Self::CLOSE {
                break;
            }
            let again = Self::once(source);
            if again.window < best.window {
                best = again;
            }
        }
        best
    }

    fn once(source: &impl ClockSource) -> Self {
        let before = source.monotonic();
        let wall = source.wall();
        let after = source.monotonic();
        let window = after.since(before);
        Self { at: before + window / 2, wall, window }
    }
}

/// How long the host has been suspended since it booted. `None` if this thread was interrupted between the
/// readings, which would look like a suspend.
fn suspended_total(source: &impl ClockSource) -> Option<Duration> {
    let before = source.monotonic();
    let boot = source.boot();
    let is_close = source.monotonic().since(before) < SUSPEND_MIN / 10;
    is_close.then(|| boot.since(before))
}

fn nanos(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).expect("Linux has had this clock since 2.6.39");
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Clocks that advance only when the test advances them.
    #[derive(Debug, Default)]
    pub(super) struct FakeClock {
        pub(super) now: Cell<u64>,
        pub(super) stepped: Cell<i64>,
        pub(super) suspended_total: Cell<u64>,
    }

    impl FakeClock {
        /// Advances the clocks, and returns the new reading of the wall clock.
        pub(super) fn advance(&self, span: Duration) -> WallTime {
            self.now.set(self.now.get() + pathmeter_proto::time::nanos(span));
            self.wall()
        }
    }

    impl ClockSource for FakeClock {
        fn monotonic(&self) -> Timestamp {
            Timestamp::from_nanos(self.now.get())
        }

        fn wall(&self) -> WallTime {
            let wall = 1_700_000_000 * SECOND + self.now.get() + self.suspended_total.get();
            WallTime::from_nanos(wall.saturating_add_signed(self.stepped.get()))
        }

        fn boot(&self) -> Timestamp {
            Timestamp::from_nanos(self.now.get() + self.suspended_total.get())
        }

        fn timestamped(&self, timestamp: WallTime) -> WallTime {
            timestamp
        }
    }

    impl<S: ClockSource> ClockSource for &S {
        fn monotonic(&self) -> Timestamp {
            (**self).monotonic()
        }

        fn wall(&self) -> WallTime {
            (**self).wall()
        }

        fn boot(&self) -> Timestamp {
            (**self).boot()
        }

        fn timestamped(&self, timestamp: WallTime) -> WallTime {
            (**self).timestamped(timestamp)
        }
    }

    #[test]
    fn wall_reading_maps_between_two_monotonic_readings() {
        let mut clock = Clock::new();
        clock.read();
        let before = Clock::now();
        let wall = HostClockSource::default().wall();
        let after = Clock::now();
        let placed = clock.monotonic_of(wall, before, after);
        let slack = Timeline::GRAIN * 2;
        assert!(
            placed + slack >= before && placed <= after + slack,
            "{placed:?} between {before:?} and {after:?}"
        );
    }

    #[test]
    fn step_and_suspend_are_each_reported_once() {
        let host = FakeClock::default();
        let mut clock = Clock::with_source(&host);
        host.advance(Duration::from_millis(5));
        assert_eq!(clock.read().1, None);
        host.stepped.set(-1_000_000_000);
        assert_eq!(clock.read().1, Some(ClockEvent::Step(-1_000_000_000)));
        assert_eq!(clock.read().1, None);
        host.suspended_total.set(4 * SECOND);
        assert_eq!(clock.read().1, Some(ClockEvent::Suspend(Duration::from_secs(4))));
        assert_eq!(clock.read().1, None);
    }
    #[test]
    fn timestamp_after_an_unobserved_step_is_converted_and_the_step_reported_once() {
        for step in [-1_000_000_000, 1_000_000_000] {
            let host = FakeClock::default();
            host.advance(Duration::from_secs(10));
            let mut clock = Clock::with_source(&host);
            let (drained, _) = clock.read();
            let before = (host.advance(Duration::from_millis(1)), host.monotonic());
            host.stepped.set(step);
            let after = (host.advance(Duration::from_millis(1)), host.monotonic());
            host.advance(Duration::from_millis(1));
            for (timestamp, truth) in [before, after, before] {
                assert_eq!(clock.monotonic_of(timestamp, drained, host.monotonic()), truth, "{step}");
            }
            assert_eq!(clock.read().1, Some(ClockEvent::Step(step)));
            assert_eq!(clock.read().1, None);
        }
    }

    #[test]
    fn events_between_two_readings_are_merged() {
        let host = FakeClock::default();
        let mut clock = Clock::with_source(&host);
        let at = host.monotonic();
        for step in [1_000_000_000, 3_000_000_000] {
            host.stepped.set(step);
            let _ = clock.monotonic_of(host.wall(), at, at);
        }
        assert_eq!(clock.read().1, Some(ClockEvent::Step(3_000_000_000)));
        host.suspended_total.set(4 * SECOND);
        let _ = clock.monotonic_of(host.wall(), at, at);
        host.stepped.set(0);
        assert_eq!(clock.read().1, Some(ClockEvent::Suspend(Duration::from_secs(4))));
    }
}
