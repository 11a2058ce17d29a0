//! One client, from the upgrade to its end.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Error, Message, Utf8Bytes};

use super::rate_limit::RateLimit;
use crate::config::WebSocketRules;
use crate::metrics::websocket::{CloseReason, WebSocketSeries};

/// How long a client may leave unread what was sent to it; then it is dropped. The same as HTTP's.
pub(super) const STALL: Duration = Duration::from_secs(30);

/// How long we wait for a client's part of the closing handshake. Chosen: some round trips of any network, and less than the
/// shortest grace that HTTP has.
pub(super) const LINGER: Duration = Duration::from_secs(2);

/// What is read at once. Every client has such a buffer; one that sends longer messages is given a longer one.
const READ_BYTES: usize = 4 << 10;

/// Room for our answers to pings beside a message.
const CONTROL_BYTES: usize = 1 << 10;

/// What a client may do; fixed when it connects.
#[derive(Debug, Clone)]
pub(super) struct ClientRules {
    messages_per_second: u32,
    message_bytes_max: usize,
    idle_timeout: Duration,
    /// True from when nobody is answered any more.
    silent: Arc<AtomicBool>,
}

impl ClientRules {
    pub(super) fn of(rules: &WebSocketRules, silent: &Arc<AtomicBool>) -> Self {
        Self {
            messages_per_second: rules.messages_per_second,
            message_bytes_max: rules.message_bytes_max,
            idle_timeout: rules.idle_timeout,
            silent: Arc::clone(silent),
        }
    }
}

/// Sends everything back that comes from `stream`, until it ends or is `dismissed`.
pub(super) async fn serve<S>(
    stream: S,
    terms: ClientRules,
    series: &WebSocketSeries,
    dismissed: impl Future<Output = ()>,
) -> CloseReason
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Nothing is left to be written when a message is read, so that a message and its header find room.
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(terms.message_bytes_max + CONTROL_BYTES)
        .max_message_size(Some(terms.message_bytes_max))
        .max_frame_size(Some(terms.message_bytes_max));
    let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    let mut client = Client { socket, terms, series };
    let end = tokio::select! {
        end = client.echo() => end,
        () = dismissed => Closing { ending: CloseReason::GoingAway, said: Some((CloseCode::Away, "going away")) },
    };
    let ending = end.ending;
    // Most of the time a client is not about to end: what that takes is kept elsewhere.
    let _ = Box::pin(timeout(LINGER, client.finish(end))).await;
    ending
}

struct Client<'a, S> {
    socket: WebSocketStream<S>,
    terms: ClientRules,
    series: &'a WebSocketSeries,
}

/// How it ends, and what the client is to be told.
struct Closing {
    ending: CloseReason,
    said: Option<(CloseCode, &'static str)>,
}

impl Closing {
    const fn silent(ending: CloseReason) -> Self {
        Self { ending, said: None }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<'_, S> {
    async fn echo(&mut self) -> Closing {
        let idle = self.terms.idle_timeout;
        let mut rate_limit = RateLimit::new(self.terms.messages_per_second, Instant::now());
        let (mut heard, mut is_asked) = (Instant::now(), false);
        // Looks at `heard` when it rings, for setting it anew with each message would cost more than the message.
        let mut alarm = pin!(sleep_until(heard + idle / 2));
        loop {
            let message = tokio::select! {
                biased;
                message = self.socket.next() => message,
                () = alarm.as_mut() => {
                    if is_asked {
                        return Closing { ending: CloseReason::Idle, said: Some((CloseCode::Away, "idle")) };
                    }
                    if heard.elapsed() < idle / 2 {
                        alarm.as_mut().reset(heard + idle / 2);
                        continue;
                    }
                    if let Err(end) = self.write(Message::Ping(Bytes::new())).await {
                        return end;
                    }
                    // From now on: the silence may have been ours, and everybody has as long to answer.
                    is_asked = true;
                    alarm.as_mut().reset(Instant::now() + idle / 2);
                    continue;
                }
            };
            (heard, is_asked) = (Instant::now(), false);
            let outcome = match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    if self.terms.silent.load(Relaxed) {
                        // Until it is dismissed.
                        pending::<()>().await;
                    }
                    let bytes = message.len() as u64;
                    let written = self.write(message).await;
                    if written.is_ok() {
                        self.series.messages.inc();
                        self.series.bytes.add(bytes);
                    }
                    written
                }
                // The answer is made by the protocol's own code, and written before more is read.
                Some(Ok(Message::Ping(_))) => self.flush().await,
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => Ok(()),
                Some(Ok(Message::Close(_))) | None => Err(Closing::silent(CloseReason::Client)),
                Some(Err(error)) => Err(end_by(&error)),
            };
            if let Err(end) = outcome {
                return end;
            }
            let pause = rate_limit.take(heard);
            if !pause.is_zero() {
                sleep(pause).await;
            }
        }
    }

    async fn write(&mut self, message: Message) -> Result<(), Closing> {
        written(timeout(STALL, self.socket.send(message)).await)
    }

    async fn flush(&mut self) -> Result<(), Closing> {
        written(timeout(STALL, self.socket.flush()).await)
    }

    /// The closing handshake.
    async fn finish(mut self, end: Closing) {
        if let Some((code, reason)) = end.said {
            let frame = CloseFrame { code, reason: Utf8Bytes::from_static(reason) };
            if self.socket.close(Some(frame)).await.is_err() {
                return;
            }
        }
        match end.ending {
            // What still comes is not sent back.
            CloseReason::Client | CloseReason::Idle | CloseReason::GoingAway => {
                while let Some(Ok(_)) = self.socket.next().await {}
            }
            // It can no longer be understood. It is read all the same: closing a connection on what was not read resets it,
            // and our last words are lost.
            CloseReason::TooLarge | CloseReason::Protocol => {
                let stream = self.socket.get_mut();
                let mut unread = vec![0; READ_BYTES];
                if stream.shutdown().await.is_ok() {
                    while stream.read(&mut unread).await.is_ok_and(|count| count > 0) {}
                }
            }
            // Nobody would take it.
            CloseReason::Stalled | CloseReason::Error => return,
        }
        let _ = self.socket.get_mut().shutdown().await;
    }
}

fn written(outcome: Result<Result<(), Error>, tokio::time::error::Elapsed>) -> Result<(), Closing> {
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(end_by(&error)),
        Err(_) => Err(Closing::silent(CloseReason::Stalled)),
    }
}

fn end_by(error: &Error) -> Closing {
    let (ending, code, reason) = match error {
        Error::Capacity(_) => (CloseReason::TooLarge, CloseCode::Size, "the message is too large"),
        Error::Utf8(_) => (CloseReason::Protocol, CloseCode::Invalid, "the text is not UTF-8"),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            return Closing::silent(CloseReason::Error);
        }
        Error::Protocol(_) => (CloseReason::Protocol, CloseCode::Protocol, "not WebSocket as in RFC 6455"),
        // The kernel knows of a stall as well (TCP_USER_TIMEOUT).
        Error::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            return Closing::silent(CloseReason::Stalled);
        }
        Error::Io(_)
        | Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Tls(_)
        | Error::WriteBufferFull(_)
        | Error::AttackAttempt
        | Error::Url(_)
        | Error::Http(_)
        | Error::HttpFormat(_) => return Closing::silent(CloseReason::Error),
    };
    Closing { ending, said: Some((code, reason)) }
}
