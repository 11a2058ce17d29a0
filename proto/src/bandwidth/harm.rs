//! Stops a run that harms the traffic of its path, and measures the latency under its load.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::time::Timestamp;

/// When a run does harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HarmLimits {
    /// A reply is late if its round trip is longer than the idle p99 and this. [`Duration::MAX`]: delay does
    /// no harm.
    pub added_delay_max: Duration,
}

impl Default for HarmLimits {
    /// 10 ms. Chosen: a call or a game notices a little more.
    fn default() -> Self {
        Self { added_delay_max: Duration::from_millis(10) }
    }
}

/// Time between two echoes. Five late ones take 100 ms.
pub const ECHO_INTERVAL: Duration = Duration::from_millis(20);

/// How long the path is measured before the load. Chosen: 100 echoes.
pub const IDLE_TIME: Duration = Duration::from_secs(2);

/// So many of the last [`RECENT`] replies are late when delay does harm.
const LATE_MAX: usize = 5;
const RECENT: usize = 10;

/// So many echoes in a row are missing when loss does harm.
const MISSING_MAX: u64 = 3;

/// An echo is missing when its reply is this much later than a late one. Chosen: less than three intervals,
/// so that three missing echoes are known 150 ms after the first one was sent, on a short path.
const MISSING_AFTER: Duration = Duration::from_millis(50);

/// The harm that a run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Harm {
    /// Replies are late: five of the last ten.
    Delay,
    /// Replies are missing: three in a row.
    Loss,
}

/// Watches the echoes of a path before and during a run. An echo belongs to the phase in which it was sent.
#[derive(Debug, Clone)]
pub struct HarmMonitor {
    limits: HarmLimits,
    phase: Phase,
    idle: Vec<EchoDelay>,
    loaded: Vec<EchoDelay>,
    /// Echoes of the load that have no reply, and when they were sent.
    outstanding: BTreeMap<u64, Timestamp>,
    /// Those of them that count as missing.
    missing: BTreeSet<u64>,
    /// The first and the last sequence number of the load.
    first: u64,
    last: u64,
    recent: VecDeque<bool>,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Idle,
    Loaded {
        /// Round trips above it are late; `None`: nothing is, because the idle path did not answer.
        late_above: Option<Duration>,
    },
    Ended,
}

/// The delay of one echo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EchoDelay {
    /// The round trip.
    pub rtt: Duration,
    /// The time of each way; `None` if the responder reports no times.
    pub one_way: Option<OneWay>,
}

/// The time of each way in nanoseconds, read from the clocks of two hosts: only comparable with that of other
/// echoes of the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OneWay {
    /// From the prober to the responder.
    pub forward: i64,
    /// From the responder to the prober.
    pub reverse: i64,
}

/// The latency of a path, idle and under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedLatency {
    /// Median of the round trips before the load.
    pub idle_rtt: Duration,
    /// Median of the round trips under load.
    pub loaded_rtt: Duration,
    /// 95th percentile of the round trips under load, above the idle median.
    pub added_delay: Duration,
    /// The same of each direction; `None` if the responder reports no times.
    pub added_one_way: Option<AddedOneWay>,
    /// Median of the round trips under load, above the idle 95th percentile: a queue that stands, and not the
    /// variation that the idle path has too.
    pub standing_delay: Duration,
    /// The same of each direction.
    pub standing_one_way: Option<AddedOneWay>,
    /// Round trips per minute under load: 60 s by the mean of the fastest 95 % of the round trips
    /// (single-sided trimmed mean, draft-ietf-ippm-responsiveness). Zero if no time can be measured.
    pub round_trips_per_minute: u64,
    /// How far the round trips per minute can be relied on.
    pub confidence: Confidence,
    /// Echoes under load without a reply.
    pub missing: usize,
}

/// Delay that the load has added in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddedOneWay {
    /// From the prober to the responder.
    pub forward: Duration,
    /// From the responder to the prober.
    pub reverse: Duration,
}

/// How far a result can be relied on, by the number of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confidence {
    /// Fewer than 20 samples.
    Low,
    /// Fewer than 100 samples.
    Medium,
    /// 100 samples or more: two seconds of load.
    High,
}

impl Confidence {
    const fn of(samples: usize) -> Self {
        match samples {
            0..20 => Self::Low,
            20..100 => Self::Medium,
            100.. => Self::High,
        }
    }

