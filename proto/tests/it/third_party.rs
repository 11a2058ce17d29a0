//! Third-party reflectors: how a prober handles them, and that it claims no direction without evidence.

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

/// Behaviour of a reflector.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Behaviour {
    /// Counts its replies instead of copying the request's number.
    counts: bool,
    extensions: Extensions,
    /// Length of the longest request that it does not drop.
    longest: usize,
    /// Writes PTP timestamps and sets the Z bit.
    is_ptp: bool,
    /// Copies the error estimate, and so the Z bit, of the request.
    copies_error: bool,
}

/// What follows the base packet in a reply.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Extensions {
    /// Nothing.
    Cut,
    /// Nothing; the base packet lacks its last three bytes and the session identifier: TWAMP-Light.
    Twamp,
    /// The request's bytes, flags included.
    Copied,
    /// Extensions: the class of service is filled in; unknown types are returned with the flag U.
    Understood,
}

const PLAIN: Behaviour = Behaviour {
    counts: false,
    extensions: Extensions::Cut,
    longest: 65_507,
    is_ptp: false,
    copies_error: false,
};
const EXTENDED: Behaviour = Behaviour { counts: true, extensions: Extensions::Understood, ..PLAIN };
const TWAMP: Behaviour = Behaviour { counts: true, extensions: Extensions::Twamp, ..PLAIN };
const SHORT: Behaviour = Behaviour { longest: 44, ..PLAIN };
const COPYING: Behaviour = Behaviour { extensions: Extensions::Copied, ..PLAIN };
const PTP: Behaviour = Behaviour { is_ptp: true, ..EXTENDED };

/// All behaviours, with the kind that the prober reports.
const ALL: [(&str, Behaviour, &str); 6] = [
    ("plain", PLAIN, "twamp-light"),
    ("extended", EXTENDED, "stamp"),
    ("twamp-light", TWAMP, "twamp-light"),
    ("short", SHORT, "twamp-light"),
    ("copying", COPYING, "twamp-light"),
    ("ptp", PTP, "stamp"),
];

/// A third-party reflector.
#[derive(Debug)]
struct Reflector {
    behaviour: Behaviour,
    replies: BTreeMap<(SocketAddr, u16), u32>,
    pending: Option<(Vec<u8>, Arrival)>,
    has_answered: bool,
    /// Number of requests by length.
    seen: BTreeMap<usize, u32>,
}

impl Reflector {
    fn new(behaviour: Behaviour) -> Self {
        Self {
            behaviour,
            replies: BTreeMap::new(),
            pending: None,
            has_answered: false,
            seen: BTreeMap::new(),
        }
    }

    fn time(&self, wall: WallTime) -> NtpTime {
        if !self.behaviour.is_ptp {
            return NtpTime::from(wall);
        }
        let (seconds, nanos) = (wall.as_nanos() / 1_000_000_000, wall.as_nanos() % 1_000_000_000);
        NtpTime(seconds << 32 | nanos)
    }

    fn reflect(&mut self, bytes: &[u8], arrival: &Arrival, now: Now, out: &mut Vec<u8>) {
        let request = Request::decode(bytes, Mode::Open).unwrap();
        let count = self.replies.entry((arrival.from, request.ssid)).or_default();
        let number = if self.behaviour.counts { *count } else { request.sequence };
        *count += 1;
        out.extend_from_slice(bytes);
        let reply = Reply {
            sequence: number,
            timestamp: self.time(now.wall.wall(now.at)),
            error: if self.behaviour.is_ptp && !self.behaviour.copies_error { 0x4001 } else { 1 },
            ssid: if self.behaviour.extensions == Extensions::Twamp { 0 } else { request.ssid },
            received: self.time(now.wall.wall(arrival.at)),
            sender_sequence: request.sequence,
            sender_timestamp: request.timestamp,
            sender_error: request.error,
            sender_ttl: 251,
        };
        reply.write(Mode::Open, out);
        match self.behaviour.extensions {
            Extensions::Cut => out.truncate(44),
            Extensions::Twamp => out.truncate(41),
            Extensions::Copied => {}
            Extensions::Understood => fill_in(out, arrival.tos.unwrap()),
        }
    }
}

