//! Basic authentication (RFC 7617) against bcrypt hashes, as in the Prometheus exporter toolkit.
//!
//! Computing a bcrypt hash takes tens of milliseconds, by design. Therefore hashes are computed on blocking
//! threads, a few at once; verified credentials are cached, so that frequent scrapes are cheap; and an
//! unknown user costs as much time as a known one, so that the response time does not reveal user names.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use headers::authorization::Basic;
use headers::{Authorization, HeaderMapExt as _};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// Users allowed to access the HTTP port. Clones share the cache of verified credentials.
#[derive(Clone)]
pub struct Users {
    shared: Arc<SharedUsers>,
}

struct SharedUsers {
    /// Never empty.
    hashes: BTreeMap<String, String>,
    salt: [u8; 32],
    /// Digests of recently verified credentials, oldest first.
    verified_digests: Mutex<VecDeque<[u8; 32]>>,
    permits: Arc<Semaphore>,
}

/// `WWW-Authenticate` header of a 401 response.
pub const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"pathmeter\", charset=\"UTF-8\"");

/// Maximum number of hashes computed at once; further ones wait. Chosen: password guessing leaves the host
/// most of its cores.
const CONCURRENT_HASHES_MAX: usize = 2;

/// Maximum number of cached credentials; the oldest is evicted. Chosen: more than the scrapers of any setup.
const CACHE_ENTRIES_MAX: usize = 256;

/// Maximum length of a password in bytes; longer ones are rejected. bcrypt itself uses the first 72.
const PASSWORD_BYTES_MAX: usize = 4096;

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Users").field("count", &self.shared.hashes.len()).finish()
    }
}

impl Users {
    /// Returns the users with the bcrypt hashes of their passwords; there must be at least one.
    ///
    /// # Panics
    /// Panics without a user, or if the kernel provides no random bytes.
    #[must_use]
    pub fn new(hashes: BTreeMap<String, String>) -> Self {
        assert!(!hashes.is_empty(), "at least one user is configured");
        let mut salt = [0; 32];
        getrandom::fill(&mut salt).expect("the kernel has random bytes");
        let permits = Arc::new(Semaphore::new(CONCURRENT_HASHES_MAX));
        Self { shared: Arc::new(SharedUsers { hashes, salt, verified_digests: Mutex::default(), permits }) }
    }

    /// Returns whether the request has the name and the correct password of a user.
    pub async fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(credentials) = user_and_password(headers) else { return false };
        let (user, password) = (credentials.username(), credentials.password().to_owned());
        let SharedUsers { hashes, verified_digests, permits, .. } = &*self.shared;
        let known = hashes.get(user);
        let digest = self.digest(user, password.as_bytes(), known.map_or("", String::as_str));
        let is_cached = || verified_digests.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest);
        if known.is_some() && is_cached() {
            return true;
        }
        let Ok(permit) = Arc::clone(permits).acquire_owned().await else { return false };
        // Another request with the same credentials may have been verified while this one waited.
        if known.is_some() && is_cached() {
            return true;
        }
        let hash = known.unwrap_or_else(|| self.placeholder_hash(user)).clone();
        let verified = spawn_blocking(move || {
            let _permit = permit;
            bcrypt::verify(password, &hash).unwrap_or(false)
        });
        if !verified.await.unwrap_or(false) || known.is_none() {
            return false;
        }
        let mut verified_digests = verified_digests.lock().unwrap_or_else(PoisonError::into_inner);
        if verified_digests.len() >= CACHE_ENTRIES_MAX {
            verified_digests.pop_front();
        }
        verified_digests.push_back(digest);
        true
    }

    /// Returns the hash against which an unknown user's password is checked. It is always the same for the
    /// same name, so that the response time does not reveal that the user is unknown.
    fn placeholder_hash(&self, user: &str) -> &String {
        let draw = usize::from(self.digest(user, b"", "")[0]);
        let hashes = &self.shared.hashes;
        hashes.values().nth(draw % hashes.len()).expect("there is a user")
    }

    /// Returns the digest under which credentials are cached. It reveals nothing without the salt.
    fn digest(&self, user: &str, password: &[u8], hash: &str) -> [u8; 32] {
        let mut digest = Sha256::new();
        digest.update(self.shared.salt);
        for part in [user.as_bytes(), password, hash.as_bytes()] {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        digest.finalize().into()
    }
}

/// Returns whether the request uses Basic authentication.
#[must_use]
pub fn is_basic(headers: &HeaderMap) -> bool {
    let scheme = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().first_chunk::<6>());
    scheme.is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic "))
}

