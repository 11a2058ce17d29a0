//! A cable with a simulated link in it.
//!
//! A thread between two packet sockets receives each frame from one end, asks the link for its outcome, and
//! sends the copies at the other end when they are due. Hosts still get the kernel's own timestamps, taken
//! where frames leave and enter their namespaces.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::IoSliceMut;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::time::{ClockId, clock_gettime};
use pathmeter_proto::sim::{Corruption, Delivery, Dropped, Link, Packet, Random};

use crate::frame::{Datagram, TCP, UDP};
use crate::namespace::Namespace;
use crate::offload;
use crate::wire_router::WireRouter;

/// Direction of a datagram on a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WireDirection {
    /// From the first end to the second.
    Forward,
    /// From the second end to the first.
    Reverse,
}

impl WireDirection {
    fn opposite(self) -> Self {
        match self {
            Self::Forward => Self::Reverse,
            Self::Reverse => Self::Forward,
        }
    }
}

/// The log entry of one datagram. Times are CLOCK_REALTIME, in nanoseconds.
#[derive(Debug, Clone)]
pub struct LogEntry {
    /// Direction.
    pub direction: WireDirection,
    /// When it entered, by the kernel's receive timestamp.
    pub at: u64,
    /// Addresses, header fields and first payload bytes.
    pub head: DatagramHead,
    /// Whole payload of a TCP segment; `None` for other datagrams and for empty segments.
    pub tcp_payload: Option<Box<[u8]>>,
    /// The delivered copies, or why it was dropped.
    pub outcome: Result<[Option<DeliveredCopy>; 2], Dropped>,
}

/// The logged part of a datagram.
#[derive(Debug, Clone, Copy)]
pub struct DatagramHead {
    /// Addresses, lengths and header fields on entry.
    pub datagram: Datagram,
    /// First bytes of the payload, padded with zeros: enough for a STAMP packet and the head of its first
    /// extension.
    pub payload: [u8; 128],
}

/// A delivered copy of a datagram.
#[derive(Debug, Clone, Copy)]
pub struct DeliveredCopy {
    /// When it was delivered, between two clock readings; `None` while it is in flight.
    pub delivered_at: Option<(u64, u64)>,
    /// The offset of the damaged payload byte, and whether a checksum reveals the damage.
    pub damage: Option<(usize, Corruption)>,
    /// Type of service on delivery.
    pub tos: u8,
    /// Time to live on delivery.
    pub ttl: u8,
}

/// A running wire.
#[derive(Debug)]
pub struct Wire {
    shared: Arc<Shared>,
    wakeup: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    is_over: AtomicBool,
}

#[derive(Debug)]
struct State {
    links: [Link; 2],
    /// One generator per direction: traffic in one direction does not affect the outcomes in the other.
    random: [Random; 2],
    /// Routers inside, in forward direction.
    routers: Vec<WireRouter>,
    log: Vec<LogEntry>,
    /// UDP datagrams and ICMP echoes that entered, by direction.
    entered: [usize; 2],
    /// Frames that the kernel dropped before they were received, or refused to send. If there are any, the
    /// log is incomplete.
    missed: u64,
}

impl Wire {
    /// Starts a wire, with a perfect link without delay, between two interfaces of a namespace.
    #[must_use]
    pub fn new(namespace: &Namespace, ends: [&str; 2], seed: u64) -> Self {
        let ends = namespace.within(|| ends.map(WireEnd::open));
        let wakeup = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap());
        let state = State {
            links: [Link::perfect(0), Link::perfect(0)],
            random: [Random::new(seed), Random::new(!seed)],
            routers: Vec::new(),
            log: Vec::new(),
            entered: [0; 2],
            missed: 0,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), is_over: AtomicBool::new(false) });
        let forwarder = Forwarder {
            ends,
            shared: Arc::clone(&shared),
            wakeup: Arc::clone(&wakeup),
            queue: BinaryHeap::new(),
            frame_count: 0,
        };
        let thread = namespace.spawn(move || forwarder.run());
        Self { shared, wakeup, thread: Some(thread) }
    }

    /// Changes both links from the next datagram on. Datagrams in flight are not affected.
    pub fn set_links(&self, forward: &Link, reverse: &Link) {
        let mut state = self.shared.state.lock().unwrap();
        state.links[0].replace_with(forward);
        state.links[1].replace_with(reverse);
    }

    /// Puts routers into the wire, in forward direction, from the next datagram on. They answer datagrams
    /// over UDP and TCP and ICMP echoes whose TTL ends there, which are not logged.
    pub fn set_routers(&self, routers: Vec<WireRouter>) {
        self.shared.state.lock().unwrap().routers = routers;
    }

    /// The number of UDP datagrams and ICMP echoes that entered so far in one direction.
    #[must_use]
    pub fn entered(&self, direction: WireDirection) -> usize {
        self.shared.state.lock().unwrap().entered[direction as usize]
    }

    /// Reads the log so far, in order of entry. Frames wait meanwhile.
    ///
    /// # Panics
    /// When the kernel dropped a frame at the wire or refused to send one: the log is then incomplete.
    pub fn read<T>(&self, read_log: impl FnOnce(&[LogEntry]) -> T) -> T {
        let state = self.shared.state.lock().unwrap();
        assert_eq!(state.missed, 0, "the kernel dropped frames at the wire: the log is incomplete");
        read_log(&state.log)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Relaxed);
        let _ = self.wakeup.write(1);
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// The state of the forwarding thread.
struct Forwarder {
    ends: [WireEnd; 2],
    shared: Arc<Shared>,
    wakeup: Arc<EventFd>,
    /// By due time, then by order of entry.
    queue: BinaryHeap<Reverse<QueuedFrame>>,
    /// The number of frames numbered so far.
    frame_count: u64,
}

