//! Machines under arbitrary sequences of driver and network events.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{
    EchoReport, EchoSpec, Prober, Quirks, ResponderReport, StampResponder, WireFormat,
};
use pathmeter_proto::key::Key;
use pathmeter_proto::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine, NotSent, Now, SENT_TTL, Send, SendId, Step,
    TimestampSource,
};
use pathmeter_proto::time::{Timestamp, WallOffset, WallTime};
use pathmeter_proto::wire::ReverseTrace;
use pathmeter_proto::wire::icmp::IcmpVersion;
use pathmeter_proto::wire::stamp::{self, Mode};
use pathmeter_proto::wire::tlv;

use super::{Input, keys};

/// Arbitrary datagrams from arbitrary sources: each gets one reply or one refusal; a reply is as long as its
/// request or, if the session record asks for it, shorter; it goes to the source of the request and is never
/// answered itself; only the extension for traces of the way back limits its TTL; the session table is
/// bounded.
///
/// Input: flags, then records of source, milliseconds, flags, length, bytes.
pub(crate) fn responder(bytes: &[u8]) {
    let mut input = Input(bytes);
    let flags = input.byte();
    let keys = (flags & 1 != 0).then(|| Arc::new(keys()));
    let key = keys.as_ref().map(|keys| keys.current().clone());
    let rate = if flags & 4 != 0 { 20 } else { 1_000_000 };
    let policy = Policy {
        open: flags & 2 != 0,
        reflector_ports: [862].into(),
        rate,
        rate_per_source: rate,
        ..Policy::default()
    };
    let limit = usize::from(flags >> 4) + 1;
    let mut responder = StampResponder::new(policy, keys, limit);
    let (mut at, mut last) = (start(), Vec::new());
    while !input.is_over() {
        let from = source(input.byte());
        at = at + Duration::from_millis(input.byte().into());
        let flags = input.byte();
        let len = usize::from(input.word());
        let mut datagram = if flags & 4 != 0 { std::mem::take(&mut last) } else { input.take(len).to_vec() };
        let is_own_reply = flags & 4 != 0 && !datagram.is_empty();
        seal(&mut datagram, flags, key.as_ref());
        let reply = answer(&mut responder, &datagram, &arrival(from, at), flags & 8 != 0);
        if let Some((send, reply)) = reply {
            assert_eq!(send.to, from);
            assert!(reply.len() == datagram.len() || reply.len() < datagram.len() && is_brief(&reply));
            assert_ne!(from.port(), 862, "862 is a reflector port");
            let is_known = is_own_reply && flags & 3 == 0 && (key.is_some() || has_record(&datagram));
            // To a responder with keys, an open reply without session record looks like a request.
            let is_open = key.is_some() && stamp::verify(&datagram, &super::keys()).is_err();
            assert!(!is_known || is_open && !has_record(&datagram), "its own reply was answered");
            assert!(send.ttl == SENT_TTL || is_limited_to(&reply, send.ttl), "TTL {}", send.ttl);
            if flags & 16 != 0 {
                let router = [10, 0, 0, send.ttl].into();
                let icmp = Some(IcmpError {
                    router,
                    kind: IcmpKind::TtlExceeded,
                    code: 0,
                    mtu: None,
                    extensions_at: None,
                });
                responder.received(&reply, &Arrival { icmp, ..arrival(from, at) });
            }
            last = reply;
        }
        assert!(responder.sessions() <= limit);
    }
}

fn has_record(reply: &[u8]) -> bool {
    let ours = tlv::walk(reply, Mode::Open.base_bytes()).filter(|found| found.kind == tlv::SESSION).last();
    let record = ours.and_then(|found| tlv::SessionRecord::read(found.value(reply)).ok());
    record.is_some_and(|record| record.is_reply)
}

/// Whether the session record of a reply says that padding was left out.
fn is_brief(reply: &[u8]) -> bool {
    [Mode::Open, Mode::Authenticated].iter().any(|mode| {
        let ours = reply.get(mode.base_bytes()..).is_some().then(|| tlv::walk(reply, mode.base_bytes()));
        let mut records = ours.into_iter().flatten().filter(|found| found.kind == tlv::SESSION);
        records.any(|found| tlv::SessionRecord::read(found.value(reply)).is_ok_and(|record| record.is_brief))
    })
}

/// Whether an extension of a reply says that its TTL is this.
fn is_limited_to(reply: &[u8], ttl: u8) -> bool {
    [Mode::Open, Mode::Authenticated].iter().any(|mode| {
        let all = reply.get(mode.base_bytes()..).is_some().then(|| tlv::walk(reply, mode.base_bytes()));
        let mut found = all.into_iter().flatten().filter(|found| found.kind == tlv::REVERSE_TRACE);
        found.any(|found| {
            let reverse = ReverseTrace::read(found.value(reply));
            reverse.is_ok_and(|reverse| reverse.ttl == ttl && reverse.deferred.is_none())
        })
    })
}

