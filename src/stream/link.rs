//! A connection that carries the messages of a path, for all protocols.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll};

use pathmeter_proto::wire::Message;

use super::connect_error::ConnectError;
use super::http::HttpLink;
use super::link_event::{LinkEvent, SendOutcome};
use super::tcp::TcpLink;
use super::websocket::WebSocketLink;
use crate::metrics::stream::TcpInfo;

/// An established connection.
#[derive(Debug)]
pub(super) enum StreamLink {
    Tcp(Box<TcpLink>),
    WebSocket(Box<WebSocketLink>),
    Http(Box<HttpLink>),
}

impl StreamLink {
    /// Sends a message. The caller must have seen room for it.
    pub(super) fn send(&mut self, message: Message) -> Result<SendOutcome, ConnectError> {
        match self {
            Self::Tcp(link) => link.send(message),
            Self::WebSocket(link) => link.send(message),
            Self::Http(link) => link.send(message),
        }
    }

    /// Polls for the next event.
    pub(super) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<LinkEvent> {
        match self {
            Self::Tcp(link) => link.poll_event(context),
            Self::WebSocket(link) => link.poll_event(context),
            Self::Http(link) => link.poll_event(context),
        }
    }

    /// Whether replies have kernel timestamps.
    pub(super) fn has_kernel_timestamps(&self) -> bool {
        match self {
            Self::Tcp(_) => true,
            Self::WebSocket(_) | Self::Http(_) => false,
        }
    }

    /// Sends a close message, if the protocol has one. No further events are read.
    pub(super) fn close(&mut self) {
        match self {
            Self::WebSocket(link) => link.close(),
            Self::Tcp(_) | Self::Http(_) => {}
        }
    }

    /// TCP_INFO of the connection; `None` if the kernel does not provide it.
    pub(super) fn tcp_info(&self) -> Option<TcpInfo> {
        match self {
            Self::Tcp(link) => link.tcp_info(),
            Self::WebSocket(link) => link.tcp_info.read(),
            Self::Http(link) => link.tcp_info.read(),
        }
    }

    /// A duplicate descriptor of the connection, and its local address; `None` if the kernel refuses one.
    pub(super) fn duplicate(&self) -> Option<(OwnedFd, SocketAddr)> {
        let socket = match self {
            Self::Tcp(link) => link.socket(),
            Self::WebSocket(link) => link.tcp_info.socket(),
            Self::Http(link) => link.tcp_info.socket(),
        };
        Some((socket.try_clone_to_owned().ok()?, self.source()?))
    }

    /// Local address; `None` if the kernel does not report it.
    pub(super) fn source(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(link) => link.source(),
            Self::WebSocket(link) => link.tcp_info.source(),
            Self::Http(link) => link.tcp_info.source(),
        }
    }
}
