//! Path MTU discovery by probes (RFC 8899, DPLPMTUD): the longest packet that a path carries in one piece.
//!
//! [`MtuSearch`] sends STAMP requests that are padded and may not be fragmented, and looks which of them are answered. It needs no
//! ICMP; what routers say is a hint for the next size. It sends on the path's first flow, so on the same 5-tuple and route as the
//! echoes, with a session of its own, so that it touches neither their records nor their counts. Its requests ask for
//! [brief](crate::wire::tlv::Session::is_brief) replies: then only the way there is tested.

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

/// What to look for. Sizes are whole IP packets in bytes.
#[derive(Debug, Clone)]
pub struct MtuSpec {
    /// The responder.
    pub to: SocketAddr,
    /// The session identifier, not one of the echoes'.
    pub ssid: u16,
    /// Time between two confirmations of what was found.
    pub interval: Duration,
    /// The longest packet that is tried, at least [`CEILING_MIN`].
    pub ceiling: u16,
    /// Class of service: the echoes'.
    pub dscp: Dscp,
    /// Without a reply by then a probe is lost.
    pub lost_after: Duration,
    /// Authenticated mode with these keys; `None`: open mode.
    pub keys: Option<Arc<Keys>>,
    /// What an earlier search found: it is confirmed first. Above the ceiling it counts as the ceiling.
    pub known: Option<u16>,
    /// Decides phase, jitter and the session's number.
    pub seed: u64,
}

/// The lowest ceiling: IPv6's smallest MTU (RFC 8200 section 5).
pub const CEILING_MIN: u16 = 1280;

/// What was learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtuReport {
    /// A probe left the host.
    Sent,
    /// A probe was answered in time.
    Acknowledged,
    /// A probe was not answered in time.
    Lost,
    /// Our host refused a probe as too long, before it left, or a router did, after.
    TooBig,
    /// The path MTU is known, or is another one than before.
    Changed {
        /// What it was; `None`: not known.
        from: Option<u16>,
        /// What it is.
        to: u16,
    },
}

/// Finds the path MTU, confirms it every interval, and now and then tries whether it has grown.
///
/// **When a size is refused.** At once if our own host does not send it. Else when [`MAX_PROBES`] of it were lost and a short
/// probe sent afterwards was answered, [`ROUNDS`] times in a row: 9 probes lost, and a path that was alive three times meanwhile.
/// One answer in between, even a late one, and the size passes. If the short probe is not answered the path is dead: nothing is
/// concluded, what is known stays, and it is tried again later. So where a share `p` of the probes or their replies is lost at
/// random, a size that passes is refused with probability `p⁹`: 5·10⁻⁷ for each size that is tried at 20 %. Confirmed once a
/// minute, such a path shrinks wrongly once in four years, and grows back when larger sizes are next tried. RFC 8899 is
/// content with one round.
#[derive(Debug)]
pub struct MtuSearch {
    spec: MtuSpec,
    limits: SizeLimits,
    session: u32,
    occasion: SearchPhase,
    bracket: Bracket,
    known: Option<u16>,
    trial: Option<SizeTrial>,
    /// The probe that is waited for, by its sequence number, and how long.
    flight: Option<(u32, Timestamp)>,
    /// The latest probes: a late answer proves as much as one in time.
    recent: VecDeque<SizeProbe>,
    next_sequence: u32,
    left: u32,
    /// The longest round trip of late.
    rtt: Option<Duration>,
    raise_at: Timestamp,
    pauses: u64,
    /// The time as it was last told.
    at: Timestamp,
    is_stopping: bool,
    reports: VecDeque<MtuReport>,
}

/// What the probes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SearchPhase {
    /// For nothing until then.
    Rest(Timestamp),
    /// Whether what is known still passes.
    Confirm,
    /// What passes.
    Search,
}

/// One size that is being tried.
#[derive(Debug, Clone, Copy)]
struct SizeTrial {
    size: u16,
    turn: TrialTurn,
    /// Probes of this turn that were lost.
    lost: u8,
    /// Rounds that ended with an answer to a short probe.
    rounds: u8,
}

