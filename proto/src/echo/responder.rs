//! The replying side of echo measurements over datagrams.

use std::collections::{HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::sessions::{Session, SessionKey, Sessions};
use crate::admission::{Policy, Rates, Refusal};
use crate::key::{Key, KeyId, Keys};
use crate::machine::{
    Arrival, HostDrops, Machine, NotSent, Now, SENT_TTL, Send, SendId, Step, TimestampSource,
};
use crate::stats::{ArrivalOrder, ReceivedSequences};
use crate::time::{Timestamp, WallOffset};
use crate::wire::NtpTime;
use crate::wire::stamp::{self, ERROR_ESTIMATE, Mode, Reply, Request};
use crate::wire::tlv::{self, ClassOfService, FollowUp};

/// Answers STAMP requests of any kind: open or authenticated, with pathmeter's extensions, with others, or
/// with none.
///
/// It is a stateful reflector (RFC 8762 section 4.3): the sequence number of a reply counts the replies of
/// its session. A reply is exactly as long as its request, or without the padding at the end if the session
/// extension asks for that. It is never longer, and goes to the source of the request, whatever the
/// extensions ask for.
#[derive(Debug)]
pub struct StampResponder {
    policy: Policy,
    keys: Option<Arc<Keys>>,
    rates: Rates,
    sessions: Sessions,
    sources: SourceCount,
    pending: Option<PendingReply>,
    request: Vec<u8>,
    /// Replies that were not yet passed to the kernel, oldest first.
    written: VecDeque<WrittenReply>,
    reports: [Option<ResponderReport>; 2],
    is_stopping: bool,
}

/// What the responder reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponderReport {
    /// A request was answered.
    Answered,
    /// A request was refused.
    Refused(Refusal),
    /// Number of distinct sources that were answered in the last 30 to 60 seconds. Reported when it changes.
    Sources(usize),
}

/// An accepted request whose reply is due.
#[derive(Debug, Clone, Copy)]
struct PendingReply {
    arrival: Arrival,
    mode: Mode,
    request: Request,
    index: u32,
    signed_with: Option<KeyId>,
    /// Whether the reply leaves out the padding at the end.
    is_brief: bool,
}

/// A written reply that was not yet passed to the kernel.
#[derive(Debug, Clone, Copy)]
struct WrittenReply {
    id: SendId,
    /// T3 as written in the reply.
    at: Timestamp,
    /// Wall-clock offset used for T2. T3 uses the same offset, because only their difference counts and must
    /// not contain a clock step.
    wall: WallOffset,
    mode: Mode,
    signed_with: Option<KeyId>,
}

/// Maximum number of written replies. At the limit the oldest keeps its T3. Chosen: the batch size of a
/// driver.
const WRITTEN_MAX: usize = 64;

/// T3 is updated if it is older than this when the reply is passed to the kernel. Chosen: 1 µs, about the
/// cost of the update.
const T3_AGE_MAX: Duration = Duration::from_micros(1);

/// One reply in this many requests the kernel's transmit timestamp. Chosen: a transmit timestamp costs the
/// responder nearly half as much as an echo; a sixteenth of that is 3 %.
const TIMESTAMPED_REPLIES: u32 = 16;

impl StampResponder {
    /// A responder with a table of at most `sessions` sessions.
    #[must_use]
    pub fn new(policy: Policy, keys: Option<Arc<Keys>>, sessions: usize) -> Self {
        Self {
            policy,
            keys,
            rates: Rates::new(),
            sessions: Sessions::new(sessions),
            sources: SourceCount::default(),
            pending: None,
            request: Vec::new(),
            written: VecDeque::new(),
            reports: [None; 2],
            is_stopping: false,
        }
    }

    /// Replaces policy and keys; sessions stay.
    pub fn change(&mut self, policy: Policy, keys: Option<Arc<Keys>>) {
        self.policy = policy;
        self.keys = keys;
    }

