//! The thread that sends and receives the load of runs over UDP.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use pathmeter_proto::bandwidth::StopReason;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::load::{LoadReceiver, LoadSender, LoadStep};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::load::LoadResult;
use tokio::sync::{Notify, oneshot};

use super::socket::LoadSocket;
use crate::clock::Clock;

/// The thread. It starts when it is first needed, and ends with the process.
#[derive(Debug, Default)]
pub(in crate::bulk) struct LoadThread {
    running: Mutex<Option<Running>>,
}

#[derive(Debug, Clone)]
struct Running {
    commands: mpsc::Sender<Flow>,
    wakeup: Arc<EventFd>,
}

/// A load in progress. Dropping it ends the load.
#[derive(Debug)]
pub(in crate::bulk) struct LoadFlow {
    shared: Arc<Shared>,
    wakeup: Arc<EventFd>,
    result: Option<oneshot::Receiver<ReceivedLoad>>,
}

/// What a receiver has measured when a load ends.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::bulk) struct ReceivedLoad {
    /// Results for the prober.
    pub(in crate::bulk) result: LoadResult,
    /// From the first arrival to the last.
    pub(in crate::bulk) span: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes of payload that were sent, or received without duplicates.
    bytes: AtomicU64,
    bytes_with_duplicates: AtomicU64,
    congestion_marks: AtomicU64,
    has_dropped: AtomicBool,
    is_stopped: AtomicBool,
    /// Why a sender has ended.
    ended: Mutex<Option<io::Result<StopReason>>>,
    notify: Notify,
}

/// Batches that a flow sends or reads before others have their turn. Chosen: about half a millisecond.
const BATCHES_PER_TURN: u32 = 16;

/// A load ends after so many sends in a row that failed, a millisecond apart.
const ERRORS_MAX: u32 = 20;

/// A load ends when its receiver has refused so many datagrams: its socket is closed, whatever the connection
/// says. Hosts report only a few of them. Chosen: somebody else may have forged one.
const REFUSALS_MAX: u32 = 5;

/// Most that the thread sleeps.
const SLEEP_MAX: Duration = Duration::from_secs(3_600);

impl LoadThread {
    /// Begins to send through a socket.
    pub(in crate::bulk) fn send(
        &self,
        socket: UdpSocket,
        lease: LeaseId,
        sender: LoadSender,
    ) -> io::Result<LoadFlow> {
        let role = Role::Sender { sender: Box::new(sender), is_blocked: false, errors: 0, refusals: 0 };
        self.start(LoadSocket::sender(socket, lease)?, role, None)
    }

    /// Begins to receive from a socket.
    pub(in crate::bulk) fn receive(&self, socket: UdpSocket, lease: LeaseId) -> io::Result<LoadFlow> {
        let (report, result) = oneshot::channel();
        let role = Role::Receiver(Receiver {
            load: LoadReceiver::default(),
            first: None,
            last: Timestamp::default(),
            report: Some(report),
        });
        self.start(LoadSocket::receiver(socket, lease), role, Some(result))
    }

    fn start(
        &self,
        socket: LoadSocket,
        role: Role,
        result: Option<oneshot::Receiver<ReceivedLoad>>,
    ) -> io::Result<LoadFlow> {
        let running = self.running()?;
        let shared = Arc::new(Shared::default());
        let flow = Flow { socket, role, shared: Arc::clone(&shared) };
        running.commands.send(flow).map_err(|_| io::Error::other("the thread for loads has ended"))?;
        wake(&running.wakeup);
        Ok(LoadFlow { shared, wakeup: running.wakeup, result })
    }

    fn running(&self) -> io::Result<Running> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = running.as_ref() {
            return Ok(running.clone());
        }
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wakeup = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let (commands, flows) = mpsc::channel();
        let woken = Arc::clone(&wakeup);
        std::thread::Builder::new().name("pm-bulk-load".to_owned()).spawn(move || run(&flows, &woken))?;
        let new = Running { commands, wakeup };
        *running = Some(new.clone());
        Ok(new)
    }
}

impl LoadFlow {
    /// Bytes of payload that were sent, or received without duplicates.
    pub(in crate::bulk) fn bytes(&self) -> u64 {
        self.shared.bytes.load(Relaxed)
    }

