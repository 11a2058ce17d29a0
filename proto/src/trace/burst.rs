//! A trace in one burst: one probe for each hop, all in flight together.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Answer, DESTINATION, Trigger};
use crate::schedule::mix;
use crate::time::Timestamp;

/// The progress of one trace of one flow.
///
/// Where the number of routers is known, it sends one probe for each and one to the destination. Otherwise it
/// first asks the destination, whose reply carries the TTL on arrival. If there is no reply it sends waves of
/// [`WAVE`] hops without waiting for their answers. It is complete when every probe was answered or has
/// waited for [`answer_timeout`].
#[derive(Debug)]
pub(super) struct Burst {
    pub(super) trigger: Trigger,
    pub(super) began: Timestamp,
    stage: Stage,
    to_send: VecDeque<u8>,
    send_at: Timestamp,
    probes: Vec<BurstProbe>,
    /// RTT of the destination, from earlier measurements.
    known_rtt: Option<Duration>,
    /// Number of round trips until the answer to a probe is known.
    round_trips: u32,
    hops_max: u8,
    seed: u64,
}

/// A probe of a burst.
#[derive(Debug, Clone)]
pub(super) struct BurstProbe {
    pub(super) sequence: u64,
    /// [`DESTINATION`] for a probe that is not limited in TTL.
    pub(super) ttl: u8,
    /// When it was passed to the driver, and later when it left the host.
    pub(super) sent_at: Timestamp,
    pub(super) answer: Option<Answer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for the reply of the destination, to learn the number of routers.
    Distance,
    /// Probes hops up to this number of routers.
    Hops(u8),
    /// The number of routers is unknown. The next wave begins after this TTL.
    Waves { sent_to: u8, next_at: Timestamp },
}

/// What a burst does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BurstStep {
    /// Send a probe with this TTL.
    Send(u8),
    /// Wait until this time or an answer.
    Wait(Timestamp),
    /// Every probe was answered or has waited long enough.
    Complete,
}

/// Time between two probes. Chosen: 0.2 ms, so that sixteen hops take 3 ms; a router sees one probe.
pub(super) const SPACING: Duration = Duration::from_micros(200);

/// How long to wait for the destination before the hops are probed without knowing their number.
const DISTANCE_TIMEOUT: Duration = Duration::from_millis(250);

/// Number of hops in a wave.
const WAVE: u8 = 8;

/// Time between two waves.
const WAVE_SPACING: Duration = Duration::from_millis(30);

/// Time to wait for an answer if no RTT is known.
const TIMEOUT_UNKNOWN: Duration = Duration::from_millis(250);

/// Longest time to wait for an answer. Later answers are added to the trace.
const TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// How long to wait for an answer on a path with this RTT: a quarter more, and 30 ms for a busy router.
pub(super) fn answer_timeout(rtt: Option<Duration>) -> Duration {
    rtt.map_or(TIMEOUT_UNKNOWN, |rtt| (rtt * 5 / 4 + Duration::from_millis(30)).min(TIMEOUT_MAX))
}

impl Burst {
    /// A burst that begins at once.
    pub(super) fn new(
        trigger: Trigger,
        now: Timestamp,
        routers: Option<u8>,
        known_rtt: Option<Duration>,
        round_trips: u32,
        hops_max: u8,
        seed: u64,
    ) -> Self {
        let mut burst = Self {
            trigger,
            began: now,
            stage: Stage::Distance,
            to_send: VecDeque::from([DESTINATION]),
            send_at: now,
            probes: Vec::new(),
            known_rtt,
            round_trips,
            hops_max,
            seed,
        };
        if let Some(routers) = routers {
            burst.learn_routers(routers);
        }
        burst
    }

    /// The destination is behind this number of routers: adds the hops up to it that were not probed yet.
    pub(super) fn learn_routers(&mut self, routers: u8) {
        let known = match self.stage {
            Stage::Distance => 0,
            Stage::Hops(known) => known,
            Stage::Waves { sent_to, .. } => sent_to,
        };
        let last = routers.min(self.hops_max);
        let mut ttls: Vec<u8> = (known.saturating_add(1)..=last).collect();
        // Random order: a router that limits its answers by time does not always miss the same traces.
        ttls.sort_by_key(|ttl| mix(self.seed ^ u64::from(*ttl)));
        self.to_send.extend(ttls);
        self.to_send.retain(|ttl| *ttl == DESTINATION || *ttl <= last);
        self.stage = Stage::Hops(routers);
    }

    /// The number of routers, if known.
    pub(super) fn routers(&self) -> Option<u8> {
        match self.stage {
            Stage::Hops(routers) => Some(routers),
            Stage::Distance | Stage::Waves { .. } => None,
        }
    }

    /// The probe that was requested is on its way to the kernel.
    pub(super) fn queued(&mut self, probe: BurstProbe) {
        self.probes.push(probe);
    }

    /// A probe did not leave the host.
    pub(super) fn not_sent(&mut self, sequence: u64) {
        self.probes.retain(|probe| probe.sequence != sequence);
    }

    pub(super) fn probes(&self) -> &[BurstProbe] {
        &self.probes
    }

