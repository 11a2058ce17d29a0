//! Two hosts, a link in each direction, and drivers that behave as real ones do.

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

/// Scheduling of a simulated process. Times in nanoseconds.
#[derive(Debug, Clone)]
pub struct Scheduling {
    /// Maximum delay of a wake-up.
    pub latency: u64,
    /// Interval at which it reads its sockets while replies or transmit timestamps are outstanding.
    pub tick: u64,
    /// True times between which it does not run: SIGSTOP, or a busy host.
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
    /// Scheduling of its process.
    pub scheduling: Scheduling,
    /// Number of datagrams that its socket can hold; more are dropped and counted. 0: unlimited.
    pub queue: usize,
    /// Share of transmit timestamps that the kernel never delivers.
    pub timestamps_lost: f64,
    /// The other timestamps can be read up to this many nanoseconds after the datagram left, in the order of
    /// the datagrams.
    pub timestamps_late: u64,
    /// Share of sends that the kernel refuses.
    pub refuses: f64,
    /// Whether the kernel replies, immediately and without a process: its turnaround then counts for the
    /// network, and it drops nothing.
    pub kernel_replies: bool,
}

/// A machine that can be the responder of a [`World`]. It must report [`ResponderReport::Answered`] for each
/// request that it answered.
pub trait SimResponder: Machine<Report = ResponderReport> {}

impl<M: Machine<Report = ResponderReport>> SimResponder for M {}

/// A simulation of a prober on one host, a responder on another, and a link in each direction.
///
/// # Examples
///
/// Measures a path that loses 10 % of the requests, and compares the verdicts with the ledger:
///
/// ```
/// use std::time::Duration;
///
/// use pathmeter_proto::admission::Policy;
/// use pathmeter_proto::dscp::Dscp;
/// use pathmeter_proto::echo::{EchoSpec, Prober, Quirks, StampResponder, WireFormat};
/// use pathmeter_proto::sim::{Loss, World};
///
/// let (late_after, lost_after) = (Duration::from_secs(1), Duration::from_secs(3));
/// let mut world = World::new(7);
/// world.forward.loss = Loss::Random(0.1);
/// let spec = EchoSpec {
///     to: World::responder_address(),
///     wire: WireFormat::Stamp { keys: None, quirks: Quirks::default() },
///     interval: Duration::from_millis(100),
///     ssids: vec![1],
///     size: None,
///     dscp: Dscp::DEFAULT,
///     late_after,
///     lost_after,
///     tx_timestamps: true,
///     count: Some(1_000),
///     seed: 7,
/// };
/// let policy = Policy { open: true, rate: 1_000, rate_per_source: 1_000, ..Policy::default() };
/// let mut prober = Prober::new(spec, world.start());
/// let mut responder = StampResponder::new(policy, None, 16);
///
/// // At most ten minutes of true time.
/// let (counts, ledger) = world.run(&mut prober, &mut responder, 600_000_000_000);
/// assert_eq!(counts.sent, 1_000);
/// assert!((50..150).contains(&counts.lost()));
/// // No round trip may differ from the truth by a nanosecond.
/// assert_eq!(ledger.compare(&counts, late_after, lost_after, |_, _| 0), Ok(()));
/// ```
#[derive(Debug)]
pub struct World {
    /// The prober's host.
    pub prober_host: Host,
    /// The responder's host.
    pub responder_host: Host,
    /// The link from prober to responder.
    pub forward: Link,
    /// The link from responder to prober.
    pub reverse: Link,
    /// Share of the datagrams dropped by the forward link that a router reports with an ICMP error, and the
    /// kind of error.
    pub icmp_errors: (f64, IcmpKind),
    random: Random,
    ledger: Ledger,
    counts: Counts,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, WorldEvent>,
    next_event: u64,
}

