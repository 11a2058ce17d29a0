//! STAMP base packets (RFC 8762 sections 4.2 and 4.3, with the session identifier of RFC 8972 section 3).
//!
//! ```text
//!            open (44 bytes)                      authenticated (112 bytes)
//!            sender            reflector          sender            reflector
//! sequence    0                 0                  0                 0
//! timestamp   4 (T1)            4 (T3)            16 (T1)           16 (T3)
//! error      12                12                 24                24
//! ssid       14                14                 26                26
//! received                     16 (T2)                              32 (T2)
//! sender's sequence            24                                   48
//! sender's timestamp           28 (T1)                              64 (T1)
//! sender's error               36                                   72
//! sender's TTL                 40                                   80
//! HMAC                                            96                96
//! ```
//! All other bytes are zero. The HMAC is HMAC-SHA-256 truncated to 128 bits over bytes 0..96 (RFC 8762
//! section 4.4).

use super::{DecodeError, NtpTime, PeerTimestamp, array, put, require, u16_at, u32_at, u64_at};
use crate::key::{Key, KeyId, Keys};

/// The port assigned by IANA to STAMP and TWAMP.
pub const PORT: u16 = 862;

/// Error estimate in sent packets (RFC 4656 section 4.1.2): not synchronised as far as known (S = 0), NTP
/// format (Z = 0), and an error of 1 s (scale 32, multiplier 1).
pub const ERROR_ESTIMATE: u16 = (32 << 8) | 1;

/// Z bit of the error estimate: timestamps are in PTP format (RFC 8762 section 4.2.1).
pub(crate) const PTP_FORMAT: u16 = 1 << 14;

/// STAMP mode: whether base packets carry an HMAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// 44 bytes, no HMAC.
    Open,
    /// 112 bytes, with HMAC.
    Authenticated,
}

impl Mode {
    /// Length of the base packet in bytes.
    #[must_use]
    pub const fn base_bytes(self) -> usize {
        match self {
            Self::Open => 44,
            Self::Authenticated => HMAC_AT + HMAC_BYTES,
        }
    }

    const fn layout(self) -> Layout {
        match self {
            Self::Open => Layout {
                timestamp: 4,
                error: 12,
                ssid: 14,
                received: 16,
                sender_sequence: 24,
                sender_timestamp: 28,
                sender_error: 36,
                sender_ttl: 40,
            },
            Self::Authenticated => Layout {
                timestamp: 16,
                error: 24,
                ssid: 26,
                received: 32,
                sender_sequence: 48,
                sender_timestamp: 64,
                sender_error: 72,
                sender_ttl: 80,
            },
        }
    }
}

const HMAC_AT: usize = 96;
const HMAC_BYTES: usize = 16;

/// A TWAMP-Light reply ends after the sender's TTL (RFC 5357 section 4.2.1).
const TWAMP_REPLY_BYTES: usize = 41;

struct Layout {
    timestamp: usize,
    error: usize,
    ssid: usize,
    received: usize,
    sender_sequence: usize,
    sender_timestamp: usize,
    sender_error: usize,
    sender_ttl: usize,
}

/// Base packet of a session sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Sequence number, from 0, modulo 2³².
    pub sequence: u32,
    /// T1.
    pub timestamp: NtpTime,
    /// Error estimate of the sender's clock.
    pub error: u16,
    /// Session identifier.
    pub ssid: u16,
}

impl Request {
    /// Appends the base packet without HMAC; see [`seal`].
    pub fn encode(&self, mode: Mode, out: &mut Vec<u8>) {
        let (start, at) = (out.len(), mode.layout());
        out.resize(start + mode.base_bytes(), 0);
        let base = &mut out[start..];
        put(base, 0, &self.sequence.to_be_bytes());
        put(base, at.timestamp, &self.timestamp.0.to_be_bytes());
        put(base, at.error, &self.error.to_be_bytes());
        put(base, at.ssid, &self.ssid.to_be_bytes());
    }

