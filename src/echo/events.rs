//! Events of echo paths.

use serde::Serialize;
use tracing::{info, warn};

use crate::event_log::{EventLog, EventType};
use crate::loops::PathEvent;
use crate::paths::PathKey;

/// The path MTU was found, or changed. Values are sizes of whole IP packets, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MtuChanged {
    /// The previous value; `None`: unknown.
    pub(super) from: Option<u16>,
    /// The new value.
    pub(super) to: u16,
}

/// The event as serialized.
#[derive(Serialize)]
struct PathMtuChanged<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    from: Option<u16>,
    to: u16,
}

impl EventType for PathMtuChanged<'_> {
    const NAME: &'static str = "path_mtu_changed";
}

impl PathEvent for MtuChanged {
    fn report(&self, path: &PathKey, log: &EventLog) {
        let Self { from, to } = *self;
        let PathKey { probe, peer, family } = path;
        match from {
            None => info!(%probe, %peer, family, to, "path MTU found"),
            Some(from) if to < from => warn!(%probe, %peer, family, from, to, "path MTU decreased"),
            Some(from) => info!(%probe, %peer, family, from, to, "path MTU increased"),
        }
        log.add(&PathMtuChanged { probe, peer, family, from, to });
    }
}
