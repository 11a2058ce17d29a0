//! Series of traced paths.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pathmeter_proto::probe_budget::Deferral;
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::trace::{Direction, HopState, Route, RouteUpdate, Trace, TraceReport};

use super::block::Series;
use super::distribution::{Buckets, RTT_BOUNDS};
use super::labels::{Labelled, labels};
use super::text::{CLOSE, Cell, Family, Suffix, Writer, counter, gauge, histogram, label};

/// Traces of one path in one direction. Written by the loop that owns the path, read by scrapes. Their number
/// does not depend on the number of hops.
#[derive(Debug, Default)]
pub struct TraceSeries {
    labels: String,
    /// Probes that left the host.
    pub sent: Cell,
    /// Probes that were answered.
    pub answered: Cell,
    /// Probes that were not answered.
    pub unanswered: Cell,
    /// Probes without an outcome.
    pub withdrawn: Cell,
    deferred: Labelled<Deferral, 2>,
    unmatched: Cell,
    send_errors: Cell,
    own_flow: Cell,
    traces: Labelled<TraceResult, 3>,
    durations: Buckets<{ RTT_BOUNDS.len() + 1 }>,
    changes: Labelled<RouteChange, 2>,
    /// In nanoseconds since 1970; 0: none yet.
    changed_at: Cell,
    /// In nanoseconds since 1970; 0: none yet.
    last_reply: Cell,
    flows: Mutex<Vec<TracedFlow>>,
}

/// The latest results of a flow.
#[derive(Debug, Default, Clone)]
pub struct TracedFlow {
    /// The latest trace.
    pub trace: Option<Box<Trace>>,
    /// The current route.
    pub route: Option<Route>,
    /// Since when the destination has not answered, as was reported; `None`: it answers, or nothing was
    /// reported.
    pub missed_since: Option<Timestamp>,
}

/// How a trace ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TraceResult {
    /// The destination and all hops answered.
    Complete,
    /// The destination answered, and some hops did not.
    Partial,
    /// The destination did not answer.
    Unreached,
}

labels!(TraceResult, "result", {
    Complete => "complete",
    Partial => "partial",
    Unreached => "unreached",
});

labels!(Deferral, "reason", { Router => "router", Agent => "agent" });

/// How a route has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RouteChange {
    Changed,
    Restored,
}

labels!(RouteChange, "kind", { Changed => "changed", Restored => "restored" });

/// The labels of a traced path in one direction.
pub(super) fn path_labels(probe: &str, peer: &str, family: &str, direction: Direction) -> String {
    let labels = [
        label("probe", probe),
        label("peer", peer),
        label("family", family),
        label("direction", direction.as_str()),
    ];
    labels.join(",")
}

/// Values of `own_flow` if traces on the connection of the echoes are configured; 0: they are not.
const OTHER_PORTS: u64 = 1;
const OWN_FLOW: u64 = 2;

impl TraceSeries {
    /// Returns the series of one path in one direction, all zero.
    #[must_use]
    pub fn new(probe: &str, peer: &str, family: &str, direction: Direction) -> Self {
        Self { labels: path_labels(probe, peer, family, direction), ..Self::default() }
    }

    /// Counts what a report says. `now` is the wall clock in nanoseconds since 1970.
    pub fn record(&self, report: &TraceReport, now: u64) {
        match report {
            TraceReport::Sent { .. } => self.sent.inc(),
            TraceReport::Answered { .. } => self.answered.inc(),
            TraceReport::Unanswered { .. } => self.unanswered.inc(),
            TraceReport::Withdrawn => self.withdrawn.inc(),
            TraceReport::SendError(_) => self.send_errors.inc(),
            TraceReport::Deferred(reason) => self.deferred.of(*reason).inc(),
            TraceReport::Unmatched => self.unmatched.inc(),
            TraceReport::Traced(trace) => self.traced(trace, now),
            TraceReport::Route { update, .. } => self.route_updated(update, now),
            TraceReport::Reachability(change) => {
                let missed_since = Some(change.since).filter(|_| change.lasted.is_none());
                self.flow(change.flow, |flow| flow.missed_since = missed_since);
            }
            TraceReport::Rejected { .. } | TraceReport::LossyFlow { .. } | TraceReport::TtlClamped { .. } => {
            }
        }
    }

