//! Proof that a request comes from an agent of the mesh. The key itself is never sent.
//!
//! ```text
//! Authorization: Pathmeter-HMAC time=<unix ms>,nonce=<32 hex>,mac=<64 hex>
//! ```
//!
//! `mac` is HMAC-SHA-256, with the mesh key derived for [`PURPOSE`], over five lines joined by single line feeds,
//! none at the end:
//!
//! ```text
//! POST                        the method
//! /-/reload?wait=1            path and query, as sent
//! 1763640000000               the header's time: milliseconds since 1970, decimal, no leading zeros
//! 00112233445566778899aabbccddeeff                      the header's nonce, lower case
//! e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855      SHA-256 of the body
//! ```
//!
//! No field can hold a line feed, so two different requests never have the same text. The host is not part of it:
//! within [`CLOCK_DIFFERENCE_MAX`] a request that was overheard can be repeated towards another agent, and after a
//! restart towards the same one; what is served behind this proof must bear being asked twice.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::Request;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use pathmeter_proto::key::{Key, Keys};
use sha2::{Digest, Sha256};

/// Signs requests.
#[derive(Debug, Clone)]
pub struct Signer {
    key: Key,
}

impl Signer {
    /// Signs with the first of the mesh keys.
    #[must_use]
    pub fn new(mesh: &Keys) -> Self {
        Self { key: mesh.current().derive(PURPOSE) }
    }

    /// Sets the request's `Authorization` header, with a new nonce.
    ///
    /// # Errors
    /// The kernel gave no random bytes.
    pub fn sign(&self, request: &mut Request<Bytes>, now: SystemTime) -> Result<(), getrandom::Error> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce)?;
        self.sign_with(request, unix_ms(now), nonce);
        Ok(())
    }

    fn sign_with(&self, request: &mut Request<Bytes>, time_ms: u64, nonce: Nonce) {
        let mac = self.key.mac(&[signed_text(request, time_ms, nonce).as_bytes()]);
        let header = format!("{SCHEME} time={time_ms},nonce={},mac={}", hex(&nonce), hex(&mac));
        let header =
            HeaderValue::try_from(header).expect("digits, letters and punctuation are a header's value");
        request.headers_mut().insert(AUTHORIZATION, header);
    }
}

/// Verifies requests, each at most once.
///
/// Remembers what it accepted for as long as that could be accepted again, [`NONCES_MAX`] requests at most. The
/// memory is by wall clock: a clock that is set back lets requests from before be repeated once.
#[derive(Debug)]
pub struct Verifier {
    state: Mutex<VerifierState>,
}

#[derive(Debug)]
struct VerifierState {
    keys: Keys,
    /// Accepted requests by their time, so that the oldest are forgotten first.
    seen: BTreeSet<(u64, Nonce)>,
}

impl Verifier {
    /// Accepts what any of the mesh keys signed.
    #[must_use]
    pub fn new(mesh: &Keys) -> Self {
        Self { state: Mutex::new(VerifierState { keys: mesh.derive(PURPOSE), seen: BTreeSet::new() }) }
    }

    /// Changes the mesh keys and still remembers what was accepted.
    pub fn set_keys(&self, mesh: &Keys) {
        self.state().keys = mesh.derive(PURPOSE);
    }

    /// Whether a valid key signed a request within [`CLOCK_DIFFERENCE_MAX`] of `now`. Takes no memory and no note of it: for
    /// requests that may be repeated, and that come by the thousand.
    ///
    /// # Errors
    /// [`AuthError`], neither [`AuthError::Replayed`] nor [`AuthError::Full`].
    pub fn recognise(&self, request: &Request<Bytes>, now: SystemTime) -> Result<(), AuthError> {
        Self::check(&self.state(), request, now).map(drop)
    }

    fn check(
        state: &VerifierState,
        request: &Request<Bytes>,
        now: SystemTime,
    ) -> Result<ProofHeader, AuthError> {
        let proof = ProofHeader::read(request.headers())?;
        let text = signed_text(request, proof.time_ms, proof.nonce);
        state.keys.verifying(&[text.as_bytes()], &proof.mac).ok_or(AuthError::WrongKey)?;
        let difference = Duration::from_millis(unix_ms(now).abs_diff(proof.time_ms));
        if difference > CLOCK_DIFFERENCE_MAX {
            return Err(AuthError::Skewed { difference });
        }
        Ok(proof)
    }

