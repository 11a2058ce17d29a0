//! What the answers of routers and of the destination show.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::{SentProbe, Tracer};
use crate::echo::credible_turnaround;
use crate::machine::{Arrival, IcmpError, IcmpKind, SENT_TTL};
use crate::probe_budget::{Deferral, Expected};
use crate::time::{Timestamp, nanos};
use crate::trace::flow::DestinationReply;
use crate::trace::probe_match::authentic_reply;
use crate::trace::{
    Answer, AnswerExtensions, DESTINATION, Direction, Rejection, RejectionReason, TraceReport,
};
use crate::wire::{ReplyFate, ReverseOutcome, ReverseTrace, tlv};

impl Tracer {
    /// A router, or the destination's host, reports that a probe did not arrive.
    pub(super) fn error_received(
        &mut self,
        received: &[u8],
        arrival: &Arrival,
        icmp: &IcmpError,
    ) -> Option<()> {
        let (router, quoted) = (icmp.router, icmp.quotation(received));
        let sequence = match quoted.len() < self.quoted_bytes_min() {
            // Only the UDP header was quoted: the router tells which hop it was.
            true => self.waiting_for(arrival.flow, router)?,
            false => self.quoted(quoted)?,
        };
        // The host rejects the probe: a closed port, or a firewall.
        let rejects = self.spec.protocol.is_searching() && icmp.kind != IcmpKind::TtlExceeded;
        if rejects && router == self.spec.to.ip() {
            return self.destination_answered(sequence, arrival);
        }
        let is_of_agent = self.is_of_agent();
        let probe = self.probes.get_mut(&sequence).filter(|probe| probe.flow == arrival.flow)?;
        // The TTL of all other requests ends only in a loop, or because it was rewritten, at no hop of the
        // route.
        let is_limited = probe.direction == Direction::Forward && probe.ttl != DESTINATION;
        let has_ended = icmp.kind == IcmpKind::TtlExceeded && !is_limited && !probe.is_answered;
        if has_ended && probe.direction == Direction::Forward && is_of_agent {
            self.traced(Direction::Forward, arrival.flow)?.unlimited_ended(router);
            return Some(());
        }
        let rtt = arrival.at.since(probe.at);
        if let Some(reason) = RejectionReason::of(icmp) {
            // Of the way back, only the peer knows more.
            if probe.direction == Direction::Forward && !probe.is_answered {
                let ttl = probe.ttl;
                let limit = Some(ttl).filter(|_| is_limited);
                let rejection = Rejection { ttl: limit, address: router, reason, rtt };
                self.traced(Direction::Forward, arrival.flow)?.rejected(sequence, ttl, rejection, arrival.at);
                self.report(Direction::Forward, TraceReport::Rejected { flow: arrival.flow, rejection });
            }
            return Some(());
        }
        if icmp.kind != IcmpKind::TtlExceeded || !is_limited {
            return Some(());
        }
        if !probe.is_answered {
            self.spec.budget.lock().unwrap_or_else(PoisonError::into_inner).answered(probe.ttl, router);
        }
        let extensions = icmp.extensions(received).and_then(AnswerExtensions::read).map(Arc::new);
        self.router_answered(sequence, Answer { router, rtt, extensions }, arrival.at);
        Some(())
    }

    /// A router answered a probe. Only the first answer counts.
    fn router_answered(&mut self, sequence: u64, answer: Answer, at: Timestamp) {
        let Some(probe) = self.probes.get_mut(&sequence).filter(|probe| !probe.is_answered) else { return };
        probe.is_answered = true;
        let SentProbe { flow, direction, ttl, .. } = *probe;
        let report = TraceReport::Answered { flow, ttl, answer: answer.clone(), is_destination: false };
        self.report(direction, report);
        let Some(traced) = self.traced(direction, flow) else { return };
        if let Some(update) = traced.answered(sequence, ttl, answer, at) {
            self.report_route(direction, flow, update);
        }
    }

    /// The only unanswered probe of the flow to a hop at which the router has answered before.
    fn waiting_for(&self, flow: u8, router: IpAddr) -> Option<u64> {
        let expected = Expected::Router(router);
        let traced = self.forward.get(usize::from(flow))?;
        let mut found = self.probes.iter().filter(|(_, probe)| {
            let is_forward = probe.flow == flow && probe.direction == Direction::Forward;
            let is_waiting = is_forward && probe.is_sent && !probe.is_answered;
            is_waiting && traced.expected(probe.ttl, router.is_ipv4()) == Some(expected)
        });
        let (sequence, _) = found.next()?;
        found.next().is_none().then_some(*sequence)
    }

    /// The destination answered, without saying which way the probe took.
    fn plain_reply_received(&mut self, datagram: &[u8], arrival: &Arrival) -> Option<()> {
        let sequence = self.replied(datagram)?;
        self.destination_answered(sequence, arrival)
    }

