//! Replies whose TTL ends at a router on the way back, for the prober's trace of that way.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::super::sessions::SessionKey;
use crate::machine::SendId;
use crate::probe_budget::{Expected, ProbeBudget};
use crate::time::Timestamp;
use crate::wire::stamp::{self, Mode};
use crate::wire::{NtpTime, ReplyFate, ReverseOutcome, ReverseTrace};

/// The replies with a limited TTL that routers may still answer, oldest first, and their answers.
#[derive(Debug)]
pub(super) struct ReverseProbes {
    probes: VecDeque<ReverseProbe>,
    turns: VecDeque<Turn>,
    budget: Arc<Mutex<ProbeBudget>>,
}

/// A token that was reserved for a prober, which was told to ask again at that time.
#[derive(Debug, Clone, Copy)]
struct Turn {
    session: SessionKey,
    ttl: u8,
    at: Timestamp,
}

/// A reply with a limited TTL.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReverseProbe {
    pub(super) session: SessionKey,
    pub(super) to: SocketAddr,
    pub(super) mode: Mode,
    pub(super) id: SendId,
    pub(super) ttl: u8,
    /// Sequence number of the reply.
    pub(super) sequence: u32,
    /// Sequence number of its request.
    pub(super) request: u32,
    /// T3, with which routers quote the reply.
    pub(super) timestamp: NtpTime,
    /// When it left the host.
    pub(super) at: Timestamp,
    pub(super) answer: Option<(IpAddr, Duration)>,
}

/// Number of replies with a limited TTL that are kept. At the limit the oldest is discarded: the prober takes
/// its hop for one that did not answer. Chosen: 20 s of what the agent may send.
const PROBES_MAX: usize = 1_024;

/// Number of reserved tokens. At the limit further probers have to wait without one. Chosen: more than
/// become valid within the horizon of the budget.
const TURNS_MAX: usize = 1_024;

/// A prober that asks this much before its turn is not sent away again.
const EARLY_MAX: Duration = Duration::from_millis(100);

/// How long an answer of a router is waited for and kept: as long as the prober waits.
const AGE_MAX: Duration = Duration::from_secs(5);

/// Largest TTL that a reply is limited to: the largest `hops_max`.
const TTL_MAX: u8 = 64;

impl ReverseProbes {
    pub(super) fn new(budget: Arc<Mutex<ProbeBudget>>) -> Self {
        Self { probes: VecDeque::new(), turns: VecDeque::new(), budget }
    }

    /// Answers a request's extension: with a limited TTL, if the router that is expected there may be asked
    /// now, or with what became of earlier replies. `None` if it asks for something that does not exist.
    pub(super) fn reply(
        &mut self,
        asked: &ReverseTrace,
        session: SessionKey,
        is_v4: bool,
        now: Timestamp,
    ) -> Option<ReverseTrace> {
        let reply = ReverseTrace { is_reply: true, ..*asked };
        match asked.ttl {
            0 => {
                let wanted = asked.outcomes.map(|outcome| Some(outcome?.sequence));
                let outcomes = wanted.map(|sequence| self.outcome(session, sequence?, now));
                Some(ReverseTrace { outcomes, ..reply })
            }
            1..=TTL_MAX => {
                // The prober may name any router; only one that has answered this agent is believed.
                let known = asked.expected.filter(|router| self.budget().knows(*router));
                let expected = known.map_or(Expected::Unknown { ttl: asked.ttl, is_v4 }, Expected::Router);
                let deferred = self.deferral(session, asked.ttl, expected, now);
                Some(ReverseTrace { deferred, outcomes: [None; ReverseTrace::OUTCOMES], ..reply })
            }
            _ => None,
        }
    }

    /// What became of the reply to a request of a session.
    fn outcome(&self, session: SessionKey, sequence: u32, now: Timestamp) -> Option<ReverseOutcome> {
        let is_meant = |probe: &&ReverseProbe| {
            probe.session == session && probe.request == sequence && now.since(probe.at) <= AGE_MAX
        };
        let fate = match self.probes.iter().rev().find(is_meant).map(|probe| probe.answer) {
            Some(Some((router, rtt))) => ReplyFate::Answered { router, rtt },
            Some(None) => ReplyFate::Unanswered,
            None => ReplyFate::Unknown,
        };
        Some(ReverseOutcome { sequence, fate })
    }

    /// How long the prober has to wait until the router may be asked; `None`: not at all. Probers wait in the
    /// same queue as the agent's own traces, so each gets its turn.
    fn deferral(
        &mut self,
        session: SessionKey,
        ttl: u8,
        expected: Expected,
        now: Timestamp,
    ) -> Option<Duration> {
        self.turns.retain(|turn| now.since(turn.at) <= AGE_MAX);
        if let Some(index) = self.turns.iter().position(|turn| turn.session == session && turn.ttl == ttl) {
            let at = self.turns[index].at;
            if at > now + EARLY_MAX {
                return Some(at.since(now));
            }
            self.turns.remove(index);
            return None;
        }
        if self.turns.len() == TURNS_MAX {
            return Some(ProbeBudget::HORIZON);
        }
        let reserved = self.budget().reserve_for_other(expected, now);
        match reserved {
            Ok(at) if at <= now + EARLY_MAX => None,
            Ok(at) => {
                self.turns.push_back(Turn { session, ttl, at });
                Some(at.since(now))
            }
            Err(at) => Some(at.since(now)),
        }
    }

    fn budget(&self) -> std::sync::MutexGuard<'_, ProbeBudget> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&mut self, probe: ReverseProbe) {
        if self.probes.len() == PROBES_MAX {
            self.probes.pop_front();
        }
        self.probes.push_back(probe);
    }

    /// The reply leaves with this T3.
    pub(super) fn leaving(&mut self, id: SendId, timestamp: NtpTime) {
        if let Some(probe) = self.latest(id) {
            probe.timestamp = timestamp;
        }
    }

    /// The reply left the host at that time.
    pub(super) fn sent(&mut self, id: SendId, at: Timestamp) {
        if let Some(probe) = self.latest(id) {
            probe.at = at;
        }
    }

    fn latest(&mut self, id: SendId) -> Option<&mut ReverseProbe> {
        self.probes.iter_mut().rev().find(|probe| probe.id == id)
    }

    /// A router reports that the TTL of a datagram to `to` ended. It is accepted only if it quotes a reply
    /// including its T3, which is known only on the path.
    pub(super) fn expired(&mut self, quoted: &[u8], to: SocketAddr, router: IpAddr, at: Timestamp) {
        let is_quoted = |probe: &ReverseProbe| {
            let found = stamp::quoted_packet(quoted, probe.mode);
            probe.to == to && found == Some((probe.sequence, Some(probe.timestamp)))
        };
        let Some(probe) = self.probes.iter_mut().rev().find(|probe| is_quoted(probe)) else { return };
        if probe.answer.is_none() && at.since(probe.at) <= AGE_MAX {
            probe.answer = Some((router, at.since(probe.at)));
            let ttl = probe.ttl;
            self.budget().answered(ttl, router);
        }
    }
}
