//! Hosts that answer ICMP echoes, measured by the datagram loop in this process, over loopback and over
//! wires.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::Duration;

use pathmeter::datagram::{self, DatagramHandle, SourceChoice, TimestampMatching};
use pathmeter::echo::DatagramEcho;
use pathmeter::loops::{EVENTS_PENDING_MAX, LoopEvent, NewPath};
use pathmeter::metrics::echo::EchoSeries;
use pathmeter::paths::PathId;
use pathmeter_lab::truth::{EchoFormat, Echoes, Rules, TrueCounts};
use pathmeter_lab::{Namespace, NetPlan, WireDirection, drop_net_raw, eventually};
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{Direction, EchoReport, EchoSpec, RoundTrip, Verdict, WireFormat};
use pathmeter_proto::machine::{IcmpKind, TimestampSource};
use pathmeter_proto::sim::{Corruption, Jitter, Link, Loss};
use pathmeter_proto::time::nanos;
use pathmeter_proto::wire::NtpTime;
use pathmeter_proto::wire::icmp::{self, IcmpEcho, IcmpVersion};
use socket2::{Domain, Protocol, Socket, Type};

const MS: u64 = 1_000_000;
const LATE_AFTER: Duration = Duration::from_millis(500);
const LOST_AFTER: Duration = Duration::from_secs(2);
/// Deadline where nothing is lost: a machine that does not run for a while makes nothing late.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// The ICMP sockets that a process may open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SocketPermission {
    /// Ping sockets only.
    Ping,
    /// Raw sockets only.
    Raw,
    /// Neither kind.
    Nothing,
}

const PING_OR_RAW: [SocketPermission; 2] = [SocketPermission::Ping, SocketPermission::Raw];

impl SocketPermission {
    /// Runs `work` in a namespace with only this permission.
    fn within<T: Send>(self, namespace: &Namespace, work: impl FnOnce() -> T + Send) -> T {
        if self == Self::Ping {
            // The default range is empty. Group 0 is the only one that exists in every user namespace.
            namespace.set_sysctl("ipv4/ping_group_range", "0 0");
        }
        namespace.within(|| {
            if self != Self::Raw {
                drop_net_raw();
            }
            work()
        })
    }
}

/// A running datagram loop.
struct RunningLoop {
    handle: DatagramHandle,
    events: tokio::sync::mpsc::Receiver<LoopEvent>,
    reports: Receiver<EchoReport>,
    tap: Sender<EchoReport>,
}

impl RunningLoop {
    fn start(timestamps: TimestampMatching) -> Self {
        let (sender, events) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
        let handle = datagram::spawn("prober", Vec::new(), timestamps, sender).unwrap();
        let (tap, reports) = channel();
        Self { handle, events, reports, tap }
    }

    fn add(&self, id: u64, spec: EchoSpec) -> Arc<EchoSeries> {
        let any: IpAddr =
            if spec.to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let flows = spec.ssids.len() as u64;
        let series = Arc::new(EchoSeries::new("icmp", "host", "either", flows));
        let echo = DatagramEcho {
            spec,
            source: SourceChoice { address: any, port: 0, dont_fragment: false },
            series: Arc::clone(&series),
            path_mtu: None,
            reports: Some(self.tap.clone()),
            followed: Arc::default(),
        };
        self.handle.start(NewPath { id: PathId(id), task: echo.into_task(), peer_left_at: None });
        series
    }

    fn event(&mut self) -> LoopEvent {
        eventually("an event", || self.events.try_recv().ok())
    }

    /// Addresses of a path's sockets; the port is the ICMP identifier.
    fn started(&mut self) -> Vec<SocketAddr> {
        let event = self.event();
        let LoopEvent::Started { sources, .. } = event else { panic!("{event:?}") };
        sources
    }

    /// Stops the loop and returns everything that it reported.
    fn end(self, grace: Duration) -> Vec<EchoReport> {
        self.handle.stop(grace);
        eventually("the loop has ended", || self.handle.is_finished().then_some(()));
        assert_eq!(self.handle.series().accounting_errors.get(), 0);
        drop(self.tap);
        self.reports.iter().collect()
    }
}

fn spec(to: IpAddr, flows: usize, interval: Duration, count: Option<u64>) -> EchoSpec {
    EchoSpec {
        to: (to, 0).into(),
        wire: WireFormat::Icmp,
        interval,
        ssids: vec![0; flows],
        size: None,
        dscp: Dscp::new(46).unwrap(),
        late_after: PATIENCE,
        lost_after: PATIENCE,
        tx_timestamps: true,
        count,
        seed: 7,
    }
}

