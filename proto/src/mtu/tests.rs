//! Searches over links whose MTU is known to the test.
#![expect(clippy::disallowed_methods, reason = "SIM_SEED and SIM_TIMES choose the worlds")]

use std::collections::BTreeMap;

use super::*;
use crate::admission::Policy;
use crate::echo::StampResponder;
use crate::machine::IcmpError;
use crate::time::{WallOffset, WallTime};
use crate::wire::tlv;

/// A path from one searcher to one responder, and its way back.
#[derive(Debug, Clone)]
struct Link {
    /// From which second on which MTU holds on the way there.
    mtu: Vec<(u64, u16)>,
    back: u16,
    /// Of our own interface.
    host: u16,
    complaints: Complaints,
    /// Chance that a datagram is lost, each way.
    loss: f64,
    delay: Duration,
    /// Seconds in which nothing passes.
    dead: std::ops::Range<u64>,
    /// Whether the responder is of a version that knows no brief replies.
    is_old: bool,
}

/// What the router in front of the narrow link says.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Complaints {
    /// Nothing: a black hole.
    None,
    /// The truth.
    True,
    /// A wrong MTU.
    Wrong(u32),
    /// Something about every packet, whether it passed or not.
    Always(u32),
    /// Something about packets that were never sent.
    Forged(u32),
}

impl Link {
    fn of(mtu: u16) -> Self {
        Self {
            mtu: vec![(0, mtu)],
            back: u16::MAX,
            host: u16::MAX,
            complaints: Complaints::None,
            loss: 0.0,
            delay: Duration::from_millis(10),
            dead: 0..0,
            is_old: false,
        }
    }
}

enum Event {
    Request(Vec<u8>),
    Reply(Vec<u8>),
    Complaint(Vec<u8>, u32),
}

/// What happened.
#[derive(Debug, Default)]
struct Seen {
    changes: Vec<(Timestamp, Option<u16>, u16)>,
    sizes: Vec<u16>,
    sent: u64,
    acknowledged: u64,
    lost: u64,
    too_big: u64,
    /// Those among them that never left.
    refused: u64,
}

struct World {
    link: Link,
    search: MtuSearch,
    responder: StampResponder,
    events: BTreeMap<(Timestamp, u64), Event>,
    count: u64,
    seed: u64,
    at: Timestamp,
    seen: Seen,
}

const MS: u64 = 1_000_000;

fn second(at: Timestamp) -> u64 {
    at.as_nanos() / 1_000_000_000 - 1_000
}

fn address(is_v4: bool, last: u8, port: u16) -> SocketAddr {
    match is_v4 {
        true => ([192, 0, 2, last], port).into(),
        false => ([0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()], port).into(),
    }
}

impl World {
    fn new(seed: u64, link: Link) -> Self {
        let is_v4 = mix(seed ^ 1).is_multiple_of(2);
        let keys = mix(seed ^ 2).is_multiple_of(2);
        Self::with(seed, link, is_v4, keys)
    }

    fn with(seed: u64, link: Link, is_v4: bool, has_keys: bool) -> Self {
        let keys = has_keys.then(|| Arc::new(Keys::parse("0123456789abcdef").unwrap()));
        let spec = MtuSpec {
            to: address(is_v4, 2, 862),
            ssid: 7,
            interval: Duration::from_secs(60),
            ceiling: 9000,
            dscp: Dscp::DEFAULT,
            lost_after: Duration::from_secs(3),
            keys: keys.clone(),
            known: None,
            seed,
        };
        let policy = Policy { open: true, rate: 1_000_000, rate_per_source: 1_000_000, ..Policy::default() };
        let at = Timestamp::from_nanos(1_000_000_000_000);
        Self {
            link,
            search: MtuSearch::new(spec, at),
            responder: StampResponder::new(policy, keys, 8),
            events: BTreeMap::new(),
            count: 0,
            seed,
            at,
            seen: Seen::default(),
        }
    }

    fn is_v4(&self) -> bool {
        self.search.spec.to.is_ipv4()
    }

    fn now(&self) -> Now {
        let epoch = WallTime::from_nanos(1_767_225_600_000_000_000);
        Now { at: self.at, drained: self.at, wall: WallOffset::between(Timestamp::from_nanos(0), epoch) }
    }

    fn chance(&mut self, p: f64) -> bool {
        self.count += 1;
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let fraction = (mix(self.seed ^ mix(self.count)) >> 11) as f64 / 9_007_199_254_740_992.0;
        fraction < p
    }

    fn mtu(&self) -> u16 {
        let since = self.link.mtu.iter().rev().find(|(from, _)| *from <= second(self.at));
        since.expect("an MTU from the beginning on").1
    }

