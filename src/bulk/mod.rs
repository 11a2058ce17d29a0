//! Bandwidth runs: leases, the thread that runs them, and both ends of a run.
//!
//! A prober requests a lease over HTTP (`lease_client`), the responder decides (`leases`), and the
//! connections of the run are opened to the agent port, where the responder recognises them and passes them
//! to the thread for bulk connections (`threads`). There both ends do the same (`endpoint`): one sends, the
//! other receives, over connections (`streams`) or, after a handshake (`handshake`), over UDP (`load`), which
//! has a thread of its own. A run over UDP has a connection too, for its messages.

mod agent_port;
mod control;
mod endpoint;
mod handshake;
mod lease_client;
mod leases;
mod load;
mod outcome;
mod payload;
mod plan;
mod prober;
mod responder;
mod streams;
#[cfg(test)]
mod tests;
mod threads;
mod transfer;

pub use agent_port::RunResponder;
pub use lease_client::{LEASES, LeaseClient, LeaseError, QueuePlace, repeat_after};
pub use leases::{Grant, LeaseAnswer, LeaseRequest, Leases, RefusalReason, StoredLedger};
pub use load::SharedPort;
pub use outcome::{LimitedBy, LoadOutcome, RunOutcome};
pub use plan::RunMethod;
pub use prober::{Run, RunError};
pub use threads::BulkThreads;

use std::sync::Arc;

use crate::metrics::host_load::HostLoads;

/// The threads of runs, the leases of this host, and the hosts that runs load.
#[derive(Debug, Clone, Default)]
pub struct Bulk {
    /// The threads that carry runs.
    pub threads: Arc<BulkThreads>,
    /// What runs may use of this host, and who waits.
    pub leases: Arc<Leases>,
    /// The hosts whose paths are loaded.
    pub loads: Arc<HostLoads>,
    /// The port on which runs over UDP are answered.
    pub port: Arc<SharedPort>,
}
