//! The latest traces of all paths, for `/api/v1/traces`.

mod record;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use pathmeter_proto::trace::{Direction, Trace};
use serde::{Deserialize, Serialize};

use crate::event_log::NUMBER_MAX;
use crate::paths::PathKey;
pub use record::{
    HopRecord, InterfaceRecord, LabelRecord, QuotedRecord, RejectionRecord, ResponderRecord, RttRecord,
    TraceRecord,
};

/// The latest traces, oldest first. Readers get references, so a slow reader does not delay a loop.
#[derive(Debug, Default)]
pub struct TraceLog {
    entries: Mutex<StoredTraces>,
}

#[derive(Debug, Default)]
struct StoredTraces {
    latest: VecDeque<Arc<StoredTrace>>,
    /// The number of the latest trace.
    count: u64,
}

/// A trace and the path to which it belongs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredTrace {
    /// Sequence number, from 1.
    pub number: u64,
    /// When it was complete, in seconds since 1970 (UTC).
    pub timestamp_seconds: f64,
    /// The name of the probe.
    pub probe: String,
    /// The name of the peer or target.
    pub peer: String,
    /// The address family.
    pub family: Cow<'static, str>,
    /// The direction, [`Direction::as_str`].
    pub direction: Cow<'static, str>,
    /// The flow.
    pub flow: u8,
    /// Why it was made, [`Trigger::as_str`](pathmeter_proto::trace::Trigger::as_str).
    pub trigger: Cow<'static, str>,
    /// The route of the flow; `None` if it is not known.
    pub route: Option<String>,
    /// The trace.
    #[serde(flatten)]
    pub trace: TraceRecord,
}

/// Number of traces that are kept; at the limit the oldest is dropped. Chosen: an hour of frequent changes,
/// in at most a megabyte with twelve hops each.
pub const TRACES_MAX: usize = 512;

impl TraceLog {
    /// Adds a trace with the current time. `quoted` is what a router has quoted of its probes.
    pub fn add(
        &self,
        path: &PathKey,
        direction: Direction,
        trace: &Trace,
        quoted: impl Fn(IpAddr) -> Option<QuotedRecord>,
    ) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut stored = StoredTrace {
            number: 0,
            timestamp_seconds: now.as_secs_f64(),
            probe: path.probe.to_string(),
            peer: path.peer.to_string(),
            family: path.family.into(),
            direction: direction.as_str().into(),
            flow: trace.flow,
            trigger: trace.trigger.as_str().into(),
            route: trace.route.map(|route| route.to_string()),
            trace: TraceRecord::from(trace).with_quoted(quoted),
        };
        let mut entries = self.lock();
        stored.number = entries.count + 1;
        entries.push(stored);
    }

    /// Adds traces of earlier runs of the agent, oldest first. Numbers continue after the last one.
    pub fn restore(&self, earlier: Vec<StoredTrace>) {
        let mut entries = self.lock();
        earlier.into_iter().for_each(|stored| entries.push(stored));
    }

    /// The kept traces with a number above `number`, oldest first.
    #[must_use]
    pub fn after(&self, number: u64) -> Vec<Arc<StoredTrace>> {
        self.lock().latest.iter().filter(|stored| stored.number > number).cloned().collect()
    }

    /// The number of the latest trace; 0: none yet.
    #[must_use]
    pub fn latest(&self) -> u64 {
        self.lock().count
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

impl StoredTraces {
    /// Adds a trace. One that is not newer than the latest is ignored.
    fn push(&mut self, stored: StoredTrace) {
        if stored.number <= self.count || stored.number > NUMBER_MAX {
            return;
        }
        self.count = stored.number;
        if self.latest.len() == TRACES_MAX {
            self.latest.pop_front();
        }
        self.latest.push_back(Arc::new(stored));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pathmeter_proto::time::Timestamp;
    use pathmeter_proto::trace::Trigger;

    use super::*;

    #[test]
    fn trace_that_was_stored_without_a_field_of_later_versions_is_read() {
        let line = r#"{"number":7,"timestamp_seconds":1.5,"probe":"routes","peer":"ams-1","family":"ipv4",
            "direction":"forward","flow":0,"trigger":"start","route":null,"reached":true,"routers":0,
            "duration_seconds":0.01,"rtt_seconds":0.01,"first_lossy_hop":null,"hops":[]}"#;
        let stored: StoredTrace = serde_json::from_str(line).unwrap();
        let trace = &stored.trace;
        assert_eq!((stored.number, trace.ttl_clamped, &trace.rejected), (7, false, &None));
    }

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
                is_ttl_clamped: false,
                rejection: None,
            };
            log.add(&path, Direction::Forward, &trace, |_| None);
        }
        let limit = u64::try_from(TRACES_MAX).unwrap();
        let numbers: Vec<u64> = log.after(0).iter().map(|stored| stored.number).collect();
        assert_eq!(numbers, (6..=limit + 5).collect::<Vec<u64>>());
        let found = |number| log.find(number).map(|stored| (stored.number, stored.flow));
        assert_eq!([found(5), found(6), found(limit + 6)], [None, Some((6, 5)), None]);
    }
}