/// A copy in flight.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct QueuedFrame {
    due: u64,
    number: u64,
    direction: WireDirection,
    /// Index in the log, and which copy; `None` if not logged.
    entry: Option<(usize, usize)>,
    frame: Vec<u8>,
}

impl Forwarder {
    fn run(mut self) {
        raise_priority();
        let mut buffer = vec![0; FRAME_BYTES];
        while !self.shared.is_over.load(Relaxed) {
            self.wait();
            for (end, direction) in [(0, WireDirection::Forward), (1, WireDirection::Reverse)] {
                while let Some((length, at)) = self.ends[end].receive(&mut buffer) {
                    self.accept(direction, at, &buffer[..length]);
                    // Due frames do not wait until a full queue is read.
                    self.send_due();
                }
                let missed = self.ends[end].take_drops();
                if missed > 0 {
                    self.shared.state.lock().unwrap().missed += missed;
                }
            }
            self.send_due();
        }
    }

    fn wait(&self) {
        let until = self.queue.peek().map(|Reverse(next)| next.due.saturating_sub(now()));
        let timeout = until.map(|span| TimeSpec::nanoseconds(i64::try_from(span).unwrap()));
        let [first, second] = &self.ends;
        let poll_in = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut all =
            [poll_in(first.socket.as_fd()), poll_in(second.socket.as_fd()), poll_in(self.wakeup.as_fd())];
        match ppoll(&mut all, timeout, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => panic!("waiting for frames: {error}"),
        }
    }

    fn accept(&mut self, direction: WireDirection, at: u64, frame: &[u8]) {
        let mut number = || {
            self.frame_count += 1;
            self.frame_count
        };
        let Some(datagram) = Datagram::find(frame) else {
            // Neighbour discovery and multicast pass unchanged and unlogged.
            let queued =
                QueuedFrame { due: at, number: number(), direction, entry: None, frame: frame.to_vec() };
            self.queue.push(Reverse(queued));
            return;
        };
        let mut head = DatagramHead { datagram, payload: [0; 128] };
        for (to, from) in head.payload.iter_mut().zip(datagram.payload(frame)) {
            *to = *from;
        }
        let mut state = self.shared.state.lock().unwrap();
        let State { links, random, routers, log, entered, .. } = &mut *state;
        let mut passed = datagram.ttl;
        if !routers.is_empty() && passes_routers(&datagram) {
            if let Some(router) = expires_at(routers, direction, datagram.ttl) {
                let (direction, frame) = (direction.opposite(), router.time_exceeded(frame, &datagram));
                let answer = QueuedFrame { due: at, number: number(), direction, entry: None, frame };
                self.queue.push(Reverse(answer));
                return;
            }
            passed -= u8::try_from(routers.len()).expect("the TTL has not ended");
        }
        let packet = Packet { bytes: datagram.bytes, tos: datagram.tos, ttl: passed };
        entered[direction as usize] += usize::from(datagram.protocol == UDP || datagram.echo.is_some());
        let outcome = links[direction as usize].pass(&mut random[direction as usize], at, packet);
        let entry = log.len();
        let mut schedule_copy = |delivery: Delivery, copy: usize| {
            let mut frame = frame.to_vec();
            let byte = datagram.apply_delivery(&mut frame, &delivery);
            let entry = Some((entry, copy));
            self.queue.push(Reverse(QueuedFrame {
                due: delivery.at,
                number: number(),
                direction,
                entry,
                frame,
            }));
            let damage = byte.zip(delivery.damage.map(|(_, who)| who));
            DeliveredCopy { delivered_at: None, damage, tos: delivery.tos, ttl: delivery.ttl }
        };
        let outcome = outcome.map(|[first, second]| {
            [
                first.map(|delivery| schedule_copy(delivery, 0)),
                second.map(|delivery| schedule_copy(delivery, 1)),
            ]
        });
        let is_carried = datagram.segment.is_some() && datagram.payload_bytes() > 0;
        let tcp_payload = is_carried.then(|| datagram.payload(frame).into());
        log.push(LogEntry { direction, at, head, tcp_payload, outcome });
    }

