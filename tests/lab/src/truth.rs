//! The true outcome of each echo, from the logs of the wires between prober and responder.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use pathmeter_proto::sim::Corruption;
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::{NtpTime, PeerTimestamp};

use crate::connection::TimeBounds;
use crate::frame::UDP;
use crate::scenario;
use crate::wire::{DatagramHead, DeliveredCopy, LogEntry, Wire};

/// How echoes are recognised and evaluated.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Address of the prober.
    pub prober: IpAddr,
    /// Address and port of the responder; port 0 for hosts that answer ICMP.
    pub responder: SocketAddr,
    /// Wire format of the echoes.
    pub format: EchoFormat,
    /// Longer round trips are late.
    pub late_after: Duration,
    /// Replies after this time do not count.
    pub lost_after: Duration,
    /// Routers beyond the last wire, forward and reverse, whose TTL decrements the wires do not see.
    pub hidden_routers: [u64; 2],
}

/// Wire format of echoes. It determines the field offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EchoFormat {
    /// STAMP without authentication.
    Open,
    /// Authenticated STAMP.
    Authenticated,
    /// ICMP echo. The reply does not carry the responder's time, so the prober counts it as network time.
    Icmp,
}

/// Offsets of fields in a payload.
#[derive(Debug, Clone, Copy)]
struct FieldOffsets {
    ssid: usize,
    sequence: usize,
    /// Sequence number of the reply, from the responder.
    number: Option<usize>,
    /// Timestamp of the reply (T3).
    written: Option<usize>,
    /// First TLV extension.
    extension: Option<usize>,
}

impl EchoFormat {
    const fn layout(self, role: MessageRole) -> FieldOffsets {
        let (ssid, sequence, number, written, extension) = match (self, role) {
            (Self::Open, MessageRole::Request) => (14, 0, None, None, Some(44)),
            (Self::Open, MessageRole::Reply) => (14, 24, Some(0), Some(4), Some(44)),
            (Self::Authenticated, MessageRole::Request) => (26, 0, None, None, Some(112)),
            (Self::Authenticated, MessageRole::Reply) => (26, 48, Some(0), Some(16), Some(112)),
            (Self::Icmp, _) => (20, 16, None, None, None),
        };
        FieldOffsets { ssid, sequence, number, written, extension }
    }
}

/// All echoes that left the prober, by flow and sequence number.
#[derive(Debug, Default)]
pub struct Echoes {
    echoes: BTreeMap<EchoId, EchoRecord>,
    mtu_probes: [u64; 2],
}

/// Identity of an echo: source address, SSID, sequence number.
type EchoId = (SocketAddr, u16, u32);

