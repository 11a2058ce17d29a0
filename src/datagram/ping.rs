//! Sockets for ICMP echoes.
//!
//! A *ping socket* (`SOCK_DGRAM`) needs no privilege where `net.ipv4.ping_group_range` names a group of ours. The kernel
//! chooses its identifier as it chooses a port, writes that and the checksum into what is sent, and hands over the replies
//! with that identifier only. A *raw socket* needs CAP_NET_RAW, and gets everything: a filter in the kernel picks the replies
//! with the identifier that we drew. Either has one identifier for life, so its datagrams are one flow to routers.

use std::fs;
use std::io;
use std::net::IpAddr;

use nix::unistd::getegid;
use pathmeter_proto::wire::icmp::{self, IcmpVersion};
use socket2::{Domain, Protocol, SockFilter, Socket as Socket2, Type};

use super::socket::{Binding, Socket, SocketError, SocketKind, TimestampMatching, set};
use super::tx_timestamps::HEADER_BYTES;

/// What groups may open ping sockets: two numbers.
const PING_GROUP_RANGE: &str = "/proc/sys/net/ipv4/ping_group_range";

/// Identifiers that are drawn before one that is taken is taken again. Chosen: there are 65,535, and a handful of sockets.
const IDENTIFIER_DRAWS_MAX: u32 = 1_000;

/// `ICMP_FILTER` (linux/icmp.h): the types whose bit is set do not come up.
const ICMP_FILTER: libc::c_int = 1;

/// The shortest IPv4 header (RFC 791).
const HEADER_V4_BYTES: usize = 20;

impl Socket {
    /// Opens a socket for echoes: a ping socket, or a raw one where there may be none. The port of its address is its
    /// identifier; a port of 0 in the binding is one of the kernel's choice, or one for which `is_taken` is false.
    ///
    /// # Errors
    /// [`SocketError::Closed`] where neither may be had.
    pub(super) fn open_echo(
        binding: &Binding,
        timestamps: TimestampMatching,
        is_taken: impl Fn(u16) -> bool,
    ) -> Result<Self, SocketError> {
        let address = binding.address;
        let failed = |operation| move |cause| SocketError::Refused { operation, address, cause };
        let (domain, protocol) = match address.ip() {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let open = |kind: Type| Socket2::new(domain, kind.nonblocking().cloexec(), Some(protocol));
        let operation = "opening an ICMP socket for";
        match open(Type::DGRAM) {
            Ok(socket) => return Self::prepare(socket, SocketKind::Ping, binding, timestamps),
            Err(error) if is_unavailable(&error) => {}
            Err(error) => return Err(failed(operation)(error)),
        }
        let socket = match open(Type::RAW) {
            Ok(socket) => socket,
            Err(error) if is_unavailable(&error) => return Err(icmp_not_permitted()),
            Err(error) => return Err(failed(operation)(error)),
        };
        let identifier = match address.port() {
            0 => draw_identifier(is_taken).map_err(failed("drawing an identifier for"))?,
            port => port,
        };
        attach_reply_filter(&socket, IcmpVersion::of(address.ip()), identifier)
            .map_err(failed("filtering what comes to"))?;
        let mut socket = Self::prepare(socket, SocketKind::Raw, binding, timestamps)?;
        socket.set_identifier(identifier);
        Ok(socket)
    }

    /// What it received, without the header that a raw IPv4 socket gets as well; `None` for what is damaged or another
    /// program's.
    pub(super) fn strip_header<'a>(&self, received: &'a [u8]) -> Option<&'a [u8]> {
        match (self.kind(), self.address().is_ipv4()) {
            (SocketKind::Udp | SocketKind::Ping, _) => Some(received),
            // A kernel looks at the checksum of ICMPv6, and not at that of ICMP.
            (SocketKind::Raw, true) => after_ipv4_header(received)
                .filter(|echo| self.has_own_identifier(echo) && icmp::is_intact(echo)),
            (SocketKind::Raw, false) => Some(received).filter(|echo| self.has_own_identifier(echo)),
        }
    }

    /// Whether an ICMP error quotes a datagram of this socket: raw sockets are told of all.
    pub(super) fn is_own(&self, quoted: &[u8]) -> bool {
        match self.kind() {
            SocketKind::Udp | SocketKind::Ping => true,
            SocketKind::Raw => self.has_own_identifier(quoted),
        }
    }

    fn has_own_identifier(&self, echo: &[u8]) -> bool {
        icmp::identifier(echo) == Some(self.address().port())
    }

    /// What a datagram to be sent carries behind the header that is part of it.
    pub(super) fn payload<'a>(&self, datagram: &'a [u8]) -> &'a [u8] {
        match self.kind() {
            SocketKind::Udp => datagram,
            SocketKind::Ping | SocketKind::Raw => datagram.get(HEADER_BYTES..).unwrap_or_default(),
        }
    }

    /// Writes into a datagram what the kernel does not.
    pub(super) fn complete(&self, datagram: &mut [u8]) {
        match self.kind() {
            SocketKind::Udp | SocketKind::Ping => {}
            SocketKind::Raw => icmp::identify(datagram, self.address().port()),
        }
    }
}

