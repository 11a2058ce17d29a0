//! Echo over HTTP: one request at a time over a connection that is kept, or made again where the server does not keep it.

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
use super::http_target::{AGENT, HttpTarget, RawConnection};
use super::link_event::{LinkEvent, SendOutcome};
use super::tcp_info::TcpInfoReader;
use crate::clock::Clock;
use crate::http::client::TlsClient;
use crate::metrics::stream::{ConnectErrorKind, UnexpectedResponse};

/// What an answer must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedResponse {
    /// Any of these; empty: 200 to 299.
    pub status: Vec<u16>,
    /// Text that the body contains; `None`: any body.
    pub body: Option<String>,
    /// Whether it is an agent that answers, which says what its own part of the round trip was.
    pub is_agent: bool,
}

/// Bytes of a body that are looked at. Chosen: a health page is shorter.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Bytes of a body that are read at all; then the connection is ended. Chosen: a page that is nobody's health.
const BODY_BYTES_READ: usize = 1024 * 1024;

/// One connection.
pub(super) struct HttpLink {
    sender: SendRequest<Full<bytes::Bytes>>,
    connection: Connection<TokioIo<RawConnection>, Full<bytes::Bytes>>,
    /// How the connection ended, if it has.
    ended: Option<hyper::Result<()>>,
    to: SocketAddr,
    place: HttpTarget,
    expected: ExpectedResponse,
    state: ExchangeState,
    /// Answers that came over it.
    answers: u64,
    pub(super) gauge: TcpInfoReader,
}

impl fmt::Debug for HttpLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpLink").field("to", &self.to).field("state", &self.state).finish_non_exhaustive()
    }
}

/// How far the exchange has come.
enum ExchangeState {
    /// Nothing was asked.
    Idle,
    /// This is to be asked as soon as the connection takes it.
    Asking(Message, Box<Request<Full<bytes::Bytes>>>),
    /// The answer's head is awaited.
    Asked(Message, PendingResponse),
    /// The rest of its body is awaited.
    Answered(ReadingBody),
}

impl fmt::Debug for ExchangeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "Idle",
            Self::Asking(..) => "Asking",
            Self::Asked(..) => "Asked",
            Self::Answered(_) => "Answered",
        })
    }
}

type PendingResponse = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

struct ReadingBody {
    message: Message,
    /// When the head was there.
    at: Timestamp,
    status: StatusCode,
    body: Incoming,
    /// The beginning of the body.
    read: Vec<u8>,
    /// Bytes of it that came.
    length: usize,
}

/// What an agent says of a ping.
#[derive(Debug, Deserialize)]
struct AgentTurnaround {
    turnaround_nanoseconds: i64,
}

pub(super) async fn begin(
    stream: RawConnection,
    gauge: TcpInfoReader,
    to: SocketAddr,
    place: HttpTarget,
    expected: ExpectedResponse,
) -> Result<Box<HttpLink>, ConnectError> {
    let begun = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) =
        begun.map_err(|error| trouble(&format!("asking {to}"), place.secure.as_ref(), &error))?;
    let (state, ended) = (ExchangeState::Idle, None);
    Ok(Box::new(HttpLink { sender, connection, ended, to, place, expected, state, answers: 0, gauge }))
}

impl HttpLink {
    pub(super) fn send(&mut self, message: Message) -> Result<SendOutcome, ConnectError> {
        let doing = || format!("asking {}", self.to);
        let mut request = Request::get(self.place.path.as_str())
            .header(HOST, self.place.authority.as_str())
            .header(USER_AGENT, AGENT)
            .header(ACCEPT, "*/*")
            .body(bytes::Bytes::new())
            .map_err(|error| {
                ConnectError::new(ConnectErrorKind::Protocol, format!("{}: {error}", doing()))
            })?;
        if let Some(signer) = &self.place.signer {
            signer
                .sign(&mut request, SystemTime::now())
                .map_err(|error| ConnectError::at_once(&doing(), &io::Error::other(error.to_string())))?;
        }
        self.state = ExchangeState::Asking(message, Box::new(request.map(Full::new)));
        Ok(SendOutcome { left: None, has_room: true })
    }

