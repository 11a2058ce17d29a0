//! The side that asks, and decides.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::flow::{Carries, Fit, Flow, Purpose, Reply, Rules};
use super::outcome::{Class, Mismatch, Report, Sample, Verdict};
use super::request::{self, Contents, Extensions};
use crate::dscp::Dscp;
use crate::grid::{Grid, mix};
use crate::key::Keys;
use crate::machine::{
    Arrival, HostDrops, Icmp, IcmpKind, Machine, NotSent, Now, Send, SendId, StampedBy, Step,
};
use crate::stats::WindowedMinimum;
use crate::time::Timestamp;
use crate::wire::PeerTimestamp;
use crate::wire::stamp::{self, Mode, Request};
use crate::wire::tlv::{self, ClassOfService, FollowUp, Session};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The responder.
    pub to: SocketAddr,
    /// Time between datagrams, over all flows.
    pub interval: Duration,
    /// The session identifier of each flow, 1..=16 of them.
    pub ssids: Vec<u16>,
    /// Bytes of UDP payload; `None`: what the extensions need.
    pub size: Option<u16>,
    /// Class of service.
    pub dscp: Dscp,
    /// A longer round trip is late.
    pub late_after: Duration,
    /// Without a reply by then a datagram is lost.
    pub lost_after: Duration,
    /// Authenticated mode with these keys; `None`: open mode.
    pub keys: Option<Arc<Keys>>,
    /// Whether the driver will deliver the kernel's transmit stamps.
    pub transmit_stamps: bool,
    /// Slots after which to stop; `None`: never.
    pub count: Option<u64>,
    /// Decides phase, jitter and session numbers.
    pub seed: u64,
}

/// Measures one path: sends on a grid, round-robin over its flows, and gives every datagram one verdict.
#[derive(Debug)]
pub struct Prober {
    spec: Spec,
    grid: Grid,
    slots_left: u64,
    flows: Vec<Flow>,
    views: Vec<View>,
    turn: usize,
    responder: Knowledge,
    minimum: WindowedMinimum,
    draining: Option<Draining>,
    stopping: bool,
    lossy_flows: u8,
    reports: VecDeque<Report>,
}

/// What the responder is found to be.
#[derive(Debug, Clone, Copy)]
struct Knowledge {
    kind: Kind,
    /// Datagrams that were given up, while nothing is known.
    unanswered: u32,
    /// When a foreign responder is next asked whether it became one of ours.
    ask_again: Timestamp,
    /// Datagrams that still ask.
    questions: u8,
}

/// The kinds of responder, by what their replies show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Nothing came back yet.
    Unknown,
    /// One of ours.
    Agent,
    /// A STAMP reflector that knows extensions, not ours.
    Stamp,
    /// A reflector without extensions: plain STAMP, or TWAMP-Light.
    Plain,
}

/// What was heard from the responder about one flow.
#[derive(Debug, Clone, Copy, Default)]
struct View {
    /// Ours: when the last report was asked for, and the host drops it told.
    drops: Option<(Timestamp, u32)>,
    /// Ours: the first sequence number of its record, and when that was sent, or later.
    record: Option<(u32, Timestamp)>,
    /// Foreign: the last reply in order, as sequence number and the reflector's own.
    last: Option<(u64, u32)>,
    /// Foreign: whether its sequence numbers are its own.
    is_stateful: bool,
    /// Foreign: until when its count is doubted, because a request was seen to arrive twice or behind a later one.
    doubted: Option<Timestamp>,
    /// T3 of recent replies, by the reflector's sequence number.
    left: [Option<(u32, PeerTimestamp)>; LEFT],
    /// The last follow-up that was used.
    followed: Option<u32>,
}

/// Replies whose T3 is remembered for a follow-up. Chosen: a follow-up normally comes with the next reply.
const LEFT: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Draining {
    since: Timestamp,
    until: Timestamp,
}

/// A goodbye excuses a peer for this long. Chosen: a restart takes seconds, a reboot a minute.
const GOODBYE_LASTS: Duration = Duration::from_secs(60);

