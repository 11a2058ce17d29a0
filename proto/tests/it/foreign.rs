//! Reflectors that are not ours: what a prober makes of them, and that it never claims what they did not say.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{
    Direction, EchoSpec, Prober, Profile, Quirks, ReflectorTimes, ResponderReport, StampResponder, Verdict,
    WireFormat,
};
use pathmeter_proto::machine::{
    Arrival, HostDrops, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use pathmeter_proto::sim::{Counts, Jitter, Ledger, Loss, Random, World};
use pathmeter_proto::time::{Timestamp, WallTime};
use pathmeter_proto::wire::NtpTime;
use pathmeter_proto::wire::stamp::{Mode, Reply, Request};
use pathmeter_proto::wire::tlv::{self, ClassOfService};

use super::conservation::{LATE_AFTER, LOST_AFTER, MS, responder, scaled, seeds, spec};

/// What a reflector does with a request.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Manner {
    /// Numbers its replies instead of copying the request's number.
    counts: bool,
    tail: Tail,
    /// Longer requests are dropped.
    longest: usize,
    /// Writes PTP timestamps and says so.
    is_ptp: bool,
    /// Says of its timestamps what the request says of its own.
    copies_mark: bool,
}

/// What follows the base packet in a reply.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Tail {
    /// Nothing.
    Cut,
    /// Not even the base packet's last three bytes, and no session identifier: TWAMP-Light.
    Twamp,
    /// What the request had there, flags and all.
    Copied,
    /// Extensions: the class of service is filled in, anything else comes back with the flag U.
    Understood,
}

const PLAIN: Manner =
    Manner { counts: false, tail: Tail::Cut, longest: 65_507, is_ptp: false, copies_mark: false };
const EXTENDED: Manner = Manner { counts: true, tail: Tail::Understood, ..PLAIN };
const TWAMP: Manner = Manner { counts: true, tail: Tail::Twamp, ..PLAIN };
const SHORT: Manner = Manner { longest: 44, ..PLAIN };
const COPYING: Manner = Manner { tail: Tail::Copied, ..PLAIN };
const PTP: Manner = Manner { is_ptp: true, ..EXTENDED };

/// All of them, with the word by which they go.
const ALL: [(&str, Manner, &str); 6] = [
    ("plain", PLAIN, "twamp-light"),
    ("extended", EXTENDED, "stamp"),
    ("twamp-light", TWAMP, "twamp-light"),
    ("short", SHORT, "twamp-light"),
    ("copying", COPYING, "twamp-light"),
    ("ptp", PTP, "stamp"),
];

/// Somebody else's reflector.
#[derive(Debug)]
struct Reflector {
    manner: Manner,
    replies: BTreeMap<(SocketAddr, u16), u32>,
    pending: Option<(Vec<u8>, Arrival)>,
    has_answered: bool,
    /// Requests by length.
    seen: BTreeMap<usize, u32>,
}

impl Reflector {
    fn new(manner: Manner) -> Self {
        Self { manner, replies: BTreeMap::new(), pending: None, has_answered: false, seen: BTreeMap::new() }
    }

    fn time(&self, wall: WallTime) -> NtpTime {
        if !self.manner.is_ptp {
            return NtpTime::from(wall);
        }
        let (seconds, nanos) = (wall.as_nanos() / 1_000_000_000, wall.as_nanos() % 1_000_000_000);
        NtpTime(seconds << 32 | nanos)
    }