    /// Sets whether probes over TCP are sent on the connection of the echoes; `None`: that is not configured.
    pub fn set_own_flow(&self, is_on_own_flow: Option<bool>) {
        self.own_flow.set(match is_on_own_flow {
            None => 0,
            Some(false) => OTHER_PORTS,
            Some(true) => OWN_FLOW,
        });
    }

    fn traced(&self, trace: &Trace, now: u64) {
        let is_answered = |hop: &pathmeter_proto::trace::Hop| !hop.answers.is_empty();
        let result = match trace.rtt {
            None => TraceResult::Unreached,
            Some(_) if trace.hops.iter().all(is_answered) => TraceResult::Complete,
            Some(_) => TraceResult::Partial,
        };
        self.traces.of(result).inc();
        if trace.is_burst {
            self.durations.add(&RTT_BOUNDS, nanos(trace.duration));
        }
        if trace.rtt.is_some() {
            self.last_reply.set(now);
        }
        self.flow(trace.flow, |flow| flow.trace = Some(Box::new(trace.clone())));
    }

    fn route_updated(&self, update: &RouteUpdate, now: u64) {
        let kind = match update {
            RouteUpdate::Changed { .. } => RouteChange::Changed,
            RouteUpdate::Restored { .. } => RouteChange::Restored,
            RouteUpdate::LoadBalanced { .. } => return,
        };
        self.changes.of(kind).inc();
        self.changed_at.set(now);
    }

    /// Sets the current routes of the flows.
    pub fn set_routes<'a>(&self, routes: impl Iterator<Item = Option<&'a Route>>) {
        for (flow, route) in (0..).zip(routes) {
            self.flow(flow, |flow| flow.route = route.cloned());
        }
    }

    fn flow(&self, index: u8, change: impl FnOnce(&mut TracedFlow)) {
        let mut flows = self.lock();
        let index = usize::from(index);
        if flows.len() <= index {
            flows.resize_with(index + 1, TracedFlow::default);
        }
        change(&mut flows[index]);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<TracedFlow>> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Probes without an outcome so far.
    #[must_use]
    pub fn in_flight(&self) -> Option<u64> {
        let decided = self.answered.get() + self.unanswered.get() + self.withdrawn.get();
        self.sent.get().checked_sub(decided)
    }

    /// The latest results of all flows.
    #[must_use]
    pub fn flows(&self) -> Vec<TracedFlow> {
        self.lock().clone()
    }

    /// Time of the last trace that reached the destination, in nanoseconds since 1970; 0: none yet.
    #[must_use]
    pub fn last_reply(&self) -> u64 {
        self.last_reply.get()
    }

    /// A value of the first flow.
    fn of_first<T>(&self, value: impl FnOnce(&TracedFlow) -> Option<T>) -> Option<T> {
        self.lock().first().and_then(value)
    }

    /// A value of the first flow's latest trace.
    fn first_trace<T>(&self, value: impl FnOnce(&Trace) -> Option<T>) -> Option<T> {
        self.of_first(|flow| value(flow.trace.as_deref()?))
    }
}

impl Series for TraceSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 20 + RTT_BOUNDS.len() + 3;
}