    /// Number of sessions in the table.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    fn admit(&mut self, datagram: &[u8], arrival: &Arrival) -> Result<PendingReply, Refusal> {
        let source = arrival.from.ip().to_canonical();
        if self.policy.reflector_ports.contains(&arrival.from.port()) || source.is_multicast() {
            return Err(Refusal::Reflection);
        }
        let mode = match self.keys {
            Some(_) => stamp::guess_mode(datagram),
            None => Mode::Open,
        };
        let signed_with = match (&self.keys, mode) {
            (Some(keys), Mode::Authenticated) => {
                Some(stamp::verify(datagram, keys).map_err(|_| Refusal::Unauthentic)?)
            }
            (_, Mode::Open) | (None, Mode::Authenticated) => None,
        };
        if signed_with.is_none() && !self.policy.lists(source) {
            return Err(Refusal::Unlisted);
        }
        if self.keys.as_ref().is_some_and(|keys| stamp::is_authenticated_reply(datagram, keys)) {
            return Err(Refusal::Reflection);
        }
        let request = Request::decode(datagram, mode).map_err(|_| Refusal::Malformed)?;
        self.rates.take(&self.policy, source, arrival.at)?;
        let session = self.extensions(datagram, mode)?;
        let key = match session {
            Some(session) => SessionKey::Ours { session: session.session, ssid: request.ssid },
            None => SessionKey::Foreign { from: arrival.from, ssid: request.ssid },
        };
        let index = self.record(key, request.sequence, arrival)?;
        let is_brief = session.is_some_and(|session| session.is_brief);
        Ok(PendingReply { arrival: *arrival, mode, request, index, signed_with, is_brief })
    }

    /// Reads the session record, if present. Requests whose extensions fail authentication are refused,
    /// although RFC 8972 (section 4.8) would reflect them with the flag I: a request that was changed in
    /// transit did not arrive.
    fn extensions(&self, datagram: &[u8], mode: Mode) -> Result<Option<tlv::SessionRecord>, Refusal> {
        let base = mode.base_bytes();
        let is_authentic = |keys: &Arc<Keys>| mode == Mode::Open || tlv::are_authentic(datagram, base, keys);
        if !self.keys.as_ref().is_none_or(is_authentic) {
            return Err(Refusal::Unauthentic);
        }
        let found = tlv::walk(datagram, base).filter(|found| found.kind == tlv::SESSION).last();
        let session = found.and_then(|found| tlv::SessionRecord::read(found.value(datagram)).ok());
        if session.is_some_and(|session| session.is_reply) {
            return Err(Refusal::Reflection);
        }
        Ok(session)
    }

    fn record(&mut self, key: SessionKey, sequence: u32, arrival: &Arrival) -> Result<u32, Refusal> {
        let new = || Session {
            from: arrival.from,
            received: ReceivedSequences::new(sequence),
            replies: 0,
            wall: None,
            follow_up: None,
            seen: arrival.at,
        };
        let Some(index) = self.sessions.find(&key) else {
            return Ok(self.sessions.insert(key, new()));
        };
        let session = self.sessions.at(index).expect("it was found just above");
        if session.from != arrival.from {
            // A sender behind a NAT may come from another address, but only with a new sequence number.
            if !session.received.is_newest(sequence) {
                return Err(Refusal::Replay);
            }
            session.from = arrival.from;
        }
        let silence = arrival.at.since(session.seen);
        session.seen = arrival.at;
        let order = session.received.add(sequence);
        let begins_again = match key {
            SessionKey::Foreign { .. } => order == ArrivalOrder::Ancient || silence > FOREIGN_SESSION_IDLE,
            SessionKey::Ours { .. } => false,
        };
        if begins_again {
            *session = new();
        }
        Ok(index)
    }

    fn answer(
        &mut self,
        pending: &PendingReply,
        now: Now,
        drops: &HostDrops,
        arena: &mut Vec<u8>,
    ) -> Option<Send> {
        let session = self.sessions.at(pending.index)?;
        let number = session.replies;
        session.replies = number.wrapping_add(1);
        let timestamp = number % TIMESTAMPED_REPLIES == 1;
        if timestamp {
            session.wall = Some(now.wall);
        }
        let start = arena.len();
        let length = match pending.is_brief {
            true => tlv::bytes_before_padding(&self.request, pending.mode.base_bytes()),
            false => self.request.len(),
        };
        arena.extend_from_slice(&self.request[..length]);
        let reply = &mut arena[start..];
        let dscp = extend(reply, pending, session, drops);
        Reply {
            sequence: number,
            timestamp: NtpTime::from(now.wall.wall(now.at)),
            error: ERROR_ESTIMATE,
            ssid: pending.request.ssid,
            received: NtpTime::from(now.wall.wall(pending.arrival.at)),
            sender_sequence: pending.request.sequence,
            sender_timestamp: pending.request.timestamp,
            sender_error: pending.request.error,
            sender_ttl: pending.arrival.ttl.unwrap_or(0),
        }
        .write(pending.mode, reply);
        let id = SendId(u64::from(pending.index) << 32 | u64::from(number));
        let written = WrittenReply {
            id,
            at: now.at,
            wall: now.wall,
            mode: pending.mode,
            signed_with: pending.signed_with,
        };
        written.seal(reply, self.keys.as_deref());
        if self.written.len() == WRITTEN_MAX {
            self.written.pop_front();
        }
        self.written.push_back(written);
        Some(Send {
            id,
            flow: pending.arrival.flow,
            from: pending.arrival.to,
            to: pending.arrival.from,
            tos: dscp << 2,
            ttl: SENT_TTL,
            dont_fragment: false,
            segment: None,
            timestamp,
        })
    }

    fn report(&mut self, report: ResponderReport) {
        let slot = self.reports.iter_mut().find(|slot| slot.is_none());
        *slot.expect("reports are fetched after every datagram") = Some(report);
    }
}

