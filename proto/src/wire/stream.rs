//! Echo over a TCP connection to the agent port: one greeting in each direction, then messages of one length.
//!
//! ```text
//! greeting, 48 bytes
//!  0 u32 magic "pmst"   4 u8 version 1   5 u8 kind: 1 hello, 2 welcome
//!  6 u16 hello: 0; welcome: WelcomeStatus
//!  8 u32 length of every message in bytes, 56 to 65,536                 12 u32 zero
//! 16 16 bytes nonce
//! 32 16 bytes HMAC-SHA-256/128, zeros without a key.
//!    Hello: over bytes 0..32. Welcome: over bytes 0..32 of the hello and bytes 0..32
//!
//! message, 56 bytes and padding
//!  0 u32 magic "pmst"   4 u8 version 1   5 u8 kind: 3 request, 4 reply   6 u16 zero
//!  8 u64 sequence number
//! 16 u64 T1: when it was due, NTP format
//! 24 u64 T2: when its last byte reached the responder; zero in requests
//! 32 u64 T3: when the reply was written; zero in requests
//! 40 16 bytes HMAC-SHA-256/128 over the whole message with these bytes zero; zeros without a key
//! 56 padding, returned unchanged
//! ```
//!
//! The key of the messages is derived from the mesh key and both nonces, so messages of one connection are
//! invalid on another.

use super::{DecodeError, NtpTime, PeerTimestamp, array, put, require, u32_at, u64_at};
use crate::key::{Key, KeyId, Keys};
use crate::time::WallTime;
use crate::wire::Message;

/// Purpose for which the keys of streams are derived from the mesh keys ([`Keys::derive`]).
pub const PURPOSE: &str = "pathmeter agent stream v1";
/// Length of a greeting in bytes.
pub const GREETING_BYTES: usize = 48;
/// Minimum length of a message in bytes.
pub const MESSAGE_BYTES_MIN: u32 = 56;
/// Maximum length of a message in bytes.
pub const MESSAGE_BYTES_MAX: u32 = 65_536;

const MAGIC: u32 = u32::from_be_bytes(*b"pmst");
const VERSION: u8 = 1;
const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REQUEST: u8 = 3;
const REPLY: u8 = 4;
const TAG_AT: usize = 32;
const MESSAGE_TAG_AT: usize = 40;
const TAG_BYTES: usize = 16;

/// The greeting with which a prober opens a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Length in bytes of every message that follows.
    pub message_bytes: u32,
    /// Random, chosen for this connection.
    pub nonce: [u8; 16],
}

/// Result of checking the HMAC of a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GreetingProof {
    /// The hello is not signed.
    None,
    /// The hello is signed with this key.
    By(KeyId),
    /// The hello is signed with a key that is not valid here.
    Wrong,
}

/// Whether a responder will answer messages on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WelcomeStatus {
    /// It will.
    Granted,
    /// It will not: the source is not allowed and did not prove a key.
    Unlisted,
    /// It will not: the key is not valid at the responder.
    Unauthentic,
    /// It will not: its limit of connections is reached.
    Full,
    /// It will not: it does not accept messages of that length.
    Length,
}

impl WelcomeStatus {
    const ALL: [Self; 5] = [Self::Granted, Self::Unlisted, Self::Unauthentic, Self::Full, Self::Length];

    const fn code(self) -> u8 {
        match self {
            Self::Granted => 0,
            Self::Unlisted => 1,
            Self::Unauthentic => 2,
            Self::Full => 3,
            Self::Length => 4,
        }
    }
}

/// Encodes the fields of a greeting; its HMAC is zero.
fn greeting(kind: u8, status: u8, message_bytes: u32, nonce: &[u8; 16]) -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    put(&mut out, 0, &MAGIC.to_be_bytes());
    put(&mut out, 4, &[VERSION, kind, 0, status]);
    put(&mut out, 8, &message_bytes.to_be_bytes());
    put(&mut out, 16, nonce);
    out
}

/// Checks length, magic number, kind and version.
fn expect(bytes: &[u8], needs: usize, kind: u8, field: &'static str) -> Result<(), DecodeError> {
    require(bytes, needs, field)?;
    if u32_at(bytes, 0) != MAGIC || bytes[5] != kind {
        return Err(DecodeError::Unrecognized { field });
    }
    if bytes[4] != VERSION {
        return Err(DecodeError::Version { found: bytes[4], supported: VERSION });
    }
    Ok(())
}