    /// The same with duplicates.
    pub(in crate::bulk) fn bytes_with_duplicates(&self) -> u64 {
        self.shared.bytes_with_duplicates.load(Relaxed)
    }

    /// Datagrams that a router has marked because of congestion.
    pub(in crate::bulk) fn congestion_marks(&self) -> u64 {
        self.shared.congestion_marks.load(Relaxed)
    }

    /// Whether this host has dropped datagrams of the load.
    pub(in crate::bulk) fn has_dropped(&self) -> bool {
        self.shared.has_dropped.load(Relaxed)
    }

    /// Waits until a sender has sent everything. Can be cancelled without loss.
    pub(in crate::bulk) async fn ended(&self) -> io::Result<StopReason> {
        loop {
            let notified = self.shared.notify.notified();
            if let Some(ended) = self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return ended;
            }
            notified.await;
        }
    }

    /// Ends the load at once. Returns what a receiver has measured.
    pub(in crate::bulk) async fn stop(&mut self) -> Option<ReceivedLoad> {
        self.end();
        self.result.take()?.await.ok()
    }

    fn end(&self) {
        self.shared.is_stopped.store(true, Relaxed);
        wake(&self.wakeup);
    }
}

impl Drop for LoadFlow {
    fn drop(&mut self) {
        self.end();
    }
}

fn wake(wakeup: &EventFd) {
    // A write fails only if the counter is full, and then the wakeup is already pending.
    let _ = wakeup.write(1);
}

/// A load of the thread.
#[derive(Debug)]
struct Flow {
    socket: LoadSocket,
    role: Role,
    shared: Arc<Shared>,
}

#[derive(Debug)]
enum Role {
    Sender {
        sender: Box<LoadSender>,
        /// Whether the kernel has no room.
        is_blocked: bool,
        /// Sends that failed since the last one that did not.
        errors: u32,
        /// Datagrams that the receiver has refused (ICMP port unreachable).
        refusals: u32,
    },
    Receiver(Receiver),
}

#[derive(Debug)]
struct Receiver {
    load: LoadReceiver,
    first: Option<Timestamp>,
    last: Timestamp,
    report: Option<oneshot::Sender<ReceivedLoad>>,
}

/// When a flow has something to do again.
enum NextTurn {
    /// At once.
    Now,
    /// At this time, or when the kernel has something for it.
    At(Timestamp),
    /// It has ended.
    Never,
}

fn run(commands: &mpsc::Receiver<Flow>, wakeup: &EventFd) {
    // Without it, sleeps are up to 50 µs longer.
    let _ = crate::datagram::sleep_precisely();
    let mut flows: Vec<Flow> = Vec::new();
    loop {
        let _ = wakeup.read();
        flows.extend(commands.try_iter());
        let mut next = Clock::now() + SLEEP_MAX;
        flows.retain_mut(|flow| match flow.turn() {
            NextTurn::Now => {
                next = Timestamp::default();
                true
            }
            NextTurn::At(until) => {
                next = next.min(until);
                true
            }
            NextTurn::Never => {
                flow.end();
                false
            }
        });
        sleep(&flows, wakeup, next.since(Clock::now()));
    }
}

/// Sleeps until a socket can be read, or written if the kernel had no room.
fn sleep(flows: &[Flow], wakeup: &EventFd, span: Duration) {
    let of_flow = |flow: &Flow| match flow.role {
        Role::Sender { is_blocked: false, .. } => PollFlags::empty(),
        Role::Sender { is_blocked: true, .. } => PollFlags::POLLOUT,
        Role::Receiver(_) => PollFlags::POLLIN,
    };
    let mut all = vec![PollFd::new(wakeup.as_fd(), PollFlags::POLLIN)];
    all.extend(
        flows
            .iter()
            .map(|flow| (flow, of_flow(flow)))
            .filter(|(_, flags)| !flags.is_empty())
            .map(|(flow, flags)| PollFd::new(flow.socket.as_fd(), flags)),
    );
    // An error is an interruption; the next turn finds out what there is to do.
    let _ = ppoll(&mut all, Some(TimeSpec::from_duration(span)), None);
}

