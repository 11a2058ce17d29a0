//! How the agent port passes the connections and handshakes of runs to their responder.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pathmeter_proto::machine::{Arrival, HostDrops, NotSent, Now, SENT_TTL, Send, SendId, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::load::{HANDSHAKE_BYTES, LoadKind};

use super::Bulk;
use super::responder::BulkResponder;
use super::threads::BulkThreads;
use crate::datagram::{Access, Task, TaskStep, Traffic};
use crate::stream::bulk::BulkHandler;

/// Answers the runs of other agents.
#[derive(Debug, Clone)]
pub struct RunResponder {
    threads: Arc<BulkThreads>,
    responder: Arc<BulkResponder>,
}

impl RunResponder {
    /// Answers runs that have a lease of `bulk`.
    ///
    /// # Errors
    /// The kernel provides no random bytes.
    pub fn new(bulk: &Bulk) -> io::Result<Self> {
        let responder = Arc::new(BulkResponder::new(bulk.clone())?);
        Ok(Self { threads: Arc::clone(&bulk.threads), responder })
    }

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

/// Maximum replies that wait to be sent; further requests are not answered. The loop of the agent port sends
/// each before it passes on the next request.
const REPLIES_MAX: usize = 64;

/// Answers requests on the agent port.
#[derive(Debug)]
pub(super) struct HandshakeTask {
    responder: Arc<BulkResponder>,
    replies: VecDeque<Reply>,
    sent: u64,
    is_stopping: bool,
}

#[derive(Debug)]
struct Reply {
    datagram: [u8; HANDSHAKE_BYTES],
    flow: u8,
    from: Option<IpAddr>,
    to: SocketAddr,
}

impl HandshakeTask {
    pub(super) fn new(responder: Arc<BulkResponder>) -> Self {
        Self { responder, replies: VecDeque::new(), sent: 0, is_stopping: false }
    }
}

impl Task for HandshakeTask {
    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        let Ok(LoadKind::Handshake(lease)) = LoadKind::read(datagram) else { return };
        let Arrival { from, to, flow, icmp: None, .. } = *arrival else { return };
        if self.replies.len() >= REPLIES_MAX {
            return;
        }
        if let Some(datagram) = self.responder.on_request(lease, datagram, from, to) {
            self.replies.push_back(Reply { datagram, flow, from: to, to: from });
        }
    }

    fn before_send(&mut self, _: SendId, _: &mut [u8], _: Now) {}

    fn sent(&mut self, _: SendId, _: Timestamp, _: TimestampSource) {}

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn step(&mut self, _: Now, _: &mut HostDrops, arena: &mut Vec<u8>, _: &mut Traffic) -> TaskStep {
        let Some(Reply { datagram, flow, from, to }) = self.replies.pop_front() else {
            return if self.is_stopping { TaskStep::Finished } else { TaskStep::Wait(Timestamp::NEVER) };
        };
        arena.extend_from_slice(&datagram);
        self.sent += 1;
        TaskStep::Send(Send {
            id: SendId(self.sent),
            flow,
            from,
            to,
            tos: 0,
            ttl: SENT_TTL,
            dont_fragment: false,
            segment: None,
            timestamp: false,
        })
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn set_access(&mut self, _: &Access) {}

    fn delays_stop(&self) -> bool {
        false
    }

    fn is_balanced(&self, _: Timestamp) -> bool {
        true
    }

    fn claims(&self, _: &[u8], _: &Arrival) -> bool {
        false
    }
}
