//! Events of echo paths.

use serde::Serialize;
use tracing::{info, warn};

use crate::event_log::{EventLog, EventType};
use crate::loops::PathEvent;
use crate::paths::PathKey;

/// The path MTU was found, or changed. Whole IP packets, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MtuChanged {
    /// What it was; `None`: not known.
    pub(super) from: Option<u16>,
    /// What it is.
    pub(super) to: u16,
}

/// The same as it is shown.
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
            None => info!(%probe, %peer, family, to, "the path MTU was found"),
            Some(from) if to < from => warn!(%probe, %peer, family, from, to, "the path MTU shrank"),
            Some(from) => info!(%probe, %peer, family, from, to, "the path MTU grew"),
        }
        log.add(&PathMtuChanged { probe, peer, family, from, to });
    }
}
