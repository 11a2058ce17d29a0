//! The replying side of echo measurements over datagrams.

mod reverse;

use std::collections::{HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::reverse::{ReverseProbe, ReverseProbes};
use super::sessions::{Session, SessionKey, Sessions};
use crate::admission::{Policy, Rates, Refusal};
use crate::key::{Key, KeyId, Keys};
use crate::machine::{
    Arrival, HostDrops, IcmpKind, Machine, NotSent, Now, SENT_TTL, Send, SendId, Step, TimestampSource,
};
use crate::probe_budget::ProbeBudget;
use crate::stats::{ArrivalOrder, ReceivedSequences};
use crate::time::{Timestamp, WallOffset};
use crate::wire::stamp::{self, ERROR_ESTIMATE, Mode, Reply, Request};
use crate::wire::tlv::{self, ClassOfService, FollowUp};
use crate::wire::{NtpTime, ReverseTrace};

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
    reverse: ReverseProbes,
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
    /// Whether its TTL is limited.
    is_limited: bool,
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
        Self::with_probe_budget(policy, keys, sessions, Arc::default())
    }

    /// A responder whose replies with a limited TTL share the limits of the agent's trace probes.
    #[must_use]
    pub fn with_probe_budget(
        policy: Policy,
        keys: Option<Arc<Keys>>,
        sessions: usize,
        budget: Arc<Mutex<ProbeBudget>>,
    ) -> Self {
        Self {
            policy,
            keys,
            rates: Rates::new(),
            sessions: Sessions::new(sessions),
            sources: SourceCount::default(),
            reverse: ReverseProbes::new(budget),
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
            Some(session) => SessionKey::Id { session: session.session, ssid: request.ssid },
            None => SessionKey::Address { from: arrival.from, ssid: request.ssid },
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
            SessionKey::Address { .. } => {
                order == ArrivalOrder::Ancient || silence > THIRD_PARTY_SESSION_IDLE
            }
            SessionKey::Id { .. } => false,
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
        let key = self.sessions.key(pending.index)?;
        let session = self.sessions.at(pending.index)?;
        let number = session.replies;
        session.replies = number.wrapping_add(1);
        let start = arena.len();
        let length = match pending.is_brief {
            true => tlv::bytes_before_padding(&self.request, pending.mode.base_bytes()),
            false => self.request.len(),
        };
        arena.extend_from_slice(&self.request[..length]);
        let reply = &mut arena[start..];
        let is_v4 = pending.arrival.from.is_ipv4();
        let reverse = |asked: &ReverseTrace| self.reverse.reply(asked, key, is_v4, now.at);
        let (dscp, ttl) = extend(reply, pending, session, drops, reverse);
        let timestamp = number % TIMESTAMPED_REPLIES == 1 || ttl != SENT_TTL;
        if timestamp {
            session.wall = Some(now.wall);
        }
        let sent = NtpTime::from(now.wall.wall(now.at));
        Reply {
            sequence: number,
            timestamp: sent,
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
            is_limited: ttl != SENT_TTL,
        };
        written.seal(reply, self.keys.as_deref());
        if self.written.len() == WRITTEN_MAX {
            self.written.pop_front();
        }
        self.written.push_back(written);
        if ttl != SENT_TTL {
            self.reverse.add(ReverseProbe {
                session: key,
                to: pending.arrival.from,
                mode: pending.mode,
                id,
                ttl,
                sequence: number,
                request: pending.request.sequence,
                timestamp: sent,
                at: now.at,
                answer: None,
            });
        }
        Some(Send {
            id,
            flow: pending.arrival.flow,
            from: pending.arrival.to,
            to: pending.arrival.from,
            tos: dscp << 2,
            ttl,
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
const THIRD_PARTY_SESSION_IDLE: Duration = Duration::from_secs(900);

/// Fills in the extensions of a reply and returns the DSCP and the TTL to send it with. `reverse` answers the
/// extension for traces of the way back.
fn extend(
    reply: &mut [u8],
    pending: &PendingReply,
    session: &Session,
    drops: &HostDrops,
    reverse: impl FnOnce(&ReverseTrace) -> Option<ReverseTrace>,
) -> (u8, u8) {
    let arrived = pending.arrival.tos.unwrap_or(0);
    let (mut dscp, mut ttl) = (arrived >> 2, SENT_TTL);
    // Only the first such extension is answered: each may take a token.
    let mut reverse = Some(reverse);
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
            tlv::REVERSE_TRACE => {
                let asked = ReverseTrace::read(found.value(reply)).ok().filter(|asked| !asked.is_reply);
                match asked.zip(reverse.take()).and_then(|(asked, reverse)| reverse(&asked)) {
                    Some(answer) => {
                        answer.write(found.value_mut(reply));
                        if answer.ttl > 0 && answer.deferred.is_none() {
                            ttl = answer.ttl;
                        }
                        true
                    }
                    None => false,
                }
            }
            _ => false,
        };
        reply[found.at] = if is_known { 0 } else { tlv::UNRECOGNIZED };
    }
    (dscp, ttl)
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
            let sent = NtpTime::from(written.wall.wall(now.at));
            Reply::write_sent(written.mode, datagram, sent);
            written.seal(datagram, self.keys.as_deref());
            if written.is_limited {
                self.reverse.leaving(id, sent);
            }
        }
    }

    /// The driver must call `step` until `Wait` before the next datagram.
    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        if let Some(error) = &arrival.icmp {
            if error.kind == IcmpKind::TtlExceeded {
                let quoted = error.quotation(datagram);
                self.reverse.expired(quoted, arrival.from, error.router, arrival.at);
            }
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
        self.reverse.sent(id, at);
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
mod tests;
