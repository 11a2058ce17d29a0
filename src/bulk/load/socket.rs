//! A UDP socket that carries the load of one run.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::sockopt::{IpRecvTos, Ipv6RecvTClass, RcvBufForce, ReceiveTimestampns, UdpGroSegment};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
};
use nix::sys::time::TimeSpec;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::load::{BATCH_MAX, DATAGRAM_BYTES};
use pathmeter_proto::time::{Timestamp, WallTime};
use pathmeter_proto::wire::load::{Load, TrainPlace};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::clock::Clock;
use crate::datagram::drop_counter;

/// Requested size of the receive buffer in bytes. Chosen: 30 ms at 1 Gbit/s.
const BUFFER_BYTES: usize = 4 << 20;

/// Most that is read at once: a buffer of datagrams that the kernel has merged.
const READ_BYTES: usize = 65_536;

/// Datagrams that are discarded when a socket has been connected. Chosen: more than arrive in a microsecond.
const ARRIVED_BETWEEN_MAX: u32 = 64;

/// Datagrams that a host must drop to be the limit. Chosen: one batch of a sender.
const DROPS_MIN: u32 = 50;

/// ECN-capable transport (RFC 3168): routers may mark instead of dropping, and the run ends when they do.
const ECT_0: u8 = 0b10;

/// How a socket receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bulk) enum Reception {
    /// Each datagram with the time of its arrival.
    Single,
    /// Datagrams that arrive together are merged, and have one time (UDP GRO).
    Merged,
}

/// Opens a socket of the prober, connected to the agent port.
pub(in crate::bulk) fn open(
    to: SocketAddr,
    source: Option<IpAddr>,
    dscp: Dscp,
    reception: Reception,
) -> io::Result<UdpSocket> {
    let socket = new_socket(to, dscp, reception)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    socket.connect(&to.into())?;
    Ok(socket.into())
}

/// The sockets of the agent port, whose port the sockets of runs share.
#[derive(Debug, Default)]
pub struct SharedPort {
    sockets: Mutex<Vec<OwnedFd>>,
}

impl SharedPort {
    /// Adds a socket of the agent port.
    ///
    /// # Errors
    /// This process has no descriptor left.
    pub fn add(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let socket = socket.try_clone_to_owned()?;
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        Ok(())
    }

    /// Binds a socket to the port. Only meanwhile others may be bound to it: any program of this host could
    /// otherwise receive what is sent to the agent port.
    fn bind(&self, socket: &Socket, local: SocketAddr) -> io::Result<()> {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let share =
            |is_shared| sockets.iter().try_for_each(|one| SockRef::from(one).set_reuse_address(is_shared));
        socket.set_reuse_address(true)?;
        let bound = share(true).and_then(|()| socket.bind(&local.into()));
        let ended = share(false);
        bound.and(ended)
    }
}

/// Opens a socket of the responder: it has the address and the port of the agent port, but receives only from
/// `prober`.
pub(in crate::bulk) fn open_for(
    port: &SharedPort,
    local: SocketAddr,
    prober: SocketAddr,
    dscp: Dscp,
    reception: Reception,
) -> io::Result<UdpSocket> {
    let socket = new_socket(prober, dscp, reception)?;
    port.bind(&socket, local)?;
    socket.connect(&prober.into())?;
    let socket = UdpSocket::from(socket);
    // What arrived between the two calls may be from others; more than this is read and ignored later.
    for _ in 0..ARRIVED_BETWEEN_MAX {
        if socket.recv(&mut [0; 1]).is_err() {
            break;
        }
    }
    Ok(socket)
}

