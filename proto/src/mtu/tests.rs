//! Searches over simulated links whose MTU is known.
#![expect(clippy::disallowed_methods, reason = "SIM_SEED and SIM_TIMES choose the worlds")]

use std::collections::BTreeMap;

use super::*;
use crate::admission::Policy;
use crate::echo::StampResponder;
use crate::machine::IcmpError;
use crate::time::{WallOffset, WallTime};
use crate::wire::tlv;

/// A path from one prober to one responder and back.
#[derive(Debug, Clone)]
struct Link {
    /// MTU of the forward direction, with the second from which it applies.
    mtu: Vec<(u64, u16)>,
    reverse_mtu: u16,
    /// MTU of the local interface.
    host_mtu: u16,
    router_errors: RouterErrors,
    /// Probability that a datagram is lost, in each direction.
    loss: f64,
    delay: Duration,
    /// Seconds in which all datagrams are lost.
    dead: std::ops::Range<u64>,
    /// Whether the responder is of a version without brief replies.
    is_old: bool,
}

/// ICMP errors of the router before the narrow link.
#[derive(Debug, Clone, Copy, PartialEq)]
enum RouterErrors {
    /// None: a black hole.
    None,
    /// Errors with the correct MTU.
    True,
    /// Errors with a wrong MTU.
    Wrong(u32),
    /// Errors about every packet, whether it passed or not.
    Always(u32),
    /// Errors about packets that were never sent.
    Forged(u32),
}

impl Link {
    fn of(mtu: u16) -> Self {
        Self {
            mtu: vec![(0, mtu)],
            reverse_mtu: u16::MAX,
            host_mtu: u16::MAX,
            router_errors: RouterErrors::None,
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
    RouterError(Vec<u8>, u32),
}

/// Events of a run.
#[derive(Debug, Default)]
struct MtuEvents {
    changes: Vec<(Timestamp, Option<u16>, u16)>,
    sizes: Vec<u16>,
    sent: u64,
    acknowledged: u64,
    lost: u64,
    too_big: u64,
    /// Datagrams that this host refused to send.
    refused: u64,
}

struct TestPath {
    link: Link,
    search: MtuSearch,
    responder: StampResponder,
    events: BTreeMap<(Timestamp, u64), Event>,
    count: u64,
    seed: u64,
    at: Timestamp,
    log: MtuEvents,
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

impl TestPath {
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
            log: MtuEvents::default(),
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

    fn schedule(&mut self, event: Event) {
        self.count += 1;
        self.events.insert((self.at + self.link.delay, self.count), event);
    }

    fn packet(&self, datagram: &[u8]) -> u16 {
        u16::try_from(datagram.len()).unwrap() + headers(self.search.spec.to)
    }

    /// Runs for `seconds` more.
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
                self.deliver(event);
            }
        }
    }

    fn drive(&mut self) -> Timestamp {
        for _ in 0..1_000 {
            let mut arena = Vec::new();
            match self.search.step(self.now(), &mut HostDrops::default(), &mut arena) {
                Step::Send(send) => {
                    assert!(send.dont_fragment && send.flow == 0 && send.to == self.search.spec.to);
                    self.transmit(send.id, arena);
                }
                Step::Report(MtuReport::Sent) => self.log.sent += 1,
                Step::Report(MtuReport::Acknowledged) => self.log.acknowledged += 1,
                Step::Report(MtuReport::Lost) => self.log.lost += 1,
                Step::Report(MtuReport::TooBig) => self.log.too_big += 1,
                Step::Report(MtuReport::Changed { from, to }) => self.log.changes.push((self.at, from, to)),
                Step::Wait(until) => {
                    assert!(until > self.at, "the deadline is in the future");
                    let decided = self.log.acknowledged + self.log.lost + self.log.too_big;
                    let in_flight = u64::from(self.search.pending.is_some());
                    assert_eq!(self.log.sent + self.log.refused, decided + in_flight, "one outcome each");
                    return until;
                }
                Step::Finished => return Timestamp::NEVER,
            }
        }
        panic!("it never waits");
    }

