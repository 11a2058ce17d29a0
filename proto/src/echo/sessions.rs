//! Whom the responder remembers, and what it received from them.

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::stats::ReceivedSequences;
use crate::time::{Timestamp, WallOffset};
use crate::wire::NtpTime;

/// What identifies a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SessionKey {
    /// Our own probers draw 32 random bits: the session is theirs wherever they send from.
    Ours { session: u32, ssid: u16 },
    /// Foreign senders have their address and perhaps an identifier.
    Foreign { from: SocketAddr, ssid: u16 },
}

/// One session as the responder sees it.
#[derive(Debug, Clone)]
pub(super) struct Session {
    /// Where it sends from.
    pub(super) from: SocketAddr,
    /// What arrived.
    pub(super) received: ReceivedSequences,
    /// Replies so far: the next reply's own sequence number.
    pub(super) replies: u32,
    /// The wall clock's offset under which the last reply that asked for a transmit stamp told its time.
    pub(super) wall: Option<WallOffset>,
    /// When an earlier reply really left, from the kernel.
    pub(super) follow_up: Option<(u32, NtpTime)>,
    /// When the last request came.
    pub(super) seen: Timestamp,
}

/// Sessions by key, at most as many as were allowed; at the limit the one that was silent longest is forgotten, and
/// begins again, with a new `first`, if it comes back.
#[derive(Debug)]
pub(super) struct Sessions {
    limit: usize,
    places: HashMap<SessionKey, u32>,
    entries: Vec<SessionEntry>,
    /// The entry used last, and the one that was not used longest; [`NONE`] when empty.
    newest: u32,
    oldest: u32,
}

#[derive(Debug)]
struct SessionEntry {
    key: SessionKey,
    session: Session,
    newer: u32,
    older: u32,
}

const NONE: u32 = u32::MAX;

impl Sessions {
    /// Room for `limit` sessions, at least one.
    pub(super) fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, NONE as usize);
        Self { limit, places: HashMap::new(), entries: Vec::new(), newest: NONE, oldest: NONE }
    }

    /// The place of a known session, which becomes the newest.
    pub(super) fn find(&mut self, key: &SessionKey) -> Option<u32> {
        let place = *self.places.get(key)?;
        self.unlink(place);
        self.link(place);
        Some(place)
    }

    /// Remembers a session and returns its place.
    pub(super) fn insert(&mut self, key: SessionKey, session: Session) -> u32 {
        let entry = SessionEntry { key, session, newer: NONE, older: NONE };
        let place = if self.entries.len() < self.limit {
            self.entries.push(entry);
            u32::try_from(self.entries.len() - 1).expect("the limit is below 2³²")
        } else {
            let place = self.oldest;
            self.unlink(place);
            self.places.remove(&self.entries[place as usize].key);
            self.entries[place as usize] = entry;
            place
        };
        self.places.insert(key, place);
        self.link(place);
        place
    }

    /// The session at a place.
    pub(super) fn at(&mut self, place: u32) -> Option<&mut Session> {
        self.entries.get_mut(place as usize).map(|entry| &mut entry.session)
    }

    /// Sessions that are remembered.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn link(&mut self, place: u32) {
        self.entries[place as usize].older = self.newest;
        self.entries[place as usize].newer = NONE;
        match self.newest {
            NONE => self.oldest = place,
            newest => self.entries[newest as usize].newer = place,
        }
        self.newest = place;
    }

    fn unlink(&mut self, place: u32) {
        let SessionEntry { newer, older, .. } = self.entries[place as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(session: u32) -> SessionKey {
        SessionKey::Ours { session, ssid: 1 }
    }

    fn session(seconds: u64) -> Session {
        Session {
            from: ([192, 0, 2, 1], 5).into(),
            received: ReceivedSequences::new(0),
            replies: 0,
            wall: None,
            follow_up: None,
            seen: Timestamp::from_nanos(seconds),
        }
    }

    #[test]
    fn at_the_limit_the_one_that_was_silent_longest_is_forgotten() {
        let mut sessions = Sessions::new(3);
        for i in 0..3 {
            sessions.insert(key(i), session(u64::from(i)));
        }
        assert!(sessions.find(&key(0)).is_some());
        sessions.insert(key(3), session(3));
        assert!(sessions.find(&key(1)).is_none());
        for kept in [0, 2, 3] {
            assert!(sessions.find(&key(kept)).is_some(), "{kept}");
        }
        assert_eq!(sessions.len(), 3);
    }

    #[test]
    fn the_order_of_use_agrees_with_a_list() {
        let mut sessions = Sessions::new(5);
        let mut model: Vec<u32> = Vec::new();
        for i in 0..5_000_u64 {
            let id = u32::try_from(crate::schedule::mix(i) % 9).unwrap();
            let found = sessions.find(&key(id)).is_some();
            assert_eq!(found, model.contains(&id), "step {i}");
            model.retain(|known| *known != id);
            model.push(id);
            if !found {
                sessions.insert(key(id), session(i));
                if model.len() > 5 {
                    model.remove(0);
                }
            }
        }
    }
}