    pub(super) fn probes_mut(&mut self) -> impl Iterator<Item = &mut BurstProbe> {
        self.probes.iter_mut()
    }

    fn timeout(&self) -> Duration {
        let longest = self.probes.iter().filter_map(|probe| Some(probe.answer.as_ref()?.rtt)).max();
        answer_timeout(longest.max(self.known_rtt)) * self.round_trips
    }

    pub(super) fn step(&mut self, now: Timestamp, drained: Timestamp) -> BurstStep {
        if let Stage::Distance = self.stage
            && drained >= self.began + DISTANCE_TIMEOUT
        {
            self.stage = Stage::Waves { sent_to: 0, next_at: now };
        }
        if let Stage::Waves { sent_to, next_at } = self.stage
            && self.to_send.is_empty()
            && next_at <= now
        {
            let last = sent_to.saturating_add(WAVE).min(self.hops_max);
            self.to_send.extend(sent_to + 1..=last);
            self.stage = Stage::Waves { sent_to: last, next_at: now + WAVE_SPACING };
        }
        if let Some(ttl) = self.to_send.front().copied() {
            if self.send_at > now {
                return BurstStep::Wait(self.send_at);
            }
            self.to_send.pop_front();
            self.send_at = self.send_at.max(now - SPACING) + SPACING;
            return BurstStep::Send(ttl);
        }
        let timeout = self.timeout();
        let waiting = self.probes.iter().filter(|probe| probe.answer.is_none());
        let last = waiting.map(|probe| probe.sent_at + timeout).filter(|until| *until > drained).max();
        let next = match self.stage {
            Stage::Distance => Some(self.began + DISTANCE_TIMEOUT),
            Stage::Waves { sent_to, next_at } if sent_to < self.hops_max => Some(next_at),
            Stage::Hops(_) | Stage::Waves { .. } => None,
        };
        next.or(last).map_or(BurstStep::Complete, BurstStep::Wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(microseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + microseconds * 1_000)
    }

    const MS: u64 = 1_000;

    fn burst(routers: Option<u8>, known_rtt: Option<Duration>, hops_max: u8) -> Burst {
        Burst::new(Trigger::Start, at(0), routers, known_rtt, 1, hops_max, 7)
    }

    /// Steps the burst from one time until another: its probes with their times in microseconds, and what it
    /// does then.
    fn steps(burst: &mut Burst, from: u64, until: u64) -> (Vec<(u8, u64)>, BurstStep) {
        let (mut time, mut sent) = (at(from), Vec::new());
        loop {
            match burst.step(time, time) {
                BurstStep::Send(ttl) => {
                    let sequence = u64::try_from(burst.probes().len()).unwrap();
                    burst.queued(BurstProbe { sequence, ttl, sent_at: time, answer: None });
                    sent.push((ttl, u64::try_from(time.since(at(0)).as_micros()).unwrap()));
                }
                BurstStep::Wait(next) if next <= at(until) => {
                    assert!(next > time, "it waits for a later time");
                    time = next;
                }
                step @ (BurstStep::Wait(_) | BurstStep::Complete) => return (sent, step),
            }
        }
    }

    fn answer(burst: &mut Burst, ttl: u8, rtt: Duration) {
        let probe = burst.probes_mut().find(|probe| probe.ttl == ttl).expect("it was sent");
        probe.answer = Some(Answer::new([192, 0, 2, ttl].into(), rtt));
    }

    fn ttls(sent: &[(u8, u64)]) -> Vec<u8> {
        let mut ttls: Vec<u8> = sent.iter().map(|(ttl, _)| *ttl).collect();
        ttls.sort_unstable();
        ttls
    }

    #[test]
    fn answers_are_waited_for_a_quarter_longer_than_the_rtt_and_at_most_a_second() {
        let milliseconds = Duration::from_millis;
        for (rtt, expected) in [(None, 250), (Some(0), 30), (Some(100), 155), (Some(900), 1_000)] {
            assert_eq!(answer_timeout(rtt.map(milliseconds)), milliseconds(expected), "{rtt:?}");
        }
    }

    #[test]
    fn destination_and_all_known_hops_are_probed_once_0_2_ms_apart() {
        let (sent, _) = steps(&mut burst(Some(9), None, 30), 0, 10 * MS);
        assert_eq!(sent[0], (DESTINATION, 0));
        assert_eq!(ttls(&sent), [1, 2, 3, 4, 5, 6, 7, 8, 9, DESTINATION]);
        assert!(sent.iter().map(|(_, time)| *time).eq((0..10).map(|index| index * 200)));
    }

    #[test]
    fn late_burst_sends_two_probes_at_once_and_no_more() {
        let mut burst = burst(Some(9), None, 30);
        assert_eq!(steps(&mut burst, 0, 300).0.len(), 2);
        let (sent, _) = steps(&mut burst, 5 * MS, 6 * MS);
        let times: Vec<u64> = sent.iter().map(|(_, time)| *time).collect();
        assert_eq!(times, [5_000, 5_000, 5_200, 5_400, 5_600, 5_800, 6_000]);
    }

    #[test]
    fn hops_are_probed_in_an_order_that_depends_on_the_seed() {
        for seed in 0..64 {
            let mut burst = Burst::new(Trigger::Start, at(0), Some(16), None, 1, 30, seed);
            let (sent, _) = steps(&mut burst, 0, 10 * MS);
            assert!(!sent[1..].is_sorted(), "seed {seed}: {sent:?}");
        }
    }

    #[test]
    fn no_hop_beyond_the_limit_is_probed() {
        let mut known = burst(Some(9), None, 3);
        assert_eq!(ttls(&steps(&mut known, 0, 10 * MS).0), [1, 2, 3, DESTINATION]);
        assert_eq!(known.routers(), Some(9));
        let (sent, step) = steps(&mut burst(None, None, 9), 0, 10_000 * MS);
        assert_eq!(ttls(&sent), [1, 2, 3, 4, 5, 6, 7, 8, 9, DESTINATION]);
        assert_eq!(step, BurstStep::Complete);
    }

    #[test]
    fn hops_are_probed_as_soon_as_the_reply_of_the_destination_shows_their_number() {
        let mut burst = burst(None, None, 30);
        assert_eq!(steps(&mut burst, 0, 20 * MS), (vec![(DESTINATION, 0)], BurstStep::Wait(at(250 * MS))));
        assert_eq!(burst.routers(), None);
        burst.learn_routers(4);
        assert_eq!(burst.routers(), Some(4));
        let (sent, _) = steps(&mut burst, 20 * MS, 30 * MS);
        assert_eq!((ttls(&sent), sent[0].1), (vec![1, 2, 3, 4], 20 * MS));
    }

    #[test]
    fn waves_of_eight_hops_follow_if_the_destination_does_not_reply() {
        let mut burst = burst(None, Some(Duration::from_millis(20)), 20);
        let (sent, step) = steps(&mut burst, 0, 400 * MS);
        assert_eq!(burst.routers(), None);
        let wave = |first: u8, last: u8, time: u64| {
            (first..=last).zip([time * MS].into_iter().chain((time * MS..).step_by(200)))
        };
        let waves = wave(1, 8, 250).chain(wave(9, 16, 280)).chain(wave(17, 20, 310));
        assert!(sent[1..].iter().copied().eq(waves), "{sent:?}");
        assert_eq!(step, BurstStep::Complete, "55 ms after the last probe");
    }

    #[test]
    fn number_of_routers_ends_the_waves() {
        for (routers, expected) in [(2, vec![]), (6, vec![5, 6]), (11, vec![5, 6, 7, 8, 9, 10, 11])] {
            let mut burst = burst(None, None, 30);
            steps(&mut burst, 0, 250 * MS + 400);
            assert_eq!(burst.probes().len(), 5, "the destination and four hops");
            burst.learn_routers(routers);
            let (sent, _) = steps(&mut burst, 251 * MS, 400 * MS);
            assert_eq!(ttls(&sent), expected, "{routers} routers");
        }
    }

    #[test]
    fn more_routers_than_known_add_hops() {
        let mut burst = burst(Some(2), None, 30);
        steps(&mut burst, 0, 10 * MS);
        burst.learn_routers(2);
        assert_eq!(steps(&mut burst, 10 * MS, 20 * MS).0, []);
        burst.learn_routers(4);
        assert_eq!(ttls(&steps(&mut burst, 20 * MS, 30 * MS).0), [3, 4]);
    }

    #[test]
    fn burst_is_complete_when_the_last_probe_has_waited_long_enough() {
        for round_trips in [1, 2] {
            let rtt = Some(Duration::from_millis(20));
            let mut burst = Burst::new(Trigger::Start, at(0), Some(1), rtt, round_trips, 30, 7);
            let timeout = 55 * MS * u64::from(round_trips);
            assert_eq!(steps(&mut burst, 0, MS).1, BurstStep::Wait(at(200 + timeout)));
            answer(&mut burst, DESTINATION, Duration::from_millis(40));
            let timeout = 80 * MS * u64::from(round_trips);
            let until = at(200 + timeout);
            assert_eq!(steps(&mut burst, MS, MS).1, BurstStep::Wait(until), "the path is slower");
            let late = at(500 * MS);
            assert_eq!(burst.step(late, at(199 + timeout)), BurstStep::Wait(until), "answers may be waiting");
            assert_eq!(burst.step(late, until), BurstStep::Complete);
        }
    }

    #[test]
    fn burst_is_complete_when_all_probes_were_answered_or_refused() {
        let mut burst = burst(Some(2), None, 30);
        steps(&mut burst, 0, MS);
        answer(&mut burst, DESTINATION, Duration::from_millis(1));
        answer(&mut burst, 1, Duration::from_millis(1));
        assert!(matches!(burst.step(at(MS), at(MS)), BurstStep::Wait(_)));
        let refused = burst.probes().iter().find(|probe| probe.ttl == 2).unwrap().sequence;
        burst.not_sent(refused);
        assert_eq!(burst.probes().len(), 2);
        assert_eq!(burst.step(at(MS), at(MS)), BurstStep::Complete);
    }
}