fn count(reports: &[EchoReport], is: impl Fn(&EchoReport) -> bool) -> u64 {
    reports.iter().filter(|report| is(report)).count() as u64
}

fn verdicts(reports: &[EchoReport]) -> impl Iterator<Item = (Verdict, Option<RoundTrip>)> + '_ {
    reports.iter().filter_map(|report| {
        let EchoReport::Decided { verdict, sample, .. } = report else { return None };
        Some((*verdict, *sample))
    })
}

fn assert_all_ok(reports: &[EchoReport], what: &str) {
    let is_good = |report: &EchoReport| {
        matches!(
            report,
            EchoReport::Decided { verdict: Verdict::Ok, .. }
                | EchoReport::Sent { .. }
                | EchoReport::Ipdv(_)
                | EchoReport::Unsent(_)
                | EchoReport::LossyFlows(_)
        )
    };
    let other = reports.iter().find(|report| !is_good(report));
    assert_eq!(other, None, "{what}");
    let sent = count(reports, |report| matches!(report, EchoReport::Sent { .. }));
    assert!(sent > 0 && verdicts(reports).count() as u64 == sent, "{what}: {sent} were sent");
}

/// Every request is answered, and both timestamps are the kernel's, for every kind of socket and of timestamp
/// matching.
pub(crate) fn timestamps() {
    let ways = [TimestampMatching::detect(), TimestampMatching::ByPayload];
    for permission in PING_OR_RAW {
        let namespace = Namespace::new("timestamps");
        for (to, timestamps) in LOOPBACK.into_iter().flat_map(|to| ways.map(|timestamps| (to, timestamps))) {
            let what = format!("{permission:?} {to} {timestamps:?}");
            // The kernel starts timestamping a moment after the first request for it.
            eventually(&format!("kernel timestamps: {what}"), || {
                let (sources, reports) = permission.within(&namespace, || {
                    let mut prober = RunningLoop::start(timestamps);
                    prober.add(1, spec(to, 4, Duration::from_millis(5), Some(40)));
                    let sources = prober.started();
                    assert!(matches!(prober.event(), LoopEvent::Finished(_)), "{what}");
                    (sources, prober.end(Duration::ZERO))
                });
                let identifiers: BTreeSet<u16> = sources.iter().map(SocketAddr::port).collect();
                assert!(identifiers.len() == 4 && !identifiers.contains(&0), "{what}: {sources:?}");
                assert_all_ok(&reports, &what);
                let by_kernel = (TimestampSource::Kernel, TimestampSource::Kernel);
                let timestamped = |sample: RoundTrip| (sample.transmit, sample.receive) == by_kernel;
                verdicts(&reports).all(|(_, sample)| sample.is_some_and(timestamped)).then_some(())
            });
        }
    }
}

/// Without permission for any ICMP socket, the error names the remedy.
pub(crate) fn not_permitted() {
    let namespace = Namespace::new("closed");
    for to in LOOPBACK {
        let (error, groups) = SocketPermission::Nothing.within(&namespace, || {
            let mut prober = RunningLoop::start(TimestampMatching::ByPayload);
            prober.add(1, spec(to, 1, Duration::from_millis(5), Some(1)));
            let LoopEvent::NotStarted { reason, .. } = prober.event() else {
                panic!("a path started without permission")
            };
            prober.end(Duration::ZERO);
            (reason, fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap())
        });
        let groups = groups.split_whitespace().collect::<Vec<_>>().join(" ");
        let group = nix::unistd::getegid();
        let expected = format!(
            "group {group} may not open ICMP sockets (net.ipv4.ping_group_range is \"{groups}\"): run sysctl -w \
             net.ipv4.ping_group_range='0 2147483647' or grant CAP_NET_RAW"
        );
        assert_eq!(error, expected);
    }
}

