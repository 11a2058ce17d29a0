//! The latest traces of all paths, for `/api/v1/traces`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use pathmeter_proto::trace::{Direction, Trace};

use crate::paths::PathKey;

/// The latest traces, oldest first. Readers get references, so a slow reader does not delay a loop.
#[derive(Debug, Default)]
pub struct TraceLog {
    entries: Mutex<StoredTraces>,
}

#[derive(Debug, Default)]
struct StoredTraces {
    latest: VecDeque<Arc<StoredTrace>>,
    /// Number of traces since the start of the agent.
    count: u64,
}

/// A trace and the path to which it belongs.
#[derive(Debug)]
pub struct StoredTrace {
    /// Sequence number, from 1 at the start of the agent.
    pub number: u64,
    /// When it was complete, in seconds since 1970 (UTC).
    pub timestamp_seconds: f64,
    /// The path.
    pub path: PathKey,
    /// The direction.
    pub direction: Direction,
    /// The trace.
    pub trace: Trace,
}

/// Number of traces that are kept; at the limit the oldest is dropped. Chosen: an hour of frequent changes,
/// in at most a megabyte with twelve hops each.
pub const TRACES_MAX: usize = 512;

impl TraceLog {
    /// Adds a trace with the current time.
    pub fn add(&self, path: &PathKey, direction: Direction, trace: Trace) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut entries = self.lock();
        entries.count += 1;
        let number = entries.count;
        let (path, timestamp_seconds) = (path.clone(), now.as_secs_f64());
        if entries.latest.len() == TRACES_MAX {
            entries.latest.pop_front();
        }
        entries.latest.push_back(Arc::new(StoredTrace { number, timestamp_seconds, path, direction, trace }));
    }

    /// The kept traces, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<StoredTrace>> {
        self.lock().latest.iter().cloned().collect()
    }

    /// The trace with this number; `None` if it is no longer kept, or does not exist.
    #[must_use]
    pub fn find(&self, number: u64) -> Option<Arc<StoredTrace>> {
        let entries = self.lock();
        let index = entries.latest.binary_search_by_key(&number, |stored| stored.number).ok()?;
        entries.latest.get(index).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, StoredTraces> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pathmeter_proto::time::Timestamp;
    use pathmeter_proto::trace::Trigger;

    use super::*;

    #[test]
    fn oldest_trace_is_dropped_and_numbers_continue() {
        let log = TraceLog::default();
        let path = PathKey { probe: "routes".into(), peer: "ams-1".into(), family: "ipv4" };
        for flow in 0..TRACES_MAX + 5 {
            let trace = Trace {
                flow: u8::try_from(flow % 16).unwrap(),
                trigger: Trigger::Start,
                began: Timestamp::from_nanos(0),
                duration: Duration::ZERO,
                is_burst: true,
                rtt: None,
                routers: None,
                hops: Vec::new(),
                route: None,
                first_lossy_hop: None,
            };
            log.add(&path, Direction::Forward, trace);
        }
        let limit = u64::try_from(TRACES_MAX).unwrap();
        let numbers: Vec<u64> = log.all().iter().map(|stored| stored.number).collect();
        assert_eq!(numbers, (6..=limit + 5).collect::<Vec<u64>>());
        let found = |number| log.find(number).map(|stored| (stored.number, stored.trace.flow));
        assert_eq!([found(5), found(6), found(limit + 6)], [None, Some((6, 5)), None]);
    }
}