    /// Decodes a base packet. The HMAC is not checked; see [`verify`].
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn decode(bytes: &[u8], mode: Mode) -> Result<Self, DecodeError> {
        require(bytes, mode.base_bytes(), "STAMP request")?;
        let at = mode.layout();
        Ok(Self {
            sequence: u32_at(bytes, 0),
            timestamp: NtpTime(u64_at(bytes, at.timestamp)),
            error: u16_at(bytes, at.error),
            ssid: u16_at(bytes, at.ssid),
        })
    }
}

/// Base packet of a session reflector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Number of the reply in its session, or the sender's sequence number if the reflector is stateless.
    pub sequence: u32,
    /// T3 as transmitted.
    pub timestamp: NtpTime,
    /// Error estimate of the reflector's clock.
    pub error: u16,
    /// Session identifier; 0 from reflectors without support for it.
    pub ssid: u16,
    /// T2 as transmitted.
    pub received: NtpTime,
    /// The request's sequence number.
    pub sender_sequence: u32,
    /// The request's T1.
    pub sender_timestamp: NtpTime,
    /// The request's error estimate.
    pub sender_error: u16,
    /// Time to live or hop limit of the request on arrival.
    pub sender_ttl: u8,
}

impl Reply {
    /// Writes the reply over a request's base packet, without HMAC; see [`seal`]. `base` must have at least
    /// [`Mode::base_bytes`] bytes.
    pub fn write(&self, mode: Mode, base: &mut [u8]) {
        let at = mode.layout();
        base[..mode.base_bytes()].fill(0);
        put(base, 0, &self.sequence.to_be_bytes());
        put(base, at.timestamp, &self.timestamp.0.to_be_bytes());
        put(base, at.error, &self.error.to_be_bytes());
        put(base, at.ssid, &self.ssid.to_be_bytes());
        put(base, at.received, &self.received.0.to_be_bytes());
        put(base, at.sender_sequence, &self.sender_sequence.to_be_bytes());
        put(base, at.sender_timestamp, &self.sender_timestamp.0.to_be_bytes());
        put(base, at.sender_error, &self.sender_error.to_be_bytes());
        base[at.sender_ttl] = self.sender_ttl;
    }

    /// Decodes a base packet. The HMAC is not checked; see [`verify`]. In open mode, a TWAMP-Light reply is
    /// also accepted, which is three bytes shorter.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn decode(bytes: &[u8], mode: Mode) -> Result<Self, DecodeError> {
        let needs = match mode {
            Mode::Open => TWAMP_REPLY_BYTES,
            Mode::Authenticated => mode.base_bytes(),
        };
        require(bytes, needs, "STAMP reply")?;
        let at = mode.layout();
        Ok(Self {
            sequence: u32_at(bytes, 0),
            timestamp: NtpTime(u64_at(bytes, at.timestamp)),
            error: u16_at(bytes, at.error),
            ssid: u16_at(bytes, at.ssid),
            received: NtpTime(u64_at(bytes, at.received)),
            sender_sequence: u32_at(bytes, at.sender_sequence),
            sender_timestamp: NtpTime(u64_at(bytes, at.sender_timestamp)),
            sender_error: u16_at(bytes, at.sender_error),
            sender_ttl: bytes[at.sender_ttl],
        })
    }

    /// Replaces T3 of a reply. A sealed packet must be sealed again.
    pub fn write_sent(mode: Mode, base: &mut [u8], at: NtpTime) {
        put(base, mode.layout().timestamp, &at.0.to_be_bytes());
    }

    /// T3 − T2 in nanoseconds, read in the format that the reflector's error estimate names. Negative if the
    /// reflector's clock stepped between the two.
    #[must_use]
    pub fn turnaround(&self) -> i64 {
        peer_time(self.timestamp, self.error).signed_since(peer_time(self.received, self.error))
    }

    /// T2 on the reflector's clock.
    #[must_use]
    pub fn responder_received(&self) -> PeerTimestamp {
        peer_time(self.received, self.error)
    }

    /// T3 on the reflector's clock.
    #[must_use]
    pub fn sent(&self) -> PeerTimestamp {
        peer_time(self.timestamp, self.error)
    }
}

