//! TCP segments (RFC 9293 section 3.1) without data, and what ICMP errors quote of them.
//!
//! ```text
//!  0 u16 source port            2 u16 destination port
//!  4 u32 sequence number        8 u32 acknowledgment number
//! 12 u4 header length in words, u4 reserved, flags: … ACK 16, PSH 8, RST 4, SYN 2, FIN 1
//! 14 u16 window                16 u16 checksum, also over the addresses
//! 18 u16 urgent pointer        20 options: u8 kind, u8 length, the rest; only the kind of padding (1) and of
//!                                 the end (0)
//! ```
//! An ICMP message that reports the end of a TTL (RFC 792, RFC 4443 section 3.3) quotes the packet from its
//! IP header on, at least eight bytes after that: the ports and the sequence number.

use std::net::{IpAddr, SocketAddr};

use super::icmp::{self, IcmpVersion, pseudo_header, sum};
use super::icmp_extensions::IcmpExtensions;
use super::{DecodeError, array, put, require, u16_at, u32_at};

/// A segment that carries no data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmptySegment {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Receive window, before scaling.
    pub window: u16,
    /// The timestamps option; `None`: the connection has none.
    pub timestamps: Option<SegmentTimestamps>,
}

/// The timestamps option (RFC 7323 section 3). On a connection whose ends have agreed on it, segments without
/// it may be discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentTimestamps {
    /// The clock of the sender.
    pub value: u32,
    /// The latest value that the sender has received.
    pub echo: u32,
}

/// What a received segment says about its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceivedSegment {
    /// Port of the sender.
    pub source_port: u16,
    /// Port of the receiver.
    pub destination_port: u16,
    /// The sequence number after its data.
    pub next_sequence: u32,
    /// The next sequence number that its sender expects.
    pub acknowledgment: u32,
    /// Whether it carries no data.
    pub is_empty: bool,
    /// The timestamps option; `None`: it has none.
    pub timestamps: Option<SegmentTimestamps>,
    /// Whether it says which data was received out of order, or twice (RFC 2018, RFC 2883).
    pub has_sack: bool,
}

/// A segment whose TTL has ended, as an ICMP error quotes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpiredSegment<'a> {
    /// Its sender.
    pub source: SocketAddr,
    /// Its destination.
    pub destination: SocketAddr,
    /// Its sequence number.
    pub sequence: u32,
    /// The extension structure behind the quotation (RFC 4884); `None` if there is none.
    pub extensions: Option<&'a [u8]>,
}

const HEADER_BYTES: usize = 20;

/// Two bytes of padding, and the timestamps option.
const TIMESTAMPS_BYTES: usize = 12;

/// Kinds of options.
const END: u8 = 0;
const PADDING: u8 = 1;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;

/// Length of the timestamps option.
const TIMESTAMPS_LENGTH: u8 = 10;

const ACK: u8 = 16;
const RST: u8 = 4;
const SYN: u8 = 2;
const FIN: u8 = 1;

/// Protocol number.
const TCP: u8 = 6;

/// Lengths of IP headers without options or extension headers, and of an ICMP header.
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const ICMP_BYTES: usize = 8;

/// Bytes of a segment that every router quotes.
const QUOTED_BYTES: usize = 8;

impl EmptySegment {
    /// The segment from `source` to `destination`, which are of one family, with the flag ACK.
    #[must_use]
    pub fn encode(&self, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        let options_bytes = if self.timestamps.is_some() { TIMESTAMPS_BYTES } else { 0 };
        let mut segment = vec![0; HEADER_BYTES + options_bytes];
        // In words, before four reserved bits.
        let header_words = u8::try_from(segment.len() / 4).expect("a few bytes") << 4;
        if let Some(SegmentTimestamps { value, echo }) = self.timestamps {
            put(&mut segment, HEADER_BYTES, &[PADDING, PADDING, TIMESTAMPS, TIMESTAMPS_LENGTH]);
            put(&mut segment, HEADER_BYTES + 4, &value.to_be_bytes());
            put(&mut segment, HEADER_BYTES + 8, &echo.to_be_bytes());
        }
        put(&mut segment, 0, &source.port().to_be_bytes());
        put(&mut segment, 2, &destination.port().to_be_bytes());
        put(&mut segment, 4, &self.sequence.to_be_bytes());
        put(&mut segment, 8, &self.acknowledgment.to_be_bytes());
        put(&mut segment, 12, &[header_words, ACK]);
        put(&mut segment, 14, &self.window.to_be_bytes());
        let checksum = !sum(&covered(source.ip(), destination.ip(), &segment));
        put(&mut segment, 16, &checksum.to_be_bytes());
        segment
    }
}

