//! The latest events, for `/api/v1/events`.
//!
//! Each module defines its own event types with [`EventType`]; the log does not depend on them.

mod feed;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;

pub use feed::{EventFeed, FeedItem, FeedLimit};

/// A type of event. Its fields become the fields of the JSON object.
pub trait EventType: Serialize {
    /// The value of `event` in the JSON object.
    const NAME: &'static str;

    /// Number of events of this type that are kept, at the limit the oldest of them is dropped; `None`: as
    /// many as there is room for. What strangers can cause has a limit, and is kept in memory only, so that
    /// it does not displace what was measured.
    const KEPT_MAX: Option<usize> = None;
}

/// The latest events, oldest first. Readers get a copy, so a slow reader does not delay writers.
#[derive(Debug, Default)]
pub struct EventLog {
    entries: Mutex<VecDeque<StoredEvent>>,
    latest: watch::Sender<Latest>,
    /// Number of open feeds, by [source](pathmeter_proto::admission::rate_limit_key).
    feeds: Mutex<BTreeMap<IpAddr, usize>>,
}

/// What feeds wait for.
#[derive(Debug, Clone, Copy, Default)]
struct Latest {
    /// The number of the latest event; 0: none yet.
    number: u64,
    /// Whether feeds end.
    is_closed: bool,
}

/// An event as `/api/v1/events` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredEvent {
    /// Sequence number, from 1.
    pub number: u64,
    /// When the event was recorded, in seconds since 1970 (UTC).
    pub timestamp_seconds: f64,
    /// Its type, [`EventType::NAME`].
    pub event: Cow<'static, str>,
    /// The fields of its type.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
    /// [`EventType::KEPT_MAX`] of its type.
    #[serde(skip)]
    kept_max: Option<usize>,
}

/// Number of events that are kept; at the limit the oldest is dropped. Chosen: covers an hour of frequent
/// events on a hundred paths, in a few hundred kilobytes.
pub const EVENTS_MAX: usize = 1_024;

/// Largest number of an event or trace from a file: the integers that every reader of JSON keeps exactly.
pub const NUMBER_MAX: u64 = 1 << 53;

/// Maximum number of feeds; further ones are refused. Chosen: more than the dashboards and scripts that
/// follow one agent.
pub const FEEDS_MAX: usize = 64;

/// Maximum number of feeds of one source, of which an IPv6 /64 is one. Chosen: a quarter, so that one client
/// does not exclude all others.
pub const FEEDS_PER_SOURCE_MAX: usize = 16;

impl StoredEvent {
    /// Whether it survives a restart of the agent.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        self.kept_max.is_none()
    }
}

impl EventLog {
    /// Adds an event with the current time.
    pub fn add<E: EventType>(&self, event: &E) {
        let Ok(Value::Object(fields)) = serde_json::to_value(event) else {
            unreachable!("an event type is a struct with named fields: {}", E::NAME);
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (timestamp_seconds, event) = (now.as_secs_f64(), E::NAME.into());
        let mut entries = self.lock();
        let number = self.latest() + 1;
        self.push(
            &mut entries,
            StoredEvent { number, timestamp_seconds, event, fields, kept_max: E::KEPT_MAX },
        );
    }

    /// Adds events of earlier runs of the agent, oldest first. Numbers continue after the last one.
    pub fn restore(&self, earlier: Vec<StoredEvent>) {
        let mut entries = self.lock();
        earlier.into_iter().for_each(|entry| self.push(&mut entries, entry));
    }

    /// Adds an event. One that is not newer than the latest, or has an impossible number, is ignored.
    fn push(&self, entries: &mut VecDeque<StoredEvent>, entry: StoredEvent) {
        let number = entry.number;
        if number <= self.latest() || number > NUMBER_MAX {
            return;
        }
        if let Some(kept_max) = entry.kept_max {
            let of_type = entries.iter().filter(|kept| kept.event == entry.event);
            if of_type.count() >= kept_max
                && let Some(oldest) = entries.iter().position(|kept| kept.event == entry.event)
            {
                entries.remove(oldest);
            }
        }
        if entries.len() == EVENTS_MAX {
            entries.pop_front();
        }
        entries.push_back(entry);
        self.latest.send_modify(|latest| latest.number = number);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<StoredEvent>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the latest event; 0: none yet.
    #[must_use]
    pub fn latest(&self) -> u64 {
        self.latest.borrow().number
    }

    /// Ends all feeds, after the events so far.
    pub fn close(&self) {
        self.latest.send_modify(|latest| latest.is_closed = true);
    }

    /// The kept events with a sequence number above `number`, oldest first.
    #[must_use]
    pub fn after(&self, number: u64) -> Vec<StoredEvent> {
        self.lock().iter().filter(|entry| entry.number > number).cloned().collect()
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

    #[derive(Serialize)]
    struct Caused {}

    impl EventType for Caused {
        const NAME: &'static str = "caused";
        const KEPT_MAX: Option<usize> = Some(3);
    }

    #[test]
    fn events_with_a_limit_displace_no_others() {
        let log = EventLog::default();
        log.add(&Sampled { peer: "ams-1", bytes: 1 });
        (0..2 * EVENTS_MAX).for_each(|_| log.add(&Caused {}));
        log.add(&Sampled { peer: "ams-1", bytes: 2 });
        let kept: Vec<_> = log.after(0).iter().map(|entry| (entry.number, entry.is_lasting())).collect();
        let last = 2 * u64::try_from(EVENTS_MAX).unwrap() + 2;
        assert_eq!(kept, [(1, true), (last - 3, false), (last - 2, false), (last - 1, false), (last, true)]);
    }

    #[test]
    fn numbers_continue_after_restored_events() {
        let earlier = EventLog::default();
        (0..3).for_each(|bytes| earlier.add(&Sampled { peer: "ams-1", bytes }));
        let log = EventLog::default();
        let stored = serde_json::to_string(&earlier.after(1)).unwrap();
        log.restore(serde_json::from_str(&stored).unwrap());
        log.restore(earlier.after(0));
        log.add(&Sampled { peer: "ams-1", bytes: 9 });
        assert_eq!(log.after(0)[..2], earlier.after(1), "no event twice");
        assert_eq!((log.after(3)[0].number, log.latest()), (4, 4));
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