impl Hello {
    /// Encodes the greeting, signed with the current one of the keys derived for [`PURPOSE`].
    #[must_use]
    pub fn encode(&self, keys: Option<&Keys>) -> [u8; GREETING_BYTES] {
        let mut out = greeting(HELLO, 0, self.message_bytes, &self.nonce);
        if let Some(keys) = keys {
            let tag = keys.current().mac_128(&[&out[..TAG_AT]]);
            put(&mut out, TAG_AT, &tag);
        }
        out
    }

    /// Decodes a hello and checks its HMAC.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not a hello. A wrong HMAC is not an error; see [`GreetingProof`].
    pub fn decode(bytes: &[u8], keys: Option<&Keys>) -> Result<(Self, GreetingProof), DecodeError> {
        expect(bytes, GREETING_BYTES, HELLO, "hello")?;
        let tag: [u8; TAG_BYTES] = array(bytes, TAG_AT);
        let proof = match keys.and_then(|keys| keys.verifying(&[&bytes[..TAG_AT]], &tag)) {
            Some(id) => GreetingProof::By(id),
            None if tag == [0; TAG_BYTES] => GreetingProof::None,
            None => GreetingProof::Wrong,
        };
        Ok((Self { message_bytes: u32_at(bytes, 8), nonce: array(bytes, 16) }, proof))
    }
}

/// The greeting with which a responder answers a [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// Whether the responder will answer messages.
    pub status: WelcomeStatus,
    /// Random, chosen for this connection.
    pub nonce: [u8; 16],
}

impl Welcome {
    /// Encodes the greeting. `key`: the key that signed the hello.
    #[must_use]
    pub fn encode(&self, hello: &Hello, key: Option<&Key>) -> [u8; GREETING_BYTES] {
        let mut out = greeting(WELCOME, self.status.code(), hello.message_bytes, &self.nonce);
        if let Some(key) = key {
            let tag = key
                .mac_128(&[&greeting(HELLO, 0, hello.message_bytes, &hello.nonce)[..TAG_AT], &out[..TAG_AT]]);
            put(&mut out, TAG_AT, &tag);
        }
        out
    }

    /// Decodes the answer to `hello`. With a key, the welcome must be signed unless it is a refusal: a
    /// responder that refuses may not know the key.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not valid.
    pub fn decode(bytes: &[u8], hello: &Hello, key: Option<&Key>) -> Result<Self, DecodeError> {
        expect(bytes, GREETING_BYTES, WELCOME, "welcome")?;
        let known = WelcomeStatus::ALL.get(usize::from(bytes[7])).filter(|_| bytes[6] == 0);
        let status = *known.ok_or(DecodeError::Unrecognized { field: "welcome" })?;
        let expected = greeting(HELLO, 0, hello.message_bytes, &hello.nonce);
        let is_signed =
            key.is_none_or(|key| key.verify(&[&expected[..TAG_AT], &bytes[..TAG_AT]], &bytes[TAG_AT..]));
        if status == WelcomeStatus::Granted && !is_signed {
            return Err(DecodeError::Unauthentic { field: "welcome" });
        }
        Ok(Self { status, nonce: array(bytes, 16) })
    }
}

/// Signs and checks the messages of one connection. Without a key they are not signed.
#[derive(Debug, Clone)]
pub struct Seal(Option<Key>);

/// A decoded reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodedReply {
    /// The message that it answers.
    pub message: Message,
    /// T3 − T2 in nanoseconds.
    pub turnaround: i64,
}

impl Seal {
    /// The seal of the connection that began with these greetings. `key`: one of the keys derived for
    /// [`PURPOSE`].
    #[must_use]
    pub fn of(key: Option<&Key>, hello: &Hello, welcome: &Welcome) -> Self {
        Self(key.map(|key| Key::new(&key.mac(&[b"messages", &hello.nonce, &welcome.nonce]))))
    }