/// A thousand hosts share a socket, and each path gets its own replies.
pub(crate) fn thousand_hosts() {
    const HOSTS: u64 = 1_000;
    const SLOTS: u64 = 3;
    for permission in PING_OR_RAW {
        let namespace = Namespace::new("thousand");
        let (sources, dropped, reports) = permission.within(&namespace, || {
            let mut prober = RunningLoop::start(TimestampMatching::detect());
            for number in 0..HOSTS {
                let [high, low] = u16::try_from(number + 256).unwrap().to_be_bytes();
                let to = IpAddr::from([127, 77, high, low]);
                let spec = spec(to, 1, Duration::from_secs(1), Some(SLOTS));
                prober.add(number, EchoSpec { seed: number, ..spec });
            }
            let (mut sources, mut finished) = (BTreeSet::new(), 0);
            while finished < HOSTS {
                let event = prober.event();
                if let LoopEvent::Started { sources: found, .. } = event {
                    sources.extend(found);
                } else {
                    assert!(matches!(event, LoopEvent::Finished(_)), "{event:?}");
                    finished += 1;
                }
            }
            let dropped = prober.handle.series().rx_dropped.get();
            (sources, dropped, prober.end(Duration::ZERO))
        });
        assert_eq!(sources.len(), 1, "{permission:?}");
        let is_mismatched =
            |report: &EchoReport| matches!(report, EchoReport::Mismatched(_) | EchoReport::Duplicate);
        assert_eq!(count(&reports, is_mismatched), 0, "{permission:?}");
        let ok = verdicts(&reports).filter(|(verdict, _)| *verdict == Verdict::Ok).count() as u64;
        let blamed =
            verdicts(&reports).filter(|(verdict, _)| *verdict == Verdict::HostDropped).count() as u64;
        let sent = count(&reports, |report| matches!(report, EchoReport::Sent { .. }));
        // A machine that does not run for a while may drop datagrams and skip slots: that is not loss.
        assert!(
            ok + blamed == sent && blamed <= dropped,
            "{permission:?}: {ok} and {blamed} of {sent}, {dropped}"
        );
        assert!(ok > HOSTS, "{permission:?}: {ok}");
    }
}

/// Opens a raw socket, as another program would.
fn raw_socket(to: IpAddr) -> Socket {
    let (domain, protocol) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    Socket::new(domain, Type::RAW, Some(protocol)).unwrap()
}

/// An echo as another program could send it.
fn echo_datagram(version: IcmpVersion, kind: u8, identifier: u16, payload: u8) -> Vec<u8> {
    let mut echo = vec![payload; 64];
    echo[..8].fill(0);
    echo[0] = kind;
    echo[4..6].copy_from_slice(&identifier.to_be_bytes());
    if version == IcmpVersion::V4 {
        let words = echo.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum: u32 = words.sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
        echo[2..4].copy_from_slice(&checksum.to_be_bytes());
    }
    echo
}

/// Echoes of other programs are ignored, even with the identifiers of a path.
pub(crate) fn other_programs() {
    for (permission, to) in PING_OR_RAW.into_iter().flat_map(|permission| LOOPBACK.map(|to| (permission, to)))
    {
        let namespace = Namespace::new("others");
        let version = IcmpVersion::of(to);
        let raw = namespace.within(|| raw_socket(to));
        let (sources_tx, identifiers) = channel::<Vec<SocketAddr>>();
        let reports = thread::scope(|scope| {
            scope.spawn(move || {
                let ours = identifiers.recv().expect("it has started");
                let target = SocketAddr::new(to, 0).into();
                // Until the other thread has finished.
                while identifiers.try_recv() != Err(TryRecvError::Disconnected) {
                    for (source, payload) in ours.iter().zip(0..) {
                        for kind in [version.request(), version.reply()] {
                            for identifier in [source.port(), source.port() ^ 1] {
                                let echo = echo_datagram(version, kind, identifier, payload);
                                raw.send_to(&echo, &target).unwrap();
                            }
                        }
                    }
                    thread::sleep(Duration::from_millis(2));
                }
            });
            permission.within(&namespace, move || {
                let mut prober = RunningLoop::start(TimestampMatching::detect());
                prober.add(1, spec(to, 2, Duration::from_millis(5), Some(100)));
                sources_tx.send(prober.started()).unwrap();
                assert!(matches!(prober.event(), LoopEvent::Finished(_)));
                prober.end(Duration::ZERO)
            })
        });
        assert_all_ok(&reports, &format!("{permission:?} {to}"));
    }
}

