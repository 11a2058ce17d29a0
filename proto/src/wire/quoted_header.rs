//! The headers of a packet as an ICMP error quotes them (RFC 792, RFC 4443 section 3).
//!
//! ```text
//!  0     ICMP header: time exceeded (11; in ICMPv6 3) or destination unreachable (3; in ICMPv6 1)
//!  8     IP header as the packet had it when it arrived at the router
//!        IPv4: 1 u6 DSCP, u2 ECN    2 u16 total length       9 u8 protocol    12 source    16 destination
//!        IPv6: 0.5 u6 DSCP, u2 ECN  4 u16 payload length     6 u8 protocol     8 source    24 destination
//! 28/48  at least 8 bytes of the packet: ports, or type, code, checksum and identifier of an ICMP echo
//! ```
//! A device that translates addresses restores them in the quotation on the way back, but not DSCP and ECN,
//! and not always the checksum.

use std::net::{IpAddr, SocketAddr};

use super::icmp::{self, IcmpVersion, pseudo_header, sum};
use super::icmp_extensions::IcmpExtensions;
use super::{DecodeError, array, require, u16_at};
use crate::dscp::Dscp;

/// The headers of a quoted packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotedHeader {
    /// Its protocol.
    pub protocol: QuotedProtocol,
    /// Its sender; of an ICMP echo the port is the identifier.
    pub source: SocketAddr,
    /// Its destination; of an ICMP echo the port is 0.
    pub destination: SocketAddr,
    /// The differentiated services code point with which it arrived.
    pub dscp: Dscp,
    /// The ECN field with which it arrived, 0..=3 (RFC 3168 section 5).
    pub ecn: u8,
    /// Whether its checksum fits its addresses and ports.
    pub checksum: QuotedChecksum,
}

/// Protocols whose headers are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QuotedProtocol {
    /// UDP.
    Udp,
    /// TCP.
    Tcp,
    /// ICMP or ICMPv6 echo requests.
    Icmp,
}

/// What the transport checksum of a quoted packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotedChecksum {
    /// It is right for the quoted packet.
    Right,
    /// It is wrong: addresses or ports were other ones when the packet arrived at the router.
    Wrong,
    /// Nothing: there is none, its computation was left to an interface, or not exactly the whole packet is
    /// quoted.
    Unknown,
}

const UDP: u8 = 17;
const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Lengths of IP headers without options or extension headers, and of an ICMP header.
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const ICMP_BYTES: usize = 8;

/// Bytes after the IP header that every router quotes.
const QUOTED_BYTES: usize = 8;

/// The IP header of a quotation.
struct IpHeader {
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    traffic_class: u8,
    bytes: usize,
    /// Length of the packet from its IP header on.
    packet_bytes: usize,
}

impl QuotedHeader {
    /// Reads an ICMP message from its ICMP header on.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if it is damaged, of another type, or quotes
    /// another protocol, a later fragment, or IPv6 extension headers.
    pub fn decode(message: &[u8], version: IcmpVersion) -> Result<Self, DecodeError> {
        require(message, ICMP_BYTES, "ICMP header")?;
        let kinds = match version {
            IcmpVersion::V4 => [11, 3],
            IcmpVersion::V6 => [3, 1],
        };
        // Of ICMPv6 the kernel verifies the checksum, which also covers the addresses.
        let is_intact = version == IcmpVersion::V6 || icmp::is_intact(message);
        if !kinds.contains(&message[0]) || !is_intact {
            return Err(DecodeError::Unrecognized { field: "report about a packet" });
        }
        let quoted = &message[ICMP_BYTES..];
        let ip = IpHeader::decode(quoted, version)?;
        require(quoted, ip.bytes + QUOTED_BYTES, "quoted transport header")?;
        let transport = &quoted[ip.bytes..];
        let (protocol, ports, checksum_at) = match (ip.protocol, version) {
            (UDP, _) => (QuotedProtocol::Udp, [u16_at(transport, 0), u16_at(transport, 2)], 6),
            (TCP, _) => (QuotedProtocol::Tcp, [u16_at(transport, 0), u16_at(transport, 2)], 16),
            (ICMP, IcmpVersion::V4) | (ICMPV6, IcmpVersion::V6) if transport[0] == version.request() => {
                (QuotedProtocol::Icmp, [u16_at(transport, 4), 0], 2)
            }
            _ => return Err(DecodeError::Unrecognized { field: "quoted packet with ports" }),
        };
        // RFC 4884: a quotation with a length may be padded.
        let announced = match version {
            IcmpVersion::V4 => message[5],
            IcmpVersion::V6 => message[4],
        };
        let is_whole = announced == 0
            && quoted.len() == ip.packet_bytes
            // What follows the first bytes may be padding.
            && transport[QUOTED_BYTES..].iter().any(|byte| *byte != 0)
            // The router may have changed the length in the IP header to that of its quotation.
            && (protocol != QuotedProtocol::Udp || usize::from(u16_at(transport, 4)) == transport.len())
            && IcmpExtensions::unannounced_at(transport, ip.bytes).is_none();
        let checksum = match is_whole {
            true => ip.checksum(transport, checksum_at),
            false => QuotedChecksum::Unknown,
        };
        let [source_port, destination_port] = ports;
        Ok(Self {
            protocol,
            source: SocketAddr::new(ip.source, source_port),
            destination: SocketAddr::new(ip.destination, destination_port),
            dscp: Dscp::new(ip.traffic_class >> 2).unwrap_or_default(),
            ecn: ip.traffic_class & 3,
            checksum,
        })
    }
}

