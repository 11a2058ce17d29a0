//! The side that asks, and decides.

use std::collections::VecDeque;

use super::absence::Absence;
use super::flow::{Drops, Flow, Purpose, ReplyMatch, ReplyTimes, RequestForm, VerdictRules};
use super::loss_evidence::{AnsweredRequest, LossEvidence, ResponderDrops};
use super::outcome::{Class, EchoReport, Mismatch, RoundTrip, Verdict};
use super::profile::Profile;
use super::reply::{ClaimedRequest, ReceivedReply};
use super::reply_extensions::ReplyExtensions;
use super::request::{self, RequestContents, RequestExtensions, mode};
use super::responder_kind::ResponderDetection;
use super::spec::{EchoSpec, WireFormat};
use crate::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine, NotSent, Now, SENT_TTL, Send, SendId, Step,
    TimestampSource,
};
use crate::schedule::{Schedule, mix};
use crate::stats::WindowedMinimum;
use crate::time::Timestamp;
use crate::wire::NtpTime;
use crate::wire::icmp;
use crate::wire::stamp::{self, Request};

/// Measures one path: sends on a grid, round-robin over its flows, and gives every datagram one verdict.
#[derive(Debug)]
pub struct Prober {
    spec: EchoSpec,
    schedule: Schedule,
    slots_left: u64,
    flows: Vec<Flow>,
    views: Vec<LossEvidence>,
    responder_drops: ResponderDrops,
    turn: usize,
    responder: ResponderDetection,
    minimum: WindowedMinimum,
    absence: Option<Absence>,
    stopping: bool,
    lossy_flows: u8,
    reports: VecDeque<EchoReport>,
}

impl Prober {
    /// A prober whose first slot lies within one interval after `at`.
    #[must_use]
    pub fn new(spec: EchoSpec, at: Timestamp) -> Self {
        let session = |index: u64| {
            #[expect(clippy::cast_possible_truncation, reason = "32 well-mixed bits are wanted")]
            let session = mix(spec.seed ^ mix(index + 1)) as u32;
            session
        };
        let numbered = spec.ssids.iter().zip(0_u8..);
        let flows: Vec<Flow> =
            numbered.map(|(ssid, index)| Flow::new(index, *ssid, session(index.into()), at)).collect();
        Self {
            schedule: Schedule::new(at, spec.interval, spec.seed),
            slots_left: spec.count.unwrap_or(u64::MAX),
            views: vec![LossEvidence::default(); flows.len()],
            responder_drops: ResponderDrops::default(),
            flows,
            turn: 0,
            responder: ResponderDetection::none(),
            minimum: WindowedMinimum::new(at),
            absence: None,
            stopping: false,
            lossy_flows: 0,
            reports: VecDeque::new(),
            spec,
        }
    }

    /// Whether the peer said goodbye and has not come back.
    #[must_use]
    pub fn is_draining(&self, now: Timestamp) -> bool {
        self.absence.is_some_and(|absence| absence.lasts(now))
    }

