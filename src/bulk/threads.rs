//! The threads of bandwidth runs.

use std::io;
use std::net::UdpSocket;
use std::sync::{Mutex, PoisonError};

use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::load::LoadSender;
use tokio::runtime::{Builder, Handle};

use super::load::{LoadFlow, LoadThread};
use super::plan::{EndpointPlan, RunMethod};
use crate::clock::Clock;

/// The thread on which all bulk connections of this process are read and written, and the one for the load of
/// runs over UDP. Each starts when it is first needed, and ends with the process.
#[derive(Debug, Default)]
pub struct BulkThreads {
    runtime: Mutex<Option<Handle>>,
    load: LoadThread,
}

impl BulkThreads {
    /// The runtime of the thread for connections, which is started if it is not running.
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

    /// Begins to send or to receive the load of a run over UDP.
    pub(super) fn begin_load(
        &self,
        socket: UdpSocket,
        lease: LeaseId,
        method: RunMethod,
        plan: &EndpointPlan,
    ) -> io::Result<LoadFlow> {
        match method.pattern(plan.bytes_max).filter(|_| plan.is_sender) {
            Some(pattern) => {
                let sender =
                    LoadSender::new(pattern, plan.bytes_max, plan.rate_max, plan.duration, Clock::now());
                self.load.send(socket, lease, sender)
            }
            None => self.load.receive(socket, lease),
        }
    }
}
