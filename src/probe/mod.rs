//! The interface between the daemon and the kinds of probes.
//!
//! The daemon plans, starts, shows and stops paths without knowledge of what they measure. A kind implements
//! these traits and is listed in `fleet::kinds`; `docs/how-to/add-a-kind.md` describes the steps.

mod followed;
mod own_flow;
mod remote;

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pathmeter_proto::probe_budget::ProbeBudget;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{ProbeProtocol, Route};
use serde_json::{Map, Value};

pub use self::followed::Followed;
pub use self::own_flow::OwnFlowPermission;
pub use self::remote::{HttpResource, Remote};
use crate::bulk::Bulk;
use crate::config::Probe;
use crate::datagram;
use crate::metrics::AnySeries;
use crate::paths::{PathId, PathKey};
use crate::quoted_headers::QuotedHeaders;
use crate::settings::Settings;
use crate::stream;
use crate::trace_log::TraceLog;

/// A configured kind of probe.
pub trait ProbeKind {
    /// Plans one path of `probe` to an address of `remote`.
    fn plan(&self, probe: &Probe, remote: &Remote<'_>, address: IpAddr, settings: &Settings)
    -> Box<dyn Plan>;

    /// The metrics of the configured probe itself.
    fn probe_series(&self, probe: &Probe) -> Vec<Arc<dyn AnySeries>>;

    /// Groups of paths, for `metrics.level: group`; `None`: paths of this kind always have series of their
    /// own.
    fn groups(&self) -> Option<Box<dyn Groups>>;
}

/// The plan of one path: its destination and parameters.
pub trait Plan: fmt::Debug + Send + Sync {
    /// The destination.
    fn to(&self) -> SocketAddr;

    /// Whether a path that runs with the plan `other` can continue with this plan, after
    /// [`adjust`](Path::adjust).
    fn can_continue(&self, other: &dyn Plan) -> bool;

    /// Starts the path. `earlier` is the path of the same key that was just stopped; its counters continue.
    fn start(self: Box<Self>, start: &StartContext<'_>, earlier: Option<Box<dyn Path>>) -> Box<dyn Path>;

    /// Returns itself, to be downcast and compared with another plan of its kind.
    fn as_any(&self) -> &dyn Any;
}

/// The parameters with which a path is started.
#[derive(Debug)]
pub struct StartContext<'a> {
    /// The identifier of the path.
    pub id: PathId,
    /// The key of the path.
    pub key: &'a PathKey,
    /// The current settings, for keys and certificates.
    pub settings: &'a Settings,
    /// The measuring threads.
    pub loops: &'a Loops,
    /// The time of the last goodbye of the peer, if it may still be away.
    pub peer_left_at: Option<Timestamp>,
    /// The seed of phase, jitter and session numbers.
    pub seed: u64,
    /// Connects the path with the one that follows it, or with the one that it follows.
    pub followed: Arc<Followed>,
}

/// A running path.
pub trait Path: fmt::Debug + Send + Sync {
    /// The plan of the path.
    fn plan(&self) -> &dyn Plan;

    /// Applies a plan with which the path [can continue](Plan::can_continue).
    fn adjust(&mut self, plan: Box<dyn Plan>, start: &StartContext<'_>);

    /// Handles that the path has started, or has connected again. `sources` has the local address of each
    /// flow.
    fn started(&self, _sources: &[SocketAddr]) {}

    /// Stops the path.
    fn stop(&self, loops: &Loops);

    /// The metrics of the path.
    fn series(&self) -> Vec<Arc<dyn AnySeries>>;

    /// The results of the path.
    fn measured(&self) -> Arc<dyn Measured>;

    /// The maximum time between two replies on this path if the peer is up; `None`: the path does not show
    /// whether it is.
    fn reply_interval_max(&self) -> Option<Duration>;

    /// Returns itself, to be downcast to the type of its kind.
    fn as_any(&self) -> &dyn Any;

    /// Like [`as_any`](Self::as_any), by value.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// The results of a path, for the API and the demo.
pub trait Measured: fmt::Debug + Send + Sync {
    /// The time of the last reply in nanoseconds since 1970; 0: none yet.
    fn last_reply(&self) -> u64;

    /// Whether the peer announced that it is leaving and has not replied since.
    fn is_draining(&self) -> bool;

    /// Why nothing could be sent; `None` if something was sent.
    fn local_failure(&self) -> Option<String>;

    /// The fields of the path at `/api/v1/paths` that are specific to its kind.
    fn json(&self) -> Map<String, Value>;

    /// The current routes of each flow; empty if the path is not traced.
    fn routes(&self) -> Vec<FlowRoutes> {
        Vec::new()
    }

    /// A row for the table of the demo.
    fn row(&self) -> TableRow;
}

/// The current routes of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowRoutes {
    /// The protocol of the probes.
    pub protocol: ProbeProtocol,
    /// The route to the peer; `None` if it is not known.
    pub forward: Option<Route>,
    /// The route back; `None` if it is not known.
    pub reverse: Option<Route>,
}

/// A row of a table of paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRow {
    /// The headings of the columns. Rows with the same headings form one table.
    pub head: &'static str,
    /// The columns.
    pub cells: String,
}

/// The groups of the paths of one kind, with their sums.
pub trait Groups: fmt::Debug + Send + Sync {
    /// Assigns each path of the kind to the group of its peer or target, which `group_of` returns.
    fn arrange(&mut self, group_of: &dyn Fn(&str) -> String, paths: &[(&PathKey, &dyn Path)]);

    /// Ranks the paths by their results since the last call. Called every 30 s.
    fn refresh(&mut self);

    /// All paths of the kind, and the worst `count` of them.
    fn worst(&self, count: usize) -> (BTreeSet<PathKey>, BTreeSet<PathKey>);

    /// The metrics of the groups.
    fn series(&self) -> Vec<Arc<dyn AnySeries>>;
}

/// The measuring threads.
#[derive(Debug)]
pub struct Loops {
    /// Measures with datagrams.
    pub prober: datagram::DatagramHandle,
    /// Measures over connections.
    pub streams: stream::StreamHandle,
    /// The limits of all probes whose TTL ends at a router.
    pub probe_budget: Arc<Mutex<ProbeBudget>>,
    /// The latest traces.
    pub traces: Arc<TraceLog>,
    /// What routers quote of the probes of traces; empty unless `trace.quoted_headers` is set.
    pub quoted_headers: Arc<QuotedHeaders>,
    /// Whether connections may be traced with segments.
    pub own_flow: OwnFlowPermission,
    /// The thread for bulk connections, and the leases of this host.
    pub bulk: Bulk,
}

impl Loops {
    /// Informs the paths that their peer announced at `at` that it is leaving.
    pub fn peer_leaving(&self, ids: &[PathId], at: Timestamp) {
        // Each thread ignores identifiers of the other.
        self.streams.peer_leaving(ids.to_vec(), at);
        self.prober.peer_leaving(ids.to_vec(), at);
    }

    /// Stops sending, waits at most `grace` for pending verdicts, and ends the threads.
    pub fn stop(&self, grace: Duration) {
        self.prober.stop(grace);
        self.streams.stop(grace);
    }

    /// Whether the threads have ended.
    #[must_use]
    pub fn are_finished(&self) -> bool {
        self.prober.is_finished() && self.streams.is_finished()
    }
}
