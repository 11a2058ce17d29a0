//! What happened lately, for whoever asks afterwards.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The latest events, the oldest first. Nothing waits for a reader.
#[derive(Debug, Default)]
pub struct Journal {
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    entries: VecDeque<Entry>,
    /// How many there ever were.
    count: u64,
}

/// An event, as `/api/v1/events` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Counts from 1 in each life of the agent.
    pub number: u64,
    /// When it was noticed, in seconds since 1970.
    pub timestamp_seconds: f64,
    /// What it was.
    #[serde(flatten)]
    pub event: Happening,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happening {
    /// The path MTU was found, or is another one. Whole IP packets, in bytes.
    PathMtuChanged {
        /// The probe of the path.
        probe: String,
        /// Its peer or target.
        peer: String,
        /// `ipv4` or `ipv6`.
        family: &'static str,
        /// What it was; `None`: not known.
        from: Option<u16>,
        /// What it is.
        to: u16,
    },
    /// A path could not be started; it is tried again.
    PathNotMeasured {
        /// The probe of the path.
        probe: String,
        /// Its peer or target.
        peer: String,
        /// `ipv4` or `ipv6`.
        family: &'static str,
        /// Why.
        reason: String,
    },
    /// A path has no connection any more, or never had one; it goes on trying.
    ConnectionLost {
        /// The probe of the path.
        probe: String,
        /// Its peer or target.
        peer: String,
        /// `ipv4` or `ipv6`.
        family: &'static str,
        /// Why.
        reason: String,
    },
    /// A peer said that it is leaving.
    PeerLeaving {
        /// Its name.
        peer: String,
        /// Paths towards it.
        paths: usize,
    },
    /// A loop noticed that the wall clock was stepped.
    ClockStepped {
        /// By how much, in seconds; negative is backwards.
        seconds: f64,
    },
    /// A loop noticed that the host was suspended.
    HostSuspended {
        /// For how long, in seconds.
        seconds: f64,
    },
}

/// Events that are remembered; at the limit the oldest is forgotten. Chosen: a bad hour of a hundred paths, in a few hundred
/// kilobytes.
pub const JOURNAL_EVENTS: usize = 1_024;

impl Journal {
    /// Remembers an event that happened just now.
    pub fn note(&self, event: Happening) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.count += 1;
        let entry = Entry { number: pages.count, timestamp_seconds: now.as_secs_f64(), event };
        if pages.entries.len() == JOURNAL_EVENTS {
            pages.entries.pop_front();
        }
        pages.entries.push_back(entry);
    }

    /// The events with a higher number than `number`, of those that are remembered.
    #[must_use]
    pub fn after(&self, number: u64) -> Vec<Entry> {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.entries.iter().filter(|entry| entry.number > number).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten_and_numbers_go_on() {
        let journal = Journal::default();
        let limit = u64::try_from(JOURNAL_EVENTS).unwrap();
        for paths in 0..JOURNAL_EVENTS + 5 {
            journal.note(Happening::PeerLeaving { peer: "ams-1".to_owned(), paths });
        }
        let numbers: Vec<u64> = journal.after(0).iter().map(|entry| entry.number).collect();
        assert_eq!(numbers, (6..=limit + 5).collect::<Vec<u64>>());
        assert_eq!(journal.after(limit + 3).len(), 2);
        assert_eq!(journal.after(limit + 5), []);
    }

    #[test]
    fn an_event_is_flat_json() {
        let event = Happening::PathMtuChanged {
            probe: "fast".to_owned(),
            peer: "ams-1".to_owned(),
            family: "ipv6",
            from: Some(1500),
            to: 1420,
        };
        let shown = serde_json::to_value(Entry { number: 3, timestamp_seconds: 1.5, event }).unwrap();
        let expected = serde_json::json!({
            "number": 3, "timestamp_seconds": 1.5, "event": "path_mtu_changed",
            "probe": "fast", "peer": "ams-1", "family": "ipv6", "from": 1500, "to": 1420,
        });
        assert_eq!(shown, expected);
    }
}
