//! Machines driven step by step: one datagram and one clock reading at a time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::admission::{Policy, Refusal};
use pathmeter_proto::echo::{EchoReport, EchoSpec, Prober, ResponderReport, StampResponder};
use pathmeter_proto::key::{Key, Keys};
use pathmeter_proto::machine::{Arrival, HostDrops, Machine, Now, Send, Step, TimestampSource};
use pathmeter_proto::time::{Timestamp, WallOffset, WallTime};
use pathmeter_proto::wire::NtpTime;
use pathmeter_proto::wire::stamp::{self, ERROR_ESTIMATE, Mode, Request};
use pathmeter_proto::wire::tlv::{self, ClassOfService, FollowUp, HMAC_VALUE_BYTES, SessionRecord};

/// Default source address of requests.
pub(super) const PROBER: ([u8; 4], u16) = ([192, 0, 2, 1], 40_000);

pub(super) fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000 + milliseconds * 1_000_000)
}

pub(super) fn now(at: Timestamp) -> Now {
    let origin =
        WallOffset::between(Timestamp::from_nanos(0), WallTime::from_nanos(1_767_225_600_000_000_000));
    Now { at, drained: at, wall: origin }
}

pub(super) fn arrival(from: impl Into<SocketAddr>, at: Timestamp) -> Arrival {
    let (from, by) = (from.into(), TimestampSource::Kernel);
    Arrival { at, by, from, to: None, flow: 0, ttl: Some(250), tos: Some(0), icmp: None }
}

pub(super) fn keys(text: &str) -> Arc<Keys> {
    Arc::new(Keys::parse(text).unwrap())
}

/// A policy that answers all sources, or only those that prove a key.
pub(super) fn policy(open: bool) -> Policy {
    Policy { open, rate: 1_000_000, rate_per_source: 1_000_000, ..Policy::default() }
}

/// A responder that answers all sources; with keys, only those that prove one.
pub(super) fn responder(keys: Option<Arc<Keys>>) -> StampResponder {
    StampResponder::new(policy(keys.is_none()), keys, 1_024)
}

/// Result of a datagram.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Outcome {
    pub(super) reply: Option<(Send, Vec<u8>)>,
    pub(super) refusal: Option<Refusal>,
}

impl Outcome {
    pub(super) fn bytes(self) -> Vec<u8> {
        self.reply.expect("the request is answered").1
    }
}

/// Delivers a datagram to a responder. Every datagram has one outcome: a reply or a refusal.
pub(super) fn send_request(
    responder: &mut impl Machine<Report = ResponderReport>,
    datagram: &[u8],
    arrival: &Arrival,
) -> Outcome {
    send_request_at(responder, datagram, arrival, now(arrival.at))
}

/// Like [`send_request`], with given clock readings.
pub(super) fn send_request_at(
    responder: &mut impl Machine<Report = ResponderReport>,
    datagram: &[u8],
    arrival: &Arrival,
    now: Now,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut answered = false;
    responder.received(datagram, arrival);
    loop {
        let mut arena = Vec::new();
        match responder.step(now, &mut HostDrops::default(), &mut arena) {
            Step::Send(send) => {
                assert!(outcome.reply.is_none(), "one datagram, one reply");
                outcome.reply = Some((send, arena));
            }
            Step::Report(ResponderReport::Answered) => answered = true,
            Step::Report(ResponderReport::Refused(why)) => outcome.refusal = Some(why),
            Step::Report(ResponderReport::Sources(_)) => {}
            Step::Wait(_) | Step::Finished => break,
        }
    }
    assert_eq!(outcome.reply.is_some(), answered, "an answer is reported");
    assert_ne!(outcome.reply.is_some(), outcome.refusal.is_some(), "a reply or a refusal");
    outcome
}

/// A request of a pathmeter prober, with all extensions.
pub(super) fn request(sequence: u32, session: u32, key: Option<&Key>) -> Vec<u8> {
    let mut out = base(sequence, 7, key);
    let record =
        SessionRecord { session, count_or_first: sequence.wrapping_add(1), ..SessionRecord::default() };
    record.write(tlv::append(&mut out, tlv::SESSION, SessionRecord::BYTES).value_mut(&mut out));
    let class = ClassOfService { wanted: 46, ..ClassOfService::default() };
    class.write(tlv::append(&mut out, tlv::CLASS_OF_SERVICE, ClassOfService::BYTES).value_mut(&mut out));
    tlv::append(&mut out, tlv::FOLLOW_UP, FollowUp::BYTES);
    seal_extensions(&mut out, key);
    out
}

