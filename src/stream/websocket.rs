//! The client side of echo over WebSocket.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use futures_util::{Sink as _, Stream as _};
use hyper::Request;
use hyper::header::{CONNECTION, HOST, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE, USER_AGENT};
use pathmeter_proto::echo::{Mismatch, StreamReply};
use pathmeter_proto::machine::TimestampSource;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::websocket::MessageFormat;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Utf8Bytes};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::connect_error::ConnectError;
use super::http_target::{HttpTarget, RawConnection, USER_AGENT_VALUE};
use super::link_event::{LinkEvent, SendOutcome};
use super::tcp_info::TcpInfoReader;
use crate::clock::Clock;
use crate::http::client::TlsClient;
use crate::metrics::stream::ConnectErrorKind;

/// Largest accepted message in bytes: above the largest message sent, because some servers send a greeting
/// first.
const MESSAGE_BYTES_MAX: usize = 128 * 1024;

/// Size of the read buffer in bytes.
const READ_BYTES: usize = 8 * 1024;

/// A WebSocket connection.
#[derive(Debug)]
pub(super) struct WebSocketLink {
    socket: WebSocketStream<RawConnection>,
    to: SocketAddr,
    format: MessageFormat,
    bytes: usize,
    secure: Option<TlsClient>,
    /// Whether unsent data is buffered.
    is_flushing: bool,
    pub(super) tcp_info: TcpInfoReader,
}

/// Performs the WebSocket handshake on a connection.
pub(super) async fn begin(
    stream: RawConnection,
    tcp_info: TcpInfoReader,
    to: SocketAddr,
    target: &HttpTarget,
    format: MessageFormat,
    bytes: usize,
) -> Result<Box<WebSocketLink>, ConnectError> {
    let operation = format!("WebSocket handshake with {to}");
    let mut request = Request::get(target.path.as_str())
        .header(HOST, target.authority.as_str())
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header(SEC_WEBSOCKET_VERSION, "13")
        .header(SEC_WEBSOCKET_KEY, generate_key())
        .header(USER_AGENT, USER_AGENT_VALUE)
        .body(bytes::Bytes::new())
        .map_err(|error| ConnectError::new(ConnectErrorKind::Protocol, format!("{operation}: {error}")))?;
    if let Some(signer) = &target.signer {
        signer
            .sign(&mut request, SystemTime::now())
            .map_err(|error| ConnectError::local(&operation, &io::Error::other(error.to_string())))?;
    }
    // The library builds the request head from the full URL.
    *request.uri_mut() = format!("ws://{}{}", target.authority, target.path)
        .parse()
        .map_err(|error| ConnectError::new(ConnectErrorKind::Protocol, format!("{operation}: {error}")))?;
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MESSAGE_BYTES_MAX)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX));
    let upgraded = client_async_with_config(request.map(|_| ()), stream, Some(limits)).await;
    let (socket, _) =
        upgraded.map_err(|error| to_connect_error(&operation, target.secure.as_ref(), error))?;
    let secure = target.secure.clone();
    Ok(Box::new(WebSocketLink { socket, to, format, bytes, secure, is_flushing: false, tcp_info }))
}

impl WebSocketLink {
    pub(super) fn send(&mut self, message: Message) -> Result<SendOutcome, ConnectError> {
        let body = self.format.encode(message, self.bytes);
        let frame = match self.format {
            MessageFormat::Binary => tungstenite::Message::Binary(body.into()),
            MessageFormat::Text => {
                let text = Utf8Bytes::try_from(bytes::Bytes::from(body)).expect("the encoding is ASCII");
                tungstenite::Message::Text(text)
            }
        };
        let to = self.to;
        let sent = Pin::new(&mut self.socket).start_send(frame);
        sent.map_err(|error| to_connect_error(&format!("writing to {to}"), self.secure.as_ref(), error))?;
        self.is_flushing = true;
        // The next call of `poll_event` registers the waker for the rest.
        let mut context = Context::from_waker(Waker::noop());
        let has_room = match self.poll_flush(&mut context) {
            Poll::Ready(Ok(())) => true,
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => false,
        };
        Ok(SendOutcome { sent_at: None, has_room })
    }