    fn reflect(&mut self, bytes: &[u8], arrival: &Arrival, now: Now, out: &mut Vec<u8>) {
        let request = Request::decode(bytes, Mode::Open).unwrap();
        let count = self.replies.entry((arrival.from, request.ssid)).or_default();
        let number = if self.manner.counts { *count } else { request.sequence };
        *count += 1;
        out.extend_from_slice(bytes);
        let reply = Reply {
            sequence: number,
            timestamp: self.time(now.wall.wall(now.at)),
            error: if self.manner.is_ptp && !self.manner.copies_mark { 0x4001 } else { 1 },
            ssid: if self.manner.tail == Tail::Twamp { 0 } else { request.ssid },
            received: self.time(now.wall.wall(arrival.at)),
            sender_sequence: request.sequence,
            sender_timestamp: request.timestamp,
            sender_error: request.error,
            sender_ttl: 251,
        };
        reply.write(Mode::Open, out);
        match self.manner.tail {
            Tail::Cut => out.truncate(44),
            Tail::Twamp => out.truncate(41),
            Tail::Copied => {}
            Tail::Understood => fill_in(out, arrival.tos.unwrap()),
        }
    }
}

fn fill_in(reply: &mut [u8], tos: u8) {
    let all: Vec<tlv::Tlv> = tlv::walk(reply, 44).collect();
    for found in all {
        let is_known = [tlv::PADDING, tlv::CLASS_OF_SERVICE, tlv::FOLLOW_UP].contains(&found.kind);
        reply[found.at] = if is_known { 0 } else { tlv::UNRECOGNIZED };
        if found.kind == tlv::CLASS_OF_SERVICE {
            let asked = ClassOfService::read(found.value(reply)).unwrap();
            let value = found.value_mut(reply);
            ClassOfService { received: tos >> 2, ecn: tos & 3, ..asked }.write(value);
            // Bits that RFC 8972 reserves, and that stamp-suite 1.0.0 sets.
            value[2] |= 0x30;
        }
    }
}

impl Machine for Reflector {
    type Report = ResponderReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        *self.seen.entry(datagram.len()).or_default() += 1;
        if (44..=self.manner.longest).contains(&datagram.len()) {
            self.pending = Some((datagram.to_vec(), *arrival));
        }
    }

    fn sent(&mut self, _: SendId, _: Timestamp, _: TimestampSource) {}

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn stop(&mut self) {}

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<ResponderReport> {
        if let Some((bytes, arrival)) = self.pending.take() {
            self.reflect(&bytes, &arrival, now, arena);
            self.has_answered = true;
            let (to, tos) = (arrival.from, arrival.tos.unwrap());
            return Step::Send(Send {
                id: SendId(0),
                flow: 0,
                from: None,
                to,
                tos,
                ttl: 255,
                dont_fragment: false,
                segment: None,
                timestamp: false,
            });
        }
        if std::mem::take(&mut self.has_answered) {
            return Step::Report(ResponderReport::Answered);
        }
        Step::Wait(Timestamp::NEVER)
    }
}

/// Measures a reflector and compares with the truth: every verdict, every round trip to the nanosecond, every direction.
fn measure(seed: u64, world: World, spec: EchoSpec, manner: Manner) -> (Counts, Ledger, Prober, Reflector) {
    let mut reflector = Reflector::new(manner);
    let mut prober = Prober::new(spec, world.start());
    let (tally, mut ledger) = world.run(&mut prober, &mut reflector, 3_600_000 * MS);
    // It is asked again whether it became one of ours.
    ledger.may_withdraw = true;
    let outcome = ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0);
    outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}, {manner:?}: {difference}"));
    (tally, ledger, prober, reflector)
}

fn directed(tally: &Counts) -> u64 {
    tally.lost() - tally.count(|verdict| verdict == Verdict::Lost(Direction::Unknown))
}

