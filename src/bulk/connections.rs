//! The thread for bulk connections.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::{Builder, Handle};

use super::leases::Leases;
use super::responder::BulkResponder;
use crate::stream::bulk::BulkHandler;

/// The thread on which all bulk connections of this process are read and written. It starts when it is first
/// needed, and ends with the process.
#[derive(Debug, Default)]
pub struct BulkConnections {
    runtime: Mutex<Option<Handle>>,
}

impl BulkConnections {
    /// The runtime of the thread, which is started if it is not running.
    ///
    /// # Errors
    /// When the operating system cannot create the thread or its event descriptors.
    pub fn runtime(&self) -> io::Result<Handle> {
        let mut runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = runtime.as_ref() {
            return Ok(handle.clone());
        }
        let new = Builder::new_current_thread().enable_all().build()?;
        let handle = new.handle().clone();
        let body = move || new.block_on(std::future::pending::<()>());
        std::thread::Builder::new().name("pm-bulk-streams".to_owned()).spawn(body)?;
        *runtime = Some(handle.clone());
        Ok(handle)
    }

    /// Answers the runs of other agents that have a lease of `leases`.
    #[must_use]
    pub fn answer(self: &Arc<Self>, leases: Arc<Leases>) -> BulkHandler {
        let (threads, responder) = (Arc::clone(self), Arc::new(BulkResponder::new(leases)));
        BulkHandler(Box::new(move |connection| match threads.runtime() {
            Ok(runtime) => {
                runtime.spawn(Arc::clone(&responder).accept(connection));
            }
            Err(error) => tracing::error!(%error, "cannot start the thread for bulk connections"),
        }))
    }
}