    /// What the responder was found to be, in a word for people; `None` while nothing came back, and always for ICMP, where
    /// nobody says what he is.
    #[must_use]
    pub fn responder(&self) -> Option<&'static str> {
        self.responder.word()
    }

    /// Whether a reply on `flow` answers a datagram of ours: for drivers that cannot tell by its session whose it is.
    #[must_use]
    pub fn has_asked(&self, reply: &[u8], flow: u8) -> bool {
        let (Some(ClaimedRequest { sequence, timestamp }), Some(flow)) =
            (ClaimedRequest::claimed(reply, &self.spec), self.flows.get(usize::from(flow)))
        else {
            return false;
        };
        flow.extend(sequence).is_some_and(|sequence| flow.has_sent(sequence, timestamp))
    }

    fn rules(&self) -> VerdictRules {
        // Half the bitmap's reach, so that the report that counts still covers the datagram.
        let reach = self.spec.interval.saturating_mul(64 * u32::try_from(self.flows.len()).unwrap_or(16));
        VerdictRules {
            late_after: self.spec.late_after,
            lost_after: self.spec.lost_after,
            horizon: (self.spec.late_after / 4).min(reach),
            tx_timestamps: self.spec.tx_timestamps,
            absence: self.absence,
        }
    }

    fn send(&mut self, now: Now, arena: &mut Vec<u8>) -> Option<Send> {
        let index = self.turn;
        self.turn = (self.turn + 1) % self.flows.len();
        if !self.flows[index].has_room() {
            self.reports.push_back(EchoReport::Unsent(1));
            return None;
        }
        let flow = &mut self.flows[index];
        let (sequence, sent) = flow.upcoming();
        #[expect(clippy::cast_possible_truncation, reason = "the wire carries the low half")]
        let on_the_wire = sequence as u32;
        let at = now.wall.wall(now.at);
        let (timestamp, carries, purpose) = match &self.spec.wire {
            WireFormat::Stamp { keys, quirks } => {
                let (extensions, purpose) = match quirks.profile {
                    Profile::Detect => self.responder.address(sequence, now.at),
                    Profile::Stamp => (RequestExtensions::ClassOfService, Purpose::Measure),
                    Profile::Plain | Profile::TwampLight => (RequestExtensions::None, Purpose::Measure),
                };
                let contents = RequestContents {
                    mode: mode(keys.as_ref()),
                    sequence: on_the_wire,
                    at,
                    ssid: if quirks.profile == Profile::TwampLight { 0 } else { flow.ssid },
                    flow: flow.index,
                    session: flow.session,
                    sent,
                    is_brief: false,
                    dscp: self.spec.dscp.value(),
                    size: self.spec.size,
                    extensions,
                };
                let wire = request::encode(&contents, keys.as_ref().map(|keys| keys.current()), arena);
                let carries =
                    if wire.carries_session { RequestForm::WithSession } else { RequestForm::WithoutSession };
                (wire.timestamp, carries, purpose)
            }
            WireFormat::Icmp => {
                let (session, timestamp, ssid) = (flow.session, NtpTime::from(at), flow.ssid);
                let echo = icmp::IcmpEcho { session, timestamp, sequence: on_the_wire, ssid };
                let size = self.spec.size.unwrap_or(icmp::IcmpEcho::BYTES);
                echo.encode(icmp::IcmpVersion::of(self.spec.to.ip()), size, arena);
                (timestamp, RequestForm::WithoutSession, Purpose::Measure)
            }
        };
        let sequence = flow.push(now.at, timestamp, carries, purpose);
        Some(Send {
            id: send_id(flow.index, sequence),
            flow: flow.index,
            from: None,
            to: self.spec.to,
            tos: self.spec.dscp.tos(),
            ttl: SENT_TTL,
            dont_fragment: false,
            segment: None,
            timestamp: self.spec.tx_timestamps,
        })
    }

    fn reply(&mut self, datagram: &[u8], arrival: &Arrival) -> Result<(), Mismatch> {
        let heard = ReceivedReply::read(datagram, &self.spec)?;
        let rules = self.rules();
        let index = usize::from(arrival.flow);
        let flow = self.flows.get_mut(index).ok_or(Mismatch::Unsolicited)?;
        if !heard.is_of(flow) {
            return Err(Mismatch::Unsolicited);
        }
        let ClaimedRequest { sequence, timestamp } = heard.answered();
        let sequence = flow.extend(sequence).ok_or(Mismatch::Unsolicited)?;
        let sent = match flow.fit(sequence, timestamp, arrival.at, &rules) {
            ReplyMatch::Answer { sent } => sent,
            ReplyMatch::Duplicate => {
                if let ReceivedReply::Stamp(base, _) = &heard {
                    self.views[index].heard_again(base.sequence, arrival.at);
                }
                self.reports.push_back(EchoReport::Duplicate);
                return Ok(());
            }
            ReplyMatch::VeryLate => {
                self.reports.push_back(EchoReport::VeryLate);
                return Ok(());
            }
            ReplyMatch::Unsolicited => return Err(Mismatch::Unsolicited),
        };
        if let Some(absence) = &mut self.absence {
            absence.answered(sent);
        }
        let asked = AnsweredRequest { sequence, sent, heard: arrival.at };
        match &heard {
            ReceivedReply::Stamp(base, told) => self.reflected(&asked, base, told, arrival),
            ReceivedReply::Icmp(_) => {
                let reply = ReplyTimes { at: arrival.at, turnaround: 0, sample: RoundTrip::bare(arrival.by) };
                let rules = self.rules();
                self.flows[index].answer(sequence, reply, &rules, &mut self.reports);
            }
        }
        Ok(())
    }

    /// Takes the answer of a reflector, and what it tells of others.
    fn reflected(
        &mut self,
        asked: &AnsweredRequest,
        base: &stamp::Reply,
        told: &ReplyExtensions,
        arrival: &Arrival,
    ) {
        let index = usize::from(arrival.flow);
        let is_ours = self.responder.recognise(told, arrival.at);
        let sample = self.sample(base, told, arrival, is_ours);
        let reply = ReplyTimes { at: arrival.at, turnaround: base.turnaround(), sample };
        let rules = self.rules();
        self.flows[index].answer(asked.sequence, reply, &rules, &mut self.reports);
        let (view, flow) = (&mut self.views[index], &mut self.flows[index]);
        match told.session {
            Some(session) => {
                view.learn_from_ours(flow, asked, &session, &rules);
                self.responder_drops.learn(asked.sent, arrival.at, session.host_drops, &rules);
            }
            None if is_ours => {}
            None => view.learn_from_foreign(flow, asked, base.sequence, &rules),
        }
        if let Some(lag) = view.follow_up(base.sequence, base.sent(), told.follow_up) {
            self.reports.push_back(EchoReport::TransmitLag(lag));
        }
    }

    fn sample(
        &self,
        base: &stamp::Reply,
        told: &ReplyExtensions,
        arrival: &Arrival,
        is_ours: bool,
    ) -> RoundTrip {
        let hops = |ttl: u8| SENT_TTL.checked_sub(ttl).filter(|_| ttl > 0 && is_ours);
        let dscp = self.spec.dscp.value();
        RoundTrip {
            hops_forward: hops(base.sender_ttl),
            hops_reverse: arrival.ttl.and_then(hops),
            class_forward: told
                .class
                .map(|class| Class { is_remarked: class.received != dscp, is_congested: class.ecn == 3 }),
            class_reverse: arrival
                .tos
                .filter(|_| told.class.is_some())
                .map(|tos| Class { is_remarked: tos >> 2 != dscp, is_congested: tos & 3 == 3 }),
            ..RoundTrip::bare(arrival.by)
        }
    }

    fn complaint(&mut self, quoted: &[u8], arrival: &Arrival, icmp: &IcmpError) {
        self.reports.push_back(EchoReport::Icmp(icmp.kind));
        let is_on_the_way = match icmp.kind {
            IcmpKind::Unreachable | IcmpKind::Prohibited | IcmpKind::TooBig | IcmpKind::TtlExceeded => true,
            // The host answered: the network carried the datagram, and nobody listened.
            IcmpKind::PortUnreachable | IcmpKind::Other => false,
        };
        // Routers' words would be all the evidence there is of hosts that answer ICMP, and all of it forward.
        let WireFormat::Stamp { keys, .. } = &self.spec.wire else { return };
        let request = Request::decode(quoted, mode(keys.as_ref()));
        if let (true, Ok(request), Some(flow)) =
            (is_on_the_way, request, self.flows.get_mut(usize::from(arrival.flow)))
            && let Some(sequence) = flow.extend(request.sequence)
        {
            flow.refused_on_the_way(sequence, request.timestamp);
        }
    }

    /// Completes what a report says with what only the path as a whole knows.
    fn complete(&mut self, mut report: EchoReport, now: Timestamp) -> EchoReport {
        if let EchoReport::Decided { verdict, sample, .. } = &mut report {
            match (*verdict, sample) {
                (Verdict::Ok, Some(sample)) => {
                    sample.minimum = self.minimum.add(now, sample.rtt);
                    sample.variation = sample.rtt - sample.minimum;
                }
                (Verdict::Lost(_), _) => self.responder.gave_up(),
                (Verdict::Ok | Verdict::Late | Verdict::HostDropped | Verdict::Withdrawn, _) => {}
            }
        }
        report
    }

    fn lossy_flows_changed(&mut self) -> Option<EchoReport> {
        let lossy = self.flows.iter().filter(|flow| flow.loss.is_lossy()).count();
        let lossy = u8::try_from(lossy).unwrap_or(u8::MAX);
        if std::mem::replace(&mut self.lossy_flows, lossy) == lossy {
            return None;
        }
        Some(EchoReport::LossyFlows(lossy))
    }
}