/// Whether that kind of socket is not for us, or not in this kernel.
fn is_unavailable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EPROTONOSUPPORT))
}

fn icmp_not_permitted() -> SocketError {
    let text = fs::read_to_string(PING_GROUP_RANGE).unwrap_or_default();
    let range = text.split_whitespace().collect::<Vec<_>>().join(" ");
    SocketError::IcmpNotPermitted { group: getegid().as_raw(), range }
}

/// An identifier that is not 0 and not taken.
fn draw_identifier(is_taken: impl Fn(u16) -> bool) -> io::Result<u16> {
    for tries in 1.. {
        let mut bytes = [0; 2];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        let identifier = u16::from_ne_bytes(bytes);
        if identifier != 0 && (tries > IDENTIFIER_DRAWS_MAX || !is_taken(identifier)) {
            return Ok(identifier);
        }
    }
    unreachable!("the tries have no end")
}

/// Lets nothing come up but replies with this identifier.
fn attach_reply_filter(socket: &Socket2, version: IcmpVersion, identifier: u16) -> io::Result<()> {
    // linux/bpf_common.h: BPF_LDX|BPF_B|BPF_MSH, BPF_LD|BPF_B|BPF_IND, BPF_LD|BPF_H|BPF_IND, BPF_LDX|BPF_IMM, BPF_JMP|BPF_JEQ,
    // BPF_RET.
    const LOAD_HEADER_LENGTH: u16 = 0xb1;
    const LOAD_BYTE_AT_INDEX: u16 = 0x50;
    const LOAD_HALF_AT_INDEX: u16 = 0x48;
    const LOAD_INDEX: u16 = 0x01;
    const IS_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // Where ICMP begins: behind the IPv4 header, whose length is in its first byte; with IPv6 at the start.
    let begin = match version {
        IcmpVersion::V4 => SockFilter::new(LOAD_HEADER_LENGTH, 0, 0, 0),
        IcmpVersion::V6 => SockFilter::new(LOAD_INDEX, 0, 0, 0),
    };
    let program = [
        begin,
        SockFilter::new(LOAD_BYTE_AT_INDEX, 0, 0, 0),
        SockFilter::new(IS_EQUAL, 0, 3, version.reply().into()),
        SockFilter::new(LOAD_HALF_AT_INDEX, 0, 0, 4),
        SockFilter::new(IS_EQUAL, 0, 1, identifier.into()),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ];
    socket.attach_filter(&program)?;
    if version == IcmpVersion::V4 {
        // Spares the kernel copies of everything else; not needed.
        let _ = set(socket, libc::SOL_RAW, ICMP_FILTER, !1);
    }
    Ok(())
}

/// What stands behind an IPv4 header.
fn after_ipv4_header(packet: &[u8]) -> Option<&[u8]> {
    let length = usize::from(packet.first()? & 15) * 4;
    packet.get(length.max(HEADER_V4_BYTES)..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_options_are_stripped_with_the_header() {
        let mut packet = vec![0x46; 24];
        packet.extend([0, 0, 1, 2]);
        assert_eq!(after_ipv4_header(&packet), Some(&[0, 0, 1, 2][..]));
        assert_eq!(after_ipv4_header(&[]), None);
        assert_eq!(after_ipv4_header(&[0x4f; 20]), None);
    }

    #[test]
    fn drawn_identifier_is_not_taken() {
        for _ in 0..100 {
            let drawn = draw_identifier(|identifier| identifier % 16 != 0).unwrap();
            assert!(drawn % 16 == 0 && drawn != 0, "{drawn}");
        }
    }

    #[test]
    fn missing_permission_error_names_the_remedy() {
        let error = SocketError::IcmpNotPermitted { group: 1_000, range: "1 0".into() };
        let expected = "ICMP sockets are closed to group 1000 (net.ipv4.ping_group_range is \"1 0\"): run sysctl -w \
                        net.ipv4.ping_group_range='0 2147483647' or give CAP_NET_RAW";
        assert_eq!(error.to_string(), expected);
    }
}