#[derive(Debug, Clone, Default)]
struct EchoRecord {
    sent_at: Option<u64>,
    tos: u8,
    /// Undamaged copies of the request that reached the responder's host.
    requests: Vec<ReceivedRequest>,
    /// The replies that left the responder's host.
    replies: Vec<SentReply>,
    /// Undamaged copies of replies that reached the prober's host.
    answers: Vec<ReceivedReply>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ReceivedRequest {
    at: TimeBounds,
    tos: u8,
    ttl: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct SentReply {
    at: u64,
    /// Sequence number from the responder: unique among the replies of a flow.
    number: u32,
    tos: u8,
    /// Time from the reply's timestamp (T3) to its departure, in nanoseconds. The prober counts it as network
    /// time.
    timestamp_lag: u64,
}

/// Lower and upper bound of a time in nanoseconds, from the clock readings before and after the event.

#[derive(Debug, Clone, Copy)]
struct ReceivedReply {
    at: TimeBounds,
    /// Sequence number of the reply.
    number: u32,
    tos: u8,
    ttl: u8,
}

/// True counts of echoes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrueCounts {
    /// Requests that left the prober's host.
    pub sent: u64,
    /// Answered within `late_after`.
    pub ok: u64,
    /// Answered later, within `lost_after`.
    pub late: u64,
    /// Requests that did not reach the responder's host.
    pub lost_forward: u64,
    /// Requests that reached it, but no reply came back in time.
    pub lost_reverse: u64,
    /// Further copies of replies that arrived in time.
    pub duplicates: u64,
    /// First replies that arrived after one with a higher sequence number of the same flow (RFC 4737).
    pub reordered: u64,
    /// Replies that arrived too late to count.
    pub very_late: u64,
    /// Runs of losses, in the order of sequence numbers of a flow.
    pub bursts: u64,
    /// Copies of requests that reached the responder's host undamaged.
    pub requests: u64,
    /// Replies that left the responder's host.
    pub replies: u64,
    /// Replies to requests that were damaged beyond recognition on the way: no fault of the responder.
    pub replies_to_damaged: u64,
    /// Copies of those replies that reached the prober's host.
    pub received_replies_to_damaged: u64,
    /// Path MTU probes that reached the responder's host, and replies to them. They do not count as echoes.
    pub mtu_probes: [u64; 2],
    /// Answered echoes that arrived with a changed DSCP, forward and reverse.
    pub remarked: [u64; 2],
    /// Answered echoes that arrived marked "congestion experienced", forward and reverse.
    pub congested: [u64; 2],
    /// Sum of the round trips of all answered echoes, in nanoseconds.
    pub round_trips: u64,
    /// Uncertainty of that sum in nanoseconds, from the clock readings of the wire and from early timestamps
    /// of the responder.
    pub round_trips_uncertainty: u64,
    /// Hops of the last datagram that arrived, from its TTL, forward and reverse.
    pub hops: [u64; 2],
    /// Pairs of consecutive echoes that were both ok.
    pub consecutive_ok: u64,
    /// Sum over these pairs of the difference between their round trips, in nanoseconds.
    pub ipdv: u64,
    /// Uncertainty of that sum in nanoseconds, from the clock readings of the wire.
    pub ipdv_uncertainty: u64,
    /// Longest time that an answered request spent at the responder, in nanoseconds.
    pub turnaround_max: u64,
    /// Round trips too close to `late_after` or `lost_after` to decide. A run with any of them is
    /// inconclusive.
    pub undecidable: u64,
}

/// Parallel wires between prober and responder: each datagram takes one of them.
pub type WireGroup<'a> = Vec<&'a Wire>;

/// The role of a datagram in a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MessageRole {
    Request,
    Reply,
}

impl Rules {
    /// The role of a datagram in this measurement; `None` if it belongs to another one.
    fn role(&self, head: &DatagramHead) -> Option<MessageRole> {
        let (from, to) = (head.datagram.source, head.datagram.destination);
        let is_protocol = match self.format {
            EchoFormat::Open | EchoFormat::Authenticated => head.datagram.protocol == UDP,
            EchoFormat::Icmp => head.datagram.echo.is_some(),
        };
        if !is_protocol {
            None
        } else if from.ip() == self.prober && to == self.responder {
            Some(MessageRole::Request)
        } else if from == self.responder && to.ip() == self.prober {
            Some(MessageRole::Reply)
        } else {
            None
        }
    }
}

/// Round trips closer than this to a limit are undecidable. Chosen: ten times what a busy kernel takes from
/// one timestamp to the next.
const MARGIN: u64 = 2_000_000;

