//! Path MTU discovery by probes (Datagram Packetization Layer PMTUD, RFC 8899): the longest packet that a
//! path carries unfragmented.
//!
//! [`MtuSearch`] sends padded STAMP requests that must not be fragmented and checks which are answered. It
//! does not depend on ICMP; router errors are only hints for the next size. It uses the path's first flow,
//! and so the same 5-tuple and route as the echoes, but its own session, so that the records and counts of
//! the echoes do not change. Its requests ask for [brief](crate::wire::tlv::SessionRecord::is_brief) replies,
//! so that only the forward direction is tested.

mod bracket;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bracket::{Bracket, SizeLimits};

use crate::dscp::Dscp;
use crate::echo::{ReplyExtensions, RequestContents, RequestExtensions, bytes_at_least, encode};
use crate::key::Keys;
use crate::machine::{
    Arrival, HostDrops, IcmpKind, Machine, NotSent, Now, SENT_TTL, Send, SendId, Step, TimestampSource,
};
use crate::schedule::mix;
use crate::time::{Timestamp, nanos};
use crate::wire::NtpTime;
use crate::wire::stamp::{self, Mode, Request};

/// Parameters of a search. Sizes are whole IP packets in bytes.
#[derive(Debug, Clone)]
pub struct MtuSpec {
    /// Address of the responder.
    pub to: SocketAddr,
    /// Session identifier, different from those of the echoes.
    pub ssid: u16,
    /// Time between two confirmations of the result.
    pub interval: Duration,
    /// Largest size to try; at least [`CEILING_MIN`].
    pub ceiling: u16,
    /// Class of service, the same as of the echoes.
    pub dscp: Dscp,
    /// A probe without a reply after this time is lost.
    pub lost_after: Duration,
    /// Keys of authenticated mode; `None`: open mode.
    pub keys: Option<Arc<Keys>>,
    /// Result of an earlier search, which is confirmed first. Limited to the ceiling.
    pub known: Option<u16>,
    /// Determines the phase, the jitter and the session number.
    pub seed: u64,
}

/// Smallest ceiling: the minimum MTU of IPv6 (RFC 8200 section 5).
pub const CEILING_MIN: u16 = 1280;

/// What a search reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtuReport {
    /// A probe left the host.
    Sent,
    /// A probe was answered in time.
    Acknowledged,
    /// A probe was not answered in time.
    Lost,
    /// A probe was too long: this host refused to send it, or a router reported it.
    TooBig,
    /// The path MTU was found or has changed.
    Changed {
        /// Previous value; `None` if it was not known.
        from: Option<u16>,
        /// New value.
        to: u16,
    },
}

/// Finds the path MTU, confirms it every interval, and regularly tries larger sizes.
///
/// **When a size is rejected.** At once if this host refuses to send it. Otherwise when [`MAX_PROBES`] probes
/// of the size were lost and a short probe sent afterwards was answered, [`ROUNDS`] times in a row: 9 lost
/// probes on a path that worked three times meanwhile. A single answer, even a late one, makes the size pass.
/// If the short probes are not answered, the path is down: nothing is concluded, the known value stays, and
/// the search is repeated later. If a share `p` of probes or replies is lost at random, a size that passes is
/// rejected with probability `p⁹`: 5·10⁻⁷ per tried size at 20 %. With one confirmation per minute, such a
/// path gets a wrong value once in four years, and the next search for larger sizes corrects it. RFC 8899
/// requires only one round.
#[derive(Debug)]
pub struct MtuSearch {
    spec: MtuSpec,
    limits: SizeLimits,
    session: u32,
    phase: SearchPhase,
    bracket: Bracket,
    known: Option<u16>,
    trial: Option<SizeTrial>,
    /// Sequence number and deadline of the probe in flight.
    pending: Option<(u32, Timestamp)>,
    /// The latest probes. A late answer proves as much as one in time.
    recent: VecDeque<SizeProbe>,
    next_sequence: u32,
    sent_count: u32,
    /// The longest recent round trip.
    rtt: Option<Duration>,
    raise_at: Timestamp,
    rest_count: u64,
    /// The latest known time.
    at: Timestamp,
    is_stopping: bool,
    reports: VecDeque<MtuReport>,
}

/// Phase of the search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SearchPhase {
    /// No probes until this time.
    Rest(Timestamp),
    /// Confirms the known value.
    Confirm,
    /// Searches for the largest size that passes.
    Search,
}

/// State of the size that is being tried.
#[derive(Debug, Clone, Copy)]
struct SizeTrial {
    size: u16,
    stage: TrialStage,
    /// Lost probes of this stage.
    lost: u8,
    /// Rounds that ended with an answered short probe.
    rounds: u8,
}