    fn transmit(&mut self, id: SendId, datagram: Vec<u8>) {
        let size = self.packet(&datagram);
        self.log.sizes.push(size);
        if size > self.link.host_mtu {
            self.log.refused += 1;
            self.search.not_sent(id, NotSent::TooBig);
            return;
        }
        self.search.sent(id, self.at, TimestampSource::User);
        if self.link.dead.contains(&second(self.at)) || self.chance(self.link.loss) {
            return;
        }
        let fits = size <= self.mtu();
        let error = match self.link.router_errors {
            RouterErrors::True if !fits => Some((datagram.clone(), u32::from(self.mtu()))),
            RouterErrors::Wrong(mtu) if !fits => Some((datagram.clone(), mtu)),
            RouterErrors::Always(mtu) => Some((datagram.clone(), mtu)),
            RouterErrors::Forged(mtu) => {
                // All bytes are correct except one byte of the timestamp.
                let mut forged = datagram.clone();
                forged[if self.search.spec.keys.is_some() { 23 } else { 11 }] ^= 1;
                Some((forged, mtu))
            }
            RouterErrors::None | RouterErrors::True | RouterErrors::Wrong(_) => None,
        };
        if let Some((quoted, mtu)) = error {
            self.schedule(Event::RouterError(quoted, mtu));
        }
        if fits {
            self.schedule(Event::Request(datagram));
        }
    }

    fn deliver(&mut self, event: Event) {
        let (prober, responder) = (address(self.is_v4(), 1, 40_000), self.search.spec.to);
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
                    // An old responder does not see the flag. The change would invalidate an HMAC, so such
                    // runs are in open mode.
                    request[Mode::Open.base_bytes() + tlv::HEADER_BYTES + 5] = 0;
                }
                let from_prober = arrival(prober, None);
                self.responder.received(&request, &from_prober);
                let mut arena = Vec::new();
                let step = self.responder.step(self.now(), &mut HostDrops::default(), &mut arena);
                assert!(matches!(step, Step::Send(_)), "{step:?}");
                while let Step::Report(_) =
                    self.responder.step(self.now(), &mut HostDrops::default(), &mut arena)
                {}
                if self.packet(&arena) <= self.link.reverse_mtu && !self.chance(self.link.loss) {
                    self.schedule(Event::Reply(arena));
                }
            }
            Event::Reply(reply) => {
                assert!(self.search.owns_reply(&reply));
                let from_responder = arrival(responder, None);
                self.search.received(&reply, &from_responder);
            }
            Event::RouterError(quoted, mtu) => {
                let router = [192, 0, 2, 9].into();
                let icmp = IcmpError {
                    router,
                    kind: IcmpKind::TooBig,
                    code: 0,
                    mtu: Some(mtu),
                    extensions_at: None,
                };
                let about = arrival(responder, Some(icmp));
                // As much as a router quotes: 576 bytes in total.
                self.search.received(&quoted[..quoted.len().min(548)], &about);
            }
        }
    }

    /// The values of the path MTU in order.
    fn values(&self) -> Vec<u16> {
        self.log.changes.iter().map(|(_, _, to)| *to).collect()
    }
}

/// Seeds to try: `SIM_SEED=n` replays one, `SIM_TIMES=x` multiplies their number.
fn seeds(count: u32) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let whole = |number: f64| number.ceil() as u64;
    match number("SIM_SEED").map(whole) {
        Some(seed) => seed..seed + 1,
        None => 0..whole(f64::from(count) * number("SIM_TIMES").unwrap_or(1.0)),
    }
}

/// An MTU for a seed: a common value or any, at least `least`.
fn some_mtu(seed: u64, least: u16) -> u16 {
    let any = least + u16::try_from(mix(seed) % u64::from(9001 - least)).unwrap();
    match mix(seed ^ 9) % 3 {
        0 => [1280, 1400, 1420, 1450, 1492, 1500, 4352, 8942, 9000][(mix(seed ^ 7) % 9) as usize],
        1 => any.min(least + any % 400),
        _ => any,
    }
}

/// Whether the path MTU is known and no search is running.
fn is_complete(search: &MtuSearch) -> bool {
    search.known.is_some() && search.phase != SearchPhase::Search
}

