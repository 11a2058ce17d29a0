//! Bandwidth runs: leases, the thread that runs them, and both ends of a run.
//!
//! A prober requests a lease over HTTP (`lease_client`), the responder decides (`leases`), and the
//! connections of the run are opened to the agent port, where the responder recognises them and passes them
//! to the thread for bulk connections (`threads`). There both ends do the same (`endpoint`): one sends, the
//! other receives, over connections (`streams`) or, after a handshake (`handshake`), over UDP (`load`), which
//! has a thread of its own. A run over UDP has a connection too, for its messages.

mod control;
mod endpoint;
mod handshake;
mod lease_client;
mod leases;
mod load;
mod outcome;
mod payload;
mod prober;
mod responder;
mod streams;
#[cfg(test)]
mod tests;
mod threads;
mod transfer;

pub use lease_client::{LEASES, LeaseClient, LeaseError, QueuePlace, repeat_after};
pub use leases::{Grant, LeaseAnswer, LeaseRequest, Leases, RefusalReason, StoredLedger};
pub(crate) use load::share_port;
pub use outcome::{LimitedBy, LoadOutcome, RunOutcome};
pub use prober::{Run, RunError, RunMethod};
pub use threads::{BulkThreads, RunResponder};

use std::sync::Arc;

/// The threads of runs, and the leases of this host.
#[derive(Debug, Clone, Default)]
pub struct Bulk {
    /// The threads.
    pub threads: Arc<BulkThreads>,
    /// The leases.
    pub leases: Arc<Leases>,
}