/// What a trial sends next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TrialStage {
    /// Probes of the size.
    Size,
    /// Short probes, which show whether the path works.
    Control,
}

/// A sent probe.
#[derive(Debug, Clone, Copy)]
struct SizeProbe {
    sequence: u32,
    timestamp: NtpTime,
    size: u16,
    at: Timestamp,
}

/// Probes of a size per round (RFC 8899 section 5.1.2).
pub const MAX_PROBES: u8 = 3;

/// Rounds in which all probes of a size must be lost before it is rejected; see [`MtuSearch`]. Chosen: 3, so
/// that 20 % random loss does not reduce the path MTU.
pub const ROUNDS: u8 = 3;

/// Larger sizes are tried this often, or every ten intervals if that is shorter (PMTU_RAISE_TIMER, RFC 8899
/// section 5.1.1).
const RAISE_AFTER: Duration = Duration::from_secs(600);

/// Minimum time to wait for an answer, unless `lost_after` is shorter (PROBE_TIMER, RFC 8899 section 5.1.1).
/// It is also at least four times the longest recent round trip.
const REPLY_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// Pause after a search on a path that does not answer, or one interval if that is shorter. Chosen: 10 s, so
/// that a dead host gets a few datagrams per minute and a recovered one is soon found.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// Number of probes that are kept. An answer after so many later probes is ignored.
const RECENT_MAX: usize = 16;

/// Size with which a search starts (BASE_PLPMTU, RFC 8899 section 5.1.2).
const BASE_V4: u16 = 1200;
const BASE_V6: u16 = 1280;

/// Length of the IP and UDP headers.
const HEADERS_V4: u16 = 20 + 8;
const HEADERS_V6: u16 = 40 + 8;

impl MtuSearch {
    /// A search that begins within one interval after `at`.
    #[must_use]
    pub fn new(spec: MtuSpec, at: Timestamp) -> Self {
        let mode = mode(&spec);
        let payload = u16::try_from(bytes_at_least(mode)).expect("a few hundred bytes");
        let base = if spec.to.is_ipv4() { BASE_V4 } else { BASE_V6 };
        let limits =
            SizeLimits { small: headers(spec.to) + payload, base, ceiling: spec.ceiling.max(CEILING_MIN) };
        #[expect(clippy::cast_possible_truncation, reason = "32 well-mixed bits are wanted")]
        let session = mix(spec.seed ^ mix(0x6d74_7500)) as u32;
        let offset = Duration::from_nanos(mix(spec.seed) % nanos(spec.interval).max(1));
        Self {
            // A path that carries a longer packet carries the ceiling.
            known: spec.known.filter(|known| *known >= limits.small).map(|known| known.min(limits.ceiling)),
            phase: SearchPhase::Rest(at + offset),
            bracket: Bracket::new(limits),
            limits,
            session,
            trial: None,
            pending: None,
            recent: VecDeque::new(),
            next_sequence: 0,
            sent_count: 0,
            rtt: None,
            raise_at: at,
            rest_count: 0,
            at,
            is_stopping: false,
            reports: VecDeque::new(),
            spec,
        }
    }

    /// The path MTU in bytes of a whole IP packet; `None` until it was found.
    #[must_use]
    pub fn known(&self) -> Option<u16> {
        self.known
    }

    /// Whether `reply` answers a probe of this search: for drivers that cannot tell this from the session
    /// identifier. The reply is not authenticated.
    #[must_use]
    pub fn owns_reply(&self, reply: &[u8]) -> bool {
        let reply = stamp::Reply::decode(reply, mode(&self.spec));
        reply.is_ok_and(|reply| self.probe(reply.sender_sequence, reply.sender_timestamp).is_some())
    }

    fn probe(&self, sequence: u32, timestamp: NtpTime) -> Option<SizeProbe> {
        let is_match = |probe: &&SizeProbe| probe.sequence == sequence && probe.timestamp == timestamp;
        self.recent.iter().rev().find(is_match).copied()
    }

    /// How long to wait for an answer.
    fn reply_timeout(&self) -> Duration {
        let enough = self.rtt.map_or(Duration::MAX, |rtt| REPLY_TIMEOUT_MIN.max(4 * rtt));
        self.spec.lost_after.min(enough)
    }

