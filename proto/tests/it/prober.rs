//! A prober driven step by step: samples of single replies, and when it stops, waits and skips slots.

use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{
    Class, Direction, EchoReport, EchoSpec, Prober, Profile, Quirks, RoundTrip, Verdict, WireFormat,
};
use pathmeter_proto::machine::{Arrival, HostDrops, Machine, NotSent, Now, Send, Step, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::stamp::{Mode, Request};
use pathmeter_proto::wire::tlv::{self, SessionRecord};

use super::conservation::{LATE_AFTER, LOST_AFTER, MS, spec};
use super::manual::{PROBER, arrival, at, now, responder, send_request};

const REFLECTOR: ([u8; 4], u16) = ([192, 0, 2, 2], 862);

/// A prober, its sent datagrams and its reports.
struct TestPath {
    prober: Prober,
    drops: HostDrops,
    sent: Vec<(Send, Vec<u8>, Timestamp)>,
    reports: Vec<EchoReport>,
}

impl TestPath {
    fn new(spec: EchoSpec) -> Self {
        let spec = EchoSpec { tx_timestamps: false, ..spec };
        Self {
            prober: Prober::new(spec, at(0)),
            drops: HostDrops::default(),
            sent: Vec::new(),
            reports: Vec::new(),
        }
    }

    /// Steps until the prober waits: its deadline, or `None` if it has finished.
    fn drive(&mut self, time: Timestamp) -> Option<Timestamp> {
        loop {
            let mut arena = Vec::new();
            match self.prober.step(now(time), &mut self.drops, &mut arena) {
                Step::Send(send) => {
                    self.prober.sent(send.id, time, TimestampSource::User);
                    self.sent.push((send, arena, time));
                }
                Step::Report(report) => self.reports.push(report),
                Step::Wait(until) => {
                    assert!(until > time, "the deadline is in the future");
                    return Some(until);
                }
                Step::Finished => return None,
            }
        }
    }

    /// Advances the time until `count` datagrams are sent.
    fn send(&mut self, count: usize) {
        let mut time = at(0);
        while self.sent.len() < count {
            time = self.drive(time).unwrap();
        }
    }

    /// Answers the last datagram `after` it was sent; `change` modifies the arrival of the reply.
    fn answer(&mut self, after: Duration, change: impl FnOnce(&mut Arrival)) -> RoundTrip {
        let (send, request, time) = self.sent.last().unwrap();
        let reply = send_request(&mut responder(None), request, &arrival(PROBER, *time)).bytes();
        let mut received = Arrival { flow: send.flow, ..arrival(REFLECTOR, *time + after) };
        change(&mut received);
        self.reports.clear();
        self.prober.received(&reply, &received);
        // At a time at which nothing is due.
        let before = Now { at: at(0), drained: at(0), ..now(at(0)) };
        while let Step::Report(report) = self.prober.step(before, &mut self.drops, &mut Vec::new()) {
            self.reports.push(report);
        }
        let samples = self.reports.iter().filter_map(|report| {
            let EchoReport::Decided { sample, .. } = report else { return None };
            *sample
        });
        let [sample] = samples.collect::<Vec<RoundTrip>>()[..] else { panic!("{:?}", self.reports) };
        sample
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let decided = self.reports.iter().filter_map(|report| {
            let EchoReport::Decided { verdict, .. } = report else { return None };
            Some(*verdict)
        });
        decided.collect()
    }

    fn count(&self, is: impl Fn(&EchoReport) -> bool) -> usize {
        self.reports.iter().filter(|report| is(report)).count()
    }
}

const UNKNOWN: Verdict = Verdict::Lost(Direction::Unknown);

#[test]
fn hops_are_255_minus_the_received_ttl_with_an_agent() {
    let mut test = TestPath::new(spec(1, 20 * MS, 1, 100));
    for (ttl, hops) in [(Some(255), Some(0)), (Some(1), Some(254)), (Some(0), None), (None, None)] {
        let count = test.sent.len() + 1;
        test.send(count);
        let sample = test.answer(Duration::from_millis(1), |arrival| arrival.ttl = ttl);
        assert_eq!((sample.hops_forward, sample.hops_reverse), (Some(5), hops), "{ttl:?}");
    }
}

#[test]
fn received_class_of_service_is_compared_with_the_sent_one() {
    let mut test = TestPath::new(EchoSpec { dscp: Dscp::new(46).unwrap(), ..spec(1, 20 * MS, 1, 100) });
    for (tos, class) in [
        (Some(46 << 2), Some((false, false))),
        (Some(46 << 2 | 1), Some((false, false))),
        (Some(46 << 2 | 3), Some((false, true))),
        (Some(3), Some((true, true))),
        (Some(47 << 2), Some((true, false))),
        (None, None),
    ] {
        let count = test.sent.len() + 1;
        test.send(count);
        assert_eq!(test.sent.last().unwrap().0.tos, 46 << 2);
        let sample = test.answer(Duration::from_millis(1), |arrival| arrival.tos = tos);
        let class = class.map(|(is_remarked, is_congested)| Class { is_remarked, is_congested });
        assert_eq!(sample.class_reverse, class, "{tos:?}");
        // The request arrived with class of service 0.
        assert_eq!(sample.class_forward, Some(Class { is_remarked: true, is_congested: false }));
    }
}

#[test]
fn variation_is_the_round_trip_minus_the_minimum() {
    let mut test = TestPath::new(spec(1, 20 * MS, 1, 100));
    for (rtt, minimum) in [(9, 9), (5, 5), (8, 5), (1_500, 5)] {
        let count = test.sent.len() + 1;
        test.send(count);
        let sample = test.answer(Duration::from_millis(rtt), |_| ());
        let [rtt, minimum] = [rtt, minimum].map(Duration::from_millis);
        assert_eq!(sample.rtt, rtt);
        if rtt <= LATE_AFTER {
            assert_eq!((sample.minimum, sample.variation), (minimum, rtt - minimum));
        } else {
            assert_eq!((sample.minimum, sample.variation), (Duration::ZERO, Duration::ZERO), "it is late");
        }
    }
}

#[test]
fn stopped_prober_finishes_when_every_datagram_has_a_verdict() {
    let mut test = TestPath::new(spec(1, 1_000 * MS, 2, 100));
    test.send(3);
    let sent = test.sent[2].2;
    assert_eq!(test.prober.in_flight(), 3);
    test.prober.stop();
    let mut time = sent;
    for (index, left) in [(0, 2), (1, 1)] {
        time = test.drive(time).unwrap();
        assert_eq!(time, test.sent[index].2 + LOST_AFTER, "it waits for the next verdict");
        test.drive(time);
        assert_eq!(test.prober.in_flight(), left);
    }
    assert_eq!(test.drive(time), Some(sent + LOST_AFTER));
    assert_eq!(test.drive(sent + LOST_AFTER), None);
    assert_eq!((test.sent.len(), test.verdicts()), (3, vec![UNKNOWN; 3]));
    let mut test = TestPath::new(spec(1, 1_000 * MS, 2, 2));
    test.send(2);
    assert!(test.drive(test.sent[1].2).is_some(), "all slots have passed and there is no verdict");
    test.prober.withdraw();
    assert_eq!(test.drive(test.sent[1].2), None);
    assert_eq!(test.verdicts(), [Verdict::Withdrawn; 2]);
}

#[test]
fn slots_missed_by_a_stalled_prober_are_reported_as_unsent() {
    for (count, unsent, sent) in [(100, 99, 1), (50, 50, 0), (101, 99, 1)] {
        let mut test = TestPath::new(spec(1, 20 * MS, 1, count));
        // The hundredth slot is less than half an interval ago, and the next is in the future.
        let mut all = TestPath::new(spec(1, 20 * MS, 1, 100));
        all.send(100);
        let hundredth = all.sent[99].2;
        test.drive(hundredth);
        let skipped = |test: &TestPath| -> u64 {
            let slots =
                test.reports.iter().map(|r| if let EchoReport::Unsent(slots) = r { *slots } else { 0 });
            slots.sum()
        };
        assert_eq!((skipped(&test), test.sent.len()), (unsent, sent), "of {count}");
        while test.drive(hundredth + LOST_AFTER + LOST_AFTER).is_some() {}
        assert_eq!(skipped(&test) + test.sent.len() as u64, count);
    }
}

#[test]
fn full_flow_skips_slots_until_it_has_room() {
    let mut test = TestPath::new(EchoSpec { interval: Duration::from_micros(10), ..spec(1, MS, 1, 65_600) });
    let mut time = at(0);
    while test.sent.len() < 65_536 {
        time = test.drive(time).unwrap();
    }
    assert_eq!(test.count(|report| matches!(report, EchoReport::Unsent(_))), 0);
    while let Some(until) = test.drive(time) {
        time = until;
    }
    assert_eq!(test.sent.len(), 65_536);
    assert_eq!(
        test.count(|report| *report == EchoReport::Unsent(1)),
        64,
        "one for each slot that found no room"
    );
    assert_eq!(test.verdicts().len(), 65_536);
}

#[test]
fn flows_are_lossy_from_the_second_loss_on_and_each_change_is_reported_once() {
    let mut test = TestPath::new(spec(1, 100 * MS, 2, 6));
    test.send(6);
    let mut time = test.sent[5].2;
    while let Some(until) = test.drive(time) {
        time = until;
    }
    let changes: Vec<EchoReport> =
        test.reports.iter().filter(|report| matches!(report, EchoReport::LossyFlows(_))).copied().collect();
    assert_eq!(changes, [EchoReport::LossyFlows(1), EchoReport::LossyFlows(2)]);
}

#[test]
fn flows_take_turns_and_count_their_own_datagrams() {
    let mut test = TestPath::new(spec(1, 20 * MS, 3, 100));
    test.send(7);
    let flows: Vec<u8> = test.sent.iter().map(|(send, ..)| send.flow).collect();
    assert_eq!(flows, [0, 1, 2, 0, 1, 2, 0]);
    let mut sessions = Vec::new();
    for (index, (send, datagram, _)) in test.sent.iter().enumerate() {
        let record = tlv::walk(datagram, Mode::Open.base_bytes()).find(|found| found.kind == tlv::SESSION);
        let record = SessionRecord::read(record.unwrap().value(datagram)).unwrap();
        assert_eq!(u64::from(record.count_or_first), index as u64 / 3 + 1, "including this one");
        assert_eq!(record.flow, u16::from(send.flow));
        assert_eq!(datagram[3], u8::try_from(index / 3).unwrap(), "sequence number");
        sessions.push(record.session);
    }
    assert_eq!(sessions[..3], sessions[3..6]);
    sessions.sort_unstable();
    sessions.dedup();
    assert_eq!(sessions.len(), 3, "each flow has its own session");
}

#[test]
fn prober_owns_replies_to_its_datagrams_on_the_same_flow() {
    let mut test = TestPath::new(spec(1, 20 * MS, 2, 100));
    test.send(4);
    let replies: Vec<Vec<u8>> = (test.sent.iter())
        .map(|(_, request, time)| {
            send_request(&mut responder(None), request, &arrival(PROBER, *time)).bytes()
        })
        .collect();
    for (index, reply) in replies.iter().enumerate() {
        let own = u8::try_from(index % 2).unwrap();
        assert!(test.prober.owns_reply(reply, own), "{index}");
        assert!(!test.prober.owns_reply(reply, 1 - own) && !test.prober.owns_reply(reply, 2), "{index}");
        assert!(!test.prober.owns_reply(&reply[..30], own), "{index}");
        let mut other = reply.clone();
        other[28 + 7] ^= 1;
        assert!(!test.prober.owns_reply(&other, own), "{index}: another T1");
    }
}

#[test]
fn datagram_refused_by_the_host_is_a_send_error_and_not_lost() {
    let mut test = TestPath::new(spec(1, 20 * MS, 2, 2));
    let mut time = at(0);
    let mut refused = 0;
    loop {
        match test.prober.step(now(time), &mut test.drops, &mut Vec::new()) {
            Step::Send(send) => {
                test.prober.not_sent(send.id, NotSent::Permission);
                refused += 1;
            }
            Step::Report(report) => test.reports.push(report),
            Step::Wait(until) => time = until,
            Step::Finished => break,
        }
    }
    assert_eq!((refused, test.reports), (2, vec![EchoReport::SendError(NotSent::Permission); 2]));
}

#[test]
fn goodbye_lasts_a_minute_or_until_the_peer_answers() {
    let mut test = TestPath::new(spec(1, 20 * MS, 1, 100));
    assert!(!test.prober.is_draining(at(0)));
    test.prober.peer_leaving(at(1));
    assert!(test.prober.is_draining(at(1)) && test.prober.is_draining(at(60_000)));
    assert!(!test.prober.is_draining(at(60_001)));
    test.send(1);
    assert_eq!(test.prober.responder(), None);
    test.answer(Duration::from_millis(1), |_| ());
    assert!(!test.prober.is_draining(at(2)));
    assert_eq!(test.prober.responder(), Some("pathmeter"));
}

#[test]
fn only_twamp_light_requests_have_no_session_identifier() {
    for (profile, ssid) in
        [(Profile::Detect, 7), (Profile::Stamp, 7), (Profile::Plain, 7), (Profile::TwampLight, 0)]
    {
        let wire = WireFormat::Stamp { keys: None, quirks: Quirks { profile, ..Quirks::default() } };
        let mut test = TestPath::new(EchoSpec { wire, ssids: vec![7], ..spec(1, 20 * MS, 1, 1) });
        test.send(1);
        let request = Request::decode(&test.sent[0].1, Mode::Open).unwrap();
        assert_eq!(request.ssid, ssid, "{profile:?}");
    }
}

#[test]
fn reply_before_the_kernel_timestamp_is_decided_with_it() {
    let mut prober = Prober::new(spec(1, 20 * MS, 1, 1), at(0));
    let mut drops = HostDrops::default();
    let mut step = |prober: &mut Prober, time| {
        let mut arena = Vec::new();
        (prober.step(now(time), &mut drops, &mut arena), arena)
    };
    let (Step::Wait(due), _) = step(&mut prober, at(0)) else { panic!("the first slot is later") };
    let (Step::Send(send), request) = step(&mut prober, due) else { panic!("a request is due") };
    prober.sent(send.id, due, TimestampSource::User);
    let reply = send_request(&mut responder(None), &request, &arrival(PROBER, due)).bytes();
    prober.received(&reply, &arrival(REFLECTOR, due + Duration::from_millis(5)));
    let decided = |report: &EchoReport| matches!(report, EchoReport::Decided { .. });
    let mut reports = |prober: &mut Prober| {
        let mut found = Vec::new();
        while let (Step::Report(report), _) = step(prober, due + Duration::from_millis(5)) {
            found.push(report);
        }
        found
    };
    assert!(!reports(&mut prober).iter().any(decided), "the timestamp may still come");
    prober.sent(send.id, due + Duration::from_millis(1), TimestampSource::Kernel);
    let found = reports(&mut prober);
    let Some(EchoReport::Decided { sample: Some(sample), .. }) = found.iter().find(|report| decided(report))
    else {
        panic!("{found:?}")
    };
    assert_eq!(sample.rtt, Duration::from_millis(4));
}
