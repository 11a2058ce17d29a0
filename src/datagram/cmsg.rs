//! Control messages (cmsg(3)): metadata of received datagrams, and options of sent ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use pathmeter_proto::machine::{IcmpError, IcmpKind};
use pathmeter_proto::time::WallTime;

/// Size of the control buffer. It holds everything that the sockets request: a timestamp (48 bytes of
/// payload), packet information, TTL, TOS and an extended error with an address, each with its header.
pub(super) const CONTROL_BYTES: usize = 320;

/// Sets the identifier that the transmit timestamp of a datagram carries (Linux 6.13; not yet in `libc`).
const SCM_TS_OPT_ID: libc::c_int = 81;

/// A buffer for control messages, with the alignment that the kernel requires.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct ControlBuffer(pub(super) [u8; CONTROL_BYTES]);

/// Metadata of a received datagram, from its control messages.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DatagramMetadata {
    /// When it arrived; on the error queue, when it was sent.
    pub(super) timestamp: Option<WallTime>,
    pub(super) ttl: Option<u8>,
    pub(super) tos: Option<u8>,
    /// Destination address, which is a local address.
    pub(super) to: Option<IpAddr>,
    /// On the error queue: the kind of entry.
    pub(super) error_queue_entry: Option<ErrorQueueEntry>,
}

/// The kind of an entry on the error queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ErrorQueueEntry {
    TxTimestamp { id: u32 },
    Icmp(IcmpError),
    Local { errno: i32 },
}

