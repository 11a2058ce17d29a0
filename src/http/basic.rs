//! Basic authentication (RFC 7617) against bcrypt hashes, as Prometheus' exporters have it.
//!
//! A hash takes tens of milliseconds, on purpose. So it is computed on a thread for such things, a few at once; what was
//! right is remembered, so that a scrape every second costs nothing; and a user who does not exist costs as much as one
//! who does.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

/// Who may ask. Clones share what they remember.
#[derive(Clone)]
pub struct Users {
    shared: Arc<SharedUsers>,
}

struct SharedUsers {
    /// Never empty.
    hashes: BTreeMap<String, String>,
    salt: [u8; 32],
    /// What was right lately, the oldest first.
    right: Mutex<VecDeque<[u8; 32]>>,
    permits: Arc<Semaphore>,
}

/// What a client is told that must say who it is.
pub const CHALLENGE: HeaderValue = HeaderValue::from_static("Basic realm=\"pathmeter\", charset=\"UTF-8\"");

/// Hashes that are computed at once; further ones wait. Chosen: guessing leaves the host most of its cores.
const AT_ONCE: usize = 2;

/// Users and passwords that are remembered as right; the oldest is forgotten. Chosen: more than anyone has scrapers.
const REMEMBERED: usize = 256;

/// Bytes of a password that are looked at; bcrypt itself knows 72.
const PASSWORD_BYTES_MAX: usize = 4096;

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Users").field("count", &self.shared.hashes.len()).finish()
    }
}

impl Users {
    /// Users by the bcrypt hashes of their passwords; one at least.
    ///
    /// # Panics
    /// Without a user, or without a random number from the kernel.
    #[must_use]
    pub fn new(hashes: BTreeMap<String, String>) -> Self {
        assert!(!hashes.is_empty(), "without users there is nothing to ask for");
        let mut salt = [0; 32];
        getrandom::fill(&mut salt).expect("the kernel has random bytes");
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        Self { shared: Arc::new(SharedUsers { hashes, salt, right: Mutex::default(), permits }) }
    }

    /// Whether a request says a user and the right password.
    pub async fn admits(&self, headers: &HeaderMap) -> bool {
        let Some((user, password)) = said(headers) else { return false };
        let SharedUsers { hashes, right, permits, .. } = &*self.shared;
        let known = hashes.get(&user);
        let mark = self.mark(&user, &password, known.map_or("", String::as_str));
        let is_remembered = || right.lock().unwrap_or_else(PoisonError::into_inner).contains(&mark);
        if known.is_some() && is_remembered() {
            return true;
        }
        let Ok(place) = Arc::clone(permits).acquire_owned().await else { return false };
        // Whoever had the place before may have asked the same.
        if known.is_some() && is_remembered() {
            return true;
        }
        let hash = known.unwrap_or_else(|| self.decoy(&user)).clone();
        let verified = spawn_blocking(move || {
            let _place = place;
            bcrypt::verify(password, &hash).unwrap_or(false)
        });
        if !verified.await.unwrap_or(false) || known.is_none() {
            return false;
        }
        let mut right = right.lock().unwrap_or_else(PoisonError::into_inner);
        if right.len() >= REMEMBERED {
            right.pop_front();
        }
        right.push_back(mark);
        true
    }

    /// The hash that stands in for an unknown user's: always the same one for the same name, so that the cost tells nothing.
    fn decoy(&self, user: &str) -> &String {
        let draw = usize::from(self.mark(user, b"", "")[0]);
        let hashes = &self.shared.hashes;
        hashes.values().nth(draw % hashes.len()).expect("there is a user")
    }

    /// What is remembered of a user and a password. Nothing can be learned from it without the salt.
    fn mark(&self, user: &str, password: &[u8], hash: &str) -> [u8; 32] {
        let mut mark = Sha256::new();
        mark.update(self.shared.salt);
        for part in [user.as_bytes(), password, hash.as_bytes()] {
            mark.update((part.len() as u64).to_be_bytes());
            mark.update(part);
        }
        mark.finalize().into()
    }
}

/// Whether a request says who it is in this way.
#[must_use]
pub fn is_basic(headers: &HeaderMap) -> bool {
    headers.get(AUTHORIZATION).is_some_and(|value| credentials(value).is_some())
}