    /// The same, to a known probe.
    fn destination_answered(&mut self, sequence: u64, arrival: &Arrival) -> Option<()> {
        let probe = self.probes.get_mut(&sequence).filter(|probe| probe.flow == arrival.flow)?;
        if std::mem::replace(&mut probe.is_answered, true) {
            return Some(());
        }
        let SentProbe { flow, direction, ttl, at: sent_at, .. } = *probe;
        let (from, rtt, at) = (arrival.from.ip(), arrival.at.since(sent_at), arrival.at);
        self.report_destination(direction, flow, ttl, Answer::new(from, rtt));
        let traced = self.traced(direction, flow)?;
        let reply = DestinationReply { sequence, sent_ttl: ttl, arrived_ttl: None, sent_at, at };
        traced.destination_answered(reply);
        if let Some(update) = traced.reached(sequence, ttl, from, rtt, None, at) {
            self.report_route(direction, flow, update);
        }
        Some(())
    }

    pub(super) fn reply_received(&mut self, datagram: &[u8], arrival: &Arrival) -> Option<()> {
        if self.spec.protocol.is_searching() {
            return self.plain_reply_received(datagram, arrival);
        }
        let mode = self.mode();
        let reply = authentic_reply(datagram, &self.spec)?;
        let reverse = tlv::walk(datagram, mode.base_bytes())
            .find(|found| found.kind == tlv::REVERSE_TRACE && found.is_understood())
            .and_then(|found| ReverseTrace::read(found.value(datagram)).ok())
            .filter(|reverse| reverse.is_reply);
        let sequence = self.replied(datagram)?;
        let probe = self.probes.get_mut(&sequence).filter(|probe| probe.flow == arrival.flow)?;
        if std::mem::replace(&mut probe.is_answered, true) {
            return Some(());
        }
        let SentProbe { flow, direction, ttl, at, .. } = *probe;
        let elapsed = arrival.at.since(at);
        let turnaround = credible_turnaround(reply.turnaround(), nanos(elapsed)).unwrap_or(0);
        let rtt = elapsed.saturating_sub(Duration::from_nanos(turnaround));
        let from = arrival.from.ip();
        let back = |sent: u8| sent.checked_sub(arrival.ttl?);
        let arrived_ttl = match direction {
            Direction::Forward => Some(reply.sender_ttl).filter(|ttl| *ttl > 0),
            Direction::Reverse => arrival.ttl,
        };
        // Other responders than agents may report anything.
        let arrived_ttl = arrived_ttl.filter(|_| self.is_of_agent());
        if let Some(reverse) = &reverse {
            self.outcomes_received(reverse, flow, arrival.at);
        }
        let routers = match direction {
            Direction::Forward => {
                if let (Some(_), Some(routers)) = (reverse, back(SENT_TTL)) {
                    self.begin_reverse(flow, routers, rtt, arrival.at);
                }
                // Some reflectors write 0 if they do not know it.
                ttl.checked_sub(reply.sender_ttl).filter(|_| reply.sender_ttl > 0)
            }
            Direction::Reverse => match reverse {
                Some(ReverseTrace { deferred: Some(time), .. }) if ttl != DESTINATION => {
                    self.report(direction, TraceReport::Withdrawn);
                    self.report(direction, TraceReport::Deferred(Deferral::Router));
                    if let Some(traced) = self.traced(direction, flow) {
                        traced.not_sent(sequence);
                        traced.retries_mut().reserve(ttl, arrival.at + time);
                    }
                    return Some(());
                }
                Some(_) => back(ttl),
                // Another responder has answered, which does not support it.
                None => {
                    self.report(direction, TraceReport::Withdrawn);
                    if let Some(traced) = self.traced(direction, flow) {
                        traced.not_sent(sequence);
                    }
                    return Some(());
                }
            },
        };
        self.report_destination(direction, flow, ttl, Answer::new(from, rtt));
        let Some(traced) = self.traced(direction, flow) else { return Some(()) };
        let (sent_ttl, sent_at) = (ttl, at);
        let at = arrival.at;
        traced.destination_answered(DestinationReply { sequence, sent_ttl, arrived_ttl, sent_at, at });
        if let Some(update) = traced.reached(sequence, ttl, from, rtt, routers, arrival.at) {
            self.report_route(direction, flow, update);
        }
        Some(())
    }

    /// The responder tells what became of replies with a limited TTL.
    fn outcomes_received(&mut self, reverse: &ReverseTrace, flow: u8, at: Timestamp) {
        for ReverseOutcome { sequence, fate } in reverse.outcomes.iter().flatten() {
            let Some(sequence) = self.extend(*sequence) else { continue };
            let Some(probe) = self.probes.get_mut(&sequence).filter(|probe| {
                let is_reverse = probe.flow == flow && probe.direction == Direction::Reverse;
                is_reverse && probe.ttl != DESTINATION && !probe.is_answered
            }) else {
                continue;
            };
            match *fate {
                ReplyFate::Wanted | ReplyFate::Unknown => {}
                ReplyFate::Unanswered => probe.is_reply_sent = true,
                ReplyFate::Answered { router, rtt } => {
                    let is_same_family = router.is_ipv4() == self.spec.to.is_ipv4();
                    // A longer RTT than the time until now cannot be true.
                    if is_same_family && rtt <= at.since(probe.at) {
                        self.router_answered(sequence, Answer::new(router, rtt), at);
                    }
                }
            }
        }
    }
}