impl IpHeader {
    fn decode(quoted: &[u8], version: IcmpVersion) -> Result<Self, DecodeError> {
        let other = DecodeError::Unrecognized { field: "quoted IP header" };
        match version {
            IcmpVersion::V4 => {
                require(quoted, IPV4_BYTES, "quoted IPv4 header")?;
                let bytes = usize::from(quoted[0] & 15) * 4;
                let fragment = u16_at(quoted, 6);
                if quoted[0] >> 4 != 4 || bytes < IPV4_BYTES || fragment & 0x1fff != 0 {
                    return Err(other);
                }
                let is_fragment = fragment & 0x2000 != 0;
                Ok(Self {
                    protocol: quoted[9],
                    source: array::<4>(quoted, 12).into(),
                    destination: array::<4>(quoted, 16).into(),
                    traffic_class: quoted[1],
                    bytes,
                    packet_bytes: if is_fragment { usize::MAX } else { u16_at(quoted, 2).into() },
                })
            }
            IcmpVersion::V6 => {
                require(quoted, IPV6_BYTES, "quoted IPv6 header")?;
                if quoted[0] >> 4 != 6 {
                    return Err(other);
                }
                let [_, traffic_class] = (u16_at(quoted, 0) >> 4).to_be_bytes();
                Ok(Self {
                    protocol: quoted[6],
                    source: array::<16>(quoted, 8).into(),
                    destination: array::<16>(quoted, 24).into(),
                    traffic_class,
                    bytes: IPV6_BYTES,
                    packet_bytes: IPV6_BYTES + usize::from(u16_at(quoted, 4)),
                })
            }
        }
    }