    /// Accepts a request that a valid key signed within [`CLOCK_DIFFERENCE_MAX`] of `now` and that was not accepted
    /// before.
    ///
    /// The key is tried first: who does not have it learns nothing else and takes no memory.
    ///
    /// # Errors
    /// [`AuthError`], in the order of its variants.
    pub fn verify(&self, request: &Request<Bytes>, now: SystemTime) -> Result<(), AuthError> {
        let mut state = self.state();
        let proof = Self::check(&state, request, now)?;
        let oldest_ms = unix_ms(now).saturating_sub(millis(CLOCK_DIFFERENCE_MAX));
        state.seen = state.seen.split_off(&(oldest_ms, [0; 16]));
        if state.seen.contains(&(proof.time_ms, proof.nonce)) {
            return Err(AuthError::Replayed);
        }
        if state.seen.len() >= NONCES_MAX {
            return Err(AuthError::Full);
        }
        state.seen.insert((proof.time_ms, proof.nonce));
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, VerifierState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request is not believed. The text may be shown to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No `Authorization` header.
    #[error("is not signed (needs a header `Authorization: Pathmeter-HMAC …`)")]
    Missing,
    /// The header is not ours, or there are two.
    #[error("has no well-formed signature ({part})")]
    Malformed {
        /// What is wrong with it.
        part: &'static str,
    },
    /// No valid key signed this method, path, time, nonce and body.
    #[error("is not signed with the mesh key (or was changed on its way)")]
    WrongKey,
    /// Signed too long ago, or in our future.
    #[error(
        "is signed at a time {difference:?} from ours (at most {max:?}: is a clock wrong?)",
        max = CLOCK_DIFFERENCE_MAX
    )]
    Skewed {
        /// Between the signer's clock, at signing, and ours.
        difference: Duration,
    },
    /// Accepted before.
    #[error("was received before")]
    Replayed,
    /// Too many others were accepted within the window to remember one more.
    #[error("comes after {NONCES_MAX} others within {window:?}", window = 2 * CLOCK_DIFFERENCE_MAX)]
    Full,
}

/// What the mesh key is derived for, see [`Key::derive`].
pub const PURPOSE: &str = "pathmeter http v1";

/// The most the clocks of two agents may differ, the time on the way included. Chosen: hosts without a disciplined
/// clock are within it, and it bounds how long nonces are remembered.
pub const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(60);

/// Requests that are remembered; one more is refused until the oldest leaves the window. Chosen: 546 requests a second
/// over two minutes, in about 2 MB.
pub const NONCES_MAX: usize = 65_536;

const SCHEME: &str = "Pathmeter-HMAC";

type Nonce = [u8; 16];

struct ProofHeader {
    time_ms: u64,
    nonce: Nonce,
    mac: [u8; 32],
}

impl ProofHeader {
    fn read(headers: &HeaderMap) -> Result<Self, AuthError> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let value = values.next().ok_or(AuthError::Missing)?;
        if values.next().is_some() {
            return Err(AuthError::Malformed { part: "two Authorization headers" });
        }
        let value = value.to_str().map_err(|_| AuthError::Malformed { part: "not ASCII" })?;
        let fields = value.strip_prefix(SCHEME).and_then(|rest| rest.strip_prefix(' '));
        let mut fields = fields.ok_or(AuthError::Malformed { part: "not Pathmeter-HMAC" })?.split(',');
        let mut field = |part: &'static str| {
            let value = fields.next().and_then(|field| field.strip_prefix(part)?.strip_prefix('='));
            value.ok_or(AuthError::Malformed { part })
        };
        let time_ms = field("time")?.parse().map_err(|_| AuthError::Malformed { part: "time" })?;
        let nonce = unhex(field("nonce")?).ok_or(AuthError::Malformed { part: "nonce" })?;
        let mac = unhex(field("mac")?).ok_or(AuthError::Malformed { part: "mac" })?;
        match fields.next() {
            None => Ok(Self { time_ms, nonce, mac }),
            Some(_) => Err(AuthError::Malformed { part: "a fourth field" }),
        }
    }
}

fn signed_text(request: &Request<Bytes>, time_ms: u64, nonce: Nonce) -> String {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let body: [u8; 32] = Sha256::digest(request.body()).into();
    format!("{}\n{path}\n{time_ms}\n{}\n{}", request.method(), hex(&nonce), hex(&body))
}

