//! The sending side of echo measurements over datagrams.

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

/// Measures one path: sends on a schedule, round-robin over its flows, and decides the verdict of every
/// datagram.
///
/// # Examples
///
/// A prober and a responder that exchange datagrams through memory, 5 ms in each direction:
///
/// ```
/// use std::time::Duration;
///
/// use pathmeter_proto::admission::Policy;
/// use pathmeter_proto::dscp::Dscp;
/// use pathmeter_proto::echo::{
///     EchoReport, EchoSpec, Prober, Quirks, StampResponder, Verdict, WireFormat,
/// };
/// use pathmeter_proto::machine::{Arrival, HostDrops, Machine, Now, Step, TimestampSource};
/// use pathmeter_proto::time::{Timestamp, WallOffset, WallTime};
///
/// let spec = EchoSpec {
///     to: ([192, 0, 2, 2], 862).into(),
///     wire: WireFormat::Stamp { keys: None, quirks: Quirks::default() },
///     interval: Duration::from_millis(100),
///     ssids: vec![1],
///     size: None,
///     dscp: Dscp::DEFAULT,
///     late_after: Duration::from_secs(1),
///     lost_after: Duration::from_secs(3),
///     tx_timestamps: false,
///     count: Some(3),
///     seed: 1,
/// };
/// let policy = Policy { open: true, rate: 1_000, rate_per_source: 1_000, ..Policy::default() };
/// let mut at = Timestamp::from_nanos(1_000_000_000);
/// let mut prober = Prober::new(spec, at);
/// let mut responder = StampResponder::new(policy, None, 16);
///
/// let wall = WallOffset::between(at, WallTime::from_nanos(1_767_225_600_000_000_000));
/// let now = |at| Now { at, drained: at, wall };
/// let arrival = |at, from: ([u8; 4], u16)| Arrival {
///     at,
///     by: TimestampSource::Kernel,
///     from: from.into(),
///     to: None,
///     flow: 0,
///     ttl: Some(255),
///     tos: Some(0),
///     icmp: None,
/// };
/// let delay = Duration::from_millis(5);
/// let mut drops = HostDrops::default();
/// let mut round_trips = Vec::new();
/// loop {
///     let mut request = Vec::new();
///     match prober.step(now(at), &mut drops, &mut request) {
///         Step::Send(send) => {
///             prober.sent(send.id, at, TimestampSource::User);
///             at = at + delay;
///             responder.received(&request, &arrival(at, ([192, 0, 2, 1], 40_000)));
///             let mut reply = Vec::new();
///             while let Step::Send(_) | Step::Report(_) =
///                 responder.step(now(at), &mut HostDrops::default(), &mut reply)
///             {}
///             at = at + delay;
///             prober.received(&reply, &arrival(at, ([192, 0, 2, 2], 862)));
///         }
///         Step::Report(EchoReport::Decided { verdict, sample, .. }) => {
///             assert_eq!(verdict, Verdict::Ok);
///             round_trips.extend(sample.map(|sample| sample.rtt));
///         }
///         Step::Report(_) => {}
///         Step::Wait(until) => at = until,
///         Step::Finished => break,
///     }
/// }
/// assert_eq!(round_trips, [2 * delay; 3]);
/// assert_eq!(prober.responder(), Some("pathmeter"));
/// ```
#[derive(Debug)]
pub struct Prober {
    spec: EchoSpec,
    schedule: Schedule,
    slots_left: u64,
    flows: Vec<Flow>,
    evidence: Vec<LossEvidence>,
    responder_drops: ResponderDrops,
    next_flow: usize,
    responder: ResponderDetection,
    minimum: WindowedMinimum,
    absence: Option<Absence>,
    is_stopping: bool,
    lossy_flows: u8,
    reports: VecDeque<EchoReport>,
}