/// A flood of plausible replies overflows the socket: datagrams that the host then drops are not loss.
pub(crate) fn flooded() {
    const FLOOD: usize = 20_000;
    for (permission, to) in PING_OR_RAW.into_iter().flat_map(|permission| LOOPBACK.map(|to| (permission, to)))
    {
        let namespace = Namespace::new("flooded");
        let what = format!("{permission:?} {to}");
        let raw = namespace.within(|| raw_socket(to));
        let reports = permission.within(&namespace, || {
            let mut prober = RunningLoop::start(TimestampMatching::detect());
            let spec = spec(to, 1, Duration::from_millis(5), None);
            let series = prober.add(1, EchoSpec { lost_after: Duration::from_millis(500), ..spec });
            let source = prober.started()[0];
            let version = IcmpVersion::of(to);
            let mut echo = Vec::new();
            IcmpEcho { session: 1, timestamp: NtpTime(2), sequence: 3, ssid: 0 }
                .encode(version, 64, &mut echo);
            icmp::identify(&mut echo, source.port());
            let mut echo_reply = echo_datagram(version, version.reply(), source.port(), 0);
            echo_reply[8..].copy_from_slice(&echo[8..]);
            echo_reply[6..8].copy_from_slice(&echo[6..8]);
            if version == IcmpVersion::V4 {
                // What remains of the checksum covers type and identifier.
                echo_reply[2..4].copy_from_slice(&(!source.port()).to_be_bytes());
            }
            // A loop that reads as fast as it is flooded drops nothing, so it gets the lowest priority.
            lower_priority("pm-prober");
            let cores = thread::available_parallelism().map_or(1, usize::from);
            eventually(&format!("drops: {what}"), || {
                thread::scope(|scope| {
                    for _ in 0..cores {
                        scope.spawn(|| {
                            for _ in 0..FLOOD {
                                raw.send_to(&echo_reply, &SocketAddr::new(to, 0).into()).unwrap();
                            }
                        });
                    }
                });
                (prober.handle.series().rx_dropped.get() > 0).then_some(())
            });
            let sent = series.sent.get();
            eventually("some more", || (series.sent.get() > sent + 20).then_some(()));
            prober.end(Duration::from_secs(2))
        });
        let lost =
            count(&reports, |report| matches!(report, EchoReport::Decided { verdict: Verdict::Lost(_), .. }));
        assert_eq!(lost, 0, "{what}");
    }
}

/// Gives the threads of that name in this process the lowest priority.
fn lower_priority(name: &str) {
    for thread in fs::read_dir("/proc/self/task").unwrap().map(|entry| entry.unwrap().path()) {
        // A thread that has ended has no name.
        if fs::read_to_string(thread.join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            let id = thread.file_name().unwrap();
            let status =
                Command::new("renice").args(["-n", "19", "-p"]).arg(id).stdout(Stdio::null()).status();
            assert!(status.unwrap().success());
        }
    }
}

/// A link with every kind of impairment.
fn bad_link() -> Link {
    let mut link = Link::perfect(5 * MS);
    link.jitter = Jitter::Uniform(20 * MS);
    link.loss = Loss::Random(0.08);
    link.duplicates = 0.1;
    link.corruption = (0.03, Corruption::Detected);
    link
}

/// The reports equal the true counts of a lossy wire, and no loss has a direction.
pub(crate) fn lossy() {
    const FLOWS: usize = 3;
    const BAD: u64 = 400;
    for (permission, is_v4) in
        PING_OR_RAW.into_iter().flat_map(|permission| [true, false].map(|is_v4| (permission, is_v4)))
    {
        let net = NetPlan::pair().build(11 + u64::from(is_v4));
        let to = if is_v4 { net.v4("b") } else { net.v6("b") };
        let what = format!("{permission:?} {to}");
        let wire = net.wire("a", "b");
        wire.set_links(&bad_link(), &bad_link());
        let reports = permission.within(net.node("a"), || {
            let mut prober = RunningLoop::start(TimestampMatching::detect());
            let spec = spec(to, FLOWS, Duration::from_millis(5), None);
            let series = prober
                .add(1, EchoSpec { late_after: LATE_AFTER, lost_after: LOST_AFTER, size: Some(100), ..spec });
            assert_eq!(prober.started().len(), FLOWS);
            eventually("enough on a bad link", || (series.sent.get() > BAD).then_some(()));
            wire.set_links(&Link::perfect(0), &Link::perfect(0));
            // Wait until every request that met the impaired link has its verdict and all copies have
            // arrived.
            let sent = series.sent.get();
            eventually("verdicts", || (series.decided() > sent).then_some(()));
            prober.end(LOST_AFTER)
        });
        let [prober, responder] = if is_v4 { [net.v4("a"), to] } else { [net.v6("a"), to] };
        let rules = Rules {
            prober,
            responder: (responder, 0).into(),
            format: EchoFormat::Icmp,
            late_after: LATE_AFTER,
            lost_after: LOST_AFTER,
            hidden_routers: [0, 0],
        };
        let echoes = Echoes::read(&[vec![wire]], &rules);
        assert_eq!(echoes.flows(&rules).len(), FLOWS, "{what}: one identifier for each flow");
        compare(&reports, &echoes.counts(&rules), &what);
        wire.read(|log| {
            let requests = log.iter().filter(|entry| entry.direction == WireDirection::Forward);
            let heads = requests.map(|entry| &entry.head.datagram).filter(|datagram| datagram.echo.is_some());
            let bytes = if is_v4 { 120 } else { 140 };
            for datagram in heads {
                assert_eq!((datagram.tos, datagram.ttl, datagram.bytes), (46 << 2, 255, bytes), "{what}");
            }
        });
    }
}

