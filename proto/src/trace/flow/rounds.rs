//! Rounds in which every hop of a known route is probed once per interval.

use std::collections::VecDeque;
use std::time::Duration;

use crate::schedule::mix;
use crate::time::{Timestamp, nanos};
use crate::trace::burst::BurstProbe;

/// The rounds of one flow. The probes of a round are spread evenly over the interval.
#[derive(Debug)]
pub(super) struct Rounds {
    interval: Duration,
    seed: u64,
    /// The hops of the current round that were not probed yet, in the order of their probes.
    waiting: VecDeque<u8>,
    /// Number of hops of the current round.
    hops: u64,
    began: Timestamp,
    /// When the next round begins.
    next: Timestamp,
    /// The probes of the current round that left the host.
    probes: Vec<BurstProbe>,
    /// Number of rounds so far.
    count: u64,
}

/// Maximum delay of a probe in a round, in nanoseconds. At most a quarter of the time between two probes.
const JITTER_MAX: u64 = 1_000_000_000;

impl Rounds {
    /// The first round begins at `at`.
    pub(super) fn new(interval: Duration, seed: u64, at: Timestamp) -> Self {
        let (waiting, probes) = (VecDeque::new(), Vec::new());
        Self { interval, seed, waiting, hops: 0, began: at, next: at, probes, count: 0 }
    }

    /// Ends the current round, because a trace has probed all hops. The next round begins at `now`.
    pub(super) fn restart(&mut self, now: Timestamp) {
        self.clear();
        self.next = now;
    }

    /// Ends the current round.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.probes.clear();
    }

    /// Whether all probes of the round were sent and have become a trace.
    pub(super) fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.probes.is_empty()
    }

    /// Whether all probes of the round were sent.
    pub(super) fn is_sent(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Begins a round that probes the hops 1 to `routers`, and the destination with the TTL `destination`.
    pub(super) fn begin(&mut self, routers: u8, destination: u8, now: Timestamp) {
        self.count += 1;
        let is_late = now.since(self.next) > self.interval;
        self.began = if is_late { now } else { self.next };
        self.next = self.began + self.interval;
        let mut ttls: Vec<u8> = (1..=routers).collect();
        // The same order in every round, so that no hop waits longer than an interval.
        ttls.sort_by_key(|ttl| mix(self.seed ^ u64::from(*ttl)));
        ttls.push(destination);
        self.hops = u64::from(routers) + 1;
        self.waiting.extend(ttls);
    }

    /// The TTL of the next probe, or when it is due; [`Timestamp::NEVER`] if all were sent.
    pub(super) fn next(&mut self, now: Timestamp) -> Result<u8, Timestamp> {
        let Some(ttl) = self.waiting.front().copied() else { return Err(Timestamp::NEVER) };
        let index = self.hops - u64::try_from(self.waiting.len()).unwrap_or(self.hops).min(self.hops);
        let slot = nanos(self.interval) / self.hops;
        let jitter = mix(self.seed ^ mix(self.count ^ index << 32)) % (slot / 4).clamp(1, JITTER_MAX);
        let due = self.began + Duration::from_nanos(slot * index + jitter);
        if due > now {
            return Err(due);
        }
        self.waiting.pop_front();
        Ok(ttl)
    }

    /// A probe is on its way to the kernel.
    pub(super) fn queued(&mut self, probe: BurstProbe) {
        self.probes.push(probe);
    }

    /// A probe did not leave the host.
    pub(super) fn not_sent(&mut self, sequence: u64) {
        self.probes.retain(|probe| probe.sequence != sequence);
    }

    /// The probes of the round.
    pub(super) fn probes_mut(&mut self) -> &mut [BurstProbe] {
        &mut self.probes
    }

    /// When the probes of the round have waited long enough for answers.
    pub(super) fn ends(&self, answer_timeout: Duration) -> Timestamp {
        let last = self.probes.iter().map(|probe| probe.sent_at).max();
        last.map_or(Timestamp::NEVER, |last| last + answer_timeout)
    }

    /// Takes the probes of a complete round, and when it began; `None` while it is not complete. All answers
    /// that arrived before `drained` are known.
    pub(super) fn take_complete(
        &mut self,
        answer_timeout: Duration,
        drained: Timestamp,
    ) -> Option<(Vec<BurstProbe>, Timestamp)> {
        if !self.waiting.is_empty() || self.probes.is_empty() || self.ends(answer_timeout) > drained {
            return None;
        }
        let probes = std::mem::take(&mut self.probes);
        // Probes that confirm a change may come before the round.
        let first = probes.iter().map(|probe| probe.sent_at).min();
        Some((probes, first.map_or(self.began, |first| self.began.min(first))))
    }
}