impl Prober {
    /// A prober that starts at `at`; see [`Schedule::new`] for its first slot. `spec` must have at least one
    /// SSID.
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
            evidence: vec![LossEvidence::default(); flows.len()],
            responder_drops: ResponderDrops::default(),
            flows,
            next_flow: 0,
            responder: ResponderDetection::none(),
            minimum: WindowedMinimum::new(at),
            absence: None,
            is_stopping: false,
            lossy_flows: 0,
            reports: VecDeque::new(),
            spec,
        }
    }

    /// Whether the peer said goodbye and is not back yet.
    #[must_use]
    pub fn is_draining(&self, now: Timestamp) -> bool {
        self.absence.is_some_and(|absence| absence.lasts(now))
    }

    /// Kind of the responder, for display: `pathmeter`, `stamp` or `twamp-light`. `None` before the first
    /// reply, and always for ICMP, where the reply does not show it.
    #[must_use]
    pub fn responder(&self) -> Option<&'static str> {
        self.responder.name()
    }

    /// Whether `reply`, received on `flow`, answers a datagram of this prober: for drivers that cannot tell
    /// this from the session identifier. The reply is not authenticated.
    #[must_use]
    pub fn owns_reply(&self, reply: &[u8], flow: u8) -> bool {
        let (Some(ClaimedRequest { sequence, timestamp }), Some(flow)) =
            (ClaimedRequest::read_unverified(reply, &self.spec), self.flows.get(usize::from(flow)))
        else {
            return false;
        };
        flow.extend(sequence).is_some_and(|sequence| flow.has_sent(sequence, timestamp))
    }

    fn rules(&self) -> VerdictRules {
        // At most half of what the bitmap covers, so that a report that counts still covers the datagram.
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
        let index = self.next_flow;
        self.next_flow = (self.next_flow + 1) % self.flows.len();
        if !self.flows[index].has_room() {
            self.reports.push_back(EchoReport::Unsent(1));
            return None;
        }
        let flow = &mut self.flows[index];
        let (sequence, sent) = flow.upcoming();
        #[expect(clippy::cast_possible_truncation, reason = "the wire carries the low half")]
        let wire_sequence = sequence as u32;
        let at = now.wall.wall(now.at);
        let (timestamp, carries, purpose) = match &self.spec.wire {
            WireFormat::Stamp { keys, quirks } => {
                let (extensions, purpose) = match quirks.profile {
                    Profile::Detect => self.responder.next_request(sequence, now.at),
                    Profile::Stamp => (RequestExtensions::ClassOfService, Purpose::Measure),
                    Profile::Plain | Profile::TwampLight => (RequestExtensions::None, Purpose::Measure),
                };
                let contents = RequestContents {
                    mode: mode(keys.as_ref()),
                    sequence: wire_sequence,
                    at,
                    ssid: if quirks.profile == Profile::TwampLight { 0 } else { flow.ssid },
                    flow: flow.index,
                    session: flow.session,
                    sent,
                    is_brief: false,
                    dscp: self.spec.dscp.value(),
                    size: self.spec.size,
                    extensions,
                    reverse: None,
                };
                let wire = request::encode(&contents, keys.as_ref().map(|keys| keys.current()), arena);
                let carries =
                    if wire.carries_session { RequestForm::WithSession } else { RequestForm::WithoutSession };
                (wire.timestamp, carries, purpose)
            }
            WireFormat::Icmp => {
                let (session, timestamp, ssid) = (flow.session, NtpTime::from(at), flow.ssid);
                let echo = icmp::IcmpEcho { session, timestamp, sequence: wire_sequence, ssid };
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

    fn reply_received(&mut self, datagram: &[u8], arrival: &Arrival) -> Result<(), Mismatch> {
        let reply = ReceivedReply::read(datagram, &self.spec)?;
        let rules = self.rules();
        let index = usize::from(arrival.flow);
        let flow = self.flows.get_mut(index).ok_or(Mismatch::Unsolicited)?;
        if !reply.belongs_to(flow) {
            return Err(Mismatch::Unsolicited);
        }
        let ClaimedRequest { sequence, timestamp } = reply.request();
        let sequence = flow.extend(sequence).ok_or(Mismatch::Unsolicited)?;
        let sent = match flow.match_reply(sequence, timestamp, arrival.at, &rules) {
            ReplyMatch::Answer { sent } => sent,
            ReplyMatch::Duplicate => {
                if let ReceivedReply::Stamp(base, _) = &reply {
                    self.evidence[index].duplicate_reply(base.sequence, arrival.at);
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
        let request = AnsweredRequest { sequence, sent, received: arrival.at };
        match &reply {
            ReceivedReply::Stamp(base, extensions) => {
                self.reflector_replied(&request, base, extensions, arrival)
            }
            ReceivedReply::Icmp(_) => {
                let times =
                    ReplyTimes { at: arrival.at, turnaround: 0, sample: RoundTrip::empty(arrival.by) };
                let rules = self.rules();
                self.flows[index].accept_reply(sequence, times, &rules, &mut self.reports);
            }
        }
        Ok(())
    }

    /// Takes the reply of a reflector, and its evidence about other datagrams.
    fn reflector_replied(
        &mut self,
        request: &AnsweredRequest,
        base: &stamp::Reply,
        extensions: &ReplyExtensions,
        arrival: &Arrival,
    ) {
        let index = usize::from(arrival.flow);
        let is_agent = self.responder.update(extensions, arrival.at);
        let sample = self.sample(base, extensions, arrival, is_agent);
        let times = ReplyTimes { at: arrival.at, turnaround: base.turnaround(), sample };
        let rules = self.rules();
        self.flows[index].accept_reply(request.sequence, times, &rules, &mut self.reports);
        let (evidence, flow) = (&mut self.evidence[index], &mut self.flows[index]);
        match extensions.session {
            Some(session) => {
                evidence.add_session_record(flow, request, &session, &rules);
                self.responder_drops.add(request.sent, arrival.at, session.host_drops, &rules);
            }
            None if is_agent => {}
            None => evidence.add_reply_number(flow, request, base.sequence, &rules),
        }
        if let Some(lag) = evidence.follow_up(base.sequence, base.sent(), extensions.follow_up) {
            self.reports.push_back(EchoReport::TransmitLag(lag));
        }
    }

    fn sample(
        &self,
        base: &stamp::Reply,
        extensions: &ReplyExtensions,
        arrival: &Arrival,
        is_agent: bool,
    ) -> RoundTrip {
        let hops = |ttl: u8| SENT_TTL.checked_sub(ttl).filter(|_| ttl > 0 && is_agent);
        let dscp = self.spec.dscp.value();
        RoundTrip {
            responder_received: Some(base.responder_received()),
            hops_forward: hops(base.sender_ttl),
            hops_reverse: arrival.ttl.and_then(hops),
            class_forward: extensions
                .class
                .map(|class| Class { is_remarked: class.received != dscp, is_congested: class.ecn == 3 }),
            class_reverse: arrival
                .tos
                .filter(|_| extensions.class.is_some())
                .map(|tos| Class { is_remarked: tos >> 2 != dscp, is_congested: tos & 3 == 3 }),
            ..RoundTrip::empty(arrival.by)
        }
    }

    fn icmp_error(&mut self, quoted: &[u8], arrival: &Arrival, icmp: &IcmpError) {
        self.reports.push_back(EchoReport::Icmp(icmp.kind));
        let is_router_drop = match icmp.kind {
            IcmpKind::Unreachable | IcmpKind::Prohibited | IcmpKind::TooBig | IcmpKind::TtlExceeded => true,
            // The host answered: the network delivered the datagram to a closed port.
            IcmpKind::PortUnreachable | IcmpKind::Other => false,
        };
        // With ICMP hosts, router errors would be the only evidence, and all of it forward.
        let WireFormat::Stamp { keys, .. } = &self.spec.wire else { return };
        let quoted = Request::decode(quoted, mode(keys.as_ref()));
        if let (true, Ok(request), Some(flow)) =
            (is_router_drop, quoted, self.flows.get_mut(usize::from(arrival.flow)))
            && let Some(sequence) = flow.extend(request.sequence)
        {
            flow.dropped_by_router(sequence, request.timestamp);
        }
    }

    /// Adds to a report what only the path as a whole knows.
    fn complete(&mut self, mut report: EchoReport, now: Timestamp) -> EchoReport {
        if let EchoReport::Decided { verdict, sample, .. } = &mut report {
            match (*verdict, sample) {
                (Verdict::Ok, Some(sample)) => {
                    sample.minimum = self.minimum.add(now, sample.rtt);
                    sample.variation = sample.rtt - sample.minimum;
                }
                (Verdict::Lost(_), _) => self.responder.lost(),
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
            self.icmp_error(icmp.quotation(datagram), arrival, icmp);
        } else if let Err(mismatch) = self.reply_received(datagram, arrival) {
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
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {
        let rules = self.rules();
        for flow in &mut self.flows {
            flow.withdraw(&rules, &mut self.reports);
        }
    }

    /// Datagrams in flight at `at`, and those sent until the peer answers a later one or a minute has passed,
    /// are withdrawn instead of lost.
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
            let mut drops = Drops { local: drops, remote: &mut self.responder_drops.drops };
            flow.expire(now.drained, &rules, &mut drops, &mut self.reports);
        }
        if let Some(report) = self.reports.pop_front().or_else(|| self.lossy_flows_changed()) {
            return Step::Report(self.complete(report, now.at));
        }
        while !self.is_stopping && self.schedule.next() <= now.at {
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
        let is_over = self.is_stopping || self.slots_left == 0;
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

/// Sequence numbers stay below 2⁵⁶, which lasts two million years at 1,000 per second.
const FLOW_SHIFT: u32 = 56;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::dscp::Dscp;

    #[test]
    fn report_must_follow_by_the_shorter_of_a_quarter_of_late_after_and_half_the_record() {
        let horizon = |interval, flows, late_after| {
            let spec = EchoSpec {
                to: ([192, 0, 2, 2], 862).into(),
                wire: WireFormat::Icmp,
                interval: Duration::from_millis(interval),
                ssids: (0..flows).collect(),
                size: None,
                dscp: Dscp::DEFAULT,
                late_after: Duration::from_millis(late_after),
                lost_after: Duration::from_secs(60),
                tx_timestamps: true,
                count: None,
                seed: 1,
            };
            Prober::new(spec, Timestamp::from_nanos(0)).rules().horizon
        };
        assert_eq!(horizon(1, 1, 10_000), Duration::from_millis(64));
        assert_eq!(horizon(1, 3, 10_000), Duration::from_millis(3 * 64));
        assert_eq!(horizon(100, 3, 10_000), Duration::from_millis(2_500));
    }
}
