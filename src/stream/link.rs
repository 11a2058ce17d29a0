//! A connection that carries the messages of a path, whatever is spoken over it.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use pathmeter_proto::wire::Message;

use super::connect_error::ConnectError;
use super::http::HttpLink;
use super::link_event::{LinkEvent, SendOutcome};
use super::tcp::TcpLink;
use super::websocket::WebSocketLink;
use crate::metrics::stream::TcpInfo;

/// A connection that stands.
#[derive(Debug)]
pub(super) enum Link {
    Tcp(Box<TcpLink>),
    WebSocket(Box<WebSocketLink>),
    Http(Box<HttpLink>),
}

impl Link {
    /// Hands over a message; there is room for it.
    pub(super) fn send(&mut self, message: Message) -> Result<SendOutcome, ConnectError> {
        match self {
            Self::Tcp(link) => link.send(message),
            Self::WebSocket(link) => link.send(message),
            Self::Http(link) => link.send(message),
        }
    }

    /// What came next.
    pub(super) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<LinkEvent> {
        match self {
            Self::Tcp(link) => link.poll_event(context),
            Self::WebSocket(link) => link.poll_event(context),
            Self::Http(link) => link.poll_event(context),
        }
    }

    /// Whether the kernel says when things arrive.
    pub(super) fn has_kernel_timestamps(&self) -> bool {
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
            Self::WebSocket(link) => link.tcp_info.read(),
            Self::Http(link) => link.tcp_info.read(),
        }
    }

    /// From where it connects; `None` where the kernel does not say.
    pub(super) fn source(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(link) => link.source(),
            Self::WebSocket(link) => link.tcp_info.source(),
            Self::Http(link) => link.tcp_info.source(),
        }
    }
}
