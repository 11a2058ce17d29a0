//! Traces on the connection of a client that has connected to this host.
//!
//! [`OwnFlowTracer`] decides; here are its sockets, and the checks that the connection is not harmed: before
//! the trace, after its first segment and after the last one, something that is sent on the connection must
//! be acknowledged in time. Devices that rewrite TTLs may drop all that follows a segment with a small TTL.

mod sockets;
mod uplink;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pathmeter_proto::probe_budget::ProbeBudget;
use pathmeter_proto::trace::{Answer, OwnFlowSpec, OwnFlowStep, OwnFlowTracer, Trace};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

use super::kernel::{self, Delivery};
use crate::clock::Clock;
use crate::http::AcceptedConnection;
use sockets::IcmpMessage;
pub use sockets::{RawSocketError, is_permitted};
pub(super) use sockets::{Received, TraceSockets};

/// The limits of a trace.
#[derive(Debug, Clone)]
pub struct OwnFlowLimits {
    /// Largest TTL.
    pub hops_max: u8,
    /// How long to wait for each answer.
    pub answer_wait: Duration,
    /// The limits that all tracers of the agent share.
    pub budget: Arc<Mutex<ProbeBudget>>,
}

/// Receives what happens during a trace.
pub trait OwnFlowObserver: Send {
    /// Sends something on the connection that the client acknowledges.
    fn ping(&mut self);

    /// The trace begins: the connection is healthy, and so it was after the first segment.
    fn begun(&mut self);

    /// A router has answered for the first time.
    fn found(&mut self, ttl: u8, answer: &Answer);
}

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum OwnFlowError {
    /// The sockets could not be opened or used, or no segment could be sent.
    #[error(transparent)]
    RawSocket(#[from] RawSocketError),
    /// The connection was not healthy before the trace, which did not begin.
    #[error("the connection is lossy or does not answer")]
    Unhealthy,
    /// What was sent after a segment with a limited TTL was not acknowledged in time: the trace may have
    /// harmed the connection.
    #[error("the connection has stalled after segments with limited TTLs")]
    Stalled,
}

/// Whether what was sent on a connection is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Acknowledgment {
    InTime,
    /// Data is in flight and not acknowledged.
    Missing,
    /// Nothing is in flight: the client does not read.
    NothingSent,
}

/// ICMP messages that are read before another task may run. Chosen: more than the routers of a way, so that
/// only a client that sends them itself has to wait.
const MESSAGES_PER_STEP: usize = 64;

/// Shortest time that the connection has to acknowledge what is sent. Chosen: more than acknowledgments are
/// delayed (RFC 9293: at most 0.5 s; Linux at most 0.2 s).
const ANSWER_MIN: Duration = Duration::from_millis(300);

/// Time between two looks at what is acknowledged. Chosen: shorter than most RTTs of clients.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// How many RTTs it has.
const ANSWER_RTTS: u32 = 3;

/// How long nothing must be acknowledged until the connection has stalled. Chosen: 5 s, in which TCP sends a
/// lost segment again four times (RFC 6298, from 200 ms on, doubling), and a full queue is emptied.
const STALLED_AFTER: Duration = Duration::from_secs(5);

/// Traces the way to the client of a connection.
///
/// # Errors
/// [`OwnFlowError`].
pub async fn trace(
    connection: AcceptedConnection,
    limits: OwnFlowLimits,
    observer: &mut impl OwnFlowObserver,
) -> Result<Trace, OwnFlowError> {
    let AcceptedConnection { socket, local, peer } = connection;
    let mut sockets = TraceSockets::open(local, peer)?;
    let answer_max = ANSWER_MIN.max(delivery(&socket)?.rtt * ANSWER_RTTS);
    let connection = CheckedConnection { socket, answer_max };
    connection.check_health(observer).await?;
    if peer.is_ipv6() {
        // The segments have the flow label 0, so the connection must, or they take another route. It may then
        // itself take another one.
        kernel::disable_flow_label(&connection.socket)
            .map_err(RawSocketError::of("setting the flow label of the connection"))?;
        sockets.discard_segments();
        connection.check_health(observer).await?;
    }
    // The kernel delivers a segment to raw sockets first: the one that has acknowledged the ping is there.
    let position = sockets.latest_position().ok_or(OwnFlowError::Unhealthy)?;
    let rtt = delivery(&connection.socket)?.rtt;
    let OwnFlowLimits { hops_max, answer_wait, budget } = limits;
    let spec = OwnFlowSpec { local, peer, position, rtt, hops_max, answer_wait, budget };
    let trace = probe(OwnFlowTracer::new(spec, Clock::now()), &mut sockets, &connection, observer).await?;
    // What is sent from here on comes after all segments with limited TTLs.
    match connection.ping(observer).await {
        Ok(Acknowledgment::Missing) if matches!(connection.has_stalled().await, Ok(true)) => {
            Err(OwnFlowError::Stalled)
        }
        Ok(Acknowledgment::Missing | Acknowledgment::InTime | Acknowledgment::NothingSent) | Err(_) => {
            Ok(trace)
        }
    }
}