#[test]
fn every_kind_of_reflector_is_recognised_and_its_round_trips_are_exact() {
    for (name, manner, word) in ALL {
        let spec = EchoSpec { dscp: Dscp::new(46).unwrap(), ..spec(5, 50 * MS, 2, 400) };
        let (tally, _, prober, reflector) = measure(5, World::new(5), spec, manner);
        assert_eq!(prober.responder(), Some(word), "{name}");
        assert_eq!((tally.mismatched, tally.turnaround_invalid), (0, 0), "{name}");
        let ok = tally.count(|verdict| verdict == Verdict::Ok);
        if manner == SHORT {
            // What it drops is lost: four before anybody doubts, those on their way until it is decided, and one later.
            assert_eq!(directed(&tally), 0, "nothing is known of what it dropped");
            assert!(ok > 250, "{ok}");
        } else {
            assert_eq!(ok, 400, "{name}");
        }
        let last = tally.verdicts.values().last().unwrap().1.unwrap();
        assert_eq!(last.class_forward.is_some(), word == "stamp", "{name}");
        assert_eq!(last.hops_forward, None, "{name}: who knows what TTL it puts there");
        let large: u32 = reflector.seen.iter().filter(|(len, _)| **len > 52).map(|(_, count)| count).sum();
        assert!(large < 120, "{name}: {large} datagrams still carried what it does not understand");
    }
}

#[test]
fn what_is_known_of_a_reflector_beforehand_is_not_tried_out() {
    let of = |profile| Quirks { profile, ..Quirks::default() };
    for (manner, profile, longest) in
        [(SHORT, Profile::Plain, 44), (TWAMP, Profile::TwampLight, 44), (EXTENDED, Profile::Stamp, 52)]
    {
        let spec = EchoSpec {
            wire: WireFormat::Stamp { keys: None, quirks: of(profile) },
            ..spec(7, 50 * MS, 2, 400)
        };
        let (tally, _, _, reflector) = measure(7, World::new(7), spec, manner);
        assert_eq!(
            tally.count(|verdict| verdict == Verdict::Ok),
            400,
            "{profile:?}: none is tried out and lost"
        );
        assert_eq!(reflector.seen.keys().max(), Some(&longest), "{profile:?}");
    }
}

#[test]
fn times_that_are_marked_wrongly_can_be_read_as_they_are() {
    const LIAR: Manner = Manner { copies_mark: true, ..PTP };
    let tally = |times| {
        let quirks = Quirks { times, ..Quirks::default() };
        let spec = EchoSpec { wire: WireFormat::Stamp { keys: None, quirks }, ..spec(8, 50 * MS, 1, 200) };
        let mut reflector = Reflector::new(LIAR);
        let mut world = World::new(8);
        world.there.pace.latency = 3 * MS;
        let mut prober = Prober::new(spec, world.start());
        let (tally, ledger) = world.run(&mut prober, &mut reflector, 3_600_000 * MS);
        (ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0), tally)
    };
    assert!(tally(ReflectorTimes::Marked).0.is_err(), "it would be believed");
    assert_eq!(tally(ReflectorTimes::Ptp).0, Ok(()));
    let (_, ignored) = tally(ReflectorTimes::Ignored);
    let turnarounds =
        ignored.verdicts.values().filter_map(|(_, sample)| *sample).map(|sample| sample.turnaround);
    assert_eq!(turnarounds.max(), Some(Duration::ZERO));
}

#[test]
fn what_a_reflector_drops_when_it_is_asked_again_is_withdrawn_and_not_lost() {
    let (tally, ..) = measure(6, World::new(6), spec(6, 1_000 * MS, 1, 2_500), SHORT);
    let lost: Vec<u64> =
        tally.verdicts.iter().filter(|(_, v)| matches!(v.0, Verdict::Lost(_))).map(|(id, _)| id.1).collect();
    assert!(lost.len() <= 10 && lost.iter().all(|sequence| *sequence < 30), "{lost:?}");
    let withdrawn = tally.count(|verdict| verdict == Verdict::Withdrawn);
    assert!((3..=15).contains(&withdrawn), "{withdrawn}: three each time, every ten minutes");
}