/// What a trial sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TrialTurn {
    /// The size itself.
    Size,
    /// A short one: is the path alive?
    Control,
}

/// A probe that was sent.
#[derive(Debug, Clone, Copy)]
struct SizeProbe {
    sequence: u32,
    timestamp: NtpTime,
    size: u16,
    at: Timestamp,
}

/// RFC 8899 section 5.1.2.
pub const MAX_PROBES: u8 = 3;

/// How often the probes of a size are all lost before it is refused; see [`MtuSearch`]. Chosen: 3, so that 20 % of random loss does
/// not shrink a path's MTU.
pub const ROUNDS: u8 = 3;

/// PMTU_RAISE_TIMER (RFC 8899 section 5.1.1): larger sizes are tried this often, or every ten intervals if that is shorter.
const RAISE_AFTER: Duration = Duration::from_secs(600);

/// PROBE_TIMER may not be shorter (RFC 8899 section 5.1.1), unless `lost_after` is; nor than four of the longest round trip.
const PATIENCE_MIN: Duration = Duration::from_secs(1);

/// A path that does not answer is tried again after this, or an interval if that is shorter. Chosen: 10 s, a few datagrams a
/// minute for a dead host, and soon enough for one that has come back.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// Probes that are remembered; one that is answered after so many others proves nothing any more.
const RECENT: usize = 16;

/// BASE_PLPMTU (RFC 8899 section 5.1.2).
const BASE_V4: u16 = 1200;
const BASE_V6: u16 = 1280;

