//! Error of round trips when the host is busy. The true round trip on loopback is a few microseconds, so
//! nearly all of a long one is error.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pathmeter::datagram::{self, SourceChoice, TimestampMatching};
use pathmeter::echo::DatagramEcho;
use pathmeter::loops::{EVENTS_PENDING_MAX, NewPath};
use pathmeter::metrics::echo::EchoSeries;
use pathmeter::paths::PathId;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{EchoReport, EchoSpec, Quirks, WireFormat};
use pathmeter_proto::stats::quantile;

use super::agent::{BenchAgent, NO_PATHS};
use super::batch::{Batch, Timestamps, address, socket, wait};
use super::process::wall;
use super::report::{Row, cores};

/// More than the 10,000 needed for p99.9.
const PROBES: u32 = 11_000;
const INTERVAL: Duration = Duration::from_millis(1);
/// Longest time without a report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
const SETTLED: Duration = Duration::from_millis(500);
const BUSY_LOOPS_PER_CORE: usize = 2;

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let responder = BenchAgent::start(NO_PATHS)?;
    let mut rows = round("idle", &responder, None)?;
    let busy_loops = BusyLoops::start(BUSY_LOOPS_PER_CORE * cores());
    rows.extend(round("two busy loops a core", &responder, Some(20.0))?);
    drop(busy_loops);
    Ok(rows)
}

fn round(name: &str, responder: &BenchAgent, budget_of_tail: Option<f64>) -> io::Result<Vec<Row>> {
    let ours = ours(responder.stamp_port)?;
    let bare = bare()?;
    let unsent = f64::from(u32::try_from(ours.unsent).map_err(io::Error::other)?);
    let unsent = unsent * 100.0 / (unsent + f64::from(PROBES));
    let mut rows = vec![Row::new(format!("slots of 1 ms that went unsent, {name}"), unsent, "%")];
    for (q, called) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")] {
        let us = |sorted: &[Duration]| quantile(sorted, q).map_or(f64::NAN, |rtt| rtt.as_secs_f64() * 1e6);
        let row =
            Row::new(format!("RTT {called}, {name}"), us(&ours.round_trips), "µs").bare(us(&bare.kernel));
        rows.push(match budget_of_tail {
            Some(budget) if called == "p99.9" => row.budget(budget),
            Some(_) | None => row,
        });
        rows.push(Row::new(
            format!("… bare loop with user-space timestamps, {called}"),
            us(&bare.user),
            "µs",
        ));
    }
    Ok(rows)
}

/// Results of pathmeter's loop.
struct AgentLoop {
    /// Sorted.
    round_trips: Vec<Duration>,
    /// Slots missed because the host was busy.
    unsent: u64,
}

fn ours(port: u16) -> io::Result<AgentLoop> {
    let (sender, mut events) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
    let prober = datagram::spawn("bench", Vec::new(), TimestampMatching::detect(), sender)?;
    let (tap, reports) = mpsc::channel();
    let echo = DatagramEcho {
        path_mtu: None,
        spec: EchoSpec {
            to: (Ipv4Addr::LOCALHOST, port).into(),
            wire: WireFormat::Stamp { keys: None, quirks: Quirks::default() },
            interval: INTERVAL,
            ssids: vec![0],
            size: None,
            dscp: Dscp::default(),
            late_after: Duration::from_secs(1),
            lost_after: Duration::from_secs(3),
            tx_timestamps: true,
            count: None,
            seed: 1,
        },
        source: SourceChoice { address: Ipv4Addr::UNSPECIFIED.into(), port: 0, dont_fragment: false },
        series: Arc::new(EchoSeries::new("bench", "loopback", "ipv4", 1)),
        reports: Some(tap),
        followed: Arc::default(),
    };
    prober.start(NewPath { id: PathId(1), task: echo.into_task(), peer_left_at: None });
    let mut found = AgentLoop { round_trips: Vec::new(), unsent: 0 };
    while found.round_trips.len() < PROBES as usize {
        match reports.recv_timeout(REPORT_TIMEOUT) {
            Ok(EchoReport::Decided { sample: Some(sample), .. }) => found.round_trips.push(sample.rtt),
            Ok(EchoReport::Unsent(slots)) => found.unsent += slots,
            Ok(_) => {}
            Err(_) => return Err(io::Error::other(format!("nothing is measured: {:?}", events.try_recv()))),
        }
    }
    prober.stop(Duration::ZERO);
    found.round_trips.sort_unstable();
    Ok(found)
}

