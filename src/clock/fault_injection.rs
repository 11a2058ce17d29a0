//! Clock fault injection: tests disturb the clocks of one process by a schedule, while the clocks of the
//! machine stay correct.
//!
//! The environment variable `PATHMETER_CLOCK_FAULTS` holds the schedule. Its times count from the first clock
//! reading of the process:
//!
//! ```text
//! 3s step +1s, 5s slew +500ppm, 9s slew 0ppm, 12s suspend 4s, 15s step -1s
//! ```
//!
//! The faults act as on Linux: a step moves only the wall clock, a slew changes the rate of all clocks alike,
//! and a suspend moves the wall clock and CLOCK_BOOTTIME ahead. A suspend does not freeze the process.

use std::env;
use std::sync::OnceLock;
use std::time::Duration;

use pathmeter_proto::time::{Timestamp, WallOffset, WallTime, nanos};

use super::{ClockSource, Reading};
use crate::config::units;

/// A clock source with injected faults.
#[derive(Debug, Clone, Copy)]
pub struct FaultyClock<'a, C> {
    truth: C,
    fault_schedule: &'a FaultSchedule,
}

/// A schedule and its start; shared by all threads of a process.
#[derive(Debug, Default)]
pub struct FaultSchedule {
    /// In chronological order.
    events: Vec<Fault>,
    /// The first clock reading.
    start: OnceLock<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fault {
    /// Time since the start, on the true monotonic clock.
    at: Duration,
    kind: FaultKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FaultKind {
    /// The wall clock steps by this many nanoseconds.
    Step(i64),
    /// From this time on the clocks run fast by this many parts per million.
    Slew(i64),
    /// The host is suspended for this long.
    Suspend(Duration),
}

/// Offsets of the clocks from the true clocks, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct ClockOffset {
    /// Offset of all clocks, from slews.
    slewed: i64,
    /// Offset of the wall clock, from steps.
    stepped: i64,
    /// Offset of the wall clock and of CLOCK_BOOTTIME, from suspends.
    suspended: i64,
}

/// The environment variable that holds the schedule.
pub const VARIABLE: &str = "PATHMETER_CLOCK_FAULTS";

static PROCESS_SCHEDULE: OnceLock<FaultSchedule> = OnceLock::new();

/// Reads the schedule from the environment. Returns whether there is one; without a schedule there are no
/// faults.
///
/// # Errors
/// [`FaultScheduleError`] names the event that cannot be parsed, and the cause.
///
/// # Panics
/// If a clock has already been read.
pub fn begin() -> Result<bool, FaultScheduleError> {
    let schedule = env::var_os(VARIABLE);
    if let Some(schedule) = &schedule {
        let fault_schedule = FaultSchedule::read(&schedule.to_string_lossy())?;
        PROCESS_SCHEDULE.set(fault_schedule).expect("the schedule is set before the first clock reading");
    }
    Ok(schedule.is_some())
}

/// A schedule that cannot be parsed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{VARIABLE}: event {number}, `{event}`: {cause}")]
pub struct FaultScheduleError {
    /// Number of the event, from 1.
    pub number: usize,
    /// The event as written.
    pub event: String,
    /// The cause.
    pub cause: FaultScheduleErrorCause,
}

/// Why an event of a schedule cannot be parsed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultScheduleErrorCause {
    /// The event does not have three words.
    #[error("has {0} words (expected a time, an event and an amount, for example 3s step +1s)")]
    Words(usize),
    /// The kind of event is unknown.
    #[error("unknown event `{0}` (use step, slew or suspend)")]
    Kind(String),
    /// A duration cannot be parsed.
    #[error("{0}")]
    Duration(#[from] units::UnitError),
    /// A duration is longer than one day.
    #[error("`{0}` is too long (at most 1d)")]
    TooLong(String),
    /// The duration of a step has no sign.
    #[error("`{0}` has no sign (expected + or - and a duration, for example -1s)")]
    Unsigned(String),
    /// A rate cannot be parsed or is out of range.
    #[error("`{0}` is not a rate (allowed: -100000ppm to +100000ppm)")]
    Rate(String),
    /// The event is earlier than the one before it.
    #[error("is earlier than the previous event (list events in chronological order)")]
    Order,
}

/// Chosen: no test lasts this long, and the sum of many such durations fits into 64 bits.
const DURATION_MAX: Duration = Duration::from_secs(86_400);

/// The range of the kernel's tick, ±10 %: chronyd uses nearly all of it; the frequency alone reaches only 500
/// ppm.
const RATE_MAX: i64 = 100_000;

impl FaultSchedule {
    fn read(schedule: &str) -> Result<Self, FaultScheduleError> {
        let mut events: Vec<Fault> = Vec::new();
        for (number, text) in (1..).zip(schedule.split(',')) {
            let failed = |cause| FaultScheduleError { number, event: text.trim().to_owned(), cause };
            let event = Fault::read(text).map_err(failed)?;
            if events.last().is_some_and(|previous| event.at < previous.at) {
                return Err(failed(FaultScheduleErrorCause::Order));
            }
            events.push(event);
        }
        Ok(Self { events, start: OnceLock::new() })
    }