fn credentials(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, rest) = value.as_bytes().split_at_checked(6)?;
    scheme.eq_ignore_ascii_case(b"basic ").then_some(rest)
}

fn said(headers: &HeaderMap) -> Option<(String, Vec<u8>)> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (value, None) = (values.next()?, values.next()) else { return None };
    let text = STANDARD.decode(credentials(value)?.trim_ascii()).ok()?;
    let colon = text.iter().position(|byte| *byte == b':')?;
    let user = String::from_utf8(text[..colon].to_vec()).ok()?;
    let password = text[colon + 1..].to_vec();
    (password.len() <= PASSWORD_BYTES_MAX).then_some((user, password))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cost 4, the lowest: made for tests.
    fn users(entries: &[(&str, &str)]) -> Users {
        let hash = |(user, password): &(&str, &str)| ((*user).to_owned(), bcrypt::hash(password, 4).unwrap());
        Users::new(entries.iter().map(hash).collect())
    }

    fn saying(text: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, format!("Basic {}", STANDARD.encode(text)).parse().unwrap());
        headers
    }

    fn remembered(users: &Users) -> usize {
        users.shared.right.lock().unwrap().len()
    }

    #[tokio::test]
    async fn a_user_with_the_right_password_is_admitted() {
        let users = users(&[("alice", "a:b"), ("bob", "secret")]);
        for (said, is_right) in [
            ("alice:a:b", true),
            ("bob:secret", true),
            ("bob:a:b", false),
            ("bob:", false),
            ("bob", false),
            ("eve:secret", false),
            (":", false),
        ] {
            assert_eq!(users.admits(&saying(said)).await, is_right, "{said}");
        }
    }

    #[tokio::test]
    async fn a_header_of_another_kind_admits_nobody() {
        let users = users(&[("bob", "secret")]);
        assert!(!users.admits(&HeaderMap::new()).await);
        for value in ["Basic", "Basic !", "Bearer Ym9iOnNlY3JldA==", "Pathmeter-HMAC time=1"] {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::from_static(value));
            assert!(!users.admits(&headers).await, "{value}");
        }
        let mut twice = saying("bob:secret");
        twice.append(AUTHORIZATION, twice[AUTHORIZATION].clone());
        assert!(!users.admits(&twice).await);
        let mut lower = HeaderMap::new();
        lower.insert(AUTHORIZATION, HeaderValue::from_static("basic Ym9iOnNlY3JldA=="));
        assert!(users.admits(&lower).await);
    }

    #[tokio::test]
    async fn what_was_right_is_remembered_and_what_was_wrong_is_not() {
        let users = users(&[("bob", "secret")]);
        for said in ["bob:wrong", "eve:secret", "bob:secret", "bob:secret"] {
            users.admits(&saying(said)).await;
        }
        assert_eq!(remembered(&users), 1);
        // No hash is computed: there is no place for one.
        users.shared.permits.close();
        assert!(users.admits(&saying("bob:secret")).await);
        assert!(!users.admits(&saying("bob:wrong")).await);
    }

    #[tokio::test]
    async fn what_is_remembered_has_a_limit() {
        let users = users(&[("bob", "secret")]);
        let oldest = [1; 32];
        users.shared.right.lock().unwrap().extend([oldest].into_iter().chain([[2; 32]; REMEMBERED - 1]));
        assert!(users.admits(&saying("bob:secret")).await);
        assert_eq!(remembered(&users), REMEMBERED);
        assert!(!users.shared.right.lock().unwrap().contains(&oldest));
    }

    #[tokio::test]
    async fn an_unknown_user_costs_a_hash() {
        let users = users(&[("bob", "secret")]);
        let all = Arc::clone(&users.shared.permits).acquire_many_owned(2).await.unwrap();
        let asking = tokio::spawn(async move { users.admits(&saying("eve:secret")).await });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!asking.is_finished(), "it waits for a place, as bob would");
        drop(all);
        assert!(!asking.await.unwrap());
    }

    #[test]
    fn hashes_of_other_programs_are_read() {
        // The example of Prometheus' documentation, made by htpasswd.
        let hash = "$2b$12$hNf2lSsxfm0.i4a.1kVpSOVyBCfIB51VRjgBUyv6kdnyTlgWj81Ay";
        assert!(bcrypt::verify("test", hash).unwrap());
        assert!(bcrypt::verify("test", &hash.replacen("2b", "2y", 1)).unwrap());
    }
}