#[test]
fn mtu_is_found_exactly_whatever_routers_report() {
    for seed in seeds(600) {
        let mtu = some_mtu(seed, 300);
        let wrong = u32::try_from(mix(seed ^ 3) % 10_000).unwrap();
        let router_errors = [
            RouterErrors::None,
            RouterErrors::True,
            RouterErrors::Wrong(wrong),
            RouterErrors::Always(wrong),
            RouterErrors::Forged(wrong),
        ];
        for router_errors in router_errors {
            let delay = Duration::from_millis(mix(seed ^ 4) % 300);
            let mut path = TestPath::new(seed, Link { router_errors, delay, ..Link::of(mtu) });
            path.run(400);
            assert_eq!(path.values(), [mtu], "SIM_SEED={seed}, {router_errors:?}: {:?}", path.log);
            // False errors cause repeated searches but change no result.
            let is_misled = matches!(router_errors, RouterErrors::Always(_));
            assert!(is_misled || is_complete(&path.search), "SIM_SEED={seed}, {router_errors:?}");
        }
    }
}

#[test]
fn random_loss_of_20_percent_changes_no_result() {
    for seed in seeds(300) {
        let mtu = some_mtu(seed, 300);
        let router_errors = if seed % 2 == 0 { RouterErrors::None } else { RouterErrors::True };
        // 10.6 % each way.
        let mut path = TestPath::new(seed, Link { router_errors, loss: 0.106, ..Link::of(mtu) });
        path.run(3 * 3_600);
        assert_eq!(path.values(), [mtu], "SIM_SEED={seed}: {:?}", path.log.changes);
    }
}

#[test]
fn correct_router_errors_make_the_search_faster() {
    let took = |router_errors| {
        let mut path = TestPath::with(5, Link { router_errors, ..Link::of(1437) }, true, false);
        path.run(600);
        let began = search_start(&path);
        assert_eq!(path.values(), [1437]);
        (path.log.changes[0].0.since(began), path.log)
    };
    let (silent, _) = took(RouterErrors::None);
    let (honest, log) = took(RouterErrors::True);
    assert!(silent > Duration::from_secs(30) && honest < Duration::from_secs(1), "{silent:?}, {honest:?}");
    assert_eq!(&log.sizes[..4], [1200, 9000, 1437, 1438]);
    assert_eq!(log.lost, 0);
}

/// Time at which a path's search began.
fn search_start(path: &TestPath) -> Timestamp {
    Timestamp::from_nanos(1_000_000 * MS) + Duration::from_nanos(mix(path.seed) % (60_000 * MS))
}

#[test]
fn router_errors_that_quote_no_probe_are_ignored() {
    for seed in seeds(100) {
        let sizes = |router_errors| {
            let mut path = TestPath::new(seed, Link { router_errors, ..Link::of(some_mtu(seed, 300)) });
            path.run(300);
            std::mem::take(&mut path.log.sizes)
        };
        assert_eq!(sizes(RouterErrors::Forged(1300)), sizes(RouterErrors::None), "SIM_SEED={seed}");
    }
}

#[test]
fn probe_refused_by_the_local_interface_is_not_lost() {
    for seed in seeds(100) {
        let host_mtu = some_mtu(seed, 300);
        let mut path = TestPath::new(seed, Link { host_mtu, ..Link::of(u16::MAX) });
        path.run(61);
        assert_eq!(path.values(), [host_mtu], "SIM_SEED={seed}");
        assert_eq!(path.log.lost, 0, "SIM_SEED={seed}");
        assert_eq!(path.log.too_big, path.log.refused, "SIM_SEED={seed}");
    }
}

#[test]
fn nothing_is_concluded_on_a_dead_path() {
    for seed in seeds(100) {
        let mtu = some_mtu(seed, 300);
        let mut late = TestPath::new(seed, Link { dead: 0..3_600, ..Link::of(mtu) });
        late.run(3_600);
        assert_eq!((late.values(), late.search.known()), (vec![], None), "SIM_SEED={seed}");
        assert!(late.log.sent < 800, "SIM_SEED={seed}: {}", late.log.sent);
        late.run(600);
        assert_eq!(late.values(), [mtu], "SIM_SEED={seed}: found after recovery");

        let mut gone = TestPath::new(seed, Link { dead: 600..4_200, ..Link::of(mtu) });
        gone.run(6_000);
        assert_eq!(gone.values(), [mtu], "SIM_SEED={seed}: the known value stays");
    }
}

