//! What a kind of probe is to the rest of the daemon.
//!
//! The daemon plans, starts, shows and stops paths without knowing what they measure. A kind implements these traits, and is
//! named once where kinds are listed (`fleet::kinds`); `docs/how-to/add-a-kind.md` has the way from there.

mod remote;

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::time::Timestamp;
use serde_json::{Map, Value};

pub use self::remote::{HttpResource, Remote};
use crate::config::Probe;
use crate::datagram;
use crate::metrics::AnySeries;
use crate::paths::{PathId, PathKey};
use crate::settings::Settings;
use crate::stream;

/// A kind of probe, as it is configured.
pub trait ProbeKind {
    /// How one path of `probe` is to be measured, towards an address of `remote`.
    fn plan(&self, probe: &Probe, remote: &Remote<'_>, address: IpAddr, settings: &Settings)
    -> Box<dyn Plan>;

    /// Metrics of the configured probe itself.
    fn probe_series(&self, probe: &Probe) -> Vec<Arc<dyn AnySeries>>;

    /// Sums over the paths of a group, for `metrics.level: group`; `None`: its paths are always exported one by one.
    fn groups(&self) -> Option<Box<dyn Groups>>;
}

/// How one path is to be measured.
pub trait Plan: fmt::Debug + Send + Sync {
    /// Where to.
    fn to(&self) -> SocketAddr;

    /// Whether a path that runs by `other` can go on, at most [adjusted](Path::adjust).
    fn can_continue(&self, other: &dyn Plan) -> bool;

    /// Starts the path. `earlier`: the path of the same key that was just stopped, whose counters go on.
    fn start(self: Box<Self>, start: &Start<'_>, earlier: Option<Box<dyn Path>>) -> Box<dyn Path>;

    /// Itself, to compare it with another plan of its kind.
    fn as_any(&self) -> &dyn Any;
}

/// With what a path is started.
#[derive(Debug)]
pub struct Start<'a> {
    /// Its name between the daemon and the loops.
    pub id: PathId,
    /// Which path it is.
    pub key: &'a PathKey,
    /// The settings in force, for keys and certificates.
    pub settings: &'a Settings,
    /// The threads that measure.
    pub loops: &'a Loops,
    /// When the peer announced that it is leaving, if it may still be away.
    pub peer_left_at: Option<Timestamp>,
    /// Decides phase, jitter and session numbers.
    pub seed: u64,
}

/// A path that runs.
pub trait Path: fmt::Debug + Send + Sync {
    /// How it is measured.
    fn plan(&self) -> &dyn Plan;

    /// Takes over what can be changed while it runs from a plan with which it [can continue](Plan::can_continue).
    fn adjust(&mut self, plan: Box<dyn Plan>, start: &Start<'_>);

    /// Stops it.
    fn stop(&self, loops: &Loops);

    /// Its metrics.
    fn series(&self) -> Vec<Arc<dyn AnySeries>>;

    /// What it has measured.
    fn measured(&self) -> Arc<dyn Measured>;

    /// A peer that answers on this path does so at least this often.
    fn patience(&self) -> Duration;

    /// Itself, for its own kind.
    fn as_any(&self) -> &dyn Any;

    /// The same, by value.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// What a path has measured, for whoever shows it.
pub trait Measured: fmt::Debug + Send + Sync {
    /// When the last reply came, in nanoseconds since 1970; 0: none yet.
    fn last_reply(&self) -> u64;

    /// Whether the peer announced that it is leaving and has not come back.
    fn is_draining(&self) -> bool;

    /// Why nothing leaves this host, when nothing ever did.
    fn local_failure(&self) -> Option<String>;

    /// Fields of the path at `/api/v1/paths` that only this kind has.
    fn json(&self) -> Map<String, Value>;

    /// A row of the demo's table.
    fn row(&self) -> TableRow;
}

/// A row of a table of paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRow {
    /// The head of its columns; rows of the same head stand in one table.
    pub head: &'static str,
    /// Its columns.
    pub cells: String,
}

/// Sums over the paths of each group.
pub trait Groups: fmt::Debug + Send + Sync {
    /// Puts each path of its kind into the group of its peer. `group_of`: the group of a peer or target.
    fn arrange(&mut self, group_of: &dyn Fn(&str) -> String, paths: &[(&PathKey, &dyn Path)]);

    /// Looks at how each path fared since the last call. Called every half minute.
    fn refresh(&mut self);

    /// All paths of its kind, and of those the worst `count`.
    fn worst(&self, count: usize) -> (BTreeSet<PathKey>, BTreeSet<PathKey>);

    /// The metrics of the groups.
    fn series(&self) -> Vec<Arc<dyn AnySeries>>;
}

/// The threads that measure.
#[derive(Debug)]
pub struct Loops {
    /// By datagrams.
    pub prober: datagram::DatagramHandle,
    /// Over connections.
    pub streams: stream::StreamHandle,
}

impl Loops {
    /// The peer of these paths announced at `at` that it is leaving.
    pub fn peer_leaving(&self, ids: &[PathId], at: Timestamp) {
        // Each ignores the paths of the other.
        self.streams.peer_leaving(ids.to_vec(), at);
        self.prober.peer_leaving(ids.to_vec(), at);
    }

    /// Sends nothing more, waits at most `grace` for what is undecided, and ends the threads.
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