    /// The value of the JSON field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// Maximum delays that are kept of each phase; later ones are judged but not kept. Chosen: 5 minutes.
const DELAYS_MAX: usize = 15_000;

impl HarmMonitor {
    /// A monitor of an idle path.
    #[must_use]
    pub fn new(limits: HarmLimits) -> Self {
        Self {
            limits,
            phase: Phase::Idle,
            idle: Vec::new(),
            loaded: Vec::new(),
            outstanding: BTreeMap::new(),
            missing: BTreeSet::new(),
            first: 0,
            last: 0,
            recent: VecDeque::with_capacity(RECENT),
        }
    }

    /// Whether harm can be seen: at least half of the echoes of the idle path were answered.
    #[must_use]
    pub fn has_baseline(&self) -> bool {
        self.idle.len() as u128 * 2 >= IDLE_TIME.as_nanos() / ECHO_INTERVAL.as_nanos()
    }

    /// The load begins. Without a [baseline](Self::has_baseline), harm is not seen.
    pub fn load_begins(&mut self) {
        let p99 = rank(&sorted_rtts(&self.idle), 99).filter(|_| self.has_baseline());
        let late_above = p99.map(|p99| p99.saturating_add(self.limits.added_delay_max));
        self.phase = Phase::Loaded { late_above };
        self.outstanding.clear();
        self.first = self.last + 1;
    }

    /// The load has ended. Replies to the echoes that were sent under load still count.
    pub fn load_ends(&mut self) {
        self.phase = Phase::Ended;
    }

    /// Whether replies to echoes of the load may still come.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.outstanding.is_empty()
    }

    /// An echo was sent. Sequence numbers increase.
    pub fn sent(&mut self, sequence: u64, at: Timestamp) {
        match self.phase {
            Phase::Idle => self.last = sequence,
            Phase::Loaded { .. } => {
                self.last = sequence;
                self.outstanding.insert(sequence, at);
            }
            Phase::Ended => {}
        }
    }

    /// An echo was answered. Returns harm if the run must stop.
    pub fn answered(&mut self, sequence: u64, delay: EchoDelay) -> Option<Harm> {
        if let Phase::Idle = self.phase {
            if self.idle.len() < DELAYS_MAX {
                self.idle.push(delay);
            }
            return None;
        }
        self.outstanding.remove(&sequence);
        self.missing.remove(&sequence);
        if !(self.first..=self.last).contains(&sequence) {
            return None;
        }
        if self.loaded.len() < DELAYS_MAX {
            self.loaded.push(delay);
        }
        let Phase::Loaded { late_above: Some(late_above) } = self.phase else { return None };
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(delay.rtt > late_above);
        (self.recent.iter().filter(|is_late| **is_late).count() >= LATE_MAX).then_some(Harm::Delay)
    }

    /// Looks for missing echoes. To be called at least each [`ECHO_INTERVAL`]. Returns harm if the run must
    /// stop. `drained`: all replies that had arrived by then were passed on.
    pub fn check(&mut self, drained: Timestamp) -> Option<Harm> {
        let Phase::Loaded { late_above: Some(late_above) } = self.phase else { return None };
        let after = late_above.saturating_add(MISSING_AFTER);
        let is_new = |(sequence, at): &(&u64, &Timestamp)| {
            drained.since(**at) > after && !self.missing.contains(*sequence)
        };
        let new: Vec<u64> = self.outstanding.iter().filter(is_new).map(|(sequence, _)| *sequence).collect();
        for sequence in new {
            self.missing.insert(sequence);
            let in_a_row = (0..MISSING_MAX).all(|before| {
                sequence.checked_sub(before).is_some_and(|sequence| self.missing.contains(&sequence))
            });
            if in_a_row {
                return Some(Harm::Loss);
            }
        }
        None
    }

    /// The latency idle and under load; `None` if no echo was answered in one of the two.
    #[must_use]
    pub fn latency(&self) -> Option<LoadedLatency> {
        let (idle, loaded) = (sorted_rtts(&self.idle), sorted_rtts(&self.loaded));
        let idle_rtt = rank(&idle, 50)?;
        let fastest = &loaded[..loaded.len() - loaded.len() / 20];
        let mean = fastest.iter().sum::<Duration>().checked_div(u32::try_from(fastest.len()).ok()?)?;
        let per_minute = Duration::from_secs(60).as_nanos().checked_div(mean.as_nanos()).unwrap_or(0);
        Some(LoadedLatency {
            idle_rtt,
            loaded_rtt: rank(&loaded, 50)?,
            added_delay: rank(&loaded, 95)?.saturating_sub(idle_rtt),
            added_one_way: self.above_idle(95, 50),
            standing_delay: rank(&loaded, 50)?.saturating_sub(rank(&idle, 95)?),
            standing_one_way: self.above_idle(50, 95),
            round_trips_per_minute: u64::try_from(per_minute).unwrap_or(u64::MAX),
            confidence: Confidence::of(loaded.len()),
            missing: self.outstanding.len(),
        })
    }