    /// The next trial; `Err`: no trial before that time.
    fn plan(&mut self, now: Timestamp) -> Result<SizeTrial, Timestamp> {
        loop {
            if let Some(trial) = self.trial {
                return Ok(trial);
            }
            match (self.phase, self.known) {
                (SearchPhase::Rest(until), _) if now < until => return Err(until),
                (SearchPhase::Rest(_), None) => self.begin(Bracket::new(self.limits)),
                (SearchPhase::Rest(_), Some(known)) => {
                    self.bracket = Bracket::new(self.limits);
                    self.phase = SearchPhase::Confirm;
                    self.trial = Some(SizeTrial::of(known));
                }
                (SearchPhase::Confirm, Some(known)) if self.bracket.has_passed(known) => {
                    if now >= self.raise_at {
                        self.begin(Bracket::above(self.limits, known));
                    } else {
                        self.rest(now, self.spec.interval);
                    }
                }
                (SearchPhase::Confirm, _) => self.phase = SearchPhase::Search,
                (SearchPhase::Search, _) => match self.bracket.next() {
                    Ok(size) => self.trial = Some(SizeTrial::of(size)),
                    Err(found) => self.conclude(found, now),
                },
            }
        }
    }

    fn begin(&mut self, bracket: Bracket) {
        self.bracket = bracket;
        self.phase = SearchPhase::Search;
    }

    fn conclude(&mut self, found: u16, now: Timestamp) {
        let from = self.known.replace(found);
        if from != Some(found) {
            self.reports.push_back(MtuReport::Changed { from, to: found });
        }
        self.raise_at = now + RAISE_AFTER.min(10 * self.spec.interval);
        self.rest(now, self.spec.interval);
    }

    /// Pauses for `span` ± 25 %, the same jitter as of the echoes.
    fn rest(&mut self, now: Timestamp, span: Duration) {
        self.rest_count += 1;
        let jitter = mix(self.spec.seed ^ mix(self.rest_count)) % (nanos(span) / 2).max(1);
        self.phase = SearchPhase::Rest(now + span * 3 / 4 + Duration::from_nanos(jitter));
        self.trial = None;
    }

    /// Ends the search without a conclusion.
    fn give_up(&mut self) {
        self.rest(self.at, RETRY_AFTER.min(self.spec.interval));
    }

    /// Records that a probe of that size arrived.
    fn passed(&mut self, size: u16) {
        self.bracket.passed(size);
        if self.trial.is_some_and(|trial| trial.size <= size) {
            self.trial = None;
        }
        let is_larger = self.known.is_some_and(|known| size > known);
        if let (SearchPhase::Rest(_), true) = (self.phase, is_larger) {
            // The last conclusion was wrong: search again at once.
            (self.phase, self.raise_at) = (SearchPhase::Rest(self.at), self.at);
        }
    }

    /// The probe in flight was answered (then [`passed`](Self::passed) was called before) or is given up.
    fn decided(&mut self, is_answered: bool) {
        self.pending = None;
        let Some(trial) = &mut self.trial else { return };
        match (trial.stage, is_answered) {
            // The trial has ended already.
            (TrialStage::Size, true) => {}
            (TrialStage::Size, false) => {
                trial.lost += 1;
                if trial.lost == MAX_PROBES {
                    (trial.stage, trial.lost) = (TrialStage::Control, 0);
                }
            }
            (TrialStage::Control, true) => {
                trial.rounds += 1;
                (trial.stage, trial.lost) = (TrialStage::Size, 0);
                if trial.rounds == ROUNDS {
                    let size = trial.size;
                    self.rejected(size);
                    self.bracket.passed(self.limits.small);
                }
            }
            (TrialStage::Control, false) => {
                trial.lost += 1;
                if trial.lost == MAX_PROBES {
                    self.give_up();
                }
            }
        }
    }

    fn rejected(&mut self, size: u16) {
        self.bracket.rejected(size);
        self.trial = None;
    }

    fn reply_received(&mut self, datagram: &[u8], arrival: &Arrival) -> Option<()> {
        let mode = mode(&self.spec);
        let reply = stamp::Reply::decode(datagram, mode).ok()?;
        if let Some(keys) = &self.spec.keys {
            stamp::verify(datagram, keys).ok()?;
        }
        ReplyExtensions::read(datagram, mode, self.spec.keys.as_deref()).ok()?;
        let is_ours = reply.ssid == self.spec.ssid || reply.ssid == 0;
        let probe = self.probe(reply.sender_sequence, reply.sender_timestamp).filter(|_| is_ours)?;
        let rtt = arrival.at.since(probe.at);
        // The effect of one long round trip decays over the next few.
        self.rtt = Some(self.rtt.map_or(rtt, |known| rtt.max(known * 7 / 8)));
        self.passed(probe.size);
        if self.pending.is_some_and(|(sequence, _)| sequence == probe.sequence) {
            self.reports.push_back(MtuReport::Acknowledged);
            self.decided(true);
        }
        Some(())
    }