    fn later(&mut self, event: Event) {
        self.count += 1;
        self.events.insert((self.at + self.link.delay, self.count), event);
    }

    fn packet(&self, datagram: &[u8]) -> u16 {
        u16::try_from(datagram.len()).unwrap() + headers(self.search.spec.to)
    }

    /// Runs for so many seconds more.
    fn run(&mut self, seconds: u64) -> &mut Self {
        let end = self.at + Duration::from_secs(seconds);
        loop {
            let wake = self.drive();
            let next = self.events.keys().next().map_or(Timestamp::NEVER, |(at, _)| *at);
            if wake.min(next) > end {
                self.at = end;
                return self;
            }
            self.at = self.at.max(wake.min(next));
            while let Some(first) = self.events.first_entry().filter(|event| event.key().0 <= self.at) {
                let event = first.remove();
                self.happens(event);
            }
        }
    }

    fn drive(&mut self) -> Timestamp {
        for _ in 0..1_000 {
            let mut arena = Vec::new();
            match self.search.step(self.now(), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    assert!(send.dont_fragment && send.flow == 0 && send.to == self.search.spec.to);
                    self.leaves(send.id, arena);
                }
                Step::Report(MtuReport::Sent) => self.seen.sent += 1,
                Step::Report(MtuReport::Acknowledged) => self.seen.acknowledged += 1,
                Step::Report(MtuReport::Lost) => self.seen.lost += 1,
                Step::Report(MtuReport::TooBig) => self.seen.too_big += 1,
                Step::Report(MtuReport::Changed { from, to }) => self.seen.changes.push((self.at, from, to)),
                Step::Wait(until) => {
                    assert!(until > self.at, "it waits for what is past");
                    let decided = self.seen.acknowledged + self.seen.lost + self.seen.too_big;
                    let in_flight = u64::from(self.search.flight.is_some());
                    assert_eq!(self.seen.sent + self.seen.refused, decided + in_flight, "one outcome each");
                    return until;
                }
                Step::Finished => return Timestamp::NEVER,
            }
        }
        panic!("it never waits");
    }

    fn leaves(&mut self, id: SendId, datagram: Vec<u8>) {
        let size = self.packet(&datagram);
        self.seen.sizes.push(size);
        if size > self.link.host {
            self.seen.refused += 1;
            self.search.not_sent(id, NotSent::TooBig);
            return;
        }
        self.search.sent(id, self.at, TimestampSource::User);
        if self.link.dead.contains(&second(self.at)) || self.chance(self.link.loss) {
            return;
        }
        let fits = size <= self.mtu();
        let complaint = match self.link.complaints {
            Complaints::True if !fits => Some((datagram.clone(), u32::from(self.mtu()))),
            Complaints::Wrong(mtu) if !fits => Some((datagram.clone(), mtu)),
            Complaints::Always(mtu) => Some((datagram.clone(), mtu)),
            Complaints::Forged(mtu) => {
                // Everything is right but one byte of the timestamp.
                let mut forged = datagram.clone();
                forged[if self.search.spec.keys.is_some() { 23 } else { 11 }] ^= 1;
                Some((forged, mtu))
            }
            Complaints::None | Complaints::True | Complaints::Wrong(_) => None,
        };
        if let Some((quoted, mtu)) = complaint {
            self.later(Event::Complaint(quoted, mtu));
        }
        if fits {
            self.later(Event::Request(datagram));
        }
    }

    fn happens(&mut self, event: Event) {
        let (here, there) = (address(self.is_v4(), 1, 40_000), self.search.spec.to);
        let arrival = |from, icmp| Arrival {
            at: self.at,
            by: TimestampSource::Kernel,
            from,
            to: None,
            flow: 0,
            ttl: Some(250),
            tos: Some(0),
            icmp,
        };
        match event {
            Event::Request(mut request) => {
                if self.link.is_old {
                    // It does not see the flag. Its HMAC would differ: such worlds are open.
                    request[Mode::Open.base_bytes() + tlv::HEADER_BYTES + 5] = 0;
                }
                let from_here = arrival(here, None);
                self.responder.received(&request, &from_here);
                let mut arena = Vec::new();
                let step = self.responder.step(self.now(), &mut HostDrops::default(), &mut arena);
                assert!(matches!(step, Step::Send(_)), "{step:?}");
                while let Step::Report(_) =
                    self.responder.step(self.now(), &mut HostDrops::default(), &mut arena)
                {}
                if self.packet(&arena) <= self.link.back && !self.chance(self.link.loss) {
                    self.later(Event::Reply(arena));
                }
            }
            Event::Reply(reply) => {
                assert!(self.search.has_asked(&reply));
                let from_there = arrival(there, None);
                self.search.received(&reply, &from_there);
            }
            Event::Complaint(quoted, mtu) => {
                let router = [192, 0, 2, 9].into();
                let icmp = IcmpError { router, kind: IcmpKind::TooBig, mtu: Some(mtu) };
                let about = arrival(there, Some(icmp));
                // As much as a router quotes: 576 bytes in all.
                self.search.received(&quoted[..quoted.len().min(548)], &about);
            }
        }
    }

    /// The values it had, one after the other.
    fn values(&self) -> Vec<u16> {
        self.seen.changes.iter().map(|(_, _, to)| *to).collect()
    }
}