impl Echoes {
    /// Reads the logs. `wire_groups` are in order from the prober to the responder.
    ///
    /// # Panics
    /// When `wire_groups` is empty.
    #[must_use]
    pub fn read(wire_groups: &[WireGroup<'_>], rules: &Rules) -> Self {
        let mut echoes = Self::default();
        let logs: Vec<Vec<(LogEntry, MessageRole)>> =
            wire_groups.iter().map(|group| entries(group, rules)).collect();
        let (first, last) = (logs.first().expect("there is a wire"), logs.last().expect("there is a wire"));
        for (entry, role) in last {
            match role {
                MessageRole::Request => echoes.on_request_received(entry, rules),
                MessageRole::Reply => echoes.on_reply_sent(entry, rules),
            }
        }
        for (entry, role) in first {
            match role {
                MessageRole::Request => echoes.on_request_sent(entry, rules),
                MessageRole::Reply => echoes.on_reply_received(entry, rules),
            }
        }
        echoes
    }

    /// The echo that a datagram belongs to; `None` for path MTU probes.
    fn of(&mut self, head: &DatagramHead, role: MessageRole, rules: &Rules) -> Option<&mut EchoRecord> {
        if is_mtu_probe(head, rules) {
            return None;
        }
        let at = rules.format.layout(role);
        let ssid = u16::from_be_bytes([head.payload[at.ssid], head.payload[at.ssid + 1]]);
        let mut prober = match role {
            MessageRole::Request => head.datagram.source,
            MessageRole::Reply => head.datagram.destination,
        };
        if let Some(echo) = head.datagram.echo {
            prober.set_port(echo.identifier);
        }
        Some(self.echoes.entry((prober, ssid, number(head, at.sequence))).or_default())
    }

    fn on_request_sent(&mut self, request: &LogEntry, rules: &Rules) {
        let Some(echo) = self.of(&request.head, MessageRole::Request, rules) else { return };
        echo.sent_at.get_or_insert(request.at);
        echo.tos = request.head.datagram.tos;
    }

    fn on_request_received(&mut self, request: &LogEntry, rules: &Rules) {
        let copies =
            undamaged(request, rules).map(|(exit, at)| ReceivedRequest { at, tos: exit.tos, ttl: exit.ttl });
        let Some(echo) = self.of(&request.head, MessageRole::Request, rules) else {
            self.mtu_probes[0] += copies.count() as u64;
            return;
        };
        echo.requests.extend(copies);
        echo.requests.sort_unstable();
    }

    fn on_reply_sent(&mut self, reply: &LogEntry, rules: &Rules) {
        let Some(echo) = self.of(&reply.head, MessageRole::Reply, rules) else {
            self.mtu_probes[1] += 1;
            return;
        };
        let (number, tos) = (reply_number(&reply.head, rules), reply.head.datagram.tos);
        echo.replies.push(SentReply {
            at: reply.at,
            number,
            tos,
            timestamp_lag: timestamp_lag(reply, rules),
        });
        echo.replies.sort_unstable();
    }

    fn on_reply_received(&mut self, reply: &LogEntry, rules: &Rules) {
        let Some(echo) = self.of(&reply.head, MessageRole::Reply, rules) else { return };
        let number = reply_number(&reply.head, rules);
        let answer = |(exit, at): (&DeliveredCopy, TimeBounds)| ReceivedReply {
            at,
            number,
            tos: exit.tos,
            ttl: exit.ttl,
        };
        echo.answers.extend(undamaged(reply, rules).map(answer));
        echo.answers.sort_unstable_by_key(|answer| answer.at);
    }

    /// The echoes that were sent from these ports.
    #[must_use]
    pub fn from_ports(&self, ports: &Range<u16>) -> Self {
        let is_meant = |id: &EchoId| ports.contains(&id.0.port());
        let echoes = self.echoes.iter().filter(|(id, _)| is_meant(id));
        Self { echoes: echoes.map(|(id, echo)| (*id, echo.clone())).collect(), mtu_probes: [0, 0] }
    }

    /// The echoes that left within a period, in nanoseconds since 1970.
    #[must_use]
    pub fn within(mut self, time: &Range<u64>) -> Self {
        self.echoes.retain(|_, echo| echo.sent_at.is_some_and(|left| time.contains(&left)));
        self
    }

    /// The number of echoes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.echoes.len()
    }