#[test]
fn short_outages_do_not_reduce_the_mtu() {
    for seed in seeds(300) {
        let from = 300 + mix(seed ^ 5) % 120;
        let dead = from..from + 1 + mix(seed ^ 6) % 12;
        let mut path = TestPath::new(seed, Link { dead, ..Link::of(1500) });
        path.run(1_200);
        assert_eq!(path.values(), [1500], "SIM_SEED={seed}");
    }
}

#[test]
fn decrease_is_found_within_two_intervals_and_increase_when_larger_sizes_are_tried() {
    for seed in seeds(200) {
        let router_errors = if seed % 2 == 0 { RouterErrors::None } else { RouterErrors::True };
        let (wide, narrow) = (some_mtu(seed, 2_000).max(1_400), 300 + (mix(seed ^ 8) % 1_000) as u16);
        let mtu = vec![(0, wide), (1_000, narrow), (3_000, wide)];
        let mut path = TestPath::new(seed, Link { router_errors, mtu, ..Link::of(0) });
        path.run(1_000 + 75 + 180);
        assert_eq!(path.values(), [wide, narrow], "SIM_SEED={seed}");
        path.run(3_000 - 1_255 + 75 + 600 + 180);
        assert_eq!(path.values(), [wide, narrow, wide], "SIM_SEED={seed}");
        let from: Vec<_> = path.log.changes.iter().map(|(_, from, _)| *from).collect();
        assert_eq!(from, [None, Some(wide), Some(narrow)]);
    }
}

#[test]
fn brief_replies_test_the_forward_direction_and_full_replies_both() {
    for seed in seeds(50) {
        let (forward_mtu, reverse_mtu) = (some_mtu(seed, 300), some_mtu(seed ^ 77, 300));
        let mut new =
            TestPath::with(seed, Link { reverse_mtu, ..Link::of(forward_mtu) }, seed % 2 == 0, seed % 3 == 0);
        new.run(600);
        assert_eq!(new.values(), [forward_mtu], "SIM_SEED={seed}");
        let mut old = TestPath::with(
            seed,
            Link { reverse_mtu, is_old: true, ..Link::of(forward_mtu) },
            seed % 2 == 0,
            false,
        );
        old.run(600);
        assert_eq!(old.values(), [forward_mtu.min(reverse_mtu)], "SIM_SEED={seed}");
    }
}

#[test]
fn new_search_confirms_the_result_of_the_previous_one() {
    for (known, mtu, values) in [(1437, 1437, vec![]), (1437, 1300, vec![1300]), (1437, 1500, vec![1500])] {
        let mut path = TestPath::with(1, Link::of(mtu), true, true);
        let spec = MtuSpec { known: Some(known), ..path.search.spec.clone() };
        path.search = MtuSearch::new(spec, path.at);
        assert_eq!(path.search.known(), Some(known));
        assert!(is_complete(&path.search));
        path.run(600);
        assert_eq!(path.values(), values, "{known} where it is {mtu}");
        assert!(path.log.changes.iter().all(|(_, from, _)| *from == Some(known)));
    }
    let path = TestPath::with(1, Link::of(1500), true, true);
    let spec = MtuSpec { known: Some(9000), ceiling: 1500, ..path.search.spec.clone() };
    assert_eq!(MtuSearch::new(spec, path.at).known(), Some(1500), "a lower ceiling passes too");
}

#[test]
fn late_answer_is_proof() {
    for seed in seeds(50) {
        // Longer than the timeout of a probe: no answer is in time.
        let delay = Duration::from_millis(1_600);
        let mut path = TestPath::new(seed, Link { delay, ..Link::of(u16::MAX) });
        path.run(600);
        assert_eq!(path.log.acknowledged, 0, "SIM_SEED={seed}");
        assert_eq!(path.values(), [9000], "SIM_SEED={seed}: no larger size can be rejected");
    }
}