/// Seeds to try: `SIM_SEED=n` replays one, `SIM_TIMES=x` tries that many times as many.
fn seeds(count: u32) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let whole = |number: f64| number.ceil() as u64;
    match number("SIM_SEED").map(whole) {
        Some(seed) => seed..seed + 1,
        None => 0..whole(f64::from(count) * number("SIM_TIMES").unwrap_or(1.0)),
    }
}

/// An MTU for a seed: a common one or any, at least `least`.
fn some_mtu(seed: u64, least: u16) -> u16 {
    let any = least + u16::try_from(mix(seed) % u64::from(9001 - least)).unwrap();
    match mix(seed ^ 9) % 3 {
        0 => [1280, 1400, 1420, 1450, 1492, 1500, 4352, 8942, 9000][(mix(seed ^ 7) % 9) as usize],
        1 => any.min(least + any % 400),
        _ => any,
    }
}

/// Whether the path MTU is known and nothing larger is being looked for.
fn is_complete(search: &MtuSearch) -> bool {
    search.known.is_some() && search.occasion != SearchPhase::Search
}

#[test]
fn the_mtu_is_found_to_the_byte_with_and_without_routers_that_speak() {
    for seed in seeds(600) {
        let mtu = some_mtu(seed, 300);
        let wrong = u32::try_from(mix(seed ^ 3) % 10_000).unwrap();
        let complaints = [
            Complaints::None,
            Complaints::True,
            Complaints::Wrong(wrong),
            Complaints::Always(wrong),
            Complaints::Forged(wrong),
        ];
        for complaints in complaints {
            let delay = Duration::from_millis(mix(seed ^ 4) % 300);
            let mut world = World::new(seed, Link { complaints, delay, ..Link::of(mtu) });
            world.run(400);
            assert_eq!(world.values(), [mtu], "seed {seed}, {complaints:?}: {:?}", world.seen);
            // Lies about what passes make it look again and again; they change nothing.
            let is_misled = matches!(complaints, Complaints::Always(_));
            assert!(is_misled || is_complete(&world.search), "seed {seed}, {complaints:?}");
        }
    }
}

#[test]
fn random_loss_of_a_fifth_changes_nothing() {
    for seed in seeds(300) {
        let mtu = some_mtu(seed, 300);
        let complaints = if seed % 2 == 0 { Complaints::None } else { Complaints::True };
        // 10.6 % each way.
        let mut world = World::new(seed, Link { complaints, loss: 0.106, ..Link::of(mtu) });
        world.run(3 * 3_600);
        assert_eq!(world.values(), [mtu], "seed {seed}: {:?}", world.seen.changes);
    }
}

#[test]
fn a_router_that_speaks_the_truth_saves_the_waiting() {
    let took = |complaints| {
        let mut world = World::with(5, Link { complaints, ..Link::of(1437) }, true, false);
        world.run(600);
        let began = phase(&world);
        assert_eq!(world.values(), [1437]);
        (world.seen.changes[0].0.since(began), world.seen)
    };
    let (silent, _) = took(Complaints::None);
    let (honest, seen) = took(Complaints::True);
    assert!(silent > Duration::from_secs(30) && honest < Duration::from_secs(1), "{silent:?}, {honest:?}");
    assert_eq!(&seen.sizes[..4], [1200, 9000, 1437, 1438]);
    assert_eq!(seen.lost, 0);
}

/// When a world's search began.
fn phase(world: &World) -> Timestamp {
    Timestamp::from_nanos(1_000_000 * MS) + Duration::from_nanos(mix(world.seed) % (60_000 * MS))
}

#[test]
fn complaints_that_quote_nothing_of_ours_are_ignored() {
    for seed in seeds(100) {
        let sizes = |complaints| {
            let mut world = World::new(seed, Link { complaints, ..Link::of(some_mtu(seed, 300)) });
            world.run(300);
            std::mem::take(&mut world.seen.sizes)
        };
        assert_eq!(sizes(Complaints::Forged(1300)), sizes(Complaints::None), "seed {seed}");
    }
}