impl Flow {
    fn turn(&mut self) -> NextTurn {
        if self.shared.is_stopped.load(Relaxed) {
            return NextTurn::Never;
        }
        match &mut self.role {
            Role::Sender { sender, is_blocked, errors, refusals } => {
                for _ in 0..BATCHES_PER_TURN {
                    match sender.step(Clock::now()) {
                        LoadStep::Wait(until) => {
                            *is_blocked = false;
                            return NextTurn::At(until);
                        }
                        LoadStep::Finished(reason) => {
                            self.finish(Ok(reason));
                            return NextTurn::Never;
                        }
                        LoadStep::Send { first, count } => match self.socket.send(first, count) {
                            Ok(0) => {
                                *is_blocked = true;
                                return NextTurn::At(Clock::now() + FULL_RETRY_INTERVAL);
                            }
                            Ok(accepted) => {
                                sender.sent(accepted, Clock::now());
                                *errors = 0;
                                self.shared.bytes.store(sender.bytes(), Relaxed);
                                self.shared.bytes_with_duplicates.store(sender.bytes(), Relaxed);
                            }
                            // It may be the answer of a router, or of somebody, to an earlier datagram.
                            Err(error) => {
                                *errors += 1;
                                *refusals += u32::from(error.kind() == io::ErrorKind::ConnectionRefused);
                                if *errors < ERRORS_MAX && *refusals < REFUSALS_MAX {
                                    return NextTurn::At(Clock::now() + FULL_RETRY_INTERVAL);
                                }
                                self.finish(Err(error));
                                return NextTurn::Never;
                            }
                        },
                    }
                }
                *is_blocked = false;
                NextTurn::Now
            }
            Role::Receiver(receiver) => {
                let Receiver { load, first, last, .. } = receiver;
                let mut on_load = |head, bytes, ecn, at| {
                    first.get_or_insert(at);
                    *last = at.max(*last);
                    load.received(head, bytes, ecn, at);
                };
                // An error is that of an ICMP message, and does not concern what arrives.
                let has_more =
                    (0..BATCHES_PER_TURN).all(|_| self.socket.receive(&mut on_load).unwrap_or(true));
                self.shared.bytes.store(load.bytes(), Relaxed);
                self.shared.bytes_with_duplicates.store(load.bytes_with_duplicates(), Relaxed);
                self.shared.congestion_marks.store(load.congestion_marks().into(), Relaxed);
                if self.socket.has_dropped() {
                    self.shared.has_dropped.store(true, Relaxed);
                }
                if has_more { NextTurn::Now } else { NextTurn::At(Timestamp::NEVER) }
            }
        }
    }

    fn finish(&self, outcome: io::Result<StopReason>) {
        *self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.shared.notify.notify_one();
    }

    /// Reports what a receiver has measured.
    fn end(&mut self) {
        if let Role::Receiver(receiver) = &mut self.role {
            let Receiver { load, first, last, report } = receiver;
            let result = load.result(self.socket.has_dropped());
            let span = first.map(|first| last.since(first)).unwrap_or_default();
            // The run may have been dropped.
            let _ = report.take().map(|report| report.send(ReceivedLoad { result, span }));
        }
    }
}

/// When a full kernel is tried again, at the latest: an interface without room does not wake the thread.
const FULL_RETRY_INTERVAL: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use pathmeter_proto::load::Pattern;
    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A steady load of a minute to a socket that is open as long as the second result lives.
    fn steady() -> (LoadFlow, UdpSocket, LoadThread) {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(receiver.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let (thread, pattern) = (LoadThread::default(), Pattern::Steady { bytes_per_second: 100_000 });
        let sender = LoadSender::new(pattern, u64::MAX, None, LONG, Clock::now());
        let flow = thread.send(socket, LeaseId(1), sender).unwrap();
        (flow, receiver, thread)
    }

    #[tokio::test]
    async fn load_ends_when_its_receiver_is_gone_whatever_else_is_heard() {
        let (flow, receiver, _thread) = steady();
        let mut arrived = [0; 2_000];
        receiver.recv(&mut arrived).unwrap();
        drop(receiver);
        let ended = timeout(LONG / 2, flow.ended()).await.expect("it ends before its time");
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn dropped_load_sends_no_more() {
        let (flow, receiver, _thread) = steady();
        let mut arrived = [0; 2_000];
        receiver.recv(&mut arrived).unwrap();
        drop(flow);
        // What was sent before the thread has seen it still arrives.
        receiver.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let deadline = Clock::now() + LONG / 2;
        while receiver.recv(&mut arrived).is_ok() {
            assert!(Clock::now() < deadline, "it goes on");
        }
    }
}