/// IP and UDP headers.
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
        let phase = Duration::from_nanos(mix(spec.seed) % nanos(spec.interval).max(1));
        Self {
            // What carries a long packet carries the ceiling.
            known: spec.known.filter(|known| *known >= limits.small).map(|known| known.min(limits.ceiling)),
            occasion: SearchPhase::Rest(at + phase),
            bracket: Bracket::new(limits),
            limits,
            session,
            trial: None,
            flight: None,
            recent: VecDeque::new(),
            next_sequence: 0,
            left: 0,
            rtt: None,
            raise_at: at,
            pauses: 0,
            at,
            is_stopping: false,
            reports: VecDeque::new(),
            spec,
        }
    }

    /// The path MTU, in bytes of a whole IP packet; `None` until it was found.
    #[must_use]
    pub fn known(&self) -> Option<u16> {
        self.known
    }

    /// Whether a reply answers a probe of ours: for drivers that cannot tell by its session whose it is.
    #[must_use]
    pub fn has_asked(&self, reply: &[u8]) -> bool {
        let reply = stamp::Reply::decode(reply, mode(&self.spec));
        reply.is_ok_and(|reply| self.probe(reply.sender_sequence, reply.sender_timestamp).is_some())
    }

    fn probe(&self, sequence: u32, timestamp: NtpTime) -> Option<SizeProbe> {
        let is_it = |probe: &&SizeProbe| probe.sequence == sequence && probe.timestamp == timestamp;
        self.recent.iter().rev().find(is_it).copied()
    }

    /// How long an answer is waited for.
    fn patience(&self) -> Duration {
        let enough = self.rtt.map_or(Duration::MAX, |rtt| PATIENCE_MIN.max(4 * rtt));
        self.spec.lost_after.min(enough)
    }

    /// What is tried next; `Err`: nothing until then.
    fn plan(&mut self, now: Timestamp) -> Result<SizeTrial, Timestamp> {
        loop {
            if let Some(trial) = self.trial {
                return Ok(trial);
            }
            match (self.occasion, self.known) {
                (SearchPhase::Rest(until), _) if now < until => return Err(until),
                (SearchPhase::Rest(_), None) => self.begin(Bracket::new(self.limits)),
                (SearchPhase::Rest(_), Some(known)) => {
                    self.bracket = Bracket::new(self.limits);
                    self.occasion = SearchPhase::Confirm;
                    self.trial = Some(SizeTrial::of(known));
                }
                (SearchPhase::Confirm, Some(known)) if self.bracket.has_passed(known) => {
                    if now >= self.raise_at {
                        self.begin(Bracket::above(self.limits, known));
                    } else {
                        self.rest(now, self.spec.interval);
                    }
                }
                (SearchPhase::Confirm, _) => self.occasion = SearchPhase::Search,
                (SearchPhase::Search, _) => match self.bracket.next() {
                    Ok(size) => self.trial = Some(SizeTrial::of(size)),
                    Err(found) => self.conclude(found, now),
                },
            }
        }
    }

    fn begin(&mut self, bracket: Bracket) {
        self.bracket = bracket;
        self.occasion = SearchPhase::Search;
    }

    fn conclude(&mut self, found: u16, now: Timestamp) {
        let from = self.known.replace(found);
        if from != Some(found) {
            self.reports.push_back(MtuReport::Changed { from, to: found });
        }
        self.raise_at = now + RAISE_AFTER.min(10 * self.spec.interval);
        self.rest(now, self.spec.interval);
    }

    /// Does nothing for about so long: ±25 %, as the echoes' grid.
    fn rest(&mut self, now: Timestamp, span: Duration) {
        self.pauses += 1;
        let jitter = mix(self.spec.seed ^ mix(self.pauses)) % (nanos(span) / 2).max(1);
        self.occasion = SearchPhase::Rest(now + span * 3 / 4 + Duration::from_nanos(jitter));
        self.trial = None;
    }

    /// Nothing can be concluded.
    fn give_up(&mut self) {
        self.rest(self.at, RETRY_AFTER.min(self.spec.interval));
    }

    /// A probe of that size arrived.
    fn passed(&mut self, size: u16) {
        self.bracket.passed(size);
        if self.trial.is_some_and(|trial| trial.size <= size) {
            self.trial = None;
        }
        let is_larger = self.known.is_some_and(|known| size > known);
        if let (SearchPhase::Rest(_), true) = (self.occasion, is_larger) {
            // What was concluded is wrong.
            (self.occasion, self.raise_at) = (SearchPhase::Rest(self.at), self.at);
        }
    }

    /// The probe that was waited for was answered, which [`passed`](Self::passed) has been told, or is given up.
    fn decided(&mut self, is_answered: bool) {
        self.flight = None;
        let Some(trial) = &mut self.trial else { return };
        match (trial.turn, is_answered) {
            // That ended the trial.
            (TrialTurn::Size, true) => {}
            (TrialTurn::Size, false) => {
                trial.lost += 1;
                if trial.lost == MAX_PROBES {
                    (trial.turn, trial.lost) = (TrialTurn::Control, 0);
                }
            }
            (TrialTurn::Control, true) => {
                trial.rounds += 1;
                (trial.turn, trial.lost) = (TrialTurn::Size, 0);
                if trial.rounds == ROUNDS {
                    let size = trial.size;
                    self.refused(size);
                    self.bracket.passed(self.limits.small);
                }
            }
            (TrialTurn::Control, false) => {
                trial.lost += 1;
                if trial.lost == MAX_PROBES {
                    self.give_up();
                }
            }
        }
    }

    fn refused(&mut self, size: u16) {
        self.bracket.refused(size);
        self.trial = None;
    }

    fn reply(&mut self, datagram: &[u8], arrival: &Arrival) -> Option<()> {
        let mode = mode(&self.spec);
        let reply = stamp::Reply::decode(datagram, mode).ok()?;
        if let Some(keys) = &self.spec.keys {
            stamp::verify(datagram, keys).ok()?;
        }
        ReplyExtensions::read(datagram, mode, self.spec.keys.as_deref()).ok()?;
        let is_ours = reply.ssid == self.spec.ssid || reply.ssid == 0;
        let probe = self.probe(reply.sender_sequence, reply.sender_timestamp).filter(|_| is_ours)?;
        let rtt = arrival.at.since(probe.at);
        // One long round trip is forgotten over the next few.
        self.rtt = Some(self.rtt.map_or(rtt, |known| rtt.max(known * 7 / 8)));
        self.passed(probe.size);
        if self.flight.is_some_and(|(sequence, _)| sequence == probe.sequence) {
            self.reports.push_back(MtuReport::Acknowledged);
            self.decided(true);
        }
        Some(())
    }

    /// A router complains. RFC 8899 section 4.6.1: only what quotes a probe of ours counts.
    fn complaint(&mut self, quoted: &[u8], mtu: Option<u32>) -> Option<()> {
        let request = Request::decode(quoted, mode(&self.spec)).ok()?;
        let is_ours = request.ssid == self.spec.ssid;
        let probe = self.probe(request.sequence, request.timestamp).filter(|_| is_ours)?;
        let is_flight = self.flight.is_some_and(|(sequence, _)| sequence == probe.sequence);
        // Nothing on the way has reason to refuse the shortest: whoever says so is not believed.
        if is_flight && probe.size > self.limits.small {
            self.reports.push_back(MtuReport::TooBig);
            self.decided(false);
        }
        if mtu.is_some_and(|mtu| self.bracket.hinted(mtu, probe.size)) {
            // The hint comes first; this size has its turn again if that is needed.
            self.trial = None;
        }
        Some(())
    }

    fn send(&mut self, trial: SizeTrial, now: Now, arena: &mut Vec<u8>) -> Send {
        let size = match trial.turn {
            TrialTurn::Size => trial.size,
            TrialTurn::Control => self.limits.small,
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
            sent: self.left.wrapping_add(1),
            is_brief: true,
            dscp: self.spec.dscp.value(),
            size: Some(size - headers(self.spec.to)),
            extensions: RequestExtensions::All,
        };
        let key = self.spec.keys.as_ref().map(|keys| keys.current());
        let timestamp = encode(&contents, key, arena).timestamp;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(SizeProbe { sequence, timestamp, size, at: now.at });
        self.flight = Some((sequence, now.at + self.patience()));
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
        Self { size, turn: TrialTurn::Size, lost: 0, rounds: 0 }
    }
}