#[test]
fn what_our_own_interface_refuses_costs_no_probe() {
    for seed in seeds(100) {
        let host = some_mtu(seed, 300);
        let mut world = World::new(seed, Link { host, ..Link::of(u16::MAX) });
        world.run(61);
        assert_eq!(world.values(), [host], "seed {seed}");
        assert_eq!(world.seen.lost, 0, "seed {seed}");
        assert_eq!(world.seen.too_big, world.seen.refused, "seed {seed}");
    }
}

#[test]
fn nothing_is_concluded_from_a_dead_path() {
    for seed in seeds(100) {
        let mtu = some_mtu(seed, 300);
        let mut late = World::new(seed, Link { dead: 0..3_600, ..Link::of(mtu) });
        late.run(3_600);
        assert_eq!((late.values(), late.search.known()), (vec![], None), "seed {seed}");
        assert!(late.seen.sent < 800, "seed {seed}: {}", late.seen.sent);
        late.run(600);
        assert_eq!(late.values(), [mtu], "seed {seed}: it is found once there is somebody");

        let mut gone = World::new(seed, Link { dead: 600..4_200, ..Link::of(mtu) });
        gone.run(6_000);
        assert_eq!(gone.values(), [mtu], "seed {seed}: what is known stays");
    }
}

#[test]
fn outages_of_seconds_do_not_shrink_it() {
    for seed in seeds(300) {
        let from = 300 + mix(seed ^ 5) % 120;
        let dead = from..from + 1 + mix(seed ^ 6) % 12;
        let mut world = World::new(seed, Link { dead, ..Link::of(1500) });
        world.run(1_200);
        assert_eq!(world.values(), [1500], "seed {seed}");
    }
}

#[test]
fn a_change_is_found_downwards_within_two_intervals_and_upwards_when_larger_sizes_are_tried() {
    for seed in seeds(200) {
        let complaints = if seed % 2 == 0 { Complaints::None } else { Complaints::True };
        let (wide, narrow) = (some_mtu(seed, 2_000).max(1_400), 300 + (mix(seed ^ 8) % 1_000) as u16);
        let mtu = vec![(0, wide), (1_000, narrow), (3_000, wide)];
        let mut world = World::new(seed, Link { complaints, mtu, ..Link::of(0) });
        world.run(1_000 + 75 + 180);
        assert_eq!(world.values(), [wide, narrow], "seed {seed}");
        world.run(3_000 - 1_255 + 75 + 600 + 180);
        assert_eq!(world.values(), [wide, narrow, wide], "seed {seed}");
        let from: Vec<_> = world.seen.changes.iter().map(|(_, from, _)| *from).collect();
        assert_eq!(from, [None, Some(wide), Some(narrow)]);
    }
}

#[test]
fn a_brief_reply_tests_the_way_there_and_an_older_agents_both_ways() {
    for seed in seeds(50) {
        let (there, back) = (some_mtu(seed, 300), some_mtu(seed ^ 77, 300));
        let mut new = World::with(seed, Link { back, ..Link::of(there) }, seed % 2 == 0, seed % 3 == 0);
        new.run(600);
        assert_eq!(new.values(), [there], "seed {seed}");
        let mut old = World::with(seed, Link { back, is_old: true, ..Link::of(there) }, seed % 2 == 0, false);
        old.run(600);
        assert_eq!(old.values(), [there.min(back)], "seed {seed}");
    }
}

#[test]
fn a_replaced_search_confirms_what_the_last_one_found() {
    for (known, mtu, values) in [(1437, 1437, vec![]), (1437, 1300, vec![1300]), (1437, 1500, vec![1500])] {
        let mut world = World::with(1, Link::of(mtu), true, true);
        let spec = MtuSpec { known: Some(known), ..world.search.spec.clone() };
        world.search = MtuSearch::new(spec, world.at);
        assert_eq!(world.search.known(), Some(known));
        assert!(is_complete(&world.search));
        world.run(600);
        assert_eq!(world.values(), values, "{known} where it is {mtu}");
        assert!(world.seen.changes.iter().all(|(_, from, _)| *from == Some(known)));
    }
    let world = World::with(1, Link::of(1500), true, true);
    let spec = MtuSpec { known: Some(9000), ceiling: 1500, ..world.search.spec.clone() };
    assert_eq!(MtuSearch::new(spec, world.at).known(), Some(1500), "a lower ceiling passes too");
}