    pub(super) fn poll_hear(&mut self, context: &mut Context<'_>) -> Poll<LinkEvent> {
        if self.ended.is_none()
            && let Poll::Ready(ended) = Pin::new(&mut self.connection).poll(context)
        {
            self.ended = Some(ended);
        }
        if let ExchangeState::Asking(..) = self.state {
            match ready!(self.sender.poll_ready(context)) {
                Ok(()) => self.ask(),
                Err(error) => return Poll::Ready(self.unanswered(&error)),
            }
            // It sets out with the next look at the connection.
            context.waker().wake_by_ref();
        }
        if let ExchangeState::Asked(message, pending) = &mut self.state {
            let message = *message;
            match ready!(pending.as_mut().poll(context)) {
                Ok(response) => {
                    let status = response.status();
                    let body = response.into_body();
                    let at = Clock::now();
                    self.state = ExchangeState::Answered(ReadingBody {
                        message,
                        at,
                        status,
                        body,
                        read: Vec::new(),
                        length: 0,
                    });
                }
                Err(error) => return Poll::Ready(self.unanswered(&error)),
            }
        }
        if let ExchangeState::Answered(answering) = &mut self.state {
            let read = ready!(answering.poll_read(context));
            self.answers += 1;
            if answering.length > BODY_BYTES_READ {
                self.ended = Some(Ok(()));
            }
            let heard = match read {
                Ok(()) => self.judge(),
                Err(error) => self.broken("reading from", &error),
            };
            self.state = ExchangeState::Idle;
            return Poll::Ready(heard);
        }
        match self.ended.take() {
            None => Poll::Pending,
            Some(Ok(())) => {
                let text = format!("{} closed the connection", self.to);
                Poll::Ready(LinkEvent::End(ConnectError::new(ConnectErrorKind::Closed, text)))
            }
            Some(Err(error)) => Poll::Ready(self.broken("waiting for", &error)),
        }
    }

    fn ask(&mut self) {
        if let ExchangeState::Asking(message, request) = mem::replace(&mut self.state, ExchangeState::Idle) {
            self.state = ExchangeState::Asked(message, Box::pin(self.sender.send_request(*request)));
        }
    }

    /// The connection ended before anything came back. Servers close connections that were idle, and one that does so while
    /// we ask has not seen the request: it may be asked again (RFC 9110 section 9.2.2), over another connection.
    fn unanswered(&self, error: &hyper::Error) -> LinkEvent {
        let trouble = trouble(&format!("asking {}", self.to), self.place.secure.as_ref(), error);
        match &self.state {
            ExchangeState::Asking(message, _) | ExchangeState::Asked(message, _)
                if self.answers > 0
                    && matches!(trouble.why, ConnectErrorKind::Closed | ConnectErrorKind::Reset) =>
            {
                LinkEvent::Stale(*message, trouble)
            }
            ExchangeState::Asking(..)
            | ExchangeState::Asked(..)
            | ExchangeState::Idle
            | ExchangeState::Answered(_) => LinkEvent::End(trouble),
        }
    }

    fn broken(&self, doing: &str, error: &hyper::Error) -> LinkEvent {
        LinkEvent::End(trouble(&format!("{doing} {}", self.to), self.place.secure.as_ref(), error))
    }

    /// What a whole answer is worth.
    fn judge(&self) -> LinkEvent {
        let ExchangeState::Answered(answering) = &self.state else { unreachable!("it was just read") };
        let ExpectedResponse { status, body, is_agent } = &self.expected;
        let code = answering.status.as_u16();
        let is_status =
            if status.is_empty() { answering.status.is_success() } else { status.contains(&code) };
        let has = |text: &String| answering.read.windows(text.len()).any(|part| part == text.as_bytes());
        let unexpected = match (is_status, body.as_ref().is_none_or(has)) {
            (false, _) => Some(UnexpectedResponse::Status),
            (true, false) => Some(UnexpectedResponse::Body),
            (true, true) => None,
        };
        let pong =
            is_agent.then(|| serde_json::from_slice::<AgentTurnaround>(&answering.read).ok()).flatten();
        if *is_agent && pong.is_none() {
            let text = format!("{} answered {} to a ping", self.to, answering.status);
            return LinkEvent::End(ConnectError::new(ConnectErrorKind::Denied, text));
        }
        let turnaround = pong.map_or(0, |pong| pong.turnaround_nanoseconds);
        let (message, at, by) = (answering.message, answering.at, TimestampSource::User);
        LinkEvent::Page(StreamReply { message, at, by, turnaround }, unexpected)
    }
}

impl ReadingBody {
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

fn trouble(doing: &str, secure: Option<&TlsClient>, error: &hyper::Error) -> ConnectError {
    if let Some(trouble) = ConnectError::of_tls(doing, secure, error) {
        return trouble;
    }
    let io = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    match io {
        Some(error) => ConnectError::on_the_way(doing, error),
        None if error.is_incomplete_message() || error.is_closed() || error.is_canceled() => {
            ConnectError::new(ConnectErrorKind::Closed, format!("{doing}: closed before the answer"))
        }
        None => ConnectError::new(ConnectErrorKind::Protocol, format!("{doing}: {error}")),
    }
}