fn compare(reports: &[EchoReport], truth: &TrueCounts, what: &str) {
    let decided = |verdict| verdicts(reports).filter(|(found, _)| *found == verdict).count() as u64;
    let reported = |is: fn(&EchoReport) -> bool| count(reports, is);
    let counts = [
        reported(|report| matches!(report, EchoReport::Sent { .. })),
        decided(Verdict::Ok),
        decided(Verdict::Late),
        decided(Verdict::Lost(Direction::Unknown)),
        reported(|report| matches!(report, EchoReport::Duplicate)),
        reported(|report| matches!(report, EchoReport::Reordered)),
        reported(|report| matches!(report, EchoReport::VeryLate)),
        reported(|report| matches!(report, EchoReport::BurstBegan)),
        reported(|report| matches!(report, EchoReport::Ipdv(_))),
        reported(|report| matches!(report, EchoReport::Mismatched(_))),
    ];
    let lost = truth.lost_forward + truth.lost_reverse;
    let TrueCounts { sent, ok, late, duplicates, reordered, very_late, bursts, consecutive_ok, .. } = *truth;
    let names = "sent, ok, late, lost, duplicates, reordered, very late, bursts, neighbours, mismatched";
    let truth_counts = [sent, ok, late, lost, duplicates, reordered, very_late, bursts, consecutive_ok, 0];
    assert_eq!(counts, truth_counts, "{what}: {names}");
    let is_bad =
        [truth.lost_forward, truth.lost_reverse, duplicates, reordered].iter().all(|count| *count > 0);
    assert!(is_bad, "{what}: the wire had no effect: {truth:?}");
    let round_trips: u64 = verdicts(reports).filter_map(|(_, sample)| Some(nanos(sample?.rtt))).sum();
    // As in scenarios: tolerance for a kernel that does not run on time.
    let permission = sent * 20_000 + 300_000_000 + truth.round_trips_uncertainty;
    let off = round_trips.abs_diff(truth.round_trips);
    assert!(off <= permission, "{what}: round trips are {off} ns off in all");
}

/// ICMP errors of a router are counted and give no direction.
pub(crate) fn refused() {
    for (permission, is_v4) in
        PING_OR_RAW.into_iter().flat_map(|permission| [true, false].map(|is_v4| (permission, is_v4)))
    {
        let net = NetPlan::chain(1).build(5);
        let to = if is_v4 { net.v4("b") } else { net.v6("b") };
        net.node("r1").ip(&match to {
            IpAddr::V4(to) => format!("route add prohibit {to}/32\n"),
            IpAddr::V6(to) => format!("route add prohibit {to}/128\n"),
        });
        let reports = permission.within(net.node("a"), || {
            let mut prober = RunningLoop::start(TimestampMatching::detect());
            let spec = spec(to, 2, Duration::from_millis(10), None);
            let series = prober.add(1, EchoSpec { lost_after: Duration::from_millis(300), ..spec });
            // For IPv4 a router sends five errors in a row, and then one per second.
            eventually("errors and losses", || {
                let errors: u64 = series.icmp_errors().map(|(_, count)| count).sum();
                (errors >= 5 && series.lost()[2] >= 20).then_some(())
            });
            assert_eq!(series.lost()[..2], [0, 0], "{permission:?} {to}");
            prober.started();
            prober.end(Duration::ZERO)
        });
        let other = reports
            .iter()
            .find(|report| matches!(report, EchoReport::Icmp(kind) if *kind != IcmpKind::Prohibited));
        assert_eq!(other, None, "{permission:?} {to}");
    }
}