    /// Whether there are no echoes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.echoes.is_empty()
    }

    /// Counts the echoes by outcome.
    #[must_use]
    pub fn counts(&self, rules: &Rules) -> TrueCounts {
        let mut counts = TrueCounts { mtu_probes: self.mtu_probes, ..TrueCounts::default() };
        for echo in self.echoes.values() {
            if echo.sent_at.is_none() {
                counts.replies_to_damaged += echo.replies.len() as u64;
                counts.received_replies_to_damaged += echo.answers.len() as u64;
                continue;
            }
            echo.count(&mut counts, rules);
        }
        counts.reordered = self.reordered(rules);
        counts.hops = self.hops(rules);
        self.count_runs(&mut counts, rules);
        counts
    }

    /// The number of lost echoes and of all echoes of each flow, by source port.
    #[must_use]
    pub fn flows(&self, rules: &Rules) -> BTreeMap<u16, (u64, u64)> {
        let mut flows: BTreeMap<u16, (u64, u64)> = BTreeMap::new();
        for ((source, ..), echo) in self.echoes.iter().filter(|(_, echo)| echo.sent_at.is_some()) {
            let (lost, all) = flows.entry(source.port()).or_default();
            *lost += u64::from(echo.answer(rules).is_none());
            *all += 1;
        }
        flows
    }

    fn hops(&self, rules: &Rules) -> [u64; 2] {
        if rules.format == EchoFormat::Icmp {
            return [0, 0];
        }
        let answered = self.echoes.values().filter_map(|echo| Some((echo, echo.answer(rules)?)));
        let Some((echo, answer)) = answered.max_by_key(|(_, answer)| answer.at) else { return [0, 0] };
        let request = echo.reply(answer).and_then(|(index, _)| echo.requests.get(index));
        // All pathmeter datagrams start with TTL 255.
        let forward = request.map_or(0, |request| 255 - u64::from(request.ttl));
        [forward + rules.hidden_routers[0], 255 - u64::from(answer.ttl) + rules.hidden_routers[1]]
    }

    fn reordered(&self, rules: &Rules) -> u64 {
        let mut arrivals: Vec<(TimeBounds, &EchoId)> =
            self.echoes.iter().filter_map(|(id, echo)| Some((echo.answer(rules)?.at, id))).collect();
        arrivals.sort_unstable();
        let mut expected: BTreeMap<(SocketAddr, u16), u32> = BTreeMap::new();
        let mut reordered = 0;
        for (_, (source, ssid, sequence)) in arrivals {
            let next = expected.entry((*source, *ssid)).or_default();
            if sequence < next { reordered += 1 } else { *next = sequence + 1 }
        }
        reordered
    }

    /// Counts what depends on the previous echo: runs of losses, and differences between round trips.
    fn count_runs(&self, counts: &mut TrueCounts, rules: &Rules) {
        let mut last: Option<(&EchoId, &EchoRecord)> = None;
        for (id, echo) in self.echoes.iter().filter(|(_, echo)| echo.sent_at.is_some()) {
            let before = last
                .replace((id, echo))
                .filter(|(before, _)| (before.0, before.1, before.2 + 1) == (id.0, id.1, id.2))
                .map(|(_, before)| before);
            let is_lost = echo.answer(rules).is_none();
            let was_lost = before.is_some_and(|before| before.answer(rules).is_none());
            counts.bursts += u64::from(is_lost && !was_lost);
            let ok = |echo: &EchoRecord| {
                echo.round_trip(rules).filter(|(rtt, _)| *rtt <= rules.late_after.as_nanos())
            };
            if let (Some((first, uncertainty)), Some((second, more))) = (before.and_then(ok), ok(echo)) {
                counts.consecutive_ok += 1;
                counts.ipdv += u64::try_from(first.abs_diff(second)).expect("below a minute");
                counts.ipdv_uncertainty += uncertainty + more;
            }
        }
    }
}

impl EchoRecord {
    fn count(&self, counts: &mut TrueCounts, rules: &Rules) {
        counts.sent += 1;
        counts.requests += self.requests.len() as u64;
        counts.replies += self.replies.len() as u64;
        let turnarounds = self.requests.iter().zip(&self.replies);
        let longest = turnarounds.map(|(request, reply)| reply.at.saturating_sub(request.at.0)).max();
        counts.turnaround_max = counts.turnaround_max.max(longest.unwrap_or_default());
        let in_time = self.answers.iter().filter(|answer| self.is_in_time(answer, rules)).count() as u64;
        counts.very_late += self.answers.len() as u64 - in_time;
        counts.duplicates += in_time.saturating_sub(1);
        let near = |time: u128, limit: Duration| time.abs_diff(limit.as_nanos()) < u128::from(MARGIN);
        let times =
            self.answers.iter().map(|answer| u128::from(answer.at.0 - self.sent_at.unwrap_or_default()));
        counts.undecidable += times.filter(|time| near(*time, rules.lost_after)).count() as u64;
        match (self.answer(rules), self.round_trip(rules)) {
            (Some(answer), Some((rtt, uncertainty))) => {
                counts.undecidable += u64::from(near(rtt, rules.late_after));
                let is_late = rtt > rules.late_after.as_nanos();
                counts.late += u64::from(is_late);
                counts.ok += u64::from(!is_late);
                counts.round_trips += u64::try_from(rtt).expect("below a minute");
                counts.round_trips_uncertainty += uncertainty;
                if rules.format != EchoFormat::Icmp {
                    self.count_classes(counts, answer);
                }
            }
            (None, _) | (_, None) if self.requests.is_empty() => counts.lost_forward += 1,
            (None, _) | (_, None) => counts.lost_reverse += 1,
        }
    }