/// Address of the prober; the port does not matter.
const PROBER: ([u8; 4], u16) = ([192, 0, 2, 1], 40_000);
/// Address of a router between them.
const ROUTER: [u8; 4] = [192, 0, 2, 9];
/// Address of the responder.
const RESPONDER: ([u8; 4], u16) = ([192, 0, 2, 2], 862);

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
        /// Time at which it left the responder, in true nanoseconds.
        left: u64,
    },
    IcmpError {
        quoted: Vec<u8>,
        id: (u8, u64),
    },
}

#[derive(Debug)]
struct QueuedDatagram {
    bytes: Vec<u8>,
    /// Time of arrival, in true nanoseconds.
    arrived: u64,
    timestamp: WallTime,
    id: (u8, u64),
    flow: u8,
    tos: u8,
    ttl: u8,
    is_damaged: bool,
    /// Kind of the ICMP error, if the bytes are a quoted datagram.
    icmp: Option<IcmpKind>,
}

impl QueuedDatagram {
    fn new(bytes: Vec<u8>, id: (u8, u64), arrived: u64, clock: &HostClock) -> Self {
        let timestamp = clock.wall(arrived);
        Self { bytes, arrived, timestamp, id, flow: id.0, tos: 0, ttl: 64, is_damaged: false, icmp: None }
    }
}

/// A transmit timestamp on its way to the error queue.
#[derive(Debug)]
struct SimulatedTimestamp {
    id: SendId,
    datagram: (u8, u64),
    /// Time at which the datagram was passed to the kernel.
    passed_at: Timestamp,
    timestamp: WallTime,
    /// Time from which it can be read, in true nanoseconds.
    visible: u64,
}

/// Driver state of one simulated process.
#[derive(Debug)]
struct Process {
    timeline: Timeline,
    drained: Timestamp,
    drops: HostDrops,
    dropped: u32,
    checked: Timestamp,
    waiting: VecDeque<QueuedDatagram>,
    timestamps: VecDeque<SimulatedTimestamp>,
    wake_at: u64,
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
            wake_at: u64::MAX,
        }
    }

    fn now(&self, clock: &HostClock, truth: u64) -> Now {
        Now { at: clock.monotonic(truth), drained: self.drained, wall: self.timeline.offset() }
    }

    fn read_clocks(&mut self, clock: &HostClock, truth: u64) {
        self.timeline.observe(clock.monotonic(truth), clock.wall(truth), Duration::ZERO);
    }

    fn record_drops(&mut self, now: Timestamp) {
        let count = std::mem::take(&mut self.dropped);
        self.drops.add(0, self.checked, now, count);
        self.checked = now;
    }
}