    /// What the checksum at `at` of a whole packet after its IP header says.
    fn checksum(&self, transport: &[u8], at: usize) -> QuotedChecksum {
        let Some(found) = transport.get(at..at + 2).map(|found| u16_at(found, 0)) else {
            return QuotedChecksum::Unknown;
        };
        let pseudo_header = match self.protocol {
            ICMP => Vec::new(),
            protocol => pseudo_header(self.source, self.destination, protocol, transport.len()),
        };
        // Before an interface completes it, Linux keeps the sum of the pseudo-header in its place.
        let is_incomplete = !pseudo_header.is_empty() && found == sum(&pseudo_header);
        if found == 0 || is_incomplete {
            return QuotedChecksum::Unknown;
        }
        match sum(&[&pseudo_header, transport].concat()) {
            0xffff => QuotedChecksum::Right,
            _ => QuotedChecksum::Wrong,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// UDP from 192.0.2.1:40000 to 198.51.100.7:862 with the payload "abcd", DSCP 46 (RFC 3246) and ECN 2,
    /// behind the ICMP header of time exceeded. The checksum of the quoted IP header is not read.
    const V4: [u8; 40] = [
        0x0b, 0x00, 0x5b, 0xfd, 0x00, 0x00, 0x00, 0x00, // ICMP header
        0x45, 0xba, 0x00, 0x20, 0x12, 0x34, 0x40, 0x00, 0x01, 0x11, 0x00, 0x00, // IPv4 header
        0xc0, 0x00, 0x02, 0x01, 0xc6, 0x33, 0x64, 0x07, // addresses
        0x9c, 0x40, 0x03, 0x5e, 0x00, 0x0c, 0xaf, 0x34, // UDP header
        0x61, 0x62, 0x63, 0x64, // payload
    ];

    /// The same over IPv6 from 2001:db8::1 to 2001:db8:1::7, with destination unreachable.
    const V6: [u8; 60] = [
        0x01, 0x04, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // ICMPv6 header
        0x6b, 0xa1, 0x23, 0x45, 0x00, 0x0c, 0x11, 0x01, // IPv6 header
        0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, // source
        0x20, 0x01, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, // destination
        0x9c, 0x40, 0x03, 0x5e, 0x00, 0x0c, 0x3f, 0xf6, // UDP header
        0x61, 0x62, 0x63, 0x64, // payload
    ];

    fn decode(message: &[u8], version: IcmpVersion) -> QuotedHeader {
        QuotedHeader::decode(message, version).unwrap()
    }

    /// The ICMPv4 message with its checksum.
    fn complete(mut message: Vec<u8>) -> Vec<u8> {
        message[2..4].fill(0);
        let checksum = !sum(&message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        message
    }

    fn checksum_of(message: &[u8]) -> QuotedChecksum {
        decode(&complete(message.to_vec()), IcmpVersion::V4).checksum
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let expected = QuotedHeader {
            protocol: QuotedProtocol::Udp,
            source: "192.0.2.1:40000".parse().unwrap(),
            destination: "198.51.100.7:862".parse().unwrap(),
            dscp: Dscp::new(46).unwrap(),
            ecn: 2,
            checksum: QuotedChecksum::Right,
        };
        assert_eq!(decode(&V4, IcmpVersion::V4), expected);
        let expected = QuotedHeader {
            source: "[2001:db8::1]:40000".parse().unwrap(),
            destination: "[2001:db8:1::7]:862".parse().unwrap(),
            ..expected
        };
        assert_eq!(decode(&V6, IcmpVersion::V6), expected);
    }

    #[test]
    fn restored_address_or_port_shows_in_the_checksum() {
        for at in [8 + 12, 8 + 19, 28, 31] {
            let mut translated = V4;
            translated[at] ^= 4;
            assert_eq!(checksum_of(&translated), QuotedChecksum::Wrong, "byte {at}");
        }
        for at in [8 + 8, 8 + 39, 48, 51] {
            let mut translated = V6;
            translated[at] ^= 4;
            assert_eq!(decode(&translated, IcmpVersion::V6).checksum, QuotedChecksum::Wrong, "byte {at}");
        }
    }

    #[test]
    fn fields_that_routers_change_are_not_covered() {
        // DSCP and ECN, identification, TTL and the checksum of the IP header.
        for at in [9, 12, 16, 18] {
            let mut changed = V4;
            changed[at] ^= 0x41;
            assert_eq!(checksum_of(&changed), QuotedChecksum::Right, "byte {at}");
        }
    }

    #[test]
    fn checksum_says_nothing_if_it_is_absent_or_incomplete() {
        let mut absent = V4;
        absent[34..36].fill(0);
        assert_eq!(checksum_of(&absent), QuotedChecksum::Unknown);
        let mut incomplete = V4;
        // The addresses, the protocol and the length.
        incomplete[34..36].copy_from_slice(&sum(&[&V4[20..28], &[0, 17, 0, 12]].concat()).to_be_bytes());
        assert_eq!(checksum_of(&incomplete), QuotedChecksum::Unknown);
    }

    #[test]
    fn checksum_says_nothing_unless_exactly_the_packet_is_quoted() {
        for length in 36..40 {
            assert_eq!(checksum_of(&V4[..length]), QuotedChecksum::Unknown, "{length} bytes");
        }
        let mut padded = V4.to_vec();
        padded.resize(8 + 128, 0);
        assert_eq!(checksum_of(&padded), QuotedChecksum::Unknown);
        let mut announced = V4;
        announced[5] = 8;
        assert_eq!(checksum_of(&announced), QuotedChecksum::Unknown);
        let mut overwritten = V4;
        overwritten[36..].fill(0);
        assert_eq!(checksum_of(&overwritten), QuotedChecksum::Unknown, "padding takes the place of the rest");
        let mut shortened = V4[..38].to_vec();
        shortened[11] -= 2;
        assert_eq!(checksum_of(&shortened), QuotedChecksum::Unknown, "UDP has another length");
        let mut fragment = V4;
        fragment[14] = 0x20;
        assert_eq!(checksum_of(&fragment), QuotedChecksum::Unknown);
    }

    #[test]
    fn extensions_are_not_part_of_the_packet() {
        let structure = IcmpExtensions::encode(&[(1, 1, &[3, 0xe8, 0x41, 1])]);
        let mut message = V4.to_vec();
        message.resize(8 + 128, 7);
        message.extend(&structure);
        let packet_bytes = u16::try_from(message.len() - 8).unwrap();
        message[10..12].copy_from_slice(&packet_bytes.to_be_bytes());
        message[32..34].copy_from_slice(&(packet_bytes - 20).to_be_bytes());
        assert_eq!(checksum_of(&message), QuotedChecksum::Unknown);
    }

    #[test]
    fn tcp_and_echo_requests_are_read() {
        // SYN of RFC 9293 without options.
        let segment = [0x9c, 0x40, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 2, 0, 0, 0, 0, 0];
        let mut tcp = [&V4[..28], &segment].concat();
        (tcp[11], tcp[17]) = (40, TCP);
        let covered = [&tcp[20..28], &[0, TCP, 0, 20], &segment[..]].concat();
        tcp[44..46].copy_from_slice(&(!sum(&covered)).to_be_bytes());
        let found = decode(&complete(tcp.clone()), IcmpVersion::V4);
        assert_eq!((found.protocol, found.destination.port()), (QuotedProtocol::Tcp, 80));
        assert_eq!(found.checksum, QuotedChecksum::Right);
        let short = decode(&complete(tcp[..36].to_vec()), IcmpVersion::V4);
        assert_eq!((short.source.port(), short.checksum), (40_000, QuotedChecksum::Unknown));

        // Identifier 0x1234, sequence number 1.
        let mut echo = [&V4[..28], &[8, 0, 0xe5, 0xca, 0x12, 0x34, 0, 1, 0, 0]].concat();
        (echo[11], echo[17]) = (30, ICMP);
        assert_eq!(checksum_of(&echo), QuotedChecksum::Unknown, "the rest may be padding");
        echo[36..38].copy_from_slice(&[0, 1]);
        echo[31] -= 1;
        let found = decode(&complete(echo.clone()), IcmpVersion::V4);
        assert_eq!((found.protocol, found.source.port()), (QuotedProtocol::Icmp, 0x1234));
        assert_eq!((found.destination.port(), found.checksum), (0, QuotedChecksum::Right));
        echo[33] ^= 1;
        assert_eq!(checksum_of(&echo), QuotedChecksum::Wrong, "another identifier");
        echo[28] = 0;
        assert!(QuotedHeader::decode(&complete(echo), IcmpVersion::V4).is_err(), "a reply");
    }

    #[test]
    fn other_and_truncated_messages_are_not_read() {
        for length in 0..36 {
            let message = V4[..length].to_vec();
            let message = if length < 4 { message } else { complete(message) };
            assert!(QuotedHeader::decode(&message, IcmpVersion::V4).is_err(), "{length} bytes");
        }
        for length in 0..56 {
            assert!(QuotedHeader::decode(&V6[..length], IcmpVersion::V6).is_err(), "{length} bytes");
        }
        for (at, value) in [(0, 5), (8, 0x65), (8, 0x44), (15, 1), (17, 47)] {
            let mut other = V4;
            other[at] = value;
            assert!(QuotedHeader::decode(&complete(other.to_vec()), IcmpVersion::V4).is_err(), "byte {at}");
        }
        for (at, value) in [(0, 2), (8, 0x4b), (14, 0), (14, 44)] {
            let mut other = V6;
            other[at] = value;
            assert!(QuotedHeader::decode(&other, IcmpVersion::V6).is_err(), "byte {at}");
        }
        let mut damaged = V4;
        damaged[39] ^= 1;
        assert!(QuotedHeader::decode(&damaged, IcmpVersion::V4).is_err());
    }
}