fn peer_time(bits: NtpTime, error: u16) -> PeerTimestamp {
    if error & PTP_FORMAT == 0 { PeerTimestamp::from_ntp(bits.0) } else { PeerTimestamp::from_ptp(bits.0) }
}

/// Writes the HMAC of the base packet. Does nothing in open mode or without a key.
pub fn seal(datagram: &mut [u8], mode: Mode, key: Option<&Key>) {
    if let (Mode::Authenticated, Some(key)) = (mode, key) {
        let tag = key.mac_128(&[&datagram[..HMAC_AT]]);
        put(datagram, HMAC_AT, &tag);
    }
}

/// Returns which key made the HMAC of the base packet.
///
/// # Errors
/// [`DecodeError::Truncated`]; [`DecodeError::Unauthentic`] if no valid key made it.
pub fn verify(datagram: &[u8], keys: &Keys) -> Result<KeyId, DecodeError> {
    require(datagram, HMAC_AT + HMAC_BYTES, "authenticated STAMP packet")?;
    let tag = &datagram[HMAC_AT..HMAC_AT + HMAC_BYTES];
    keys.verifying(&[&datagram[..HMAC_AT]], tag).ok_or(DecodeError::Unauthentic { field: "base packet" })
}

/// Guesses the mode of a request. STAMP modes are agreed out of band and packets do not name their mode. In
/// an authenticated request, bytes 44..96 are zero and the HMAC is not; an open request of that length has a
/// TLV there.
#[must_use]
pub fn guess_mode(request: &[u8]) -> Mode {
    let filler = request.get(Mode::Open.base_bytes()..HMAC_AT);
    let tag = request.get(HMAC_AT..HMAC_AT + HMAC_BYTES);
    match (filler, tag) {
        (Some(filler), Some(tag)) if filler.iter().all(|b| *b == 0) && tag.iter().any(|b| *b != 0) => {
            Mode::Authenticated
        }
        _ => Mode::Open,
    }
}

/// Whether a datagram is an authenticated reply made with one of the keys. [`guess_mode`], which is for
/// requests, takes it for open, because a reply has data in bytes 44..96. Unlike an open packet, it has zeros
/// in bytes 4..16.
#[must_use]
pub fn is_authenticated_reply(datagram: &[u8], keys: &Keys) -> bool {
    let is_reply = |empty: &[u8]| empty.iter().all(|b| *b == 0) && guess_mode(datagram) == Mode::Open;
    datagram.get(4..16).is_some_and(is_reply) && verify(datagram, keys).is_ok()
}

/// The sequence number and the transmit timestamp of a packet of which an ICMP error quotes the beginning: T1
/// of a request, T3 of a reply. `None` if the quotation ends before the sequence number; the timestamp is
/// `None` if the quotation ends before it.
#[must_use]
pub fn quoted_packet(quoted: &[u8], mode: Mode) -> Option<(u32, Option<NtpTime>)> {
    let sequence = u32::from_be_bytes(quoted.get(..4)?.try_into().ok()?);
    let at = mode.layout().timestamp;
    let timestamp = quoted.get(at..at + 8).map(|_| NtpTime(u64_at(quoted, at)));
    Some((sequence, timestamp))
}

