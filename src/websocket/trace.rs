//! Traces to clients: what is requested of the daemon, and what clients receive.

use std::net::IpAddr;

use serde::Serialize;
use tokio::sync::mpsc::{Receiver, Sender};

use crate::http::AcceptedConnection;

/// The subprotocol of clients that ask for a trace.
pub const TRACE_SUBPROTOCOL: &str = "pathmeter.trace.v1";

/// Messages to one client that wait until it reads; further ones are dropped. Chosen: more than a trace has,
/// `connected`, the hops, pings and `done`, so that nothing is dropped.
pub(super) const MESSAGES_MAX: usize = 80;

/// A request for a trace to a client that has connected.
#[derive(Debug)]
pub struct ClientTraceRequest {
    /// The address from which it has connected.
    pub client: IpAddr,
    /// Its connection; `None` if it may not be used for the trace, or its descriptor cannot be duplicated.
    pub connection: Option<AcceptedConnection>,
    /// Receives the results. It is closed when the client disconnects.
    pub messages: Sender<ClientMessage>,
}

/// What a trace sends on the connection of a client.
#[derive(Debug, Clone, PartialEq)]
pub enum ClientMessage {
    /// A part of the result. Only clients that asked for it receive it.
    Update(TraceUpdate),
    /// A ping, which every client answers.
    Ping,
    /// The connection has stalled: it is to be closed. Nothing follows.
    Close,
}

/// A part of the result, as clients receive it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum TraceUpdate {
    /// The trace begins.
    Connected {
        /// The client as the agent sees it.
        address: IpAddr,
        /// The protocol of the probes, or `own_flow`.
        method: &'static str,
        /// Why the method is not `own_flow`, which is configured; `None` if it is, or is not configured.
        fallback_reason: Option<String>,
    },
    /// A hop: when its router has answered, or after the others if it has not answered in time.
    Hop {
        /// Its TTL.
        ttl: u8,
        /// What its answers mean.
        state: String,
        /// The router; `None` if it did not answer.
        address: Option<IpAddr>,
        /// RTT to it; `None` if it did not answer.
        rtt_seconds: Option<f64>,
    },
    /// The trace is complete.
    Done {
        /// Whether the client answered. Many hosts do not answer such probes.
        reached: bool,
        /// Number of routers up to it; `None` if it did not answer.
        routers: Option<u8>,
        /// RTT to it; `None` if it did not answer.
        rtt_seconds: Option<f64>,
        /// How long the trace took.
        duration_seconds: f64,
    },
    /// There is no trace.
    Error {
        /// A sentence for the client.
        reason: String,
    },
}

/// The results for one client.
#[derive(Debug)]
pub(super) struct ClientTrace {
    pub(super) messages: Receiver<ClientMessage>,
    /// Whether the client asked for them.
    pub(super) is_asked: bool,
}
