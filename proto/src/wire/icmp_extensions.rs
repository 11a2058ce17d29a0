//! What routers attach to ICMP errors (RFC 4884): the MPLS labels of RFC 4950 and the interfaces of RFC 5837.
//!
//! ```text
//! 0 u4  version 2            0.5  u12 reserved
//! 2 u16 checksum of the whole structure; 0: not transmitted
//! 4     objects, each:
//!       0 u16 length including this header    2 u8 class    3 u8 type
//!       4     payload
//!
//! class 1, type 1: label stack entries, the top first
//!       u20 label    u3 traffic class    u1 bottom of the stack    u8 TTL
//!
//! class 2: one interface. The type says what is present, from the highest bit:
//!       u2 role    u2 reserved    u1 index    u1 address    u1 name    u1 MTU
//!       u32 index
//!       u16 address family (1: IPv4, 2: IPv6)    u16 reserved    4 or 16 bytes
//!       u8 length including this byte, a multiple of 4, at most 64    UTF-8, padded with zeros
//!       u32 MTU
//! ```
//! Objects of other classes and types, and malformed objects, are skipped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::icmp::sum;
use super::{array, put, u16_at, u32_at};

/// An entry of a label stack with which a packet arrived at a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MplsLabel {
    /// Label, below 2²⁰.
    pub label: u32,
    /// Traffic class, formerly called experimental bits; below 8.
    pub traffic_class: u8,
    /// Whether this is the last entry of the stack.
    pub is_bottom: bool,
    /// Time to live.
    pub ttl: u8,
}

/// An interface of a router, of which some properties are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceInfo<'a> {
    /// What the packet had to do with it.
    pub role: InterfaceRole,
    /// Index (SNMP `ifIndex`).
    pub index: Option<u32>,
    /// Address.
    pub address: Option<IpAddr>,
    /// Name (SNMP `ifName`), not empty, at most 63 bytes. It may contain control characters.
    pub name: Option<&'a str>,
    /// MTU in bytes.
    pub mtu: Option<u32>,
}

/// What a packet had to do with an interface (RFC 5837 section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum InterfaceRole {
    /// It arrived there.
    Incoming,
    /// It arrived at this part of that interface.
    IncomingSubIp,
    /// It would have been forwarded there.
    Outgoing,
    /// It would have been forwarded to this neighbour.
    NextHop,
}

impl InterfaceRole {
    /// The role as JSON shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Incoming => "incoming",
            Self::IncomingSubIp => "incoming_sub_ip",
            Self::Outgoing => "outgoing",
            Self::NextHop => "next_hop",
        }
    }
}

/// What an object says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpExtension<'a> {
    /// The next entry of the label stack.
    Label(MplsLabel),
    /// An interface.
    Interface(InterfaceInfo<'a>),
}

/// The contents of an extension structure, in its order.
#[derive(Debug, Clone, Copy)]
pub struct IcmpExtensions<'a> {
    /// Objects that were not visited yet.
    objects: &'a [u8],
    /// Label stack entries of the current object that were not visited yet.
    labels: &'a [u8],
}

/// Why an extension structure cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IcmpExtensionsError {
    /// It is shorter than its header.
    #[error("ends at byte {len}, inside the header")]
    Truncated {
        /// Length of the input in bytes.
        len: usize,
    },
    /// It has an unknown format.
    #[error("version {found} (this build supports 2)")]
    Version {
        /// Its version.
        found: u8,
    },
    /// It was changed on the way.
    #[error("the checksum is wrong")]
    Checksum,
    /// An object ends before its header, or after the structure.
    #[error("the object at byte {at} has an impossible length")]
    Length {
        /// Offset of the object.
        at: usize,
    },
}

const HEADER_BYTES: usize = 4;
const VERSION: u8 = 2;
const OBJECT_HEADER_BYTES: usize = 4;

/// Class and type of a label stack (RFC 4950 section 3).
const LABEL_STACK: [u8; 2] = [1, 1];
const LABEL_BYTES: usize = 4;

/// Class of interface information (RFC 5837 section 4), and what the bits of the type say.
const INTERFACE: u8 = 2;
const HAS_INDEX: u8 = 8;
const HAS_ADDRESS: u8 = 4;
const HAS_NAME: u8 = 2;
const HAS_MTU: u8 = 1;

