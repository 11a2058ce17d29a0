//! Echo over HTTP: one request at a time over a persistent connection, which is reopened if the server closes
//! it.

use std::fmt;
use std::io;
use std::mem;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper::header::{ACCEPT, HOST, USER_AGENT};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use pathmeter_proto::echo::StreamReply;
use pathmeter_proto::machine::TimestampSource;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Message;
use serde::Deserialize;

use super::connect_error::ConnectError;
use super::http_target::{HttpTarget, RawConnection, USER_AGENT_VALUE};
use super::link_event::{LinkEvent, SendOutcome};
use super::tcp_info::TcpInfoReader;
use crate::clock::Clock;
use crate::http::client::TlsClient;
use crate::metrics::stream::{ConnectErrorKind, UnexpectedResponse};

/// Conditions that a response must meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedResponse {
    /// Accepted status codes; empty: 200 to 299.
    pub status: Vec<u16>,
    /// Text that the body must contain; `None`: any body.
    pub body: Option<String>,
    /// Whether the server is a pathmeter agent, whose responses contain its turnaround time.
    pub is_agent: bool,
}

/// Bytes of a body that are searched for the expected text. Chosen: health pages are shorter.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Bytes of a body that are read; a longer body ends the connection. Chosen: no health page is this long.
const BODY_BYTES_READ: usize = 1024 * 1024;

/// An HTTP connection.
pub(super) struct HttpLink {
    sender: SendRequest<Full<bytes::Bytes>>,
    connection: Connection<TokioIo<RawConnection>, Full<bytes::Bytes>>,
    /// How the connection ended; `None` while it is open.
    ended: Option<hyper::Result<()>>,
    to: SocketAddr,
    target: HttpTarget,
    expected: ExpectedResponse,
    state: ExchangeState,
    /// Responses received over this connection.
    responses: u64,
    pub(super) tcp_info: TcpInfoReader,
}

impl fmt::Debug for HttpLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpLink").field("to", &self.to).field("state", &self.state).finish_non_exhaustive()
    }
}

/// The state of the current exchange.
enum ExchangeState {
    /// No request is pending.
    Idle,
    /// The request is sent as soon as the connection accepts it.
    Queued(Message, Box<Request<Full<bytes::Bytes>>>),
    /// The request was sent; the head of the response is pending.
    AwaitingResponse(Message, PendingResponse),
    /// The head was received; the body is being read.
    ReadingBody(BodyReader),
}

impl fmt::Debug for ExchangeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "Idle",
            Self::Queued(..) => "Queued",
            Self::AwaitingResponse(..) => "AwaitingResponse",
            Self::ReadingBody(_) => "ReadingBody",
        })
    }
}

type PendingResponse = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

struct BodyReader {
    message: Message,
    /// When the head was received.
    at: Timestamp,
    status: StatusCode,
    body: Incoming,
    /// The first [`BODY_BYTES_MAX`] bytes of the body.
    read: Vec<u8>,
    /// Bytes of the body received so far.
    length: usize,
}

/// The response of an agent to a ping.
#[derive(Debug, Deserialize)]
struct AgentTurnaround {
    turnaround_nanoseconds: i64,
}

pub(super) async fn begin(
    stream: RawConnection,
    tcp_info: TcpInfoReader,
    to: SocketAddr,
    target: HttpTarget,
    expected: ExpectedResponse,
) -> Result<Box<HttpLink>, ConnectError> {
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.map_err(|error| {
        to_connect_error(&format!("HTTP request to {to}"), target.secure.as_ref(), &error)
    })?;
    let (state, ended) = (ExchangeState::Idle, None);
    Ok(Box::new(HttpLink { sender, connection, ended, to, target, expected, state, responses: 0, tcp_info }))
}

impl HttpLink {
    pub(super) fn send(&mut self, message: Message) -> Result<SendOutcome, ConnectError> {
        let operation = || format!("HTTP request to {}", self.to);
        let mut request = Request::get(self.target.path.as_str())
            .header(HOST, self.target.authority.as_str())
            .header(USER_AGENT, USER_AGENT_VALUE)
            .header(ACCEPT, "*/*")
            .body(bytes::Bytes::new())
            .map_err(|error| {
                ConnectError::new(ConnectErrorKind::Protocol, format!("{}: {error}", operation()))
            })?;
        if let Some(signer) = &self.target.signer {
            signer
                .sign(&mut request, SystemTime::now())
                .map_err(|error| ConnectError::local(&operation(), &io::Error::other(error.to_string())))?;
        }
        self.state = ExchangeState::Queued(message, Box::new(request.map(Full::new)));
        Ok(SendOutcome { sent_at: None, has_room: true })
    }

