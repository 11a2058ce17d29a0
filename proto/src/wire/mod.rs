//! Encoding and decoding of packets and messages. No function here panics on any received bytes.

mod agent;
pub mod bandwidth;
mod goodbye;
pub mod icmp;
pub mod icmp_extensions;
pub mod load;
mod message;
mod ntp;
pub mod quoted_header;
mod reverse_trace;
pub mod stamp;
pub mod stream;
pub mod tcp;
pub mod tlv;
pub mod websocket;

pub use agent::AgentKind;
pub use goodbye::{Goodbye, GoodbyeError};
pub use message::Message;
pub use ntp::{NtpTime, PeerTimestamp};
pub use reverse_trace::{ReplyFate, ReverseOutcome, ReverseTrace};

/// Why a packet or message could not be decoded. Names what and where, and never contains the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The input is too short.
    #[error("ends at byte {len}, inside {field} (needs {needs} bytes)")]
    Truncated {
        /// Name of the structure.
        field: &'static str,
        /// Length of the input in bytes.
        len: usize,
        /// Number of bytes that the structure needs.
        needs: usize,
    },
    /// The HMAC is wrong: it was made with another key, or the data was changed in transit.
    #[error("the HMAC of the {field} does not match any valid key")]
    Unauthentic {
        /// What the HMAC covers.
        field: &'static str,
    },
    /// The input is of another protocol or kind.
    #[error("is not a {field}")]
    Unrecognized {
        /// What was expected.
        field: &'static str,
    },
    /// The version is not supported.
    #[error("version {found} (this build supports {supported})")]
    Version {
        /// Version of the input.
        found: u8,
        /// Supported version.
        supported: u8,
    },
}

/// Checks that `bytes` has at least `needs` bytes.
fn require(bytes: &[u8], needs: usize, field: &'static str) -> Result<(), DecodeError> {
    if bytes.len() < needs {
        return Err(DecodeError::Truncated { field, len: bytes.len(), needs });
    }
    Ok(())
}

/// `N` bytes at `at`; zeros if the input ends before, so callers check the length first.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = bytes.get(at..at + N) {
        out.copy_from_slice(found);
    }
    out
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

/// Writes `value` at `at`. The caller ensures that it fits.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_big_endian_and_zero_past_the_end() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!((u16_at(&bytes, 1), u32_at(&bytes, 1)), (0x0203, 0x0203_0405));
        assert_eq!((u64_at(&bytes, 1), array(&bytes, 7)), (0x0203_0405_0607_0809, [8, 9]));
        assert_eq!((u64_at(&bytes, 2), array::<2>(&bytes, 8)), (0, [0, 0]));
        let mut bytes = [0; 4];
        put(&mut bytes, 1, &[7, 8]);
        assert_eq!(bytes, [0, 7, 8, 0]);
    }

    #[test]
    fn input_of_the_needed_length_is_not_truncated() {
        assert_eq!(require(&[0; 4], 4, "x"), Ok(()));
        assert_eq!(require(&[0; 3], 4, "x"), Err(DecodeError::Truncated { field: "x", len: 3, needs: 4 }));
    }
}