/// Longest name of an interface with its length byte (RFC 5837 section 4.3).
const NAME_BYTES_MAX: usize = 64;

/// Length of the quoted datagram with its IP header in errors of routers that attach extensions without
/// saying so (RFC 4884 section 5.5).
const UNANNOUNCED_QUOTATION_BYTES: usize = 128;

impl<'a> IcmpExtensions<'a> {
    /// Checks an extension structure and begins to read it.
    ///
    /// # Errors
    /// [`IcmpExtensionsError`].
    pub fn decode(structure: &'a [u8]) -> Result<Self, IcmpExtensionsError> {
        let objects =
            structure.get(HEADER_BYTES..).ok_or(IcmpExtensionsError::Truncated { len: structure.len() })?;
        let version = structure[0] >> 4;
        if version != VERSION {
            return Err(IcmpExtensionsError::Version { found: version });
        }
        if has_checksum(structure) && sum(structure) != 0xffff {
            return Err(IcmpExtensionsError::Checksum);
        }
        let mut left = objects;
        while !left.is_empty() {
            let at = structure.len() - left.len();
            (_, left) = split_object(left).ok_or(IcmpExtensionsError::Length { at })?;
        }
        Ok(Self { objects, labels: &[] })
    }

    /// A structure with these objects, given as class, type and payload, and its checksum. A payload that
    /// does not fit the length of its object is cut off.
    #[must_use]
    pub fn encode(objects: &[(u8, u8, &[u8])]) -> Vec<u8> {
        let mut structure = vec![VERSION << 4, 0, 0, 0];
        for (class, kind, payload) in objects {
            let payload = payload.get(..usize::from(u16::MAX) - OBJECT_HEADER_BYTES).unwrap_or(payload);
            let length = u16::try_from(OBJECT_HEADER_BYTES + payload.len()).unwrap_or(u16::MAX);
            structure.extend(length.to_be_bytes());
            structure.extend([*class, *kind]);
            structure.extend(payload);
        }
        let checksum = !sum(&structure);
        put(&mut structure, 2, &checksum.to_be_bytes());
        structure
    }

    /// The offset of an extension structure that an error does not announce; `None` if there is none.
    /// `payload` is what the error quotes behind the first `header_bytes` of the datagram, and all that
    /// follows.
    ///
    /// Such routers quote exactly 128 bytes (RFC 4884 section 5.5). Only a structure with a valid checksum
    /// and objects that end where the error ends is taken for one, because routers without extensions quote
    /// more, too: arbitrary bytes pass for one with a probability below 2⁻²⁰.
    #[must_use]
    pub fn unannounced_at(payload: &[u8], header_bytes: usize) -> Option<u16> {
        let at = UNANNOUNCED_QUOTATION_BYTES.checked_sub(header_bytes)?;
        let structure = payload.get(at..)?;
        let is_certain = has_checksum(structure) && structure.len() > HEADER_BYTES;
        (is_certain && IcmpExtensions::decode(structure).is_ok()).then(|| u16::try_from(at).ok())?
    }
}

impl<'a> Iterator for IcmpExtensions<'a> {
    type Item = IcmpExtension<'a>;

    fn next(&mut self) -> Option<IcmpExtension<'a>> {
        loop {
            if let Some((entry, left)) = self.labels.split_first_chunk::<LABEL_BYTES>() {
                self.labels = left;
                return Some(IcmpExtension::Label(MplsLabel::read(*entry)));
            }
            let (object, left) = split_object(self.objects)?;
            self.objects = left;
            let payload = &object[OBJECT_HEADER_BYTES..];
            match [object[2], object[3]] {
                LABEL_STACK if payload.len().is_multiple_of(LABEL_BYTES) => self.labels = payload,
                [INTERFACE, kind] => {
                    if let Some(interface) = InterfaceInfo::read(kind, payload) {
                        return Some(IcmpExtension::Interface(interface));
                    }
                }
                _ => {}
            }
        }
    }
}

fn has_checksum(structure: &[u8]) -> bool {
    u16_at(structure, 2) != 0
}