    /// A percentile under load above one of the idle path, of each direction.
    fn above_idle(&self, loaded: usize, idle: usize) -> Option<AddedOneWay> {
        let added = |of: fn(&OneWay) -> i64| {
            let sorted = |delays: &[EchoDelay]| {
                let one_way = delays.iter().filter_map(|delay| delay.one_way.as_ref());
                let mut values: Vec<i64> = one_way.map(of).collect();
                values.sort_unstable();
                values
            };
            let (idle, loaded) = (rank(&sorted(&self.idle), idle)?, rank(&sorted(&self.loaded), loaded)?);
            Some(Duration::from_nanos(u64::try_from(loaded.saturating_sub(idle)).unwrap_or(0)))
        };
        Some(AddedOneWay { forward: added(|delay| delay.forward)?, reverse: added(|delay| delay.reverse)? })
    }
}

fn sorted_rtts(delays: &[EchoDelay]) -> Vec<Duration> {
    let mut rtts: Vec<Duration> = delays.iter().map(|delay| delay.rtt).collect();
    rtts.sort_unstable();
    rtts
}

/// The percentile of a sorted list by nearest rank, from any number of values; `None` of none.
fn rank<T: Copy>(sorted: &[T], percent: usize) -> Option<T> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A path whose echoes are sent each 20 ms.
    struct Path {
        monitor: HarmMonitor,
        now: Timestamp,
        sequence: u64,
    }

    impl Path {
        /// A path after its idle phase with round trips of 5 ms, one of them 7 ms.
        fn loaded() -> Self {
            let monitor = HarmMonitor::new(HarmLimits::default());
            let mut path = Self { monitor, now: Timestamp::from_nanos(0), sequence: 0 };
            for number in 0..100 {
                assert_eq!(path.echo(Some(if number < 2 { 7 * MS } else { 5 * MS })), None);
            }
            assert!(path.monitor.has_baseline());
            path.monitor.load_begins();
            path
        }

        /// Sends one echo, which is answered after `rtt`, or not.
        fn echo(&mut self, rtt: Option<Duration>) -> Option<Harm> {
            self.monitor.sent(self.sequence, self.now);
            let one_way = OneWay { forward: 0, reverse: 0 };
            let answered = rtt.and_then(|rtt| {
                self.monitor.answered(self.sequence, EchoDelay { rtt, one_way: Some(one_way) })
            });
            self.sequence += 1;
            self.now = self.now + ECHO_INTERVAL;
            answered.or_else(|| self.monitor.check(self.now))
        }
    }

    #[test]
    fn five_late_replies_of_ten_are_harm() {
        let mut path = Path::loaded();
        for _ in 0..50 {
            assert_eq!(path.echo(Some(17 * MS)), None, "not above the p99 of 7 ms and 10 ms");
        }
        for late in [true, false, true, false, false, true, true, false, false] {
            assert_eq!(path.echo(Some(if late { 18 * MS } else { 5 * MS })), None);
        }
        assert_eq!(path.echo(Some(18 * MS)), Some(Harm::Delay));
    }

    #[test]
    fn four_late_replies_of_ten_are_none_however_long() {
        let mut path = Path::loaded();
        for number in 0..1_000 {
            assert_eq!(path.echo(Some(if number % 10 < 4 { 500 * MS } else { 5 * MS })), None);
        }
    }

    #[test]
    fn three_missing_echoes_in_a_row_are_harm_within_200_ms() {
        let mut path = Path::loaded();
        for number in 0..100 {
            let rtt = (number % 3 == 0).then_some(5 * MS);
            assert_eq!(path.echo(rtt), None, "two in a row");
        }
        path.echo(Some(5 * MS));
        let begin = path.now;
        while path.echo(None).is_none() {}
        assert!(path.now.since(begin) <= 200 * MS, "{:?}", path.now.since(begin));
        assert_eq!(path.monitor.check(path.now), None, "each is missing once");
    }

    #[test]
    fn echoes_are_not_missing_because_the_process_did_not_run() {
        let mut path = Path::loaded();
        let drained = path.now;
        for _ in 0..50 {
            path.monitor.sent(path.sequence, path.now);
            (path.sequence, path.now) = (path.sequence + 1, path.now + ECHO_INTERVAL);
            assert_eq!(path.monitor.check(drained), None);
        }
    }

    #[test]
    fn echoes_lost_before_the_load_do_not_stop_the_run() {
        let monitor = HarmMonitor::new(HarmLimits::default());
        let mut path = Path { monitor, now: Timestamp::from_nanos(0), sequence: 0 };
        for number in 0..100 {
            path.echo((number < 97).then_some(5 * MS));
        }
        path.monitor.load_begins();
        for _ in 0..50 {
            assert_eq!(path.echo(Some(5 * MS)), None);
        }
        assert_eq!(path.monitor.latency().unwrap().missing, 0);
    }

    #[test]
    fn echoes_count_for_the_phase_in_which_they_were_sent() {
        let mut path = Path::loaded();
        // Sent before the load, answered after it has begun.
        path.monitor.answered(3, EchoDelay { rtt: Duration::from_secs(1), one_way: None });
        for _ in 0..4 {
            path.echo(Some(17 * MS));
        }
        path.monitor.sent(path.sequence, path.now);
        path.monitor.load_ends();
        assert!(path.monitor.is_waiting());
        assert_eq!(path.monitor.answered(path.sequence, EchoDelay { rtt: 400 * MS, one_way: None }), None);
        assert!(!path.monitor.is_waiting());
        // Sent after the load.
        path.monitor.sent(path.sequence + 1, path.now);
        path.monitor.answered(path.sequence + 1, EchoDelay { rtt: MS, one_way: None });
        let latency = path.monitor.latency().unwrap();
        assert_eq!((latency.loaded_rtt, latency.added_delay), (17 * MS, 395 * MS));
    }

    #[test]
    fn unlimited_delay_never_stops_a_run() {
        let mut monitor = HarmMonitor::new(HarmLimits { added_delay_max: Duration::MAX });
        for sequence in 0..100 {
            monitor.sent(sequence, Timestamp::from_nanos(0));
            monitor.answered(sequence, EchoDelay { rtt: MS, one_way: None });
        }
        monitor.load_begins();
        for sequence in 100..200 {
            monitor.sent(sequence, Timestamp::from_nanos(0));
            let slow = EchoDelay { rtt: Duration::from_secs(2), one_way: None };
            assert_eq!(monitor.answered(sequence, slow), None);
        }
        let latency = monitor.latency().unwrap();
        assert_eq!((latency.idle_rtt, latency.loaded_rtt), (MS, Duration::from_secs(2)));
        assert_eq!(latency.added_one_way, None);
    }

    #[test]
    fn path_without_replies_has_no_baseline() {
        let mut monitor = HarmMonitor::new(HarmLimits::default());
        for sequence in 0..49 {
            monitor.answered(sequence, EchoDelay { rtt: MS, one_way: None });
        }
        assert!(!monitor.has_baseline());
        monitor.load_begins();
        assert_eq!(monitor.latency(), None);
        let mut silent = HarmMonitor::new(HarmLimits::default());
        silent.load_begins();
        assert_eq!(silent.check(Timestamp::from_nanos(1)), None);
    }

    #[test]
    fn latency_under_load_has_the_direction_of_the_queue() {
        let mut monitor = HarmMonitor::new(HarmLimits { added_delay_max: Duration::MAX });
        // The clock of the responder is an hour behind.
        let offset = -3_600_000_000_000;
        let delay = |queue: i64| EchoDelay {
            rtt: 10 * MS + Duration::from_nanos(u64::try_from(queue).unwrap()),
            one_way: Some(OneWay { forward: offset + 4_000_000 + queue, reverse: 6_000_000 - offset }),
        };
        for sequence in 0..100 {
            monitor.sent(sequence, Timestamp::from_nanos(0));
            monitor.answered(sequence, delay(0));
        }
        monitor.load_begins();
        for sequence in 0..100 {
            monitor.sent(100 + sequence, Timestamp::from_nanos(0));
            monitor.answered(100 + sequence, delay(i64::try_from(sequence).unwrap() * 1_000_000));
        }
        let latency = monitor.latency().unwrap();
        assert_eq!(latency.idle_rtt, 10 * MS);
        assert_eq!(latency.loaded_rtt, 59 * MS);
        assert_eq!(latency.added_delay, 94 * MS);
        assert_eq!(latency.added_one_way, Some(AddedOneWay { forward: 94 * MS, reverse: Duration::ZERO }));
        assert_eq!(latency.standing_delay, 49 * MS);
        assert_eq!(latency.standing_one_way, Some(AddedOneWay { forward: 49 * MS, reverse: Duration::ZERO }));
        // The mean of 10 to 104 ms is 57 ms.
        assert_eq!(latency.round_trips_per_minute, 1_052);
        assert_eq!(latency.confidence, Confidence::High);
    }
}