/// What the checksum of a segment covers: addresses, length and protocol, and the segment.
fn covered(source: IpAddr, destination: IpAddr, segment: &[u8]) -> Vec<u8> {
    let mut covered = pseudo_header(source, destination, TCP, segment.len());
    covered.extend(segment);
    covered
}

impl ReceivedSegment {
    /// Reads a segment of an established connection from its TCP header on.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if it opens, closes or resets a connection,
    /// or acknowledges nothing.
    pub fn decode(segment: &[u8]) -> Result<Self, DecodeError> {
        require(segment, HEADER_BYTES, "TCP header")?;
        let header_bytes = usize::from(segment[12] >> 4) * 4;
        if header_bytes < HEADER_BYTES || segment[13] & (ACK | RST | SYN | FIN) != ACK {
            return Err(DecodeError::Unrecognized { field: "segment of an established connection" });
        }
        require(segment, header_bytes, "TCP options")?;
        let data_bytes = u32::try_from(segment.len() - header_bytes).unwrap_or(u32::MAX);
        Ok(Self {
            source_port: u16_at(segment, 0),
            destination_port: u16_at(segment, 2),
            next_sequence: u32_at(segment, 4).wrapping_add(data_bytes),
            acknowledgment: u32_at(segment, 8),
            is_empty: data_bytes == 0,
            timestamps: options(&segment[HEADER_BYTES..header_bytes]).find_map(|(kind, value)| {
                let is_timestamps = kind == TIMESTAMPS && value.len() == usize::from(TIMESTAMPS_LENGTH) - 2;
                is_timestamps.then(|| SegmentTimestamps { value: u32_at(value, 0), echo: u32_at(value, 4) })
            }),
            has_sack: options(&segment[HEADER_BYTES..header_bytes]).any(|(kind, _)| kind == SACK),
        })
    }
}

/// The options of a segment, up to one that is malformed: their kinds, and what follows their lengths.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (kind, after) = loop {
            match bytes.split_first()? {
                (&PADDING, rest) => bytes = rest,
                (&END, _) => return None,
                (&kind, rest) => break (kind, rest),
            }
        };
        let (length, rest) = after.split_first()?;
        let (value, rest) = rest.split_at_checked(usize::from(*length).checked_sub(2)?)?;
        bytes = rest;
        Some((kind, value))
    })
}