/// A path that was seen to duplicate or to reorder requests is expected to do so again for this long. Chosen: 10 minutes.
const DOUBT_LASTS: Duration = Duration::from_secs(600);

/// While nothing is known, every second datagram after this many that were given up is plain STAMP: some reflectors drop
/// what they do not expect.
const UNANSWERED_MAX: u32 = 4;

/// A foreign responder is asked this often whether it became one of ours.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// Datagrams that ask at a time: one of them may be lost. A foreign responder may drop them for their length, so one that
/// goes unanswered is withdrawn, not lost.
const QUESTIONS: u8 = 3;

/// What our packets start with, so that hops = 255 − received.
const TTL: u8 = 255;

impl Prober {
    /// A prober whose first slot lies within one interval after `at`.
    #[must_use]
    pub fn new(spec: Spec, at: Timestamp) -> Self {
        let session = |index: u64| {
            #[expect(clippy::cast_possible_truncation, reason = "32 well-mixed bits are wanted")]
            let session = mix(spec.seed ^ mix(index + 1)) as u32;
            session
        };
        let numbered = spec.ssids.iter().zip(0_u8..);
        let flows: Vec<Flow> =
            numbered.map(|(ssid, index)| Flow::new(index, *ssid, session(index.into()), at)).collect();
        Self {
            grid: Grid::new(at, spec.interval, spec.seed),
            slots_left: spec.count.unwrap_or(u64::MAX),
            views: vec![View::default(); flows.len()],
            flows,
            turn: 0,
            responder: Knowledge {
                kind: Kind::Unknown,
                unanswered: 0,
                ask_again: Timestamp::NEVER,
                questions: 0,
            },
            minimum: WindowedMinimum::new(at),
            draining: None,
            stopping: false,
            lossy_flows: 0,
            reports: VecDeque::new(),
            spec,
        }
    }

    /// Sends nothing more; `Finished` follows when everything is decided.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Decides everything that is in flight: withdrawn. For a stop that cannot wait, and after a suspend.
    pub fn withdraw(&mut self) {
        let rules = self.rules();
        for flow in &mut self.flows {
            flow.withdraw(&rules, &mut self.reports);
        }
    }

    /// The peer said that it is leaving: what it does not answer is withdrawn, not lost, until it answers something that
    /// was sent after `at`, or for a minute.
    pub fn goodbye(&mut self, at: Timestamp) {
        self.draining = Some(Draining { since: at, until: at + GOODBYE_LASTS });
    }