    /// Sends a close frame if the buffer has room, and does not wait for the answer.
    pub(super) fn close(&mut self) {
        let goodbye = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() };
        if Pin::new(&mut self.socket).start_send(tungstenite::Message::Close(Some(goodbye))).is_ok() {
            let _ = self.poll_flush(&mut Context::from_waker(Waker::noop()));
        }
    }

    fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        let operation = || format!("writing to {}", self.to);
        match Pin::new(&mut self.socket).poll_flush(context) {
            Poll::Ready(Ok(())) => {
                self.is_flushing = false;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => {
                Poll::Ready(Err(to_connect_error(&operation(), self.secure.as_ref(), error)))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    pub(super) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<LinkEvent> {
        if self.is_flushing
            && let Poll::Ready(flushed) = self.poll_flush(context)
        {
            return Poll::Ready(flushed.map_or_else(LinkEvent::Closed, |()| LinkEvent::Writable));
        }
        let operation = || format!("reading from {}", self.to);
        let (body, format) = match Pin::new(&mut self.socket).poll_next(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(Ok(tungstenite::Message::Text(text)))) => (text.into(), MessageFormat::Text),
            Poll::Ready(Some(Ok(tungstenite::Message::Binary(bytes)))) => (bytes, MessageFormat::Binary),
            // The library answers pings itself.
            Poll::Ready(Some(Ok(
                tungstenite::Message::Ping(_)
                | tungstenite::Message::Pong(_)
                | tungstenite::Message::Frame(_),
            ))) => return Poll::Ready(LinkEvent::Ignored),
            Poll::Ready(Some(Ok(tungstenite::Message::Close(frame)))) => {
                let kind = frame.map(|frame| format!(": {frame}")).unwrap_or_default();
                let text = format!("{} closed the WebSocket{kind}", self.to);
                return Poll::Ready(LinkEvent::Closed(ConnectError::new(ConnectErrorKind::Closed, text)));
            }
            Poll::Ready(Some(Err(error))) => {
                return Poll::Ready(LinkEvent::Closed(to_connect_error(
                    &operation(),
                    self.secure.as_ref(),
                    error,
                )));
            }
            Poll::Ready(None) => {
                let text = format!("{} closed the connection", self.to);
                return Poll::Ready(LinkEvent::Closed(ConnectError::new(ConnectErrorKind::Closed, text)));
            }
        };
        Poll::Ready(match self.format.decode(&body, self.bytes) {
            Ok(message) if format == self.format => LinkEvent::Reply(StreamReply {
                message,
                at: Clock::now(),
                by: TimestampSource::User,
                turnaround: 0,
            }),
            Ok(_) | Err(_) => LinkEvent::Mismatch(Mismatch::Malformed),
        })
    }
}

/// Converts an error of the library.
fn to_connect_error(operation: &str, secure: Option<&TlsClient>, error: tungstenite::Error) -> ConnectError {
    let (kind, text) = match error {
        tungstenite::Error::Io(error) => {
            return ConnectError::of_tls(operation, secure, &error)
                .unwrap_or_else(|| ConnectError::from_io(operation, &error));
        }
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => {
            (ConnectErrorKind::Closed, "connection closed".to_owned())
        }
        tungstenite::Error::Protocol(
            tungstenite::error::ProtocolError::ResetWithoutClosingHandshake
            | tungstenite::error::ProtocolError::HandshakeIncomplete,
        ) => (ConnectErrorKind::Closed, "connection closed without a close frame".to_owned()),
        tungstenite::Error::Http(answer) => {
            let reason = answer.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default();
            let reason: String = reason.lines().next().unwrap_or_default().chars().take(200).collect();
            (ConnectErrorKind::Denied, format!("server answered {} {reason:?}", answer.status()))
        }
        error @ (tungstenite::Error::Tls(_)
        | tungstenite::Error::Capacity(_)
        | tungstenite::Error::Protocol(_)
        | tungstenite::Error::WriteBufferFull(_)
        | tungstenite::Error::Utf8(_)
        | tungstenite::Error::AttackAttempt
        | tungstenite::Error::Url(_)
        | tungstenite::Error::HttpFormat(_)) => (ConnectErrorKind::Protocol, error.to_string()),
    };
    ConnectError::new(kind, format!("{operation}: {text}"))
}
