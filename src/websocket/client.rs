//! Connection of one client, from the upgrade to its closing.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Error, Message, Utf8Bytes};

use super::rate_limit::RateLimit;
use super::trace::{ClientMessage, ClientTrace};
use crate::config::WebSocketRules;
use crate::metrics::websocket::{CloseReason, WebSocketSeries};

/// Maximum time for which a client may leave sent data unread; then it is disconnected. The same as for HTTP.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum duration of the closing handshake. Chosen: several round trips of any network, and less than the
/// shortest grace period of the HTTP server.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Initial size of a client's read buffer. It grows for longer messages.
const READ_BYTES: usize = 4 << 10;

/// Space in the write buffer for pongs besides a message.
const CONTROL_BYTES: usize = 1 << 10;

/// Limits of a client, fixed when it connects.
#[derive(Debug, Clone)]
pub(super) struct ClientRules {
    messages_per_second: u32,
    message_bytes_max: usize,
    idle_timeout: Duration,
    /// Whether messages are no longer echoed.
    is_muted: Arc<AtomicBool>,
}

impl ClientRules {
    pub(super) fn of(rules: &WebSocketRules, is_muted: &Arc<AtomicBool>) -> Self {
        Self {
            messages_per_second: rules.messages_per_second,
            message_bytes_max: rules.message_bytes_max,
            idle_timeout: rules.idle_timeout,
            is_muted: Arc::clone(is_muted),
        }
    }
}

/// The stream of a client after the handshake.
#[derive(Debug)]
pub(super) struct ClientStream<S> {
    pub(super) stream: S,
    /// What was read of it before, with the handshake.
    pub(super) read: Bytes,
}

/// Echoes all messages of a client until its stream ends or `close_requested` completes. Returns why the
/// connection ended.
pub(super) async fn serve<S>(
    ClientStream { stream, read }: ClientStream<S>,
    rules: ClientRules,
    series: &WebSocketSeries,
    trace: Option<ClientTrace>,
    close_requested: impl Future<Output = ()>,
) -> CloseReason
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // The write buffer is empty when a message is read, so a message and its header always fit.
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(rules.message_bytes_max + CONTROL_BYTES)
        .max_message_size(Some(rules.message_bytes_max))
        .max_frame_size(Some(rules.message_bytes_max));
    let socket = WebSocketStream::from_partially_read(stream, read.into(), Role::Server, Some(config)).await;
    let mut client = Client { socket, rules, series, trace };
    let closing = tokio::select! {
        closing = client.echo() => closing,
        () = close_requested => Closing {
            close_reason: CloseReason::GoingAway,
            frame: Some((CloseCode::Away, "going away")),
        },
    };
    let close_reason = closing.close_reason;
    // Boxed, so that the state of the closing handshake does not enlarge the task while the client is
    // connected.
    let _ = Box::pin(timeout(CLOSE_TIMEOUT, client.finish(closing))).await;
    close_reason
}

struct Client<'a, S> {
    socket: WebSocketStream<S>,
    rules: ClientRules,
    series: &'a WebSocketSeries,
    /// `None`: the client is not traced, or has received everything.
    trace: Option<ClientTrace>,
}

