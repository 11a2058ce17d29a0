//! The responder's session table.

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::stats::ReceivedSequences;
use crate::time::{Timestamp, WallOffset};
use crate::wire::NtpTime;

/// Key of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SessionKey {
    /// Probers of this project choose 32 random bits, which identify the session whatever its address.
    Id { session: u32, ssid: u16 },
    /// Other senders are identified by their address and session identifier.
    Address { from: SocketAddr, ssid: u16 },
}

/// State of one session.
#[derive(Debug, Clone)]
pub(super) struct Session {
    /// The sender's address.
    pub(super) from: SocketAddr,
    /// Record of the received sequence numbers.
    pub(super) received: ReceivedSequences,
    /// Number of replies so far, which is the sequence number of the next reply.
    pub(super) replies: u32,
    /// Wall-clock offset used in the last reply that requested a transmit timestamp.
    pub(super) wall: Option<WallOffset>,
    /// Sequence number and kernel transmit timestamp of an earlier reply.
    pub(super) follow_up: Option<(u32, NtpTime)>,
    /// Arrival of the last request.
    pub(super) seen: Timestamp,
}

/// Sessions by key, up to a limit. At the limit, the session that has been silent longest is evicted; if it
/// comes back, it begins again with a new `first`.
#[derive(Debug)]
pub(super) struct Sessions {
    limit: usize,
    indexes: HashMap<SessionKey, u32>,
    entries: Vec<SessionEntry>,
    /// Indexes of the most and the least recently used entries; [`NONE`] if the table is empty.
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
    /// A table for `limit` sessions, at least one.
    pub(super) fn new(limit: usize) -> Self {
        let limit = limit.clamp(1, NONE as usize);
        Self { limit, indexes: HashMap::new(), entries: Vec::new(), newest: NONE, oldest: NONE }
    }

    /// Index of a known session, which becomes the most recently used.
    pub(super) fn find(&mut self, key: &SessionKey) -> Option<u32> {
        let index = *self.indexes.get(key)?;
        self.unlink(index);
        self.link(index);
        Some(index)
    }

    /// Adds a session and returns its index.
    pub(super) fn insert(&mut self, key: SessionKey, session: Session) -> u32 {
        let entry = SessionEntry { key, session, newer: NONE, older: NONE };
        let index = if self.entries.len() < self.limit {
            self.entries.push(entry);
            u32::try_from(self.entries.len() - 1).expect("the limit is below 2³²")
        } else {
            let index = self.oldest;
            self.unlink(index);
            self.indexes.remove(&self.entries[index as usize].key);
            self.entries[index as usize] = entry;
            index
        };
        self.indexes.insert(key, index);
        self.link(index);
        index
    }

    /// The session at an index.
    pub(super) fn at(&mut self, index: u32) -> Option<&mut Session> {
        self.entries.get_mut(index as usize).map(|entry| &mut entry.session)
    }

    /// The key of the session at an index.
    pub(super) fn key(&self, index: u32) -> Option<SessionKey> {
        self.entries.get(index as usize).map(|entry| entry.key)
    }

    /// Number of sessions.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn link(&mut self, index: u32) {
        self.entries[index as usize].older = self.newest;
        self.entries[index as usize].newer = NONE;
        match self.newest {
            NONE => self.oldest = index,
            newest => self.entries[newest as usize].newer = index,
        }
        self.newest = index;
    }

    fn unlink(&mut self, index: u32) {
        let SessionEntry { newer, older, .. } = self.entries[index as usize];
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
        SessionKey::Id { session, ssid: 1 }
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
    fn least_recently_used_session_is_evicted_at_the_limit() {
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
    fn order_of_use_agrees_with_a_list() {
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
