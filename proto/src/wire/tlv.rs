//! STAMP extensions, the TLVs after the base packet (RFC 8972 section 4).
//!
//! ```text
//! 0       1       2       3       4
//! +-------+-------+---------------+------- … -+
//! | flags | type  | length        | value     |
//! +-------+-------+---------------+------- … -+
//! flags: U 0x80 not recognised · M 0x40 malformed · I 0x20 integrity failed
//! ```
//! A sender sets U; a reflector that supports the type clears it. If U is still set in a reply, the reflector
//! does not know the type or merely copies what follows the base packet.

use super::{DecodeError, NtpTime, array, put, require, u16_at, u32_at, u64_at};
use crate::key::{Key, Keys};

/// Length of a TLV's header in bytes.
pub const HEADER_BYTES: usize = 4;

/// Flag U: the type is not recognised.
pub const UNRECOGNIZED: u8 = 0x80;
/// Flag M: the TLV is malformed.
pub const MALFORMED: u8 = 0x40;
/// Flag I: the integrity check failed.
pub const INTEGRITY: u8 = 0x20;

/// Extra Padding (RFC 8972 section 4.1).
pub const PADDING: u8 = 1;
/// Class of Service (RFC 8972 section 4.4).
pub const CLASS_OF_SERVICE: u8 = 4;
/// Follow-Up Telemetry (RFC 8972 section 4.7).
pub const FOLLOW_UP: u8 = 7;
/// HMAC (RFC 8972 section 4.8).
pub const HMAC: u8 = 8;
/// Pathmeter's session record, see [`SessionRecord`]. The type is from the range for private use.
pub const SESSION: u8 = 252;
/// Pathmeter's extension for traces of the way back, see [`ReverseTrace`](super::ReverseTrace). The type is
/// from the range for private use.
pub const REVERSE_TRACE: u8 = 253;

/// Position and header of one extension in a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tlv {
    /// Offset of the flags.
    pub at: usize,
    /// Flags U, M and I.
    pub flags: u8,
    /// Type.
    pub kind: u8,
    /// Length of the value in bytes.
    pub len: usize,
}

impl Tlv {
    /// The bytes of the value.
    #[must_use]
    pub fn value<'a>(&self, datagram: &'a [u8]) -> &'a [u8] {
        &datagram[self.at + HEADER_BYTES..self.end()]
    }

    /// The bytes of the value.
    #[must_use]
    pub fn value_mut<'a>(&self, datagram: &'a mut [u8]) -> &'a mut [u8] {
        &mut datagram[self.at + HEADER_BYTES..self.end()]
    }

    /// Offset of the byte after the value.
    #[must_use]
    pub fn end(&self) -> usize {
        self.at + HEADER_BYTES + self.len
    }

    /// Whether the reflector recognised the extension and found it intact.
    #[must_use]
    pub fn is_understood(&self) -> bool {
        self.flags & (UNRECOGNIZED | MALFORMED | INTEGRITY) == 0
    }
}

/// The extension at offset `at`; `None` at the end. A remainder of fewer than four bytes is filler, not an
/// extension.
///
/// # Errors
/// [`Malformed`] if the length exceeds the datagram.
pub fn next(datagram: &[u8], at: usize) -> Option<Result<Tlv, Malformed>> {
    let header = datagram.get(at..at + HEADER_BYTES)?;
    let tlv = Tlv { at, flags: header[0], kind: header[1], len: usize::from(u16_at(header, 2)) };
    Some(if tlv.end() > datagram.len() { Err(Malformed { at }) } else { Ok(tlv) })
}

/// The extensions from offset `at` on, in order, up to the end or the first malformed one.
pub fn walk(datagram: &[u8], at: usize) -> impl Iterator<Item = Tlv> + '_ {
    std::iter::successors(next(datagram, at).and_then(Result::ok), |last| next(datagram, last.end())?.ok())
}

/// Length of the datagram without padding extensions and filler at its end. The full length if the extensions
/// are malformed.
#[must_use]
pub fn bytes_before_padding(datagram: &[u8], base_bytes: usize) -> usize {
    let (mut keep, mut at) = (base_bytes, base_bytes);
    while let Some(found) = next(datagram, at) {
        let Ok(found) = found else { return datagram.len() };
        at = found.end();
        if found.kind != PADDING {
            keep = at;
        }
    }
    keep
}

/// An extension whose length exceeds the datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed {
    /// Offset of its flags.
    pub at: usize,
}