/// Why a connection ends, and the close frame to send.
struct Closing {
    close_reason: CloseReason,
    frame: Option<(CloseCode, &'static str)>,
}

impl Closing {
    const fn without_frame(close_reason: CloseReason) -> Self {
        Self { close_reason, frame: None }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<'_, S> {
    async fn echo(&mut self) -> Closing {
        let idle = self.rules.idle_timeout;
        let mut rate_limit = RateLimit::new(self.rules.messages_per_second, Instant::now());
        let (mut last_received, mut is_ping_pending) = (Instant::now(), false);
        // Compared with `last_received` when it fires: resetting it for each message would cost more than the
        // message.
        let mut idle_timer = pin!(sleep_until(last_received + idle / 2));
        loop {
            let message = tokio::select! {
                biased;
                message = self.socket.next() => message,
                message = next_trace_message(&mut self.trace) => {
                    let outcome = match message {
                        Ok(Some(message)) => self.write(message).await,
                        Ok(None) => Ok(()),
                        Err(closing) => Err(closing),
                    };
                    if let Err(closing) = outcome {
                        return closing;
                    }
                    continue;
                }
                () = idle_timer.as_mut() => {
                    if is_ping_pending {
                        let frame = Some((CloseCode::Away, "idle"));
                        return Closing { close_reason: CloseReason::Idle, frame };
                    }
                    if last_received.elapsed() < idle / 2 {
                        idle_timer.as_mut().reset(last_received + idle / 2);
                        continue;
                    }
                    if let Err(closing) = self.write(Message::Ping(Bytes::new())).await {
                        return closing;
                    }
                    // Counts from now, because this process may itself have been paused, and every client has
                    // the same time to reply.
                    is_ping_pending = true;
                    idle_timer.as_mut().reset(Instant::now() + idle / 2);
                    continue;
                }
            };
            (last_received, is_ping_pending) = (Instant::now(), false);
            let outcome = match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    if self.rules.is_muted.load(Relaxed) {
                        // Wait for the close request.
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
                // The library has queued the pong; write it before reading more.
                Some(Ok(Message::Ping(_))) => self.flush().await,
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => Ok(()),
                Some(Ok(Message::Close(_))) | None => Err(Closing::without_frame(CloseReason::Client)),
                Some(Err(error)) => Err(closing_for(&error)),
            };
            if let Err(closing) = outcome {
                return closing;
            }
            let pause = rate_limit.take(last_received);
            if !pause.is_zero() {
                sleep(pause).await;
            }
        }
    }

    async fn write(&mut self, message: Message) -> Result<(), Closing> {
        written(timeout(STALL_TIMEOUT, self.socket.send(message)).await)
    }

    async fn flush(&mut self) -> Result<(), Closing> {
        written(timeout(STALL_TIMEOUT, self.socket.flush()).await)
    }

    /// Performs the closing handshake.
    async fn finish(mut self, closing: Closing) {
        if let Some((code, reason)) = closing.frame {
            let frame = CloseFrame { code, reason: Utf8Bytes::from_static(reason) };
            if self.socket.close(Some(frame)).await.is_err() {
                return;
            }
        }
        match closing.close_reason {
            // Further messages are not echoed.
            CloseReason::Client | CloseReason::Idle | CloseReason::GoingAway => {
                while let Some(Ok(_)) = self.socket.next().await {}
            }
            // The data can no longer be parsed, but must be read: closing with unread data resets the
            // connection, and the close frame is lost.
            CloseReason::TooLarge | CloseReason::Protocol => {
                let stream = self.socket.get_mut();
                let mut unread = vec![0; READ_BYTES];
                if stream.shutdown().await.is_ok() {
                    while stream.read(&mut unread).await.is_ok_and(|count| count > 0) {}
                }
            }
            // The client does not read, or what is sent does not arrive.
            CloseReason::Stalled | CloseReason::Error => return,
        }
        let _ = self.socket.get_mut().shutdown().await;
    }
}

/// The next message of the client's trace; never, if it is not traced. `None`: nothing to write.
///
/// # Errors
/// If the trace asks for the connection to be closed.
async fn next_trace_message(trace: &mut Option<ClientTrace>) -> Result<Option<Message>, Closing> {
    let Some(ClientTrace { messages, is_asked }) = trace else { return pending().await };
    match messages.recv().await {
        Some(ClientMessage::Update(update)) => Ok(is_asked.then(|| Message::text(json!(update).to_string()))),
        Some(ClientMessage::Ping) => Ok(Some(Message::Ping(Bytes::new()))),
        Some(ClientMessage::Close) => Err(Closing {
            close_reason: CloseReason::Stalled,
            frame: Some((CloseCode::Error, "the connection has stalled")),
        }),
        None => {
            *trace = None;
            Ok(None)
        }
    }
}

fn written(outcome: Result<Result<(), Error>, tokio::time::error::Elapsed>) -> Result<(), Closing> {
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(closing_for(&error)),
        Err(_) => Err(Closing::without_frame(CloseReason::Stalled)),
    }
}

fn closing_for(error: &Error) -> Closing {
    let (close_reason, code, reason) = match error {
        Error::Capacity(_) => (CloseReason::TooLarge, CloseCode::Size, "message too large"),
        Error::Utf8(_) => (CloseReason::Protocol, CloseCode::Invalid, "text is not UTF-8"),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            return Closing::without_frame(CloseReason::Error);
        }
        Error::Protocol(_) => (CloseReason::Protocol, CloseCode::Protocol, "protocol error (RFC 6455)"),
        // The kernel also detects stalls (TCP_USER_TIMEOUT).
        Error::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            return Closing::without_frame(CloseReason::Stalled);
        }
        Error::Io(_)
        | Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Tls(_)
        | Error::WriteBufferFull(_)
        | Error::AttackAttempt
        | Error::Url(_)
        | Error::Http(_)
        | Error::HttpFormat(_) => return Closing::without_frame(CloseReason::Error),
    };
    Closing { close_reason, frame: Some((code, reason)) }
}