    fn count_classes(&self, counts: &mut TrueCounts, answer: &ReceivedReply) {
        let Some((index, reply)) = self.reply(answer) else { return };
        let forward = self.requests.get(index).map(|request| (self.tos, request.tos));
        let reverse = Some((reply.tos, answer.tos));
        for (way, class) in [forward, reverse].into_iter().enumerate() {
            let Some((before, after)) = class else { continue };
            counts.remarked[way] += u64::from(before >> 2 != after >> 2);
            counts.congested[way] += u64::from(after & 3 == 3);
        }
    }

    fn is_in_time(&self, answer: &ReceivedReply, rules: &Rules) -> bool {
        u128::from(answer.at.0 - self.sent_at.unwrap_or_default()) <= rules.lost_after.as_nanos()
    }

    /// The first reply, if it arrived in time.
    fn answer(&self, rules: &Rules) -> Option<&ReceivedReply> {
        self.sent_at?;
        self.answers.iter().find(|answer| self.is_in_time(answer, rules))
    }

    /// The sent reply of a received one, with its index. Copies of the request are answered in order of
    /// arrival.
    fn reply(&self, answer: &ReceivedReply) -> Option<(usize, &SentReply)> {
        self.replies.iter().enumerate().find(|(_, reply)| reply.number == answer.number)
    }

    /// The round trip without the responder's time, and its uncertainty, in nanoseconds.
    fn round_trip(&self, rules: &Rules) -> Option<(u128, u64)> {
        let answer = self.answer(rules)?;
        if rules.format == EchoFormat::Icmp {
            let elapsed = middle(answer.at) - self.sent_at?;
            return Some((elapsed.into(), answer.at.1 - answer.at.0));
        }
        let (index, reply) = self.reply(answer)?;
        let reached = self.requests.get(index)?.at;
        let turnaround = reply.at.saturating_sub(middle(reached));
        let elapsed = middle(answer.at) - self.sent_at?;
        let uncertainty = (reached.1 - reached.0) + (answer.at.1 - answer.at.0) + reply.timestamp_lag;
        Some((u128::from(elapsed.saturating_sub(turnaround)), uncertainty))
    }
}

/// All datagrams of this measurement that crossed a group of wires.
fn entries(group: &WireGroup<'_>, rules: &Rules) -> Vec<(LogEntry, MessageRole)> {
    let mut entries = Vec::new();
    for wire in group {
        wire.read(|log| {
            let own = log.iter().filter_map(|entry| Some((entry.clone(), rules.role(&entry.head)?)));
            entries.extend(own);
        });
    }
    entries
}

/// Copies that were delivered undamaged, and when.
fn undamaged<'a>(
    entry: &'a LogEntry,
    rules: &'a Rules,
) -> impl Iterator<Item = (&'a DeliveredCopy, TimeBounds)> {
    let copies = entry.outcome.iter().flatten().flatten();
    let is_whole =
        |exit: &&DeliveredCopy| exit.damage.is_none_or(|damage| is_harmless(&entry.head, damage, rules));
    copies.filter(is_whole).filter_map(|exit| Some((exit, exit.delivered_at?)))
}