    /// Appends a request of `length` bytes, at least [`MESSAGE_BYTES_MIN`].
    pub fn request(&self, message: Message, length: u32, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + length.max(MESSAGE_BYTES_MIN) as usize, 0);
        let frame = &mut out[start..];
        put(frame, 0, &MAGIC.to_be_bytes());
        put(frame, 4, &[VERSION, REQUEST]);
        put(frame, 8, &message.sequence.to_be_bytes());
        put(frame, 16, &message.timestamp.0.to_be_bytes());
        self.sign(frame);
    }

    /// Checks that `frame` is a request of this connection.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not valid.
    pub fn check_request(&self, frame: &[u8]) -> Result<(), DecodeError> {
        expect(frame, MESSAGE_BYTES_MIN as usize, REQUEST, "request")?;
        self.verify(frame, "request")
    }

    /// Turns a checked request into its reply. `received` is T2, `sent` is T3.
    pub fn reply(&self, frame: &mut [u8], received: WallTime, sent: WallTime) {
        put(frame, 5, &[REPLY]);
        put(frame, 24, &NtpTime::from(received).0.to_be_bytes());
        put(frame, 32, &NtpTime::from(sent).0.to_be_bytes());
        self.sign(frame);
    }

    /// Decodes and checks a reply of this connection.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not valid.
    pub fn read_reply(&self, frame: &[u8]) -> Result<DecodedReply, DecodeError> {
        expect(frame, MESSAGE_BYTES_MIN as usize, REPLY, "reply")?;
        self.verify(frame, "reply")?;
        let [received, sent] = [24, 32].map(|at| PeerTimestamp::from_ntp(u64_at(frame, at)));
        let message = Message { sequence: u64_at(frame, 8), timestamp: NtpTime(u64_at(frame, 16)) };
        Ok(DecodedReply { message, turnaround: sent.signed_since(received) })
    }

    fn sign(&self, frame: &mut [u8]) {
        let Some(key) = &self.0 else { return };
        let tag = key.mac_128(&without_tag(frame));
        put(frame, MESSAGE_TAG_AT, &tag);
    }

    fn verify(&self, frame: &[u8], field: &'static str) -> Result<(), DecodeError> {
        let tag = &frame[MESSAGE_TAG_AT..MESSAGE_TAG_AT + TAG_BYTES];
        match &self.0 {
            Some(key) if !key.verify(&without_tag(frame), tag) => Err(DecodeError::Unauthentic { field }),
            Some(_) | None => Ok(()),
        }
    }
}

