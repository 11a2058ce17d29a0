//! What a path is to whoever looks at the fleet.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::paths::PathKey;
use crate::probe::Measured;

/// One path.
#[derive(Debug, Clone)]
pub struct PathStatus {
    /// Which path; its family is `auto` while there is no address.
    pub key: PathKey,
    /// Where to; `None` while there is no address.
    pub to: Option<SocketAddr>,
    /// Where from, for each flow.
    pub sources: Vec<SocketAddr>,
    /// What it has measured; `None` while it is not measured.
    pub measured: Option<Arc<dyn Measured>>,
    /// Why it is not measured, or why nothing may come back.
    pub reason: Option<String>,
}