fn new_socket(peer: SocketAddr, dscp: Dscp, reception: Reception) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(peer), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    let tos = u32::from(dscp.tos() | ECT_0);
    // Best effort: the larger buffer needs a privilege.
    let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
    let _ = setsockopt(&socket, RcvBufForce, &BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(BUFFER_BYTES);
    if peer.is_ipv4() {
        socket.set_tos_v4(tos)?;
        setsockopt(&socket, IpRecvTos, &true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_tclass_v6(tos)?;
        setsockopt(&socket, Ipv6RecvTClass, &true)?;
    }
    // From now on, because the load may arrive before its receiver has begun. Without timestamps this
    // process's clock is used.
    let _ = setsockopt(&socket, ReceiveTimestampns, &true);
    if reception == Reception::Merged {
        // Older kernels do not merge.
        let _ = setsockopt(&socket, UdpGroSegment, &true);
    }
    Ok(socket)
}

/// A connected socket and its buffers.
#[derive(Debug)]
pub(super) struct LoadSocket {
    socket: UdpSocket,
    lease: LeaseId,
    /// Datagrams of random bytes, so that no link compresses them; or what was read.
    buffer: Vec<u8>,
    control: Vec<u8>,
    /// Whether the kernel cuts a buffer into datagrams (UDP GSO).
    cuts: bool,
    clock: Clock,
    /// The kernel's drop counter when the load began.
    drops_before: u32,
    /// When the socket was last seen empty.
    empty_at: Timestamp,
}

impl LoadSocket {
    pub(super) fn sender(socket: UdpSocket, lease: LeaseId) -> io::Result<Self> {
        let mut buffer = vec![0; usize::from(BATCH_MAX) * DATAGRAM_BYTES];
        getrandom::fill(&mut buffer).map_err(io::Error::other)?;
        Ok(Self::new(socket, lease, buffer))
    }

    pub(super) fn receiver(socket: UdpSocket, lease: LeaseId) -> Self {
        Self::new(socket, lease, vec![0; READ_BYTES])
    }

    fn new(socket: UdpSocket, lease: LeaseId, buffer: Vec<u8>) -> Self {
        let drops_before = drop_counter(&socket).unwrap_or(0);
        let control = cmsg_space!(TimeSpec, i32, i32);
        let empty_at = Clock::now();
        Self { socket, lease, buffer, control, cuts: true, clock: Clock::new(), drops_before, empty_at }
    }

    /// Sends `count` datagrams, the first of which has this head. Returns how many the kernel has accepted:
    /// zero if it has no room.
    pub(super) fn send(&mut self, first: Load, count: u16) -> io::Result<u16> {
        let count = count.min(BATCH_MAX);
        for (index, datagram) in (0..count).zip(self.buffer.chunks_exact_mut(DATAGRAM_BYTES)) {
            let place = first.place.map(|place| TrainPlace { position: place.position + index, ..place });
            let load = Load { sequence: first.sequence.wrapping_add(index.into()), place, ..first };
            load.write(self.lease, datagram);
        }
        if self.cuts && count > 1 {
            let segment = u16::try_from(DATAGRAM_BYTES).expect("1,200");
            let cut = [ControlMessage::UdpGsoSegments(&segment)];
            match self.send_bytes(usize::from(count) * DATAGRAM_BYTES, &cut) {
                Ok(true) => return Ok(count),
                Ok(false) => return Ok(0),
                // The kernel or the interface cannot.
                Err(
                    Errno::EIO | Errno::EINVAL | Errno::EMSGSIZE | Errno::EOPNOTSUPP | Errno::ENOPROTOOPT,
                ) => {
                    self.cuts = false;
                }
                Err(error) => return Err(error.into()),
            }
        }
        for sent in 0..count {
            let bytes = usize::from(sent) * DATAGRAM_BYTES..usize::from(sent + 1) * DATAGRAM_BYTES;
            match self.socket.send(&self.buffer[bytes]) {
                Ok(_) => {}
                Err(error) if sent > 0 || is_full(&error) => return Ok(sent),
                Err(error) => return Err(error),
            }
        }
        Ok(count)
    }

    /// Whether the kernel has accepted the first bytes of the buffer.
    fn send_bytes(&self, length: usize, control: &[ControlMessage<'_>]) -> Result<bool, Errno> {
        let parts = [IoSlice::new(&self.buffer[..length])];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<SockaddrStorage>(self.socket.as_raw_fd(), &parts, control, flags, None) {
            Ok(_) => Ok(true),
            Err(error) if is_full(&error.into()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads once. `on_load` gets the head of each datagram of the load, its length, its ECN bits, and when
    /// it arrived. Returns whether there was anything to read.
    pub(super) fn receive(
        &mut self,
        mut on_load: impl FnMut(Load, usize, u8, Timestamp),
    ) -> io::Result<bool> {
        let read_at = Clock::now();
        let mut parts = [IoSliceMut::new(&mut self.buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let control = Some(self.control.as_mut_slice());
        let message = match recvmsg::<SockaddrStorage>(self.socket.as_raw_fd(), &mut parts, control, flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN) => {
                self.empty_at = read_at;
                return Ok(false);
            }
            Err(Errno::EINTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        let (length, mut segment, mut ecn, mut timestamp) = (message.bytes, None, 0, None);
        for entry in message.cmsgs()? {
            #[expect(clippy::wildcard_enum_match_arm, reason = "the kernel may add others")]
            match entry {
                ControlMessageOwned::ScmTimestampns(time) => timestamp = wall_time(time),
                ControlMessageOwned::UdpGroSegments(bytes) => segment = usize::try_from(bytes).ok(),
                ControlMessageOwned::Ipv4Tos(tos) => ecn = tos & 0b11,
                ControlMessageOwned::Ipv6TClass(class) => ecn = u8::try_from(class & 0b11).unwrap_or(0),
                _ => {}
            }
        }
        let now = Clock::now();
        let arrived = timestamp.map_or(now, |timestamp| {
            self.clock.read();
            self.clock.monotonic_of(timestamp, self.empty_at, now)
        });
        let segment = segment.filter(|segment| *segment > 0).unwrap_or_else(|| length.max(1));
        for datagram in self.buffer[..length].chunks(segment) {
            if let Ok(load) = Load::read(datagram, self.lease) {
                on_load(load, datagram.len(), ecn, arrived);
            }
        }
        Ok(true)
    }

    /// Whether this host has dropped datagrams of the load, because they were read too slowly. The kernel
    /// counts damaged ones too, so a few say nothing.
    pub(super) fn has_dropped(&self) -> bool {
        drop_counter(&self.socket).is_some_and(|drops| drops.wrapping_sub(self.drops_before) >= DROPS_MIN)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether the kernel has no room for a datagram now.
fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS))
}

fn wall_time(time: TimeSpec) -> Option<WallTime> {
    let seconds = u64::try_from(time.tv_sec()).ok()?;
    Some(WallTime::from_nanos(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).ok()?))
}
