//! Series of the WebSocket responder at `/ws`.

use super::block::Series;
use super::labels::{Labelled, labels};
use super::text::{Cell, Family, counter, gauge};

/// Metrics of the WebSocket responder. Accepted clients are those connected plus those closed.
#[derive(Debug, Default)]
pub struct WebSocketSeries {
    /// Connected clients.
    pub clients: Cell,
    /// Accepted clients.
    pub accepted: Cell,
    refused: Labelled<ClientRefusal, 4>,
    /// Messages echoed.
    pub messages: Cell,
    /// Payload bytes of the echoed messages.
    pub bytes: Cell,
    closed: Labelled<CloseReason, 7>,
    traces: Labelled<ClientTraceResult, 8>,
}

impl WebSocketSeries {
    /// Counts a refused client.
    pub fn refused(&self, why: ClientRefusal) {
        self.refused.of(why).inc();
    }

    /// Counts a requested trace.
    pub fn traced(&self, result: ClientTraceResult) {
        self.traces.of(result).inc();
    }

    /// Number of requested traces with a result.
    #[must_use]
    pub fn traced_as(&self, result: ClientTraceResult) -> u64 {
        self.traces.of(result).get()
    }

    /// Counts an accepted client whose connection was closed.
    pub fn closed(&self, why: CloseReason) {
        self.closed.of(why).inc();
    }
}

/// Why a client is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientRefusal {
    /// The `Origin` of its page is not allowed.
    Origin,
    /// Neither its address nor a key authorises it.
    Admission,
    /// A connection limit was reached.
    Limit,
    /// Not a valid WebSocket handshake, or an unsupported version.
    BadRequest,
}

labels!(ClientRefusal, "reason", {
    Origin => "origin",
    Admission => "admission",
    Limit => "limit",
    BadRequest => "bad_request",
});

/// Why the connection of an accepted client was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client sent a close frame.
    Client,
    /// Nothing was received from the client within the idle timeout.
    Idle,
    /// The client sent a message above the size limit.
    TooLarge,
    /// The client violated the protocol, or sent invalid UTF-8 as text.
    Protocol,
    /// The client did not read what was sent to it, or the connection stalled after a trace on it.
    Stalled,
    /// The agent is stopping, or the client is not authorised any more.
    GoingAway,
    /// The connection ended without a close frame.
    Error,
}

labels!(CloseReason, "reason", {
    Client => "client",
    Idle => "idle",
    TooLarge => "too_large",
    Protocol => "protocol",
    Stalled => "stalled",
    GoingAway => "going_away",
    Error => "error",
});

/// What became of a trace to a client. Every request for one has one result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientTraceResult {
    /// The trace is complete.
    Complete,
    /// It could not be started, or ended without a result.
    Failed,
    /// The client disconnected before its end.
    Left,
    /// The client's connection, on which it was made, has stalled.
    Stalled,
    /// Refused: a trace to the address is running.
    Running,
    /// Refused: too many traces to clients of the address, or IPv6 /64.
    SourceRate,
    /// Refused: too many traces to all clients.
    TotalRate,
    /// Refused: too many clients wait for the start of a trace.
    Busy,
}

labels!(ClientTraceResult, "result", {
    Complete => "complete",
    Failed => "failed",
    Left => "left",
    Stalled => "stalled",
    Running => "running",
    SourceRate => "source_rate",
    TotalRate => "total_rate",
    Busy => "busy",
});

impl Series for WebSocketSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 23;
}

/// In alphabetical order.
const FAMILIES: [Family<WebSocketSeries>; 7] = [
    counter("pathmeter_websocket_bytes_total", "Payload bytes of echoed messages.", |w, name, s| {
        w.plain(name, s.bytes.get())
    }),
    gauge("pathmeter_websocket_clients", "Connected WebSocket clients.", |w, name, s| {
        w.plain(name, s.clients.get())
    }),
    counter("pathmeter_websocket_clients_accepted_total", "Accepted WebSocket clients.", |w, name, s| {
        w.plain(name, s.accepted.get())
    }),
    counter(
        "pathmeter_websocket_clients_closed_total",
        "Closed connections of accepted WebSocket clients, by reason.",
        |w, name, s| s.closed.write_alone(w, name),
    ),
    counter("pathmeter_websocket_messages_total", "Messages of WebSocket clients echoed.", |w, name, s| {
        w.plain(name, s.messages.get())
    }),
    counter(
        "pathmeter_websocket_clients_refused_total",
        "Refused WebSocket clients, by reason.",
        |w, name, s| s.refused.write_alone(w, name),
    ),
    counter(
        "pathmeter_websocket_traces_total",
        "Requested traces of WebSocket clients, by result.",
        |w, name, s| s.traces.write_alone(w, name),
    ),
];