#[test]
fn stopped_search_finishes() {
    let mut path = TestPath::new(1, Link::of(1500));
    path.run(61);
    path.search.stop();
    let step = path.search.step(path.now(), &mut HostDrops::default(), &mut Vec::new());
    assert_eq!(step, Step::Finished);
}

#[test]
fn searches_begin_at_different_times() {
    let begins = |seed| search_start(&TestPath::new(seed, Link::of(1500))).as_nanos() / (6_000 * MS);
    let tenths: std::collections::BTreeSet<u64> = (0..100).map(begins).collect();
    assert!(tenths.len() >= 9, "{tenths:?}");
}

/// A search on an IPv4 path, driven by test. It has 1500 bytes to confirm first.
struct TestSearch {
    search: MtuSearch,
    at: Timestamp,
    reports: Vec<MtuReport>,
}

/// The next step of a search.
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

impl TestSearch {
    fn new(change: impl FnOnce(&mut MtuSpec)) -> Self {
        let mut spec =
            MtuSpec { known: Some(1500), ..TestPath::with(3, Link::of(1500), true, false).search.spec };
        change(&mut spec);
        let at = Timestamp::from_nanos(1_000_000 * MS);
        Self { search: MtuSearch::new(spec, at), at, reports: Vec::new() }
    }

    /// Steps until a probe is sent or an answer is awaited; pauses are skipped.
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
                Step::Wait(until) if self.search.pending.is_some() => return Next::Wait(until),
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

    /// Delivers the responder's reply, modified by `change`.
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

    fn router_error(&mut self, quoted: &[u8], kind: IcmpKind, mtu: Option<u32>) {
        let icmp = Some(IcmpError { router: [192, 0, 2, 9].into(), kind, code: 0, mtu, extensions_at: None });
        self.search.received(quoted, &Arrival { icmp, ..self.arrival() });
    }

    fn wait(&mut self, span: Duration) -> &mut Self {
        self.at = self.at + span;
        self
    }

