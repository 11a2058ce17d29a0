//! Parsing and rewriting IP datagrams in Ethernet frames.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use pathmeter_proto::sim::{Corruption, Delivery};

/// A unicast IP datagram in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram {
    /// Source address; port 0 for protocols without ports.
    pub source: SocketAddr,
    /// Destination address.
    pub destination: SocketAddr,
    /// IP protocol number: 6 TCP, 17 UDP, 1 and 58 ICMP. 0 for later fragments.
    pub protocol: u8,
    /// Type of service or traffic class.
    pub tos: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Length with the IP header.
    pub bytes: usize,
    /// Identifier and sequence number of an ICMP echo.
    pub echo: Option<IcmpEchoId>,
    /// Sequence number and SYN flag of a TCP segment.
    pub segment: Option<TcpSegment>,
    /// Offset of the transport header in the frame.
    transport: usize,
    /// Offset of the payload in the frame.
    payload: usize,
}

/// An ICMP echo request or reply (RFC 792, RFC 4443 section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpEchoId {
    /// Whether this is a reply.
    pub is_reply: bool,
    /// Identifier of the sending program or socket.
    pub identifier: u16,
    /// Sequence number.
    pub sequence: u16,
}

/// A TCP segment (RFC 9293 section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSegment {
    /// Sequence number of the first byte; starts at a number chosen by the sender.
    pub sequence: u32,
    /// Whether SYN is set: the first byte of the stream then has the next sequence number.
    pub is_syn: bool,
}

/// IP protocol number of UDP.
pub const UDP: u8 = 17;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMP_V6: u8 = 58;

/// The SYN flag.
const SYN: u8 = 2;

/// Length of an Ethernet header in bytes.
pub(crate) const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
pub(crate) const IPV6: [u8; 2] = [0x86, 0xdd];

impl Datagram {
    /// Parses the datagram in a frame; `None` if it is not IP unicast, or is truncated.
    #[must_use]
    pub fn find(frame: &[u8]) -> Option<Self> {
        let is_unicast = frame.first()? & 1 == 0;
        let kind: [u8; 2] = frame.get(12..14)?.try_into().ok()?;
        let ip = frame.get(ETHERNET..)?;
        let found = match kind {
            IPV4 if is_unicast => Self::find_v4(ip)?,
            IPV6 if is_unicast => Self::find_v6(ip)?,
            _ => return None,
        };
        (ETHERNET + found.bytes <= frame.len() && found.payload <= ETHERNET + found.bytes).then_some(found)
    }

    /// A TCP segment with these fields and defaults for the rest.
    #[cfg(test)]
    pub(crate) fn segment(source: SocketAddr, destination: SocketAddr, sequence: u32) -> Self {
        Self {
            source,
            destination,
            protocol: TCP,
            tos: 0,
            ttl: 64,
            bytes: 40,
            echo: None,
            segment: Some(TcpSegment { sequence, is_syn: false }),
            transport: ETHERNET + 20,
            payload: ETHERNET + 40,
        }
    }

