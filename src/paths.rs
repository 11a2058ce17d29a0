//! Identifiers of paths.

use std::fmt;
use std::sync::Arc;

/// Identifies a path across configurations: a path with the same key keeps its counters when its
/// configuration changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathKey {
    /// The name of the probe.
    pub probe: Arc<str>,
    /// The name of the peer or target.
    pub peer: Arc<str>,
    /// The address family: `ipv4`, `ipv6`, or `auto` while no address is known.
    pub family: &'static str,
}

impl fmt::Display for PathKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} over {}", self.probe, self.peer, self.family)
    }
}

/// Identifies one start of a path. If its plan changes, the path is started again with a new identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(pub u64);
