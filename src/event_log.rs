//! The latest events, for `/api/v1/events`.
//!
//! Whoever has something to report brings its own type of event; the log knows none of them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};

/// A type of event. Its fields are the fields of the JSON object.
pub trait EventType: Serialize {
    /// The value of `event` in the JSON object.
    const NAME: &'static str;
}

/// The latest events, oldest first. A slow reader delays nothing.
#[derive(Debug, Default)]
pub struct EventLog {
    entries: Mutex<StoredEvents>,
}

#[derive(Debug, Default)]
struct StoredEvents {
    latest: VecDeque<StoredEvent>,
    /// Events since the start of the agent.
    count: u64,
}

/// An event as `/api/v1/events` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StoredEvent {
    /// Counts from 1 since the start of the agent.
    pub number: u64,
    /// When it was noticed, in seconds since 1970.
    pub timestamp_seconds: f64,
    /// Its type.
    pub event: &'static str,
    /// What its type has to say.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}

/// Events that are kept; at the limit the oldest is dropped. Chosen: a bad hour of a hundred paths, in a few hundred
/// kilobytes.
pub const EVENTS_MAX: usize = 1_024;

impl EventLog {
    /// Adds an event that happened just now.
    pub fn add<E: EventType>(&self, event: &E) {
        let Ok(Value::Object(fields)) = serde_json::to_value(event) else {
            unreachable!("an event type is a struct with named fields: {}", E::NAME);
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.count += 1;
        let entry = StoredEvent {
            number: entries.count,
            timestamp_seconds: now.as_secs_f64(),
            event: E::NAME,
            fields,
        };
        if entries.latest.len() == EVENTS_MAX {
            entries.latest.pop_front();
        }
        entries.latest.push_back(entry);
    }

    /// The events with a higher number than `number`, of those that are kept.
    #[must_use]
    pub fn after(&self, number: u64) -> Vec<StoredEvent> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.latest.iter().filter(|entry| entry.number > number).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Sampled {
        peer: &'static str,
        bytes: usize,
    }

    impl EventType for Sampled {
        const NAME: &'static str = "sampled";
    }

    #[test]
    fn oldest_event_is_dropped_and_numbers_continue() {
        let log = EventLog::default();
        let limit = u64::try_from(EVENTS_MAX).unwrap();
        for bytes in 0..EVENTS_MAX + 5 {
            log.add(&Sampled { peer: "ams-1", bytes });
        }
        let numbers: Vec<u64> = log.after(0).iter().map(|entry| entry.number).collect();
        assert_eq!(numbers, (6..=limit + 5).collect::<Vec<u64>>());
        assert_eq!(log.after(limit + 3).len(), 2);
        assert_eq!(log.after(limit + 5), []);
    }

    #[test]
    fn event_is_one_flat_object() {
        let log = EventLog::default();
        log.add(&Sampled { peer: "ams-1", bytes: 1420 });
        let mut shown = serde_json::to_value(&log.after(0)[0]).unwrap();
        shown["timestamp_seconds"] = 1.5.into();
        let expected = serde_json::json!({
            "number": 1, "timestamp_seconds": 1.5, "event": "sampled", "peer": "ams-1", "bytes": 1420,
        });
        assert_eq!(shown, expected);
    }
}
