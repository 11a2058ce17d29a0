//! ICMP echo messages (RFC 792, and ICMPv6: RFC 4443 section 4) with pathmeter's payload.
//!
//! ```text
//!  0 u8  type: request 8, reply 0; in ICMPv6 128 and 129
//!  1 u8  code 0                  2 u16 checksum
//!  4 u16 identifier              6 u16 lower half of the sequence number
//!  8 u32 magic "pmic"           12 u32 session
//! 16 u64 T1                     24 u32 sequence number
//! 28 u16 SSID                   30 u16 balance
//! 32     zeros, up to the size
//! ```
//! A host replies with the same bytes except type and checksum.
//!
//! The balance makes the 16-bit words after the identifier sum to zero (RFC 1071: 0xffff). The checksum
//! therefore depends only on type and identifier (with ICMPv6 also on addresses and length) and is constant
//! within a flow. Routers that balance load hash the first four bytes after the IP header, which contain the
//! checksum, so all datagrams of a flow take the same path (Augustin et al., "Avoiding traceroute anomalies
//! with Paris traceroute", IMC 2006).

use std::net::IpAddr;

use super::{DecodeError, NtpTime, array, put, require, u16_at, u32_at, u64_at};

/// Protocol version; the two versions use different type numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IcmpVersion {
    /// ICMP, over IPv4.
    V4,
    /// ICMPv6.
    V6,
}

impl IcmpVersion {
    /// The version for an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Type number of an echo request.
    #[must_use]
    pub const fn request(self) -> u8 {
        match self {
            Self::V4 => 8,
            Self::V6 => 128,
        }
    }

    /// Type number of an echo reply.
    #[must_use]
    pub const fn reply(self) -> u8 {
        match self {
            Self::V4 => 0,
            Self::V6 => 129,
        }
    }
}

/// Contents of an echo request and its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpEcho {
    /// Random: distinguishes the flow from others with the same identifier.
    pub session: u32,
    /// T1.
    pub timestamp: NtpTime,
    /// Sequence number, from 0, modulo 2³².
    pub sequence: u32,
    /// Session identifier: distinguishes probers that share a socket.
    pub ssid: u16,
}

const IDENTIFIER_AT: usize = 4;
const SEQUENCE_AT: usize = 6;
const MAGIC_AT: usize = 8;
const SSID_AT: usize = 28;
const BALANCE_AT: usize = 30;
const MAGIC: [u8; 4] = *b"pmic";

impl IcmpEcho {
    /// Length of the shortest message in bytes, including the header of 8.
    pub const BYTES: u16 = 32;

    /// Appends a request of `size` bytes including the header, at least [`IcmpEcho::BYTES`]. Its identifier
    /// is 0, see [`identify`]. Its checksum is valid for ICMP; that of ICMPv6 also covers addresses, which
    /// the kernel adds.
    pub fn encode(&self, version: IcmpVersion, size: u16, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + usize::from(size.max(Self::BYTES)), 0);
        let echo = &mut out[start..];
        echo[0] = version.request();
        let [_, _, high, low] = self.sequence.to_be_bytes();
        put(echo, 6, &[high, low]);
        put(echo, MAGIC_AT, &MAGIC);
        put(echo, 12, &self.session.to_be_bytes());
        put(echo, 16, &self.timestamp.0.to_be_bytes());
        put(echo, 24, &self.sequence.to_be_bytes());
        put(echo, SSID_AT, &self.ssid.to_be_bytes());
        let balance = !sum(&echo[6..BALANCE_AT]);
        put(echo, BALANCE_AT, &balance.to_be_bytes());
        identify(echo, 0);
    }

    /// Decodes a reply.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if it is not a reply to a pathmeter request.
    pub fn decode_reply(bytes: &[u8], version: IcmpVersion) -> Result<Self, DecodeError> {
        Self::decode(bytes, version.reply())
    }

    /// Decodes a request, as an ICMP error quotes it.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if it is not a pathmeter request.
    pub fn decode_request(bytes: &[u8], version: IcmpVersion) -> Result<Self, DecodeError> {
        Self::decode(bytes, version.request())
    }

    /// Whether a quotation can be of this request: what it has of it is the same. Routers quote at least the
    /// header, and fill up with zeros before extensions (RFC 4884), which they may not announce.
    #[must_use]
    pub fn is_quoted_by(&self, quotation: &[u8]) -> bool {
        let mut whole = Vec::new();
        self.encode(IcmpVersion::V4, Self::BYTES, &mut whole);
        let end = quotation.len().min(SSID_AT);
        let Some(quoted) = quotation.get(SEQUENCE_AT..end) else { return false };
        let length = quoted.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        // The sequence number may be zero.
        let length = length.max(2);
        quoted.len() >= 2 && quoted[..length] == whole[SEQUENCE_AT..SEQUENCE_AT + length]
    }

    fn decode(bytes: &[u8], kind: u8) -> Result<Self, DecodeError> {
        require(bytes, usize::from(Self::BYTES), "ICMP echo")?;
        let sequence = u32_at(bytes, 24);
        let [_, _, lower @ ..] = sequence.to_be_bytes();
        if bytes[..2] != [kind, 0] || array(bytes, MAGIC_AT) != MAGIC || array(bytes, 6) != lower {
            return Err(DecodeError::Unrecognized { field: "pathmeter ICMP echo" });
        }
        Ok(Self {
            session: u32_at(bytes, 12),
            timestamp: NtpTime(u64_at(bytes, 16)),
            sequence,
            ssid: u16_at(bytes, SSID_AT),
        })
    }
}

