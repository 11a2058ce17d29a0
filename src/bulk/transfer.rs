//! Sends and receives the payload of a run on one data connection.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::sendfile::sendfile;
use nix::sys::socket::{MsgFlags, recv};
use pathmeter_proto::bandwidth::rate_cap::{RateCap, WINDOW};
use pathmeter_proto::dscp::Dscp;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::clock::Clock;
use crate::datagram::set_socket_option;

/// Bytes of a run, shared by its connections.
#[derive(Debug)]
pub(super) struct ByteCount {
    /// Bytes that were sent or received.
    done: AtomicU64,
    /// Bytes that may still be sent.
    left: AtomicU64,
    /// The limit of the rate, and the bytes that are passed to the kernel at once; `None`: no limit.
    rate: Option<(Mutex<RateCap>, u64)>,
}

impl ByteCount {
    /// No bytes yet, and at most `max`, at `rate_max` bytes per second.
    pub(super) fn new(max: u64, rate_max: Option<u64>) -> Self {
        let rate = rate_max.map(|rate_max| {
            let cap = RateCap::new(rate_max, RATE_BURST, Clock::now());
            // Parts of a window of two segments, or larger ones at high rates.
            let parts = cap.window_bytes().div_ceil(2_800).clamp(4, 50);
            let at_once = (cap.window_bytes() / parts).clamp(1, CHUNK);
            (Mutex::new(cap), at_once)
        });
        Self { done: AtomicU64::new(0), left: AtomicU64::new(max), rate }
    }

    /// Waits until `wanted` bytes, or fewer, are within the rate. Returns how many.
    async fn within_rate(&self, wanted: u64) -> u64 {
        let Some((cap, at_once)) = &self.rate else { return wanted };
        let wanted = wanted.min(*at_once);
        loop {
            let now = Clock::now();
            let taken = cap.lock().unwrap_or_else(PoisonError::into_inner).take(now, wanted);
            match taken {
                Ok(()) => return wanted,
                Err(again) => {
                    let wait = again.map_or(WINDOW, |again| again.since(now));
                    tokio::time::sleep(wait.max(Duration::from_millis(1))).await;
                }
            }
        }
    }

    /// Bytes that were sent or received.
    pub(super) fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Takes up to `wanted` of the bytes that are left.
    fn take(&self, wanted: u64) -> u64 {
        let take = |left: u64| Some(left - left.min(wanted));
        let left = self.left.fetch_update(Relaxed, Relaxed, take).unwrap_or(0);
        left.min(wanted)
    }

    fn give_back(&self, bytes: u64) {
        self.left.fetch_add(bytes, Relaxed);
    }
}

/// How far ahead of its rate a run passes bytes to the kernel, which paces them. Chosen: timers of the
/// runtime are up to 2 ms late.
const RATE_BURST: Duration = Duration::from_millis(10);

/// Bytes of one system call. Chosen: more than the send buffer takes, and a fraction of a millisecond of
/// copying.
const CHUNK: u64 = 1 << 20;

/// The payload: pages of a file in memory, which the kernel sends without copying them.
static FILLER: OnceLock<OwnedFd> = OnceLock::new();

const FILLER_BYTES: usize = 1 << 20;

thread_local! {
    /// Where received bytes would be copied to. The kernel discards them instead and does not touch it.
    static DISCARDED: RefCell<Vec<u8>> = RefCell::new(vec![0; FILLER_BYTES]);
}

/// Sets the DSCP of a connection.
pub(super) fn set_dscp(socket: &impl AsFd, is_v4: bool, dscp: Dscp) -> io::Result<()> {
    let (socket, tos) = (SockRef::from(socket), u32::from(dscp.tos()));
    if is_v4 { socket.set_tos_v4(tos) } else { socket.set_tclass_v6(tos) }
}

/// Bytes that the kernel accepts before it sends them. Chosen: measured on a pair of virtual interfaces, a
/// smaller limit costs up to a third more processor time; what is left at the end of a run is discarded.
const UNSENT_MAX: libc::c_int = 4 << 20;

/// Sets what a data connection sends: it is one of `connections` that may send `rate_max` bytes per second
/// together.
pub(super) fn limit(stream: &TcpStream, rate_max: Option<u64>, connections: u16) -> io::Result<()> {
    set_socket_option(stream, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, UNSENT_MAX)?;
    let Some(rate_max) = rate_max else { return Ok(()) };
    // The kernel paces the connection. Beyond 2 GB/s the limit does not apply.
    let share = libc::c_int::try_from((rate_max / u64::from(connections.max(1))).max(1));
    share.map_or(Ok(()), |share| set_socket_option(stream, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, share))
}

/// Sends payload until the bytes of the run are used up, and then ends the direction.
pub(super) async fn send(stream: &TcpStream, bytes: &ByteCount) -> io::Result<()> {
    let filler = match FILLER.get() {
        Some(filler) => filler,
        None => {
            // Another connection may have made one meanwhile.
            let new = filler()?;
            FILLER.get_or_init(|| new)
        }
    };
    let mut offset = 0_usize;
    // Bytes that are within the rate and were not sent yet.
    let mut allowed = 0;
    loop {
        if allowed == 0 {
            allowed = bytes.within_rate(CHUNK).await;
        }
        let taken = bytes.take(allowed.min((FILLER_BYTES - offset) as u64));
        if taken == 0 {
            return SockRef::from(stream).shutdown(std::net::Shutdown::Write);
        }
        let mut at = i64::try_from(offset).expect("less than a MiB");
        let length = usize::try_from(taken).expect("at most a MiB");
        let sent = stream.try_io(Interest::WRITABLE, || {
            Ok(sendfile(stream.as_fd(), filler.as_fd(), Some(&mut at), length)?)
        });
        let count = *sent.as_ref().unwrap_or(&0) as u64;
        bytes.done.fetch_add(count, Relaxed);
        bytes.give_back(taken - count);
        allowed -= count;
        match sent {
            Ok(count) => {
                offset = (offset + count) % FILLER_BYTES;
                // Others of this thread are not delayed by a fast connection.
                tokio::task::yield_now().await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives and discards payload until the other end has sent everything.
pub(super) async fn receive(stream: &TcpStream, bytes: &ByteCount) -> io::Result<()> {
    let mut allowed = 0;
    loop {
        if allowed == 0 {
            allowed = bytes.within_rate(CHUNK).await;
        }
        let most = usize::try_from(allowed).expect("at most a MiB");
        let received = stream.try_io(Interest::READABLE, || {
            DISCARDED.with_borrow_mut(|buffer| {
                Ok(recv(
                    stream.as_raw_fd(),
                    &mut buffer[..most],
                    MsgFlags::MSG_TRUNC | MsgFlags::MSG_DONTWAIT,
                )?)
            })
        });
        match received {
            Ok(0) => return Ok(()),
            Ok(count) => {
                bytes.done.fetch_add(count as u64, Relaxed);
                allowed -= count as u64;
                tokio::task::yield_now().await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A file in memory with random bytes, so that no link compresses them.
fn filler() -> io::Result<OwnedFd> {
    let file = memfd_create("pathmeter-payload", MFdFlags::MFD_CLOEXEC)?;
    let mut bytes = vec![0; FILLER_BYTES];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    let mut file = std::fs::File::from(file);
    io::Write::write_all(&mut file, &bytes)?;
    Ok(file.into())
}