fn without_tag(frame: &[u8]) -> [&[u8]; 3] {
    [&frame[..MESSAGE_TAG_AT], &[0; TAG_BYTES], &frame[MESSAGE_TAG_AT + TAG_BYTES..]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Keys {
        Keys::parse(text).unwrap().derive(PURPOSE)
    }

    const HELLO: Hello = Hello { message_bytes: 100, nonce: [7; 16] };
    const GRANTED: Welcome = Welcome { status: WelcomeStatus::Granted, nonce: [9; 16] };

    #[test]
    fn both_ends_prove_a_key_and_either_valid_key_is_accepted() {
        let (old, both) = (keys("0123456789abcdef"), keys("fedcba9876543210\n0123456789abcdef"));
        let (hello, proof) = Hello::decode(&HELLO.encode(Some(&old)), Some(&both)).unwrap();
        assert_eq!((hello, proof), (HELLO, GreetingProof::By(KeyId::Previous)));
        let key = both.key(KeyId::Previous);
        let welcome = GRANTED.encode(&hello, Some(key));
        assert_eq!(Welcome::decode(&welcome, &HELLO, Some(old.current())), Ok(GRANTED));
        let other = Hello { nonce: [8; 16], ..HELLO };
        assert!(Welcome::decode(&welcome, &other, Some(old.current())).is_err(), "it answers another hello");
        assert!(Welcome::decode(&GRANTED.encode(&hello, None), &HELLO, Some(old.current())).is_err());
    }

    #[test]
    fn unsigned_hello_is_distinguished_from_a_wrongly_signed_one() {
        let known = keys("0123456789abcdef");
        let proof = |signer: Option<&Keys>, knower: Option<&Keys>| {
            Hello::decode(&HELLO.encode(signer), knower).unwrap().1
        };
        assert_eq!(proof(None, Some(&known)), GreetingProof::None);
        assert_eq!(proof(Some(&keys("another-key-of-16")), Some(&known)), GreetingProof::Wrong);
        assert_eq!(proof(Some(&known), None), GreetingProof::Wrong);
    }

    #[test]
    fn refusal_needs_no_signature() {
        let key = keys("0123456789abcdef");
        for status in WelcomeStatus::ALL.into_iter().skip(1) {
            let welcome = Welcome { status, ..GRANTED };
            let read = Welcome::decode(&welcome.encode(&HELLO, None), &HELLO, Some(key.current()));
            assert_eq!(read, Ok(welcome));
        }
    }

    #[test]
    fn reply_carries_two_timestamps_and_any_changed_byte_is_detected() {
        let key = keys("0123456789abcdef");
        let seal = Seal::of(Some(key.current()), &HELLO, &GRANTED);
        let message = Message { sequence: 5, timestamp: NtpTime(77) };
        let mut frame = Vec::new();
        seal.request(message, 100, &mut frame);
        assert_eq!(frame.len(), 100);
        seal.check_request(&frame).unwrap();
        assert!(seal.read_reply(&frame).is_err(), "a request is not a reply");
        seal.reply(&mut frame, WallTime::from_nanos(1_000), WallTime::from_nanos(3_500));
        assert_eq!(seal.read_reply(&frame), Ok(DecodedReply { message, turnaround: 2_500 }));
        for at in 0..frame.len() {
            let mut changed = frame.clone();
            changed[at] ^= 1;
            assert!(seal.read_reply(&changed).is_err(), "byte {at}");
        }
        let other = Seal::of(Some(key.current()), &Hello { nonce: [8; 16], ..HELLO }, &GRANTED);
        assert!(other.read_reply(&frame).is_err(), "of another connection");
    }

    #[test]
    fn truncated_or_other_version_is_rejected() {
        let hello = HELLO.encode(None);
        for length in 0..GREETING_BYTES {
            assert!(Hello::decode(&hello[..length], None).is_err(), "{length} bytes");
        }
        let mut newer = hello;
        newer[4] = 2;
        assert_eq!(Hello::decode(&newer, None), Err(DecodeError::Version { found: 2, supported: 1 }));
        let seal = Seal::of(None, &HELLO, &GRANTED);
        let mut frame = Vec::new();
        seal.request(Message { sequence: 0, timestamp: NtpTime(0) }, 0, &mut frame);
        assert!((0..frame.len()).all(|length| seal.check_request(&frame[..length]).is_err()));
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let welcome = Welcome { status: WelcomeStatus::Full, nonce: [9; 16] };
        let greetings =
            [(HELLO.encode(None), "01 0000", "07"), (welcome.encode(&HELLO, None), "02 0003", "09")];
        for (bytes, kind, nonce) in greetings {
            let (nonce, tag) = (nonce.repeat(16), "00".repeat(16));
            let expected = format!("706d7374 01 {kind} 00000064 00000000 {nonce} {tag}");
            assert_eq!(hex(&bytes), expected.replace(' ', ""));
        }
        let seal = Seal::of(None, &HELLO, &GRANTED);
        let mut frame = vec![1];
        seal.request(Message { sequence: 5, timestamp: NtpTime(77) }, 58, &mut frame);
        seal.reply(&mut frame[1..], WallTime::from_nanos(0), WallTime::from_nanos(0));
        let time = format!("{:016x}", 2_208_988_800_u64 << 32);
        let expected = format!(
            "01 706d7374 01 04 0000 0000000000000005 000000000000004d {time} {time} {} 0000",
            "00".repeat(16)
        );
        assert_eq!(hex(&frame), expected.replace(' ', ""));
    }

    #[test]
    fn welcome_with_an_unknown_code_is_unrecognized() {
        let welcome = GRANTED.encode(&HELLO, None);
        for (at, byte) in [(6, 1), (7, 5), (5, 1), (0, 9)] {
            let mut changed = welcome;
            changed[at] = byte;
            let found = Welcome::decode(&changed, &HELLO, None);
            assert_eq!(found, Err(DecodeError::Unrecognized { field: "welcome" }), "byte {at}");
        }
        assert_eq!(Welcome::decode(&welcome, &HELLO, None), Ok(GRANTED));
        for (code, status) in (0..).zip(WelcomeStatus::ALL) {
            assert_eq!(Welcome { status, ..GRANTED }.encode(&HELLO, None)[7], code);
        }
    }

    #[test]
    fn messages_are_signed_only_with_a_key() {
        let keys = keys("0123456789abcdef");
        let message = Message { sequence: 5, timestamp: NtpTime(77) };
        let [signed, plain] = [Some(keys.current()), None].map(|key| Seal::of(key, &HELLO, &GRANTED));
        for (seal, other) in [(&signed, &plain), (&plain, &signed)] {
            let mut frame = Vec::new();
            seal.request(message, 56, &mut frame);
            assert_eq!(frame[40..56] == [0; 16], seal.0.is_none());
            assert!(seal.check_request(&frame).is_ok());
            assert_eq!(other.check_request(&frame).is_ok(), other.0.is_none());
        }
    }
}