/// Parses the control messages of a received header.
///
/// # Safety
/// The header's control buffer must be valid for reads of `msg_controllen` bytes.
#[expect(
    unsafe_code,
    reason = "the kernel's own layout; every read is of the length that the message states"
)]
pub(super) unsafe fn read(header: &libc::msghdr) -> DatagramMetadata {
    let mut metadata = DatagramMetadata::default();
    // SAFETY: the header was filled by recvmmsg and its control buffer is valid and `msg_controllen` bytes
    // long; CMSG_FIRSTHDR and CMSG_NXTHDR stay within it, and no arm reads more than the message's length.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            let (level, kind) = ((*message).cmsg_level, (*message).cmsg_type);
            let data = libc::CMSG_DATA(message);
            let length = ((*message).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
            let int = || match length {
                0 => 0,
                1..4 => i32::from(*data),
                _ => data.cast::<i32>().read_unaligned(),
            };
            match (level, kind) {
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPING) if length >= size_of::<libc::timespec>() => {
                    let time = data.cast::<libc::timespec>().read_unaligned();
                    metadata.timestamp = wall_time(&time);
                }
                (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                    metadata.ttl = u8::try_from(int()).ok();
                }
                (libc::IPPROTO_IP, libc::IP_TOS) if length >= 1 => metadata.tos = Some(*data),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => metadata.tos = u8::try_from(int()).ok(),
                (libc::IPPROTO_IP, libc::IP_PKTINFO) if length >= size_of::<libc::in_pktinfo>() => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    metadata.to = Some(Ipv4Addr::from_bits(u32::from_be(info.ipi_addr.s_addr)).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if length >= size_of::<libc::in6_pktinfo>() => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    metadata.to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                (libc::IPPROTO_IP, libc::IP_RECVERR) | (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
                    if length >= size_of::<libc::sock_extended_err>() =>
                {
                    let error = data.cast::<libc::sock_extended_err>().read_unaligned();
                    let offender = data.add(size_of::<libc::sock_extended_err>());
                    let remaining = length - size_of::<libc::sock_extended_err>();
                    metadata.error_queue_entry =
                        Some(error_queue_entry(&error, address(offender, remaining)));
                }
                _ => {}
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    metadata
}

fn wall_time(time: &libc::timespec) -> Option<WallTime> {
    let seconds = u64::try_from(time.tv_sec).ok().filter(|seconds| *seconds > 0)?;
    Some(WallTime::from_nanos(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).ok()?))
}

fn error_queue_entry(error: &libc::sock_extended_err, offender: Option<SocketAddr>) -> ErrorQueueEntry {
    if error.ee_origin == libc::SO_EE_ORIGIN_TIMESTAMPING {
        return ErrorQueueEntry::TxTimestamp { id: error.ee_data };
    }
    let router = offender.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |address| address.ip());
    match icmp_error(error, router) {
        Some(icmp) => ErrorQueueEntry::Icmp(icmp),
        None => ErrorQueueEntry::Local { errno: i32::try_from(error.ee_errno).unwrap_or(i32::MAX) },
    }
}

/// The ICMP error that an entry of an error queue describes; `None` if it has another origin.
pub(crate) fn icmp_error(error: &libc::sock_extended_err, router: IpAddr) -> Option<IcmpError> {
    let mtu = Some(error.ee_info).filter(|mtu| *mtu > 0);
    match error.ee_origin {
        libc::SO_EE_ORIGIN_ICMP => Some(icmp_v4(error, router, mtu)),
        libc::SO_EE_ORIGIN_ICMP6 => Some(icmp_v6(error, router, mtu)),
        _ => None,
    }
}

/// ICMP types and codes of RFC 792 and RFC 1812 section 5.2.7.1.
fn icmp_v4(error: &libc::sock_extended_err, router: IpAddr, mtu: Option<u32>) -> IcmpError {
    let kind = match (error.ee_type, error.ee_code) {
        (3, 3) => IcmpKind::PortUnreachable,
        (3, 4) => IcmpKind::TooBig,
        (3, 9 | 10 | 13) => IcmpKind::Prohibited,
        (3, _) => IcmpKind::Unreachable,
        (11, 0) => IcmpKind::TtlExceeded,
        _ => IcmpKind::Other,
    };
    let mtu = mtu.filter(|_| kind == IcmpKind::TooBig);
    IcmpError { router, kind, code: error.ee_code, mtu, extensions_at: extensions_at(error) }
}

/// ICMPv6 types and codes of RFC 4443 section 3.
fn icmp_v6(error: &libc::sock_extended_err, router: IpAddr, mtu: Option<u32>) -> IcmpError {
    let kind = match (error.ee_type, error.ee_code) {
        (1, 4) => IcmpKind::PortUnreachable,
        (1, 1 | 5 | 6) => IcmpKind::Prohibited,
        (1, _) => IcmpKind::Unreachable,
        (2, _) => IcmpKind::TooBig,
        (3, 0) => IcmpKind::TtlExceeded,
        _ => IcmpKind::Other,
    };
    let mtu = mtu.filter(|_| kind == IcmpKind::TooBig);
    IcmpError { router, kind, code: error.ee_code, mtu, extensions_at: extensions_at(error) }
}

/// The offset of the extensions in the bytes of the error, from `struct sock_ee_data_rfc4884`, which takes
/// the place of `ee_data`: `u16` offset, `u8` flags, `u8` reserved. Only sockets that request it get it. The
/// flag says that the structure is invalid, which does not matter here: the quotation ends there all the
/// same.
fn extensions_at(error: &libc::sock_extended_err) -> Option<u16> {
    let [low, high, ..] = error.ee_data.to_ne_bytes();
    Some(u16::from_ne_bytes([low, high])).filter(|at| *at > 0)
}

/// Parses a socket address of `length` bytes; `None` for other address families and if it is too short.
#[expect(unsafe_code, reason = "reads no more than `length` bytes")]
pub(super) unsafe fn address(at: *const u8, length: usize) -> Option<SocketAddr> {
    if length < size_of::<libc::sa_family_t>() {
        return None;
    }
    // SAFETY: the caller guarantees that `length` bytes are readable, and each arm checks that they suffice.
    unsafe {
        match i32::from(at.cast::<libc::sa_family_t>().read_unaligned()) {
            libc::AF_INET if length >= size_of::<libc::sockaddr_in>() => {
                let found = at.cast::<libc::sockaddr_in>().read_unaligned();
                let address = Ipv4Addr::from_bits(u32::from_be(found.sin_addr.s_addr));
                Some((address, u16::from_be(found.sin_port)).into())
            }
            libc::AF_INET6 if length >= size_of::<libc::sockaddr_in6>() => {
                let found = at.cast::<libc::sockaddr_in6>().read_unaligned();
                let address = Ipv6Addr::from(found.sin6_addr.s6_addr);
                let port = u16::from_be(found.sin6_port);
                Some(std::net::SocketAddrV6::new(address, port, 0, found.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

/// Options of a datagram to send.
#[derive(Debug, Clone, Copy)]
pub(super) struct SendOptions {
    pub(super) to: SocketAddr,
    pub(super) from: Option<IpAddr>,
    pub(super) tos: u8,
    /// `None`: the socket's default.
    pub(super) ttl: Option<u8>,
    /// Whether to request a transmit timestamp.
    pub(super) timestamp: bool,
    /// The identifier that the transmit timestamp carries, where the kernel supports it.
    pub(super) timestamp_id: Option<u32>,
    /// Size of each datagram in bytes if the payload holds several (UDP_SEGMENT).
    pub(super) segment: Option<u16>,
}

/// Writes the control messages and returns their length in bytes.
pub(super) fn write(options: &SendOptions, control: &mut ControlBuffer) -> usize {
    let mut writer = ControlWriter { control, length: 0 };
    let is_v4 = options.to.is_ipv4();
    let tos = i32::from(options.tos).to_ne_bytes();
    if options.tos != 0 {
        match is_v4 {
            true => writer.push(libc::IPPROTO_IP, libc::IP_TOS, &tos),
            false => writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &tos),
        }
    }
    if let Some(ttl) = options.ttl {
        let ttl = i32::from(ttl).to_ne_bytes();
        match is_v4 {
            true => writer.push(libc::IPPROTO_IP, libc::IP_TTL, &ttl),
            false => writer.push(libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT, &ttl),
        }
    }
    match options.from {
        Some(IpAddr::V4(from)) if is_v4 => {
            // struct in_pktinfo: interface (0: by route), the source address, and a field that is not read.
            let mut info = [0_u8; 12];
            info[4..8].copy_from_slice(&from.octets());
            writer.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
        }
        Some(IpAddr::V6(from)) if !is_v4 => {
            // struct in6_pktinfo: the source address and the interface (0: by route).
            let mut info = [0_u8; 20];
            info[..16].copy_from_slice(&from.octets());
            writer.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
        }
        Some(_) | None => {}
    }
    if options.timestamp {
        writer.push(
            libc::SOL_SOCKET,
            libc::SO_TIMESTAMPING,
            &libc::SOF_TIMESTAMPING_TX_SOFTWARE.to_ne_bytes(),
        );
        if let Some(id) = options.timestamp_id {
            writer.push(libc::SOL_SOCKET, SCM_TS_OPT_ID, &id.to_ne_bytes());
        }
    }
    if let Some(segment) = options.segment {
        writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
    }
    writer.length
}

struct ControlWriter<'a> {
    control: &'a mut ControlBuffer,
    length: usize,
}

impl ControlWriter<'_> {
    /// Appends one message; [`CONTROL_BYTES`] has room for one of every kind.
    fn push(&mut self, level: libc::c_int, kind: libc::c_int, data: &[u8]) {
        let start = self.length;
        let header = size_of::<libc::cmsghdr>();
        let length = header + data.len();
        let room = &mut self.control.0[start..];
        room[..size_of::<usize>()].copy_from_slice(&length.to_ne_bytes());
        room[size_of::<usize>()..size_of::<usize>() + 4].copy_from_slice(&level.to_ne_bytes());
        room[size_of::<usize>() + 4..header].copy_from_slice(&kind.to_ne_bytes());
        room[header..length].copy_from_slice(data);
        self.length = start + length.next_multiple_of(size_of::<usize>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_control_messages_have_the_layout_of_the_c_macros() {
        let mut control = ControlBuffer([0; CONTROL_BYTES]);
        let options = SendOptions {
            to: ([192, 0, 2, 1], 862).into(),
            from: Some([192, 0, 2, 2].into()),
            tos: 0xb8,
            ttl: Some(250),
            timestamp: true,
            timestamp_id: Some(7),
            segment: Some(1_200),
        };
        let length = write(&options, &mut control);
        let header = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: std::ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: control.0.as_mut_ptr().cast(),
            msg_controllen: length,
            msg_flags: 0,
        };
        // SAFETY: the header points at `control`, of which `length` bytes were written.
        #[expect(unsafe_code, reason = "reads what was just written")]
        let metadata = unsafe { read(&header) };
        assert_eq!((metadata.tos, metadata.ttl), (Some(0xb8), Some(250)));
        assert!(length <= CONTROL_BYTES);
    }

    #[test]
    fn extensions_begin_where_the_kernel_says_also_if_they_are_invalid() {
        let at = |ee_origin, ee_type, rfc4884: [u8; 4]| {
            let error = libc::sock_extended_err {
                ee_errno: 0,
                ee_origin,
                ee_type,
                ee_code: 0,
                ee_pad: 0,
                ee_info: 0,
                ee_data: u32::from_ne_bytes(rfc4884),
            };
            match error_queue_entry(&error, None) {
                ErrorQueueEntry::Icmp(icmp) => icmp.extensions_at,
                other @ (ErrorQueueEntry::TxTimestamp { .. } | ErrorQueueEntry::Local { .. }) => {
                    panic!("{other:?}")
                }
            }
        };
        let [low, high] = 300_u16.to_ne_bytes();
        for (origin, time_exceeded) in [(libc::SO_EE_ORIGIN_ICMP, 11), (libc::SO_EE_ORIGIN_ICMP6, 3)] {
            assert_eq!(at(origin, time_exceeded, [0; 4]), None);
            assert_eq!(at(origin, time_exceeded, [low, high, 0, 0]), Some(300));
            assert_eq!(at(origin, time_exceeded, [low, high, 1, 0]), Some(300), "with a wrong checksum");
        }
    }

    #[test]
    fn icmp_type_and_code_decide_the_kind_of_error() {
        let error = |ee_type, ee_code| libc::sock_extended_err {
            ee_errno: 0,
            ee_origin: libc::SO_EE_ORIGIN_ICMP,
            ee_type,
            ee_code,
            ee_pad: 0,
            ee_info: 1_400,
            ee_data: 0,
        };
        let router: SocketAddr = ([192, 0, 2, 9], 0).into();
        let kind = |ee_type, code| match error_queue_entry(&error(ee_type, code), Some(router)) {
            ErrorQueueEntry::Icmp(icmp) => (icmp.kind, icmp.mtu),
            other @ (ErrorQueueEntry::TxTimestamp { .. } | ErrorQueueEntry::Local { .. }) => {
                panic!("{other:?}")
            }
        };
        assert_eq!(kind(3, 3), (IcmpKind::PortUnreachable, None));
        assert_eq!(kind(3, 1), (IcmpKind::Unreachable, None));
        assert_eq!(kind(3, 13), (IcmpKind::Prohibited, None));
        assert_eq!(kind(3, 4), (IcmpKind::TooBig, Some(1_400)));
        assert_eq!(kind(11, 0), (IcmpKind::TtlExceeded, None));
    }
}