async fn probe(
    mut tracer: OwnFlowTracer,
    sockets: &mut TraceSockets,
    connection: &CheckedConnection,
    observer: &mut impl OwnFlowObserver,
) -> Result<Trace, OwnFlowError> {
    let (mut has_begun, mut refused) = (false, None);
    let received = |tracer: &mut OwnFlowTracer, message: &IcmpMessage, observer: &mut _| {
        if let Some((ttl, answer)) = tracer.received(&message.bytes, message.from, message.at) {
            OwnFlowObserver::found(observer, ttl, &answer);
        }
    };
    loop {
        // What has arrived comes before a deadline that has passed meanwhile.
        for _ in 0..if has_begun { MESSAGES_PER_STEP } else { 0 } {
            let Some(message) = sockets.received_message() else { break };
            received(&mut tracer, &message, observer);
        }
        yield_now().await;
        let now = Clock::now();
        match tracer.step(now) {
            // A segment that this host does not send is a hop that is not probed.
            OwnFlowStep::Send { ttl, segment } => match sockets.send((ttl, 0), &segment) {
                Ok(at) => tracer.sent(ttl, at),
                Err(error) => refused = Some(error),
            },
            OwnFlowStep::CheckConnection => match connection.ping(observer).await? {
                Acknowledgment::InTime => {
                    observer.begun();
                    has_begun = true;
                }
                Acknowledgment::Missing if connection.has_stalled().await? => {
                    return Err(OwnFlowError::Stalled);
                }
                Acknowledgment::Missing | Acknowledgment::NothingSent => return Err(OwnFlowError::Unhealthy),
            },
            OwnFlowStep::Wait(until) => tokio::select! {
                message = sockets.next_message() => received(&mut tracer, &message?, observer),
                () = sleep(until.since(now)) => {}
            },
            OwnFlowStep::Complete(trace) => {
                if !has_begun {
                    // No segment was sent.
                    refused.map_or(Ok(()), Err)?;
                    observer.begun();
                }
                return Ok(*trace);
            }
        }
    }
}

/// A connection that is checked by sending something on it.
#[derive(Debug)]
struct CheckedConnection {
    socket: OwnedFd,
    /// How long an acknowledgment may take.
    answer_max: Duration,
}

impl CheckedConnection {
    /// Checks that what is sent arrives, and that no segment is being sent again.
    ///
    /// # Errors
    /// [`OwnFlowError::Unhealthy`].
    async fn check_health(&self, observer: &mut impl OwnFlowObserver) -> Result<(), OwnFlowError> {
        let is_acknowledged = self.ping(observer).await? == Acknowledgment::InTime;
        let is_healthy = is_acknowledged && !delivery(&self.socket)?.is_recovering;
        if is_healthy { Ok(()) } else { Err(OwnFlowError::Unhealthy) }
    }

    /// Sends something, and waits for its acknowledgment.
    async fn ping(&self, observer: &mut impl OwnFlowObserver) -> Result<Acknowledgment, OwnFlowError> {
        let sent = delivery(&self.socket)?.sent;
        observer.ping();
        let acknowledged = async {
            while delivery(&self.socket)?.acknowledged <= sent {
                sleep(CHECK_INTERVAL).await;
            }
            Ok(Acknowledgment::InTime)
        };
        match timeout(self.answer_max, acknowledged).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let Delivery { sent, acknowledged, .. } = delivery(&self.socket)?;
                let is_missing = acknowledged < sent;
                Ok(if is_missing { Acknowledgment::Missing } else { Acknowledgment::NothingSent })
            }
        }
    }

    /// Whether nothing that is in flight is acknowledged within [`STALLED_AFTER`]. Loss and growing queues
    /// delay an acknowledgment, too, but TCP repairs that.
    async fn has_stalled(&self) -> Result<bool, OwnFlowError> {
        let before = delivery(&self.socket)?.acknowledged;
        let progress = async {
            while delivery(&self.socket)?.acknowledged == before {
                sleep(CHECK_INTERVAL).await;
            }
            Ok(())
        };
        match timeout(STALLED_AFTER, progress).await {
            Ok(outcome) => outcome.map(|()| false),
            Err(_) => Ok(true),
        }
    }
}

fn delivery(socket: &OwnedFd) -> Result<Delivery, OwnFlowError> {
    kernel::delivery(socket).ok_or(OwnFlowError::Unhealthy)
}