    /// Takes a "too big" error of a router. Only errors that quote a probe of this search count (RFC 8899
    /// section 4.6.1).
    fn icmp_error(&mut self, quoted: &[u8], mtu: Option<u32>) -> Option<()> {
        let request = Request::decode(quoted, mode(&self.spec)).ok()?;
        let is_ours = request.ssid == self.spec.ssid;
        let probe = self.probe(request.sequence, request.timestamp).filter(|_| is_ours)?;
        let is_pending = self.pending.is_some_and(|(sequence, _)| sequence == probe.sequence);
        // No router has a reason to reject the shortest probe, so such an error is ignored.
        if is_pending && probe.size > self.limits.small {
            self.reports.push_back(MtuReport::TooBig);
            self.decided(false);
        }
        if mtu.is_some_and(|mtu| self.bracket.add_hint(mtu, probe.size)) {
            // The hint is tried first; this size is tried again if necessary.
            self.trial = None;
        }
        Some(())
    }

    fn send(&mut self, trial: SizeTrial, now: Now, arena: &mut Vec<u8>) -> Send {
        let size = match trial.stage {
            TrialStage::Size => trial.size,
            TrialStage::Control => self.limits.small,
        };
        let sequence = self.next_sequence;
        self.next_sequence = sequence.wrapping_add(1);
        let contents = RequestContents {
            mode: mode(&self.spec),
            sequence,
            at: now.wall.wall(now.at),
            ssid: self.spec.ssid,
            flow: 0,
            session: self.session,
            sent: self.sent_count.wrapping_add(1),
            is_brief: true,
            dscp: self.spec.dscp.value(),
            size: Some(size - headers(self.spec.to)),
            extensions: RequestExtensions::All,
            reverse: None,
        };
        let key = self.spec.keys.as_ref().map(|keys| keys.current());
        let timestamp = encode(&contents, key, arena).timestamp;
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(SizeProbe { sequence, timestamp, size, at: now.at });
        self.pending = Some((sequence, now.at + self.reply_timeout()));
        Send {
            id: SendId(sequence.into()),
            flow: 0,
            from: None,
            to: self.spec.to,
            tos: self.spec.dscp.tos(),
            ttl: SENT_TTL,
            dont_fragment: true,
            segment: None,
            timestamp: false,
        }
    }
}

impl SizeTrial {
    fn of(size: u16) -> Self {
        Self { size, stage: TrialStage::Size, lost: 0, rounds: 0 }
    }
}

impl Machine for MtuSearch {
    type Report = MtuReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        self.at = self.at.max(arrival.at);
        // Replies that match no probe are ignored and, unlike with echoes, not counted.
        let _ = match arrival.icmp {
            Some(icmp) if icmp.kind == IcmpKind::TooBig => {
                self.icmp_error(icmp.quotation(datagram), icmp.mtu)
            }
            // The host may be gone: the short probes will show it.
            Some(_) => None,
            None => self.reply_received(datagram, arrival),
        };
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        let Some(probe) = self.recent.iter_mut().find(|probe| SendId(probe.sequence.into()) == id) else {
            return;
        };
        probe.at = at;
        if by == TimestampSource::User {
            self.sent_count = self.sent_count.wrapping_add(1);
            self.reports.push_back(MtuReport::Sent);
        }
        let reply_timeout = self.reply_timeout();
        if let Some((sequence, deadline)) = &mut self.pending
            && SendId(u64::from(*sequence)) == id
        {
            *deadline = at + reply_timeout;
        }
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        let Some(index) = self.recent.iter().position(|probe| SendId(probe.sequence.into()) == id) else {
            return;
        };
        let size = self.recent.remove(index).expect("it was found just above").size;
        self.pending = None;
        match why {
            NotSent::TooBig => {
                self.reports.push_back(MtuReport::TooBig);
                match size > self.limits.small {
                    true => self.rejected(size),
                    false => self.give_up(),
                }
            }
            NotSent::Unreachable | NotSent::Buffer | NotSent::Permission | NotSent::Other => self.give_up(),
        }
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// The probe in flight proves nothing; its size is tried again.
    fn withdraw(&mut self) {
        self.pending = None;
    }

    /// No effect: if the peer is away, the short probes fail and nothing is concluded.
    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        usize::from(self.pending.is_some())
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<MtuReport> {
        self.at = now.at;
        if self.is_stopping {
            return Step::Finished;
        }
        if self.pending.is_some_and(|(_, deadline)| deadline <= now.drained) {
            self.reports.push_back(MtuReport::Lost);
            self.decided(false);
        }
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        if let Some((_, deadline)) = self.pending {
            return Step::Wait(deadline);
        }
        let plan = self.plan(now.at);
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        match plan {
            Ok(trial) => Step::Send(self.send(trial, now, arena)),
            Err(until) => Step::Wait(until),
        }
    }
}

fn mode(spec: &MtuSpec) -> Mode {
    if spec.keys.is_some() { Mode::Authenticated } else { Mode::Open }
}

fn headers(to: SocketAddr) -> u16 {
    if to.is_ipv4() { HEADERS_V4 } else { HEADERS_V6 }
}