    fn find_v4(ip: &[u8]) -> Option<Self> {
        let header: &[u8; 20] = ip.first_chunk()?;
        let length = usize::from(header[0] & 15) * 4;
        let address = |at: usize| -> IpAddr {
            Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]).into()
        };
        // Later fragments have no transport header.
        let is_later_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
        let protocol = if is_later_fragment { 0 } else { header[9] };
        let bytes = usize::from(u16::from_be_bytes([header[2], header[3]]));
        Self::new(ip, protocol, length, (address(12), address(16)), (header[1], header[8], bytes))
    }

    fn find_v6(ip: &[u8]) -> Option<Self> {
        let header: &[u8; 40] = ip.first_chunk()?;
        let address = |at: usize| -> IpAddr {
            let octets: [u8; 16] = header[at..at + 16].try_into().expect("sixteen");
            Ipv6Addr::from(octets).into()
        };
        let tos = header[0] << 4 | header[1] >> 4;
        let bytes = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
        Self::new(ip, header[6], 40, (address(8), address(24)), (tos, header[7], bytes))
    }

    fn new(
        ip: &[u8],
        protocol: u8,
        header: usize,
        (source, destination): (IpAddr, IpAddr),
        (tos, ttl, bytes): (u8, u8, usize),
    ) -> Option<Self> {
        let transport = ip.get(header..)?;
        let word = |at: usize| -> Option<u16> {
            Some(u16::from_be_bytes([*transport.get(at)?, *transport.get(at + 1)?]))
        };
        let (from, to, header_bytes) = match protocol {
            UDP => (word(0)?, word(2)?, 8),
            TCP => (word(0)?, word(2)?, usize::from(transport.get(12)? >> 4) * 4),
            ICMP | ICMP_V6 => (0, 0, 8),
            _ => (0, 0, 0),
        };
        let is_reply = match (protocol, transport.first()) {
            (ICMP, Some(8)) | (ICMP_V6, Some(128)) => Some(false),
            (ICMP, Some(0)) | (ICMP_V6, Some(129)) => Some(true),
            _ => None,
        };
        let echo = match is_reply {
            Some(is_reply) => Some(IcmpEchoId { is_reply, identifier: word(4)?, sequence: word(6)? }),
            None => None,
        };
        let segment = match protocol {
            TCP => {
                let sequence = u32::from(word(4)?) << 16 | u32::from(word(6)?);
                Some(TcpSegment { sequence, is_syn: transport.get(13)? & SYN != 0 })
            }
            _ => None,
        };
        Some(Self {
            source: (source, from).into(),
            destination: (destination, to).into(),
            protocol,
            tos,
            ttl,
            bytes,
            echo,
            segment,
            transport: ETHERNET + header,
            payload: ETHERNET + header + header_bytes,
        })
    }

    /// The payload of the transport protocol.
    #[must_use]
    pub fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        frame.get(self.payload..ETHERNET + self.bytes).unwrap_or_default()
    }

    /// Length of the payload in bytes.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        ETHERNET + self.bytes - self.payload
    }

    /// Applies a link's delivery to the frame: TOS, TTL and damage. Returns the offset of the damaged payload
    /// byte, if any.
    pub fn apply_delivery(&self, frame: &mut [u8], delivery: &Delivery) -> Option<usize> {
        match self.source {
            SocketAddr::V4(_) => self.write_v4(frame, delivery.tos, delivery.ttl),
            SocketAddr::V6(_) => self.write_v6(frame, delivery.tos, delivery.ttl),
        }
        let (_, noticed_by) = delivery.damage?;
        let checksum = match self.protocol {
            UDP => 6,
            TCP => 16,
            ICMP | ICMP_V6 => 2,
            // Unknown checksum: the effect of damage cannot be predicted, so none is applied.
            _ => return None,
        };
        self.damage(frame, delivery, noticed_by, self.transport + checksum)
    }

    fn write_v4(&self, frame: &mut [u8], tos: u8, ttl: u8) {
        let mut checksum = u16::from_be_bytes([frame[ETHERNET + 10], frame[ETHERNET + 11]]);
        checksum = changed(checksum, [frame[ETHERNET], self.tos], [frame[ETHERNET], tos]);
        checksum = changed(checksum, [self.ttl, self.protocol], [ttl, self.protocol]);
        frame[ETHERNET + 1] = tos;
        frame[ETHERNET + 8] = ttl;
        frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&checksum.to_be_bytes());
    }

    fn write_v6(&self, frame: &mut [u8], tos: u8, ttl: u8) {
        frame[ETHERNET] = frame[ETHERNET] & 0xf0 | tos >> 4;
        frame[ETHERNET + 1] = frame[ETHERNET + 1] & 0x0f | tos << 4;
        frame[ETHERNET + 7] = ttl;
    }

    fn damage(
        &self,
        frame: &mut [u8],
        delivery: &Delivery,
        noticed_by: Corruption,
        at: usize,
    ) -> Option<usize> {
        let end = ETHERNET + self.bytes;
        let before = frame[self.payload..end].to_vec();
        let byte = delivery.damage(&mut frame[self.payload..end]);
        let has_no_checksum = self.protocol == UDP && frame[at..at + 2] == [0, 0];
        if noticed_by == Corruption::Detected || has_no_checksum {
            return byte;
        }
        let mut checksum = u16::from_be_bytes([frame[at], frame[at + 1]]);
        // Words start at the transport header, whose length is even for all these protocols.
        for (old, new) in before.chunks(2).zip(frame[self.payload..end].chunks(2)) {
            let word = |bytes: &[u8]| [bytes[0], bytes.get(1).copied().unwrap_or(0)];
            checksum = changed(checksum, word(old), word(new));
        }
        if self.protocol == UDP && checksum == 0 {
            checksum = 0xffff;
        }
        frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        byte
    }
}