    /// The offsets of the clocks at this time after the start.
    fn offset(&self, elapsed: Duration) -> ClockOffset {
        let (mut offset, mut rate, mut since) = (ClockOffset::default(), 0, Duration::ZERO);
        for event in self.events.iter().take_while(|event| event.at <= elapsed) {
            match event.kind {
                FaultKind::Step(by) => offset.stepped += by,
                FaultKind::Slew(ppm) => {
                    offset.slewed += drift(event.at - since, rate);
                    (rate, since) = (ppm, event.at);
                }
                FaultKind::Suspend(span) => offset.suspended += signed(span),
            }
        }
        offset.slewed += drift(elapsed - since, rate);
        offset
    }
}

/// Nanoseconds that a clock gains in `span` if it is `rate` parts per million fast.
fn drift(span: Duration, rate: i64) -> i64 {
    let drift = i128::from(nanos(span)) * i128::from(rate) / 1_000_000;
    i64::try_from(drift).unwrap_or(i64::MAX)
}

fn signed(span: Duration) -> i64 {
    i64::try_from(nanos(span)).unwrap_or(i64::MAX)
}

impl Fault {
    fn read(text: &str) -> Result<Self, FaultScheduleErrorCause> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let &[at, kind, amount] = &words[..] else { return Err(FaultScheduleErrorCause::Words(words.len())) };
        let at = duration(at)?;
        let kind = match kind {
            "step" => {
                let sign = match amount.chars().next() {
                    Some('+') => 1,
                    Some('-') => -1,
                    Some(_) | None => return Err(FaultScheduleErrorCause::Unsigned(amount.to_owned())),
                };
                FaultKind::Step(sign * signed(duration(&amount[1..])?))
            }
            "slew" => {
                let rate = amount.strip_suffix("ppm").and_then(|rate| rate.parse().ok());
                let rate = rate.filter(|rate| (-RATE_MAX..=RATE_MAX).contains(rate));
                FaultKind::Slew(rate.ok_or_else(|| FaultScheduleErrorCause::Rate(amount.to_owned()))?)
            }
            "suspend" => FaultKind::Suspend(duration(amount)?),
            _ => return Err(FaultScheduleErrorCause::Kind(kind.to_owned())),
        };
        Ok(Self { at, kind })
    }
}

fn duration(text: &str) -> Result<Duration, FaultScheduleErrorCause> {
    let duration = units::duration(text)?;
    if duration <= DURATION_MAX {
        Ok(duration)
    } else {
        Err(FaultScheduleErrorCause::TooLong(text.to_owned()))
    }
}

impl<C: Default> Default for FaultyClock<'static, C> {
    /// Uses the schedule of this process.
    fn default() -> Self {
        Self { truth: C::default(), fault_schedule: PROCESS_SCHEDULE.get_or_init(FaultSchedule::default) }
    }
}

