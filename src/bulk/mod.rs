//! Bandwidth runs: leases, the thread that runs them, and both ends of a run.
//!
//! A prober requests a lease over HTTP (`lease_client`), the responder decides (`leases`), and the
//! connections of the run are opened to the agent port, where the responder recognises them and passes them
//! to the thread for bulk connections (`connections`). There both ends do the same (`endpoint`): one sends,
//! the other receives.

mod connections;
mod control;
mod endpoint;
mod lease_client;
mod leases;
mod outcome;
mod prober;
mod responder;
#[cfg(test)]
mod tests;
mod transfer;

pub use connections::BulkConnections;
pub use lease_client::{LEASES, LeaseClient, LeaseError, QueuePlace, repeat_after};
pub use leases::{Grant, LeaseAnswer, LeaseRequest, Leases, RefusalReason, StoredLedger};
pub use outcome::{LimitedBy, RunOutcome};
pub use prober::{RunError, TcpRun};

use std::sync::Arc;

/// The thread for bulk connections, and the leases of this host.
#[derive(Debug, Clone, Default)]
pub struct Bulk {
    /// The thread.
    pub threads: Arc<BulkConnections>,
    /// The leases.
    pub leases: Arc<Leases>,
}
