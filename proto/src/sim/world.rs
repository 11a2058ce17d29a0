//! Two hosts, a link, and drivers that behave as real ones do.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use super::clock::HostClock;
use super::ledger::{Counts, HANDOVER_MAX, Ledger};
use super::link::{Corruption, Delivery, Link, Packet};
use super::random::Random;
use crate::echo::{Prober, ResponderReport};
use crate::machine::{
    Arrival, HostDrops, IcmpError, IcmpKind, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use crate::time::{Timeline, Timestamp, WallTime};
use crate::wire::{stamp, tlv};

/// How a simulated process is scheduled. Times in nanoseconds.
#[derive(Debug, Clone)]
pub struct Scheduling {
    /// It wakes up to this much later than it asked.
    pub latency: u64,
    /// It reads its sockets at least this often while replies or transmit timestamps are outstanding.
    pub tick: u64,
    /// It does not run between these true times: SIGSTOP, or a busy host.
    pub stalls: Vec<(u64, u64)>,
}

impl Default for Scheduling {
    fn default() -> Self {
        Self { latency: 200_000, tick: 5_000_000, stalls: Vec::new() }
    }
}

/// A simulated host.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Its clocks.
    pub clock: HostClock,
    /// How its process runs.
    pub pace: Scheduling,
    /// Datagrams that its socket holds; more are dropped and counted. 0: any number.
    pub queue: usize,
    /// Share of transmit stamps that the kernel never delivers.
    pub timestamps_lost: f64,
    /// The others can be read up to this many nanoseconds after the datagram left, in the order of the datagrams.
    pub timestamps_late: u64,
    /// Share of sends that the kernel refuses.
    pub refuses: f64,
    /// Whether its kernel answers, at once, and no process: then what it takes is the network's, and it drops nothing.
    pub answers_at_once: bool,
}

/// What can stand at the far end of a link: a machine that reports [`ResponderReport::Answered`] for each request that
/// it answered.
pub trait SimResponder: Machine<Report = ResponderReport> {}

impl<M: Machine<Report = ResponderReport>> SimResponder for M {}

/// A prober on one host, a responder on the other, and a link each way.
#[derive(Debug)]
pub struct World {
    /// The prober's host.
    pub here: Host,
    /// The responder's host.
    pub there: Host,
    /// From prober to responder.
    pub forward: Link,
    /// From responder to prober.
    pub reverse: Link,
    /// The share of what the forward link drops of which a router tells the prober, and what it says.
    pub complaints: (f64, IcmpKind),
    random: Random,
    ledger: Ledger,
    tally: Counts,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, WorldEvent>,
    next_event: u64,
}

/// The prober's address; the port does not matter.
const HERE: ([u8; 4], u16) = ([192, 0, 2, 1], 40_000);
/// A router between them.
const ROUTER: [u8; 4] = [192, 0, 2, 9];
/// The responder's address.
const THERE: ([u8; 4], u16) = ([192, 0, 2, 2], 862);

#[derive(Debug)]
enum WorldEvent {
    ProberWakes,
    ResponderWakes,
    Request {
        bytes: Vec<u8>,
        id: (u8, u64),
        flow: u8,
        tos: u8,
        ttl: u8,
    },
    Reply {
        bytes: Vec<u8>,
        id: (u8, u64),
        turnaround: (Duration, u64),
        flow: u8,
        is_damaged: bool,
        tos: u8,
        ttl: u8,
        /// When it left the responder, in true nanoseconds.
        left: u64,
    },
    Complaint {
        quoted: Vec<u8>,
        id: (u8, u64),
    },
}

#[derive(Debug)]
struct QueuedDatagram {
    bytes: Vec<u8>,
    /// When it arrived, in true nanoseconds.
    arrived: u64,
    timestamp: WallTime,
    id: (u8, u64),
    flow: u8,
    tos: u8,
    ttl: u8,
    is_damaged: bool,
    /// What a router says of it, if it is the quotation of a datagram.
    icmp: Option<IcmpKind>,
}

