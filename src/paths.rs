//! What a path is called.

use std::fmt;
use std::sync::Arc;

/// Identifies a path across configurations: as long as these are the same it keeps its counters, whatever else changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathKey {
    /// The configured probe.
    pub probe: Arc<str>,
    /// The peer or target.
    pub peer: Arc<str>,
    /// `ipv4`, `ipv6`, or `auto` while no address is known.
    pub family: &'static str,
}

impl fmt::Display for PathKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} over {}", self.probe, self.peer, self.family)
    }
}

/// Identifies one start of a path. A path that is changed is started again under a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(pub u64);
