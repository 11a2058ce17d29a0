//! The series of `/ws`.

use super::block::Series;
use super::labels::{Labelled, labels};
use super::text::{Cell, Family, counter, gauge};

/// What the WebSocket responder counts. Accepted clients are those that are connected and those that have ended.
#[derive(Debug, Default)]
pub struct WebSocketSeries {
    /// Clients that are connected.
    pub clients: Cell,
    /// Clients that were let in.
    pub accepted: Cell,
    refused: Labelled<ClientRefusal, 4>,
    /// Messages that were sent back.
    pub messages: Cell,
    /// Their payload.
    pub bytes: Cell,
    closed: Labelled<CloseReason, 7>,
}

impl WebSocketSeries {
    /// A client was not let in.
    pub fn refused(&self, why: ClientRefusal) {
        self.refused.of(why).inc();
    }

    /// A client that was let in has ended.
    pub fn closed(&self, why: CloseReason) {
        self.closed.of(why).inc();
    }
}

/// Why a client is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientRefusal {
    /// Its page is of an origin that may not.
    Origin,
    /// Neither its address nor a key admits it.
    Admission,
    /// There are as many as there may be.
    Limit,
    /// It is no WebSocket client, or of another version.
    BadRequest,
}

labels!(ClientRefusal, "reason", {
    Origin => "origin",
    Admission => "admission",
    Limit => "limit",
    BadRequest => "bad_request",
});

/// How a client ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// It said so.
    Client,
    /// Nothing came from it any more.
    Idle,
    /// It sent a message that is too large.
    TooLarge,
    /// It broke the protocol, or sent text that is none.
    Protocol,
    /// It did not take what was sent to it.
    Stalled,
    /// We leave, or do not answer any more.
    GoingAway,
    /// Its connection ended without a word.
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

impl Series for WebSocketSeries {
    const FAMILIES: &'static [Family<Self>] = &FAMILIES;
    const LINES: usize = 15;
}

/// In alphabetical order.
const FAMILIES: [Family<WebSocketSeries>; 6] = [
    counter(
        "pathmeter_websocket_bytes_total",
        "Payload of the messages that were sent back.",
        |w, name, s| w.plain(name, s.bytes.get()),
    ),
    gauge("pathmeter_websocket_clients", "WebSocket clients that are connected.", |w, name, s| {
        w.plain(name, s.clients.get())
    }),
    counter(
        "pathmeter_websocket_clients_accepted_total",
        "WebSocket clients that were let in.",
        |w, name, s| w.plain(name, s.accepted.get()),
    ),
    counter(
        "pathmeter_websocket_closed_total",
        "WebSocket clients that were let in and have ended, by how.",
        |w, name, s| s.closed.write_alone(w, name),
    ),
    counter(
        "pathmeter_websocket_messages_total",
        "Messages of WebSocket clients that were sent back.",
        |w, name, s| w.plain(name, s.messages.get()),
    ),
    counter(
        "pathmeter_websocket_refused_total",
        "WebSocket clients that were not let in, by reason.",
        |w, name, s| s.refused.write_alone(w, name),
    ),
];
