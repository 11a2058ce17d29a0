//! The series of `/ws`.

use super::text::{CLOSE, Cell, Family, Suffix, Writer, counter, gauge, label};

/// What the WebSocket responder counts. Accepted clients are those that are connected and those that have ended.
#[derive(Debug, Default)]
pub struct WebSocketSeries {
    /// Clients that are connected.
    pub clients: Cell,
    /// Clients that were let in.
    pub accepted: Cell,
    refused: [Cell; Refused::ALL.len()],
    /// Messages that were sent back.
    pub messages: Cell,
    /// Their payload.
    pub bytes: Cell,
    closed: [Cell; Ending::ALL.len()],
}

impl WebSocketSeries {
    /// A client was not let in.
    pub fn refused(&self, why: Refused) {
        let place = Refused::ALL.iter().position(|known| *known == why).expect("ALL lists every variant");
        self.refused[place].inc();
    }

    /// A client that was let in has ended.
    pub fn closed(&self, why: Ending) {
        let place = Ending::ALL.iter().position(|known| *known == why).expect("ALL lists every variant");
        self.closed[place].inc();
    }
}

/// Why a client is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Its page is of an origin that may not.
    Origin,
    /// Neither its address nor a key admits it.
    Admission,
    /// There are as many as there may be.
    Limit,
    /// It is no WebSocket client, or of another version.
    BadRequest,
}

impl Refused {
    const ALL: [Self; 4] = [Self::Origin, Self::Admission, Self::Limit, Self::BadRequest];

    const fn name(self) -> &'static str {
        match self {
            Self::Origin => "origin",
            Self::Admission => "admission",
            Self::Limit => "limit",
            Self::BadRequest => "bad_request",
        }
    }
}

/// How a client ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
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

impl Ending {
    const ALL: [Self; 7] = [
        Self::Client,
        Self::Idle,
        Self::TooLarge,
        Self::Protocol,
        Self::Stalled,
        Self::GoingAway,
        Self::Error,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Idle => "idle",
            Self::TooLarge => "too_large",
            Self::Protocol => "protocol",
            Self::Stalled => "stalled",
            Self::GoingAway => "going_away",
            Self::Error => "error",
        }
    }
}

fn by_reason<'a>(
    writer: &mut Writer<'_>,
    name: &str,
    counts: impl Iterator<Item = (&'static str, &'a Cell)>,
) {
    for (reason, count) in counts {
        writer.count(name, Suffix::None, &label("reason", reason), CLOSE, count.get());
    }
}

/// In alphabetical order.
pub(super) const WEBSOCKET_FAMILIES: [Family<WebSocketSeries>; 6] = [
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
        |w, name, s| by_reason(w, name, Ending::ALL.map(Ending::name).into_iter().zip(&s.closed)),
    ),
    counter(
        "pathmeter_websocket_messages_total",
        "Messages of WebSocket clients that were sent back.",
        |w, name, s| w.plain(name, s.messages.get()),
    ),
    counter(
        "pathmeter_websocket_refused_total",
        "WebSocket clients that were not let in, by reason.",
        |w, name, s| by_reason(w, name, Refused::ALL.map(Refused::name).into_iter().zip(&s.refused)),
    ),
];