    /// Whether the peer said goodbye and has not come back.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.is_some()
    }

    /// Datagrams that left the host and have no verdict, counted one by one.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flows.iter().map(Flow::in_flight).sum()
    }

    /// What the responder was found to be, in a word for people; `None` while nothing came back.
    #[must_use]
    pub fn responder(&self) -> Option<&'static str> {
        match self.responder.kind {
            Kind::Unknown => None,
            Kind::Agent => Some("pathmeter"),
            Kind::Stamp => Some("stamp"),
            Kind::Plain => Some("twamp-light"),
        }
    }

    fn mode(&self) -> Mode {
        if self.spec.keys.is_some() { Mode::Authenticated } else { Mode::Open }
    }

    fn rules(&self) -> Rules {
        // Half the bitmap's reach, so that the report that counts still covers the datagram.
        let reach = self.spec.interval.saturating_mul(64 * u32::try_from(self.flows.len()).unwrap_or(16));
        Rules {
            late_after: self.spec.late_after,
            lost_after: self.spec.lost_after,
            horizon: (self.spec.late_after / 4).min(reach),
            transmit_stamps: self.spec.transmit_stamps,
            is_draining: self.draining.is_some(),
        }
    }

    fn extensions(&self, sequence: u64) -> Extensions {
        match self.responder.kind {
            Kind::Agent => Extensions::All,
            Kind::Unknown if self.responder.unanswered >= UNANSWERED_MAX && sequence % 2 == 1 => {
                Extensions::None
            }
            Kind::Unknown => Extensions::All,
            Kind::Stamp | Kind::Plain if self.responder.questions > 0 => Extensions::All,
            Kind::Stamp => Extensions::ClassOfService,
            Kind::Plain => Extensions::None,
        }
    }

    fn send(&mut self, now: Now, arena: &mut Vec<u8>) -> Option<Send> {
        let mode = self.mode();
        let index = self.turn;
        self.turn = (self.turn + 1) % self.flows.len();
        if !self.flows[index].has_room() {
            self.reports.push_back(Report::Unsent(1));
            return None;
        }
        let (sequence, sent) = self.flows[index].upcoming();
        if self.responder.ask_again <= now.at {
            self.responder.ask_again = now.at + ASK_AGAIN_AFTER;
            self.responder.questions = QUESTIONS;
        }
        let extensions = self.extensions(sequence);
        let purpose = match self.responder.kind {
            Kind::Stamp | Kind::Plain if extensions == Extensions::All => Purpose::Ask,
            Kind::Stamp | Kind::Plain | Kind::Agent | Kind::Unknown => Purpose::Measure,
        };
        self.responder.questions -= u8::from(purpose == Purpose::Ask);
        let flow = &mut self.flows[index];
        let contents = Contents {
            mode,
            #[expect(clippy::cast_possible_truncation, reason = "the wire carries the low half")]
            sequence: sequence as u32,
            at: now.wall.wall(now.at),
            ssid: flow.ssid,
            flow: flow.index,
            session: flow.session,
            sent,
            dscp: self.spec.dscp.value(),
            size: self.spec.size,
            extensions,
        };
        let key = self.spec.keys.as_ref().map(|keys| keys.current());
        let wire = request::encode(&contents, key, arena);
        let carries = if wire.carries_session { Carries::Session } else { Carries::Less };
        let sequence = flow.push(now.at, wire.timestamp, carries, purpose);
        Some(Send {
            id: send_id(flow.index, sequence),
            flow: flow.index,
            from: None,
            to: self.spec.to,
            tos: self.spec.dscp.tos(),
            ttl: TTL,
            segment: None,
            stamp: self.spec.transmit_stamps,
        })
    }

    fn reply(&mut self, datagram: &[u8], arrival: &Arrival) -> Result<(), Mismatch> {
        let mode = self.mode();
        let base = stamp::Reply::decode(datagram, mode).map_err(|_| Mismatch::Malformed)?;
        if let Some(keys) = &self.spec.keys {
            stamp::verify(datagram, keys).map_err(|_| Mismatch::Unauthentic)?;
        }
        let told = Told::read(datagram, mode, self.spec.keys.as_deref())?;
        let rules = self.rules();
        let index = usize::from(arrival.flow);
        let flow = self.flows.get_mut(index).ok_or(Mismatch::Unasked)?;
        if base.ssid != flow.ssid && base.ssid != 0 {
            return Err(Mismatch::Unasked);
        }
        let sequence = flow.extend(base.sender_sequence).ok_or(Mismatch::Unasked)?;
        let sent = match flow.fit(sequence, base.sender_timestamp, arrival.at, &rules) {
            Fit::Answer { sent } => sent,
            Fit::Duplicate => {
                // A copy of a reply has its number; the reply to a copy of a request has its own.
                let view = &mut self.views[index];
                if !view.left.iter().flatten().any(|(number, _)| *number == base.sequence) {
                    view.doubted = Some(arrival.at + DOUBT_LASTS);
                }
                self.reports.push_back(Report::Duplicate);
                return Ok(());
            }
            Fit::VeryLate => {
                self.reports.push_back(Report::VeryLate);
                return Ok(());
            }
            Fit::Unasked => return Err(Mismatch::Unasked),
        };
        if self.draining.is_some_and(|draining| sent > draining.since) {
            self.draining = None;
        }
        let is_ours = self.recognise(&told, arrival.at);
        let sample = self.sample(&base, &told, arrival, is_ours);
        let reply = Reply { at: arrival.at, turnaround: base.turnaround(), sample };
        let rules = self.rules();
        self.flows[index].answer(sequence, reply, &rules, &mut self.reports);
        match told.session {
            Some(session) => self.learn_from_ours(index, sent, arrival.at, &session),
            None if is_ours => {}
            None => self.learn_from_foreign(index, sent, arrival.at, (sequence, base.sequence)),
        }
        self.follow_up(index, &base, told.follow_up);
        Ok(())
    }

    /// Takes note of what the responder is; true if it is one of ours.
    fn recognise(&mut self, told: &Told, at: Timestamp) -> bool {
        let kind = match told {
            Told { session: Some(_), .. } => Kind::Agent,
            // What was changed on the way says nothing about who answered it.
            Told { is_damaged: true, .. } => return self.responder.kind == Kind::Agent,
            // Our extension was not sent, or did not fit: the kind stays, a first reply says as much as it shows.
            Told { asked_session: false, .. } if self.responder.kind != Kind::Unknown => self.responder.kind,
            Told { class: Some(_), .. } => Kind::Stamp,
            Told { .. } => Kind::Plain,
        };
        if kind != self.responder.kind {
            self.responder.kind = kind;
            self.responder.questions = 0;
            // A first reply to a datagram without our extension leaves open whether that would be understood.
            self.responder.ask_again = if told.asked_session { at + ASK_AGAIN_AFTER } else { at };
        }
        self.responder.unanswered = 0;
        kind == Kind::Agent
    }

    fn sample(&mut self, base: &stamp::Reply, told: &Told, arrival: &Arrival, is_ours: bool) -> Sample {
        let hops = |ttl: u8| TTL.checked_sub(ttl).filter(|_| ttl > 0 && is_ours);
        let dscp = self.spec.dscp.value();
        Sample {
            rtt: Duration::ZERO,
            turnaround: Duration::ZERO,
            variation: Duration::ZERO,
            minimum: Duration::ZERO,
            transmit: StampedBy::User,
            receive: arrival.by,
            hops_forward: hops(base.sender_ttl),
            hops_reverse: arrival.ttl.and_then(hops),
            class_forward: told
                .class
                .map(|class| Class { is_remarked: class.received != dscp, is_congested: class.ecn == 3 }),
            class_reverse: arrival
                .tos
                .filter(|_| told.class.is_some())
                .map(|tos| Class { is_remarked: tos >> 2 != dscp, is_congested: tos & 3 == 3 }),
        }
    }

    fn learn_from_ours(&mut self, index: usize, asked: Timestamp, heard: Timestamp, session: &Session) {
        let rules = self.rules();
        let flow = &mut self.flows[index];
        if session.session != flow.session {
            return;
        }
        let view = &mut self.views[index];
        if view.drops.is_none_or(|(last, _)| asked > last) {
            if let Some((last, known)) = view.drops {
                let dropped = session.host_drops.wrapping_sub(known);
                if dropped < 1 << 31 {
                    flow.responder_dropped(last, heard, dropped, &rules);
                }
            }
            view.drops = Some((asked, session.host_drops));
        }
        let (Some(highest), Some(first)) =
            (flow.extend(session.highest), flow.extend(session.count_or_first))
        else {
            return;
        };
        let began = match view.record {
            Some((known, began)) if known == session.count_or_first => began,
            // Long gone or never sent: this report was asked for no earlier.
            _ => flow.sent_at(first).unwrap_or(asked),
        };
        view.record = Some((session.count_or_first, began));
        let bitmap = session.bitmap;
        flow.learn(
            highest.saturating_sub(127)..=highest,
            Carries::Session,
            asked,
            &rules,
            |sequence, sent| {
                let is_set = bitmap >> (highest - sequence) & 1 == 1;
                // A responder that forgot us began its record anew, perhaps with a datagram that others had overtaken: what
                // was sent soon after that one may have arrived before.
                (is_set || sequence > first && sent >= began + rules.horizon).then_some(is_set)
            },
        );
    }

    /// A stateful reflector numbers its replies: between two of them it received as many requests as its numbers
    /// advanced. All or none of those between gives each a direction; some of them does not. That it was all of them
    /// holds only while no request arrives twice, or behind a later one, for its number is then counted in the wrong
    /// place: where that was seen, it is not believed. The first time, if its reply is lost as well, is not seen.
    fn learn_from_foreign(&mut self, index: usize, asked: Timestamp, heard: Timestamp, reply: (u64, u32)) {
        let (sequence, number) = reply;
        let rules = self.rules();
        let (flow, view) = (&mut self.flows[index], &mut self.views[index]);
        #[expect(clippy::cast_possible_truncation, reason = "the wire carried the low half")]
        let is_copy = number == sequence as u32;
        view.is_stateful |= !is_copy;
        if let Some((last, last_number)) = view.last
            && sequence < last
        {
            if number.wrapping_sub(last_number) < 1 << 31 {
                view.doubted = Some(heard + DOUBT_LASTS);
            }
            return;
        }
        let is_doubted = view.doubted.is_some_and(|until| heard < until);
        if let Some((last, last_number)) = view.last
            && view.is_stateful
        {
            let (asked_since, answered_since) = (sequence - last, number.wrapping_sub(last_number));
            let arrived = match u64::from(answered_since) {
                1 => Some(false),
                answered if answered == asked_since && !is_doubted => Some(true),
                _ => None,
            };
            flow.learn(last + 1..=sequence.saturating_sub(1), Carries::Less, asked, &rules, |_, _| arrived);
        }
        view.last = Some((sequence, number));
    }

    fn follow_up(&mut self, index: usize, base: &stamp::Reply, follow_up: Option<FollowUp>) {
        let view = &mut self.views[index];
        view.left.rotate_right(1);
        view.left[0] = Some((base.sequence, base.sent()));
        let Some(FollowUp { sequence, timestamp }) = follow_up else { return };
        if view.followed == Some(sequence) {
            return;
        }
        let written = view.left.iter().flatten().find(|(number, _)| *number == sequence);
        if let Some((_, written)) = written {
            view.followed = Some(sequence);
            let lag = PeerTimestamp::from_ntp(timestamp.0).signed_since(*written);
            if let Ok(lag) = u64::try_from(lag) {
                self.reports.push_back(Report::TransmitLag(Duration::from_nanos(lag)));
            }
        }
    }

    fn complaint(&mut self, quoted: &[u8], arrival: &Arrival, icmp: &Icmp) {
        self.reports.push_back(Report::Icmp(icmp.kind));
        let is_on_the_way = match icmp.kind {
            IcmpKind::Unreachable | IcmpKind::Prohibited | IcmpKind::TooBig | IcmpKind::TtlExceeded => true,
            // The host answered: the network carried the datagram, and nobody listened.
            IcmpKind::PortUnreachable | IcmpKind::Other => false,
        };
        let mode = self.mode();
        if let (true, Ok(request), Some(flow)) =
            (is_on_the_way, Request::decode(quoted, mode), self.flows.get_mut(usize::from(arrival.flow)))
            && let Some(sequence) = flow.extend(request.sequence)
        {
            flow.refused_on_the_way(sequence, request.timestamp);
        }
    }

    /// Completes what a report says with what only the path as a whole knows.
    fn complete(&mut self, mut report: Report, now: Timestamp) -> Report {
        if let Report::Decided { verdict, sample, .. } = &mut report {
            match (*verdict, sample) {
                (Verdict::Ok, Some(sample)) => {
                    sample.minimum = self.minimum.add(now, sample.rtt);
                    sample.variation = sample.rtt - sample.minimum;
                }
                (Verdict::Lost(_), _) if self.responder.kind == Kind::Unknown => {
                    self.responder.unanswered = self.responder.unanswered.saturating_add(1);
                }
                (
                    Verdict::Ok
                    | Verdict::Late
                    | Verdict::Lost(_)
                    | Verdict::HostDropped
                    | Verdict::Withdrawn,
                    _,
                ) => {}
            }
        }
        report
    }

    fn lossy_flows_changed(&mut self) -> Option<Report> {
        let lossy = self.flows.iter().filter(|flow| flow.loss.is_lossy()).count();
        let lossy = u8::try_from(lossy).unwrap_or(u8::MAX);
        if std::mem::replace(&mut self.lossy_flows, lossy) == lossy {
            return None;
        }
        Some(Report::LossyFlows(lossy))
    }
}

