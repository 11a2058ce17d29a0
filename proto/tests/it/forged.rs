//! How a prober handles forged replies, restarted responders and changed keys.

use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::echo::{
    Direction, EchoReport, EchoSpec, Mismatch, Prober, Quirks, ResponderReport, StampResponder, Verdict,
    WireFormat,
};
use pathmeter_proto::key::{Key, Keys};
use pathmeter_proto::machine::{Arrival, HostDrops, Machine, NotSent, Now, SendId, Step, TimestampSource};
use pathmeter_proto::sim::{Loss, Random, World};
use pathmeter_proto::time::{Timestamp, WallOffset, WallTime, nanos};
use pathmeter_proto::wire::PeerTimestamp;
use pathmeter_proto::wire::stamp::{self, Mode};
use pathmeter_proto::wire::tlv::{self, FollowUp, SessionRecord};

use super::conservation::{LATE_AFTER, LOST_AFTER, MS, impaired_world, scaled, seeds, spec};
use super::manual::{
    PROBER, TestProber, arrival, at, keys, now, request, responder, send_request, send_request_at,
};

const SECRET: &str = "0123456789abcdef";
const UNSOLICITED: EchoReport = EchoReport::Mismatched(Mismatch::Unsolicited);
const UNAUTHENTIC: EchoReport = EchoReport::Mismatched(Mismatch::Unauthentic);
const MALFORMED: EchoReport = EchoReport::Mismatched(Mismatch::Malformed);

/// A prober with four datagrams in flight, and the authentic reply to the last one.
fn exchange(keys: Option<&Arc<Keys>>) -> (TestProber, Vec<u8>) {
    let mut test = TestProber::new(EchoSpec {
        wire: WireFormat::Stamp { keys: keys.cloned(), quirks: Quirks::default() },
        tx_timestamps: false,
        ..spec(1, 20 * MS, 1, 100)
    });
    for _ in 0..3 {
        test.datagram();
    }
    let request = test.datagram();
    let reply = send_request(&mut responder(keys.cloned()), &request, &arrival(PROBER, test.at)).bytes();
    (test, reply)
}

/// The reply with other bytes at `at`, sealed again as only a holder of the key can.
fn forged(reply: &[u8], mode: Mode, key: Option<&Key>, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut forged = reply.to_vec();
    forged[at..at + bytes.len()].copy_from_slice(bytes);
    stamp::seal(&mut forged, mode, key);
    forged
}

fn is_ok(reports: &[EchoReport]) -> bool {
    matches!(reports, [EchoReport::Decided { sequence: 3, verdict: Verdict::Ok, sample: Some(_), .. }])
}

#[test]
fn reply_that_matches_no_datagram_changes_no_verdict() {
    let keys = keys(SECRET);
    for keys in [None, Some(&keys)] {
        let key = keys.map(|keys| keys.current());
        let (mode, [ssid, sequence, timestamp]) = match key {
            None => (Mode::Open, [14, 24, 28]),
            Some(_) => (Mode::Authenticated, [26, 48, 64]),
        };
        let (mut test, reply) = exchange(keys);
        for (what, at, bytes) in [
            ("another T1", timestamp, &[1, 2, 3, 4, 5, 6, 7, 8][..]),
            ("a T1 that is off by 2⁻³² s", timestamp + 7, &[reply[timestamp + 7] ^ 1]),
            ("another session identifier", ssid, &[9, 9]),
            ("the sequence number of another datagram", sequence, &[0, 0, 0, 2]),
            ("the next sequence number", sequence, &[0, 0, 0, 4]),
            ("a sequence number from the far future", sequence, &[0x7f, 0, 0, 0]),
            ("a sequence number from before the beginning", sequence, &[0xff, 0xff, 0xff, 0xff]),
        ] {
            let found = test.receives(&forged(&reply, mode, key, at, bytes));
            assert_eq!(found, [UNSOLICITED], "{what}, {mode:?}");
        }
        assert_eq!(test.receives(&reply[..40]), [MALFORMED]);
        assert_eq!(test.receives(b""), [MALFORMED]);
        assert_eq!(test.prober.in_flight(), 4, "there is no verdict");
        let decided = test.receives(&reply);
        assert!(is_ok(&decided), "{decided:?}");
    }
}