impl QueuedDatagram {
    fn new(bytes: Vec<u8>, id: (u8, u64), arrived: u64, clock: &HostClock) -> Self {
        let timestamp = clock.wall(arrived);
        Self { bytes, arrived, timestamp, id, flow: id.0, tos: 0, ttl: 64, is_damaged: false, icmp: None }
    }
}

/// A transmit stamp on its way to the error queue.
#[derive(Debug)]
struct PendingTimestamp {
    id: SendId,
    datagram: (u8, u64),
    /// When the datagram was handed over.
    handed: Timestamp,
    timestamp: WallTime,
    /// When it can be read, in true nanoseconds.
    visible: u64,
}

/// One simulated process: a machine with its driver's state.
#[derive(Debug)]
struct Process {
    timeline: Timeline,
    drained: Timestamp,
    drops: HostDrops,
    dropped: u32,
    checked: Timestamp,
    waiting: VecDeque<QueuedDatagram>,
    timestamps: VecDeque<PendingTimestamp>,
    wakes_at: u64,
}

impl Process {
    fn new(clock: &HostClock) -> Self {
        let (at, wall) = (clock.monotonic(0), clock.wall(0));
        Self {
            timeline: Timeline::new(at, wall),
            drained: at,
            drops: HostDrops::default(),
            dropped: 0,
            checked: at,
            waiting: VecDeque::new(),
            timestamps: VecDeque::new(),
            wakes_at: u64::MAX,
        }
    }

    fn now(&self, clock: &HostClock, truth: u64) -> Now {
        Now { at: clock.monotonic(truth), drained: self.drained, wall: self.timeline.offset() }
    }

    fn look_at_the_clocks(&mut self, clock: &HostClock, truth: u64) {
        self.timeline.observe(clock.monotonic(truth), clock.wall(truth), Duration::ZERO);
    }

    fn note_drops(&mut self, now: Timestamp) {
        let count = std::mem::take(&mut self.dropped);
        self.drops.add(0, self.checked, now, count);
        self.checked = now;
    }
}