fn fill_in(reply: &mut [u8], tos: u8) {
    let all: Vec<tlv::Tlv> = tlv::walk(reply, 44).collect();
    for found in all {
        let is_known = [tlv::PADDING, tlv::CLASS_OF_SERVICE, tlv::FOLLOW_UP].contains(&found.kind);
        reply[found.at] = if is_known { 0 } else { tlv::UNRECOGNIZED };
        if found.kind == tlv::CLASS_OF_SERVICE {
            let requested = ClassOfService::read(found.value(reply)).unwrap();
            let value = found.value_mut(reply);
            ClassOfService { received: tos >> 2, ecn: tos & 3, ..requested }.write(value);
            // Bits that RFC 8972 reserves and that stamp-suite 1.0.0 sets.
            value[2] |= 0x30;
        }
    }
}

impl Machine for Reflector {
    type Report = ResponderReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        *self.seen.entry(datagram.len()).or_default() += 1;
        if (44..=self.behaviour.longest).contains(&datagram.len()) {
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

/// Measures a reflector and compares all verdicts, round trips and directions with the ledger.
fn measure(
    seed: u64,
    world: World,
    spec: EchoSpec,
    behaviour: Behaviour,
) -> (Counts, Ledger, Prober, Reflector) {
    let mut reflector = Reflector::new(behaviour);
    let mut prober = Prober::new(spec, world.start());
    let (counts, mut ledger) = world.run(&mut prober, &mut reflector, 3_600_000 * MS);
    // It is tested again for support of the session record.
    ledger.may_withdraw = true;
    let outcome = ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0);
    outcome.unwrap_or_else(|difference| panic!("SIM_SEED={seed}, {behaviour:?}: {difference}"));
    (counts, ledger, prober, reflector)
}

fn directed(counts: &Counts) -> u64 {
    counts.lost() - counts.count(|verdict| verdict == Verdict::Lost(Direction::Unknown))
}

#[test]
fn each_kind_of_reflector_is_recognised_with_exact_round_trips() {
    for (name, behaviour, kind) in ALL {
        let spec = EchoSpec { dscp: Dscp::new(46).unwrap(), ..spec(5, 50 * MS, 2, 400) };
        let (counts, _, prober, reflector) = measure(5, World::new(5), spec, behaviour);
        assert_eq!(prober.responder(), Some(kind), "{name}");
        assert_eq!((counts.mismatched, counts.turnaround_invalid), (0, 0), "{name}");
        let ok = counts.count(|verdict| verdict == Verdict::Ok);
        if behaviour == SHORT {
            // Losses: four before the prober suspects the extensions, those in flight until the fourth is
            // decided, and one later.
            assert_eq!(directed(&counts), 0, "there is no evidence about its drops");
            assert!(ok > 250, "{ok}");
        } else {
            assert_eq!(ok, 400, "{name}");
        }
        let last = counts.verdicts.values().last().unwrap().1.unwrap();
        assert_eq!(last.class_forward.is_some(), kind == "stamp", "{name}");
        assert_eq!(last.hops_forward, None, "{name}: its initial TTL is not known");
        let large: u32 = reflector.seen.iter().filter(|(len, _)| **len > 52).map(|(_, count)| count).sum();
        assert!(large < 120, "{name}: {large} datagrams still carried unsupported extensions");
    }
}

#[test]
fn configured_profile_disables_detection() {
    let of = |profile| Quirks { profile, ..Quirks::default() };
    for (behaviour, profile, longest) in
        [(SHORT, Profile::Plain, 44), (TWAMP, Profile::TwampLight, 44), (EXTENDED, Profile::Stamp, 52)]
    {
        let spec = EchoSpec {
            wire: WireFormat::Stamp { keys: None, quirks: of(profile) },
            ..spec(7, 50 * MS, 2, 400)
        };
        let (counts, _, _, reflector) = measure(7, World::new(7), spec, behaviour);
        assert_eq!(
            counts.count(|verdict| verdict == Verdict::Ok),
            400,
            "{profile:?}: no detection datagram is lost"
        );
        assert_eq!(reflector.seen.keys().max(), Some(&longest), "{profile:?}");
    }
}

#[test]
fn configured_timestamp_format_overrides_a_wrong_mark() {
    const WRONG_MARK: Behaviour = Behaviour { copies_error: true, ..PTP };
    let counts = |times| {
        let quirks = Quirks { times, ..Quirks::default() };
        let spec = EchoSpec { wire: WireFormat::Stamp { keys: None, quirks }, ..spec(8, 50 * MS, 1, 200) };
        let mut reflector = Reflector::new(WRONG_MARK);
        let mut world = World::new(8);
        world.responder_host.scheduling.latency = 3 * MS;
        let mut prober = Prober::new(spec, world.start());
        let (counts, ledger) = world.run(&mut prober, &mut reflector, 3_600_000 * MS);
        (ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0), counts)
    };
    assert!(counts(ReflectorTimes::Marked).0.is_err(), "the mark is wrong");
    assert_eq!(counts(ReflectorTimes::Ptp).0, Ok(()));
    let (_, ignored) = counts(ReflectorTimes::Ignored);
    let turnarounds =
        ignored.verdicts.values().filter_map(|(_, sample)| *sample).map(|sample| sample.turnaround);
    assert_eq!(turnarounds.max(), Some(Duration::ZERO));
}

