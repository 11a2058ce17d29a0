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
use crate::wire::{NtpTime, ReverseAnswer, ReverseTrace};

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
    /// In how many replies the answer was passed on.
    pub(super) reported: u8,
}

/// Number of replies with a limited TTL that are kept. At the limit the oldest is discarded: the prober takes
/// its hop for one that did not answer. Chosen: 20 s of what the agent may send.
const PROBES_MAX: usize = 1_024;

/// Number of reserved tokens. At the limit the one that was reserved first is given up: its prober is told to
/// wait again. Chosen: 20 s of what the agent may send.
const TURNS_MAX: usize = 1_024;

/// A prober that asks this much before its turn is not sent away again.
const EARLY_MAX: Duration = Duration::from_millis(100);

/// How long an answer of a router is waited for and kept: as long as the prober waits.
const AGE_MAX: Duration = Duration::from_secs(5);

/// In how many replies an answer is passed on, because any of them may be lost.
const REPORTS_MAX: u8 = 3;

impl ReverseProbes {
    pub(super) fn new(budget: Arc<Mutex<ProbeBudget>>) -> Self {
        Self { probes: VecDeque::new(), turns: VecDeque::new(), budget }
    }

    /// Answers a request's extension: with a limited TTL, if the router that is expected there may be asked
    /// now, or with the answers to earlier replies.
    pub(super) fn reply(
        &mut self,
        asked: &ReverseTrace,
        session: SessionKey,
        is_v4: bool,
        now: Timestamp,
    ) -> ReverseTrace {
        let reply = ReverseTrace { is_reply: true, ..*asked };
        if asked.ttl == 0 {
            return ReverseTrace { answers: self.answers(session, now), ..reply };
        }
        let expected = asked.expected.map_or(Expected::Unknown { ttl: asked.ttl, is_v4 }, Expected::Router);
        let deferred = self.deferral(session, asked.ttl, expected, now);
        ReverseTrace { deferred, answers: [None; ReverseTrace::ANSWERS], ..reply }
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
        let known = self.turns.iter().position(|turn| turn.session == session && turn.ttl == ttl);
        let at = match known.map(|index| self.turns[index].at) {
            Some(at) => at,
            None => self.budget().reserve(expected, now).0,
        };
        let is_due = at <= now + EARLY_MAX;
        match (known, is_due) {
            (Some(index), true) => {
                self.turns.remove(index);
            }
            (None, false) => {
                if self.turns.len() == TURNS_MAX {
                    self.turns.pop_front();
                }
                self.turns.push_back(Turn { session, ttl, at });
            }
            (Some(_), false) | (None, true) => {}
        }
        (!is_due).then(|| at.since(now))
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
    /// including its T3, which nobody off the path knows.
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

    /// Takes the answers for the next reply of a session: those passed on least, and of these the oldest.
    fn answers(
        &mut self,
        session: SessionKey,
        now: Timestamp,
    ) -> [Option<ReverseAnswer>; ReverseTrace::ANSWERS] {
        let is_due = |probe: &ReverseProbe| {
            let is_fresh = now.since(probe.at) <= AGE_MAX && probe.reported < REPORTS_MAX;
            probe.session == session && probe.answer.is_some() && is_fresh
        };
        let mut due: Vec<&mut ReverseProbe> = self.probes.iter_mut().filter(|probe| is_due(probe)).collect();
        due.sort_by_key(|probe| probe.reported);
        let mut due = due.into_iter();
        std::array::from_fn(|_| {
            let probe = due.next()?;
            probe.reported += 1;
            let (router, rtt) = probe.answer?;
            Some(ReverseAnswer { sequence: probe.request, router, rtt })
        })
    }
}
