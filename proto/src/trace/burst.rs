//! A trace in one burst: one probe for each hop, all in flight together.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Answer, DESTINATION, Rejection, Trigger};
use crate::schedule::mix;
use crate::time::Timestamp;

/// The progress of one trace of one flow.
///
/// Where the number of routers is known, it sends one probe for each and one to the destination. Otherwise it
/// first asks the destination, whose reply carries the TTL on arrival, or if replies do not carry it,
/// searches for the smallest TTL that reaches the destination too. Without a reply, and to search, it sends
/// waves of [`WAVE`] hops without waiting for their answers. A search with one probe at a time asks the
/// destination first too, for the RTT. It is complete when every probe was answered or has waited for its
/// [timeout](BurstMethod::timeout).
#[derive(Debug)]
pub(super) struct Burst {
    pub(super) trigger: Trigger,
    pub(super) began: Timestamp,
    method: BurstMethod,
    stage: Stage,
    /// The smallest TTL with which a probe has reached the destination, if that is searched for.
    nearest: Option<u8>,
    to_send: VecDeque<u8>,
    send_at: Timestamp,
    probes: Vec<BurstProbe>,
    /// RTT of the destination, from earlier measurements.
    known_rtt: Option<Duration>,
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
    /// Whether the destination answered.
    pub(super) is_reached: bool,
    /// Present if it was rejected on the way.
    pub(super) rejection: Option<Rejection>,
}

impl BurstProbe {
    /// A probe that was not answered yet.
    pub(super) const fn new(sequence: u64, ttl: u8, sent_at: Timestamp) -> Self {
        Self { sequence, ttl, sent_at, answer: None, is_reached: false, rejection: None }
    }

    /// The time until it was answered or rejected; `None`: nothing came back.
    pub(super) fn rtt(&self) -> Option<Duration> {
        let rejected = self.rejection.map(|rejection| rejection.rtt);
        self.answer.as_ref().map(|answer| answer.rtt).or(rejected)
    }
}

/// How the probes of a burst are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BurstMethod {
    /// Replies of the destination carry the TTL on arrival.
    Reported {
        /// Number of round trips until the answer to a probe is known.
        round_trips: u32,
    },
    /// The number of routers is searched for.
    Searched {
        /// Whether only one probe is in flight.
        is_serial: bool,
        /// How long to wait for each answer; `None`: as long as the RTT suggests.
        wait: Option<Duration>,
    },
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

/// Hops without an answer after which a search for a destination that does not answer ends, if it sends one
/// probe at a time. Chosen: 3, so that it takes four seconds.
const GAP_MAX: usize = 3;

/// Time to wait for an answer if no RTT is known and only one probe is in flight, because an answer that
/// comes after the next probe is lost. Less than the second after which TCP sends a segment again.
const TIMEOUT_SERIAL: Duration = Duration::from_millis(900);

/// Time to wait for an answer if no RTT is known.
const TIMEOUT_UNKNOWN: Duration = Duration::from_millis(250);

/// Longest time to wait for an answer. Later answers are added to the trace.
const TIMEOUT_MAX: Duration = Duration::from_secs(1);

/// How long to wait for an answer on a path with this RTT: a quarter more, and 30 ms for a busy router.
fn answer_timeout(rtt: Option<Duration>) -> Duration {
    rtt.map_or(TIMEOUT_UNKNOWN, |rtt| (rtt * 5 / 4 + Duration::from_millis(30)).min(TIMEOUT_MAX))
}

impl BurstMethod {
    const fn is_serial(self) -> bool {
        matches!(self, Self::Searched { is_serial: true, .. })
    }

    /// How long to wait for the answer to a probe on a path with this RTT; `None`: it is not known.
    pub(super) fn timeout(self, rtt: Option<Duration>) -> Duration {
        match self {
            Self::Reported { round_trips } => answer_timeout(rtt) * round_trips,
            Self::Searched { wait: Some(wait), .. } => wait,
            Self::Searched { is_serial: true, wait: None } if rtt.is_none() => TIMEOUT_SERIAL,
            Self::Searched { wait: None, .. } => answer_timeout(rtt),
        }
    }
}