/// What a reply's extensions say.
#[derive(Debug, Clone, Copy)]
struct Told {
    /// Whether our extension came back at all, understood or not.
    asked_session: bool,
    /// Whether the responder found that the extensions had been changed on the way.
    is_damaged: bool,
    session: Option<Session>,
    class: Option<ClassOfService>,
    follow_up: Option<FollowUp>,
}

impl Told {
    fn read(datagram: &[u8], mode: Mode, keys: Option<&Keys>) -> Result<Self, Mismatch> {
        let base = mode.base_bytes();
        let mut told =
            Self { asked_session: false, is_damaged: false, session: None, class: None, follow_up: None };
        let mut is_hmac_flagged = false;
        for found in tlv::walk(datagram, base) {
            told.asked_session |= found.kind == tlv::SESSION;
            told.is_damaged |= found.flags & tlv::INTEGRITY != 0;
            // Its own flags are all that no HMAC covers.
            is_hmac_flagged |= found.kind == tlv::HMAC && found.flags != 0;
            if !found.is_understood() {
                continue;
            }
            let value = found.value(datagram);
            match found.kind {
                tlv::SESSION => {
                    told.session = Session::read(value).ok().filter(|session| session.is_reply);
                }
                tlv::CLASS_OF_SERVICE => told.class = ClassOfService::read(value),
                tlv::FOLLOW_UP => told.follow_up = FollowUp::read(value),
                _ => {}
            }
        }
        if keys.is_some_and(|keys| is_hmac_flagged || !tlv::are_proven(datagram, base, keys)) {
            return Err(Mismatch::Unauthentic);
        }
        Ok(told)
    }
}

