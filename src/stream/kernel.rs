//! Kernel data about a TCP connection: transmit and receive timestamps, and TCP_INFO.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, TimestampingFlag, recvmsg, setsockopt, sockopt,
};
use nix::sys::time::TimeSpec;
use pathmeter_proto::time::WallTime;

use crate::datagram::set_socket_option;
use crate::metrics::stream::TcpInfo;

/// `SOF_TIMESTAMPING_OPT_ID_TCP` (linux/net_tstamp.h): timestamps are identified by the number of bytes
/// written since the option was set.
const OPT_ID_TCP: u32 = 1 << 16;

/// Size of the control buffer: timestamps, and an extended error with its address.
pub(super) const CONTROL_BYTES: usize = 256;

/// Enables receive timestamps.
pub(super) fn request_rx_timestamps(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, sockopt::Timestamping, &rx_flags())?)
}

fn rx_flags() -> TimestampingFlag {
    TimestampingFlag::SOF_TIMESTAMPING_SOFTWARE | TimestampingFlag::SOF_TIMESTAMPING_RX_SOFTWARE
}

/// Enables transmit and receive timestamps.
pub(super) fn request_timestamps(socket: &impl AsFd) -> io::Result<()> {
    let wanted = rx_flags()
        | TimestampingFlag::SOF_TIMESTAMPING_TX_SOFTWARE
        | TimestampingFlag::SOF_TIMESTAMPING_OPT_ID
        | TimestampingFlag::SOF_TIMESTAMPING_OPT_TSONLY;
    let named = wanted | TimestampingFlag::from_bits_retain(OPT_ID_TCP);
    setsockopt(socket, sockopt::Timestamping, &named)
        .or_else(|_| setsockopt(socket, sockopt::Timestamping, &wanted))
        .map_err(io::Error::from)
}

/// Reads available data into `buffer`. Returns the number of bytes, and the timestamp of the last byte. 0
/// bytes is the end of the stream.
pub(super) fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<(usize, Option<WallTime>)> {
    let mut control = [0; CONTROL_BYTES];
    let mut parts = [IoSliceMut::new(buffer)];
    let received = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let timestamp = received.cmsgs().into_iter().flatten().find_map(|message| timestamp_of(&message));
    Ok((received.bytes, timestamp))
}

/// The transmit timestamp of byte number `last`, counted since timestamps were enabled; `None` if it is not
/// available yet. Discards older timestamps.
pub(super) fn tx_timestamp(socket: &impl AsRawFd, last: u32) -> Option<WallTime> {
    loop {
        let mut control = [0; CONTROL_BYTES];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let mut nothing = [IoSliceMut::new(&mut [])];
        let received =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut nothing, Some(&mut control), flags).ok()?;
        let (mut timestamp, mut id) = (None, None);
        for message in received.cmsgs().into_iter().flatten() {
            timestamp = timestamp.or_else(|| timestamp_of(&message));
            if let ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) =
                message
            {
                id = Some(error.ee_data);
            }
        }
        if id == Some(last) {
            return timestamp;
        }
    }
}

pub(super) fn timestamp_of(message: &ControlMessageOwned) -> Option<WallTime> {
    let ControlMessageOwned::ScmTimestampsns(timestamps) = message else { return None };
    wall_time(timestamps.system)
}

fn wall_time(time: TimeSpec) -> Option<WallTime> {
    let seconds = u64::try_from(time.tv_sec()).ok().filter(|seconds| *seconds > 0)?;
    Some(WallTime::from_nanos(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).ok()?))
}