/// In alphabetical order.
const FAMILIES: [Family<TraceSeries>; 17] = [
    counter(
        "pathmeter_trace_answers_total",
        "Trace probes that a router or the peer answered.",
        |w, name, s| {
            w.count(name, Suffix::None, &s.labels, CLOSE, s.answered.get());
        },
    ),
    counter(
        "pathmeter_trace_deferred_total",
        "Trace probes sent later because their router, or the agent as a whole, had been probed too recently.",
        |w, name, s| s.deferred.write(w, name, &s.labels),
    ),
    histogram(
        "pathmeter_trace_duration_seconds",
        "Time from the first probe to the last answer, of traces whose probes are sent at once.",
        |w, name, s| s.durations.write(w, name, &s.labels, &RTT_BOUNDS, Writer::seconds),
    ),
    gauge(
        "pathmeter_trace_first_lossy_hop",
        "TTL from which on probes are lost up to the peer, flow 0. 0 if no packets are lost.",
        |w, name, s| {
            let hop = s.first_trace(|trace| trace.first_lossy_hop).unwrap_or(0);
            w.count(name, Suffix::None, &s.labels, CLOSE, hop.into());
        },
    ),
    gauge(
        "pathmeter_trace_own_flow",
        "1 if probes are sent on the connection of the echoes, 0 if they have other ports. Absent unless method is own_flow.",
        |w, name, s| {
            if let is_on_own_flow @ (OWN_FLOW | OTHER_PORTS) = s.own_flow.get() {
                w.count(name, Suffix::None, &s.labels, CLOSE, (is_on_own_flow == OWN_FLOW).into());
            }
        },
    ),
    counter("pathmeter_trace_probes_total", "Trace probes sent.", |w, name, s| {
        w.count(name, Suffix::None, &s.labels, CLOSE, s.sent.get());
    }),
    gauge(
        "pathmeter_trace_rate_limited_hops",
        "Hops of flow 0 whose router answers only some probes although packets pass it.",
        |w, name, s| {
            let is_limited = |trace: &Trace| {
                let hops = trace.hops.iter().filter(|hop| hop.state == HopState::RateLimited);
                u64::try_from(hops.count()).ok()
            };
            w.count(name, Suffix::None, &s.labels, CLOSE, s.first_trace(is_limited).unwrap_or(0));
        },
    ),
    gauge(
        "pathmeter_trace_reached",
        "1 if the peer answered the latest trace of flow 0, else 0. In reverse direction also 0 if the peer cannot trace.",
        |w, name, s| {
            let is_reached = s.first_trace(|trace| trace.rtt).is_some();
            w.count(name, Suffix::None, &s.labels, CLOSE, is_reached.into());
        },
    ),
    counter(
        "pathmeter_trace_route_changes_total",
        "Confirmed changes of the route of any flow: to a new route, or back to an earlier one.",
        |w, name, s| s.changes.write(w, name, &s.labels),
    ),
    gauge(
        "pathmeter_trace_route_id",
        "Number of the current route of flow 0. It changes with the route only. Absent until known.",
        |w, name, s| {
            if let Some(id) = s.of_first(|flow| Some(flow.route.as_ref()?.id.get())) {
                w.count(name, Suffix::None, &s.labels, CLOSE, id);
            }
        },
    ),
    gauge(
        "pathmeter_trace_route_last_change_timestamp_seconds",
        "Time of the last change of a route. Absent if there was none.",
        |w, name, s| {
            if s.changed_at.get() > 0 {
                w.seconds(name, Suffix::None, &s.labels, CLOSE, s.changed_at.get());
            }
        },
    ),
    gauge(
        "pathmeter_trace_routers",
        "Routers on the way to the peer (direction forward) or back (reverse), flow 0. Absent until known.",
        |w, name, s| {
            if let Some(routers) = s.first_trace(|trace| trace.routers) {
                w.count(name, Suffix::None, &s.labels, CLOSE, routers.into());
            }
        },
    ),
    counter(
        "pathmeter_trace_send_errors_total",
        "Trace probes that this host could not send.",
        |w, name, s| {
            w.count(name, Suffix::None, &s.labels, CLOSE, s.send_errors.get());
        },
    ),
    counter("pathmeter_trace_traces_total", "Traces by result.", |w, name, s| {
        s.traces.write(w, name, &s.labels);
    }),
    gauge(
        "pathmeter_trace_ttl_clamped",
        "1 if a device rewrites TTLs on the way of any flow, so that its routers cannot be measured, else 0.",
        |w, name, s| {
            let is_clamped =
                |flow: &TracedFlow| flow.trace.as_ref().is_some_and(|trace| trace.is_ttl_clamped);
            let is_any = s.lock().iter().any(is_clamped);
            w.count(name, Suffix::None, &s.labels, CLOSE, is_any.into());
        },
    ),
    counter(
        "pathmeter_trace_unanswered_total",
        "Trace probes that were not answered. Not a sign of loss: routers may answer few probes or none.",
        |w, name, s| w.count(name, Suffix::None, &s.labels, CLOSE, s.unanswered.get()),
    ),
    counter(
        "pathmeter_trace_unmatched_total",
        "Received ICMP errors and replies that belong to no trace probe.",
        |w, name, s| w.count(name, Suffix::None, &s.labels, CLOSE, s.unmatched.get()),
    ),
];