/// The first object with its header, and what follows it; `None` if its length is impossible or there is
/// none.
fn split_object(objects: &[u8]) -> Option<(&[u8], &[u8])> {
    let header: [u8; OBJECT_HEADER_BYTES] = *objects.first_chunk()?;
    let length = usize::from(u16_at(&header, 0));
    if length < OBJECT_HEADER_BYTES {
        return None;
    }
    objects.split_at_checked(length)
}

impl MplsLabel {
    /// Number of the bytes of [`MplsLabel::to_bytes`].
    pub const BYTES: usize = LABEL_BYTES;

    fn read(entry: [u8; LABEL_BYTES]) -> Self {
        let [.., low, ttl] = entry;
        Self {
            label: u32::from_be_bytes(entry) >> 12,
            traffic_class: low >> 1 & 7,
            is_bottom: low & 1 != 0,
            ttl,
        }
    }

    /// The entry of a label stack (RFC 3032 section 2.1). Bits above the range of a field are cut off.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; LABEL_BYTES] {
        let [_, high, middle, low] = (self.label << 4).to_be_bytes();
        [high, middle, low | (self.traffic_class & 7) << 1 | self.is_bottom as u8, self.ttl]
    }
}

impl<'a> InterfaceInfo<'a> {
    /// Reads an object; `None` if it is malformed.
    fn read(kind: u8, payload: &'a [u8]) -> Option<Self> {
        let role = match kind >> 6 {
            0 => InterfaceRole::Incoming,
            1 => InterfaceRole::IncomingSubIp,
            2 => InterfaceRole::Outgoing,
            _ => InterfaceRole::NextHop,
        };
        let has = |bit: u8| kind & bit != 0;
        let mut left = payload;
        let index = if has(HAS_INDEX) { Some(u32_at(take(&mut left, 4)?, 0)) } else { None };
        let address = if has(HAS_ADDRESS) { Some(read_address(&mut left)?) } else { None };
        let name = if has(HAS_NAME) { read_name(&mut left)? } else { None };
        let mtu = if has(HAS_MTU) { Some(u32_at(take(&mut left, 4)?, 0)) } else { None };
        Some(Self { role, index, address, name, mtu })
    }
}

/// Takes `count` bytes from the front; `None` if there are fewer.
fn take<'a>(left: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = left.split_at_checked(count)?;
    *left = rest;
    Some(taken)
}

fn read_address(left: &mut &[u8]) -> Option<IpAddr> {
    // Address families of IANA.
    match u16_at(take(left, 4)?, 0) {
        1 => Some(Ipv4Addr::from(array(take(left, 4)?, 0)).into()),
        2 => Some(Ipv6Addr::from(array(take(left, 16)?, 0)).into()),
        _ => None,
    }
}

