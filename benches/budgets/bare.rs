//! Loops that make the system calls of a prober and of a responder, without their logic.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::agent::target;
use super::batch::{Batch, Timestamps, address, socket, socket_at, wait};
use super::load;
use super::process::cpu_of_this_thread;

/// CPU time per echo in microseconds.
pub(crate) fn per_echo(cpu: Duration, echoes: f64) -> f64 {
    cpu.as_secs_f64() * 1e6 / echoes
}

const BATCH: usize = 64;

/// Pause between two rounds of the prober.
const TICK: Duration = Duration::from_millis(5);

/// Probes `paths` addresses once a second each over UDP, with both kernel timestamps of every datagram.
/// Returns the CPU time per echo in microseconds.
pub(crate) fn probe(paths: u32, port: u16, span: Duration) -> io::Result<f64> {
    let first = load::sessions(paths);
    let requests = (first..first + paths).map(|session| load::request(session, 0)).collect();
    // The reply returns the datagram's number in the field of T1, which the bare loop does not use.
    probe_with(
        &socket(Timestamps::Both)?,
        requests,
        FieldOffsets { sequence: 0, number: 4, number_back: 28 },
        port,
        span,
    )
}

/// Offsets: of the sequence number and of the datagram's number in a request, and of the latter in a reply.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FieldOffsets {
    pub(crate) sequence: usize,
    pub(crate) number: usize,
    pub(crate) number_back: usize,
}

/// [`probe`] with other requests, one for each address.
pub(crate) fn probe_with(
    socket: &UdpSocket,
    mut requests: Vec<Vec<u8>>,
    places: FieldOffsets,
    port: u16,
    span: Duration,
) -> io::Result<f64> {
    let paths = u32::try_from(requests.len()).map_err(io::Error::other)?;
    let FieldOffsets { sequence, number, number_back } = places;
    let (mut outbox, mut inbox) = (Batch::new(BATCH), Batch::new(BATCH));
    // T1 by datagram number, and the sum of all T4 − T1.
    let (mut left, mut spent, mut timestamped, mut answered) = (Vec::<u64>::new(), 0_u64, 0_u32, 0_u32);
    let (before, begin) = (cpu_of_this_thread(), Instant::now());
    let mut sent = 0_u32;
    while begin.elapsed() < span {
        let due = begin.elapsed().as_secs_f64() * f64::from(paths);
        while f64::from(sent) < due {
            let mut count = 0;
            while count < BATCH && f64::from(sent) < due {
                let path = sent % paths;
                let request = &mut requests[path as usize];
                request[sequence..sequence + 4].copy_from_slice(&(sent / paths).to_be_bytes());
                request[number..number + 4].copy_from_slice(&sent.to_be_bytes());
                outbox.put(count, SocketAddrV4::new(target(path), port), request);
                (count, sent) = (count + 1, sent + 1);
                left.push(0);
            }
            outbox.send(socket, count);
        }
        std::thread::sleep(TICK);
        drain(&mut inbox, socket, libc::MSG_ERRQUEUE, |inbox, index| {
            let kernel_info = inbox.kernel_info(index);
            if let (Some(timestamp), Some(number)) = (kernel_info.timestamp, kernel_info.number) {
                left[number as usize] = timestamp;
                timestamped += 1;
            }
        });
        drain(&mut inbox, socket, 0, |inbox, index| {
            let number = inbox.bytes(index)[number_back..number_back + 4].try_into().expect("four bytes");
            let t1 = left.get(u32::from_be_bytes(number) as usize).copied().unwrap_or(0);
            spent += inbox.kernel_info(index).timestamp.unwrap_or(0).saturating_sub(t1);
            answered += 1;
        });
    }
    std::hint::black_box((spent, timestamped));
    Ok(per_echo(cpu_of_this_thread() - before, f64::from(answered)))
}

fn drain(inbox: &mut Batch, socket: &UdpSocket, flags: libc::c_int, mut take: impl FnMut(&Batch, usize)) {
    loop {
        let count = inbox.receive(socket, flags);
        (0..count).for_each(|index| take(inbox, index));
        if count < BATCH {
            return;
        }
    }
}

/// A thread that sends every datagram back.
pub(crate) struct BareResponder {
    pub(crate) address: SocketAddrV4,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl BareResponder {
    /// Starts on 127.0.0.1.
    pub(crate) fn start() -> io::Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST)
    }

    pub(crate) fn start_at(at: Ipv4Addr) -> io::Result<Self> {
        let socket = socket_at(at, Timestamps::Received)?;
        let address = address(&socket)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || echo(&socket, &stopped));
        Ok(Self { address, stop, thread })
    }

    /// Stops it and returns the CPU time per echo in microseconds.
    pub(crate) fn finish(self) -> f64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the loop does not panic")
    }
}

fn echo(socket: &UdpSocket, stopped: &AtomicBool) -> f64 {
    let mut batch = Batch::new(BATCH);
    let (before, mut echoes) = (cpu_of_this_thread(), 0_u32);
    while !stopped.load(Ordering::Relaxed) {
        let count = batch.receive(socket, 0);
        if count == 0 {
            wait(socket, Duration::from_millis(50));
            continue;
        }
        for index in 0..count {
            std::hint::black_box(batch.kernel_info(index).timestamp);
        }
        echoes += u32::try_from(batch.send(socket, count)).expect("at most a batch");
    }
    per_echo(cpu_of_this_thread() - before, f64::from(echoes))
}