#[test]
fn an_answer_that_comes_late_is_still_proof() {
    for seed in seeds(50) {
        // Longer than a probe is waited for: nothing is answered in time.
        let delay = Duration::from_millis(1_600);
        let mut world = World::new(seed, Link { delay, ..Link::of(u16::MAX) });
        world.run(600);
        assert_eq!(world.seen.acknowledged, 0, "seed {seed}");
        assert_eq!(world.values(), [9000], "seed {seed}: there is nothing larger to be refused");
    }
}

#[test]
fn a_search_that_is_stopped_is_finished() {
    let mut world = World::new(1, Link::of(1500));
    world.run(61);
    world.search.stop();
    let step = world.search.step(world.now(), &mut HostDrops::default(), &mut Vec::new());
    assert_eq!(step, Step::Finished);
}

#[test]
fn searches_do_not_begin_together() {
    let begins = |seed| phase(&World::new(seed, Link::of(1500))).as_nanos() / (6_000 * MS);
    let tenths: std::collections::BTreeSet<u64> = (0..100).map(begins).collect();
    assert!(tenths.len() >= 9, "{tenths:?}");
}

/// A search on a path of IPv4, by hand. It has 1500 bytes to confirm first.
struct Hand {
    search: MtuSearch,
    at: Timestamp,
    reports: Vec<MtuReport>,
}

/// What a search does next.
#[derive(Debug, PartialEq)]
enum Next {
    Probe(SendId, u16, Vec<u8>),
    Wait(Timestamp),
}

impl Next {
    fn probe(self) -> (SendId, u16, Vec<u8>) {
        let Self::Probe(id, size, bytes) = self else { panic!("{self:?}") };
        (id, size, bytes)
    }
}

/// The shortest probe on that path: headers, base packet, session record, class of service, follow-up.
const SMALL: u16 = 28 + 44 + 56 + 8 + 20;

impl Hand {
    fn new(change: impl FnOnce(&mut MtuSpec)) -> Self {
        let mut spec =
            MtuSpec { known: Some(1500), ..World::with(3, Link::of(1500), true, false).search.spec };
        change(&mut spec);
        let at = Timestamp::from_nanos(1_000_000 * MS);
        Self { search: MtuSearch::new(spec, at), at, reports: Vec::new() }
    }