/// Milliseconds since 1970; a clock before that counts as 1970.
fn unix_ms(time: SystemTime) -> u64 {
    millis(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String succeeds");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: u64 = 1_763_640_000_000;

    fn at(time_ms: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(time_ms)
    }

    fn mesh(lines: &str) -> Keys {
        Keys::parse(lines).unwrap()
    }

    fn reload(body: &'static str) -> Request<Bytes> {
        Request::post("/-/reload?wait=1").body(Bytes::from_static(body.as_bytes())).unwrap()
    }

    fn signed(key: &str, time_ms: u64) -> Request<Bytes> {
        let mut request = reload("now");
        Signer::new(&mesh(key)).sign(&mut request, at(time_ms)).unwrap();
        request
    }

    const OLD: &str = "old-key-0123456789";
    const NEW: &str = "new-key-0123456789";
    const BOTH: &str = "new-key-0123456789\nold-key-0123456789";

    #[test]
    fn the_signed_text_is_the_documented_one() {
        let nonce = 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff_u128.to_be_bytes();
        let text = "POST\n/-/reload?wait=1\n1763640000000\n00112233445566778899aabbccddeeff\n\
                    e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(signed_text(&reload(""), NOON, nonce), text);

        let mut request = reload("");
        Signer::new(&mesh(NEW)).sign_with(&mut request, NOON, nonce);
        let mac = hex(&Key::new(NEW.as_bytes()).derive("pathmeter http v1").mac(&[text.as_bytes()]));
        let header =
            format!("Pathmeter-HMAC time=1763640000000,nonce=00112233445566778899aabbccddeeff,mac={mac}");
        assert_eq!(request.headers()[AUTHORIZATION], header);
    }

    #[test]
    fn a_request_signed_with_either_valid_key_is_accepted() {
        let verifier = Verifier::new(&mesh(BOTH));
        assert_eq!(verifier.verify(&signed(NEW, NOON), at(NOON)), Ok(()));
        assert_eq!(verifier.verify(&signed(OLD, NOON), at(NOON)), Ok(()));
    }

    #[test]
    fn what_is_only_recognised_may_come_again_and_takes_no_memory() {
        let verifier = Verifier::new(&mesh(NEW));
        let request = signed(NEW, NOON);
        for _ in 0..3 {
            assert!(verifier.recognise(&request, at(NOON)).is_ok());
        }
        assert!(verifier.state().seen.is_empty());
        assert_eq!(verifier.recognise(&signed(OLD, NOON), at(NOON)), Err(AuthError::WrongKey));
        let late = at(NOON + 61_000);
        assert!(matches!(verifier.recognise(&request, late), Err(AuthError::Skewed { .. })));
        assert_eq!(verifier.verify(&request, at(NOON)), Ok(()));
    }

    #[test]
    fn keys_that_left_are_refused_at_once() {
        let verifier = Verifier::new(&mesh(BOTH));
        verifier.set_keys(&mesh(NEW));
        assert_eq!(verifier.verify(&signed(OLD, NOON), at(NOON)), Err(AuthError::WrongKey));
        assert_eq!(verifier.verify(&signed(NEW, NOON), at(NOON)), Ok(()));
    }

    #[test]
    fn whatever_was_signed_cannot_be_changed() {
        let verifier = Verifier::new(&mesh(NEW));
        let original = signed(NEW, NOON);
        let change = |change: fn(&mut Request<Bytes>)| {
            let mut request = original.clone();
            change(&mut request);
            verifier.verify(&request, at(NOON))
        };
        assert_eq!(change(|request| *request.method_mut() = hyper::Method::PUT), Err(AuthError::WrongKey));
        assert_eq!(
            change(|request| *request.uri_mut() = "/-/reload".parse().unwrap()),
            Err(AuthError::WrongKey)
        );
        assert_eq!(
            change(|request| *request.body_mut() = Bytes::from_static(b"later")),
            Err(AuthError::WrongKey)
        );
        let later = |request: &mut Request<Bytes>| {
            let header = request.headers()[AUTHORIZATION].to_str().unwrap();
            let header = header.replace("time=1763640000000", "time=1763640000001");
            request.headers_mut().insert(AUTHORIZATION, header.parse().unwrap());
        };
        assert_eq!(change(later), Err(AuthError::WrongKey));
        assert_eq!(verifier.verify(&original, at(NOON)), Ok(()));
    }

    #[test]
    fn a_request_without_a_proof_is_missing_it() {
        assert_eq!(Verifier::new(&mesh(NEW)).verify(&reload(""), at(NOON)), Err(AuthError::Missing));
    }

    #[test]
    fn a_proof_in_another_shape_is_malformed() {
        let verifier = Verifier::new(&mesh(NEW));
        let nonce = "0".repeat(32);
        let mac = "0".repeat(64);
        for (header, part) in [
            ("Basic dXNlcjpwYXNz".to_owned(), "not Pathmeter-HMAC"),
            ("Pathmeter-HMACtime=1".to_owned(), "not Pathmeter-HMAC"),
            ("Pathmeter-HMAC ".to_owned(), "time"),
            (format!("Pathmeter-HMAC time=noon,nonce={nonce},mac={mac}"), "time"),
            (format!("Pathmeter-HMAC time=-1,nonce={nonce},mac={mac}"), "time"),
            (format!("Pathmeter-HMAC time=1,nonce={nonce}0,mac={mac}"), "nonce"),
            (format!("Pathmeter-HMAC time=1,nonce=+{},mac={mac}", "0".repeat(31)), "nonce"),
            (format!("Pathmeter-HMAC time=1,mac={mac},nonce={nonce}"), "nonce"),
            (format!("Pathmeter-HMAC time=1,nonce={nonce},mac={nonce}"), "mac"),
            (format!("Pathmeter-HMAC time=1,nonce={nonce},mac={mac},x=1"), "a fourth field"),
        ] {
            let mut request = reload("");
            request.headers_mut().insert(AUTHORIZATION, header.parse().unwrap());
            assert_eq!(verifier.verify(&request, at(NOON)), Err(AuthError::Malformed { part }), "{header}");
        }
        let mut request = signed(NEW, NOON);
        request.headers_mut().append(AUTHORIZATION, HeaderValue::from_static("x"));
        let refusal = AuthError::Malformed { part: "two Authorization headers" };
        assert_eq!(verifier.verify(&request, at(NOON)), Err(refusal));
    }

    #[test]
    fn clocks_may_differ_by_a_minute_and_no_more() {
        let verifier = Verifier::new(&mesh(NEW));
        for time_ms in [NOON - 60_000, NOON + 60_000] {
            assert_eq!(verifier.verify(&signed(NEW, time_ms), at(NOON)), Ok(()));
        }
        let difference = Duration::from_millis(60_001);
        for time_ms in [NOON - 60_001, NOON + 60_001] {
            assert_eq!(
                verifier.verify(&signed(NEW, time_ms), at(NOON)),
                Err(AuthError::Skewed { difference })
            );
        }
    }

    #[test]
    fn a_request_is_accepted_once_at_any_time() {
        let verifier = Verifier::new(&mesh(NEW));
        let request = signed(NEW, NOON);
        assert_eq!(verifier.verify(&request, at(NOON - 60_000)), Ok(()));
        for now_ms in [NOON - 60_000, NOON, NOON + 60_000] {
            assert_eq!(verifier.verify(&request, at(now_ms)), Err(AuthError::Replayed));
        }
        assert!(matches!(verifier.verify(&request, at(NOON + 60_001)), Err(AuthError::Skewed { .. })));
    }

    #[test]
    fn a_full_memory_refuses_new_requests_until_the_window_has_moved() {
        let mesh = mesh(NEW);
        let (signer, verifier) = (Signer::new(&mesh), Verifier::new(&mesh));
        let request = |index: u128| {
            let mut request = reload("");
            signer.sign_with(&mut request, NOON, index.to_be_bytes());
            request
        };
        for index in 0..NONCES_MAX as u128 {
            assert_eq!(verifier.verify(&request(index), at(NOON)), Ok(()));
        }
        assert_eq!(verifier.verify(&request(u128::MAX), at(NOON)), Err(AuthError::Full));
        assert_eq!(verifier.verify(&request(0), at(NOON)), Err(AuthError::Replayed));

        assert_eq!(verifier.verify(&signed(NEW, NOON + 60_001), at(NOON + 60_001)), Ok(()));
        assert_eq!(verifier.state().seen.len(), 1);
    }
}