#[test]
fn repeated_reply_is_a_duplicate() {
    let (mut test, reply) = exchange(None);
    assert!(is_ok(&test.receives(&reply)));
    for _ in 0..10 {
        assert_eq!(test.receives(&reply), [EchoReport::Duplicate]);
    }
}

#[test]
fn reply_after_its_deadline_is_very_late_and_the_verdict_stays() {
    let (mut test, reply) = exchange(None);
    test.at = test.at + LOST_AFTER;
    let found = test.receives(&reply);
    assert!(found.contains(&EchoReport::VeryLate), "{found:?}");
    let is_kept = |report: &&EchoReport| matches!(report, EchoReport::Decided { sequence: 3, .. });
    let decided: Vec<EchoReport> = test.reports.iter().chain(&found).filter(is_kept).copied().collect();
    let lost = Verdict::Lost(Direction::Unknown);
    assert_eq!(decided, [EchoReport::Decided { flow: 0, sequence: 3, verdict: lost, sample: None }]);
}

#[test]
fn every_changed_bit_of_an_authenticated_reply_is_detected() {
    let keys = keys(SECRET);
    let (mut test, reply) = exchange(Some(&keys));
    for bit in 0..reply.len() * 8 {
        let mut changed = reply.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(test.receives(&changed), [UNAUTHENTIC], "bit {bit}");
    }
    assert_eq!(test.prober.responder(), None, "no reply was accepted");
    assert!(is_ok(&test.receives(&reply)));
    assert_eq!(test.prober.responder(), Some("pathmeter"));
}

#[test]
fn reply_with_another_key_or_none_is_rejected() {
    let (ours, theirs) = (keys(SECRET), keys("fedcba9876543210"));
    let (mut test, reply) = exchange(Some(&ours));
    assert_eq!(
        test.receives(&forged(&reply, Mode::Authenticated, Some(theirs.current()), 0, &[])),
        [UNAUTHENTIC]
    );
    assert_eq!(test.receives(&exchange(None).1), [UNAUTHENTIC]);
    let mut appended = reply.clone();
    let value = tlv::append(&mut appended, tlv::SESSION, SessionRecord::BYTES);
    appended[value.at] = 0;
    SessionRecord { is_reply: true, ..SessionRecord::default() }.write(value.value_mut(&mut appended));
    assert_eq!(test.receives(&appended), [UNAUTHENTIC], "after the HMAC");
    assert!(is_ok(&test.receives(&reply)));
}

#[test]
fn garbage_and_truncated_replies_are_only_counted() {
    let mut random = Random::new(3);
    for keys in [None, Some(keys(SECRET))] {
        let (mut test, reply) = exchange(keys.as_ref());
        let base = if keys.is_some() { 112 } else { 41 };
        for len in 0..2_000 {
            let garbage: Vec<u8> = (0..len).map(|_| random.draw().to_be_bytes()[0]).collect();
            let found = test.receives(&garbage);
            assert!(matches!(found[..], [EchoReport::Mismatched(_)]), "{len} bytes: {found:?}");
        }
        for len in 0..base {
            assert_eq!(test.receives(&reply[..len]), [MALFORMED], "{len} bytes");
        }
        assert_eq!(test.prober.in_flight(), 4);
        assert!(is_ok(&test.receives(&reply)));
    }
}

#[test]
fn implausible_turnaround_is_not_subtracted() {
    let (mut test, reply) = exchange(None);
    // T2 one hour before T3.
    let received = u32::from_be_bytes(reply[16..20].try_into().unwrap());
    let hour = forged(&reply, Mode::Open, None, 16, &(received - 3_600).to_be_bytes());
    let found = test.receives(&hour);
    let [
        EchoReport::TurnaroundInvalid,
        EchoReport::Decided { verdict: Verdict::Ok, sample: Some(sample), .. },
    ] = found[..]
    else {
        panic!("{found:?}");
    };
    assert_eq!((sample.rtt, sample.turnaround), (Duration::from_micros(1), Duration::ZERO));
}