/// The credentials of a request with exactly one `Authorization` header.
fn user_and_password(headers: &HeaderMap) -> Option<Authorization<Basic>> {
    let has_one = headers.get_all(AUTHORIZATION).iter().count() == 1;
    let credentials = headers.typed_get::<Authorization<Basic>>().filter(|_| has_one)?;
    (credentials.password().len() <= PASSWORD_BYTES_MAX).then_some(credentials)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Uses cost 4, the lowest, to keep tests fast.
    fn users(entries: &[(&str, &str)]) -> Users {
        let hash = |(user, password): &(&str, &str)| ((*user).to_owned(), bcrypt::hash(password, 4).unwrap());
        Users::new(entries.iter().map(hash).collect())
    }

    fn basic_header(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let (user, password) = text.split_once(':').unwrap();
        headers.typed_insert(Authorization::basic(user, password));
        headers
    }

    fn cached(users: &Users) -> usize {
        users.shared.verified_digests.lock().unwrap().len()
    }

    #[tokio::test]
    async fn user_with_the_correct_password_is_admitted() {
        let users = users(&[("alice", "a:b"), ("bob", "secret")]);
        for (user_and_password, is_admitted) in [
            ("alice:a:b", true),
            ("bob:secret", true),
            ("bob:a:b", false),
            ("bob:", false),
            ("eve:secret", false),
            (":", false),
        ] {
            assert_eq!(
                users.admits(&basic_header(user_and_password)).await,
                is_admitted,
                "{user_and_password}"
            );
        }
    }

    #[tokio::test]
    async fn other_authorization_headers_are_rejected() {
        let users = users(&[("bob", "secret")]);
        assert!(!users.admits(&HeaderMap::new()).await);
        for value in ["Basic", "Basic !", "Basic Ym9i", "Bearer Ym9iOnNlY3JldA==", "Pathmeter-HMAC time=1"] {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::from_static(value));
            assert!(!users.admits(&headers).await, "{value}");
        }
        let mut twice = basic_header("bob:secret");
        twice.append(AUTHORIZATION, twice[AUTHORIZATION].clone());
        assert!(!users.admits(&twice).await);
        let mut lower = HeaderMap::new();
        lower.insert(AUTHORIZATION, HeaderValue::from_static("basic Ym9iOnNlY3JldA=="));
        assert!(users.admits(&lower).await);
    }

    #[tokio::test]
    async fn only_correct_credentials_are_cached() {
        let users = users(&[("bob", "secret")]);
        for user_and_password in ["bob:wrong", "eve:secret", "bob:secret", "bob:secret"] {
            users.admits(&basic_header(user_and_password)).await;
        }
        assert_eq!(cached(&users), 1);
        // No hash can be computed without permits, so these answers come from the cache.
        users.shared.permits.close();
        assert!(users.admits(&basic_header("bob:secret")).await);
        assert!(!users.admits(&basic_header("bob:wrong")).await);
    }

    #[tokio::test]
    async fn cache_size_is_limited() {
        let users = users(&[("bob", "secret")]);
        let oldest = [1; 32];
        users
            .shared
            .verified_digests
            .lock()
            .unwrap()
            .extend([oldest].into_iter().chain([[2; 32]; CACHE_ENTRIES_MAX - 1]));
        assert!(users.admits(&basic_header("bob:secret")).await);
        assert_eq!(cached(&users), CACHE_ENTRIES_MAX);
        assert!(!users.shared.verified_digests.lock().unwrap().contains(&oldest));
    }

    #[tokio::test]
    async fn unknown_user_costs_a_hash() {
        let users = users(&[("bob", "secret")]);
        let all = Arc::clone(&users.shared.permits).acquire_many_owned(2).await.unwrap();
        let request = tokio::spawn(async move { users.admits(&basic_header("eve:secret")).await });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!request.is_finished(), "it waits for a permit, as bob would");
        drop(all);
        assert!(!request.await.unwrap());
    }

    #[test]
    fn hashes_of_htpasswd_are_accepted() {
        // Example from the Prometheus documentation, created with htpasswd.
        let hash = "$2b$12$hNf2lSsxfm0.i4a.1kVpSOVyBCfIB51VRjgBUyv6kdnyTlgWj81Ay";
        assert!(bcrypt::verify("test", hash).unwrap());
        assert!(bcrypt::verify("test", &hash.replacen("2b", "2y", 1)).unwrap());
    }
}
