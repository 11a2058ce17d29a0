//! Sockets for ICMP echo.
//!
//! A *ping socket* (`SOCK_DGRAM`) needs no privilege if `net.ipv4.ping_group_range` includes a group of the
//! process. The kernel chooses its identifier as it chooses a port, writes the identifier and the checksum
//! into sent packets, and delivers only replies with that identifier. A *raw socket* needs CAP_NET_RAW and
//! receives every ICMP packet: a filter in the kernel selects the replies with the identifier that this
//! module chose. Either socket keeps one identifier, so its packets are one flow to routers.

use std::fs;
use std::io;
use std::net::IpAddr;

use nix::unistd::getegid;
use pathmeter_proto::wire::icmp::{self, IcmpVersion};
use socket2::{Domain, Protocol, Socket as Socket2, Type};

use super::packet_filter::{FilterField, FilterStart, accept_only};
use super::socket::{Binding, Socket, SocketError, SocketKind, TimestampMatching, set};
use super::tx_timestamps::HEADER_BYTES;

/// The range of groups that may open ping sockets: two numbers.
const PING_GROUP_RANGE: &str = "/proc/sys/net/ipv4/ping_group_range";

/// Random identifiers to try before one that is in use is accepted. Chosen: there are 65,535 identifiers and
/// few sockets.
const IDENTIFIER_DRAWS_MAX: u32 = 1_000;

/// `ICMP_FILTER` (linux/icmp.h): a bit mask of the ICMP types that the socket does not receive.
const ICMP_FILTER: libc::c_int = 1;

/// Length of an IPv4 header without options (RFC 791).
const HEADER_V4_BYTES: usize = 20;

impl Socket {
    /// Opens a socket for ICMP echo: a ping socket, or a raw socket where ping sockets are not permitted. The
    /// port of its address is its identifier. If the port in the binding is 0, the kernel chooses the
    /// identifier, or for a raw socket a random one for which `is_taken` returns false.
    ///
    /// # Errors
    /// [`SocketError::IcmpNotPermitted`] if neither kind of socket is permitted.
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
            0 => draw_identifier(is_taken).map_err(failed("choosing an ICMP identifier for"))?,
            port => port,
        };
        attach_reply_filter(&socket, IcmpVersion::of(address.ip()), identifier)
            .map_err(failed("attaching a reply filter to"))?;
        let mut socket = Self::prepare(socket, SocketKind::Raw, binding, timestamps)?;
        socket.set_identifier(identifier);
        Ok(socket)
    }

    /// Removes the IPv4 header, which only raw IPv4 sockets receive. `None` if a raw socket received a
    /// damaged packet or one with another identifier.
    pub(super) fn strip_header<'a>(&self, received: &'a [u8]) -> Option<&'a [u8]> {
        match (self.kind(), self.address().is_ipv4()) {
            (SocketKind::Udp | SocketKind::Ping, _) => Some(received),
            // The kernel verifies the checksum of ICMPv6 but not that of ICMP.
            (SocketKind::Raw, true) => after_ipv4_header(received)
                .filter(|echo| self.has_own_identifier(echo) && icmp::is_intact(echo)),
            (SocketKind::Raw, false) => Some(received).filter(|echo| self.has_own_identifier(echo)),
        }
    }

    /// Whether the datagram that an ICMP error quotes was sent from this socket; raw sockets receive errors
    /// of all sockets.
    pub(super) fn is_own(&self, quoted: &[u8]) -> bool {
        match self.kind() {
            SocketKind::Udp | SocketKind::Ping => true,
            SocketKind::Raw => self.has_own_identifier(quoted),
        }
    }

    fn has_own_identifier(&self, echo: &[u8]) -> bool {
        icmp::identifier(echo) == Some(self.address().port())
    }

    /// The payload of a datagram to send: for ICMP without the ICMP header.
    pub(super) fn payload<'a>(&self, datagram: &'a [u8]) -> &'a [u8] {
        match self.kind() {
            SocketKind::Udp => datagram,
            SocketKind::Ping | SocketKind::Raw => datagram.get(HEADER_BYTES..).unwrap_or_default(),
        }
    }

    /// Writes the fields that the kernel does not fill in: identifier and checksum on raw sockets.
    pub(super) fn complete(&self, datagram: &mut [u8]) {
        match self.kind() {
            SocketKind::Udp | SocketKind::Ping => {}
            SocketKind::Raw => icmp::identify(datagram, self.address().port()),
        }
    }
}

/// Whether this process may open ping sockets for a family, and therefore needs no raw one.
#[must_use]
pub fn opens_ping_sockets(address: IpAddr) -> bool {
    opens_icmp(address, Type::DGRAM)
}

/// Whether this process may open sockets for ICMP echo, of either kind.
#[must_use]
pub fn opens_icmp_sockets(address: IpAddr) -> bool {
    opens_ping_sockets(address) || opens_icmp(address, Type::RAW)
}

fn opens_icmp(address: IpAddr, kind: Type) -> bool {
    let (domain, protocol) = match address {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
    };
    Socket2::new(domain, kind.cloexec(), Some(protocol)).is_ok()
}

/// Whether this kind of socket is not permitted or not supported by the kernel.
fn is_unavailable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EPROTONOSUPPORT))
}

fn icmp_not_permitted() -> SocketError {
    let text = fs::read_to_string(PING_GROUP_RANGE).unwrap_or_default();
    let range = text.split_whitespace().collect::<Vec<_>>().join(" ");
    SocketError::IcmpNotPermitted { group: getegid().as_raw(), range }
}

/// Draws a random identifier that is not 0 and not in use.
fn draw_identifier(is_taken: impl Fn(u16) -> bool) -> io::Result<u16> {
    for tries in 1.. {
        let mut bytes = [0; 2];
        getrandom::fill(&mut bytes).map_err(io::Error::other)?;
        let identifier = u16::from_ne_bytes(bytes);
        if identifier != 0 && (tries > IDENTIFIER_DRAWS_MAX || !is_taken(identifier)) {
            return Ok(identifier);
        }
    }
    unreachable!("the range of tries is unbounded")
}

/// Makes the socket receive only replies with this identifier.
fn attach_reply_filter(socket: &Socket2, version: IcmpVersion, identifier: u16) -> io::Result<()> {
    let start = match version {
        IcmpVersion::V4 => FilterStart::AfterIpv4Header,
        IcmpVersion::V6 => FilterStart::FirstByte,
    };
    accept_only(socket, start, &[FilterField::Byte(0, version.reply()), FilterField::Half(4, identifier)])?;
    if version == IcmpVersion::V4 {
        // Only an optimization: spares the kernel copies of other packets.
        let _ = set(socket, libc::SOL_RAW, ICMP_FILTER, !1);
    }
    Ok(())
}

/// The bytes after an IPv4 header.
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
        let expected = "group 1000 may not open ICMP sockets (net.ipv4.ping_group_range is \"1 0\"): run \
                        sysctl -w net.ipv4.ping_group_range='0 2147483647' or grant CAP_NET_RAW";
        assert_eq!(error.to_string(), expected);
    }
}