#[test]
fn reply_to_a_withdrawn_datagram_is_very_late() {
    let mut test = TestProber::new(EchoSpec { tx_timestamps: false, ..spec(1, 20 * MS, 1, 100) });
    let requests = [(); 3].map(|()| test.datagram());
    let arrival = arrival(PROBER, test.at);
    let mut responder = responder(None);
    let [first, second, third] =
        requests.map(|request| send_request(&mut responder, &request, &arrival).bytes());
    test.receives(&first);
    test.prober.withdraw();
    assert_eq!(test.receives(&third), [EchoReport::VeryLate]);
    assert_eq!(test.receives(&second), [EchoReport::VeryLate]);
}

#[test]
fn clock_step_of_the_responder_is_not_reported_as_lag() {
    let mut responder = responder(None);
    let stepped =
        WallOffset::between(Timestamp::from_nanos(0), WallTime::from_nanos(1_767_229_200_000_000_000));
    let mut exchange = |sequence, session, wall: WallOffset| {
        let arrival = arrival(PROBER, at(u64::from(sequence)));
        let clocks = Now { wall, ..now(arrival.at) };
        let (send, reply) =
            send_request_at(&mut responder, &request(sequence, session, None), &arrival, clocks)
                .reply
                .unwrap();
        if send.timestamp {
            // Another request is answered under the new offset before the transmit timestamp arrives.
            let clocks = Now { wall: stepped, ..clocks };
            send_request_at(&mut responder, &request(0, session + 1, None), &arrival, clocks);
            responder.sent(send.id, arrival.at + Duration::from_micros(30), TimestampSource::Kernel);
        }
        (send.timestamp, reply)
    };
    exchange(0, 7, now(at(0)).wall);
    let (has_timestamp, written) = exchange(1, 7, now(at(0)).wall);
    assert!(has_timestamp);
    let (_, reply) = exchange(2, 7, stepped);
    let follow_up = tlv::walk(&reply, Mode::Open.base_bytes()).find(|found| found.kind == tlv::FOLLOW_UP);
    let follow_up = FollowUp::read(follow_up.unwrap().value(&reply)).unwrap();
    let written = stamp::Reply::decode(&written, Mode::Open).unwrap();
    assert_eq!(follow_up.sequence, 1);
    let lag = PeerTimestamp::from_ntp(follow_up.timestamp.0).signed_since(written.sent());
    assert!(lag.abs_diff(30_000) <= 1, "{lag} ns");
}

/// Steps until a datagram is sent, and returns its id and its bytes.
fn send_next(prober: &mut Prober, at: &mut Timestamp) -> (SendId, Vec<u8>) {
    loop {
        let mut arena = Vec::new();
        match prober.step(now(*at), &mut HostDrops::default(), &mut arena) {
            Step::Send(send) => {
                prober.sent(send.id, *at, TimestampSource::User);
                return (send.id, arena);
            }
            Step::Report(_) => {}
            Step::Wait(until) => *at = until,
            Step::Finished => panic!("nothing more is sent"),
        }
    }
}

/// Steps until the prober waits: the reports and the end of the wait.
fn settle(prober: &mut Prober, at: Timestamp) -> (Vec<EchoReport>, Timestamp) {
    let mut reports = Vec::new();
    loop {
        match prober.step(now(at), &mut HostDrops::default(), &mut Vec::new()) {
            Step::Report(report) => reports.push(report),
            Step::Wait(until) => return (reports, until),
            step @ (Step::Send(_) | Step::Finished) => panic!("{step:?}"),
        }
    }
}

#[test]
fn not_sent_after_sent_is_ignored() {
    let mut at = at(0);
    let mut prober = Prober::new(spec(1, 1_000 * MS, 1, 9), at);
    let (id, _) = send_next(&mut prober, &mut at);
    prober.not_sent(id, NotSent::Buffer);
    prober.withdraw();
    let (reports, _) = settle(&mut prober, at);
    let withdrawn = EchoReport::Decided { flow: 0, sequence: 0, verdict: Verdict::Withdrawn, sample: None };
    assert_eq!(reports, [EchoReport::Sent { flow: 0, sequence: 0 }, withdrawn]);
}