/// Reads TCP_INFO; `None` if the kernel does not provide it.
pub(crate) fn tcp_info(socket: &impl AsRawFd) -> Option<TcpInfo> {
    let info = read_tcp_info(socket)?;
    let four = |at: usize| u64::from(u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes")));
    let eight = |at: usize| u64::from_ne_bytes(info[at..at + 8].try_into().expect("eight bytes"));
    let min_rtt = four(MIN_RTT);
    Some(TcpInfo {
        rtt: four(RTT),
        rtt_variation: four(RTTVAR),
        rtt_minimum: if min_rtt == u64::from(u32::MAX) { 0 } else { min_rtt },
        retransmits: four(TOTAL_RETRANS),
        bytes_retransmitted: eight(BYTES_RETRANS),
        delivery_rate: eight(DELIVERY_RATE),
        busy: eight(BUSY_TIME),
        window_limited: eight(RWND_LIMITED),
        buffer_limited: eight(SNDBUF_LIMITED),
    })
}

/// Bytes that have arrived at the other end of a connection, in order or not; `None` if the kernel does not
/// provide it. Of segments that have arrived out of order only the number is known: they count as whole ones.
pub(crate) fn delivered_bytes(socket: &impl AsRawFd) -> Option<u64> {
    let info = read_tcp_info(socket)?;
    let four = |at: usize| u64::from(u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes")));
    let eight = |at: usize| u64::from_ne_bytes(info[at..at + 8].try_into().expect("eight bytes"));
    Some(eight(BYTES_ACKED) + four(SACKED) * four(SND_MSS))
}

/// How a connection delivers data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Delivery {
    pub(super) rtt: Duration,
    /// Whether segments are being sent again.
    pub(super) is_recovering: bool,
    /// Bytes of data that were sent, each counted once.
    pub(super) sent: u64,
    /// Bytes of data that were acknowledged, and the SYN of a connection that this host has opened.
    pub(super) acknowledged: u64,
}

/// How a connection delivers data; `None` if the kernel does not provide it.
pub(super) fn delivery(socket: &impl AsRawFd) -> Option<Delivery> {
    let info = read_tcp_info(socket)?;
    let eight = |at: usize| u64::from_ne_bytes(info[at..at + 8].try_into().expect("eight bytes"));
    let rtt = u32::from_ne_bytes(info[RTT..RTT + 4].try_into().expect("four bytes"));
    Some(Delivery {
        rtt: Duration::from_micros(rtt.into()),
        is_recovering: info[CA_STATE] != 0 || info[RETRANSMITS] != 0,
        // Kernels before 4.19 do not count them.
        sent: Some(eight(BYTES_SENT)).filter(|sent| *sent > 0)?.saturating_sub(eight(BYTES_RETRANS)),
        acknowledged: eight(BYTES_ACKED),
    })
}

/// `IPV6_AUTOFLOWLABEL` and `SO_TXREHASH` (linux/in6.h, asm-generic/socket.h; not in `libc`).
const IPV6_AUTOFLOWLABEL: libc::c_int = 70;
const SO_TXREHASH: libc::c_int = 74;

/// Gives the packets of an IPv6 socket the flow label 0, so that every socket with the same ports takes the
/// same route, also after a retransmission.
pub(super) fn disable_flow_label(socket: &impl AsRawFd) -> io::Result<()> {
    set_socket_option(socket, libc::IPPROTO_IPV6, IPV6_AUTOFLOWLABEL, 0)?;
    // Kernels without this option (before 5.18) change the label only after a timeout.
    let _ = set_socket_option(socket, libc::SOL_SOCKET, SO_TXREHASH, 0);
    Ok(())
}

/// Number of segments received out of order; `None` if the kernel does not provide it.
pub(super) fn out_of_order(socket: &impl AsRawFd) -> Option<u64> {
    let info = read_tcp_info(socket)?;
    Some(u32::from_ne_bytes(info[RCV_OOOPACK..RCV_OOOPACK + 4].try_into().expect("four bytes")).into())
}

#[expect(unsafe_code, reason = "nothing wraps the whole of TCP_INFO")]
fn read_tcp_info(socket: &impl AsRawFd) -> Option<[u8; TCP_INFO_BYTES]> {
    let mut info = [0_u8; TCP_INFO_BYTES];
    let mut length = libc::socklen_t::try_from(info.len()).expect("a few hundred");
    // SAFETY: `info` is `length` bytes long, and the kernel writes no more than that.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    (outcome == 0).then_some(info)
}

/// Offsets of the fields of `struct tcp_info` (linux/tcp.h). Fields that an older kernel lacks are zero.
const CA_STATE: usize = 1;
const RETRANSMITS: usize = 2;
const SND_MSS: usize = 16;
const SACKED: usize = 28;
const RTT: usize = 68;
const RTTVAR: usize = 72;
const TOTAL_RETRANS: usize = 100;
const BYTES_ACKED: usize = 120;
const MIN_RTT: usize = 148;
const DELIVERY_RATE: usize = 160;
const BUSY_TIME: usize = 168;
const RWND_LIMITED: usize = 176;
const SNDBUF_LIMITED: usize = 184;
const BYTES_SENT: usize = 200;
const BYTES_RETRANS: usize = 208;
const RCV_OOOPACK: usize = 224;
const TCP_INFO_BYTES: usize = 228;