fn seal(datagram: &mut Vec<u8>, flags: u8, key: Option<&Key>) {
    let Some(key) = key.filter(|_| datagram.len() >= 112) else { return };
    if flags & 1 != 0 {
        stamp::seal(datagram, Mode::Authenticated, Some(key));
    }
    if flags & 2 != 0 {
        let hmac = tlv::append(datagram, tlv::HMAC, tlv::HMAC_VALUE_BYTES);
        tlv::seal(datagram, 112, hmac, key);
    }
}

pub(super) fn answer(
    responder: &mut StampResponder,
    datagram: &[u8],
    arrival: &Arrival,
    has_timestamp: bool,
) -> Option<(Send, Vec<u8>)> {
    let (mut reply, mut answered, mut refused) = (None, 0, 0);
    responder.received(datagram, arrival);
    for _ in 0..10 {
        let mut arena = Vec::new();
        match responder.step(now(arrival.at), &mut HostDrops::default(), &mut arena) {
            Step::Send(send) => {
                assert!(reply.is_none());
                responder.sent(
                    send.id,
                    arrival.at,
                    if has_timestamp { TimestampSource::Kernel } else { TimestampSource::User },
                );
                reply = Some((send, arena));
            }
            Step::Report(ResponderReport::Answered) => answered += 1,
            Step::Report(ResponderReport::Refused(_)) => refused += 1,
            Step::Report(ResponderReport::Sources(_)) => {}
            Step::Wait(_) => {
                assert_eq!((answered, answered + refused), (u32::from(reply.is_some()), 1));
                return reply;
            }
            Step::Finished => panic!("a responder does not finish by itself"),
        }
    }
    panic!("the machine never waits");
}

/// Arbitrary events in arbitrary order: every datagram that left gets exactly one verdict, and there are no
/// other verdicts.
///
/// Input: flags, then records of an operation and its parameters.
pub(crate) fn prober(bytes: &[u8]) {
    probe(bytes, false);
}

/// The same for a prober that measures an ICMP host.
pub(crate) fn icmp_prober(bytes: &[u8]) {
    probe(bytes, true);
}

fn probe(bytes: &[u8], is_icmp: bool) {
    let mut input = Input(bytes);
    let flags = input.byte();
    let keys = (flags & 1 != 0).then(|| Arc::new(keys()));
    let policy = Policy { open: true, rate: u64::MAX, rate_per_source: u64::MAX, ..Policy::default() };
    let spec = EchoSpec {
        to: source(0),
        wire: if is_icmp {
            WireFormat::Icmp
        } else {
            WireFormat::Stamp { keys: keys.clone(), quirks: Quirks::default() }
        },
        interval: Duration::from_millis([1, 20, 100, 1_000][usize::from(flags >> 1 & 3)]),
        ssids: (1..=1 + u16::from(flags >> 3 & 3)).collect(),
        size: [None, Some(44), Some(200), Some(9_000)][usize::from(flags >> 5 & 3)],
        dscp: Dscp::DEFAULT,
        late_after: Duration::from_secs(1),
        lost_after: Duration::from_secs(3),
        tx_timestamps: flags & 0x80 != 0,
        count: None,
        seed: u64::from(flags),
    };
    let mut run = Run {
        prober: Prober::new(spec, start()),
        responder: StampResponder::new(policy, keys.clone(), 8),
        key: keys.map(|keys| keys.current().clone()),
        at: start(),
        drops: HostDrops::default(),
        left: Vec::new(),
        verdicts: BTreeMap::new(),
        refuses: false,
        is_icmp,
    };
    // Each operation sends only a few datagrams; the limit keeps a run short.
    for _ in 0..400 {
        if input.is_over() {
            break;
        }
        run.event(&mut input);
        run.drive();
    }
    run.prober.stop();
    run.prober.withdraw();
    run.drive();
    assert_eq!(run.prober.in_flight(), 0);
    let undecided = run.verdicts.iter().find(|(_, verdicts)| **verdicts != 1);
    assert_eq!(undecided, None, "one verdict each");
}

struct Run {
    prober: Prober,
    responder: StampResponder,
    key: Option<Key>,
    at: Timestamp,
    drops: HostDrops,
    /// Datagrams that were sent or refused, with their flow.
    left: Vec<(SendId, u8, Vec<u8>)>,
    /// Number of verdicts of each datagram that left.
    verdicts: BTreeMap<(u8, u64), u32>,
    refuses: bool,
    is_icmp: bool,
}

