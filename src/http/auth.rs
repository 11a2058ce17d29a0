//! Request signatures, which prove that a request comes from an agent of the mesh. The key itself is never
//! sent.
//!
//! ```text
//! Authorization: Pathmeter-HMAC time=<unix ms>,nonce=<32 hex>,mac=<64 hex>
//! ```
//!
//! `mac` is HMAC-SHA-256, with the key derived from the mesh key for [`PURPOSE`], over five lines joined by
//! single line feeds, without one at the end:
//!
//! ```text
//! POST                        the method
//! /-/reload?wait=1            path and query, as sent
//! 1763640000000               the header's time: milliseconds since 1970, decimal, no leading zeros
//! 00112233445566778899aabbccddeeff                      the header's nonce, lower case
//! e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855      SHA-256 of the body
//! ```
//!
//! No field can contain a line feed, so two different requests never have the same signed text. The host is
//! not signed: within [`CLOCK_DIFFERENCE_MAX`], an attacker who captures a request can replay it to another
//! agent, or to the same one after a restart. Therefore all requests protected by a signature must be
//! idempotent.

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
    /// Returns a signer that uses the first of the mesh keys.
    #[must_use]
    pub fn new(mesh: &Keys) -> Self {
        Self { key: mesh.current().derive(PURPOSE) }
    }

    /// Sets the request's `Authorization` header, with a new nonce.
    ///
    /// # Errors
    /// Fails if the kernel provides no random bytes.
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
            HeaderValue::try_from(header).expect("digits, letters and punctuation are a valid header value");
        request.headers_mut().insert(AUTHORIZATION, header);
    }
}

/// Verifies request signatures and rejects replays.
///
/// Stores the nonces of accepted requests for as long as the requests would be valid, at most [`NONCES_MAX`].
/// Nonces expire by the wall clock: if the clock is set back, earlier requests can be replayed once.
#[derive(Debug)]
pub struct Verifier {
    state: Mutex<VerifierState>,
}

#[derive(Debug)]
struct VerifierState {
    keys: Keys,
    /// Accepted requests, ordered by time so that the oldest are removed first.
    nonces: BTreeSet<(u64, Nonce)>,
}

impl Verifier {
    /// Returns a verifier that accepts signatures made with any of the mesh keys.
    #[must_use]
    pub fn new(mesh: &Keys) -> Self {
        Self { state: Mutex::new(VerifierState { keys: mesh.derive(PURPOSE), nonces: BTreeSet::new() }) }
    }

    /// Replaces the mesh keys. Stored nonces are kept.
    pub fn set_keys(&self, mesh: &Keys) {
        self.state().keys = mesh.derive(PURPOSE);
    }

    /// Verifies that a request was signed with a valid key within [`CLOCK_DIFFERENCE_MAX`] of `now`, without
    /// storing its nonce. For frequent requests whose replay is harmless.
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
    ) -> Result<SignatureHeader, AuthError> {
        let proof = SignatureHeader::read(request.headers())?;
        let text = signed_text(request, proof.time_ms, proof.nonce);
        state.keys.verifying(&[text.as_bytes()], &proof.mac).ok_or(AuthError::WrongKey)?;
        let difference = Duration::from_millis(unix_ms(now).abs_diff(proof.time_ms));
        if difference > CLOCK_DIFFERENCE_MAX {
            return Err(AuthError::Skewed { difference });
        }
        Ok(proof)
    }

    /// Verifies that a request was signed with a valid key within [`CLOCK_DIFFERENCE_MAX`] of `now` and was
    /// not accepted before.
    ///
    /// The signature is checked first: a client without the key learns nothing else and consumes no memory.
    ///
    /// # Errors
    /// [`AuthError`], in the order of its variants.
    pub fn verify(&self, request: &Request<Bytes>, now: SystemTime) -> Result<(), AuthError> {
        let mut state = self.state();
        let proof = Self::check(&state, request, now)?;
        let oldest_ms = unix_ms(now).saturating_sub(millis(CLOCK_DIFFERENCE_MAX));
        state.nonces = state.nonces.split_off(&(oldest_ms, [0; 16]));
        if state.nonces.contains(&(proof.time_ms, proof.nonce)) {
            return Err(AuthError::Replayed);
        }
        if state.nonces.len() >= NONCES_MAX {
            return Err(AuthError::Full);
        }
        state.nonces.insert((proof.time_ms, proof.nonce));
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, VerifierState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request is rejected. The text may be shown to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No `Authorization` header.
    #[error("is not signed (needs a header `Authorization: Pathmeter-HMAC …`)")]
    Missing,
    /// The header has another scheme, is malformed, or occurs twice.
    #[error("has a malformed signature ({part})")]
    Malformed {
        /// The invalid part.
        part: &'static str,
    },
    /// The signature of method, path, time, nonce and body does not match any valid key.
    #[error("is not signed with the mesh key, or was modified in transit")]
    WrongKey,
    /// Signed too long ago, or in the future.
    #[error(
        "has a timestamp that differs by {difference:?} from this host's clock (allowed: {max:?}); check both clocks",
        max = CLOCK_DIFFERENCE_MAX
    )]
    Skewed {
        /// Difference between the signer's clock at signing and the local clock.
        difference: Duration,
    },
    /// The request was accepted before.
    #[error("was already received (replay)")]
    Replayed,
    /// [`NONCES_MAX`] requests were accepted within the window.
    #[error("exceeds the limit of {NONCES_MAX} signed requests within {window:?}", window = 2 * CLOCK_DIFFERENCE_MAX)]
    Full,
}