/// A third-party session begins again after a silence of this length. Chosen: 15 minutes, RFC 5357's default
/// REFWAIT.
const FOREIGN_SESSION_IDLE: Duration = Duration::from_secs(900);

/// Fills in the extensions of a reply and returns the DSCP to send it with.
fn extend(reply: &mut [u8], pending: &PendingReply, session: &Session, drops: &HostDrops) -> u8 {
    let arrived = pending.arrival.tos.unwrap_or(0);
    let mut dscp = arrived >> 2;
    let mut at = pending.mode.base_bytes();
    while let Some(found) = tlv::next(reply, at) {
        let Ok(found) = found else {
            reply[at] |= tlv::MALFORMED;
            break;
        };
        at = found.end();
        let is_known = match found.kind {
            tlv::PADDING => true,
            tlv::HMAC => pending.signed_with.is_some() && found.len == usize::from(tlv::HMAC_VALUE_BYTES),
            tlv::CLASS_OF_SERVICE => match ClassOfService::read(found.value(reply)) {
                Some(class) => {
                    dscp = class.wanted;
                    ClassOfService { received: arrived >> 2, ecn: arrived & 3, ..class }
                        .write(found.value_mut(reply));
                    true
                }
                None => false,
            },
            tlv::FOLLOW_UP if found.len == usize::from(FollowUp::BYTES) => {
                let (sequence, timestamp) = session.follow_up.unwrap_or_default();
                FollowUp { sequence, timestamp }.write(found.value_mut(reply));
                true
            }
            tlv::SESSION => match tlv::SessionRecord::read(found.value(reply)) {
                Ok(request) => {
                    record_of(session, drops, request).write(found.value_mut(reply));
                    true
                }
                Err(_) => false,
            },
            _ => false,
        };
        reply[found.at] = if is_known { 0 } else { tlv::UNRECOGNIZED };
    }
    dscp
}