/// A request without extensions.
pub(super) fn base(sequence: u32, ssid: u16, key: Option<&Key>) -> Vec<u8> {
    let mut out = Vec::new();
    let mode = mode(key);
    let timestamp = NtpTime(0xeeaa_bfe0_0000_0000 + u64::from(sequence));
    Request { sequence, timestamp, error: ERROR_ESTIMATE, ssid }.encode(mode, &mut out);
    stamp::seal(&mut out, mode, key);
    out
}

/// Appends the HMAC extension if there is a key.
pub(super) fn seal_extensions(datagram: &mut Vec<u8>, key: Option<&Key>) {
    if let Some(key) = key {
        let hmac = tlv::append(datagram, tlv::HMAC, HMAC_VALUE_BYTES);
        tlv::seal(datagram, Mode::Authenticated.base_bytes(), hmac, key);
    }
}

pub(super) fn mode(key: Option<&Key>) -> Mode {
    if key.is_some() { Mode::Authenticated } else { Mode::Open }
}

/// The session record of a reply.
pub(super) fn record(reply: &[u8], mode: Mode) -> SessionRecord {
    let mut all = tlv::walk(reply, mode.base_bytes());
    let found = all.find(|found| found.kind == tlv::SESSION && found.is_understood());
    SessionRecord::read(found.expect("the reply has a record").value(reply)).unwrap()
}

/// A prober whose datagrams and replies a test transports.
#[derive(Debug)]
pub(super) struct TestProber {
    pub(super) prober: Prober,
    /// Reports that no test has taken yet.
    pub(super) reports: Vec<EchoReport>,
    drops: HostDrops,
    /// The clock.
    pub(super) at: Timestamp,
}

impl TestProber {
    pub(super) fn new(spec: EchoSpec) -> Self {
        let at = at(0);
        Self { prober: Prober::new(spec, at), reports: Vec::new(), drops: HostDrops::default(), at }
    }

    /// Waits for the next datagram and sends it.
    pub(super) fn datagram(&mut self) -> Vec<u8> {
        loop {
            let mut arena = Vec::new();
            match self.prober.step(now(self.at), &mut self.drops, &mut arena) {
                Step::Send(send) => {
                    self.prober.sent(send.id, self.at, TimestampSource::Kernel);
                    return arena;
                }
                Step::Report(report) => self.reports.push(report),
                Step::Wait(until) => self.at = until,
                Step::Finished => panic!("nothing more is sent"),
            }
        }
    }

    /// Delivers a datagram as a reply one microsecond later, and returns the reports that follow.
    pub(super) fn receives(&mut self, datagram: &[u8]) -> Vec<EchoReport> {
        self.at = self.at + Duration::from_micros(1);
        let mut arrival = arrival(([192, 0, 2, 2], 862), self.at);
        arrival.to = Some([192, 0, 2, 1].into());
        self.flush();
        let known = self.reports.len();
        self.prober.received(datagram, &arrival);
        self.flush();
        self.reports.split_off(known)
    }

    /// Takes the pending reports. No time passes; datagrams that are due are not sent.
    fn flush(&mut self) {
        let before = Now { at: at(0), ..now(self.at) };
        while let Step::Report(report) = self.prober.step(before, &mut self.drops, &mut Vec::new()) {
            self.reports.push(report);
        }
    }
}

#[test]
fn delayed_reply_carries_its_real_send_time_and_is_authentic() {
    for keys in [None, Some(keys("0123456789abcdef"))] {
        let mut responder = responder(keys.clone());
        let key = keys.as_ref().map(|keys| keys.current());
        let mode = mode(key);
        for (sequence, waited) in [(0_u32, 0_u64), (1, 132), (2, 0)] {
            let received = at(u64::from(sequence) * 1_000);
            let outcome =
                send_request(&mut responder, &request(sequence, 9, key), &arrival(PROBER, received));
            let (send, mut reply) = outcome.reply.unwrap();
            let left = received + Duration::from_millis(waited);
            // The wall clock may be stepped in between: T2 and T3 use the same offset.
            let stepped = WallOffset::between(Timestamp::from_nanos(0), WallTime::from_nanos(77));
            responder.before_send(send.id, &mut reply, Now { wall: stepped, ..now(left) });
            let read = stamp::Reply::decode(&reply, mode).unwrap();
            assert_eq!(read.turnaround(), i64::try_from(waited * 1_000_000).unwrap(), "{mode:?}");
            if let Some(keys) = &keys {
                stamp::verify(&reply, keys).unwrap();
                assert!(tlv::are_authentic(&reply, mode.base_bytes(), keys));
            }
        }
    }
}