/// Purpose for which the key is derived from the mesh key, see [`Key::derive`].
pub const PURPOSE: &str = "pathmeter http v1";

/// Maximum difference between the clocks of two agents, transit time included. Chosen: hosts without time
/// synchronisation are usually within it, and it bounds how long nonces are stored.
pub const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(60);

/// Maximum number of stored nonces. Further requests are refused until the oldest nonce expires. Chosen: 546
/// requests per second over two minutes, in about 2 MB.
pub const NONCES_MAX: usize = 65_536;

const SCHEME: &str = "Pathmeter-HMAC";

type Nonce = [u8; 16];

struct SignatureHeader {
    time_ms: u64,
    nonce: Nonce,
    mac: [u8; 32],
}

impl SignatureHeader {
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

/// Returns milliseconds since the Unix epoch; 0 for earlier times.
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
    fn signed_text_matches_the_documentation() {
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
    fn request_signed_with_any_valid_key_is_accepted() {
        let verifier = Verifier::new(&mesh(BOTH));
        assert_eq!(verifier.verify(&signed(NEW, NOON), at(NOON)), Ok(()));
        assert_eq!(verifier.verify(&signed(OLD, NOON), at(NOON)), Ok(()));
    }

    #[test]
    fn recognised_request_may_be_repeated_and_stores_no_nonce() {
        let verifier = Verifier::new(&mesh(NEW));
        let request = signed(NEW, NOON);
        for _ in 0..3 {
            assert!(verifier.recognise(&request, at(NOON)).is_ok());
        }
        assert!(verifier.state().nonces.is_empty());
        assert_eq!(verifier.recognise(&signed(OLD, NOON), at(NOON)), Err(AuthError::WrongKey));
        let late = at(NOON + 61_000);
        assert!(matches!(verifier.recognise(&request, late), Err(AuthError::Skewed { .. })));
        assert_eq!(verifier.verify(&request, at(NOON)), Ok(()));
    }

    #[test]
    fn removed_keys_are_rejected_immediately() {
        let verifier = Verifier::new(&mesh(BOTH));
        verifier.set_keys(&mesh(NEW));
        assert_eq!(verifier.verify(&signed(OLD, NOON), at(NOON)), Err(AuthError::WrongKey));
        assert_eq!(verifier.verify(&signed(NEW, NOON), at(NOON)), Ok(()));
    }

    #[test]
    fn modified_request_is_rejected() {
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
    fn request_without_signature_is_reported_as_missing() {
        assert_eq!(Verifier::new(&mesh(NEW)).verify(&reload(""), at(NOON)), Err(AuthError::Missing));
    }

    #[test]
    fn signature_in_another_format_is_malformed() {
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
    fn clocks_may_differ_by_at_most_one_minute() {
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
    fn request_is_accepted_only_once() {
        let verifier = Verifier::new(&mesh(NEW));
        let request = signed(NEW, NOON);
        assert_eq!(verifier.verify(&request, at(NOON - 60_000)), Ok(()));
        for now_ms in [NOON - 60_000, NOON, NOON + 60_000] {
            assert_eq!(verifier.verify(&request, at(now_ms)), Err(AuthError::Replayed));
        }
        assert!(matches!(verifier.verify(&request, at(NOON + 60_001)), Err(AuthError::Skewed { .. })));
    }

    #[test]
    fn full_nonce_store_refuses_requests_until_the_oldest_nonce_expires() {
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
        assert_eq!(verifier.state().nonces.len(), 1);
    }
}