impl<C: ClockSource> FaultyClock<'_, C> {
    /// The true monotonic time, and the offsets at this time.
    fn read(&self) -> (Timestamp, ClockOffset) {
        let at = self.truth.monotonic();
        (at, self.offset(at))
    }

    fn offset(&self, at: Timestamp) -> ClockOffset {
        self.fault_schedule.offset(at.since(*self.fault_schedule.start.get_or_init(|| at)))
    }
}

impl<C: ClockSource> ClockSource for FaultyClock<'_, C> {
    fn monotonic(&self) -> Timestamp {
        let (at, offset) = self.read();
        Timestamp::from_nanos(at.as_nanos().saturating_add_signed(offset.slewed))
    }

    fn wall(&self) -> WallTime {
        let (_, offset) = self.read();
        offset.wall(self.truth.wall())
    }

    fn boot(&self) -> Timestamp {
        let (_, offset) = self.read();
        let boot = self.truth.boot().as_nanos();
        Timestamp::from_nanos(boot.saturating_add_signed(offset.slewed + offset.suspended))
    }

    /// Applies the offsets at the time of the timestamp.
    fn timestamped(&self, timestamp: WallTime) -> WallTime {
        let truth = Reading::take(&self.truth);
        let made = WallOffset::between(truth.at, truth.wall).monotonic(timestamp);
        self.offset(made).wall(self.truth.timestamped(timestamp))
    }
}