/// Sets the identifier of a request and the checksum that follows from it.
pub fn identify(request: &mut [u8], identifier: u16) {
    put(request, IDENTIFIER_AT, &identifier.to_be_bytes());
    let checksum = !add(u16_at(request, 0), identifier);
    put(request, 2, &checksum.to_be_bytes());
}

/// Identifier of an echo message; `None` if the input is too short.
#[must_use]
pub fn identifier(echo: &[u8]) -> Option<u16> {
    echo.get(IDENTIFIER_AT..IDENTIFIER_AT + 2).map(|_| u16_at(echo, IDENTIFIER_AT))
}

/// Lower half of the sequence number in the header of an echo message; `None` if the input is too short.
#[must_use]
pub fn quoted_sequence(echo: &[u8]) -> Option<u16> {
    echo.get(SEQUENCE_AT..SEQUENCE_AT + 2).map(|_| u16_at(echo, SEQUENCE_AT))
}

/// Session identifier of a pathmeter message; `None` for messages of other programs and for input that is too
/// short.
#[must_use]
pub fn ssid(echo: &[u8]) -> Option<u16> {
    let is_ours = echo.len() >= usize::from(IcmpEcho::BYTES) && array(echo, MAGIC_AT) == MAGIC;
    is_ours.then(|| u16_at(echo, SSID_AT))
}

/// Whether the checksum of a whole ICMP message is correct. Not usable for ICMPv6, whose checksum also covers
/// the addresses.
#[must_use]
pub fn is_intact(message: &[u8]) -> bool {
    sum(message) == 0xffff
}

/// One's complement sum of 16-bit words (RFC 1071); an odd last byte is the upper half of a word.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    bytes.chunks(2).map(|word| u16_at(&[word[0], word.get(1).copied().unwrap_or(0)], 0)).fold(0, add)
}

/// What the checksums of transport protocols cover besides the packet itself: addresses, length and protocol
/// (RFC 9293 section 3.1, RFC 8200 section 8.1).
pub(super) fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut covered = Vec::new();
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => covered.extend(address.octets()),
            IpAddr::V6(address) => covered.extend(address.octets()),
        }
    }
    // The pseudo-header of IPv6 has four bytes for the length; of IPv4 their upper half is zero here.
    covered.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    covered.extend([0, 0, 0, protocol]);
    covered
}