/// Appends an extension of `len` zero bytes with the flags of a sender, and returns its position.
pub fn append(out: &mut Vec<u8>, kind: u8, len: u16) -> Tlv {
    let at = out.len();
    out.extend_from_slice(&[UNRECOGNIZED, kind]);
    out.extend_from_slice(&len.to_be_bytes());
    out.resize(at + HEADER_BYTES + usize::from(len), 0);
    Tlv { at, flags: UNRECOGNIZED, kind, len: usize::from(len) }
}

/// Record of what the responder received in one session (type 252, version 1).
///
/// ```text
///  0 u32 magic "pmtr"      4 u8 version 1   5 u8 flags (1: reply, 2: brief)   6 u16 flow
///  8 u32 session           12 u32 request: datagrams sent · reply: first sequence number of this record
/// 16 u32 unique   20 u32 duplicates   24 u32 reordered (RFC 4737)   28 u32 highest sequence number
/// 32 u128 bitmap: bit i is set when highest − i was received
/// 48 u32 datagrams that the responder's host dropped, all sessions, modulo 2³²
/// ```
/// The sender leaves bytes 16..52 zero, so that request and reply have the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SessionRecord {
    /// Index of the flow.
    pub flow: u16,
    /// Random, chosen by the prober: distinguishes sessions that reuse port and identifier.
    pub session: u32,
    /// Whether this is a reply.
    pub is_reply: bool,
    /// Request: asks for a reply without the padding at the end. Reply: the padding was left out.
    pub is_brief: bool,
    /// Request: number of datagrams sent, including this one. Reply: the first sequence number of this
    /// record; for earlier ones a clear bit does not mean that they are missing.
    pub count_or_first: u32,
    /// Number of distinct sequence numbers received.
    pub unique: u32,
    /// Number of duplicates received.
    pub duplicates: u32,
    /// Number of datagrams that arrived after a higher sequence number.
    pub reordered: u32,
    /// Highest sequence number received.
    pub highest: u32,
    /// Bit `i` is set if `highest − i` was received.
    pub bitmap: u128,
    /// Number of datagrams that the responder's host dropped, over all sessions, modulo 2³².
    pub host_drops: u32,
}

impl SessionRecord {
    /// Length of the value in bytes.
    pub const BYTES: u16 = 52;
    const MAGIC: u32 = u32::from_be_bytes(*b"pmtr");
    const VERSION: u8 = 1;
    const REPLY: u8 = 0x01;
    const BRIEF: u8 = 0x02;

    /// Writes the value; `value` must have at least [`SessionRecord::BYTES`] bytes.
    pub fn write(&self, value: &mut [u8]) {
        put(value, 0, &Self::MAGIC.to_be_bytes());
        let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
        let flags = flag(self.is_reply, Self::REPLY) | flag(self.is_brief, Self::BRIEF);
        put(value, 4, &[Self::VERSION, flags]);
        put(value, 6, &self.flow.to_be_bytes());
        put(value, 8, &self.session.to_be_bytes());
        put(value, 12, &self.count_or_first.to_be_bytes());
        put(value, 16, &self.unique.to_be_bytes());
        put(value, 20, &self.duplicates.to_be_bytes());
        put(value, 24, &self.reordered.to_be_bytes());
        put(value, 28, &self.highest.to_be_bytes());
        put(value, 32, &self.bitmap.to_be_bytes());
        put(value, 48, &self.host_drops.to_be_bytes());
    }

    /// Decodes a value. Longer values are accepted, because later versions may append fields.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if another vendor uses type 252;
    /// [`DecodeError::Version`].
    pub fn read(value: &[u8]) -> Result<Self, DecodeError> {
        require(value, usize::from(Self::BYTES), "session record")?;
        if u32_at(value, 0) != Self::MAGIC {
            return Err(DecodeError::Unrecognized { field: "session record" });
        }
        if value[4] != Self::VERSION {
            return Err(DecodeError::Version { found: value[4], supported: Self::VERSION });
        }
        Ok(Self {
            is_reply: value[5] & Self::REPLY != 0,
            is_brief: value[5] & Self::BRIEF != 0,
            flow: u16_at(value, 6),
            session: u32_at(value, 8),
            count_or_first: u32_at(value, 12),
            unique: u32_at(value, 16),
            duplicates: u32_at(value, 20),
            reordered: u32_at(value, 24),
            highest: u32_at(value, 28),
            bitmap: u128::from_be_bytes(array(value, 32)),
            host_drops: u32_at(value, 48),
        })
    }
}

