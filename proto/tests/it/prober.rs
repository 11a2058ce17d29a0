//! A prober by hand: what it makes of one reply, and when it stops, waits and skips.

use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{Class, Direction, EchoReport, EchoSpec, Prober, RoundTrip, Verdict};
use pathmeter_proto::machine::{Arrival, HostDrops, Machine, NotSent, Now, Send, Step, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::stamp::Mode;
use pathmeter_proto::wire::tlv::{self, SessionRecord};

use super::byhand::{ASKER, arrival, ask, at, now, responder};
use super::conservation::{LATE_AFTER, LOST_AFTER, MS, spec};

const REFLECTOR: ([u8; 4], u16) = ([192, 0, 2, 2], 862);

/// A prober and the datagrams that it sent.
struct Hand {
    prober: Prober,
    drops: HostDrops,
    sent: Vec<(Send, Vec<u8>, Timestamp)>,
    reports: Vec<EchoReport>,
}

impl Hand {
    fn new(spec: EchoSpec) -> Self {
        let spec = EchoSpec { tx_timestamps: false, ..spec };
        Self {
            prober: Prober::new(spec, at(0)),
            drops: HostDrops::default(),
            sent: Vec::new(),
            reports: Vec::new(),
        }
    }

    /// Steps until there is nothing to do: until when that is, or `None` when it has finished.
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
                    assert!(until > time, "it waits for what is past");
                    return Some(until);
                }
                Step::Finished => return None,
            }
        }
    }

    /// Lets time pass until `count` datagrams are sent.
    fn send(&mut self, count: usize) {
        let mut time = at(0);
        while self.sent.len() < count {
            time = self.drive(time).unwrap();
        }
    }

    /// The last datagram is answered `after` it was sent, with what `change` makes of its reply's arrival.
    fn answer(&mut self, after: Duration, change: impl FnOnce(&mut Arrival)) -> RoundTrip {
        let (send, request, time) = self.sent.last().unwrap();
        let reply = ask(&mut responder(None), request, &arrival(ASKER, *time)).bytes();
        let mut heard = Arrival { flow: send.flow, ..arrival(REFLECTOR, *time + after) };
        change(&mut heard);
        self.reports.clear();
        self.prober.received(&reply, &heard);
        // Without letting anything become due.
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
fn hops_are_what_is_missing_from_255_where_the_responder_is_ours() {
    let mut hand = Hand::new(spec(1, 20 * MS, 1, 100));
    for (ttl, hops) in [(Some(255), Some(0)), (Some(1), Some(254)), (Some(0), None), (None, None)] {
        let count = hand.sent.len() + 1;
        hand.send(count);
        let sample = hand.answer(Duration::from_millis(1), |heard| heard.ttl = ttl);
        assert_eq!((sample.hops_forward, sample.hops_reverse), (Some(5), hops), "{ttl:?}");
    }
}

#[test]
fn class_of_service_is_compared_with_what_was_sent() {
    let mut hand = Hand::new(EchoSpec { dscp: Dscp::new(46).unwrap(), ..spec(1, 20 * MS, 1, 100) });
    for (tos, class) in [
        (Some(46 << 2), Some((false, false))),
        (Some(46 << 2 | 1), Some((false, false))),
        (Some(46 << 2 | 3), Some((false, true))),
        (Some(3), Some((true, true))),
        (Some(47 << 2), Some((true, false))),
        (None, None),
    ] {
        let count = hand.sent.len() + 1;
        hand.send(count);
        assert_eq!(hand.sent.last().unwrap().0.tos, 46 << 2);
        let sample = hand.answer(Duration::from_millis(1), |heard| heard.tos = tos);
        let class = class.map(|(is_remarked, is_congested)| Class { is_remarked, is_congested });
        assert_eq!(sample.class_reverse, class, "{tos:?}");
        // The request arrived with a class of service of zero.
        assert_eq!(sample.class_forward, Some(Class { is_remarked: true, is_congested: false }));
    }
}

#[test]
fn variation_is_what_a_round_trip_has_above_the_smallest() {
    let mut hand = Hand::new(spec(1, 20 * MS, 1, 100));
    for (rtt, minimum) in [(9, 9), (5, 5), (8, 5), (1_500, 5)] {
        let count = hand.sent.len() + 1;
        hand.send(count);
        let sample = hand.answer(Duration::from_millis(rtt), |_| ());
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
fn prober_that_is_stopped_finishes_when_everything_is_decided() {
    let mut hand = Hand::new(spec(1, 1_000 * MS, 2, 100));
    hand.send(3);
    let sent = hand.sent[2].2;
    assert_eq!(hand.prober.in_flight(), 3);
    hand.prober.stop();
    let mut time = sent;
    for (index, left) in [(0, 2), (1, 1)] {
        time = hand.drive(time).unwrap();
        assert_eq!(time, hand.sent[index].2 + LOST_AFTER, "it waits for the next verdict");
        hand.drive(time);
        assert_eq!(hand.prober.in_flight(), left);
    }
    assert_eq!(hand.drive(time), Some(sent + LOST_AFTER));
    assert_eq!(hand.drive(sent + LOST_AFTER), None);
    assert_eq!((hand.sent.len(), hand.verdicts()), (3, vec![UNKNOWN; 3]));
    let mut hand = Hand::new(spec(1, 1_000 * MS, 2, 2));
    hand.send(2);
    assert!(hand.drive(hand.sent[1].2).is_some(), "all slots are over and nothing is decided");
    hand.prober.withdraw();
    assert_eq!(hand.drive(hand.sent[1].2), None);
    assert_eq!(hand.verdicts(), [Verdict::Withdrawn; 2]);
}

#[test]
fn slots_that_pass_while_the_prober_does_not_run_are_not_sent_and_count() {
    for (count, unsent, sent) in [(100, 99, 1), (50, 50, 0), (101, 99, 1)] {
        let mut hand = Hand::new(spec(1, 20 * MS, 1, count));
        // The hundredth slot is less than half an interval ago, the next is still to come.
        let mut all = Hand::new(spec(1, 20 * MS, 1, 100));
        all.send(100);
        let hundredth = all.sent[99].2;
        hand.drive(hundredth);
        let skipped = |hand: &Hand| -> u64 {
            let slots =
                hand.reports.iter().map(|r| if let EchoReport::Unsent(slots) = r { *slots } else { 0 });
            slots.sum()
        };
        assert_eq!((skipped(&hand), hand.sent.len()), (unsent, sent), "of {count}");
        while hand.drive(hundredth + LOST_AFTER + LOST_AFTER).is_some() {}
        assert_eq!(skipped(&hand) + hand.sent.len() as u64, count);
    }
}

#[test]
fn flow_that_is_full_skips_its_slots_until_there_is_room() {
    let mut hand = Hand::new(EchoSpec { interval: Duration::from_micros(10), ..spec(1, MS, 1, 65_600) });
    let mut time = at(0);
    while hand.sent.len() < 65_536 {
        time = hand.drive(time).unwrap();
    }
    assert_eq!(hand.count(|report| matches!(report, EchoReport::Unsent(_))), 0);
    while let Some(until) = hand.drive(time) {
        time = until;
    }
    assert_eq!(hand.sent.len(), 65_536);
    assert_eq!(
        hand.count(|report| *report == EchoReport::Unsent(1)),
        64,
        "one for each slot that found no room"
    );
    assert_eq!(hand.verdicts().len(), 65_536);
}

#[test]
fn flows_are_lossy_from_their_second_loss_on_and_each_change_is_reported_once() {
    let mut hand = Hand::new(spec(1, 100 * MS, 2, 6));
    hand.send(6);
    let mut time = hand.sent[5].2;
    while let Some(until) = hand.drive(time) {
        time = until;
    }
    let changes: Vec<EchoReport> =
        hand.reports.iter().filter(|report| matches!(report, EchoReport::LossyFlows(_))).copied().collect();
    assert_eq!(changes, [EchoReport::LossyFlows(1), EchoReport::LossyFlows(2)]);
}

#[test]
fn datagrams_go_round_the_flows_and_each_flow_counts_its_own() {
    let mut hand = Hand::new(spec(1, 20 * MS, 3, 100));
    hand.send(7);
    let flows: Vec<u8> = hand.sent.iter().map(|(send, ..)| send.flow).collect();
    assert_eq!(flows, [0, 1, 2, 0, 1, 2, 0]);
    let mut sessions = Vec::new();
    for (index, (send, datagram, _)) in hand.sent.iter().enumerate() {
        let record = tlv::walk(datagram, Mode::Open.base_bytes()).find(|found| found.kind == tlv::SESSION);
        let asked = SessionRecord::read(record.unwrap().value(datagram)).unwrap();
        assert_eq!(u64::from(asked.count_or_first), index as u64 / 3 + 1, "this one included");
        assert_eq!(asked.flow, u16::from(send.flow));
        assert_eq!(datagram[3], u8::try_from(index / 3).unwrap(), "sequence number");
        sessions.push(asked.session);
    }
    assert_eq!(sessions[..3], sessions[3..6]);
    sessions.sort_unstable();
    sessions.dedup();
    assert_eq!(sessions.len(), 3, "each has a session of its own");
}

#[test]
fn reply_is_ours_if_it_answers_what_was_sent_on_that_flow() {
    let mut hand = Hand::new(spec(1, 20 * MS, 2, 100));
    hand.send(4);
    let replies: Vec<Vec<u8>> = (hand.sent.iter())
        .map(|(_, request, time)| ask(&mut responder(None), request, &arrival(ASKER, *time)).bytes())
        .collect();
    for (index, reply) in replies.iter().enumerate() {
        let own = u8::try_from(index % 2).unwrap();
        assert!(hand.prober.has_asked(reply, own), "{index}");
        assert!(!hand.prober.has_asked(reply, 1 - own) && !hand.prober.has_asked(reply, 2), "{index}");
        assert!(!hand.prober.has_asked(&reply[..30], own), "{index}");
        let mut other = reply.clone();
        other[28 + 7] ^= 1;
        assert!(!hand.prober.has_asked(&other, own), "{index}: another T1");
    }
}

#[test]
fn datagram_that_the_host_refuses_is_an_error_and_never_lost() {
    let mut hand = Hand::new(spec(1, 20 * MS, 2, 2));
    let mut time = at(0);
    let mut refused = 0;
    loop {
        match hand.prober.step(now(time), &mut hand.drops, &mut Vec::new()) {
            Step::Send(send) => {
                hand.prober.not_sent(send.id, NotSent::Permission);
                refused += 1;
            }
            Step::Report(report) => hand.reports.push(report),
            Step::Wait(until) => time = until,
            Step::Finished => break,
        }
    }
    assert_eq!((refused, hand.reports), (2, vec![EchoReport::SendError(NotSent::Permission); 2]));
}

#[test]
fn peer_that_says_goodbye_is_away_for_a_minute_or_until_it_answers() {
    let mut hand = Hand::new(spec(1, 20 * MS, 1, 100));
    assert!(!hand.prober.is_draining(at(0)));
    hand.prober.peer_leaving(at(1));
    assert!(hand.prober.is_draining(at(1)) && hand.prober.is_draining(at(60_000)));
    assert!(!hand.prober.is_draining(at(60_001)));
    hand.send(1);
    assert_eq!(hand.prober.responder(), None);
    hand.answer(Duration::from_millis(1), |_| ());
    assert!(!hand.prober.is_draining(at(2)));
    assert_eq!(hand.prober.responder(), Some("pathmeter"));
}
