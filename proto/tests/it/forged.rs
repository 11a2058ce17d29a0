//! What a prober makes of replies that are not what they claim to be, of a responder that forgets, and of keys that change.

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

use super::byhand::{ASKER, Asker, arrival, ask, ask_at, at, keys, now, request, responder};
use super::conservation::{LATE_AFTER, LOST_AFTER, MS, bad_world, scaled, seeds, spec};

const SECRET: &str = "0123456789abcdef";
const UNASKED: EchoReport = EchoReport::Mismatched(Mismatch::Unsolicited);
const UNAUTHENTIC: EchoReport = EchoReport::Mismatched(Mismatch::Unauthentic);
const MALFORMED: EchoReport = EchoReport::Mismatched(Mismatch::Malformed);

/// An asker, one of its requests, and the true reply to it.
fn exchange(keys: Option<&Arc<Keys>>) -> (Asker, Vec<u8>) {
    let mut asker = Asker::new(EchoSpec {
        wire: WireFormat::Stamp { keys: keys.cloned(), quirks: Quirks::default() },
        tx_timestamps: false,
        ..spec(1, 20 * MS, 1, 100)
    });
    for _ in 0..3 {
        asker.datagram();
    }
    let request = asker.datagram();
    let reply = ask(&mut responder(keys.cloned()), &request, &arrival(ASKER, asker.at)).bytes();
    (asker, reply)
}

/// The reply with the bytes at `at` replaced, sealed again as only a holder of the key could.
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
fn a_reply_that_does_not_fit_what_was_sent_changes_no_verdict() {
    let keys = keys(SECRET);
    for keys in [None, Some(&keys)] {
        let key = keys.map(|keys| keys.current());
        let (mode, [ssid, sequence, timestamp]) = match key {
            None => (Mode::Open, [14, 24, 28]),
            Some(_) => (Mode::Authenticated, [26, 48, 64]),
        };
        let (mut asker, reply) = exchange(keys);
        for (what, at, bytes) in [
            ("another T1", timestamp, &[1, 2, 3, 4, 5, 6, 7, 8][..]),
            ("a T1 that is off by 2⁻³² s", timestamp + 7, &[reply[timestamp + 7] ^ 1]),
            ("another session identifier", ssid, &[9, 9]),
            ("the sequence number of another datagram", sequence, &[0, 0, 0, 2]),
            ("the next sequence number", sequence, &[0, 0, 0, 4]),
            ("a sequence number from the far future", sequence, &[0x7f, 0, 0, 0]),
            ("a sequence number from before the beginning", sequence, &[0xff, 0xff, 0xff, 0xff]),
        ] {
            let found = asker.hears(&forged(&reply, mode, key, at, bytes));
            assert_eq!(found, [UNASKED], "{what}, {mode:?}");
        }
        assert_eq!(asker.hears(&reply[..40]), [MALFORMED]);
        assert_eq!(asker.hears(b""), [MALFORMED]);
        assert_eq!(asker.prober.in_flight(), 4, "nothing was decided");
        let decided = asker.hears(&reply);
        assert!(is_ok(&decided), "{decided:?}");
    }
}

#[test]
fn a_reply_that_arrives_again_is_a_duplicate_however_often() {
    let (mut asker, reply) = exchange(None);
    assert!(is_ok(&asker.hears(&reply)));
    for _ in 0..10 {
        assert_eq!(asker.hears(&reply), [EchoReport::Duplicate]);
    }
}

#[test]
fn after_its_deadline_a_reply_is_very_late_and_the_verdict_stays() {
    let (mut asker, reply) = exchange(None);
    asker.at = asker.at + LOST_AFTER;
    let found = asker.hears(&reply);
    assert!(found.contains(&EchoReport::VeryLate), "{found:?}");
    let is_kept = |report: &&EchoReport| matches!(report, EchoReport::Decided { sequence: 3, .. });
    let decided: Vec<EchoReport> = asker.reports.iter().chain(&found).filter(is_kept).copied().collect();
    let lost = Verdict::Lost(Direction::Unknown);
    assert_eq!(decided, [EchoReport::Decided { flow: 0, sequence: 3, verdict: lost, sample: None }]);
}

#[test]
fn every_changed_bit_of_an_authenticated_reply_is_noticed() {
    let keys = keys(SECRET);
    let (mut asker, reply) = exchange(Some(&keys));
    for bit in 0..reply.len() * 8 {
        let mut changed = reply.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(asker.hears(&changed), [UNAUTHENTIC], "bit {bit}");
    }
    assert_eq!(asker.prober.responder(), None, "nothing was believed");
    assert!(is_ok(&asker.hears(&reply)));
    assert_eq!(asker.prober.responder(), Some("pathmeter"));
}

