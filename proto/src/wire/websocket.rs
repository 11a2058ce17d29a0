//! Messages of a prober over a WebSocket, which the server sends back unchanged.
//!
//! ```text
//! binary: 0 u64 sequence number   8 u64 time at which it was due, NTP format   16 zeros
//! text:   {"seq":5,"ts":1678886400100,"ntp":"e7bd5f00199999ab","pad":"…"}
//!         ts: due time in milliseconds since 1970, for display; ntp: due time in NTP format, hexadecimal
//! ```

use super::{DecodeError, NtpTime, require, u64_at};
use crate::wire::Message;

/// Format of the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageFormat {
    /// JSON, in text messages.
    Text,
    /// Numbers, in binary messages.
    Binary,
}

impl MessageFormat {
    /// Length in bytes of the shortest message in which all fields fit.
    #[must_use]
    pub const fn bytes_min(self) -> usize {
        match self {
            Self::Text => 96,
            Self::Binary => 16,
        }
    }

    /// Encodes a message of `bytes` bytes, or longer if it does not fit.
    #[must_use]
    pub fn encode(self, message: Message, bytes: usize) -> Vec<u8> {
        let Message { sequence, timestamp } = message;
        let mut out = Vec::with_capacity(bytes.max(self.bytes_min()));
        match self {
            Self::Binary => {
                out.extend_from_slice(&sequence.to_be_bytes());
                out.extend_from_slice(&timestamp.0.to_be_bytes());
                out.resize(bytes.max(16), 0);
            }
            Self::Text => {
                let start = format!(
                    "{{\"seq\":{sequence},\"ts\":{},\"ntp\":\"{:016x}\",\"pad\":\"",
                    milliseconds(timestamp),
                    timestamp.0
                );
                out.extend_from_slice(start.as_bytes());
                out.resize(bytes.saturating_sub(END.len()).max(out.len()), b'.');
                out.extend_from_slice(END);
            }
        }
        out
    }

    /// Decodes an echoed message. It must equal the sent message byte for byte; `length` is the `bytes` that
    /// was passed to [`MessageFormat::encode`].
    ///
    /// # Errors
    /// [`DecodeError`] if it is not such a message.
    pub fn decode(self, bytes: &[u8], length: usize) -> Result<Message, DecodeError> {
        let unrecognized = DecodeError::Unrecognized { field: "message" };
        let message = match self {
            Self::Binary => {
                require(bytes, 16, "message")?;
                Message { sequence: u64_at(bytes, 0), timestamp: NtpTime(u64_at(bytes, 8)) }
            }
            Self::Text => {
                let text = std::str::from_utf8(bytes).map_err(|_| unrecognized)?;
                let after = |key: &str| text.find(key).and_then(|at| text.get(at + key.len()..));
                let digits = |text: &str| text.split([',', '"']).next().unwrap_or_default().to_owned();
                let sequence = after("\"seq\":").and_then(|rest| digits(rest).parse().ok());
                let timestamp =
                    after("\"ntp\":\"").and_then(|rest| u64::from_str_radix(&digits(rest), 16).ok());
                let (Some(sequence), Some(timestamp)) = (sequence, timestamp) else {
                    return Err(unrecognized);
                };
                Message { sequence, timestamp: NtpTime(timestamp) }
            }
        };
        if self.encode(message, length) == bytes { Ok(message) } else { Err(unrecognized) }
    }
}

const END: &[u8] = b"\"}";

/// Milliseconds since 1970 (RFC 868: 2,208,988,800 s after 1900), in the era that began then.
fn milliseconds(timestamp: NtpTime) -> u64 {
    let seconds = (timestamp.0 >> 32).wrapping_sub(2_208_988_800) & 0xffff_ffff;
    seconds * 1_000 + (((timestamp.0 & 0xffff_ffff) * 1_000) >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::WallTime;

    #[test]
    fn echoed_message_is_accepted_only_unchanged() {
        let timestamp = NtpTime::from(WallTime::from_nanos(1_678_886_400_100_000_000));
        for format in [MessageFormat::Text, MessageFormat::Binary] {
            for bytes in [16, 96, 97, 1_000] {
                let message = Message { sequence: 123, timestamp };
                let sent = format.encode(message, bytes);
                assert_eq!(format.decode(&sent, bytes), Ok(message));
                if bytes >= format.bytes_min() {
                    assert_eq!(sent.len(), bytes);
                }
                for at in 0..sent.len() {
                    let mut changed = sent.clone();
                    changed[at] ^= 0x15;
                    assert_ne!(format.decode(&changed, bytes), Ok(message), "{format:?} {bytes} byte {at}");
                }
                assert!((0..sent.len()).all(|end| format.decode(&sent[..end], bytes).is_err()));
            }
        }
        let text = MessageFormat::Text.encode(Message { sequence: 123, timestamp }, 96);
        assert!(
            text.starts_with(b"{\"seq\":123,\"ts\":1678886400100,"),
            "{}",
            String::from_utf8_lossy(&text)
        );
    }

    #[test]
    fn largest_numbers_fit_the_shortest_text() {
        let longest = Message { sequence: u64::MAX, timestamp: NtpTime(u64::MAX) };
        assert_eq!(MessageFormat::Text.encode(longest, 96).len(), 96);
    }

    #[test]
    fn other_text_is_rejected() {
        for text in ["", "hello", "{\"seq\":1}", "{\"seq\":\u{e9},\"ntp\":\"0\"}", "\"seq\":1,\"ntp\":\"zz\""]
        {
            assert!(MessageFormat::Text.decode(text.as_bytes(), 96).is_err(), "{text}");
        }
    }

    #[test]
    fn message_has_the_requested_length_or_the_minimum() {
        let message = Message { sequence: 5, timestamp: NtpTime(7) };
        let lengths = |format: MessageFormat| {
            [0, 15, 16, 17, 95, 96, 97].map(|bytes| format.encode(message, bytes).len())
        };
        assert_eq!(lengths(MessageFormat::Binary), [16, 16, 16, 17, 95, 96, 97]);
        let least = MessageFormat::Text.encode(message, 0).len();
        assert_eq!(lengths(MessageFormat::Text), [least, least, least, least, 95, 96, 97]);
        assert_eq!([MessageFormat::Text, MessageFormat::Binary].map(MessageFormat::bytes_min), [96, 16]);
        let text = String::from_utf8(MessageFormat::Text.encode(message, 62)).unwrap();
        let expected = "{\"seq\":5,\"ts\":2085978496000,\"ntp\":\"0000000000000007\",\"pad\":\"\"}";
        assert_eq!(text, expected);
        let expected = "{\"seq\":5,\"ts\":2085978496000,\"ntp\":\"0000000000000007\",\"pad\":\"..\"}";
        assert_eq!(String::from_utf8(MessageFormat::Text.encode(message, expected.len())).unwrap(), expected);
        let binary = MessageFormat::Binary.encode(message, 18);
        assert_eq!(binary, [0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0]);
    }

    #[test]
    fn ntp_time_converts_to_milliseconds_since_1970() {
        assert_eq!(milliseconds(NtpTime(2_208_988_800 << 32)), 0);
        assert_eq!(milliseconds(NtpTime((2_208_988_801 << 32) + (1 << 31))), 1_500);
        assert_eq!(milliseconds(NtpTime(0)), 2_085_978_496_000, "in the era that began in 1970");
        assert_eq!(milliseconds(NtpTime((2_208_988_800 << 32) + 0xffff_ffff)), 999);
    }
}
