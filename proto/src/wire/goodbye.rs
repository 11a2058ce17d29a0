//! Goodbye datagrams, by which an agent tells its peers that it is about to stop, so that a planned restart
//! does not count as loss.
//!
//! ```text
//!  0 u32 magic "pmag"   4 u8 version 1   5 u8 kind 1   6 u16 length n of the name
//!  8 u64 boot id       16 u64 wall time, nanoseconds since 1970
//! 24 n bytes name      24+n 16 bytes HMAC-SHA-256/128 over all preceding bytes
//! ```

use super::agent::AgentKind;
use super::{DecodeError, put, require, u16_at, u64_at};
use crate::key::Keys;
use crate::time::WallTime;

/// The announcement that an agent is about to stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Goodbye {
    /// Configured name of the agent.
    pub name: String,
    /// Identifies the run of the agent that ends. A run says goodbye once; receivers ignore repetitions and
    /// replays.
    pub boot_id: u64,
    /// Time of the announcement on the agent's wall clock. A goodbye older than another one of the same name
    /// is ignored.
    pub at: WallTime,
}

impl Goodbye {
    /// Purpose for which the signing keys are derived from the mesh keys ([`Keys::derive`]).
    pub const PURPOSE: &'static str = "pathmeter agent datagram v1";
    /// Maximum length of the name in bytes.
    pub const NAME_BYTES_MAX: usize = 64;
    const NAME_AT: usize = 24;
    const TAG_BYTES: usize = 16;

    /// Encodes the datagram and signs it with keys derived for [`Goodbye::PURPOSE`]. A longer name is cut at
    /// [`Goodbye::NAME_BYTES_MAX`] bytes.
    #[must_use]
    pub fn encode(&self, keys: &Keys) -> Vec<u8> {
        let name = &self.name.as_bytes()[..self.name.len().min(Self::NAME_BYTES_MAX)];
        let mut out = vec![0; Self::NAME_AT];
        AgentKind::Goodbye.write(&mut out);
        put(&mut out, 6, &u16::try_from(name.len()).expect("cut above").to_be_bytes());
        put(&mut out, 8, &self.boot_id.to_be_bytes());
        put(&mut out, 16, &self.at.as_nanos().to_be_bytes());
        out.extend_from_slice(name);
        let tag = keys.current().mac_128(&[&out]);
        out.extend_from_slice(&tag);
        out
    }

    /// Decodes and authenticates a datagram of the agent port.
    ///
    /// # Errors
    /// [`GoodbyeError`] if it is not an authentic goodbye.
    pub fn decode(bytes: &[u8], keys: &Keys) -> Result<Self, GoodbyeError> {
        match AgentKind::read(bytes)? {
            AgentKind::Goodbye => {}
            AgentKind::Bandwidth => return Err(DecodeError::Unrecognized { field: "goodbye" }.into()),
        }
        let name_end = Self::NAME_AT + usize::from(u16_at(bytes, 6));
        require(bytes, name_end + Self::TAG_BYTES, "goodbye")?;
        if name_end + Self::TAG_BYTES != bytes.len() || name_end - Self::NAME_AT > Self::NAME_BYTES_MAX {
            return Err(GoodbyeError::Name);
        }
        if keys.verifying(&[&bytes[..name_end]], &bytes[name_end..]).is_none() {
            return Err(DecodeError::Unauthentic { field: "goodbye" }.into());
        }
        let name = std::str::from_utf8(&bytes[Self::NAME_AT..name_end]).map_err(|_| GoodbyeError::Name)?;
        Ok(Self {
            name: name.to_owned(),
            boot_id: u64_at(bytes, 8),
            at: WallTime::from_nanos(u64_at(bytes, 16)),
        })
    }
}