#[test]
fn late_transmit_timestamp_never_causes_a_deadline_in_the_past() {
    let mut at = at(0);
    let mut prober = Prober::new(EchoSpec { tx_timestamps: false, ..spec(1, 1_000 * MS, 1, 2) }, at);
    let (first, request) = send_next(&mut prober, &mut at);
    let reply = send_request(&mut responder(None), &request, &arrival(PROBER, at)).bytes();
    prober.received(&reply, &arrival(PROBER, at));
    let mut second = at;
    send_next(&mut prober, &mut second);
    // By its kernel timestamp the first datagram left after the second.
    prober.sent(first, second + Duration::from_millis(500), TimestampSource::Kernel);
    let due = second + LOST_AFTER + Duration::from_millis(1);
    let (_, until) = settle(&mut prober, due);
    assert!(until > due, "{until:?}");
    assert_eq!(prober.in_flight(), 1, "it is decided with the datagram before it");
}

/// A responder that restarts several times.
#[derive(Debug)]
struct Restarting {
    responder: StampResponder,
    keys: Option<Arc<Keys>>,
    /// Times of the restarts on its own clock, sorted.
    restarts: Vec<Timestamp>,
    restarted: usize,
}

impl Machine for Restarting {
    type Report = ResponderReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        while self.restarts.get(self.restarted).is_some_and(|at| *at <= arrival.at) {
            self.responder = responder(self.keys.clone());
            self.restarted += 1;
        }
        self.responder.received(datagram, arrival);
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        self.responder.sent(id, at, by);
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        self.responder.not_sent(id, why);
    }

    fn stop(&mut self) {}

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<ResponderReport> {
        self.responder.step(now, drops, arena)
    }
}

#[test]
fn restarted_responder_never_causes_a_wrong_direction() {
    let (mut restarts, mut directed) = (0, 0);
    for seed in seeds(1_500) {
        let (world, spec) = impaired_world(seed);
        let mut random = Random::new(seed ^ 0xf0f0);
        let span = nanos(spec.interval) * spec.count.unwrap();
        let start = world.responder_host.clock.monotonic(0);
        let mut when: Vec<Timestamp> =
            (0..random.between(1, 6)).map(|_| start + Duration::from_nanos(random.below(span))).collect();
        when.sort_unstable();
        let mut restarting =
            Restarting { responder: responder(None), keys: None, restarts: when, restarted: 0 };
        let mut prober = Prober::new(spec, world.start());
        let (counts, ledger) = world.run(&mut prober, &mut restarting, 600_000 * MS);
        let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        restarts += restarting.restarted;
        directed += counts.lost() - counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
    }
    assert!(
        (restarts as u64) > scaled(3_000) && directed > scaled(3_000),
        "{restarts} restarts, {directed} losses with a direction"
    );
}

#[test]
fn old_and_new_keys_work_together_during_a_rotation() {
    for (seed, (prober_keys, responder_keys)) in
        (0..).zip([("old", "new old"), ("old new", "new old"), ("new old", "old new")])
    {
        let file = |names: &str| {
            let lines: Vec<String> = names.split(' ').map(|name| format!("{name}-key-0123456789")).collect();
            keys(&lines.join("\n"))
        };
        let mut world = World::new(seed);
        world.forward.loss = Loss::Random(0.1);
        let spec = EchoSpec {
            wire: WireFormat::Stamp { keys: Some(file(prober_keys)), quirks: Quirks::default() },
            ..spec(seed, 20 * MS, 2, 300)
        };
        let mut prober = Prober::new(spec, world.start());
        let (counts, ledger) =
            world.run(&mut prober, &mut responder(Some(file(responder_keys))), 600_000 * MS);
        ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0).unwrap();
        assert_eq!(
            (counts.mismatched, prober.responder()),
            (0, Some("pathmeter")),
            "{prober_keys} to {responder_keys}"
        );
        assert!(counts.count(|verdict| verdict == Verdict::Ok) > 200, "{prober_keys} to {responder_keys}");
    }
}

#[test]
fn prober_with_an_invalid_key_loses_everything_without_direction() {
    let mut prober = Prober::new(
        EchoSpec {
            wire: WireFormat::Stamp { keys: Some(keys(SECRET)), quirks: Quirks::default() },
            ..spec(1, 20 * MS, 1, 50)
        },
        World::new(1).start(),
    );
    let mut other = responder(Some(keys("fedcba9876543210")));
    let (counts, _) = World::new(1).run(&mut prober, &mut other, 600_000 * MS);
    assert_eq!(counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown)), counts.sent);
    assert_eq!(other.sessions(), 0);
}