/// Class of Service extension: the class wanted for the reply, and the class with which the request arrived.
///
/// ```text
/// 6 bits DSCP1 (wanted) · 6 bits DSCP2 (received) · 2 bits ECN (received) · 2 bits RP · 16 bits zero
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClassOfService {
    /// DSCP requested for the reply.
    pub wanted: u8,
    /// DSCP of the request on arrival.
    pub received: u8,
    /// ECN field of the request on arrival.
    pub ecn: u8,
}

impl ClassOfService {
    /// Length of the value in bytes.
    pub const BYTES: u16 = 4;

    /// Writes the value; `value` must have at least [`ClassOfService::BYTES`] bytes.
    pub fn write(&self, value: &mut [u8]) {
        let bits = (u16::from(self.wanted & 63) << 10) | (u16::from(self.received & 63) << 4);
        put(value, 0, &(bits | (u16::from(self.ecn & 3) << 2)).to_be_bytes());
        put(value, 2, &[0, 0]);
    }

    /// Decodes a value; `None` if it is too short.
    #[must_use]
    pub fn read(value: &[u8]) -> Option<Self> {
        if value.len() < usize::from(Self::BYTES) {
            return None;
        }
        let [high, low] = u16_at(value, 0).to_be_bytes();
        Some(Self { wanted: high >> 2, received: ((high & 3) << 4) | (low >> 4), ecn: (low >> 2) & 3 })
    }
}

/// Follow-Up Telemetry extension: when an earlier reply left the reflector.
///
/// ```text
/// 0 u32 the earlier reply's sequence number   4 u64 its timestamp   12 u8 method (2: by the kernel)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FollowUp {
    /// Sequence number of the earlier reply.
    pub sequence: u32,
    /// Transmit timestamp of that reply; zero if there is none.
    pub timestamp: NtpTime,
}

impl FollowUp {
    /// Length of the value in bytes.
    pub const BYTES: u16 = 16;
    /// "SW local" in the registry of timestamping methods (RFC 8972 section 5.5).
    const SOFTWARE: u8 = 2;

    /// Writes the value; `value` must have at least [`FollowUp::BYTES`] bytes.
    pub fn write(&self, value: &mut [u8]) {
        put(value, 0, &self.sequence.to_be_bytes());
        put(value, 4, &self.timestamp.0.to_be_bytes());
        put(value, 12, &[if self.timestamp == NtpTime(0) { 0 } else { Self::SOFTWARE }, 0, 0, 0]);
    }

    /// Decodes a value; `None` if it is too short or has no timestamp.
    #[must_use]
    pub fn read(value: &[u8]) -> Option<Self> {
        if value.len() < usize::from(Self::BYTES) || u64_at(value, 4) == 0 {
            return None;
        }
        Some(Self { sequence: u32_at(value, 0), timestamp: NtpTime(u64_at(value, 4)) })
    }
}

/// Whether the extensions of an authenticated packet are authenticated: by an HMAC that only padding follows,
/// or because none of them needs it (RFC 8972 section 4.8). The HMAC does not cover what follows it.
#[must_use]
pub fn are_authentic(datagram: &[u8], base_bytes: usize, keys: &Keys) -> bool {
    let mut from_hmac = walk(datagram, base_bytes).skip_while(|found| found.kind != HMAC);
    match from_hmac.next() {
        Some(hmac) => {
            verify(datagram, base_bytes, hmac, keys) && from_hmac.all(|following| following.kind == PADDING)
        }
        None => is_bare(datagram, base_bytes),
    }
}

/// Whether the extensions need no HMAC in authenticated mode: there are none, or only one padding.
fn is_bare(datagram: &[u8], base_bytes: usize) -> bool {
    next(datagram, base_bytes).is_none_or(|first| {
        first.is_ok_and(|first| first.kind == PADDING && next(datagram, first.end()).is_none())
    })
}

/// Length of the HMAC extension's value in bytes.
pub const HMAC_VALUE_BYTES: u16 = 16;

/// Writes the value of the HMAC extension: over the sequence number and the preceding extensions.
pub fn seal(datagram: &mut [u8], base_bytes: usize, hmac: Tlv, key: &Key) {
    let tag = key.mac_128(&[&datagram[..4], &datagram[base_bytes..hmac.at]]);
    put(hmac.value_mut(datagram), 0, &tag);
}