impl Run {
    fn event(&mut self, input: &mut Input) {
        match input.byte() % 12 {
            0 => self.at = self.at + Duration::from_millis(input.byte().into()),
            1 => self.at = self.at + Duration::from_millis(u64::from(input.byte()) * 50),
            2 | 3 => self.deliver_reply(input),
            4 => {
                let len = usize::from(input.byte());
                let flow = input.byte() % 5;
                let garbage = input.take(len).to_vec();
                self.receive(&garbage, flow, 0);
            }
            5 => {
                let early = Duration::from_micros(u64::from(input.byte()) * 100);
                if let Some((id, ..)) = self.chosen(input) {
                    self.prober.sent(id, self.at - early, TimestampSource::Kernel);
                }
            }
            6 => self.refuses = !self.refuses,
            7 => {
                if let Some((id, ..)) = self.chosen(input) {
                    self.prober.not_sent(id, NotSent::Buffer);
                }
            }
            8 => self.prober.withdraw(),
            9 => self.prober.peer_leaving(self.at),
            10 => {
                if let Some((_, flow, bytes)) = self.chosen(input) {
                    let router = [192, 0, 2, 9].into();
                    let mut arrival = arrival(source(0), self.at);
                    let quoted = &bytes[..bytes.len().min(usize::from(input.byte()))];
                    arrival.flow = flow;
                    arrival.icmp = Some(IcmpError {
                        router,
                        kind: IcmpKind::TtlExceeded,
                        code: 0,
                        mtu: None,
                        extensions_at: None,
                    });
                    self.prober.received(quoted, &arrival);
                }
            }
            _ => {
                let from = self.at - Duration::from_secs(1);
                self.drops.add(0, from, self.at, input.byte().into());
            }
        }
    }

    /// One of the latest datagrams, chosen by the input.
    fn chosen(&self, input: &mut Input) -> Option<(SendId, u8, Vec<u8>)> {
        let back = usize::from(input.byte());
        self.left.iter().rev().nth(back % self.left.len().max(1)).cloned()
    }

    /// Delivers a reply to one of the latest datagrams, authentic or with changed bytes, sealed again or not.
    fn deliver_reply(&mut self, input: &mut Input) {
        let Some((_, flow, request)) = self.chosen(input) else { return };
        let Some(mut reply) = self.reply_to(&request, flow) else { return };
        let how = input.byte();
        for _ in 0..how & 3 {
            let at = usize::from(input.word()) % reply.len();
            reply[at] ^= input.byte();
        }
        if how & 4 != 0 {
            reply.truncate(usize::from(input.word()) % (reply.len() + 1));
        }
        if how & 8 != 0 && reply.len() >= 112 {
            stamp::seal(&mut reply, Mode::Authenticated, self.key.as_ref());
        }
        self.receive(&reply, flow, input.byte());
        if how & 16 != 0 {
            self.receive(&reply, flow, 0);
        }
    }

    fn reply_to(&mut self, request: &[u8], flow: u8) -> Option<Vec<u8>> {
        if self.is_icmp {
            let mut reply = request.to_vec();
            reply[0] = IcmpVersion::V4.reply();
            return Some(reply);
        }
        let arrival = arrival(source(flow + 1), self.at);
        answer(&mut self.responder, request, &arrival, false).map(|(_, reply)| reply)
    }

    fn receive(&mut self, datagram: &[u8], flow: u8, early: u8) {
        let mut arrival = arrival(source(0), self.at - Duration::from_micros(early.into()));
        arrival.flow = flow;
        self.prober.received(datagram, &arrival);
        self.drive();
    }

    fn drive(&mut self) {
        for _ in 0..1_000_000 {
            let mut arena = Vec::new();
            match self.prober.step(now(self.at), &mut self.drops, &mut arena) {
                Step::Send(send) => {
                    if self.refuses {
                        self.prober.not_sent(send.id, NotSent::Permission);
                    } else {
                        self.prober.sent(send.id, self.at, TimestampSource::User);
                    }
                    self.left.push((send.id, send.flow, arena));
                }
                Step::Report(EchoReport::Sent { flow, sequence }) => {
                    let before = self.verdicts.insert((flow, sequence), 0);
                    assert_eq!(before, None, "the datagram left twice");
                }
                Step::Report(EchoReport::Decided { flow, sequence, .. }) => {
                    *self.verdicts.get_mut(&(flow, sequence)).expect("the datagram left") += 1;
                }
                Step::Report(_) => {}
                Step::Wait(until) => {
                    assert!(until > self.at, "the deadline is in the future");
                    return;
                }
                Step::Finished => return,
            }
        }
        panic!("the machine never waits");
    }
}

pub(super) fn start() -> Timestamp {
    Timestamp::from_nanos(10_000_000_000)
}

pub(super) fn now(at: Timestamp) -> Now {
    let epoch = WallTime::from_nanos(1_767_225_600_000_000_000);
    Now { at, drained: at, wall: WallOffset::between(Timestamp::from_nanos(0), epoch) }
}

pub(super) fn source(choice: u8) -> SocketAddr {
    match choice {
        0 => ([192, 0, 2, 2], 862).into(),
        128.. => ([0x2001, 0xdb8, 0, choice.into(), 0, 0, 0, 1], 40_000).into(),
        _ => ([192, 0, 2, choice], 40_000 + u16::from(choice % 3)).into(),
    }
}

pub(super) fn arrival(from: SocketAddr, at: Timestamp) -> Arrival {
    let by = TimestampSource::Kernel;
    Arrival { at, by, from, to: None, flow: 0, ttl: Some(250), tos: Some(0xb8), icmp: None }
}