impl Machine for MtuSearch {
    type Report = MtuReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        self.at = self.at.max(arrival.at);
        // What fits no probe is nobody's: it is not counted, as it would be for an echo.
        let _ = match arrival.icmp {
            Some(icmp) if icmp.kind == IcmpKind::TooBig => self.complaint(datagram, icmp.mtu),
            // Nobody there: the short probe will show it.
            Some(_) => None,
            None => self.reply(datagram, arrival),
        };
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        let Some(probe) = self.recent.iter_mut().find(|probe| SendId(probe.sequence.into()) == id) else {
            return;
        };
        probe.at = at;
        if by == TimestampSource::User {
            self.left = self.left.wrapping_add(1);
            self.reports.push_back(MtuReport::Sent);
        }
        let patience = self.patience();
        if let Some((sequence, deadline)) = &mut self.flight
            && SendId(u64::from(*sequence)) == id
        {
            *deadline = at + patience;
        }
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        let Some(place) = self.recent.iter().position(|probe| SendId(probe.sequence.into()) == id) else {
            return;
        };
        let size = self.recent.remove(place).expect("it was found just above").size;
        self.flight = None;
        match why {
            NotSent::TooBig => {
                self.reports.push_back(MtuReport::TooBig);
                match size > self.limits.small {
                    true => self.refused(size),
                    false => self.give_up(),
                }
            }
            NotSent::Unreachable | NotSent::Buffer | NotSent::Permission | NotSent::Other => self.give_up(),
        }
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    /// The probe that is waited for proves nothing; its size is tried again.
    fn withdraw(&mut self) {
        self.flight = None;
    }

    /// Its short probes show that nobody answers, and then nothing is concluded.
    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        usize::from(self.flight.is_some())
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<MtuReport> {
        self.at = now.at;
        if self.is_stopping {
            return Step::Finished;
        }
        if self.flight.is_some_and(|(_, deadline)| deadline <= now.drained) {
            self.reports.push_back(MtuReport::Lost);
            self.decided(false);
        }
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        if let Some((_, deadline)) = self.flight {
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