fn add(a: u16, b: u16) -> u16 {
    let (sum, is_over) = a.overflowing_add(b);
    sum + u16::from(is_over)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::mix;

    fn echo(draw: u64) -> IcmpEcho {
        let [a, b, c, d, e, f, ..] = mix(draw).to_be_bytes();
        let (session, ssid) = (u32::from_be_bytes([a, b, c, d]), u16::from_be_bytes([e, f]));
        let [a, b, c, d, ..] = mix(!draw).to_be_bytes();
        IcmpEcho {
            session,
            timestamp: NtpTime(mix(draw + 7)),
            sequence: u32::from_be_bytes([a, b, c, d]),
            ssid,
        }
    }

    /// The sum over everything that the checksum of ICMPv6 covers.
    fn sum_v6(message: &[u8]) -> u16 {
        let mut covered = vec![0xfd; 32];
        covered.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
        covered.extend_from_slice(&[0, 0, 0, 58]);
        covered.extend_from_slice(message);
        covered[32 + 8 + 2..32 + 8 + 4].fill(0);
        sum(&covered)
    }

    #[test]
    fn checksum_is_the_same_for_all_datagrams_of_a_flow() {
        for (version, size, identifier) in [
            (IcmpVersion::V4, 32, 0),
            (IcmpVersion::V4, 33, 1),
            (IcmpVersion::V6, 1_200, 0xf7ff),
            (IcmpVersion::V6, 64, 0xffff),
        ] {
            let mut seen: Option<([u8; 4], u16)> = None;
            let mut bytes = Vec::new();
            for draw in 0..4_000 {
                bytes.clear();
                let of_flow = IcmpEcho { session: 9, ssid: 7, ..echo(draw) };
                of_flow.encode(version, size, &mut bytes);
                identify(&mut bytes, identifier);
                assert!(is_intact(&bytes), "{of_flow:?}");
                let found = (array(&bytes, 0), sum_v6(&bytes));
                assert_eq!(*seen.get_or_insert(found), found, "{of_flow:?}");
            }
        }
    }

    #[test]
    fn each_flow_of_a_path_has_its_own_checksum() {
        let mut checksums: Vec<[u8; 2]> = (40_000..40_016)
            .map(|identifier| {
                let mut bytes = Vec::new();
                echo(1).encode(IcmpVersion::V4, 32, &mut bytes);
                identify(&mut bytes, identifier);
                array(&bytes, 2)
            })
            .collect();
        checksums.sort_unstable();
        checksums.dedup();
        assert_eq!(checksums.len(), 16);
    }

    #[test]
    fn echoed_request_decodes_to_its_contents() {
        for (draw, version) in (0..1_000).zip([IcmpVersion::V4, IcmpVersion::V6].into_iter().cycle()) {
            let sent = echo(draw);
            let mut bytes = vec![9; 3];
            sent.encode(version, u16::try_from(draw).unwrap(), &mut bytes);
            let bytes = &mut bytes[3..];
            assert_eq!(bytes.len(), usize::try_from(draw.max(32)).unwrap());
            identify(bytes, 5);
            assert!(IcmpEcho::decode_reply(bytes, version).is_err(), "a request is not a reply");
            bytes[0] = version.reply();
            assert_eq!(IcmpEcho::decode_reply(bytes, version), Ok(sent));
            assert_eq!((identifier(bytes), ssid(bytes)), (Some(5), Some(sent.ssid)));
        }
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let sent = IcmpEcho {
            session: 0x0506_0708,
            timestamp: NtpTime(0x0a0b),
            sequence: 0x0001_0002,
            ssid: 0x0c0d,
        };
        let mut bytes = Vec::new();
        sent.encode(IcmpVersion::V4, 33, &mut bytes);
        identify(&mut bytes, 0x1234);
        let expected = "08 00 e5cb 1234 0002 706d6963 05060708 0000000000000a0b 00010002 0c0d 0404 00";
        let found: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, expected.replace(' ', ""));
    }

    #[test]
    fn echo_of_another_program_is_unrecognized() {
        let mut bytes = Vec::new();
        echo(1).encode(IcmpVersion::V4, 64, &mut bytes);
        bytes[0] = 0;
        for at in [0, 1, 6, 7, 8, 11, 26, 27] {
            bytes[at] ^= 1;
            let unrecognized = Err(DecodeError::Unrecognized { field: "pathmeter ICMP echo" });
            assert_eq!(IcmpEcho::decode_reply(&bytes, IcmpVersion::V4), unrecognized, "byte {at}");
            bytes[at] ^= 1;
        }
        for length in 0..32 {
            assert!(IcmpEcho::decode_reply(&bytes[..length], IcmpVersion::V4).is_err());
            assert_eq!(ssid(&bytes[..length]), None);
        }
    }

    #[test]
    fn checksum_sum_wraps_the_carry_and_pads_an_odd_byte() {
        assert_eq!(sum(&[0xff, 0xff, 0, 1]), 1);
        assert_eq!(sum(&[0xff, 0xff]), 0xffff);
        assert_eq!(sum(&[0x12, 0x34, 0x56]), 0x6834);
        assert_eq!((sum(&[]), is_intact(&[0xff, 0xff]), is_intact(&[0xff, 0xfe])), (0, true, false));
        assert_eq!((identifier(&[0; 5]), identifier(&[0, 0, 0, 0, 1, 2])), (None, Some(0x0102)));
    }

    #[test]
    fn type_numbers_follow_the_rfcs() {
        let versions = ["192.0.2.1", "2001:db8::1"].map(|text| IcmpVersion::of(text.parse().unwrap()));
        assert_eq!(versions, [IcmpVersion::V4, IcmpVersion::V6]);
        assert_eq!(versions.map(|version| (version.request(), version.reply())), [(8, 0), (128, 129)]);
    }

    #[test]
    fn echo_of_another_program_has_no_session_identifier() {
        let mut bytes = Vec::new();
        echo(1).encode(IcmpVersion::V4, 32, &mut bytes);
        assert_eq!(ssid(&bytes), Some(echo(1).ssid));
        assert_eq!(ssid(&bytes[..31]), None);
        bytes[8] ^= 1;
        assert_eq!(ssid(&bytes), None);
    }

    #[test]
    fn quotation_must_agree_as_far_as_it_goes() {
        for draw in 0..200 {
            let echo = echo(draw);
            let mut whole = Vec::new();
            echo.encode(IcmpVersion::V4, IcmpEcho::BYTES, &mut whole);
            // The kernel of a ping socket has written its identifier and the checksum.
            whole[2..6].copy_from_slice(&[9, 9, 9, 9]);
            for length in 0..=whole.len() {
                let mut quoted = whole[..length].to_vec();
                assert_eq!(echo.is_quoted_by(&quoted), length >= 8, "{length}");
                if length >= 8 {
                    quoted.resize(128, 0);
                    assert!(echo.is_quoted_by(&quoted), "{length}, padded");
                    quoted.extend([0x20, 0, 1, 2, 3]);
                    assert!(echo.is_quoted_by(&quoted), "{length}, padded, with extensions");
                }
                for at in 6..length.min(28) {
                    let mut forged = quoted.clone();
                    forged[at] = forged[at].wrapping_add(1).max(1);
                    assert!(length < 8 || !echo.is_quoted_by(&forged), "{at} of {length}");
                }
            }
        }
    }
}