impl ClockOffset {
    fn wall(self, truth: WallTime) -> WallTime {
        let offset = self.slewed + self.stepped + self.suspended;
        WallTime::from_nanos(truth.as_nanos().saturating_add_signed(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::FakeClock;
    use super::super::{Clock, ClockEvent};
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    fn offset(schedule: &str, millis: u64) -> ClockOffset {
        FaultSchedule::read(schedule).unwrap().offset(Duration::from_millis(millis))
    }

    #[test]
    fn schedule_is_parsed() {
        let fault_schedule =
            FaultSchedule::read("3s step +1s, 5s slew +500ppm,9s slew 0ppm , 12s suspend 4s, 15s step -1ms");
        let events = [
            (3, FaultKind::Step(SECOND)),
            (5, FaultKind::Slew(500)),
            (9, FaultKind::Slew(0)),
            (12, FaultKind::Suspend(Duration::from_secs(4))),
            (15, FaultKind::Step(-1_000_000)),
        ];
        let events = events.map(|(at, kind)| Fault { at: Duration::from_secs(at), kind });
        assert_eq!(fault_schedule.unwrap().events, events);
    }

    #[test]
    fn schedule_errors_name_the_event_and_the_cause() {
        let cases = [
            ("", "event 1, ``: has 0 words"),
            ("1s step +1s,", "event 2, ``: has 0 words"),
            ("1s step", "event 1, `1s step`: has 2 words"),
            ("1s leap +1s", "unknown event `leap` (use step, slew or suspend)"),
            ("1 step +1s", "event 1, `1 step +1s`: `1` has no unit"),
            ("1s step 1s", "`1s` has no sign"),
            ("1s step +é", "`é` is not a duration"),
            ("1s step -2d", "too long (at most 1d)"),
            ("1s slew +500", "`+500` is not a rate (allowed: -100000ppm to +100000ppm)"),
            ("1s slew 100001ppm", "`100001ppm` is not a rate"),
            ("1s suspend -4s", "`-4s` is not a duration"),
            ("2s suspend 4s, 1s step +1s", "event 2, `1s step +1s`: is earlier than the previous event"),
        ];
        for (schedule, expected) in cases {
            let message = FaultSchedule::read(schedule).unwrap_err().to_string();
            assert!(
                message.starts_with("PATHMETER_CLOCK_FAULTS: ") && message.contains(expected),
                "{message}"
            );
        }
    }

    #[test]
    fn step_moves_only_the_wall_clock() {
        let schedule = "1s step +1s, 2s step -3s";
        let stepped = |millis| offset(schedule, millis).stepped;
        assert_eq!([999, 1_000, 1_999, 2_000].map(stepped), [0, SECOND, SECOND, -2 * SECOND]);
        assert_eq!(offset(schedule, 5_000), ClockOffset { stepped: -2 * SECOND, ..ClockOffset::default() });
    }

    #[test]
    fn slews_are_continuous() {
        let schedule = "1s slew +500ppm, 3s slew -200ppm, 4s slew 0ppm";
        let slewed = |millis| offset(schedule, millis).slewed;
        assert_eq!(
            [1_000, 2_000, 3_000, 3_500, 4_000, 9_000].map(slewed),
            [0, 500_000, 1_000_000, 900_000, 800_000, 800_000]
        );
        for (before, after) in [(999, 1_000), (2_999, 3_000), (3_999, 4_000)] {
            assert!(slewed(after).abs_diff(slewed(before)) <= 500, "around {after} ms");
        }
    }

    #[test]
    fn steps_slews_and_suspends_add_up() {
        let schedule = "1s step +1s, 2s slew 100ppm, 3s suspend 4s, 3s step -2s";
        let expected = ClockOffset { slewed: 200_000, stepped: -SECOND, suspended: 4 * SECOND };
        assert_eq!(offset(schedule, 4_000), expected);
        assert_eq!(expected.wall(WallTime::from_nanos(10)).as_nanos(), 3_000_200_010);
    }

    #[test]
    fn timestamp_has_the_offset_of_its_own_time() {
        let host = FakeClock::default();
        let fault_schedule = FaultSchedule::read("1s step +1s, 2s suspend 4s").unwrap();
        let clocks = FaultyClock { truth: &host, fault_schedule: &fault_schedule };
        clocks.monotonic();
        let offset = |timestamp: WallTime| clocks.timestamped(timestamp).as_nanos() - timestamp.as_nanos();
        let timestamps = [999, 2, 998, 2].map(|span| host.advance(Duration::from_millis(span)));
        assert_eq!(timestamps.map(offset), [0, 1_000_000_000, 1_000_000_000, 5_000_000_000]);
    }

    #[test]
    fn clock_reports_each_event_once_and_converts_timestamps_around_it() {
        let host = FakeClock::default();
        let fault_schedule = FaultSchedule::read("1s step +1s, 3s step -1s, 5s suspend 4s").unwrap();
        let mut clock = Clock::with_source(FaultyClock { truth: &host, fault_schedule: &fault_schedule });
        let events = [
            ClockEvent::Step(SECOND),
            ClockEvent::Step(-SECOND),
            ClockEvent::Suspend(Duration::from_secs(4)),
        ];
        for event in events {
            host.advance(Duration::from_millis(990));
            let (drained, before) = clock.read();
            assert_eq!(before, None);
            let timestamps = [9, 2].map(|span| (host.advance(Duration::from_millis(span)), host.monotonic()));
            host.advance(Duration::from_millis(4));
            let (now, noticed) = clock.read();
            assert_eq!(noticed, Some(event));
            for (timestamp, truth) in timestamps {
                assert_eq!(clock.monotonic_of(timestamp, drained, now), truth, "{event:?}");
            }
            assert_eq!(clock.read().1, None);
            host.advance(Duration::from_millis(995));
        }
    }

    #[test]
    fn slew_is_not_an_event_and_changes_monotonic_and_wall_clock_alike() {
        let host = FakeClock::default();
        let fault_schedule = FaultSchedule::read("1s slew +500ppm").unwrap();
        let mut clock = Clock::with_source(FaultyClock { truth: &host, fault_schedule: &fault_schedule });
        let offset = clock.offset();
        for _ in 0..1_000 {
            host.advance(Duration::from_millis(5));
            assert_eq!(clock.read().1, None);
        }
        assert_eq!(clock.offset(), offset);
        assert_eq!(clock.read().0.as_nanos(), 5_002_000_000);
    }
}
