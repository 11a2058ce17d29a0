//! A connection that carries the messages of a path, whatever is spoken over it.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use pathmeter_proto::echo::{Answer, Mismatch};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Message;

use super::http::HttpLink;
use super::tcp::TcpLink;
use super::trouble::Trouble;
use super::websocket::WebSocketLink;
use crate::metrics::stream::{TcpInfo, Unexpected};

/// A connection that stands.
#[derive(Debug)]
pub(super) enum Link {
    Tcp(Box<TcpLink>),
    WebSocket(Box<WebSocketLink>),
    Http(Box<HttpLink>),
}

/// What came of a connection.
#[derive(Debug)]
pub(super) enum Heard {
    /// An answer.
    Answer(Answer),
    /// An answer, which may be another one than was expected.
    Page(Answer, Option<Unexpected>),
    /// Something that is no answer.
    Mismatch(Mismatch),
    /// There is room for messages again.
    Room,
    /// Something that is between the libraries.
    Nothing,
    /// Its end.
    End(Trouble),
    /// Its end, which the other side had decided on before it could see this message.
    Stale(Message, Trouble),
}

/// What became of a message that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handed {
    /// When the kernel let it go, if it did so while it was handed over and says so.
    pub(super) left: Option<Timestamp>,
    /// Whether there is room for another one.
    pub(super) has_room: bool,
}

impl Link {
    /// Hands over a message; there is room for it.
    pub(super) fn send(&mut self, message: Message) -> Result<Handed, Trouble> {
        match self {
            Self::Tcp(link) => link.send(message),
            Self::WebSocket(link) => link.send(message),
            Self::Http(link) => link.send(message),
        }
    }

    /// What came next.
    pub(super) fn poll_hear(&mut self, context: &mut Context<'_>) -> Poll<Heard> {
        match self {
            Self::Tcp(link) => link.poll_hear(context),
            Self::WebSocket(link) => link.poll_hear(context),
            Self::Http(link) => link.poll_hear(context),
        }
    }

    /// Whether the kernel says when things arrive.
    pub(super) fn has_stamps(&self) -> bool {
        match self {
            Self::Tcp(_) => true,
            Self::WebSocket(_) | Self::Http(_) => false,
        }
    }

    /// Says that it is the end, where there is a word for it: nothing is heard any more.
    pub(super) fn close(&mut self) {
        match self {
            Self::WebSocket(link) => link.close(),
            Self::Tcp(_) | Self::Http(_) => {}
        }
    }

    /// What TCP says of it; `None` where the kernel does not.
    pub(super) fn tcp_info(&self) -> Option<TcpInfo> {
        match self {
            Self::Tcp(link) => link.tcp_info(),
            Self::WebSocket(link) => link.gauge.tcp_info(),
            Self::Http(link) => link.gauge.tcp_info(),
        }
    }

    /// From where it connects; `None` where the kernel does not say.
    pub(super) fn source(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(link) => link.source(),
            Self::WebSocket(link) => link.gauge.source(),
            Self::Http(link) => link.gauge.source(),
        }
    }
}
