//! Bytes to values and back. Nothing here panics, whatever the bytes.

mod agent;
mod goodbye;
pub mod icmp;
mod message;
mod ntp;
pub mod stamp;
pub mod stream;
pub mod tlv;
pub mod websocket;

pub use agent::AgentKind;
pub use goodbye::{Goodbye, GoodbyeError};
pub use message::Message;
pub use ntp::{NtpTime, PeerTimestamp};

/// Why a datagram could not be read. Carries what and where, never the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than what it should hold.
    #[error("ends at byte {len}, inside {field} (needs {needs} bytes)")]
    Truncated {
        /// What was being read.
        field: &'static str,
        /// Bytes there are.
        len: usize,
        /// Bytes needed.
        needs: usize,
    },
    /// The HMAC is wrong: another key, or changed on the way.
    #[error("the HMAC of the {field} does not match any valid key")]
    Unauthentic {
        /// What it covers.
        field: &'static str,
    },
    /// The magic number is another protocol's.
    #[error("is not a {field}")]
    Foreign {
        /// What was expected.
        field: &'static str,
    },
    /// A version that this build does not speak.
    #[error("version {found} (this build speaks {ours})")]
    Version {
        /// The version found.
        found: u8,
        /// The version this build speaks.
        ours: u8,
    },
}

/// The datagram is at least `needs` bytes long.
fn require(bytes: &[u8], needs: usize, field: &'static str) -> Result<(), DecodeError> {
    if bytes.len() < needs {
        return Err(DecodeError::Truncated { field, len: bytes.len(), needs });
    }
    Ok(())
}

/// `N` bytes at `at`; zeros where the datagram ends, so callers check the length first.
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

/// Writes `value` at `at`; the caller has made the room.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_big_endian_and_zero_where_the_bytes_end() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!((u16_at(&bytes, 1), u32_at(&bytes, 1)), (0x0203, 0x0203_0405));
        assert_eq!((u64_at(&bytes, 1), array(&bytes, 7)), (0x0203_0405_0607_0809, [8, 9]));
        assert_eq!((u64_at(&bytes, 2), array::<2>(&bytes, 8)), (0, [0, 0]));
        let mut bytes = [0; 4];
        put(&mut bytes, 1, &[7, 8]);
        assert_eq!(bytes, [0, 7, 8, 0]);
    }

    #[test]
    fn what_is_as_long_as_needed_is_not_truncated() {
        assert_eq!(require(&[0; 4], 4, "x"), Ok(()));
        assert_eq!(require(&[0; 3], 4, "x"), Err(DecodeError::Truncated { field: "x", len: 3, needs: 4 }));
    }
}
