//! One attempt to connect with a limited TTL.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use pathmeter_proto::machine::{IcmpError, TimestampSource};
use pathmeter_proto::time::{Timestamp, WallTime};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::super::kernel;
use crate::clock::Clock;
use crate::datagram::{icmp_error, set_icmp_extensions};

/// A socket that is connecting.
#[derive(Debug)]
pub(super) struct SynProbe(TcpStream);

/// What became of a probe.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The destination accepted or refused the connection.
    Reached { at: Timestamp, by: TimestampSource },
    /// A router or host rejected the segment.
    Expired {
        /// When the ICMP error arrived; `None` if the kernel does not say.
        timestamp: Option<WallTime>,
        sent_at: Timestamp,
        icmp: IcmpError,
        /// What the router attached to the error; empty if nothing.
        extensions: Vec<u8>,
    },
    /// There was no answer, or the host itself has failed.
    Nothing,
}

/// Time after which a probe is closed. The kernel would send its segment again after a second (RFC 6298).
const LIFETIME: Duration = Duration::from_millis(950);

/// Bytes of an ICMP error that are read. Routers send no more than 576 bytes (RFC 1812 section 4.3.2.3); what
/// is cut off has an invalid checksum.
const ERROR_BYTES: usize = 576;

impl SynProbe {
    /// Sends a segment with SYN. Returns the probe and its local address, which has the port of `source`, or
    /// a free one if that is 0.
    ///
    /// # Errors
    /// The socket cannot be opened, or the segment was not sent.
    pub(super) fn start(
        to: SocketAddr,
        source: SocketAddr,
        ttl: u8,
        tos: u8,
    ) -> io::Result<(Self, SocketAddr)> {
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(to), kind, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        // An established connection is closed with a reset, so that its ports can be used again at once.
        socket.set_linger(Some(Duration::ZERO))?;
        match to {
            SocketAddr::V4(_) => {
                socket.set_ttl_v4(ttl.into())?;
                socket.set_tos_v4(tos.into())?;
                setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
            }
            SocketAddr::V6(_) => {
                socket.set_unicast_hops_v6(ttl.into())?;
                socket.set_tclass_v6(tos.into())?;
                setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
                // Without this each socket has a flow label of its own, and may take another route.
                kernel::disable_flow_label(&socket)?;
            }
        }
        // Best effort: without it labels and interfaces are not shown.
        let _ = set_icmp_extensions(&socket, to.is_ipv4(), true);
        // Best effort: without kernel timestamps this process reads the clock.
        let _ = kernel::request_rx_timestamps(&socket);
        socket.bind(&source.into())?;
        let local = socket.local_addr()?.as_socket().unwrap_or(source);
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            // Without any delay on the way, the answer is already there.
            Err(error) if is_answer(&error) => {}
            Err(error) => return Err(error),
        }
        Ok((Self(TcpStream::from_std(socket.into())?), local))
    }

    /// Waits for the outcome. The socket is closed then.
    pub(super) async fn outcome(self, sent_at: Timestamp) -> Outcome {
        timeout(LIFETIME, self.answered(sent_at)).await.unwrap_or(Outcome::Nothing)
    }

    async fn answered(&self, sent_at: Timestamp) -> Outcome {
        let (stream, interest) = (&self.0, Interest::WRITABLE | Interest::ERROR);
        while stream.ready(interest).await.is_ok() {
            if let Some(expired) = read_error(stream, sent_at) {
                return expired;
            }
            match stream.take_error() {
                Ok(None) if stream.peer_addr().is_ok() => {
                    let rtt = kernel::tcp_info(stream).map_or(0, |info| info.rtt);
                    return match Duration::from_micros(rtt) {
                        Duration::ZERO => Outcome::Reached { at: Clock::now(), by: TimestampSource::User },
                        rtt => Outcome::Reached { at: sent_at + rtt, by: TimestampSource::Kernel },
                    };
                }
                // Still connecting: clears the readiness.
                Ok(None) => drop(stream.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()))),
                Ok(Some(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Outcome::Reached { at: Clock::now(), by: TimestampSource::User };
                }
                // An ICMP error that arrived since the queue was read.
                Ok(Some(_)) => return read_error(stream, sent_at).unwrap_or(Outcome::Nothing),
                Err(_) => return Outcome::Nothing,
            }
        }
        Outcome::Nothing
    }
}

/// Whether this error of `connect` is an answer from the network.
fn is_answer(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNREFUSED))
}

/// The ICMP error on the error queue.
fn read_error(socket: &TcpStream, sent_at: Timestamp) -> Option<Outcome> {
    let mut control = [0; kernel::CONTROL_BYTES];
    let mut bytes = [0; ERROR_BYTES];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags).ok()?;
    let length = received.bytes;
    let (mut timestamp, mut icmp) = (None, None);
    for message in received.cmsgs().into_iter().flatten() {
        timestamp = timestamp.or_else(|| kernel::timestamp_of(&message));
        if let ControlMessageOwned::Ipv4RecvErr(error, Some(offender)) = &message {
            let router = u32::from_be(offender.sin_addr.s_addr).to_be_bytes().into();
            icmp = icmp.or_else(|| icmp_error(error, router));
        }
        if let ControlMessageOwned::Ipv6RecvErr(error, Some(offender)) = &message {
            let router = offender.sin6_addr.s6_addr.into();
            icmp = icmp.or_else(|| icmp_error(error, router));
        }
    }
    let icmp = icmp?;
    let extensions = icmp.extensions(&bytes[..length]).unwrap_or_default().to_vec();
    Some(Outcome::Expired { timestamp, sent_at, icmp, extensions })
}