impl Machine for Prober {
    type Report = EchoReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        if let Some(icmp) = &arrival.icmp {
            self.complaint(datagram, arrival, icmp);
        } else if let Err(mismatch) = self.reply(datagram, arrival) {
            self.reports.push_back(EchoReport::Mismatched(mismatch));
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        let rules = self.rules();
        let (index, sequence) = split(id);
        let Some(flow) = self.flows.get_mut(index) else { return };
        flow.sent(sequence, at, by, &mut self.reports);
        if by == TimestampSource::Kernel {
            flow.release(sequence, &rules, &mut self.reports);
        }
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        let (index, sequence) = split(id);
        if let Some(flow) = self.flows.get_mut(index) {
            flow.not_sent(sequence, why, &mut self.reports);
        }
    }

    fn stop(&mut self) {
        self.stopping = true;
    }

    fn withdraw(&mut self) {
        let rules = self.rules();
        for flow in &mut self.flows {
            flow.withdraw(&rules, &mut self.reports);
        }
    }

    /// What the peer did not answer by `at`, and what is sent until it answers something that was sent later, or for a
    /// minute, is withdrawn and not lost.
    fn peer_leaving(&mut self, at: Timestamp) {
        self.absence = Some(Absence::begin(at, self.absence));
    }

    fn in_flight(&self) -> usize {
        self.flows.iter().map(Flow::in_flight).sum()
    }

    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<EchoReport> {
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(self.complete(report, now.at));
        }
        let rules = self.rules();
        for flow in &mut self.flows {
            let mut drops = Drops { here: drops, there: &mut self.responder_drops.ledger };
            flow.expire(now.drained, &rules, &mut drops, &mut self.reports);
        }
        if let Some(report) = self.reports.pop_front().or_else(|| self.lossy_flows_changed()) {
            return Step::Report(self.complete(report, now.at));
        }
        while !self.stopping && self.slots_left > 0 && self.schedule.next() <= now.at {
            let due = self.schedule.take(now.at);
            let skipped = due.skipped.min(self.slots_left);
            self.slots_left -= skipped;
            if skipped > 0 {
                self.reports.push_back(EchoReport::Unsent(skipped));
            }
            if due.slot.is_none() || self.slots_left == 0 {
                break;
            }
            self.slots_left -= 1;
            if let Some(send) = self.send(now, arena) {
                return Step::Send(send);
            }
        }
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        let is_over = self.stopping || self.slots_left == 0;
        if is_over && self.flows.iter().all(Flow::is_settled) {
            return Step::Finished;
        }
        let next = if is_over { Timestamp::NEVER } else { self.schedule.next() };
        let deadline = self.flows.iter().map(|flow| flow.deadline(&rules)).min();
        Step::Wait(next.min(deadline.unwrap_or(Timestamp::NEVER)))
    }
}

fn send_id(flow: u8, sequence: u64) -> SendId {
    SendId(u64::from(flow) << FLOW_SHIFT | sequence)
}

fn split(id: SendId) -> (usize, u64) {
    let sequence = id.0 & ((1 << FLOW_SHIFT) - 1);
    (usize::try_from(id.0 >> FLOW_SHIFT).unwrap_or(usize::MAX), sequence)
}

/// Sequence numbers stay below 2⁵⁶: two million years at 1,000/s.
const FLOW_SHIFT: u32 = 56;