fn record_of(session: &Session, drops: &HostDrops, request: tlv::SessionRecord) -> tlv::SessionRecord {
    let received = &session.received;
    tlv::SessionRecord {
        is_reply: true,
        count_or_first: received.first,
        unique: received.unique,
        duplicates: received.duplicates,
        reordered: received.reordered,
        highest: received.highest,
        bitmap: received.bitmap,
        host_drops: drops.total(),
        ..request
    }
}

impl WrittenReply {
    /// Signs a reply with the key of its request: during a key rotation the prober may not know the other key
    /// yet.
    fn seal(&self, reply: &mut [u8], keys: Option<&Keys>) {
        if let (Some(keys), Some(signed_with)) = (keys, self.signed_with) {
            let key = keys.key(signed_with);
            stamp::seal(reply, self.mode, Some(key));
            seal_extensions(reply, self.mode, key);
        }
    }
}

fn seal_extensions(reply: &mut [u8], mode: Mode, key: &Key) {
    let base = mode.base_bytes();
    let hmac = tlv::walk(reply, base).find(|found| found.kind == tlv::HMAC);
    if let Some(hmac) = hmac.filter(|hmac| hmac.len == usize::from(tlv::HMAC_VALUE_BYTES)) {
        tlv::seal(reply, base, hmac, key);
    }
}

impl Machine for StampResponder {
    type Report = ResponderReport;

    /// Updates T3: the time since it was written was spent in this host, on other replies of the batch or
    /// without a processor, and must not count for the network.
    fn before_send(&mut self, id: SendId, datagram: &mut [u8], now: Now) {
        let Some(index) = self.written.iter().position(|written| written.id == id) else { return };
        let Some(written) = self.written.remove(index) else { return };
        if now.at.since(written.at) >= T3_AGE_MAX {
            Reply::write_sent(written.mode, datagram, NtpTime::from(written.wall.wall(now.at)));
            written.seal(datagram, self.keys.as_deref());
        }
    }

    /// The driver must call `step` until `Wait` before the next datagram.
    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        if arrival.icmp.is_some() {
            return;
        }
        match self.admit(datagram, arrival) {
            Ok(pending) => {
                self.request.clear();
                self.request.extend_from_slice(datagram);
                self.pending = Some(pending);
                if let Some(count) = self.sources.add(arrival.from.ip(), arrival.at) {
                    self.report(ResponderReport::Sources(count));
                }
            }
            Err(refusal) => self.report(ResponderReport::Refused(refusal)),
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        let TimestampSource::Kernel = by else { return };
        let index = u32::try_from(id.0 >> 32).expect("32 bits are left");
        let number = u32::try_from(id.0 & u64::from(u32::MAX)).expect("32 bits are left");
        // Another session may use the index by now; its reply numbers then differ.
        if let Some(session) = self.sessions.at(index)
            && session.replies.wrapping_sub(number) <= TIMESTAMPED_REPLIES
            // Not the current offset: only the difference of the two times counts and must not contain a
            // clock step.
            && let Some(wall) = session.wall
        {
            session.follow_up = Some((number, NtpTime::from(wall.wall(at))));
        }
    }

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// Replies have no verdicts.
    fn withdraw(&mut self) {}

    /// No effect: a peer that stops sends no more requests.
    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<ResponderReport> {
        if self.is_stopping {
            return Step::Finished;
        }
        if let Some(pending) = self.pending.take()
            && let Some(send) = self.answer(&pending, now, drops, arena)
        {
            self.report(ResponderReport::Answered);
            return Step::Send(send);
        }
        if let Some(report) = self.reports.iter_mut().find_map(Option::take) {
            return Step::Report(report);
        }
        if let Some(count) = self.sources.rotate(now.at) {
            return Step::Report(ResponderReport::Sources(count));
        }
        Step::Wait(self.sources.next_rotation())
    }
}

/// Counts distinct sources over the last 30 to 60 seconds.
#[derive(Debug, Default)]
struct SourceCount {
    current: HashSet<IpAddr>,
    previous: HashSet<IpAddr>,
    /// Size of the union of both sets.
    count: usize,
    since: Timestamp,
}