impl<'a> ExpiredSegment<'a> {
    /// Reads an ICMP message from its ICMP header on.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if it is damaged, of another type, or quotes
    /// no TCP segment. Packets with IPv6 extension headers are not read, because the agent sends none.
    pub fn decode(message: &'a [u8], version: IcmpVersion) -> Result<Self, DecodeError> {
        require(message, ICMP_BYTES, "ICMP header")?;
        let (kind, length_at, unit) = match version {
            IcmpVersion::V4 => (11, 5, 4),
            IcmpVersion::V6 => (3, 4, 8),
        };
        // Of ICMPv6 the kernel verifies the checksum, which also covers the addresses.
        let is_intact = version == IcmpVersion::V6 || icmp::is_intact(message);
        if message[..2] != [kind, 0] || !is_intact {
            return Err(DecodeError::Unrecognized { field: "report that a TTL has ended" });
        }
        let quoted = &message[ICMP_BYTES..];
        let (source, destination, header_bytes): (IpAddr, IpAddr, usize) = match version {
            IcmpVersion::V4 => {
                require(quoted, IPV4_BYTES, "quoted IPv4 header")?;
                let is_segment = quoted[0] >> 4 == 4 && quoted[9] == TCP && u16_at(quoted, 6) & 0x1fff == 0;
                let header_bytes = usize::from(quoted[0] & 15) * 4;
                if !is_segment || header_bytes < IPV4_BYTES {
                    return Err(DecodeError::Unrecognized { field: "quoted TCP segment" });
                }
                (array::<4>(quoted, 12).into(), array::<4>(quoted, 16).into(), header_bytes)
            }
            IcmpVersion::V6 => {
                require(quoted, IPV6_BYTES, "quoted IPv6 header")?;
                if quoted[0] >> 4 != 6 || quoted[6] != TCP {
                    return Err(DecodeError::Unrecognized { field: "quoted TCP segment" });
                }
                (array::<16>(quoted, 8).into(), array::<16>(quoted, 24).into(), IPV6_BYTES)
            }
        };
        require(quoted, header_bytes + QUOTED_BYTES, "quoted TCP header")?;
        let segment = &quoted[header_bytes..];
        let announced = usize::from(message[length_at]) * unit;
        let extensions = match announced {
            0 => IcmpExtensions::unannounced_at(segment, header_bytes)
                .and_then(|at| segment.get(usize::from(at)..)),
            _ => quoted.get(announced..).filter(|structure| !structure.is_empty()),
        };
        Ok(Self {
            source: SocketAddr::new(source, u16_at(segment, 0)),
            destination: SocketAddr::new(destination, u16_at(segment, 2)),
            sequence: u32_at(segment, 4),
            extensions,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::icmp_extensions::{IcmpExtension, MplsLabel};

    const SEGMENT: EmptySegment =
        EmptySegment { sequence: 0x0102_0304, acknowledgment: 0x0506_0708, window: 512, timestamps: None };

    fn addresses(version: IcmpVersion) -> [SocketAddr; 2] {
        match version {
            IcmpVersion::V4 => ["192.0.2.1:9862", "198.51.100.7:50000"],
            IcmpVersion::V6 => ["[2001:db8::1]:9862", "[2001:db8:1::7]:50000"],
        }
        .map(|text| text.parse().unwrap())
    }

    /// The ICMP message with which a router reports the end of a segment's TTL. `quoted` bytes of it follow
    /// the IP header.
    fn report(version: IcmpVersion, segment: &[u8], quoted: usize) -> Vec<u8> {
        let [source, destination] = addresses(version).map(|address| address.ip());
        let mut message = vec![if version == IcmpVersion::V4 { 11 } else { 3 }, 0, 0, 0, 0, 0, 0, 0];
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                message.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 1, TCP, 0, 0]);
                message.extend([source.octets(), destination.octets()].concat());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                message.extend([0x60, 0, 0, 0, 0, 20, TCP, 1]);
                message.extend([source.octets(), destination.octets()].concat());
            }
            _ => unreachable!("both are of one family"),
        }
        message.extend(&segment[..quoted]);
        complete(message)
    }

    fn complete(mut message: Vec<u8>) -> Vec<u8> {
        message[2..4].fill(0);
        let checksum = !sum(&message);
        put(&mut message, 2, &checksum.to_be_bytes());
        message
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let [source, destination] = addresses(IcmpVersion::V4);
        let found: String =
            SEGMENT.encode(source, destination).iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "2686 c350 01020304 05060708 50 10 0200 7b12 0000";
        assert_eq!(found[..32], expected.replace(' ', "")[..32]);
    }

    #[test]
    fn checksum_covers_the_addresses() {
        for version in [IcmpVersion::V4, IcmpVersion::V6] {
            let [source, destination] = addresses(version);
            let segment = SEGMENT.encode(source, destination);
            assert_eq!(sum(&covered(source.ip(), destination.ip(), &segment)), 0xffff);
            let other = sum(&covered(source.ip(), source.ip(), &segment));
            assert_ne!(other, 0xffff, "it is of these addresses");
        }
    }

    #[test]
    fn options_are_read_up_to_one_that_is_malformed() {
        let [source, destination] = addresses(IcmpVersion::V4);
        let timestamps = Some(SegmentTimestamps { value: 0x1122_3344, echo: 0x5566_7788 });
        let sent = EmptySegment { timestamps, ..SEGMENT }.encode(source, destination);
        assert_eq!((sent.len(), sum(&covered(source.ip(), destination.ip(), &sent))), (32, 0xffff));
        let found = ReceivedSegment::decode(&sent).unwrap();
        assert_eq!((found.timestamps, found.is_empty, found.has_sack), (timestamps, true, false));
        let with = |options: &[u8]| {
            let mut segment = SEGMENT.encode(source, destination);
            segment.extend(options);
            segment[12] = u8::try_from(segment.len() / 4).unwrap() << 4;
            let found = ReceivedSegment::decode(&segment).unwrap();
            (found.timestamps.is_some(), found.has_sack)
        };
        let [time, sack] = [&[8, 10, 0, 0, 0, 1, 0, 0, 0, 2][..], &[5, 10, 0, 0, 0, 1, 0, 0, 0, 2]];
        assert_eq!(with(&[sack, &[1, 1], time, &[0, 0]].concat()), (true, true));
        assert_eq!(with(&[time, &[0, 1], sack, &[1, 1]].concat()), (true, false), "after the end");
        assert_eq!(with(&[&[3, 1], time].concat()), (false, false), "shorter than an option can be");
        assert_eq!(with(&[&[3, 13], time].concat()), (false, false), "longer than the header");
        assert_eq!(with(&[8, 6, 0, 0, 0, 1, 1, 1]), (false, false), "timestamps of another length");
        assert_eq!(with(&[1, 1, 1, 8]), (false, false));
    }

    #[test]
    fn received_segment_says_what_comes_next() {
        let [source, destination] = addresses(IcmpVersion::V4);
        let mut segment = SEGMENT.encode(source, destination);
        let expected = ReceivedSegment {
            source_port: 9_862,
            destination_port: 50_000,
            next_sequence: SEGMENT.sequence,
            acknowledgment: SEGMENT.acknowledgment,
            is_empty: true,
            timestamps: None,
            has_sack: false,
        };
        assert_eq!(ReceivedSegment::decode(&segment), Ok(expected));
        // Twelve bytes of options and three of data.
        segment[12] = 8 << 4;
        segment.extend([0; 15]);
        let expected = ReceivedSegment { next_sequence: SEGMENT.sequence + 3, is_empty: false, ..expected };
        assert_eq!(ReceivedSegment::decode(&segment), Ok(expected));
        put(&mut segment, 4, &[0xff; 4]);
        assert_eq!(ReceivedSegment::decode(&segment).unwrap().next_sequence, 2, "it wraps around");
        for flags in [0, SYN, ACK | SYN, ACK | RST, ACK | FIN] {
            let mut other = segment.clone();
            other[13] = flags;
            assert!(ReceivedSegment::decode(&other).is_err(), "{flags}");
        }
        for length in 0..32 {
            assert!(ReceivedSegment::decode(&segment[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn report_of_a_router_names_the_segment() {
        for version in [IcmpVersion::V4, IcmpVersion::V6] {
            let [source, destination] = addresses(version);
            let segment = SEGMENT.encode(source, destination);
            for quoted in [8, 20] {
                let message = report(version, &segment, quoted);
                let sequence = SEGMENT.sequence;
                let expected = ExpiredSegment { source, destination, sequence, extensions: None };
                assert_eq!(ExpiredSegment::decode(&message, version), Ok(expected));
                for length in 0..message.len() - quoted + 8 {
                    assert!(ExpiredSegment::decode(&message[..length], version).is_err(), "{length}");
                }
            }
        }
    }

    #[test]
    fn other_reports_and_other_packets_are_not_read() {
        for version in [IcmpVersion::V4, IcmpVersion::V6] {
            let [source, destination] = addresses(version);
            let message = report(version, &SEGMENT.encode(source, destination), 8);
            let protocol_at = if version == IcmpVersion::V4 { 8 + 9 } else { 8 + 6 };
            for at in [0, 1, 8, protocol_at] {
                let mut other = message.clone();
                other[at] ^= 0x10;
                assert!(ExpiredSegment::decode(&complete(other), version).is_err(), "byte {at}");
            }
            let other = if version == IcmpVersion::V4 { IcmpVersion::V6 } else { IcmpVersion::V4 };
            assert!(ExpiredSegment::decode(&message, other).is_err());
        }
        let [source, destination] = addresses(IcmpVersion::V4);
        let mut damaged = report(IcmpVersion::V4, &SEGMENT.encode(source, destination), 8);
        damaged[30] ^= 1;
        assert!(ExpiredSegment::decode(&damaged, IcmpVersion::V4).is_err(), "its checksum is wrong");
    }

    #[test]
    fn extensions_follow_the_quotation() {
        let label = MplsLabel { label: 16_004, traffic_class: 0, is_bottom: true, ttl: 1 };
        let structure = IcmpExtensions::encode(&[(1, 1, &label.to_bytes())]);
        for version in [IcmpVersion::V4, IcmpVersion::V6] {
            let [source, destination] = addresses(version);
            for is_announced in [true, false] {
                let mut message = report(version, &SEGMENT.encode(source, destination), 20);
                message.resize(8 + 128, 0);
                if is_announced {
                    match version {
                        IcmpVersion::V4 => message[5] = 32,
                        IcmpVersion::V6 => message[4] = 16,
                    }
                }
                message.extend(&structure);
                let message = complete(message);
                let expired = ExpiredSegment::decode(&message, version).unwrap();
                let mut found = IcmpExtensions::decode(expired.extensions.unwrap()).unwrap();
                assert_eq!(found.next(), Some(IcmpExtension::Label(label)));
            }
        }
    }
}