/// Sorted round trips of the bare loop: with kernel timestamps, and with user-space timestamps, as a tool
/// without kernel timestamps would measure them.
#[derive(Default)]
struct BareLoop {
    kernel: Vec<Duration>,
    user: Vec<Duration>,
}

/// The datagram: its number, then the responder's timestamps.
///
/// ```text
/// 0 u64 number   8 u64 T2 by the kernel   16 u64 T2 by the user   24 u64 T3 by the user
/// ```
const NOTE_BYTES: usize = 32;

fn bare() -> io::Result<BareLoop> {
    let responder = TimestampingResponder::start()?;
    let socket = socket(Timestamps::Both)?;
    let (mut outbox, mut inbox) = (Batch::new(1), Batch::new(16));
    let (mut t1, mut t1_user) = (Vec::new(), Vec::new());
    let mut notes: Vec<([u64; 4], u64, u64)> = Vec::new();
    let begin = Instant::now();
    for number in 0..=PROBES {
        let due = INTERVAL * number;
        while let Some(left) = due.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
            wait(&socket, left);
            read_tx_timestamps(&mut inbox, &socket, &mut t1);
            for index in 0..inbox.receive(&socket, 0) {
                let arrived = wall();
                notes.push((
                    read_note(inbox.bytes(index)),
                    inbox.kernel_info(index).timestamp.unwrap_or(0),
                    arrived,
                ));
            }
        }
        let mut note = [0; NOTE_BYTES];
        note[..8].copy_from_slice(&u64::from(number).to_be_bytes());
        outbox.put(0, responder.address, &note);
        t1.push(0);
        t1_user.push(wall());
        outbox.send(&socket, 1);
    }
    std::thread::sleep(SETTLED);
    read_tx_timestamps(&mut inbox, &socket, &mut t1);
    let mut found = BareLoop::default();
    for ([number, t2, t2_user, t3_user], t4, t4_user) in notes {
        let at = usize::try_from(number).map_err(io::Error::other)?;
        let rtt = |t1: u64, t2, t4: u64| t4.saturating_sub(t1).saturating_sub(t3_user.saturating_sub(t2));
        found.kernel.push(Duration::from_nanos(rtt(t1[at], t2, t4)));
        found.user.push(Duration::from_nanos(rtt(t1_user[at], t2_user, t4_user)));
    }
    responder.finish();
    found.kernel.sort_unstable();
    found.user.sort_unstable();
    Ok(found)
}

fn read_tx_timestamps(inbox: &mut Batch, socket: &UdpSocket, t1: &mut [u64]) {
    for index in 0..inbox.receive(socket, libc::MSG_ERRQUEUE) {
        let kernel_info = inbox.kernel_info(index);
        if let (Some(timestamp), Some(number)) = (kernel_info.timestamp, kernel_info.number) {
            t1[number as usize] = timestamp;
        }
    }
}

fn read_note(bytes: &[u8]) -> [u64; 4] {
    std::array::from_fn(|at| u64::from_be_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes")))
}

/// A bare responder that writes its timestamps into the datagram.
struct TimestampingResponder {
    address: SocketAddrV4,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl TimestampingResponder {
    fn start() -> io::Result<Self> {
        let socket = socket(Timestamps::Received)?;
        let address = address(&socket)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut batch = Batch::new(1);
            while !stopped.load(Ordering::Relaxed) {
                wait(&socket, Duration::from_millis(50));
                while batch.receive(&socket, 0) > 0 {
                    let (t2, t2_user) = (batch.kernel_info(0).timestamp.unwrap_or(0), wall());
                    for (at, time) in [(8, t2), (16, t2_user), (24, wall())] {
                        batch.bytes_mut(0)[at..at + 8].copy_from_slice(&time.to_be_bytes());
                    }
                    batch.send(&socket, 1);
                }
            }
        });
        Ok(Self { address, stop, thread })
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the loop does not panic");
    }
}

/// Busy threads. They end when this is dropped.
struct BusyLoops {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl BusyLoops {
    fn start(count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let burn = || {
            let stopped = Arc::clone(&stop);
            std::thread::spawn(move || while !stopped.load(Ordering::Relaxed) {})
        };
        Self { threads: (0..count).map(|_| burn()).collect(), stop }
    }
}

impl Drop for BusyLoops {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A busy thread cannot fail.
            let _ = thread.join();
        }
    }
}