impl World {
    /// Two hosts with good clocks and perfect links of 10 ms each way.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            here: Host {
                clock: HostClock { origin: 5_000_000_000, ..HostClock::default() },
                timestamps_late: 3_000_000,
                ..Host::default()
            },
            there: Host {
                clock: HostClock { origin: 77_000_000_000, ..HostClock::default() },
                ..Host::default()
            },
            forward: Link::perfect(10_000_000),
            reverse: Link::perfect(10_000_000),
            complaints: (0.0, IcmpKind::Unreachable),
            random: Random::new(seed),
            ledger: Ledger::default(),
            tally: Counts::default(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
        }
    }

    /// The responder's address, for the prober's [`crate::echo::EchoSpec`].
    #[must_use]
    pub fn responder_address() -> SocketAddr {
        THERE.into()
    }

    /// The prober's clock at true time 0, for [`Prober::new`].
    #[must_use]
    pub fn start(&self) -> Timestamp {
        self.here.clock.monotonic(0)
    }

    /// Runs until the prober has finished or `until`, in true nanoseconds; whatever is then in flight is withdrawn.
    /// Returns what was reported and what was true.
    ///
    /// Anything can answer that says so: one of ours ([`crate::echo::StampResponder`]), or somebody else's.
    pub fn run(
        mut self,
        prober: &mut Prober,
        responder: &mut impl SimResponder,
        until: u64,
    ) -> (Counts, Ledger) {
        let mut here = Process::new(&self.here.clock);
        let mut there = Process::new(&self.there.clock);
        self.schedule(0, WorldEvent::ProberWakes);
        while let Some(Reverse((truth, number))) = self.queue.pop() {
            let event = self.events.remove(&number).expect("every entry has its event");
            if truth > until {
                break;
            }
            match event {
                WorldEvent::ProberWakes if truth == here.wakes_at || here.wakes_at == u64::MAX => {
                    if self.prober_runs(prober, &mut here, truth) {
                        break;
                    }
                }
                WorldEvent::ProberWakes => {}
                WorldEvent::ResponderWakes => self.responder_runs(responder, &mut there, truth),
                WorldEvent::Request { bytes, id, flow, tos, ttl } if self.there.answers_at_once => {
                    let request = QueuedDatagram {
                        flow,
                        tos,
                        ttl,
                        ..QueuedDatagram::new(bytes, id, truth, &self.there.clock)
                    };
                    let at = self.there.clock.monotonic(truth);
                    self.respond(responder, &mut there, truth, &request, at);
                }
                WorldEvent::Request { bytes, id, flow, tos, ttl } => {
                    if self.there.queue > 0 && there.waiting.len() >= self.there.queue {
                        there.dropped += 1;
                        self.ledger.dropped_at_responder += 1;
                        continue;
                    }
                    let request = QueuedDatagram::new(bytes, id, truth, &self.there.clock);
                    there.waiting.push_back(QueuedDatagram { flow, tos, ttl, ..request });
                    let wakes = self.wakes(&self.there.pace.clone(), truth);
                    self.schedule(wakes, WorldEvent::ResponderWakes);
                }
                WorldEvent::Reply { bytes, id, turnaround, flow, is_damaged, tos, ttl, left } => {
                    if self.here.queue > 0 && here.waiting.len() >= self.here.queue {
                        here.dropped += 1;
                        self.ledger.dropped_at_prober += 1;
                        continue;
                    }
                    if is_damaged {
                        self.ledger.corrupted_replies += 1;
                    } else {
                        let at = (self.here.clock.monotonic(truth), truth);
                        self.ledger.reached_prober(id, at, turnaround, left);
                    }
                    let reply = QueuedDatagram::new(bytes, id, truth, &self.here.clock);
                    here.waiting.push_back(QueuedDatagram { flow, tos, ttl, is_damaged, ..reply });
                }
                WorldEvent::Complaint { quoted, id } => {
                    let error = QueuedDatagram::new(quoted, id, truth, &self.here.clock);
                    here.waiting.push_back(QueuedDatagram { icmp: Some(self.complaints.1), ..error });
                }
            }
        }
        prober.withdraw();
        self.drive(prober, &mut here, until);
        self.tally.ipdv.sort_unstable();
        (self.tally, self.ledger)
    }

    fn schedule(&mut self, at: u64, event: WorldEvent) {
        self.queue.push(Reverse((at, self.next_event)));
        self.events.insert(self.next_event, event);
        self.next_event += 1;
    }

    fn wakes(&mut self, pace: &Scheduling, asked: u64) -> u64 {
        let at = asked + self.random.below(pace.latency + 1);
        pace.stalls.iter().find(|(from, to)| (*from..*to).contains(&at)).map_or(at, |(_, to)| *to)
    }

    fn prober_runs(&mut self, prober: &mut Prober, here: &mut Process, truth: u64) -> bool {
        let clock = self.here.clock.clone();
        here.look_at_the_clocks(&clock, truth);
        let now = clock.monotonic(truth);
        let (from, address) = (here.drained, SocketAddr::from(THERE));
        while here.timestamps.front().is_some_and(|timestamp| timestamp.visible <= truth) {
            let Some(timestamp) = here.timestamps.pop_front() else { break };
            let left = here.timeline.place(timestamp.timestamp, timestamp.handed, now);
            prober.sent(timestamp.id, left, TimestampSource::Kernel);
            self.ledger.timestamped(timestamp.datagram, now);
            self.drive(prober, here, truth);
        }
        while let Some(waiting) = here.waiting.pop_front() {
            let icmp = waiting.icmp.map(|kind| IcmpError { router: ROUTER.into(), kind, mtu: None });
            let arrived = self.here.clock.monotonic(waiting.arrived);
            match waiting.icmp {
                Some(IcmpKind::PortUnreachable | IcmpKind::Other) => {}
                Some(
                    IcmpKind::Unreachable | IcmpKind::Prohibited | IcmpKind::TooBig | IcmpKind::TtlExceeded,
                ) => self.ledger.refused(waiting.id, arrived),
                None if waiting.is_damaged => {}
                None => self.ledger.handed(waiting.id, now),
            }
            let arrival = Arrival {
                at: here.timeline.place(waiting.timestamp, from, now),
                by: TimestampSource::Kernel,
                from: address,
                to: None,
                flow: waiting.flow,
                ttl: Some(waiting.ttl),
                tos: Some(waiting.tos),
                icmp,
            };
            prober.received(&waiting.bytes, &arrival);
            self.drive(prober, here, truth);
        }
        here.note_drops(now);
        here.drained = now;
        let Some(next) = self.drive(prober, here, truth) else { return true };
        let asked = clock.truth(next).max(truth + 1);
        let is_awaited = prober.in_flight() > 0 || !here.timestamps.is_empty();
        let tick = if is_awaited { truth + self.here.pace.tick } else { u64::MAX };
        let wakes = self.wakes(&self.here.pace.clone(), asked.min(tick));
        here.wakes_at = wakes;
        self.schedule(wakes, WorldEvent::ProberWakes);
        false
    }

    /// Steps until there is nothing to do; the next deadline, or `None` when the prober has finished.
    fn drive(&mut self, prober: &mut Prober, here: &mut Process, truth: u64) -> Option<Timestamp> {
        let mut sends: Vec<(Send, Vec<u8>)> = Vec::new();
        let end = loop {
            let now = here.now(&self.here.clock, truth);
            let mut arena = Vec::new();
            match prober.step(now, &mut here.drops, &mut arena) {
                Step::Send(send) => sends.push((send, arena)),
                Step::Report(report) => self.tally.add(&report, now.at),
                Step::Wait(next) => {
                    assert!(next > now.drained, "it waits for what is past");
                    break Some(next);
                }
                Step::Finished => break None,
            }
        };
        let had_sends = !sends.is_empty();
        for (send, bytes) in sends {
            self.leave(prober, here, truth, &send, bytes);
        }
        if had_sends { self.drive(prober, here, truth) } else { end }
    }

    fn leave(&mut self, prober: &mut Prober, here: &mut Process, truth: u64, send: &Send, bytes: Vec<u8>) {
        let at = self.here.clock.monotonic(truth);
        if self.random.chance(self.here.refuses) {
            prober.not_sent(send.id, NotSent::Permission);
            return;
        }
        prober.sent(send.id, at, TimestampSource::User);
        let left = truth + self.random.between(1, HANDOVER_MAX);
        let id = (send.flow, send.id.0 & 0x00ff_ffff_ffff_ffff);
        if !self.random.chance(self.here.timestamps_lost) {
            let visible = left + self.random.below(self.here.timestamps_late);
            here.timestamps.push_back(PendingTimestamp {
                id: send.id,
                datagram: id,
                handed: at,
                timestamp: self.here.clock.wall(left),
                visible,
            });
        }
        let mut extensions = tlv::walk(&bytes, stamp::guess_mode(&bytes).base_bytes());
        let asks_for_report = extensions.any(|found| found.kind == tlv::SESSION);
        self.ledger.left(id, self.here.clock.monotonic(left), left, asks_for_report);
        let passed = self.forward.pass(&mut self.random, left, parcel(&bytes, send));
        if passed.is_err() && self.complaints.0 > 0.0 && self.random.chance(self.complaints.0) {
            // As much as a router quotes.
            let quoted = bytes[..bytes.len().min(548)].to_vec();
            let at = left + self.random.between(1, 2 * self.forward.delay + 1);
            self.schedule(at, WorldEvent::Complaint { quoted, id });
        }
        for delivery in received(passed) {
            let bytes = damaged(&bytes, &delivery);
            let Delivery { at, tos, ttl, .. } = delivery;
            self.schedule(at, WorldEvent::Request { bytes, id, flow: send.flow, tos, ttl });
        }
    }

    fn responder_runs(&mut self, responder: &mut impl SimResponder, there: &mut Process, truth: u64) {
        let clock = self.there.clock.clone();
        there.look_at_the_clocks(&clock, truth);
        let now = clock.monotonic(truth);
        // Answering takes time: each reply leaves a little later than the one before it.
        let mut busy = truth;
        let from = there.drained;
        there.note_drops(now);
        while let Some(waiting) = there.waiting.pop_front() {
            busy += self.random.between(500, 5_000);
            let received_at = there.timeline.place(waiting.timestamp, from, now);
            self.respond(responder, there, busy, &waiting, received_at);
        }
        there.drained = clock.monotonic(truth);
    }

    /// Hands a request to the responder, which received it at `received_at` and answers at `truth`.
    fn respond(
        &mut self,
        responder: &mut impl SimResponder,
        there: &mut Process,
        truth: u64,
        request: &QueuedDatagram,
        received_at: Timestamp,
    ) {
        let clock = self.there.clock.clone();
        let arrival = Arrival {
            at: received_at,
            by: TimestampSource::Kernel,
            from: (HERE.0, HERE.1 + u16::from(request.flow)).into(),
            to: None,
            flow: 0,
            ttl: Some(request.ttl),
            tos: Some(request.tos),
            icmp: None,
        };
        responder.received(&request.bytes, &arrival);
        loop {
            let mut arena = Vec::new();
            let now = there.now(&clock, truth);
            match responder.step(now, &mut there.drops, &mut arena) {
                Step::Send(send) => {
                    let turnaround = (clock.monotonic(truth).since(received_at), truth - request.arrived);
                    self.answer(responder, &clock, truth, &send, &arena, request, turnaround);
                }
                Step::Report(ResponderReport::Answered) => {
                    self.ledger.reached_responder(request.id, truth);
                }
                Step::Report(ResponderReport::Refused(_) | ResponderReport::Sources(_)) => {}
                Step::Wait(_) | Step::Finished => break,
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one caller, and a struct would have one use")]
    fn answer(
        &mut self,
        responder: &mut impl SimResponder,
        clock: &HostClock,
        truth: u64,
        send: &Send,
        bytes: &[u8],
        waiting: &QueuedDatagram,
        turnaround: (Duration, u64),
    ) {
        responder.sent(send.id, clock.monotonic(truth), TimestampSource::User);
        let left = truth + self.random.between(1, HANDOVER_MAX);
        if send.timestamp {
            responder.sent(send.id, clock.monotonic(left), TimestampSource::Kernel);
        }
        // T3 is written before the reply reaches the wire; that much is the network's in what is reported.
        let parcel = parcel(bytes, send);
        for delivery in received(self.reverse.pass(&mut self.random, left, parcel)) {
            let event = WorldEvent::Reply {
                bytes: damaged(bytes, &delivery),
                id: waiting.id,
                turnaround,
                flow: waiting.flow,
                is_damaged: delivery.damage.is_some(),
                tos: delivery.tos,
                ttl: delivery.ttl,
                left: truth,
            };
            self.schedule(delivery.at, event);
        }
    }
}

/// How long the headers of a datagram are: IPv4 and UDP.
const HEADER_BYTES: usize = 28;

fn parcel(bytes: &[u8], send: &Send) -> Packet {
    Packet { bytes: bytes.len() + HEADER_BYTES, tos: send.tos, ttl: send.ttl }
}

/// Copies that a socket gets: the kernel drops those whose checksum shows the damage.
fn received<E>(passed: Result<[Option<Delivery>; 2], E>) -> impl Iterator<Item = Delivery> {
    let copies = passed.ok().into_iter().flatten().flatten();
    copies.filter(|copy| !matches!(copy.damage, Some((_, Corruption::Noticed))))
}

fn damaged(bytes: &[u8], delivery: &Delivery) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    delivery.damage(&mut bytes);
    bytes
}