impl World {
    /// Two hosts with perfect clocks, and perfect links of 10 ms in each direction.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            prober_host: Host {
                clock: HostClock { origin: 5_000_000_000, ..HostClock::default() },
                timestamps_late: 3_000_000,
                ..Host::default()
            },
            responder_host: Host {
                clock: HostClock { origin: 77_000_000_000, ..HostClock::default() },
                ..Host::default()
            },
            forward: Link::perfect(10_000_000),
            reverse: Link::perfect(10_000_000),
            icmp_errors: (0.0, IcmpKind::Unreachable),
            random: Random::new(seed),
            ledger: Ledger::default(),
            counts: Counts::default(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
        }
    }

    /// Address of the responder, for the prober's [`crate::echo::EchoSpec`].
    #[must_use]
    pub fn responder_address() -> SocketAddr {
        RESPONDER.into()
    }

    /// The prober's monotonic clock at true time 0, for [`Prober::new`].
    #[must_use]
    pub fn start(&self) -> Timestamp {
        self.prober_host.clock.monotonic(0)
    }

    /// Runs until the prober has finished or until `until`, in true nanoseconds; datagrams then in flight are
    /// withdrawn. Returns the counts of the prober's reports and the ledger of the true events.
    ///
    /// The responder can be pathmeter's [`StampResponder`](crate::echo::StampResponder) or any other machine.
    pub fn run(
        mut self,
        prober: &mut Prober,
        responder: &mut impl SimResponder,
        until: u64,
    ) -> (Counts, Ledger) {
        let mut prober_process = Process::new(&self.prober_host.clock);
        let mut responder_process = Process::new(&self.responder_host.clock);
        self.schedule(0, WorldEvent::ProberWakes);
        while let Some(Reverse((truth, number))) = self.queue.pop() {
            let event = self.events.remove(&number).expect("every entry has its event");
            if truth > until {
                break;
            }
            match event {
                WorldEvent::ProberWakes
                    if truth == prober_process.wake_at || prober_process.wake_at == u64::MAX =>
                {
                    if self.run_prober(prober, &mut prober_process, truth) {
                        break;
                    }
                }
                WorldEvent::ProberWakes => {}
                WorldEvent::ResponderWakes => self.run_responder(responder, &mut responder_process, truth),
                WorldEvent::Request { bytes, id, flow, tos, ttl } if self.responder_host.kernel_replies => {
                    let request = QueuedDatagram {
                        flow,
                        tos,
                        ttl,
                        ..QueuedDatagram::new(bytes, id, truth, &self.responder_host.clock)
                    };
                    let at = self.responder_host.clock.monotonic(truth);
                    self.respond(responder, &mut responder_process, truth, &request, at);
                }
                WorldEvent::Request { bytes, id, flow, tos, ttl } => {
                    if self.responder_host.queue > 0
                        && responder_process.waiting.len() >= self.responder_host.queue
                    {
                        responder_process.dropped += 1;
                        self.ledger.dropped_at_responder += 1;
                        continue;
                    }
                    let request = QueuedDatagram::new(bytes, id, truth, &self.responder_host.clock);
                    responder_process.waiting.push_back(QueuedDatagram { flow, tos, ttl, ..request });
                    let wakes = self.wake_time(&self.responder_host.scheduling.clone(), truth);
                    self.schedule(wakes, WorldEvent::ResponderWakes);
                }
                WorldEvent::Reply { bytes, id, turnaround, flow, is_damaged, tos, ttl, left } => {
                    if self.prober_host.queue > 0 && prober_process.waiting.len() >= self.prober_host.queue {
                        prober_process.dropped += 1;
                        self.ledger.dropped_at_prober += 1;
                        continue;
                    }
                    if is_damaged {
                        self.ledger.corrupted_replies += 1;
                    } else {
                        let at = (self.prober_host.clock.monotonic(truth), truth);
                        self.ledger.reached_prober(id, at, turnaround, left);
                    }
                    let reply = QueuedDatagram::new(bytes, id, truth, &self.prober_host.clock);
                    prober_process.waiting.push_back(QueuedDatagram { flow, tos, ttl, is_damaged, ..reply });
                }
                WorldEvent::IcmpError { quoted, id } => {
                    let error = QueuedDatagram::new(quoted, id, truth, &self.prober_host.clock);
                    prober_process
                        .waiting
                        .push_back(QueuedDatagram { icmp: Some(self.icmp_errors.1), ..error });
                }
            }
        }
        prober.withdraw();
        self.drive(prober, &mut prober_process, until);
        self.counts.ipdv.sort_unstable();
        (self.counts, self.ledger)
    }

    fn schedule(&mut self, at: u64, event: WorldEvent) {
        self.queue.push(Reverse((at, self.next_event)));
        self.events.insert(self.next_event, event);
        self.next_event += 1;
    }

    fn wake_time(&mut self, scheduling: &Scheduling, asked: u64) -> u64 {
        let at = asked + self.random.below(scheduling.latency + 1);
        scheduling.stalls.iter().find(|(from, to)| (*from..*to).contains(&at)).map_or(at, |(_, to)| *to)
    }

    fn run_prober(&mut self, prober: &mut Prober, prober_process: &mut Process, truth: u64) -> bool {
        let clock = self.prober_host.clock.clone();
        prober_process.read_clocks(&clock, truth);
        let now = clock.monotonic(truth);
        let (from, address) = (prober_process.drained, SocketAddr::from(RESPONDER));
        while prober_process.timestamps.front().is_some_and(|timestamp| timestamp.visible <= truth) {
            let Some(timestamp) = prober_process.timestamps.pop_front() else { break };
            let left = prober_process.timeline.to_monotonic(timestamp.timestamp, timestamp.passed_at, now);
            prober.sent(timestamp.id, left, TimestampSource::Kernel);
            self.ledger.timestamped(timestamp.datagram, now);
            self.drive(prober, prober_process, truth);
        }
        while let Some(waiting) = prober_process.waiting.pop_front() {
            let icmp = waiting.icmp.map(|kind| IcmpError {
                router: ROUTER.into(),
                kind,
                code: 0,
                mtu: None,
                extensions_at: None,
            });
            let arrived = self.prober_host.clock.monotonic(waiting.arrived);
            match waiting.icmp {
                Some(IcmpKind::PortUnreachable | IcmpKind::Other) => {}
                Some(
                    IcmpKind::Unreachable | IcmpKind::Prohibited | IcmpKind::TooBig | IcmpKind::TtlExceeded,
                ) => self.ledger.dropped_by_router(waiting.id, arrived),
                None if waiting.is_damaged => {}
                None => self.ledger.delivered(waiting.id, now),
            }
            let arrival = Arrival {
                at: prober_process.timeline.to_monotonic(waiting.timestamp, from, now),
                by: TimestampSource::Kernel,
                from: address,
                to: None,
                flow: waiting.flow,
                ttl: Some(waiting.ttl),
                tos: Some(waiting.tos),
                icmp,
            };
            prober.received(&waiting.bytes, &arrival);
            self.drive(prober, prober_process, truth);
        }
        prober_process.record_drops(now);
        prober_process.drained = now;
        let Some(next) = self.drive(prober, prober_process, truth) else { return true };
        let asked = clock.truth(next).max(truth + 1);
        let is_awaited = prober.in_flight() > 0 || !prober_process.timestamps.is_empty();
        let tick = if is_awaited { truth + self.prober_host.scheduling.tick } else { u64::MAX };
        let wakes = self.wake_time(&self.prober_host.scheduling.clone(), asked.min(tick));
        prober_process.wake_at = wakes;
        self.schedule(wakes, WorldEvent::ProberWakes);
        false
    }

    /// Steps until the prober waits. Returns its deadline, or `None` if it has finished.
    fn drive(&mut self, prober: &mut Prober, prober_process: &mut Process, truth: u64) -> Option<Timestamp> {
        let mut sends: Vec<(Send, Vec<u8>)> = Vec::new();
        let end = loop {
            let now = prober_process.now(&self.prober_host.clock, truth);
            let mut arena = Vec::new();
            match prober.step(now, &mut prober_process.drops, &mut arena) {
                Step::Send(send) => sends.push((send, arena)),
                Step::Report(report) => self.counts.add(&report, now.at),
                Step::Wait(next) => {
                    assert!(next > now.drained, "the deadline is in the future");
                    break Some(next);
                }
                Step::Finished => break None,
            }
        };
        let had_sends = !sends.is_empty();
        for (send, bytes) in sends {
            self.transmit(prober, prober_process, truth, &send, bytes);
        }
        if had_sends { self.drive(prober, prober_process, truth) } else { end }
    }

    fn transmit(
        &mut self,
        prober: &mut Prober,
        prober_process: &mut Process,
        truth: u64,
        send: &Send,
        bytes: Vec<u8>,
    ) {
        let at = self.prober_host.clock.monotonic(truth);
        if self.random.chance(self.prober_host.refuses) {
            prober.not_sent(send.id, NotSent::Permission);
            return;
        }
        prober.sent(send.id, at, TimestampSource::User);
        let left = truth + self.random.between(1, HANDOVER_MAX);
        let id = (send.flow, send.id.0 & 0x00ff_ffff_ffff_ffff);
        if !self.random.chance(self.prober_host.timestamps_lost) {
            let visible = left + self.random.below(self.prober_host.timestamps_late);
            prober_process.timestamps.push_back(SimulatedTimestamp {
                id: send.id,
                datagram: id,
                passed_at: at,
                timestamp: self.prober_host.clock.wall(left),
                visible,
            });
        }
        let mut extensions = tlv::walk(&bytes, stamp::guess_mode(&bytes).base_bytes());
        let asks_for_report = extensions.any(|found| found.kind == tlv::SESSION);
        self.ledger.left(id, self.prober_host.clock.monotonic(left), left, asks_for_report);
        let passed = self.forward.pass(&mut self.random, left, packet(&bytes, send));
        if passed.is_err() && self.icmp_errors.0 > 0.0 && self.random.chance(self.icmp_errors.0) {
            // As much as a router quotes.
            let quoted = bytes[..bytes.len().min(548)].to_vec();
            let at = left + self.random.between(1, 2 * self.forward.delay + 1);
            self.schedule(at, WorldEvent::IcmpError { quoted, id });
        }
        for delivery in received(passed) {
            let bytes = damaged(&bytes, &delivery);
            let Delivery { at, tos, ttl, .. } = delivery;
            self.schedule(at, WorldEvent::Request { bytes, id, flow: send.flow, tos, ttl });
        }
    }

    fn run_responder(
        &mut self,
        responder: &mut impl SimResponder,
        responder_process: &mut Process,
        truth: u64,
    ) {
        let clock = self.responder_host.clock.clone();
        responder_process.read_clocks(&clock, truth);
        let now = clock.monotonic(truth);
        // Replies take time: each leaves a little later than the one before.
        let mut busy = truth;
        let from = responder_process.drained;
        responder_process.record_drops(now);
        while let Some(waiting) = responder_process.waiting.pop_front() {
            busy += self.random.between(500, 5_000);
            let received_at = responder_process.timeline.to_monotonic(waiting.timestamp, from, now);
            self.respond(responder, responder_process, busy, &waiting, received_at);
        }
        responder_process.drained = clock.monotonic(truth);
    }

    /// Passes a request to the responder, which received it at `received_at` and answers at `truth`.
    fn respond(
        &mut self,
        responder: &mut impl SimResponder,
        responder_process: &mut Process,
        truth: u64,
        request: &QueuedDatagram,
        received_at: Timestamp,
    ) {
        let clock = self.responder_host.clock.clone();
        let arrival = Arrival {
            at: received_at,
            by: TimestampSource::Kernel,
            from: (PROBER.0, PROBER.1 + u16::from(request.flow)).into(),
            to: None,
            flow: 0,
            ttl: Some(request.ttl),
            tos: Some(request.tos),
            icmp: None,
        };
        responder.received(&request.bytes, &arrival);
        loop {
            let mut arena = Vec::new();
            let now = responder_process.now(&clock, truth);
            match responder.step(now, &mut responder_process.drops, &mut arena) {
                Step::Send(send) => {
                    let turnaround = (clock.monotonic(truth).since(received_at), truth - request.arrived);
                    self.transmit_reply(responder, &clock, truth, &send, &arena, request, turnaround);
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
    fn transmit_reply(
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
        // T3 is written before the reply reaches the wire; the difference counts for the network.
        let packet = packet(bytes, send);
        for delivery in received(self.reverse.pass(&mut self.random, left, packet)) {
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

/// Length of the headers of a datagram: IPv4 and UDP.
const HEADER_BYTES: usize = 28;

fn packet(bytes: &[u8], send: &Send) -> Packet {
    Packet { bytes: bytes.len() + HEADER_BYTES, tos: send.tos, ttl: send.ttl }
}

/// Copies that reach the socket: the kernel drops those with a wrong checksum.
fn received<E>(passed: Result<[Option<Delivery>; 2], E>) -> impl Iterator<Item = Delivery> {
    let copies = passed.ok().into_iter().flatten().flatten();
    copies.filter(|copy| !matches!(copy.damage, Some((_, Corruption::Detected))))
}

fn damaged(bytes: &[u8], delivery: &Delivery) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    delivery.damage(&mut bytes);
    bytes
}