/// Time from a reply's timestamp to its departure in nanoseconds. 0 for timestamps that are far off or in the
/// future: the responder's clock is wrong then.
fn timestamp_lag(reply: &LogEntry, rules: &Rules) -> u64 {
    const LAG_MAX: u64 = 500_000_000;
    let Some(at) = rules.format.layout(MessageRole::Reply).written else { return 0 };
    let timestamp = reply.head.payload[at..at + 8].try_into().expect("eight");
    let written = PeerTimestamp::from_ntp(u64::from_be_bytes(timestamp));
    let left = PeerTimestamp::from_ntp(NtpTime::from(WallTime::from_nanos(reply.at)).0);
    u64::try_from(left.signed_since(written))
        .ok()
        .filter(|timestamp_lag| *timestamp_lag <= LAG_MAX)
        .unwrap_or_default()
}

/// Whether a datagram is a path MTU probe: its first extension is pathmeter's session record with the flag
/// for a brief reply.
fn is_mtu_probe(head: &DatagramHead, rules: &Rules) -> bool {
    const SESSION: u8 = 252;
    const BRIEF: u8 = 2;
    let Some(extension) = rules.format.layout(MessageRole::Request).extension else { return false };
    head.payload[extension + 1] == SESSION && head.payload[extension + 4 + 5] & BRIEF != 0
}

/// Whether the damaged byte is never read: the flags of the HMAC extension, the last one of an authenticated
/// request, which RFC 8972 neither authenticates nor lets a reflector check.
fn is_harmless(head: &DatagramHead, (byte, who): (usize, Corruption), rules: &Rules) -> bool {
    const HMAC_BYTES: usize = 20;
    let is_unread = byte + HMAC_BYTES == head.payload_bytes() && head.datagram.destination == rules.responder;
    who == Corruption::Undetected && rules.format == EchoFormat::Authenticated && is_unread
}

/// Delivered copies with damage that only the application can detect: of requests, and of replies.
#[must_use]
pub fn forged(wire: &Wire, rules: &Rules) -> [u64; 2] {
    let mut forged = [0, 0];
    wire.read(|log| {
        for entry in log {
            let Some(role) = rules.role(&entry.head) else { continue };
            let copies = entry.outcome.iter().flatten().flatten();
            let damages = copies.filter_map(|exit| exit.damage);
            let is_forged = |damage: &(usize, Corruption)| {
                damage.1 == Corruption::Undetected && !is_harmless(&entry.head, *damage, rules)
            };
            forged[role as usize] += damages.filter(is_forged).count() as u64;
        }
    });
    forged
}

/// Sequence number of a reply from the responder; 0 for hosts that answer ICMP.
fn reply_number(head: &DatagramHead, rules: &Rules) -> u32 {
    rules.format.layout(MessageRole::Reply).number.map_or(0, |at| number(head, at))
}

fn number(head: &DatagramHead, at: usize) -> u32 {
    u32::from_be_bytes(head.payload[at..at + 4].try_into().expect("four"))
}

fn middle((from, to): TimeBounds) -> u64 {
    from + (to - from) / 2
}

impl TrueCounts {
    /// A count by its name in scenario files; `None` if there is no such count.
    #[must_use]
    pub fn by_name(&self, id: &str) -> Option<u64> {
        Some(match id {
            "sent" => self.sent,
            "ok" => self.ok,
            "late" => self.late,
            "lost_forward" => self.lost_forward,
            "lost_reverse" => self.lost_reverse,
            "duplicates" => self.duplicates,
            "reordered" => self.reordered,
            "very_late" => self.very_late,
            "bursts" => self.bursts,
            "remarked_forward" => self.remarked[0],
            "remarked_reverse" => self.remarked[1],
            "congested_forward" => self.congested[0],
            "congested_reverse" => self.congested[1],
            "hops_forward" => self.hops[0],
            "hops_reverse" => self.hops[1],
            _ => return None,
        })
    }

    /// Checks that the scenario had the intended effect.
    ///
    /// # Errors
    /// The first count that is outside its range.
    pub fn check(
        &self,
        expected: &BTreeMap<scenario::CountName, scenario::CountRange>,
    ) -> Result<(), String> {
        for (scenario::CountName(id), scenario::CountRange(range)) in expected {
            let found = self.by_name(id).expect("a scenario has only known names");
            if !range.contains(&found) {
                return Err(format!("{id}: true count is {found}, the scenario expects {range:?}"));
            }
        }
        Ok(())
    }
}
