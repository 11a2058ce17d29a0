//! Mesh keys: HMAC authentication of datagrams and requests.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// A shared secret, prepared for HMAC-SHA-256: the pads are computed once.
#[derive(Clone)]
pub struct Key {
    mac: Hmac<Sha256>,
}

impl Key {
    /// Minimum key length in bytes. Chosen: 128 bits, the length of the truncated HMAC that the key protects.
    pub const BYTES_MIN: usize = 16;

    /// A key from its raw bytes, the shared secret of RFC 8762 section 4.4.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        let mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes a key of any length");
        Self { mac }
    }

    /// HMAC-SHA-256 over the concatenation of `parts`.
    #[must_use]
    pub fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = self.mac.clone();
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// HMAC-SHA-256 over `parts`, truncated to its first 16 bytes as STAMP uses it (RFC 8762 section 4.4).
    #[must_use]
    pub fn mac_128(&self, parts: &[&[u8]]) -> [u8; 16] {
        let whole = self.mac(parts);
        let mut short = [0; 16];
        short.copy_from_slice(&whole[..16]);
        short
    }

    /// Whether `tag` is the HMAC of `parts`, whole or truncated to at least 16 bytes. Takes constant time.
    #[must_use]
    pub fn verify(&self, parts: &[&[u8]], tag: &[u8]) -> bool {
        if tag.len() < 16 {
            return false;
        }
        let mut mac = self.mac.clone();
        for part in parts {
            mac.update(part);
        }
        mac.verify_truncated_left(tag).is_ok()
    }

    /// Derives a key for one purpose, so that a tag made for one protocol is invalid in another.
    ///
    /// HKDF-Expand with SHA-256 and one block (RFC 5869 section 2.3). The mesh key is uniformly random or
    /// long, so the extract step is left out as section 3.3 allows.
    #[must_use]
    pub fn derive(&self, purpose: &str) -> Self {
        Self::new(&self.mac(&[purpose.as_bytes(), &[1]]))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// The valid keys: the first signs, both verify, so that a fleet can change its key one host at a time.
#[derive(Debug, Clone)]
pub struct Keys {
    current: Key,
    previous: Option<Key>,
}

impl Keys {
    /// Reads a key file with one or two keys, one per line. 64 hexadecimal digits are 32 bytes; any other
    /// text is used as it is. Blank lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`KeyFileError`] names the line and never contains the key.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let mut keys = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let secret = decode_hex(line).unwrap_or_else(|| line.as_bytes().to_vec());
            if secret.len() < Key::BYTES_MIN {
                return Err(KeyFileError::Short { line: index + 1, found: secret.len() });
            }
            keys.push(Key::new(&secret));
        }
        let mut keys = keys.into_iter();
        let current = keys.next().ok_or(KeyFileError::Empty)?;
        let previous = keys.next();
        match keys.count() {
            0 => Ok(Self { current, previous }),
            extra => Err(KeyFileError::TooMany { found: extra + 2 }),
        }
    }

    /// A set with only this key.
    #[must_use]
    pub fn only(current: Key) -> Self {
        Self { current, previous: None }
    }

    /// The key that signs messages.
    #[must_use]
    pub fn current(&self) -> &Key {
        &self.current
    }

    /// All valid keys, the signing key first.
    pub fn all(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.current).chain(self.previous.as_ref())
    }

    /// Returns which valid key made `tag`; `None` if none did.
    #[must_use]
    pub fn verifying(&self, parts: &[&[u8]], tag: &[u8]) -> Option<KeyId> {
        [KeyId::Current, KeyId::Previous]
            .into_iter()
            .zip(self.all())
            .find_map(|(id, key)| key.verify(parts, tag).then_some(id))
    }

    /// Returns the key with this identifier; the current key if there is no previous one.
    #[must_use]
    pub fn key(&self, id: KeyId) -> &Key {
        match id {
            KeyId::Current => &self.current,
            KeyId::Previous => self.previous.as_ref().unwrap_or(&self.current),
        }
    }

    /// Derives both keys for one purpose; see [`Key::derive`].
    #[must_use]
    pub fn derive(&self, purpose: &str) -> Self {
        Self {
            current: self.current.derive(purpose),
            previous: self.previous.as_ref().map(|key| key.derive(purpose)),
        }
    }
}

/// Selects one of the valid keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyId {
    /// The key that signs.
    Current,
    /// The second key, which only verifies.
    Previous,
}

/// Why a key file is invalid. Never contains the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// The file has no key.
    #[error("contains no key (add one, for example from `openssl rand -hex 32`)")]
    Empty,
    /// A key is shorter than [`Key::BYTES_MIN`].
    #[error("has a key of {found} bytes in line {line} (minimum {min})", min = Key::BYTES_MIN)]
    Short {
        /// Line number, from 1.
        line: usize,
        /// Length of the key in bytes.
        found: usize,
    },
    /// The file has more than two keys.
    #[error("contains {found} keys (maximum 2: the first signs, both verify)")]
    TooMany {
        /// Number of keys.
        found: usize,
    },
}

fn decode_hex(line: &str) -> Option<Vec<u8>> {
    if line.len() != 64 {
        return None;
    }
    (0..32).map(|i| u8::from_str_radix(line.get(2 * i..2 * i + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hmac_agrees_with_rfc_4231_test_case_2() {
        let tag = Key::new(b"Jefe").mac(&[b"what do ya want ", b"for nothing?"]);
        assert_eq!(tag[..4], [0x5b, 0xdc, 0xc1, 0x46]);
        assert!(Key::new(b"Jefe").verify(&[b"what do ya want for nothing?"], &tag[..16]));
        assert!(!Key::new(b"Jefe").verify(&[b"what do ya want for nothing!"], &tag[..16]));
    }

    #[test]
    fn tag_shorter_than_128_bits_never_verifies() {
        let tag = Key::new(b"Jefe").mac(&[b"x"]);
        assert!(!Key::new(b"Jefe").verify(&[b"x"], &tag[..15]));
        assert!(!Key::new(b"Jefe").verify(&[b"x"], &[]));
    }

    #[test]
    fn first_of_two_keys_signs_and_both_verify() {
        let keys = Keys::parse("# mesh\nnew-key-0123456789\n\nold-key-0123456789\n").unwrap();
        let old = Key::new(b"old-key-0123456789").mac(&[b"x"]);
        let new = Key::new(b"new-key-0123456789").mac(&[b"x"]);
        assert!(keys.verifying(&[b"x"], &old).is_some());
        assert_eq!(keys.current().mac(&[b"x"]), new);
    }

    #[test]
    fn key_file_without_a_usable_key_is_rejected() {
        assert_eq!(Keys::parse("# nothing\n").unwrap_err(), KeyFileError::Empty);
        assert_eq!(Keys::parse("\nshort").unwrap_err(), KeyFileError::Short { line: 2, found: 5 });
        let three = "0123456789abcdef\n".repeat(3);
        assert_eq!(Keys::parse(&three).unwrap_err(), KeyFileError::TooMany { found: 3 });
    }

    #[test]
    fn keys_for_two_purposes_differ() {
        let key = Key::new(b"0123456789abcdef");
        assert_ne!(key.derive("http").mac(&[b"x"]), key.derive("goodbye").mac(&[b"x"]));
    }
}