    /// Steps, and waits where it waits for its turn, until a probe is sent or an answer is waited for.
    fn next(&mut self) -> Next {
        loop {
            let epoch = WallTime::from_nanos(1_767_225_600_000_000_000);
            let wall = WallOffset::between(Timestamp::from_nanos(0), epoch);
            let now = Now { at: self.at, drained: self.at, wall };
            let mut arena = Vec::new();
            match self.search.step(now, &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    let size = u16::try_from(arena.len()).unwrap() + 28;
                    self.search.sent(send.id, self.at, TimestampSource::User);
                    return Next::Probe(send.id, size, arena);
                }
                Step::Report(report) => self.reports.push(report),
                Step::Wait(until) if self.search.flight.is_some() => return Next::Wait(until),
                Step::Wait(until) => self.at = until,
                Step::Finished => panic!("it is not stopped"),
            }
        }
    }

    fn arrival(&self) -> Arrival {
        let (from, to) = (self.search.spec.to, None);
        let (at, by) = (self.at, TimestampSource::Kernel);
        Arrival { at, by, from, to, flow: 0, ttl: None, tos: None, icmp: None }
    }

    /// A reply as the responder would write it, with what `change` makes of it.
    fn reply(&mut self, request: &[u8], change: impl FnOnce(&mut stamp::Reply)) {
        let asked = Request::decode(request, Mode::Open).unwrap();
        let mut reply = stamp::Reply {
            sequence: 0,
            timestamp: NtpTime(1 << 40),
            error: 1,
            ssid: asked.ssid,
            received: NtpTime(1 << 40),
            sender_sequence: asked.sequence,
            sender_timestamp: asked.timestamp,
            sender_error: asked.error,
            sender_ttl: 250,
        };
        change(&mut reply);
        let mut bytes = vec![0; 44];
        reply.write(Mode::Open, &mut bytes);
        self.search.received(&bytes, &self.arrival());
    }

    fn complaint(&mut self, quoted: &[u8], kind: IcmpKind, mtu: Option<u32>) {
        let icmp = Some(IcmpError { router: [192, 0, 2, 9].into(), kind, mtu });
        self.search.received(quoted, &Arrival { icmp, ..self.arrival() });
    }

    fn wait(&mut self, span: Duration) -> &mut Self {
        self.at = self.at + span;
        self
    }

    /// Loses so many probes, and returns their sizes.
    fn lose(&mut self, count: usize) -> Vec<u16> {
        let mut sizes = Vec::new();
        for _ in 0..count {
            sizes.push(self.next().probe().1);
            let Next::Wait(until) = self.next() else { panic!("one probe at a time") };
            self.at = until;
        }
        sizes
    }

    fn reported(&mut self, report: MtuReport) -> usize {
        self.reports.iter().filter(|found| **found == report).count()
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn probe_is_lost_when_its_time_is_over_and_not_before() {
    let mut hand = Hand::new(|_| ());
    let sent = hand.at;
    assert!(matches!(hand.next(), Next::Probe(_, 1500, _)));
    let begun = hand.at;
    assert!(begun > sent);
    assert_eq!(
        hand.next(),
        Next::Wait(begun + 3 * SECOND),
        "as long as an echo while no round trip is known"
    );
    hand.at = begun + (3 * SECOND - Duration::from_nanos(1));
    assert!(matches!(hand.next(), Next::Wait(_)));
    assert_eq!(hand.reported(MtuReport::Lost), 0);
    hand.at = begun + 3 * SECOND;
    assert!(matches!(hand.next(), Next::Probe(_, 1500, _)));
    assert_eq!(hand.reported(MtuReport::Lost), 1);
}

#[test]
fn answer_is_waited_for_four_round_trips_at_least_a_second_and_no_longer_than_an_echo() {
    for (rtt, patience) in [(10, 1_000), (250, 1_000), (300, 1_200), (749, 2_996), (800, 3_000)] {
        let mut hand = Hand::new(|_| ());
        let (_, _, request) = hand.next().probe();
        hand.wait(Duration::from_millis(rtt)).reply(&request, |_| ());
        // The next one, of 1501 bytes: larger sizes have their turn at once.
        let (_, size, _) = hand.next().probe();
        assert_eq!((size, hand.reported(MtuReport::Acknowledged)), (1501, 1));
        let until = hand.at + Duration::from_millis(patience);
        assert_eq!(hand.next(), Next::Wait(until), "after {rtt} ms");
    }
}

#[test]
fn long_round_trip_is_forgotten_by_an_eighth_with_each_answer() {
    let mut hand = Hand::new(|spec| spec.known = None);
    let mut rtts = Vec::new();
    for rtt in [800, 100, 100, 640] {
        let (_, _, request) = hand.next().probe();
        hand.wait(Duration::from_millis(rtt)).reply(&request, |_| ());
        rtts.push(hand.search.rtt.unwrap().as_micros());
    }
    assert_eq!(rtts, [800_000, 700_000, 612_500, 640_000]);
}

#[test]
fn probe_counts_from_when_the_kernel_says_that_it_left() {
    let mut hand = Hand::new(|_| ());
    let (id, _, request) = hand.next().probe();
    let left = hand.at + Duration::from_millis(5);
    hand.search.sent(SendId(99), left + SECOND, TimestampSource::Kernel);
    hand.search.sent(id, left, TimestampSource::Kernel);
    assert_eq!(hand.next(), Next::Wait(left + 3 * SECOND));
    assert_eq!((hand.reported(MtuReport::Sent), hand.search.left), (1, 1), "it left once");
    hand.wait(Duration::from_millis(400)).reply(&request, |_| ());
    assert_eq!(hand.search.rtt, Some(Duration::from_millis(395)));
}

#[test]
fn reply_that_fits_no_probe_proves_nothing() {
    let mut hand = Hand::new(|_| ());
    let (_, _, request) = hand.next().probe();
    hand.reply(&request, |reply| reply.ssid = 8);
    hand.reply(&request, |reply| reply.sender_sequence += 1);
    hand.reply(&request, |reply| reply.sender_timestamp.0 ^= 1);
    assert!(matches!(hand.next(), Next::Wait(_)));
    assert!(!hand.search.has_asked(&request[..20]));
    assert_eq!(hand.reported(MtuReport::Acknowledged), 0);
    assert_eq!(hand.search.rtt, None);
    // A reflector that knows no session identifiers.
    hand.reply(&request, |reply| reply.ssid = 0);
    assert!(matches!(hand.next(), Next::Probe(_, 1501, _)));
    assert_eq!(hand.reported(MtuReport::Acknowledged), 1);
}

#[test]
fn reply_to_an_earlier_probe_proves_its_size_and_the_later_one_is_still_waited_for() {
    let mut hand = Hand::new(|_| ());
    let (_, size, first) = hand.next().probe();
    let Next::Wait(until) = hand.next() else { panic!("one at a time") };
    hand.at = until;
    let (_, again, second) = hand.next().probe();
    assert_eq!((size, again), (1500, 1500));
    hand.reply(&first, |_| ());
    assert_eq!(hand.reported(MtuReport::Acknowledged), 0);
    assert!(matches!(hand.next(), Next::Wait(_)));
    hand.reply(&second, |_| ());
    assert!(matches!(hand.next(), Next::Probe(_, 1501, _)), "it passes");
    assert_eq!((hand.reported(MtuReport::Acknowledged), hand.reported(MtuReport::Lost)), (1, 1));
}

#[test]
fn only_too_big_is_evidence_and_only_about_the_probe_that_is_waited_for() {
    let others =
        [IcmpKind::Unreachable, IcmpKind::Prohibited, IcmpKind::PortUnreachable, IcmpKind::TtlExceeded];
    for kind in others {
        let mut hand = Hand::new(|_| ());
        let (_, _, request) = hand.next().probe();
        hand.complaint(&request, kind, Some(1400));
        assert!(matches!(hand.next(), Next::Wait(_)), "{kind:?}");
        assert_eq!(hand.reported(MtuReport::TooBig), 0, "{kind:?}");
    }
    let mut hand = Hand::new(|_| ());
    let (_, _, request) = hand.next().probe();
    let mut other = request.clone();
    other[15] ^= 1;
    hand.complaint(&other, IcmpKind::TooBig, Some(1400));
    assert!(matches!(hand.next(), Next::Wait(_)), "of another session");
    hand.complaint(&request, IcmpKind::TooBig, None);
    let (_, size, _) = hand.next().probe();
    assert_eq!((size, hand.reported(MtuReport::TooBig)), (1500, 1), "one of the three probes of that size");
    hand.complaint(&request, IcmpKind::TooBig, None);
    assert!(matches!(hand.next(), Next::Wait(_)), "that one is decided");
    assert_eq!(hand.reported(MtuReport::TooBig), 1);
    hand.complaint(&request, IcmpKind::TooBig, Some(1400));
    assert_eq!(hand.reported(MtuReport::TooBig), 1);
    assert!(hand.search.trial.is_none(), "the hint is taken all the same");
}

#[test]
fn complaint_about_the_shortest_probe_is_not_believed() {
    let mut hand = Hand::new(|_| ());
    assert_eq!(hand.lose(3), [1500; 3]);
    let (_, size, request) = hand.next().probe();
    assert_eq!(size, SMALL);
    hand.complaint(&request, IcmpKind::TooBig, Some(100));
    assert!(matches!(hand.next(), Next::Wait(_)));
    assert_eq!(hand.reported(MtuReport::TooBig), 0);
}

#[test]
fn size_is_refused_after_three_rounds_of_three_probes_and_an_answer_to_a_short_one() {
    let mut hand = Hand::new(|_| ());
    for round in 1..=3 {
        assert_eq!(hand.lose(3), [1500; 3], "round {round}");
        // Two of the short ones may be lost as well.
        assert_eq!(hand.lose(2), [SMALL; 2]);
        let (_, size, request) = hand.next().probe();
        assert_eq!(size, SMALL);
        hand.wait(Duration::from_millis(10)).reply(&request, |_| ());
    }
    let (_, size, _) = hand.next().probe();
    assert_eq!(size, 1450, "it looks for a smaller one");
    let passes = |size| hand.search.bracket.has_passed(size);
    let SizeLimits { small, base, .. } = hand.search.limits;
    assert!(passes(small) && !passes(base), "something passes, the base is not known to");
    assert_eq!(hand.search.known(), Some(1500), "until another one is found");
}

#[test]
fn path_on_which_no_short_probe_is_answered_is_tried_again_and_nothing_is_concluded() {
    let mut hand = Hand::new(|_| ());
    hand.lose(3);
    assert_eq!(hand.lose(2), [SMALL; 2]);
    let (_, size, _) = hand.next().probe();
    let Next::Wait(until) = hand.next() else { panic!("one at a time") };
    hand.at = until;
    let given_up = hand.at;
    assert_eq!((size, hand.next().probe().1), (SMALL, 1500));
    let paused = hand.at.since(given_up).as_millis();
    assert!((7_500..=12_500).contains(&paused), "{paused} ms");
    assert!(hand.search.known() == Some(1500) && is_complete(&hand.search));
}

#[test]
fn answer_to_the_size_ends_its_trial_at_any_turn() {
    let mut hand = Hand::new(|_| ());
    let (_, _, first) = hand.next().probe();
    let Next::Wait(until) = hand.next() else { panic!("one at a time") };
    hand.at = until;
    hand.lose(2);
    assert_eq!(hand.next().probe().1, SMALL);
    hand.reply(&first, |_| ());
    let Next::Wait(until) = hand.next() else { panic!("the short one is waited for") };
    hand.at = until;
    assert_eq!(hand.next().probe().1, 1501, "the size has passed");
}

#[test]
fn send_that_fails_for_another_reason_than_length_concludes_nothing() {
    for why in [NotSent::Unreachable, NotSent::Buffer, NotSent::Permission, NotSent::Other] {
        let mut hand = Hand::new(|_| ());
        let (id, ..) = hand.next().probe();
        let at = hand.at;
        hand.search.not_sent(SendId(99), why);
        assert!(hand.search.flight.is_some(), "another's");
        hand.search.not_sent(id, why);
        assert_eq!(hand.next().probe().1, 1500, "{why:?}");
        let paused = hand.at.since(at).as_millis();
        assert!((7_500..=12_500).contains(&paused), "{why:?}: {paused} ms");
        assert_eq!(hand.reported(MtuReport::TooBig), 0);
    }
}

#[test]
fn host_that_refuses_even_the_shortest_probe_concludes_nothing() {
    let mut hand = Hand::new(|spec| spec.known = Some(SMALL));
    let (id, size, _) = hand.next().probe();
    assert_eq!(size, SMALL);
    let at = hand.at;
    hand.search.not_sent(id, NotSent::TooBig);
    assert_eq!(hand.next().probe().1, SMALL);
    assert!(hand.at.since(at) > 7 * SECOND);
    assert_eq!((hand.reported(MtuReport::TooBig), hand.search.known()), (1, Some(SMALL)));
    assert_eq!(Hand::new(|spec| spec.known = Some(SMALL - 1)).search.known(), None);
}

#[test]
fn mtu_is_confirmed_every_interval_and_larger_sizes_are_tried_every_ten_minutes_or_ten_intervals() {
    for (interval, raise) in [(60, 600), (120, 600), (10, 100)] {
        let mut hand = Hand::new(|spec| {
            spec.interval = Duration::from_secs(interval);
            (spec.known, spec.ceiling) = (None, 2000);
        });
        let (mut confirmed, mut raised): (Vec<Timestamp>, Vec<Timestamp>) = (Vec::new(), Vec::new());
        while hand.at < Timestamp::from_nanos(1_000_000 * MS) + Duration::from_secs(4_000) {
            let (id, size, request) = hand.next().probe();
            if size > 1500 {
                hand.search.not_sent(id, NotSent::TooBig);
                hand.search.left -= 1;
                raised.push(hand.at);
            } else {
                hand.reply(&request, |_| ());
                confirmed.push(hand.at);
            }
        }
        let pauses: Vec<u64> = confirmed.windows(2).map(|w| w[1].since(w[0]).as_secs()).collect();
        let rests: Vec<u64> = pauses.into_iter().filter(|pause| *pause > 0).collect();
        assert!(rests.iter().all(|rest| (interval * 3 / 4..=interval * 5 / 4).contains(rest)), "{rests:?}");
        assert!(rests.iter().any(|rest| *rest > interval) && rests.iter().any(|rest| *rest < interval));
        raised.dedup();
        let raises: Vec<u64> = raised.windows(2).map(|w| w[1].since(w[0]).as_secs()).collect();
        assert!(raises.len() > 2, "{raises:?}");
        assert!(raises.iter().all(|r| (raise..=raise + interval * 5 / 4).contains(r)), "{raises:?}");
    }
}

#[test]
fn late_answer_to_a_larger_size_than_what_was_concluded_begins_a_new_search() {
    let mut hand = Hand::new(|spec| (spec.known, spec.ceiling) = (None, 1500));
    let mut unanswered = None;
    while hand.search.known().is_none() {
        let (id, size, request) = hand.next().probe();
        if size == 1500 {
            unanswered = Some(request);
            let Next::Wait(until) = hand.next() else { panic!("one at a time") };
            hand.at = until;
        } else if size > 1400 {
            hand.search.not_sent(id, NotSent::TooBig);
        } else {
            hand.reply(&request, |_| ());
        }
        if hand.search.flight.is_none() {
            let _ = hand.search.plan(hand.at);
        }
    }
    assert_eq!(hand.search.known(), Some(1400));
    let at = hand.at;
    hand.reply(&unanswered.unwrap(), |_| ());
    hand.next().probe();
    assert_eq!(hand.at, at, "at once");
}

#[test]
fn size_of_a_probe_counts_the_headers_of_its_family() {
    for (to, bytes, base) in
        [(address(true, 2, 862), 1500 - 28, 1200), (address(false, 2, 862), 1500 - 48, 1280)]
    {
        let mut hand = Hand::new(|spec| spec.to = to);
        assert_eq!(hand.next().probe().2.len(), bytes);
        let mut hand = Hand::new(|spec| (spec.to, spec.known) = (to, None));
        assert_eq!(hand.next().probe().2.len(), base - (1500 - bytes), "where a search begins");
    }
}