/// A name up to its padding, without what is not UTF-8: routers cut long names. The inner value is `None` if
/// nothing is left of it.
fn read_name<'a>(left: &mut &'a [u8]) -> Option<Option<&'a str>> {
    let length = usize::from(*left.first()?);
    if length == 0 || length > NAME_BYTES_MAX || !length.is_multiple_of(4) {
        return None;
    }
    let bytes = &take(left, length)?[1..];
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
    Some(Some(text).filter(|text| !text.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(bytes: &mut [u8]) {
        bytes[2..4].fill(0);
        let checksum = !sum(bytes);
        bytes[2..4].copy_from_slice(&checksum.to_be_bytes());
    }

    fn read(bytes: &[u8]) -> Vec<IcmpExtension<'_>> {
        IcmpExtensions::decode(bytes).unwrap().collect()
    }

    fn label(label: u32, traffic_class: u8, is_bottom: bool, ttl: u8) -> IcmpExtension<'static> {
        IcmpExtension::Label(MplsLabel { label, traffic_class, is_bottom, ttl })
    }

    const ROLES: [InterfaceRole; 4] = [
        InterfaceRole::Incoming,
        InterfaceRole::IncomingSubIp,
        InterfaceRole::Outgoing,
        InterfaceRole::NextHop,
    ];

    const NOTHING: InterfaceInfo<'static> =
        InterfaceInfo { role: InterfaceRole::Incoming, index: None, address: None, name: None, mtu: None };

    /// A label stack as in RFC 4950 figure 1: label 16004, then 24015 with traffic class 5 at the bottom.
    #[test]
    fn label_stack_has_the_layout_of_rfc_4950() {
        let bytes = [
            0x20, 0x00, 0x99, 0x2e, // version 2, checksum
            0x00, 0x0c, 0x01, 0x01, // length 12, class 1, type 1
            0x03, 0xe8, 0x40, 0x01, // 16004, 0, not the bottom, TTL 1
            0x05, 0xdc, 0xfb, 0xfe, // 24015, 5, the bottom, TTL 254
        ];
        let expected = [label(16_004, 0, false, 1), label(24_015, 5, true, 254)];
        assert_eq!(read(&bytes), expected);
        let entries = expected.map(|entry| {
            let IcmpExtension::Label(entry) = entry else { unreachable!("they are labels") };
            entry.to_bytes()
        });
        assert_eq!(entries.concat(), bytes[8..]);
    }

    /// Interfaces as in RFC 5837 section 4: the incoming one with everything, and a next hop over IPv6.
    #[test]
    fn interfaces_have_the_layout_of_rfc_5837() {
        let bytes = [
            &[0x20, 0x00, 0x00, 0x00][..], // version 2, no checksum
            &[0x00, 0x24, 0x02, 0x0f],     // length 36, class 2, incoming: index, address, name, MTU
            &[0x00, 0x00, 0x02, 0x01],     // index 513
            &[0x00, 0x01, 0x00, 0x00],     // IPv4
            &[192, 0, 2, 1],
            &[0x10], // 16 bytes with this one
            b"GigabitEth0/1\0\0",
            &[0x00, 0x00, 0x05, 0xdc], // MTU 1500
            &[0x00, 0x18, 0x02, 0xc4], // length 24, class 2, next hop: address
            &[0x00, 0x02, 0x00, 0x00], // IPv6
            &[0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
        ]
        .concat();
        let incoming = InterfaceInfo {
            role: InterfaceRole::Incoming,
            index: Some(513),
            address: Some([192, 0, 2, 1].into()),
            name: Some("GigabitEth0/1"),
            mtu: Some(1_500),
        };
        let next_hop = InterfaceInfo {
            role: InterfaceRole::NextHop,
            address: Some("2001:db8::7".parse().unwrap()),
            ..NOTHING
        };
        assert_eq!(read(&bytes), [incoming, next_hop].map(IcmpExtension::Interface));
        let roles = [0x00, 0x40, 0x80, 0xc0].map(|kind| InterfaceInfo::read(kind, &[]).unwrap().role);
        assert_eq!(roles, ROLES);
        assert_eq!(InterfaceInfo::read(0x30, &[]), Some(NOTHING), "reserved bits are ignored");
    }

    #[test]
    fn structure_with_a_wrong_checksum_version_or_length_is_refused() {
        let entry = [3, 0xe8, 0x41, 1];
        let valid = IcmpExtensions::encode(&[(1, 1, &entry), (9, 9, &[]), (1, 1, &entry)]);
        assert_eq!(read(&valid).len(), 2, "an unknown object is skipped");
        for at in 0..valid.len() {
            let mut wrong = valid.clone();
            wrong[at] ^= 0x10;
            assert!(IcmpExtensions::decode(&wrong).is_err(), "byte {at}");
        }
        let decode = |bytes: &[u8]| IcmpExtensions::decode(bytes).map(Iterator::count);
        for len in 0..4 {
            assert_eq!(decode(&valid[..len]), Err(IcmpExtensionsError::Truncated { len }));
        }
        let mut version = valid.clone();
        version[0] = 0x10;
        seal(&mut version);
        assert_eq!(decode(&version), Err(IcmpExtensionsError::Version { found: 1 }));
        let mut changed = valid.clone();
        changed[11] ^= 1;
        assert_eq!(decode(&changed), Err(IcmpExtensionsError::Checksum));
        changed[2..4].fill(0);
        assert_eq!(decode(&changed), Ok(2), "the checksum was not transmitted");
        for (length, at) in [(0, 4), (3, 4), (21, 4), (0xffff, 4), (9, 13), (19, 23)] {
            let mut wrong = valid.clone();
            wrong[4..6].copy_from_slice(&u16::to_be_bytes(length));
            wrong[2..4].fill(0);
            assert_eq!(decode(&wrong), Err(IcmpExtensionsError::Length { at }), "length {length}");
        }
        assert_eq!(decode(&IcmpExtensions::encode(&[])), Ok(0));
    }

    #[test]
    fn truncated_structure_is_refused_even_without_a_checksum() {
        let mut bytes = IcmpExtensions::encode(&[(1, 1, &[3, 0xe8, 0x41, 1]), (2, 8, &[0, 0, 0, 9])]);
        bytes[2..4].fill(0);
        for length in 0..bytes.len() {
            // Between two objects nothing shows that one is missing.
            let is_readable = [4, 12].contains(&length);
            assert_eq!(IcmpExtensions::decode(&bytes[..length]).is_ok(), is_readable, "{length} bytes");
        }
    }

    #[test]
    fn malformed_object_is_skipped() {
        let interfaces: &[(u8, &[u8])] = &[
            (8, &[0, 0, 0]),
            (4, &[0, 1, 0, 0, 192, 0, 2]),
            (4, &[0, 2, 0, 0, 192, 0, 2, 1]),
            (4, &[0, 3, 0, 0, 192, 0, 2, 1]),
            (4, &[0]),
            (2, &[]),
            (2, &[0, 0, 0, 0]),
            (2, &[5, b'a', 0, 0, 0, 0]),
            (2, &[8, b'a', 0, 0]),
            (2, &[[68].as_slice(), &[b'a'; 67]].concat()),
            (1, &[0, 5]),
        ];
        for (kind, payload) in interfaces {
            let bytes = IcmpExtensions::encode(&[(2, *kind, payload), (1, 1, &[3, 0xe8, 0x41, 1])]);
            assert_eq!(read(&bytes), [label(16_004, 0, true, 1)], "{kind} {payload:?}");
        }
        assert_eq!(read(&IcmpExtensions::encode(&[(1, 1, &[3, 0xe8, 0x41, 1, 0]), (1, 2, &[0; 4])])), []);
    }

    #[test]
    fn name_ends_at_its_padding_and_at_the_first_byte_that_is_not_utf_8() {
        let longest = [[64].as_slice(), &[b'x'; 63]].concat();
        let name = |bytes: &[u8]| InterfaceInfo::read(HAS_NAME, bytes).unwrap().name.map(str::to_owned);
        assert_eq!(name(&longest), Some("x".repeat(63)));
        assert_eq!(name(b"\x08eth0\0\0\0"), Some("eth0".into()));
        assert_eq!(name(b"\x08eth0\0ab"), Some("eth0".into()));
        assert_eq!(name("\x08ge-ü\0\0".as_bytes()), Some("ge-ü".into()));
        assert_eq!(name(b"\x08abcde\xc3\xff"), Some("abcde".into()));
        assert_eq!(name(b"\x04\xff\xff\xff"), None);
        assert_eq!(name(b"\x04\0\0\0"), None);
    }

    #[test]
    fn unannounced_structure_is_found_only_behind_128_quoted_bytes() {
        let extension = IcmpExtensions::encode(&[(1, 1, &[3, 0xe8, 0x41, 1])]);
        let payload = |quoted: usize| [vec![0; quoted], extension.clone()].concat();
        assert_eq!(IcmpExtensions::unannounced_at(&payload(100), 28), Some(100));
        assert_eq!(IcmpExtensions::unannounced_at(&payload(80), 48), Some(80));
        for quoted in [0, 96, 99, 101, 104, 300] {
            assert_eq!(IcmpExtensions::unannounced_at(&payload(quoted), 28), None, "{quoted} bytes");
        }
        let mut unchecked = payload(100);
        unchecked[102..104].fill(0);
        assert_eq!(IcmpExtensions::unannounced_at(&unchecked, 28), None, "without a checksum");
        let mut longer = payload(100);
        longer.push(0);
        assert_eq!(IcmpExtensions::unannounced_at(&longer, 28), None);
        let empty = [vec![0; 100], IcmpExtensions::encode(&[])].concat();
        assert_eq!(IcmpExtensions::unannounced_at(&empty, 28), None, "without an object");
        assert_eq!(IcmpExtensions::unannounced_at(&payload(100), 129), None);
    }
}