    /// Loses `count` probes and returns their sizes.
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
fn probe_is_lost_at_its_deadline_and_not_before() {
    let mut test = TestSearch::new(|_| ());
    let sent = test.at;
    assert!(matches!(test.next(), Next::Probe(_, 1500, _)));
    let begun = test.at;
    assert!(begun > sent);
    assert_eq!(test.next(), Next::Wait(begun + 3 * SECOND), "lost_after, while no round trip is known");
    test.at = begun + (3 * SECOND - Duration::from_nanos(1));
    assert!(matches!(test.next(), Next::Wait(_)));
    assert_eq!(test.reported(MtuReport::Lost), 0);
    test.at = begun + 3 * SECOND;
    assert!(matches!(test.next(), Next::Probe(_, 1500, _)));
    assert_eq!(test.reported(MtuReport::Lost), 1);
}

#[test]
fn probe_timeout_is_four_round_trips_within_one_second_and_lost_after() {
    for (rtt, timeout) in [(10, 1_000), (250, 1_000), (300, 1_200), (749, 2_996), (800, 3_000)] {
        let mut test = TestSearch::new(|_| ());
        let (_, _, request) = test.next().probe();
        test.wait(Duration::from_millis(rtt)).reply(&request, |_| ());
        // The next probe has 1501 bytes: larger sizes are tried at once.
        let (_, size, _) = test.next().probe();
        assert_eq!((size, test.reported(MtuReport::Acknowledged)), (1501, 1));
        let until = test.at + Duration::from_millis(timeout);
        assert_eq!(test.next(), Next::Wait(until), "after {rtt} ms");
    }
}

#[test]
fn longest_round_trip_decays_by_an_eighth_with_each_answer() {
    let mut test = TestSearch::new(|spec| spec.known = None);
    let mut rtts = Vec::new();
    for rtt in [800, 100, 100, 640] {
        let (_, _, request) = test.next().probe();
        test.wait(Duration::from_millis(rtt)).reply(&request, |_| ());
        rtts.push(test.search.rtt.unwrap().as_micros());
    }
    assert_eq!(rtts, [800_000, 700_000, 612_500, 640_000]);
}

#[test]
fn probe_timeout_starts_at_the_kernel_timestamp() {
    let mut test = TestSearch::new(|_| ());
    let (id, _, request) = test.next().probe();
    let left = test.at + Duration::from_millis(5);
    test.search.sent(SendId(99), left + SECOND, TimestampSource::Kernel);
    test.search.sent(id, left, TimestampSource::Kernel);
    assert_eq!(test.next(), Next::Wait(left + 3 * SECOND));
    assert_eq!((test.reported(MtuReport::Sent), test.search.sent_count), (1, 1), "it was sent once");
    test.wait(Duration::from_millis(400)).reply(&request, |_| ());
    assert_eq!(test.search.rtt, Some(Duration::from_millis(395)));
}

#[test]
fn reply_that_matches_no_probe_proves_nothing() {
    let mut test = TestSearch::new(|_| ());
    let (_, _, request) = test.next().probe();
    test.reply(&request, |reply| reply.ssid = 8);
    test.reply(&request, |reply| reply.sender_sequence += 1);
    test.reply(&request, |reply| reply.sender_timestamp.0 ^= 1);
    assert!(matches!(test.next(), Next::Wait(_)));
    assert!(!test.search.owns_reply(&request[..20]));
    assert_eq!(test.reported(MtuReport::Acknowledged), 0);
    assert_eq!(test.search.rtt, None);
    // A reflector without support for session identifiers.
    test.reply(&request, |reply| reply.ssid = 0);
    assert!(matches!(test.next(), Next::Probe(_, 1501, _)));
    assert_eq!(test.reported(MtuReport::Acknowledged), 1);
}

#[test]
fn reply_to_an_earlier_probe_proves_its_size_and_does_not_decide_the_later_one() {
    let mut test = TestSearch::new(|_| ());
    let (_, size, first) = test.next().probe();
    let Next::Wait(until) = test.next() else { panic!("one at a time") };
    test.at = until;
    let (_, again, second) = test.next().probe();
    assert_eq!((size, again), (1500, 1500));
    test.reply(&first, |_| ());
    assert_eq!(test.reported(MtuReport::Acknowledged), 0);
    assert!(matches!(test.next(), Next::Wait(_)));
    test.reply(&second, |_| ());
    assert!(matches!(test.next(), Next::Probe(_, 1501, _)), "it passes");
    assert_eq!((test.reported(MtuReport::Acknowledged), test.reported(MtuReport::Lost)), (1, 1));
}

#[test]
fn only_too_big_errors_about_the_probe_in_flight_count() {
    let others =
        [IcmpKind::Unreachable, IcmpKind::Prohibited, IcmpKind::PortUnreachable, IcmpKind::TtlExceeded];
    for kind in others {
        let mut test = TestSearch::new(|_| ());
        let (_, _, request) = test.next().probe();
        test.router_error(&request, kind, Some(1400));
        assert!(matches!(test.next(), Next::Wait(_)), "{kind:?}");
        assert_eq!(test.reported(MtuReport::TooBig), 0, "{kind:?}");
    }
    let mut test = TestSearch::new(|_| ());
    let (_, _, request) = test.next().probe();
    let mut other = request.clone();
    other[15] ^= 1;
    test.router_error(&other, IcmpKind::TooBig, Some(1400));
    assert!(matches!(test.next(), Next::Wait(_)), "of another session");
    test.router_error(&request, IcmpKind::TooBig, None);
    let (_, size, _) = test.next().probe();
    assert_eq!((size, test.reported(MtuReport::TooBig)), (1500, 1), "one of the three probes of that size");
    test.router_error(&request, IcmpKind::TooBig, None);
    assert!(matches!(test.next(), Next::Wait(_)), "that one is decided");
    assert_eq!(test.reported(MtuReport::TooBig), 1);
    test.router_error(&request, IcmpKind::TooBig, Some(1400));
    assert_eq!(test.reported(MtuReport::TooBig), 1);
    assert!(test.search.trial.is_none(), "the hint is used nevertheless");
}

#[test]
fn router_error_about_the_shortest_probe_is_ignored() {
    let mut test = TestSearch::new(|_| ());
    assert_eq!(test.lose(3), [1500; 3]);
    let (_, size, request) = test.next().probe();
    assert_eq!(size, SMALL);
    test.router_error(&request, IcmpKind::TooBig, Some(100));
    assert!(matches!(test.next(), Next::Wait(_)));
    assert_eq!(test.reported(MtuReport::TooBig), 0);
}

#[test]
fn size_is_rejected_after_three_rounds_of_lost_probes_and_an_answered_short_one() {
    let mut test = TestSearch::new(|_| ());
    for round in 1..=3 {
        assert_eq!(test.lose(3), [1500; 3], "round {round}");
        // Two of the short probes may be lost as well.
        assert_eq!(test.lose(2), [SMALL; 2]);
        let (_, size, request) = test.next().probe();
        assert_eq!(size, SMALL);
        test.wait(Duration::from_millis(10)).reply(&request, |_| ());
    }
    let (_, size, _) = test.next().probe();
    assert_eq!(size, 1450, "a smaller size is tried");
    let passes = |size| test.search.bracket.has_passed(size);
    let SizeLimits { small, base, .. } = test.search.limits;
    assert!(passes(small) && !passes(base), "the shortest probe passes, the base is unknown");
    assert_eq!(test.search.known(), Some(1500), "until another value is found");
}

#[test]
fn search_without_answered_short_probes_is_repeated_without_conclusion() {
    let mut test = TestSearch::new(|_| ());
    test.lose(3);
    assert_eq!(test.lose(2), [SMALL; 2]);
    let (_, size, _) = test.next().probe();
    let Next::Wait(until) = test.next() else { panic!("one at a time") };
    test.at = until;
    let given_up = test.at;
    assert_eq!((size, test.next().probe().1), (SMALL, 1500));
    let paused = test.at.since(given_up).as_millis();
    assert!((7_500..=12_500).contains(&paused), "{paused} ms");
    assert!(test.search.known() == Some(1500) && is_complete(&test.search));
}

#[test]
fn answer_to_the_size_ends_its_trial_at_any_stage() {
    let mut test = TestSearch::new(|_| ());
    let (_, _, first) = test.next().probe();
    let Next::Wait(until) = test.next() else { panic!("one at a time") };
    test.at = until;
    test.lose(2);
    assert_eq!(test.next().probe().1, SMALL);
    test.reply(&first, |_| ());
    let Next::Wait(until) = test.next() else { panic!("the short probe is in flight") };
    test.at = until;
    assert_eq!(test.next().probe().1, 1501, "the size has passed");
}

#[test]
fn send_error_other_than_length_concludes_nothing() {
    for why in [NotSent::Unreachable, NotSent::Buffer, NotSent::Permission, NotSent::Other] {
        let mut test = TestSearch::new(|_| ());
        let (id, ..) = test.next().probe();
        let at = test.at;
        test.search.not_sent(SendId(99), why);
        assert!(test.search.pending.is_some(), "the probe in flight has another id");
        test.search.not_sent(id, why);
        assert_eq!(test.next().probe().1, 1500, "{why:?}");
        let paused = test.at.since(at).as_millis();
        assert!((7_500..=12_500).contains(&paused), "{why:?}: {paused} ms");
        assert_eq!(test.reported(MtuReport::TooBig), 0);
    }
}

#[test]
fn refused_shortest_probe_concludes_nothing() {
    let mut test = TestSearch::new(|spec| spec.known = Some(SMALL));
    let (id, size, _) = test.next().probe();
    assert_eq!(size, SMALL);
    let at = test.at;
    test.search.not_sent(id, NotSent::TooBig);
    assert_eq!(test.next().probe().1, SMALL);
    assert!(test.at.since(at) > 7 * SECOND);
    assert_eq!((test.reported(MtuReport::TooBig), test.search.known()), (1, Some(SMALL)));
    assert_eq!(TestSearch::new(|spec| spec.known = Some(SMALL - 1)).search.known(), None);
}

#[test]
fn mtu_is_confirmed_every_interval_and_raised_every_ten_minutes_or_ten_intervals() {
    for (interval, raise) in [(60, 600), (120, 600), (10, 100)] {
        let mut test = TestSearch::new(|spec| {
            spec.interval = Duration::from_secs(interval);
            (spec.known, spec.ceiling) = (None, 2000);
        });
        let (mut confirmed, mut raised): (Vec<Timestamp>, Vec<Timestamp>) = (Vec::new(), Vec::new());
        while test.at < Timestamp::from_nanos(1_000_000 * MS) + Duration::from_secs(4_000) {
            let (id, size, request) = test.next().probe();
            if size > 1500 {
                test.search.not_sent(id, NotSent::TooBig);
                test.search.sent_count -= 1;
                raised.push(test.at);
            } else {
                test.reply(&request, |_| ());
                confirmed.push(test.at);
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
fn late_answer_to_a_larger_size_starts_a_new_search() {
    let mut test = TestSearch::new(|spec| (spec.known, spec.ceiling) = (None, 1500));
    let mut unanswered = None;
    while test.search.known().is_none() {
        let (id, size, request) = test.next().probe();
        if size == 1500 {
            unanswered = Some(request);
            let Next::Wait(until) = test.next() else { panic!("one at a time") };
            test.at = until;
        } else if size > 1400 {
            test.search.not_sent(id, NotSent::TooBig);
        } else {
            test.reply(&request, |_| ());
        }
        if test.search.pending.is_none() {
            let _ = test.search.plan(test.at);
        }
    }
    assert_eq!(test.search.known(), Some(1400));
    let at = test.at;
    test.reply(&unanswered.unwrap(), |_| ());
    test.next().probe();
    assert_eq!(test.at, at, "at once");
}

#[test]
fn size_of_a_probe_includes_the_headers_of_its_address_family() {
    for (to, bytes, base) in
        [(address(true, 2, 862), 1500 - 28, 1200), (address(false, 2, 862), 1500 - 48, 1280)]
    {
        let mut test = TestSearch::new(|spec| spec.to = to);
        assert_eq!(test.next().probe().2.len(), bytes);
        let mut test = TestSearch::new(|spec| (spec.to, spec.known) = (to, None));
        assert_eq!(test.next().probe().2.len(), base - (1500 - bytes), "where a search begins");
    }
}

#[test]
fn second_answer_of_the_known_size_starts_no_search() {
    let mut test = TestSearch::new(|spec| spec.ceiling = 1500);
    let (_, size, request) = test.next().probe();
    assert_eq!(size, 1500);
    test.reply(&request, |_| ());
    let Err(until) = test.search.plan(test.at) else { panic!("it rests after the confirmation") };
    assert!(until > test.at);
    test.reply(&request, |_| ());
    assert_eq!(test.search.plan(test.at).err(), Some(until), "the size was known");
}

#[test]
fn probe_that_waits_to_be_sent_is_not_lost_and_a_withdrawn_one_has_no_outcome() {
    let mut test = TestSearch::new(|_| ());
    let Err(until) = test.search.plan(test.at) else { panic!("it begins with a pause") };
    test.at = until;
    let now =
        Now { at: until, drained: until, wall: WallOffset::between(until, WallTime::from_nanos(1 << 60)) };
    let (mut drops, mut arena) = (HostDrops::default(), Vec::new());
    assert_eq!(test.search.in_flight(), 0);
    let Step::Send(send) = test.search.step(now, &mut drops, &mut arena) else { panic!("a probe is due") };
    let deadline = Step::Wait(until + test.search.spec.lost_after);
    assert_eq!(test.search.step(now, &mut drops, &mut arena), deadline);
    test.search.sent(send.id, until, TimestampSource::User);
    assert_eq!(test.search.in_flight(), 1);
    test.search.withdraw();
    assert_eq!(test.search.in_flight(), 0);
    assert_eq!(test.search.step(now, &mut drops, &mut arena), Step::Report(MtuReport::Sent));
    assert!(
        matches!(test.search.step(now, &mut drops, &mut arena), Step::Send(_)),
        "its size is tried again"
    );
}