/// Whether the HMAC extension was made with one of the keys.
fn verify(datagram: &[u8], base_bytes: usize, hmac: Tlv, keys: &Keys) -> bool {
    let tag = hmac.value(datagram);
    tag.len() == usize::from(HMAC_VALUE_BYTES)
        && keys.verifying(&[&datagram[..4], &datagram[base_bytes..hmac.at]], tag).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_values_decode_to_their_fields() {
        let session = SessionRecord {
            flow: 3,
            session: 0xdead_beef,
            is_reply: true,
            is_brief: true,
            count_or_first: 5,
            unique: 6,
            duplicates: 7,
            reordered: 8,
            highest: 9,
            bitmap: 0x0123_4567_89ab_cdef << 64 | 1,
            host_drops: 10,
        };
        let mut value = vec![0; 52];
        session.write(&mut value);
        assert_eq!(SessionRecord::read(&value), Ok(session));
        for wanted in 0..64 {
            let class = ClassOfService { wanted, received: 63 - wanted, ecn: wanted & 3 };
            class.write(&mut value);
            assert_eq!(ClassOfService::read(&value), Some(class));
        }
        let follow_up = FollowUp { sequence: 1, timestamp: NtpTime(2) };
        follow_up.write(&mut value);
        assert_eq!(FollowUp::read(&value), Some(follow_up));
    }

    #[test]
    fn walk_ends_at_a_malformed_extension() {
        let mut datagram = vec![0; 44];
        append(&mut datagram, PADDING, 8);
        let second = append(&mut datagram, FOLLOW_UP, 16);
        datagram.truncate(datagram.len() - 1);
        let found: Vec<_> = walk(&datagram, 44).map(|tlv| (tlv.kind, tlv.len)).collect();
        assert_eq!(found, [(PADDING, 8)]);
        assert_eq!(next(&datagram, second.at), Some(Err(Malformed { at: second.at })));
    }

    #[test]
    fn only_trailing_padding_can_be_left_out() {
        let mut datagram = vec![0; 44];
        append(&mut datagram, PADDING, 8);
        assert_eq!(bytes_before_padding(&datagram, 44), 44);
        append(&mut datagram, FOLLOW_UP, 16);
        let kept = datagram.len();
        assert_eq!(bytes_before_padding(&datagram, 44), kept, "padding before another extension stays");
        append(&mut datagram, PADDING, 0);
        append(&mut datagram, PADDING, 700);
        assert_eq!(bytes_before_padding(&[&datagram[..], &[0; 3]].concat(), 44), kept);
        datagram.extend([0, PADDING, 0, 9]);
        assert_eq!(bytes_before_padding(&datagram, 44), datagram.len(), "malformed extensions stay");
    }

    #[test]
    fn type_252_of_another_vendor_is_unrecognized() {
        let mut value = vec![0; 52];
        assert!(matches!(SessionRecord::read(&value), Err(DecodeError::Unrecognized { .. })));
        SessionRecord::default().write(&mut value);
        value[4] = 2;
        assert_eq!(SessionRecord::read(&value), Err(DecodeError::Version { found: 2, supported: 1 }));
        assert!(matches!(SessionRecord::read(&value[..51]), Err(DecodeError::Truncated { .. })));
    }

    #[test]
    fn hmac_covers_the_sequence_number_and_preceding_extensions() {
        let keys = Keys::parse("0123456789abcdef").unwrap();
        let mut datagram = vec![7; 112];
        append(&mut datagram, CLASS_OF_SERVICE, 4);
        let hmac = append(&mut datagram, HMAC, 16);
        seal(&mut datagram, 112, hmac, keys.current());
        assert!(verify(&datagram, 112, hmac, &keys));
        for at in [0, 3, 112, 117] {
            let mut changed = datagram.clone();
            changed[at] ^= 1;
            assert!(!verify(&changed, 112, hmac, &keys), "byte {at}");
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_tables() {
        let session = SessionRecord {
            flow: 0x0102,
            session: 0x0304_0506,
            is_reply: true,
            is_brief: false,
            count_or_first: 7,
            unique: 8,
            duplicates: 9,
            reordered: 10,
            highest: 11,
            bitmap: 12,
            host_drops: 13,
        };
        let mut value = vec![0; 52];
        session.write(&mut value);
        let expected = "706d7472 0101 0102 03040506 00000007 00000008 00000009 0000000a 0000000b \
             0000000000000000000000000000000c 0000000d";
        assert_eq!(hex(&value), expected.replace(' ', ""));
        SessionRecord { is_reply: false, is_brief: true, ..session }.write(&mut value);
        assert_eq!(value[5], 2);
        let mut value = [0xff; 4];
        ClassOfService { wanted: 0b10_1101, received: 0b01_1011, ecn: 0b10 }.write(&mut value);
        assert_eq!(value, [0b1011_0101, 0b1011_1000, 0, 0]);
        ClassOfService { wanted: 64, received: 64, ecn: 4 }.write(&mut value);
        assert_eq!(value, [0; 4], "six, six and two bits");
        let mut value = [0xff; 16];
        FollowUp { sequence: 3, timestamp: NtpTime(5) }.write(&mut value);
        assert_eq!(hex(&value), "00000003000000000000000502000000");
        FollowUp { sequence: 3, timestamp: NtpTime(0) }.write(&mut value);
        assert_eq!(hex(&value), "00000003000000000000000000000000");
    }

    #[test]
    fn short_value_or_zero_timestamp_is_none() {
        assert_eq!(ClassOfService::read(&[0; 3]), None);
        assert_eq!(ClassOfService::read(&[0; 4]), Some(ClassOfService::default()));
        assert_eq!(ClassOfService::read(&[0; 5]), Some(ClassOfService::default()));
        let mut value = [0; 17];
        assert_eq!(FollowUp::read(&value[..16]), None);
        value[11] = 1;
        let follow_up = Some(FollowUp { sequence: 0, timestamp: NtpTime(1) });
        assert_eq!((FollowUp::read(&value[..15]), FollowUp::read(&value[..16])), (None, follow_up));
        assert_eq!(FollowUp::read(&value), follow_up);
        let mut value = [0; 60];
        SessionRecord::default().write(&mut value);
        assert_eq!(SessionRecord::read(&value), Ok(SessionRecord::default()), "later versions may be longer");
    }

    #[test]
    fn extension_is_recognised_if_none_of_the_three_flags_is_set() {
        let flagged = |flags| Tlv { at: 0, flags, kind: PADDING, len: 0 }.is_understood();
        assert_eq!([UNRECOGNIZED, MALFORMED, INTEGRITY, 0xe0].map(flagged), [false; 4]);
        assert_eq!([0, 0x1f, 1].map(flagged), [true; 3]);
    }

    #[test]
    fn extension_may_end_at_the_end_of_the_datagram() {
        let mut datagram = vec![0; 44];
        let appended = append(&mut datagram, FOLLOW_UP, 16);
        assert_eq!((appended.at, appended.end(), datagram.len()), (44, 64, 64));
        assert_eq!(next(&datagram, 44), Some(Ok(appended)));
        assert_eq!(next(&datagram[..63], 44), Some(Err(Malformed { at: 44 })));
        assert_eq!(next(&datagram, 61), None, "three bytes are too short for an extension");
        assert_eq!(next(&datagram[..47], 44), None);
        assert_eq!(hex(&datagram[44..48]), "80070010");
        appended.value_mut(&mut datagram).fill(9);
        assert_eq!(appended.value(&datagram), [9; 16]);
        assert_eq!((datagram[43], datagram[47]), (0, 16));
    }

    #[test]
    fn extensions_are_authentic_with_an_hmac_or_if_there_is_at_most_one_padding() {
        let keys = Keys::parse("0123456789abcdef").unwrap();
        let proven = |datagram: &[u8]| are_authentic(datagram, 112, &keys);
        let with = |kinds: &[(u8, u16)]| {
            let mut datagram = vec![7; 112];
            for (kind, len) in kinds {
                let appended = append(&mut datagram, *kind, *len);
                if *kind == HMAC && *len == HMAC_VALUE_BYTES {
                    seal(&mut datagram, 112, appended, keys.current());
                }
            }
            datagram
        };
        for (kinds, expected) in [
            (&[][..], true),
            (&[(PADDING, 5)], true),
            (&[(PADDING, 5), (PADDING, 5)], false),
            (&[(FOLLOW_UP, 16)], false),
            (&[(PADDING, 5), (FOLLOW_UP, 16)], false),
            (&[(HMAC, 16)], true),
            (&[(HMAC, 15)], false),
            (&[(HMAC, 17)], false),
            (&[(FOLLOW_UP, 16), (HMAC, 16)], true),
            (&[(FOLLOW_UP, 16), (HMAC, 16), (PADDING, 5)], true),
            (&[(HMAC, 16), (FOLLOW_UP, 16)], false),
            (&[(HMAC, 16), (HMAC, 16)], false),
        ] {
            assert_eq!(proven(&with(kinds)), expected, "{kinds:?}");
        }
        let mut cut = with(&[(PADDING, 5)]);
        cut.pop();
        assert!(!proven(&cut), "it is malformed");
    }
}