/// Why a goodbye was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GoodbyeError {
    /// The datagram is not a goodbye, or not signed with a mesh key.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The name is invalid.
    #[error("name is longer than {max} bytes or not UTF-8", max = Goodbye::NAME_BYTES_MAX)]
    Name,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodbye_signed_with_another_key_or_truncated_is_rejected() {
        let keys = Keys::parse("0123456789abcdef").unwrap().derive(Goodbye::PURPOSE);
        let other = Keys::parse("fedcba9876543210").unwrap().derive(Goodbye::PURPOSE);
        let goodbye = Goodbye { name: "ams-1".into(), boot_id: 7, at: WallTime::from_nanos(9) };
        let bytes = goodbye.encode(&keys);
        assert_eq!(Goodbye::decode(&bytes, &keys), Ok(goodbye));
        assert!(Goodbye::decode(&bytes, &other).is_err());
        for len in 0..bytes.len() {
            assert!(Goodbye::decode(&bytes[..len], &keys).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let keys = Keys::parse("0123456789abcdef").unwrap().derive(Goodbye::PURPOSE);
        let goodbye = Goodbye { name: "ams-1".into(), boot_id: 7, at: WallTime::from_nanos(9) };
        let bytes = goodbye.encode(&keys);
        let found: String = bytes[..29].iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "706d6167 01 01 0005 0000000000000007 0000000000000009 616d732d31";
        assert_eq!(found, expected.replace(' ', ""));
        assert_eq!(bytes.len(), 24 + 5 + 16);
    }

    #[test]
    fn unknown_version_and_name_errors_are_distinct() {
        let keys = Keys::parse("0123456789abcdef").unwrap().derive(Goodbye::PURPOSE);
        let encoded =
            |name: &str| Goodbye { name: name.into(), boot_id: 7, at: WallTime::from_nanos(9) }.encode(&keys);
        let decode = |bytes: &[u8]| Goodbye::decode(bytes, &keys);
        let longest = "a".repeat(64);
        assert_eq!(decode(&encoded(&longest)).unwrap().name, longest);
        assert_eq!(decode(&encoded(&"a".repeat(65))).unwrap().name, longest, "a longer one is cut");
        assert_eq!(decode(&encoded("")).unwrap().name, "");
        let changed = |at: usize, byte: u8| {
            let mut bytes = encoded("ams-1");
            bytes[at] = byte;
            decode(&bytes).unwrap_err()
        };
        let unrecognized =
            GoodbyeError::Decode(DecodeError::Unrecognized { field: "datagram of the agent port" });
        assert_eq!([changed(0, 9), changed(5, 9)], [unrecognized; 2]);
        let other = GoodbyeError::Decode(DecodeError::Unrecognized { field: "goodbye" });
        assert_eq!(changed(5, 2), other, "a datagram of a bandwidth run");
        assert_eq!(changed(4, 2), GoodbyeError::Decode(DecodeError::Version { found: 2, supported: 1 }));
        assert_eq!(changed(7, 4), GoodbyeError::Name, "excess bytes");
        let truncated = DecodeError::Truncated { field: "goodbye", len: 45, needs: 46 };
        assert_eq!(changed(7, 6), GoodbyeError::Decode(truncated));
        let unauthentic = GoodbyeError::Decode(DecodeError::Unauthentic { field: "goodbye" });
        assert_eq!([changed(8, 1), changed(24, 1), changed(44, 1)][..2], [unauthentic; 2]);
        let mut bytes = vec![0; 24];
        bytes[..8].copy_from_slice(b"pmag\x01\x01\x00\x01");
        bytes.push(0xff);
        let tag = keys.current().mac_128(&[&bytes]);
        bytes.extend_from_slice(&tag);
        assert_eq!(decode(&bytes), Err(GoodbyeError::Name), "not UTF-8");
        // A name longer than the maximum, signed with a valid key.
        let mut bytes = vec![0; 24];
        bytes[..8].copy_from_slice(b"pmag\x01\x01\x00\x41");
        bytes.extend_from_slice(&[b'a'; 65]);
        let tag = keys.current().mac_128(&[&bytes]);
        bytes.extend_from_slice(&tag);
        assert_eq!(decode(&bytes), Err(GoodbyeError::Name));
    }
}
