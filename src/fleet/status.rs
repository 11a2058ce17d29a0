//! The status of a path.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::paths::PathKey;
use crate::probe::Measured;

/// The status of one path, for the API.
#[derive(Debug, Clone)]
pub struct PathStatus {
    /// The key of the path; its family is `auto` while there is no address.
    pub key: PathKey,
    /// The destination; `None` while there is no address.
    pub to: Option<SocketAddr>,
    /// The source address of each flow.
    pub sources: Vec<SocketAddr>,
    /// The results; `None` while the path is not measured.
    pub measured: Option<Arc<dyn Measured>>,
    /// Why the path is not measured, or why there may be no replies.
    pub reason: Option<String>,
}