impl SourceCount {
    const HALF: Duration = Duration::from_secs(30);
    /// Maximum number of sources in each half; further sources are not counted.
    const MAX: usize = 65_536;

    /// Adds a source. Returns the new count if the source was not known.
    fn add(&mut self, source: IpAddr, at: Timestamp) -> Option<usize> {
        if self.since == Timestamp::default() {
            self.since = at;
        }
        let source = source.to_canonical();
        if self.current.contains(&source) || self.current.len() >= Self::MAX {
            return None;
        }
        self.current.insert(source);
        if self.previous.contains(&source) {
            return None;
        }
        self.count += 1;
        Some(self.count)
    }

    fn rotate(&mut self, now: Timestamp) -> Option<usize> {
        if now < self.next_rotation() {
            return None;
        }
        self.previous = std::mem::take(&mut self.current);
        self.count = self.previous.len();
        self.since = now;
        Some(self.count)
    }

    fn next_rotation(&self) -> Timestamp {
        if self.current.is_empty() && self.previous.is_empty() {
            Timestamp::NEVER
        } else {
            self.since + Self::HALF
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::WallTime;

    const SECOND: u64 = 1_000_000_000;
    const PROBER: ([u8; 4], u16) = ([192, 0, 2, 1], 40_000);

    fn at(nanos: u64) -> Timestamp {
        Timestamp::from_nanos(1_000 * SECOND + nanos)
    }

    fn now(at: Timestamp) -> Now {
        let epoch = WallTime::from_nanos(1_767_225_600 * SECOND);
        Now { at, drained: at, wall: WallOffset::between(Timestamp::from_nanos(0), epoch) }
    }

    fn arrival(at: Timestamp) -> Arrival {
        Arrival {
            at,
            by: TimestampSource::Kernel,
            from: PROBER.into(),
            to: None,
            flow: 0,
            ttl: Some(250),
            tos: Some(0),
            icmp: None,
        }
    }

    fn responder() -> StampResponder {
        let policy = Policy { open: true, rate: 1 << 40, rate_per_source: 1 << 40, ..Policy::default() };
        StampResponder::new(policy, None, 1_024)
    }

    /// A request with the session record for one session, or without it.
    fn request(sequence: u32, session: Option<u32>) -> Vec<u8> {
        let mut out = Vec::new();
        let timestamp = NtpTime(0xeeaa_bfe0_0000_0000 + u64::from(sequence));
        Request { sequence, timestamp, error: ERROR_ESTIMATE, ssid: 7 }.encode(Mode::Open, &mut out);
        if let Some(session) = session {
            let request = tlv::SessionRecord { session, ..tlv::SessionRecord::default() };
            request.write(tlv::append(&mut out, tlv::SESSION, tlv::SessionRecord::BYTES).value_mut(&mut out));
        }
        tlv::append(&mut out, tlv::FOLLOW_UP, FollowUp::BYTES);
        out
    }

    type Sent = (Send, Vec<u8>);

    /// Steps until the responder waits: the reply, the counts of sources, and the end of the wait.
    fn drive(
        responder: &mut StampResponder,
        time: Timestamp,
        drops: &mut HostDrops,
    ) -> (Option<Sent>, Vec<usize>, Timestamp) {
        let (mut sent, mut sources) = (None, Vec::new());
        loop {
            let mut arena = Vec::new();
            match responder.step(now(time), drops, &mut arena) {
                Step::Send(send) => sent = Some((send, arena)),
                Step::Report(ResponderReport::Sources(count)) => sources.push(count),
                Step::Report(ResponderReport::Answered) => {}
                Step::Report(report @ ResponderReport::Refused(_)) => panic!("{report:?}"),
                Step::Wait(until) => return (sent, sources, until),
                Step::Finished => panic!("a responder does not finish by itself"),
            }
        }
    }

    fn request_reply(responder: &mut StampResponder, request: &[u8], time: Timestamp) -> Sent {
        responder.received(request, &arrival(time));
        drive(responder, time, &mut HostDrops::default()).0.expect("it is answered")
    }

    fn read(reply: &[u8]) -> Reply {
        Reply::decode(reply, Mode::Open).unwrap()
    }

    fn followed(reply: &[u8]) -> Option<FollowUp> {
        let found = tlv::walk(reply, 44).find(|found| found.kind == tlv::FOLLOW_UP).unwrap();
        FollowUp::read(found.value(reply))
    }

    #[test]
    fn sources_of_the_last_30_to_60_seconds_are_counted() {
        let mut sources = SourceCount::default();
        let host = |last: u8| IpAddr::from([192, 0, 2, last]);
        assert_eq!((sources.next_rotation(), sources.rotate(at(0))), (Timestamp::NEVER, None));
        assert_eq!(sources.add(host(1), at(0)), Some(1));
        assert_eq!(sources.add("::ffff:192.0.2.1".parse().unwrap(), at(1)), None, "the same host");
        assert_eq!(sources.add(host(2), at(2)), Some(2));
        let half = at(30 * SECOND);
        assert_eq!(sources.next_rotation(), half);
        assert_eq!(sources.rotate(half - Duration::from_nanos(1)), None);
        assert_eq!(sources.rotate(half), Some(2));
        assert_eq!(sources.add(host(2), half), None, "it is known from the previous half");
        assert_eq!(sources.add(host(3), half), Some(3));
        assert_eq!(sources.rotate(at(60 * SECOND)), Some(2), "the first sent nothing for one half");
        assert_eq!(sources.add(host(1), at(60 * SECOND)), Some(3));
        assert_eq!(sources.rotate(at(90 * SECOND)), Some(1));
        assert_eq!(sources.next_rotation(), at(120 * SECOND));
        assert_eq!(sources.rotate(at(120 * SECOND)), Some(0));
        assert_eq!(sources.next_rotation(), Timestamp::NEVER);
    }

    #[test]
    fn sources_are_counted_up_to_a_limit() {
        let mut sources = SourceCount::default();
        let add = |sources: &mut SourceCount, index: u32| {
            sources.add(IpAddr::from((0x0a00_0000 + index).to_be_bytes()), at(0))
        };
        for index in 0..65_536 {
            assert_eq!(add(&mut sources, index), Some(index as usize + 1));
        }
        assert_eq!((add(&mut sources, 65_536), sources.count), (None, 65_536));
        sources.rotate(at(30 * SECOND));
        assert_eq!(add(&mut sources, 65_536), Some(65_537), "each half has its own limit");
    }

    #[test]
    fn count_of_sources_is_reported_when_it_changes_and_at_each_rotation() {
        let mut responder = responder();
        assert_eq!(drive(&mut responder, at(0), &mut HostDrops::default()).2, Timestamp::NEVER);
        responder.received(&request(0, Some(1)), &arrival(at(0)));
        let (sent, sources, until) = drive(&mut responder, at(0), &mut HostDrops::default());
        assert!(sent.is_some());
        assert_eq!((sources, until), (vec![1], at(30 * SECOND)));
        let (_, sources, until) = drive(&mut responder, until, &mut HostDrops::default());
        assert_eq!((sources, until), (vec![1], at(60 * SECOND)));
        let (_, sources, until) = drive(&mut responder, until, &mut HostDrops::default());
        assert_eq!((sources, until), (vec![0], Timestamp::NEVER));
    }

    #[test]
    fn every_sixteenth_reply_requests_a_timestamp_and_later_replies_carry_it() {
        let mut responder = responder();
        let mut last: Option<(SendId, Timestamp)> = None;
        for number in 0..40_u32 {
            let time = at(u64::from(number) * SECOND);
            let (send, reply) = request_reply(&mut responder, &request(number, Some(1)), time);
            assert_eq!(send.timestamp, number % 16 == 1, "reply {number}");
            assert_eq!(read(&reply).sequence, number);
            let expected = last.map(|(id, left)| FollowUp {
                sequence: u32::try_from(id.0 & 0xffff_ffff).unwrap(),
                timestamp: NtpTime::from(now(left).wall.wall(left)),
            });
            assert_eq!(followed(&reply), expected, "reply {number}");
            responder.sent(send.id, time, TimestampSource::User);
            if send.timestamp {
                let left = time + Duration::from_micros(20);
                responder.sent(send.id, left, TimestampSource::Kernel);
                last = Some((send.id, left));
            }
        }
    }

    #[test]
    fn timestamp_that_arrives_after_sixteen_more_replies_is_not_sent() {
        for (later, is_sent) in [(15, true), (16, false)] {
            let mut responder = responder();
            request_reply(&mut responder, &request(0, Some(1)), at(0));
            let (second, _) = request_reply(&mut responder, &request(1, Some(1)), at(1));
            for number in 0..later {
                request_reply(&mut responder, &request(2 + number, Some(1)), at(2));
            }
            responder.sent(second.id, at(3), TimestampSource::Kernel);
            let (_, reply) = request_reply(&mut responder, &request(100, Some(1)), at(4));
            assert_eq!(followed(&reply).is_some(), is_sent, "{later} later");
        }
    }

    #[test]
    fn timestamp_of_one_session_is_not_sent_to_another() {
        let mut responder = responder();
        for session in [1, 2] {
            request_reply(&mut responder, &request(0, Some(session)), at(0));
        }
        let (first, _) = request_reply(&mut responder, &request(1, Some(1)), at(1));
        responder.sent(first.id, at(2), TimestampSource::Kernel);
        let (_, other) = request_reply(&mut responder, &request(1, Some(2)), at(3));
        assert_eq!(followed(&other), None);
        let (_, own) = request_reply(&mut responder, &request(2, Some(1)), at(3));
        assert_eq!(followed(&own).map(|follow_up| follow_up.sequence), Some(1));
    }

    #[test]
    fn third_party_session_begins_again_after_15_minutes_or_at_a_far_lower_number() {
        let replies = |sequence: u32, silence: Duration| {
            let mut responder = responder();
            request_reply(&mut responder, &request(1_000, None), at(0));
            request_reply(&mut responder, &request(1_001, None), at(0));
            let (_, reply) = request_reply(&mut responder, &request(sequence, None), at(0) + silence);
            read(&reply).sequence
        };
        let quarter = Duration::from_secs(900);
        assert_eq!(replies(1_002, quarter), 2);
        assert_eq!(replies(1_002, quarter + Duration::from_nanos(1)), 0);
        assert_eq!(replies(1_001 - 127, Duration::ZERO), 2);
        assert_eq!(replies(1_001 - 128, Duration::ZERO), 0);
        let mut responder = responder();
        request_reply(&mut responder, &request(1_000, Some(1)), at(0));
        let (_, reply) = request_reply(&mut responder, &request(5, Some(1)), at(0) + 2 * quarter);
        assert_eq!(read(&reply).sequence, 1, "a pathmeter session is identified by its number");
    }

    #[test]
    fn t3_is_updated_when_a_reply_leaves_a_microsecond_or_more_after_it_was_written() {
        for (waited, is_updated) in [(0, false), (999, false), (1_000, true), (5_000_000, true)] {
            let mut responder = responder();
            let (send, mut reply) = request_reply(&mut responder, &request(0, Some(1)), at(0));
            let made = read(&reply);
            assert_eq!(made.turnaround(), 0);
            responder.before_send(SendId(99), &mut reply, now(at(waited)));
            assert_eq!(read(&reply), made, "the reply has another id");
            responder.before_send(send.id, &mut reply, now(at(waited)));
            let expected = if is_updated { i64::try_from(waited).unwrap() } else { 0 };
            assert_eq!(read(&reply).turnaround(), expected);
            responder.before_send(send.id, &mut reply, now(at(waited + SECOND)));
            assert_eq!(read(&reply).turnaround(), expected, "each reply is updated once");
        }
    }

    #[test]
    fn t3_of_the_latest_64_replies_can_be_updated() {
        let mut responder = responder();
        let sent: Vec<Sent> =
            (0..65).map(|number| request_reply(&mut responder, &request(number, Some(1)), at(0))).collect();
        for (index, (send, mut reply)) in sent.into_iter().enumerate() {
            responder.before_send(send.id, &mut reply, now(at(5_000)));
            assert_eq!(read(&reply).turnaround(), if index == 0 { 0 } else { 5_000 }, "reply {index}");
        }
    }

    #[test]
    fn reply_reports_arrivals_and_host_drops() {
        let mut responder = responder();
        let mut drops = HostDrops::default();
        drops.add(0, at(0), at(1), 5);
        for sequence in [10, 12, 11, 11] {
            request_reply(&mut responder, &request(sequence, Some(3)), at(0));
        }
        responder.received(&request(13, Some(3)), &arrival(at(7)));
        let (_, reply) = drive(&mut responder, at(7), &mut drops).0.unwrap();
        let found = tlv::walk(&reply, 44).find(|found| found.kind == tlv::SESSION).unwrap();
        let expected = tlv::SessionRecord {
            flow: 0,
            session: 3,
            is_reply: true,
            is_brief: false,
            count_or_first: 10,
            unique: 4,
            duplicates: 1,
            reordered: 1,
            highest: 13,
            bitmap: 0b1111,
            host_drops: 5,
        };
        assert_eq!(tlv::SessionRecord::read(found.value(&reply)), Ok(expected));
        let read = read(&reply);
        let wall = |time: Timestamp| NtpTime::from(now(time).wall.wall(time));
        assert_eq!((read.received, read.timestamp), (wall(at(7)), wall(at(7))));
        assert_eq!((read.ssid, read.error, read.sender_ttl), (7, ERROR_ESTIMATE, 250));
        let request = Request::decode(&request(13, None), Mode::Open).unwrap();
        let answered = (read.sender_sequence, read.sender_timestamp, read.sender_error);
        assert_eq!(answered, (13, request.timestamp, ERROR_ESTIMATE));
    }

    #[test]
    fn flags_of_a_reply_show_which_extensions_were_recognised() {
        let mut request = request(0, Some(1));
        tlv::append(&mut request, tlv::PADDING, 3);
        tlv::append(&mut request, tlv::CLASS_OF_SERVICE, 3);
        tlv::append(&mut request, tlv::FOLLOW_UP, 15);
        tlv::append(&mut request, tlv::SESSION, 52);
        tlv::append(&mut request, 77, 1);
        let last = tlv::append(&mut request, tlv::PADDING, 9);
        request.pop();
        let unknown = tlv::UNRECOGNIZED;
        // The flag of an extension that cannot be read is added to the sender's flags.
        for set in [unknown, unknown | tlv::MALFORMED] {
            request[last.at] = set;
            let (_, reply) = request_reply(&mut responder(), &request, at(0));
            let flags: Vec<u8> = tlv::walk(&reply, 44).map(|found| found.flags).collect();
            assert_eq!(flags, [0, 0, 0, unknown, unknown, unknown, unknown]);
            assert_eq!(reply[last.at], unknown | tlv::MALFORMED);
        }
    }

    #[test]
    fn changed_policy_applies_to_the_next_request_and_sessions_stay() {
        let mut responder = responder();
        request_reply(&mut responder, &request(0, Some(1)), at(0));
        responder.change(Policy::default(), None);
        responder.received(&request(1, Some(1)), &arrival(at(1)));
        let mut step = || responder.step(now(at(1)), &mut HostDrops::default(), &mut Vec::new());
        assert_eq!(step(), Step::Report(ResponderReport::Refused(Refusal::Unlisted)));
        assert_eq!(responder.sessions(), 1);
    }
}