/// The session identifier of a reply if it is in open mode, and if it is in authenticated mode; zero where
/// the reply is too short.
#[must_use]
pub fn ssids(reply: &[u8]) -> [u16; 2] {
    [
        u16::from_be_bytes(array(reply, Mode::Open.layout().ssid)),
        u16::from_be_bytes(array(reply, Mode::Authenticated.layout().ssid)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> Reply {
        Reply {
            sequence: 1,
            timestamp: NtpTime(0x0203),
            error: ERROR_ESTIMATE,
            ssid: 7,
            received: NtpTime(0x0102),
            sender_sequence: 9,
            sender_timestamp: NtpTime(11),
            sender_error: 0x4001,
            sender_ttl: 255,
        }
    }

    #[test]
    fn encoded_packets_decode_to_their_fields_in_both_modes() {
        for mode in [Mode::Open, Mode::Authenticated] {
            let request = Request { sequence: 3, timestamp: NtpTime(5), error: ERROR_ESTIMATE, ssid: 9 };
            let mut bytes = Vec::new();
            request.encode(mode, &mut bytes);
            assert_eq!(bytes.len(), mode.base_bytes());
            assert_eq!(Request::decode(&bytes, mode), Ok(request));
            reply().write(mode, &mut bytes);
            assert_eq!(Reply::decode(&bytes, mode), Ok(reply()));
            assert!(ssids(&bytes).contains(&7));
        }
    }

    #[test]
    fn open_reply_has_the_layout_of_rfc_8762() {
        let mut bytes = vec![0xff; 44];
        reply().write(Mode::Open, &mut bytes);
        let expected = "00000001 0000000000000203 2001 0007 0000000000000102 \
             00000009 000000000000000b 4001 0000 ff 000000";
        let found: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(found, expected.replace(' ', ""));
    }

    #[test]
    fn any_changed_bit_invalidates_the_hmac() {
        let keys = Keys::parse("0123456789abcdef").unwrap();
        let mut bytes = vec![0; 112];
        reply().write(Mode::Authenticated, &mut bytes);
        seal(&mut bytes, Mode::Authenticated, Some(keys.current()));
        assert!(verify(&bytes, &keys).is_ok());
        for bit in 0..112 * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(&bytes, &keys).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn mode_of_a_request_is_guessed_from_its_zero_bytes_and_hmac() {
        let request = Request { sequence: 0, timestamp: NtpTime(5), error: ERROR_ESTIMATE, ssid: 9 };
        let mut open = Vec::new();
        request.encode(Mode::Open, &mut open);
        assert_eq!(guess_mode(&open), Mode::Open);
        open.resize(200, 0);
        assert_eq!(guess_mode(&open), Mode::Open, "padded with zeros, as TWAMP-Light senders do");
        let mut sealed = Vec::new();
        request.encode(Mode::Authenticated, &mut sealed);
        seal(&mut sealed, Mode::Authenticated, Some(&Key::new(b"0123456789abcdef")));
        assert_eq!(guess_mode(&sealed), Mode::Authenticated);
    }

    #[test]
    fn turnaround_is_read_in_the_format_that_the_error_estimate_names() {
        let second = 1 << 32;
        let of = |error| Reply {
            error,
            timestamp: NtpTime(second + (1 << 31)),
            received: NtpTime(second),
            ..reply()
        };
        assert_eq!(of(1).turnaround(), 500_000_000);
        assert_eq!(of(PTP_FORMAT).turnaround(), 1 << 31);
        assert_eq!(of(0xffff ^ PTP_FORMAT).turnaround(), 500_000_000);
        let backwards = Reply { timestamp: NtpTime(second), received: NtpTime(2 * second), ..reply() };
        assert_eq!(backwards.turnaround(), -1_000_000_000);
        let ptp = of(PTP_FORMAT).sent().signed_since(PeerTimestamp::from_ptp(0));
        let ntp = of(0).sent().signed_since(PeerTimestamp::from_ntp(0));
        assert_eq!((ptp, ntp), (1_000_000_000 + (1 << 31), 1_500_000_000));
    }

    #[test]
    fn packet_of_base_length_is_accepted_and_a_shorter_one_truncated() {
        let bytes = [0; 112];
        for (mode, request, reply) in [(Mode::Open, 44, 41), (Mode::Authenticated, 112, 112)] {
            assert!(Request::decode(&bytes[..request], mode).is_ok(), "{mode:?}");
            assert!(Request::decode(&bytes[..request - 1], mode).is_err(), "{mode:?}");
            assert!(Reply::decode(&bytes[..reply], mode).is_ok(), "{mode:?}");
            assert!(Reply::decode(&bytes[..reply - 1], mode).is_err(), "{mode:?}");
        }
        assert_eq!([1, 1 << 14].map(|bit| ERROR_ESTIMATE & bit), [1, 0], "multiplier 1, NTP format");
        assert_eq!(ERROR_ESTIMATE, 0x2001);
    }

    #[test]
    fn t3_of_a_reply_can_be_replaced() {
        for mode in [Mode::Open, Mode::Authenticated] {
            let mut bytes = vec![0; 112];
            reply().write(mode, &mut bytes);
            Reply::write_sent(mode, &mut bytes, NtpTime(99));
            assert_eq!(Reply::decode(&bytes, mode), Ok(Reply { timestamp: NtpTime(99), ..reply() }));
        }
    }

    #[test]
    fn verify_returns_the_key_that_sealed_the_packet() {
        let keys = Keys::parse("new-key-0123456789\nold-key-0123456789").unwrap();
        for id in [KeyId::Current, KeyId::Previous] {
            let mut bytes = vec![0; 113];
            reply().write(Mode::Authenticated, &mut bytes);
            seal(&mut bytes, Mode::Authenticated, Some(keys.key(id)));
            assert_eq!(verify(&bytes, &keys), Ok(id));
            assert_eq!(verify(&bytes[..112], &keys), Ok(id));
            assert!(matches!(verify(&bytes[..111], &keys), Err(DecodeError::Truncated { .. })));
        }
        let mut bytes = vec![0; 112];
        seal(&mut bytes, Mode::Open, Some(keys.current()));
        seal(&mut bytes, Mode::Authenticated, None);
        assert_eq!(bytes, [0; 112], "in open mode and without a key nothing is written");
    }

    #[test]
    fn authenticated_request_has_zeros_before_a_nonzero_hmac() {
        let mut bytes = [0; 120];
        bytes[111] = 1;
        assert_eq!(guess_mode(&bytes), Mode::Authenticated);
        assert_eq!(guess_mode(&bytes[..112]), Mode::Authenticated);
        assert_eq!(guess_mode(&bytes[..111]), Mode::Open, "too short");
        for at in 0..120 {
            let mut changed = bytes;
            changed[at] ^= 1;
            let expected = if (44..96).contains(&at) || at == 111 { Mode::Open } else { Mode::Authenticated };
            assert_eq!(guess_mode(&changed), expected, "byte {at}");
        }
    }

    #[test]
    fn authenticated_reply_is_distinguished_from_requests_and_unsigned_packets() {
        let keys = Keys::parse("0123456789abcdef").unwrap();
        let sealed = |bytes: &mut [u8]| {
            seal(bytes, Mode::Authenticated, Some(keys.current()));
            is_authenticated_reply(bytes, &keys)
        };
        let mut bytes = vec![0; 112];
        reply().write(Mode::Authenticated, &mut bytes);
        assert!(!is_authenticated_reply(&bytes, &keys), "it is not signed");
        assert!(sealed(&mut bytes));
        assert!(!is_authenticated_reply(&bytes[..15], &keys));
        for at in 4..16 {
            bytes[at] = 1;
            assert!(!sealed(&mut bytes), "byte {at}");
            bytes[at] = 0;
        }
        let mut request = Vec::new();
        Request { sequence: 3, timestamp: NtpTime(5), error: 1, ssid: 9 }
            .encode(Mode::Authenticated, &mut request);
        assert!(!sealed(&mut request));
        assert_eq!(ssids(&bytes), [0, 7]);
        assert_eq!(ssids(&bytes[..27]), [0, 0]);
    }
}
