//! The common header of datagrams on the agent port, by which one socket serves all kinds.
//!
//! ```text
//!  0 u32 magic "pmag"   4 u8 version 1   5 u8 kind
//! ```

use super::{DecodeError, put, require, u32_at};

/// Kind of a datagram on the agent port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AgentKind {
    /// A [`Goodbye`](super::Goodbye).
    Goodbye,
    /// A datagram of a bandwidth run ([`load`](super::load)).
    Bandwidth,
}

/// Length of the header in bytes.
pub(super) const HEADER_BYTES: usize = 6;

const MAGIC: u32 = u32::from_be_bytes(*b"pmag");
const VERSION: u8 = 1;

impl AgentKind {
    const fn number(self) -> u8 {
        match self {
            Self::Goodbye => 1,
            Self::Bandwidth => 2,
        }
    }

    /// Reads the header of a datagram and ignores the rest.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] for another magic number or an unknown kind;
    /// [`DecodeError::Version`].
    pub fn read(datagram: &[u8]) -> Result<Self, DecodeError> {
        const UNRECOGNIZED: DecodeError = DecodeError::Unrecognized { field: "datagram of the agent port" };
        require(datagram, HEADER_BYTES, "header")?;
        if u32_at(datagram, 0) != MAGIC {
            return Err(UNRECOGNIZED);
        }
        if datagram[4] != VERSION {
            return Err(DecodeError::Version { found: datagram[4], supported: VERSION });
        }
        let known = [Self::Goodbye, Self::Bandwidth].into_iter().find(|kind| kind.number() == datagram[5]);
        known.ok_or(UNRECOGNIZED)
    }

    /// Writes the header. The caller ensures that it fits.
    pub(super) fn write(self, datagram: &mut [u8]) {
        put(datagram, 0, &MAGIC.to_be_bytes());
        put(datagram, 4, &[VERSION, self.number()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_magic_version_and_kind_are_rejected() {
        let mut datagram = [0; HEADER_BYTES];
        AgentKind::Goodbye.write(&mut datagram);
        assert_eq!(AgentKind::read(&datagram), Ok(AgentKind::Goodbye));
        for len in 0..HEADER_BYTES {
            assert!(matches!(AgentKind::read(&datagram[..len]), Err(DecodeError::Truncated { .. })));
        }
        let changed = |at: usize| {
            let mut changed = datagram;
            changed[at] ^= 0x80;
            AgentKind::read(&changed)
        };
        assert!(matches!(changed(0), Err(DecodeError::Unrecognized { .. })));
        assert_eq!(changed(4), Err(DecodeError::Version { found: 0x81, supported: 1 }));
        assert!(matches!(changed(5), Err(DecodeError::Unrecognized { .. })));
    }
}
