//! A trace in one burst: one probe for each hop, all in flight together.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use super::{DESTINATION, Trigger};
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
#[derive(Debug, Clone, Copy)]
pub(super) struct BurstProbe {
    pub(super) sequence: u64,
    /// [`DESTINATION`] for a probe that is not limited in TTL.
    pub(super) ttl: u8,
    /// When it was passed to the driver, and later when it left the host.
    pub(super) sent_at: Timestamp,
    /// Who answered, after which time.
    pub(super) answer: Option<(IpAddr, Duration)>,
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
            burst.stage = Stage::Hops(0);
            burst.extend_to(routers);
        }
        burst
    }

    /// Adds the hops up to `routers` that were not probed yet.
    fn extend_to(&mut self, routers: u8) {
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

    /// The destination is behind this number of routers.
    pub(super) fn learn_routers(&mut self, routers: u8) {
        if self.stage != Stage::Hops(routers) {
            self.extend_to(routers);
        }
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
        let longest = self.probes.iter().filter_map(|probe| probe.answer.map(|(_, rtt)| rtt)).max();
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
            && sent_to < self.hops_max
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
        let (timeout, is_distance) = (self.timeout(), self.stage == Stage::Distance);
        let waiting = self.probes.iter().filter(|probe| probe.answer.is_none());
        let last = waiting.map(|probe| probe.sent_at + timeout).filter(|until| *until > drained).max();
        let next = match self.stage {
            Stage::Distance => Some(self.began + DISTANCE_TIMEOUT),
            Stage::Waves { sent_to, next_at } if sent_to < self.hops_max => Some(next_at),
            Stage::Hops(_) | Stage::Waves { .. } => None,
        };
        match (next, last) {
            (Some(next), Some(last)) if !is_distance => BurstStep::Wait(next.min(last)),
            (Some(next), _) => BurstStep::Wait(next),
            (None, Some(last)) => BurstStep::Wait(last),
            (None, None) => BurstStep::Complete,
        }
    }
}
