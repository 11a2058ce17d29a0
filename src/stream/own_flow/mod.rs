//! Traces on the connection of a client that has connected to this host.
//!
//! [`OwnFlowTracer`] decides; here are its sockets, and the checks that the connection is not harmed: before
//! and after the trace, something that is sent on the connection must be acknowledged in time. Devices that
//! rewrite TTLs may drop all that follows a segment with a small TTL.

mod sockets;

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pathmeter_proto::probe_budget::ProbeBudget;
use pathmeter_proto::trace::{Answer, OwnFlowSpec, OwnFlowStep, OwnFlowTracer, Trace};
use tokio::time::{sleep, timeout};

use super::kernel::{self, Delivery};
use crate::clock::Clock;
pub use sockets::is_permitted;
use sockets::{Report, TraceSockets};

/// A connection to trace.
#[derive(Debug)]
pub struct TracedConnection {
    /// A duplicate descriptor of its socket.
    pub socket: OwnedFd,
    /// The address and port of this host.
    pub local: SocketAddr,
    /// The address and port of the client.
    pub peer: SocketAddr,
}

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

    /// The trace begins.
    fn begun(&mut self);

    /// A router has answered for the first time.
    fn found(&mut self, ttl: u8, answer: &Answer);
}

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum OwnFlowError {
    /// The sockets could not be opened or used. The connection is unharmed.
    #[error("opening raw sockets: {0}")]
    Sockets(#[from] io::Error),
    /// The connection was not healthy before the trace, which did not begin.
    #[error("the connection is lossy or does not answer")]
    Unhealthy,
    /// What was sent after the trace was not acknowledged in time: the trace may have harmed the connection.
    #[error("the connection has stalled after segments with limited TTLs")]
    Stalled,
}

/// Shortest time that the connection has to acknowledge what is sent. Chosen: more than acknowledgments are
/// delayed (RFC 9293: at most 0.5 s; Linux at most 0.2 s).
const ANSWER_MIN: Duration = Duration::from_millis(300);

/// Time between two looks at what is acknowledged. Chosen: shorter than most RTTs of clients.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// How many RTTs it has.
const ANSWER_RTTS: u32 = 3;

/// Traces the way to the client of a connection.
///
/// # Errors
/// [`OwnFlowError`].
pub async fn trace(
    connection: TracedConnection,
    limits: OwnFlowLimits,
    observer: &mut impl OwnFlowObserver,
) -> Result<Trace, OwnFlowError> {
    let TracedConnection { socket, local, peer } = connection;
    let mut sockets = TraceSockets::open(local, peer)?;
    if peer.is_ipv6() {
        // The segments have the flow label 0, so the connection must, or they take another route.
        kernel::disable_flow_label(&socket)?;
    }
    let delivery = || kernel::delivery(&socket).ok_or(OwnFlowError::Unhealthy);
    let answer_max = ANSWER_MIN.max(delivery()?.rtt * ANSWER_RTTS);
    observer.ping();
    let position = match timeout(answer_max, sockets.next_position()).await {
        Ok(position) => position?,
        Err(_) => return Err(OwnFlowError::Unhealthy),
    };
    let Delivery { rtt, is_recovering, .. } = delivery()?;
    if is_recovering {
        return Err(OwnFlowError::Unhealthy);
    }
    observer.begun();
    let OwnFlowLimits { hops_max, answer_wait, budget } = limits;
    let spec = OwnFlowSpec { local, peer, position, rtt, hops_max, answer_wait, budget };
    let trace = probe(OwnFlowTracer::new(spec, Clock::now()), &mut sockets, observer).await?;
    // What is sent from here on comes after all segments with limited TTLs.
    let sent = delivery()?.sent;
    observer.ping();
    let acknowledged = async {
        while delivery()?.acknowledged <= sent {
            sleep(CHECK_INTERVAL).await;
        }
        Ok(())
    };
    match timeout(answer_max, acknowledged).await {
        Ok(Ok(())) => Ok(trace),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let Delivery { sent, acknowledged, .. } = delivery()?;
            // If nothing is in flight, the client does not read.
            Err(if acknowledged < sent { OwnFlowError::Stalled } else { OwnFlowError::Unhealthy })
        }
    }
}

async fn probe(
    mut tracer: OwnFlowTracer,
    sockets: &mut TraceSockets,
    observer: &mut impl OwnFlowObserver,
) -> Result<Trace, OwnFlowError> {
    let mut received = |tracer: &mut OwnFlowTracer, report: Report| {
        if let Some((ttl, answer)) = tracer.received(&report.message, report.from, report.at) {
            observer.found(ttl, &answer);
        }
    };
    loop {
        // What has arrived comes before a deadline that has passed meanwhile.
        while let Some(report) = sockets.received_report() {
            received(&mut tracer, report);
        }
        let now = Clock::now();
        match tracer.step(now) {
            OwnFlowStep::Send { ttl, segment } => {
                // A segment that this host does not send is a hop that is not probed.
                if let Ok(at) = sockets.send(ttl, &segment) {
                    tracer.sent(ttl, at);
                }
            }
            OwnFlowStep::Wait(until) => tokio::select! {
                report = sockets.next_report() => received(&mut tracer, report?),
                () = sleep(until.since(now)) => {}
            },
            OwnFlowStep::Complete(trace) => return Ok(*trace),
        }
    }
}