#[test]
fn a_reply_made_with_another_key_or_with_none_is_not_believed() {
    let (ours, theirs) = (keys(SECRET), keys("fedcba9876543210"));
    let (mut asker, reply) = exchange(Some(&ours));
    assert_eq!(
        asker.hears(&forged(&reply, Mode::Authenticated, Some(theirs.current()), 0, &[])),
        [UNAUTHENTIC]
    );
    assert_eq!(asker.hears(&exchange(None).1), [UNAUTHENTIC]);
    let mut appended = reply.clone();
    let value = tlv::append(&mut appended, tlv::SESSION, SessionRecord::BYTES);
    appended[value.at] = 0;
    SessionRecord { is_reply: true, ..SessionRecord::default() }.write(value.value_mut(&mut appended));
    assert_eq!(asker.hears(&appended), [UNAUTHENTIC], "behind the HMAC");
    assert!(is_ok(&asker.hears(&reply)));
}

#[test]
fn garbage_and_truncations_are_counted_and_nothing_else() {
    let mut random = Random::new(3);
    for keys in [None, Some(keys(SECRET))] {
        let (mut asker, reply) = exchange(keys.as_ref());
        let base = if keys.is_some() { 112 } else { 41 };
        for len in 0..2_000 {
            let garbage: Vec<u8> = (0..len).map(|_| random.draw().to_be_bytes()[0]).collect();
            let found = asker.hears(&garbage);
            assert!(matches!(found[..], [EchoReport::Mismatched(_)]), "{len} bytes: {found:?}");
        }
        for len in 0..base {
            assert_eq!(asker.hears(&reply[..len]), [MALFORMED], "{len} bytes");
        }
        assert_eq!(asker.prober.in_flight(), 4);
        assert!(is_ok(&asker.hears(&reply)));
    }
}

#[test]
fn times_that_make_no_sense_are_not_subtracted() {
    let (mut asker, reply) = exchange(None);
    // T2 an hour behind T3.
    let received = u32::from_be_bytes(reply[16..20].try_into().unwrap());
    let hour = forged(&reply, Mode::Open, None, 16, &(received - 3_600).to_be_bytes());
    let found = asker.hears(&hour);
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
fn a_reply_to_what_was_withdrawn_is_very_late() {
    let mut asker = Asker::new(EchoSpec { tx_timestamps: false, ..spec(1, 20 * MS, 1, 100) });
    let requests = [(); 3].map(|()| asker.datagram());
    let arrival = arrival(ASKER, asker.at);
    let mut responder = responder(None);
    let [first, second, third] = requests.map(|request| ask(&mut responder, &request, &arrival).bytes());
    asker.hears(&first);
    asker.prober.withdraw();
    assert_eq!(asker.hears(&third), [EchoReport::VeryLate]);
    assert_eq!(asker.hears(&second), [EchoReport::VeryLate]);
}

#[test]
fn a_step_of_the_responders_clock_is_no_lag_of_its_replies() {
    let mut responder = responder(None);
    let stepped =
        WallOffset::between(Timestamp::from_nanos(0), WallTime::from_nanos(1_767_229_200_000_000_000));
    let mut asked = |sequence, session, wall: WallOffset| {
        let arrival = arrival(ASKER, at(u64::from(sequence)));
        let clocks = Now { wall, ..now(arrival.at) };
        let (send, reply) =
            ask_at(&mut responder, &request(sequence, session, None), &arrival, clocks).reply.unwrap();
        if send.timestamp {
            // Somebody else is answered under the new offset before the stamp is there.
            let clocks = Now { wall: stepped, ..clocks };
            ask_at(&mut responder, &request(0, session + 1, None), &arrival, clocks);
            responder.sent(send.id, arrival.at + Duration::from_micros(30), TimestampSource::Kernel);
        }
        (send.timestamp, reply)
    };
    asked(0, 7, now(at(0)).wall);
    let (has_timestamp, written) = asked(1, 7, now(at(0)).wall);
    assert!(has_timestamp);
    let (_, reply) = asked(2, 7, stepped);
    let told = tlv::walk(&reply, Mode::Open.base_bytes()).find(|found| found.kind == tlv::FOLLOW_UP);
    let told = FollowUp::read(told.unwrap().value(&reply)).unwrap();
    let written = stamp::Reply::decode(&written, Mode::Open).unwrap();
    assert_eq!(told.sequence, 1);
    let lag = PeerTimestamp::from_ntp(told.timestamp.0).signed_since(written.sent());
    assert!(lag.abs_diff(30_000) <= 1, "{lag} ns");
}

/// Steps until something is sent, hands it over, and returns its name and its bytes.
fn leave(prober: &mut Prober, at: &mut Timestamp) -> (SendId, Vec<u8>) {
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

/// What is reported until there is nothing to do, and until when that is.
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
fn a_refusal_that_is_told_after_the_send_undoes_nothing() {
    let mut at = at(0);
    let mut prober = Prober::new(spec(1, 1_000 * MS, 1, 9), at);
    let (id, _) = leave(&mut prober, &mut at);
    prober.not_sent(id, NotSent::Buffer);
    prober.withdraw();
    let (reports, _) = settle(&mut prober, at);
    let withdrawn = EchoReport::Decided { flow: 0, sequence: 0, verdict: Verdict::Withdrawn, sample: None };
    assert_eq!(reports, [EchoReport::Sent { flow: 0, sequence: 0 }, withdrawn]);
}

#[test]
fn a_stamp_that_comes_late_never_makes_the_prober_wait_for_what_is_past() {
    let mut at = at(0);
    let mut prober = Prober::new(EchoSpec { tx_timestamps: false, ..spec(1, 1_000 * MS, 1, 2) }, at);
    let (first, request) = leave(&mut prober, &mut at);
    let reply = ask(&mut responder(None), &request, &arrival(ASKER, at)).bytes();
    prober.received(&reply, &arrival(ASKER, at));
    let mut second = at;
    leave(&mut prober, &mut second);
    // By the kernel's stamp the first left after the second.
    prober.sent(first, second + Duration::from_millis(500), TimestampSource::Kernel);
    let due = second + LOST_AFTER + Duration::from_millis(1);
    let (_, until) = settle(&mut prober, due);
    assert!(until > due, "{until:?}");
    assert_eq!(prober.in_flight(), 1, "it is decided with the one in front of it");
}

/// A responder that loses its memory now and then.
#[derive(Debug)]
struct Forgetful {
    responder: StampResponder,
    keys: Option<Arc<Keys>>,
    /// When, on its own clock; sorted.
    restarts: Vec<Timestamp>,
    restarted: usize,
}

impl Machine for Forgetful {
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
fn a_responder_that_restarts_is_never_a_reason_to_claim_a_wrong_direction() {
    let (mut restarts, mut directed) = (0, 0);
    for seed in seeds(1_500) {
        let (world, spec) = bad_world(seed);
        let mut random = Random::new(seed ^ 0xf0f0);
        let span = nanos(spec.interval) * spec.count.unwrap();
        let start = world.there.clock.monotonic(0);
        let mut when: Vec<Timestamp> =
            (0..random.between(1, 6)).map(|_| start + Duration::from_nanos(random.below(span))).collect();
        when.sort_unstable();
        let mut forgetful =
            Forgetful { responder: responder(None), keys: None, restarts: when, restarted: 0 };
        let mut prober = Prober::new(spec, world.start());
        let (tally, ledger) = world.run(&mut prober, &mut forgetful, 600_000 * MS);
        let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
        outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}: {difference}"));
        restarts += forgetful.restarted;
        directed += tally.lost() - tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown));
    }
    assert!(
        (restarts as u64) > scaled(3_000) && directed > scaled(3_000),
        "{restarts} restarts, {directed} losses with a direction"
    );
}

