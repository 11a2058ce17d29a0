//! The threads of bandwidth runs.

use std::io;
use std::net::UdpSocket;
use std::sync::{Arc, Mutex, PoisonError};

use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::bandwidth::load::LoadSender;
use tokio::runtime::{Builder, Handle};

use super::endpoint::EndpointPlan;
use super::handshake::HandshakeTask;
use super::leases::Leases;
use super::load::{LoadFlow, LoadThread};
use super::prober::RunMethod;
use super::responder::BulkResponder;
use crate::clock::Clock;
use crate::datagram::Task;
use crate::stream::bulk::BulkHandler;

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
            None => self.load.receive(socket, lease, method.reception()),
        }
    }

    /// Answers the runs of other agents that have a lease of `leases`.
    ///
    /// # Errors
    /// The kernel provides no random bytes.
    pub fn answer(self: &Arc<Self>, leases: Arc<Leases>) -> io::Result<RunResponder> {
        let responder = Arc::new(BulkResponder::new(Arc::clone(self), leases)?);
        Ok(RunResponder { threads: Arc::clone(self), responder })
    }
}

/// Answers the runs of other agents.
#[derive(Debug, Clone)]
pub struct RunResponder {
    threads: Arc<BulkThreads>,
    responder: Arc<BulkResponder>,
}

impl RunResponder {
    /// Accepts their connections.
    #[must_use]
    pub fn connections(&self) -> BulkHandler {
        let (threads, responder) = (Arc::clone(&self.threads), Arc::clone(&self.responder));
        BulkHandler(Box::new(move |connection| match threads.runtime() {
            Ok(runtime) => {
                runtime.spawn(Arc::clone(&responder).accept(connection));
            }
            Err(error) => tracing::error!(%error, "cannot start the thread for bulk connections"),
        }))
    }

    /// Answers the requests of runs over UDP on the agent port.
    #[must_use]
    pub fn handshakes(&self) -> Box<dyn Task> {
        Box::new(HandshakeTask::new(Arc::clone(&self.responder)))
    }
}