    fn send_due(&mut self) {
        while self.queue.peek().is_some_and(|Reverse(next)| next.due <= now()) {
            let Some(Reverse(queued)) = self.queue.pop() else { return };
            let end = &self.ends[usize::from(queued.direction == WireDirection::Forward)];
            let before = now();
            let is_out = end.send(&queued.frame);
            let after = now();
            let mut state = self.shared.state.lock().unwrap();
            state.missed += u64::from(!is_out);
            if let Some((entry, copy)) = queued.entry
                && let Ok(copies) = &mut state.log[entry].outcome
                && let Some(exit) = &mut copies[copy]
            {
                exit.delivered_at = Some((before, after));
            }
        }
    }
}

/// Whether the routers of a wire lower the TTL of a datagram. They ignore the errors of each other.
fn passes_routers(datagram: &Datagram) -> bool {
    [UDP, TCP].contains(&datagram.protocol) || datagram.echo.is_some()
}

/// The router at which this TTL ends; `None` if it suffices for all.
fn expires_at(routers: &[WireRouter], direction: WireDirection, ttl: u8) -> Option<&WireRouter> {
    let index = usize::from(ttl.max(1)) - 1;
    match direction {
        WireDirection::Forward => routers.get(index),
        WireDirection::Reverse => routers.iter().rev().nth(index),
    }
}

/// The longest frame: an Ethernet header and the longest IP datagram.
const FRAME_BYTES: usize = 65_549;

/// Frames wait here while this process does not run.
const RECEIVE_BUFFER: usize = 64 << 20;

/// Sent frames wait for the receiving processor. Chosen: more than its backlog of 1,000 longest frames.
const SEND_BUFFER: usize = 32 << 20;

/// One end of a wire: a packet socket that receives everything on its interface except what it sends.
struct WireEnd {
    socket: OwnedFd,
}

impl WireEnd {
    fn open(interface: &str) -> Self {
        offload::disable(interface);
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            // Receive nothing before the socket is bound to its interface.
            None::<SockProtocol>,
        )
        .unwrap();
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).unwrap();
        // Exceeding the limit of ordinary sockets needs privilege; without it the limit applies.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER).unwrap();
        }
        if setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER).unwrap();
        }
        bind(&socket, interface);
        Self { socket }
    }

    /// Receives the next frame: its length in `buffer` and its timestamp. `None` if there is none.
    fn receive(&self, buffer: &mut [u8]) -> Option<(usize, u64)> {
        let mut control = nix::cmsg_space!(TimeSpec);
        let mut parts = [IoSliceMut::new(buffer)];
        let read = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty());
        let message = match read {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return None,
            Err(error) => panic!("reading a frame: {error}"),
        };
        let timestamp = message.cmsgs().unwrap().find_map(|message| {
            let ControlMessageOwned::ScmTimestampns(at) = message else { return None };
            Some(nanos(at))
        });
        Some((message.bytes, timestamp.expect("the kernel timestamps frames of a packet socket")))
    }

    fn send(&self, frame: &[u8]) -> bool {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).is_ok()
    }

    /// The number of frames dropped for lack of buffer space since the last call.
    #[expect(unsafe_code, reason = "PACKET_STATISTICS has no safe wrapper")]
    fn take_drops(&self) -> u64 {
        let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = libc::socklen_t::try_from(size_of_val(&statistics)).unwrap();
        // SAFETY: the descriptor is open, and the structure is as long as `length` says.
        let outcome = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut length,
            )
        };
        assert_eq!(outcome, 0, "asking a packet socket for its statistics");
        statistics.tp_drops.into()
    }
}

#[expect(unsafe_code, reason = "nix makes no link-layer addresses")]
fn bind(socket: &OwnedFd, interface: &str) {
    let index = nix::net::if_::if_nametoindex(interface).unwrap();
    // SAFETY: all zeros is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = i32::try_from(index).unwrap();
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the address is a filled sockaddr_ll of the stated length.
    let outcome = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(outcome, 0, "binding to {interface}: {}", std::io::Error::last_os_error());
}

/// Requests precise wake-ups, and real-time scheduling where allowed: a delay here is a delay of the link.
#[expect(unsafe_code, reason = "two system calls without a safe wrapper")]
fn raise_priority() {
    // SAFETY: prctl with plain numbers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_usize) };
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: a live sched_param. Refused without privilege; the log then shows how late frames were.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}

fn now() -> u64 {
    nanos(clock_gettime(ClockId::CLOCK_REALTIME).unwrap())
}

fn nanos(time: TimeSpec) -> u64 {
    u64::try_from(time.num_nanoseconds()).unwrap()
}

impl DatagramHead {
    /// Length of the payload in bytes.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.datagram.payload_bytes()
    }
}