#[test]
fn during_a_rotation_old_and_new_key_understand_each_other() {
    for (seed, (asks, answers)) in
        (0..).zip([("old", "new old"), ("old new", "new old"), ("new old", "old new")])
    {
        let file = |names: &str| {
            let lines: Vec<String> = names.split(' ').map(|name| format!("{name}-key-0123456789")).collect();
            keys(&lines.join("\n"))
        };
        let mut world = World::new(seed);
        world.forward.loss = Loss::Random(0.1);
        let spec = EchoSpec {
            wire: WireFormat::Stamp { keys: Some(file(asks)), quirks: Quirks::default() },
            ..spec(seed, 20 * MS, 2, 300)
        };
        let mut prober = Prober::new(spec, world.start());
        let (tally, ledger) = world.run(&mut prober, &mut responder(Some(file(answers))), 600_000 * MS);
        ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0).unwrap();
        assert_eq!((tally.mismatched, prober.responder()), (0, Some("pathmeter")), "{asks} asks {answers}");
        assert!(tally.count(|verdict| verdict == Verdict::Ok) > 200, "{asks} asks {answers}");
    }
}

#[test]
fn a_prober_with_a_key_that_is_no_longer_valid_loses_everything_and_says_nothing_of_direction() {
    let mut prober = Prober::new(
        EchoSpec {
            wire: WireFormat::Stamp { keys: Some(keys(SECRET)), quirks: Quirks::default() },
            ..spec(1, 20 * MS, 1, 50)
        },
        World::new(1).start(),
    );
    let mut other = responder(Some(keys("fedcba9876543210")));
    let (tally, _) = World::new(1).run(&mut prober, &mut other, 600_000 * MS);
    assert_eq!(tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown)), tally.sent);
    assert_eq!(other.sessions(), 0);
}