#[test]
fn dropped_detection_datagrams_are_withdrawn_and_not_lost() {
    let (counts, ..) = measure(6, World::new(6), spec(6, 1_000 * MS, 1, 2_500), SHORT);
    let lost: Vec<u64> =
        counts.verdicts.iter().filter(|(_, v)| matches!(v.0, Verdict::Lost(_))).map(|(id, _)| id.1).collect();
    assert!(lost.len() <= 10 && lost.iter().all(|sequence| *sequence < 30), "{lost:?}");
    let withdrawn = counts.count(|verdict| verdict == Verdict::Withdrawn);
    assert!((3..=15).contains(&withdrawn), "{withdrawn}: three each time, every ten minutes");
}

#[test]
fn third_party_reflector_never_causes_a_wrong_direction() {
    let mut claimed = BTreeMap::new();
    for seed in seeds(400) {
        for (name, behaviour, _) in ALL {
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
            // In the reverse direction nothing can distort a count.
            world.reverse.jitter = Jitter::Uniform(random.pick(&[0, 30 * MS, 150 * MS]));
            world.reverse.duplicates = [0.0, 0.1][usize::try_from(random.below(2)).unwrap()];
            let interval = [5 * MS, 20 * MS, 100 * MS][usize::try_from(random.below(3)).unwrap()];
            let (counts, ..) = measure(seed, world, spec(seed, interval, 1, 200), behaviour);
            let known = claimed.entry(name).or_insert((0, 0));
            *known = (known.0 + directed(&counts), known.1 + counts.lost());
        }
    }
    for (name, behaviour, _) in ALL {
        let (directed, lost) = claimed[name];
        assert!(lost > scaled(1_000), "{name}: {lost} lost");
        if behaviour.counts {
            assert!(directed * 5 > lost, "{name}: {directed} of {lost} have a direction");
        } else {
            assert_eq!(directed, 0, "{name}: it reports nothing about arrivals");
        }
    }
}

#[test]
fn duplicated_request_does_not_hide_a_lost_one() {
    let (mut lost, mut wrong) = (0, 0);
    for seed in seeds(200) {
        let mut world = World::new(seed);
        world.forward.duplicates = 0.1;
        world.forward.loss = Loss::Random(0.1);
        let mut reflector = Reflector::new(EXTENDED);
        let mut prober = Prober::new(spec(seed, 100 * MS, 1, 500), world.start());
        let (counts, _) = world.run(&mut prober, &mut reflector, 600_000 * MS);
        lost += counts.lost();
        wrong += counts.count(|verdict| verdict == Verdict::Lost(Direction::Reverse));
    }
    assert!(lost > scaled(5_000), "{lost} lost");
    // A duplicate can mislead until the first one is noticed; without the distrust afterwards, hundreds of
    // losses would be wrong.
    assert!(wrong * 1_500 <= lost, "{wrong} of {lost} forward losses were reported as reverse");
}

/// A third-party reflector that is replaced by a pathmeter responder at some time.
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
fn replacement_by_an_agent_is_noticed_within_ten_minutes() {
    for (name, behaviour, kind) in ALL {
        for (slots, expected) in [(500, kind), (1_000, "pathmeter")] {
            let world = World::new(8);
            let at = world.responder_host.clock.monotonic(0) + Duration::from_secs(300);
            let mut upgraded = Upgraded {
                before: Reflector::new(behaviour),
                after: responder(None),
                at,
                is_upgraded: false,
            };
            let mut prober = Prober::new(spec(8, 1_000 * MS, 1, slots), world.start());
            let (counts, mut ledger) = world.run(&mut prober, &mut upgraded, 3_600_000 * MS);
            ledger.may_withdraw = true;
            ledger.compare(&counts, LATE_AFTER, LOST_AFTER, |_, _| 0).unwrap();
            assert_eq!(prober.responder(), Some(expected), "{name} after {slots} s");
        }
    }
}