    pub(super) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<LinkEvent> {
        if self.ended.is_none()
            && let Poll::Ready(ended) = Pin::new(&mut self.connection).poll(context)
        {
            self.ended = Some(ended);
        }
        if let ExchangeState::Queued(..) = self.state {
            match ready!(self.sender.poll_ready(context)) {
                Ok(()) => self.send_request(),
                Err(error) => return Poll::Ready(self.closed_before_response(&error)),
            }
            // The connection sends the request when it is polled next.
            context.waker().wake_by_ref();
        }
        if let ExchangeState::AwaitingResponse(message, pending) = &mut self.state {
            let message = *message;
            match ready!(pending.as_mut().poll(context)) {
                Ok(response) => {
                    let status = response.status();
                    let body = response.into_body();
                    let at = Clock::now();
                    self.state = ExchangeState::ReadingBody(BodyReader {
                        message,
                        at,
                        status,
                        body,
                        read: Vec::new(),
                        length: 0,
                    });
                }
                Err(error) => return Poll::Ready(self.closed_before_response(&error)),
            }
        }
        if let ExchangeState::ReadingBody(reading) = &mut self.state {
            let read = ready!(reading.poll_read(context));
            self.responses += 1;
            if reading.length > BODY_BYTES_READ {
                self.ended = Some(Ok(()));
            }
            let event = match read {
                Ok(()) => self.evaluate(),
                Err(error) => self.closed("reading from", &error),
            };
            self.state = ExchangeState::Idle;
            return Poll::Ready(event);
        }
        match self.ended.take() {
            None => Poll::Pending,
            Some(Ok(())) => {
                let text = format!("{} closed the connection", self.to);
                Poll::Ready(LinkEvent::Closed(ConnectError::new(ConnectErrorKind::Closed, text)))
            }
            Some(Err(error)) => Poll::Ready(self.closed("waiting for a response from", &error)),
        }
    }

    fn send_request(&mut self) {
        if let ExchangeState::Queued(message, request) = mem::replace(&mut self.state, ExchangeState::Idle) {
            self.state =
                ExchangeState::AwaitingResponse(message, Box::pin(self.sender.send_request(*request)));
        }
    }

    /// The connection ended before a response. Servers close idle connections, and one that does so while a
    /// request is on its way has not processed it: the request may be sent again over another connection (RFC
    /// 9110 section 9.2.2).
    fn closed_before_response(&self, error: &hyper::Error) -> LinkEvent {
        let error =
            to_connect_error(&format!("HTTP request to {}", self.to), self.target.secure.as_ref(), error);
        match &self.state {
            ExchangeState::Queued(message, _) | ExchangeState::AwaitingResponse(message, _)
                if self.responses > 0
                    && matches!(error.kind, ConnectErrorKind::Closed | ConnectErrorKind::Reset) =>
            {
                LinkEvent::ClosedUnsent(*message, error)
            }
            ExchangeState::Queued(..)
            | ExchangeState::AwaitingResponse(..)
            | ExchangeState::Idle
            | ExchangeState::ReadingBody(_) => LinkEvent::Closed(error),
        }
    }

    fn closed(&self, operation: &str, error: &hyper::Error) -> LinkEvent {
        LinkEvent::Closed(to_connect_error(
            &format!("{operation} {}", self.to),
            self.target.secure.as_ref(),
            error,
        ))
    }

    /// Evaluates a complete response.
    fn evaluate(&self) -> LinkEvent {
        let ExchangeState::ReadingBody(reading) = &self.state else { unreachable!("the body was just read") };
        let ExpectedResponse { status, body, is_agent } = &self.expected;
        let code = reading.status.as_u16();
        let is_status = if status.is_empty() { reading.status.is_success() } else { status.contains(&code) };
        let has = |text: &String| reading.read.windows(text.len()).any(|part| part == text.as_bytes());
        let unexpected = match (is_status, body.as_ref().is_none_or(has)) {
            (false, _) => Some(UnexpectedResponse::Status),
            (true, false) => Some(UnexpectedResponse::Body),
            (true, true) => None,
        };
        let turnaround =
            is_agent.then(|| serde_json::from_slice::<AgentTurnaround>(&reading.read).ok()).flatten();
        if *is_agent && turnaround.is_none() {
            let text = format!("{} answered a ping with status {}", self.to, reading.status);
            return LinkEvent::Closed(ConnectError::new(ConnectErrorKind::Denied, text));
        }
        let turnaround = turnaround.map_or(0, |agent| agent.turnaround_nanoseconds);
        let (message, at, by) = (reading.message, reading.at, TimestampSource::User);
        LinkEvent::Response(StreamReply { message, at, by, turnaround }, unexpected)
    }
}

impl BodyReader {
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        loop {
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                Some(Ok(frame)) => {
                    let room = BODY_BYTES_MAX - self.read.len();
                    if let Some(data) = frame.data_ref() {
                        self.read.extend_from_slice(&data[..data.len().min(room)]);
                        self.length += data.len();
                        if self.length > BODY_BYTES_READ {
                            return Poll::Ready(Ok(()));
                        }
                    }
                }
            }
        }
    }
}

fn to_connect_error(operation: &str, secure: Option<&TlsClient>, error: &hyper::Error) -> ConnectError {
    if let Some(error) = ConnectError::of_tls(operation, secure, error) {
        return error;
    }
    let io = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    match io {
        Some(error) => ConnectError::from_io(operation, error),
        None if error.is_incomplete_message() || error.is_closed() || error.is_canceled() => {
            ConnectError::new(
                ConnectErrorKind::Closed,
                format!("{operation}: connection closed before the response"),
            )
        }
        None => ConnectError::new(ConnectErrorKind::Protocol, format!("{operation}: {error}")),
    }
}