impl Burst {
    /// A burst that begins at once.
    pub(super) fn new(
        trigger: Trigger,
        now: Timestamp,
        routers: Option<u8>,
        known_rtt: Option<Duration>,
        method: BurstMethod,
        hops_max: u8,
        seed: u64,
    ) -> Self {
        let (stage, to_send) = match method {
            BurstMethod::Reported { .. } => (Stage::Distance, VecDeque::from([DESTINATION])),
            BurstMethod::Searched { is_serial, .. } => {
                // Whether it answers does not depend on the limits of routers.
                let is_first = routers.is_none() || (is_serial && known_rtt.is_none());
                let first = is_first.then_some(DESTINATION);
                (Stage::Waves { sent_to: 0, next_at: now }, first.into_iter().collect())
            }
        };
        let mut burst = Self {
            trigger,
            began: now,
            method,
            stage,
            nearest: None,
            to_send,
            send_at: now,
            probes: Vec::new(),
            known_rtt,
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
        let to_destination = match self.method {
            BurstMethod::Reported { .. } => 0,
            // Its probes are limited too.
            BurstMethod::Searched { .. } => 1,
        };
        let last = routers.saturating_add(to_destination).min(self.hops_max);
        let mut ttls: Vec<u8> = (known.saturating_add(1)..=last).collect();
        if !self.method.is_serial() {
            // Random order: a router that limits its answers by time does not always miss the same traces.
            ttls.sort_by_key(|ttl| mix(self.seed ^ u64::from(*ttl)));
        }
        self.to_send.extend(ttls);
        self.to_send.retain(|ttl| *ttl == DESTINATION || *ttl <= last);
        self.stage = Stage::Hops(routers);
    }

    /// A probe with this TTL reached the destination. Only if that is searched for.
    pub(super) fn reached(&mut self, ttl: u8) {
        if ttl == DESTINATION {
            return;
        }
        let nearest = self.nearest.map_or(ttl, |nearest| nearest.min(ttl));
        self.nearest = Some(nearest);
        self.to_send.retain(|queued| *queued < nearest);
        self.stage = Stage::Hops(nearest.saturating_sub(1));
    }

    /// A router answered a probe with this TTL. Only if the destination is searched for: it is farther away.
    pub(super) fn passed(&mut self, ttl: u8, now: Timestamp) {
        if let (Stage::Hops(routers), None) = (self.stage, self.nearest)
            && ttl > routers
        {
            self.stage = Stage::Waves { sent_to: ttl, next_at: now };
        }
    }

    /// A probe with this TTL was rejected: those with a larger one get no further. If the number of routers
    /// is known, all probes are sent, because the destination may still answer.
    pub(super) fn rejected(&mut self, ttl: u8) {
        let is_known = match self.method {
            BurstMethod::Reported { .. } => matches!(self.stage, Stage::Hops(_)),
            BurstMethod::Searched { .. } => self.nearest.is_some(),
        };
        if ttl != DESTINATION && !is_known {
            self.hops_max = self.hops_max.min(ttl);
            self.to_send.retain(|queued| *queued == DESTINATION || *queued < ttl);
        }
    }

    /// Sends no further limited probes.
    pub(super) fn skip_hops(&mut self) {
        self.to_send.retain(|ttl| *ttl == DESTINATION);
        self.stage = Stage::Hops(0);
    }

    /// The number of routers, if known.
    pub(super) fn routers(&self) -> Option<u8> {
        match (self.method, self.stage) {
            (BurstMethod::Searched { .. }, _) => {
                let routers = self.nearest?.saturating_sub(1);
                // The destination may be nearer if the TTL before was left out.
                let is_shown = routers == 0 || self.probes.iter().any(|probe| probe.ttl == routers);
                is_shown.then_some(routers)
            }
            (BurstMethod::Reported { .. }, Stage::Hops(routers)) => Some(routers),
            (BurstMethod::Reported { .. }, Stage::Distance | Stage::Waves { .. }) => None,
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
        let longest = self.probes.iter().filter_map(BurstProbe::rtt).max();
        let of_destination = self.probes.iter().find(|probe| probe.ttl == DESTINATION);
        let of_destination = of_destination.and_then(|probe| Some(probe.answer.as_ref()?.rtt));
        match self.known_rtt.or(of_destination) {
            // The RTT of the hops so far says nothing about the next one.
            None => self.method.timeout(longest.filter(|_| !self.method.is_serial())),
            Some(known) => self.method.timeout(longest.max(Some(known))),
        }
    }

    /// When the last of the probes that wait for an answer has waited long enough; `None`: none waits.
    fn waits_until(&self, drained: Timestamp) -> Option<Timestamp> {
        let timeout = self.timeout();
        let waiting = self.probes.iter().filter(|probe| probe.rtt().is_none());
        waiting.map(|probe| probe.sent_at + timeout).filter(|until| *until > drained).max()
    }

    fn is_destination_rejected(&self) -> bool {
        self.probes.iter().any(|probe| probe.ttl == DESTINATION && probe.rejection.is_some())
    }

    /// The largest TTL at which something answered; 0: none.
    fn last_answered(&self) -> u8 {
        let is_limited = |probe: &&BurstProbe| probe.ttl != DESTINATION && probe.answer.is_some();
        let answered = self.probes.iter().filter(is_limited);
        answered.map(|probe| probe.ttl).max().unwrap_or(0)
    }

    /// Number of probes behind the last hop that answered. Hops that were left out do not count as silent.
    fn unanswered_behind(&self) -> usize {
        let last = self.last_answered();
        self.probes.iter().filter(|probe| probe.ttl != DESTINATION && probe.ttl > last).count()
    }

    /// Number of hops in the next wave.
    fn wave(&self) -> u8 {
        match self.method {
            BurstMethod::Reported { .. } | BurstMethod::Searched { is_serial: false, .. } => WAVE,
            BurstMethod::Searched { is_serial: true, .. } => {
                let answers = self.known_rtt.is_some()
                    || self.probes.iter().any(|probe| probe.ttl == DESTINATION && probe.answer.is_some());
                u8::from(answers || self.unanswered_behind() < GAP_MAX)
            }
        }
    }

    pub(super) fn step(&mut self, now: Timestamp, drained: Timestamp) -> BurstStep {
        if let Stage::Distance = self.stage
            && (drained >= self.began + DISTANCE_TIMEOUT || self.is_destination_rejected())
        {
            self.stage = Stage::Waves { sent_to: 0, next_at: now };
        }
        let waits_until = self.waits_until(drained);
        if let (true, Some(until)) = (self.method.is_serial(), waits_until) {
            return BurstStep::Wait(until);
        }
        if let (BurstMethod::Searched { .. }, Stage::Hops(routers)) = (self.method, self.stage)
            && self.nearest.is_none()
            && self.to_send.is_empty()
            && waits_until.is_none()
        {
            // The destination may be farther away, behind a router that does not answer.
            self.stage = Stage::Waves { sent_to: routers.saturating_add(1), next_at: now };
        }
        if let Stage::Waves { sent_to, next_at } = self.stage
            && self.to_send.is_empty()
            && next_at <= now
        {
            let last = sent_to.saturating_add(self.wave()).min(self.hops_max);
            self.to_send.extend(sent_to + 1..=last);
            let next_at = if self.method.is_serial() { now } else { now + WAVE_SPACING };
            self.stage = Stage::Waves { sent_to: last, next_at };
        }
        if let Some(ttl) = self.to_send.front().copied() {
            if self.send_at > now {
                return BurstStep::Wait(self.send_at);
            }
            self.to_send.pop_front();
            self.send_at = self.send_at.max(now - SPACING) + SPACING;
            return BurstStep::Send(ttl);
        }
        let next = match self.stage {
            Stage::Distance => Some(self.began + DISTANCE_TIMEOUT),
            Stage::Waves { sent_to, next_at } if sent_to < self.hops_max && self.wave() > 0 => Some(next_at),
            Stage::Hops(_) | Stage::Waves { .. } => None,
        };
        next.or(waits_until).map_or(BurstStep::Complete, BurstStep::Wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::RejectionReason;

    fn at(microseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + microseconds * 1_000)
    }

    const MS: u64 = 1_000;

    const REPORTED: BurstMethod = BurstMethod::Reported { round_trips: 1 };

    const PARALLEL: BurstMethod = BurstMethod::Searched { is_serial: false, wait: None };

    const SERIAL: BurstMethod = BurstMethod::Searched { is_serial: true, wait: None };

    fn burst(routers: Option<u8>, known_rtt: Option<Duration>, hops_max: u8) -> Burst {
        Burst::new(Trigger::Start, at(0), routers, known_rtt, REPORTED, hops_max, 7)
    }

    /// Steps the burst from one time until another: its probes with their times in microseconds, and what it
    /// does then.
    fn steps(burst: &mut Burst, from: u64, until: u64) -> (Vec<(u8, u64)>, BurstStep) {
        let (mut time, mut sent) = (at(from), Vec::new());
        loop {
            match burst.step(time, time) {
                BurstStep::Send(ttl) => {
                    let sequence = u64::try_from(burst.probes().len()).unwrap();
                    burst.queued(BurstProbe::new(sequence, ttl, time));
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
            let mut burst = Burst::new(Trigger::Start, at(0), Some(16), None, REPORTED, 30, seed);
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
            let method = BurstMethod::Reported { round_trips };
            let mut burst = Burst::new(Trigger::Start, at(0), Some(1), rtt, method, 30, 7);
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

    /// Runs a burst on a path with this number of routers and an RTT of 10 ms. Returns the probes with their
    /// times in milliseconds, and how long it took.
    fn search(burst: &mut Burst, routers: u8, silent: &[u8]) -> (Vec<(u8, u64)>, u64) {
        let (mut time, mut sent) = (at(0), Vec::new());
        let mut answers: VecDeque<(Timestamp, u64, u8)> = VecDeque::new();
        loop {
            while let Some((due, sequence, ttl)) = answers.front().copied().filter(|(due, ..)| *due <= time) {
                answers.pop_front();
                let probe = burst.probes_mut().find(|probe| probe.sequence == sequence).unwrap();
                probe.answer = Some(Answer::new([192, 0, 2, ttl].into(), Duration::from_millis(10)));
                match ttl > routers {
                    true => burst.reached(ttl),
                    false => burst.passed(ttl, due),
                }
            }
            match burst.step(time, time) {
                BurstStep::Send(ttl) => {
                    let sequence = u64::try_from(sent.len()).unwrap();
                    burst.queued(BurstProbe::new(sequence, ttl, time));
                    sent.push((ttl, u64::try_from(time.since(at(0)).as_millis()).unwrap()));
                    if !silent.contains(&ttl) {
                        answers.push_back((time + Duration::from_millis(10), sequence, ttl));
                    }
                }
                BurstStep::Wait(next) => {
                    let next = answers.front().map_or(next, |(due, ..)| next.min(*due));
                    assert!(next > time, "it waits for a later time");
                    time = next;
                }
                BurstStep::Complete => {
                    return (sent, u64::try_from(time.since(at(0)).as_millis()).unwrap());
                }
            }
        }
    }

    fn searching(routers: Option<u8>, method: BurstMethod) -> Burst {
        Burst::new(Trigger::Start, at(0), routers, Some(Duration::from_millis(10)), method, 30, 7)
    }

    #[test]
    fn search_finds_the_number_of_routers_for_every_length() {
        for routers in 0..29 {
            for method in [PARALLEL, SERIAL] {
                let mut burst = searching(None, method);
                let (sent, took) = search(&mut burst, routers, &[]);
                assert_eq!(burst.routers(), Some(routers), "{method:?}");
                let needed = usize::from(routers) + 1;
                assert_eq!(sent[0].0, DESTINATION);
                match method {
                    PARALLEL => assert!(sent.len() <= needed + usize::from(WAVE), "{sent:?}"),
                    BurstMethod::Searched { .. } | BurstMethod::Reported { .. } => {
                        assert_eq!(ttls(&sent[1..]), (1..=routers + 1).collect::<Vec<u8>>());
                        assert_eq!(took, 10 * u64::from(routers + 2), "one RTT for each hop");
                    }
                }
                for known in [routers, routers.saturating_sub(2), routers + 2] {
                    let mut burst = searching(Some(known), method);
                    let (sent, _) = search(&mut burst, routers, &[]);
                    assert_eq!(burst.routers(), Some(routers), "{known} were known, {sent:?}");
                    assert!(known != routers || sent.len() == needed.min(30), "one probe a hop: {sent:?}");
                }
            }
        }
    }

    #[test]
    fn search_goes_on_behind_routers_that_do_not_answer() {
        for method in [PARALLEL, SERIAL] {
            for known in [None, Some(4), Some(9)] {
                let mut burst = searching(known, method);
                search(&mut burst, 9, &[1, 5, 6, 7]);
                assert_eq!(burst.routers(), Some(9), "{method:?}, {known:?} were known");
            }
        }
    }

    #[test]
    fn search_without_a_destination_ends() {
        let silent: Vec<u8> = (4..=30).chain([DESTINATION]).collect();
        let mut burst = searching(None, PARALLEL);
        let (sent, took) = search(&mut burst, 30, &silent);
        assert_eq!((ttls(&sent).len(), burst.routers()), (31, None));
        assert!(took < 200, "{took}");
        let mut burst = Burst::new(Trigger::Start, at(0), None, None, SERIAL, 30, 7);
        let (sent, took) = search(&mut burst, 30, &silent);
        assert_eq!((ttls(&sent), burst.routers()), (vec![1, 2, 3, 4, 5, 6, DESTINATION], None));
        assert_eq!(took, 900 + 3 * 10 + 3 * 900);
    }

    #[test]
    fn serial_search_asks_the_destination_first_if_its_rtt_is_unknown() {
        let mut burst = Burst::new(Trigger::Start, at(0), None, None, SERIAL, 30, 7);
        let (sent, took) = search(&mut burst, 9, &[2, 3, 4, 5, 6, 7, 8]);
        assert_eq!((sent[0].0, burst.routers()), (DESTINATION, Some(9)));
        assert!((330..340).contains(&took), "RTTs, and 42.5 ms for each silent hop: {took}");
    }

    #[test]
    fn nothing_is_probed_behind_the_nearest_ttl_that_reached_the_destination() {
        let mut burst = searching(Some(20), PARALLEL);
        let mut sent = ttls(&steps(&mut burst, 0, 2 * MS).0);
        assert_eq!(sent.len(), 11);
        // Of a probe before the trace.
        let nearest = (6..20).find(|ttl| !sent.contains(ttl)).unwrap();
        for ttl in [nearest + 3, nearest + 5, nearest] {
            burst.reached(ttl);
        }
        let later = ttls(&steps(&mut burst, 2 * MS, 10 * MS).0);
        assert!(later.iter().all(|ttl| *ttl < nearest), "{later:?}");
        sent.extend(&later);
        assert!((1..nearest).all(|ttl| sent.contains(&ttl)), "each of those before it: {sent:?}");
    }

    #[test]
    fn router_behind_the_known_length_continues_the_search_at_once() {
        let mut burst = searching(Some(2), PARALLEL);
        assert_eq!(ttls(&steps(&mut burst, 0, MS).0), [1, 2, 3]);
        burst.passed(2, at(MS));
        assert_eq!(steps(&mut burst, MS, 2 * MS).0, [], "it is a router of the known route");
        burst.passed(3, at(2 * MS));
        assert_eq!(ttls(&steps(&mut burst, 2 * MS, 4 * MS).0), (4..=11).collect::<Vec<u8>>());
    }

    #[test]
    fn rejection_ends_the_hops_but_not_the_question_to_the_destination() {
        for method in [REPORTED, PARALLEL] {
            let mut burst = Burst::new(Trigger::Start, at(0), None, None, method, 30, 7);
            // Of a probe that was sent before the trace.
            burst.rejected(20);
            assert_eq!(steps(&mut burst, 0, 0).0, [(DESTINATION, 0)]);
            let (sent, _) = steps(&mut burst, MS, 250 * MS + 600);
            let last = sent.last().unwrap().0;
            assert!(last <= 20, "{sent:?}");
            burst.rejected(last);
            let (later, step) = steps(&mut burst, 251 * MS, 10_000 * MS);
            assert_eq!((later, step), (vec![], BurstStep::Complete), "{method:?}");
        }
        let mut burst = burst(Some(6), None, 30);
        burst.rejected(2);
        assert_eq!(ttls(&steps(&mut burst, 0, MS).0).len(), 6);
        burst.rejected(2);
        assert_eq!(steps(&mut burst, MS, 2 * MS).0.len(), 1, "the number of routers is known");
    }

    #[test]
    fn hops_are_probed_as_soon_as_the_question_to_the_destination_is_rejected() {
        let mut burst = burst(None, None, 30);
        assert_eq!(steps(&mut burst, 0, 10 * MS).0, [(DESTINATION, 0)]);
        let (address, reason) = ([192, 0, 2, 4].into(), RejectionReason::Prohibited);
        let rejection = Rejection { ttl: None, address, reason, rtt: Duration::from_millis(10) };
        burst.probes_mut().for_each(|probe| probe.rejection = Some(rejection));
        burst.rejected(DESTINATION);
        let (sent, _) = steps(&mut burst, 10 * MS, 20 * MS);
        assert_eq!(ttls(&sent), (1..=8).collect::<Vec<u8>>());
    }

    #[test]
    fn wave_is_not_sent_beyond_a_ttl_that_was_rejected() {
        let mut burst = burst(None, None, 30);
        steps(&mut burst, 0, 250 * MS + 200);
        burst.rejected(6);
        let (sent, step) = steps(&mut burst, 251 * MS, 10_000 * MS);
        assert_eq!((ttls(&sent), step), (vec![4, 5], BurstStep::Complete));
    }

    #[test]
    fn skipped_hops_are_not_probed_and_the_destination_is() {
        let mut skipped = burst(Some(6), None, 30);
        skipped.skip_hops();
        assert_eq!(steps(&mut skipped, 0, MS).0, [(DESTINATION, 0)]);
        let mut skipped = burst(Some(6), None, 30);
        steps(&mut skipped, 0, 600);
        skipped.skip_hops();
        assert_eq!(steps(&mut skipped, MS, 2 * MS).0, []);
    }

    #[test]
    fn serial_search_has_one_probe_in_flight() {
        let (sent, _) = search(&mut searching(Some(5), SERIAL), 5, &[3]);
        let times: Vec<u64> = sent.iter().map(|(_, time)| *time).collect();
        assert_eq!(times, [0, 10, 20, 62, 72, 82], "the third one waits 42 ms for an answer");
    }

    #[test]
    fn wait_for_an_answer_can_be_fixed() {
        let wait = Some(Duration::from_millis(1_200));
        for (is_serial, took) in [(false, 1_200), (true, 10 + 10 + 1_200 + 10)] {
            let method = BurstMethod::Searched { is_serial, wait };
            let mut burst = Burst::new(Trigger::Start, at(0), None, None, method, 30, 7);
            let (_, found) = search(&mut burst, 2, &[2]);
            assert!((took..took + 10).contains(&found), "{found}");
        }
    }
}