impl Machine for Prober {
    type Report = Report;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        if let Some(icmp) = &arrival.icmp {
            self.complaint(datagram, arrival, icmp);
        } else if let Err(mismatch) = self.reply(datagram, arrival) {
            self.reports.push_back(Report::Mismatched(mismatch));
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: StampedBy) {
        let rules = self.rules();
        let (index, sequence) = split(id);
        let Some(flow) = self.flows.get_mut(index) else { return };
        flow.sent(sequence, at, by, &mut self.reports);
        if by == StampedBy::Kernel {
            flow.release(sequence, &rules, &mut self.reports);
        }
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        let (index, sequence) = split(id);
        if let Some(flow) = self.flows.get_mut(index) {
            flow.not_sent(sequence, why, &mut self.reports);
        }
    }

    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<Report> {
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(self.complete(report, now.at));
        }
        if self.draining.is_some_and(|draining| draining.until <= now.drained) {
            self.draining = None;
        }
        let rules = self.rules();
        for flow in &mut self.flows {
            flow.expire(now.drained, &rules, drops, &mut self.reports);
        }
        if let Some(report) = self.reports.pop_front().or_else(|| self.lossy_flows_changed()) {
            return Step::Report(self.complete(report, now.at));
        }
        while !self.stopping && self.slots_left > 0 && self.grid.next() <= now.at {
            let due = self.grid.take(now.at);
            let skipped = due.skipped.min(self.slots_left);
            self.slots_left -= skipped;
            if skipped > 0 {
                self.reports.push_back(Report::Unsent(skipped));
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
        let next = if is_over { Timestamp::NEVER } else { self.grid.next() };
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