/// Updates an Internet checksum after one word changed (RFC 1624, equation 3).
fn changed(checksum: u16, old: [u8; 2], new: [u8; 2]) -> u16 {
    let (old, new) = (u16::from_be_bytes(old), u16::from_be_bytes(new));
    let sum = u32::from(!checksum) + u32::from(!old) + u32::from(new);
    let folded = (sum & 0xffff) + (sum >> 16);
    let [_, _, high, low] = ((folded & 0xffff) + (folded >> 16)).to_be_bytes();
    !u16::from_be_bytes([high, low])
}

/// The Internet checksum of bytes whose checksum field is zero (RFC 1071).
pub(crate) fn internet_checksum(bytes: &[u8]) -> u16 {
    let word = |word: &[u8]| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("it was folded")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYLOAD: &[u8] = b"what is carried";

    fn sum(bytes: impl IntoIterator<Item = u8>) -> u16 {
        internet_checksum(&bytes.into_iter().collect::<Vec<u8>>())
    }

    /// The sum over everything that the UDP checksum covers; zero when the checksum is correct.
    fn udp_sum(frame: &[u8]) -> u16 {
        let datagram = Datagram::find(frame).unwrap();
        let addresses = match frame[12..14] {
            [0x08, 0x00] => &frame[ETHERNET + 12..ETHERNET + 20],
            _ => &frame[ETHERNET + 8..ETHERNET + 40],
        };
        let udp = &frame[datagram.transport..ETHERNET + datagram.bytes];
        let length = u16::try_from(udp.len()).unwrap().to_be_bytes();
        sum(addresses.iter().chain(&[0, UDP]).chain(&length).chain(udp).copied())
    }

    fn frame(is_v6: bool) -> Vec<u8> {
        let udp_bytes = u8::try_from(8 + PAYLOAD.len()).unwrap();
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if is_v6 {
            frame.extend([0x86, 0xdd, 0x6b, 0x80, 0, 0, 0, udp_bytes, UDP, 255]);
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        } else {
            frame.extend([0x08, 0x00, 0x45, 0xb8, 0, 20 + udp_bytes, 0, 0, 0x40, 0, 255, UDP, 0, 0]);
            frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
            let checksum = sum(frame[ETHERNET..ETHERNET + 20].iter().copied());
            frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&checksum.to_be_bytes());
        }
        let udp = frame.len();
        frame.extend([0x9c, 0x40, 0x26, 0x86, 0, udp_bytes, 0, 0]);
        frame.extend(PAYLOAD);
        let checksum = udp_sum(&frame);
        frame[udp + 6..udp + 8].copy_from_slice(&checksum.to_be_bytes());
        frame
    }

    #[test]
    fn datagram_is_found_in_its_frame() {
        for is_v6 in [false, true] {
            let frame = frame(is_v6);
            let found = Datagram::find(&frame).unwrap();
            assert_eq!((found.source.port(), found.destination.port()), (40_000, 9_862));
            assert_eq!((found.tos, found.ttl, found.protocol), (0xb8, 255, UDP));
            assert_eq!(found.payload(&frame), PAYLOAD);
            assert_eq!(found.bytes, frame.len() - ETHERNET);
        }
    }

    #[test]
    fn icmp_echo_has_identifier_and_sequence() {
        for (is_v6, request, reply) in [(false, 8, 0), (true, 128, 129)] {
            for (kind, expected) in [(request, Some(false)), (reply, Some(true)), (3, None)] {
                let mut frame = frame(is_v6);
                let transport = Datagram::find(&frame).unwrap().transport;
                frame[if is_v6 { ETHERNET + 6 } else { ETHERNET + 9 }] = if is_v6 { ICMP_V6 } else { ICMP };
                frame[transport..transport + 8].copy_from_slice(&[kind, 0, 0, 0, 1, 2, 3, 4]);
                let found = Datagram::find(&frame).unwrap();
                let echo = |is_reply| IcmpEchoId { is_reply, identifier: 0x0102, sequence: 0x0304 };
                assert_eq!(found.echo, expected.map(echo), "type {kind}");
            }
        }
    }

    /// A frame with a TCP segment: options of four bytes, then the payload.
    fn segment(is_v6: bool, flags: u8) -> Vec<u8> {
        let mut frame = frame(is_v6);
        let transport = Datagram::find(&frame).unwrap().transport;
        let rest = u16::try_from(24 + PAYLOAD.len()).unwrap();
        frame[if is_v6 { ETHERNET + 6 } else { ETHERNET + 9 }] = TCP;
        let (length, bytes) = if is_v6 { (ETHERNET + 4, rest) } else { (ETHERNET + 2, 20 + rest) };
        frame[length..length + 2].copy_from_slice(&bytes.to_be_bytes());
        frame.truncate(transport);
        frame.extend([
            0x9c,
            0x40,
            0x26,
            0x87,
            0xfe,
            0xdc,
            0xba,
            0x98,
            1,
            2,
            3,
            4,
            6 << 4,
            flags,
            0,
            9,
            0,
            0,
            0,
            0,
        ]);
        frame.extend([1, 1, 1, 1]);
        frame.extend(PAYLOAD);
        frame
    }

    #[test]
    fn tcp_segment_has_its_sequence_number() {
        for is_v6 in [false, true] {
            for (flags, is_syn) in [(0x10, false), (0x02, true), (0x12, true), (0x11, false)] {
                let frame = segment(is_v6, flags);
                let found = Datagram::find(&frame).unwrap();
                assert_eq!((found.source.port(), found.destination.port()), (40_000, 9_863));
                assert_eq!(found.segment, Some(TcpSegment { sequence: 0xfedc_ba98, is_syn }));
                assert_eq!((found.payload(&frame), found.payload_bytes()), (PAYLOAD, PAYLOAD.len()));
            }
            assert_eq!(Datagram::find(&frame(is_v6)).unwrap().segment, None, "it is UDP");
        }
    }

    #[test]
    fn truncated_segment_is_none() {
        for is_v6 in [false, true] {
            let whole = segment(is_v6, 0x10);
            for length in 0..whole.len() {
                assert_eq!(Datagram::find(&whole[..length]), None, "{length}");
            }
            // The header would exceed the datagram.
            let mut wrong = whole;
            let transport = Datagram::find(&wrong).unwrap().transport;
            wrong[transport + 12] = 15 << 4;
            assert_eq!(Datagram::find(&wrong), None);
        }
    }

    #[test]
    fn truncated_or_multicast_frame_is_none() {
        for is_v6 in [false, true] {
            let whole = frame(is_v6);
            for length in 0..whole.len() {
                assert_eq!(Datagram::find(&whole[..length]), None, "{length}");
            }
            let mut multicast = whole;
            multicast[0] |= 1;
            assert_eq!(Datagram::find(&multicast), None);
        }
    }

    #[test]
    fn rewritten_headers_keep_valid_checksums() {
        for is_v6 in [false, true] {
            let mut frame = frame(is_v6);
            let delivery = Delivery { at: 0, damage: None, tos: 0x2a, ttl: 3 };
            Datagram::find(&frame).unwrap().apply_delivery(&mut frame, &delivery);
            let found = Datagram::find(&frame).unwrap();
            assert_eq!((found.tos, found.ttl, found.payload(&frame)), (0x2a, 3, PAYLOAD));
            assert_eq!(udp_sum(&frame), 0);
            assert!(is_v6 || sum(frame[ETHERNET..ETHERNET + 20].iter().copied()) == 0);
        }
    }

    #[test]
    fn damage_flips_one_bit_with_or_without_a_matching_checksum() {
        for is_v6 in [false, true] {
            for bit in 0..PAYLOAD.len() * 8 {
                #[expect(clippy::cast_precision_loss, reason = "small")]
                let share = (bit as f64 + 0.5) / (PAYLOAD.len() * 8) as f64;
                for noticed_by in [Corruption::Detected, Corruption::Undetected] {
                    let mut frame = frame(is_v6);
                    let delivery = Delivery { at: 0, damage: Some((share, noticed_by)), tos: 0xb8, ttl: 255 };
                    Datagram::find(&frame).unwrap().apply_delivery(&mut frame, &delivery);
                    let found = Datagram::find(&frame).unwrap();
                    let differs =
                        found.payload(&frame).iter().zip(PAYLOAD).map(|(a, b)| (a ^ b).count_ones());
                    assert_eq!(differs.sum::<u32>(), 1);
                    assert_eq!(udp_sum(&frame) == 0, noticed_by == Corruption::Undetected, "bit {bit}");
                }
            }
        }
    }
}