#[test]
fn a_foreign_reflector_is_never_a_reason_to_claim_a_wrong_direction() {
    let mut claimed = BTreeMap::new();
    for seed in seeds(400) {
        for (name, manner, _) in ALL {
            let mut random = Random::new(seed);
            let mut world = World::new(seed);
            for link in [&mut world.forward, &mut world.reverse] {
                link.delay = random.between(0, 80 * MS);
                link.loss = match random.below(3) {
                    0 => Loss::Random(random.fraction() * 0.3),
                    1 => Loss::gilbert(0.02, 0.3),
                    _ => Loss::Random(0.01),
                };
            }
            // On the way back nothing can confuse a count.
            world.reverse.jitter = Jitter::Uniform(random.pick(&[0, 30 * MS, 150 * MS]));
            world.reverse.duplicates = [0.0, 0.1][usize::try_from(random.below(2)).unwrap()];
            let interval = [5 * MS, 20 * MS, 100 * MS][usize::try_from(random.below(3)).unwrap()];
            let (tally, ..) = measure(seed, world, spec(seed, interval, 1, 200), manner);
            let known = claimed.entry(name).or_insert((0, 0));
            *known = (known.0 + directed(&tally), known.1 + tally.lost());
        }
    }
    for (name, manner, _) in ALL {
        let (directed, lost) = claimed[name];
        assert!(lost > scaled(1_000), "{name}: {lost} lost");
        if manner.counts {
            assert!(directed * 5 > lost, "{name}: {directed} of {lost} have a direction");
        } else {
            assert_eq!(directed, 0, "{name}: it says nothing of what arrived");
        }
    }
}

#[test]
fn a_request_that_arrives_twice_does_not_hide_one_that_was_lost() {
    let (mut lost, mut wrong) = (0, 0);
    for seed in seeds(200) {
        let mut world = World::new(seed);
        world.forward.duplicates = 0.1;
        world.forward.loss = Loss::Random(0.1);
        let mut reflector = Reflector::new(EXTENDED);
        let mut prober = Prober::new(spec(seed, 100 * MS, 1, 500), world.start());
        let (tally, _) = world.run(&mut prober, &mut reflector, 600_000 * MS);
        lost += tally.lost();
        wrong += tally.count(|verdict| verdict == Verdict::Lost(Direction::Reverse));
    }
    assert!(lost > scaled(5_000), "{lost} lost");
    // Until a first copy is seen it can mislead; without the doubt afterwards it would be hundreds.
    assert!(
        wrong * 1_500 <= lost,
        "{wrong} of {lost} losses, all on the way there, seem to be on the way back"
    );
}

/// One reflector, and from some time on one of ours in its place.
#[derive(Debug)]
struct Upgraded {
    before: Reflector,
    after: StampResponder,
    at: Timestamp,
    is_upgraded: bool,
}

impl Machine for Upgraded {
    type Report = ResponderReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        self.is_upgraded = arrival.at >= self.at;
        if self.is_upgraded {
            self.after.received(datagram, arrival);
        } else {
            self.before.received(datagram, arrival);
        }
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        if self.is_upgraded {
            self.after.sent(id, at, by);
        }
    }

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn stop(&mut self) {}

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn step(&mut self, now: Now, drops: &mut HostDrops, arena: &mut Vec<u8>) -> Step<ResponderReport> {
        if self.is_upgraded {
            self.after.step(now, drops, arena)
        } else {
            self.before.step(now, drops, arena)
        }
    }
}

#[test]
fn that_a_reflector_was_replaced_by_one_of_ours_is_noticed_within_ten_minutes() {
    for (name, manner, word) in ALL {
        for (slots, expected) in [(500, word), (1_000, "pathmeter")] {
            let world = World::new(8);
            let at = world.there.clock.monotonic(0) + Duration::from_secs(300);
            let mut upgraded =
                Upgraded { before: Reflector::new(manner), after: responder(None), at, is_upgraded: false };
            let mut prober = Prober::new(spec(8, 1_000 * MS, 1, slots), world.start());
            let (tally, mut ledger) = world.run(&mut prober, &mut upgraded, 3_600_000 * MS);
            ledger.may_withdraw = true;
            ledger.compare(&tally, LATE_AFTER, LOST_AFTER, |_, _| 0).unwrap();
            assert_eq!(prober.responder(), Some(expected), "{name} after {slots} s");
        }
    }
}
