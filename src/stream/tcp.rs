//! The client side of echo over TCP, with kernel timestamps.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pathmeter_proto::echo::{Mismatch, StreamReply};
use pathmeter_proto::key::Keys;
use pathmeter_proto::time::{Timestamp, WallTime};
use pathmeter_proto::wire::DecodeError;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::stream::{GREETING_BYTES, Hello, Seal, Welcome, WelcomeStatus};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use super::arrivals::Arrivals;
use super::connect_error::ConnectError;
use super::kernel;
use super::link_event::{LinkEvent, SendOutcome};
use crate::clock::Clock;
use crate::metrics::stream::{ConnectErrorKind, TcpInfo};

/// Interval of retries while the send buffer is full. (The runtime cannot be used for this: timestamps on the
/// error queue make the socket appear writable.) A message that waits for a full buffer is already late by
/// more than this.
const FULL_RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// A connection to a responder.
#[derive(Debug)]
pub(super) struct TcpLink {
    stream: TcpStream,
    to: SocketAddr,
    clock: Clock,
    seal: Seal,
    bytes: u32,
    /// Bytes that the kernel has not accepted yet.
    outgoing: Vec<u8>,
    /// Bytes that the kernel has accepted since timestamps were enabled, modulo 2³².
    written: u32,
    incoming: Vec<u8>,
    /// Bytes of the current reply received so far.
    filled: usize,
    arrivals: Arrivals,
    retry: Option<Pin<Box<Sleep>>>,
}

/// Exchanges greetings with the responder.
pub(super) async fn begin(
    mut stream: TcpStream,
    to: SocketAddr,
    bytes: u32,
    keys: Option<&Keys>,
) -> Result<Box<TcpLink>, ConnectError> {
    let operation = format!("greeting {to}");
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce)
        .map_err(|error| ConnectError::local(&operation, &io::Error::other(error.to_string())))?;
    let hello = Hello { message_bytes: bytes, nonce };
    let mut greeting = [0; GREETING_BYTES];
    let io_error = |error: io::Error| ConnectError::from_io(&operation, &error);
    stream.write_all(&hello.encode(keys)).await.map_err(io_error)?;
    stream.read_exact(&mut greeting).await.map_err(io_error)?;
    let key = keys.map(Keys::current);
    let welcome = Welcome::decode(&greeting, &hello, key).map_err(|error| match error {
        DecodeError::Unauthentic { .. } => ConnectError::new(
            ConnectErrorKind::Denied,
            format!("{operation}: unknown key: configure the same key file on both hosts"),
        ),
        DecodeError::Truncated { .. } | DecodeError::Unrecognized { .. } | DecodeError::Version { .. } => {
            ConnectError::new(ConnectErrorKind::Protocol, format!("{operation}: {error}"))
        }
    })?;
    let denied = |reason: &str| {
        Err(ConnectError::new(ConnectErrorKind::Denied, format!("{to} rejects this host: {reason}")))
    };
    match welcome.status {
        WelcomeStatus::Granted => {}
        WelcomeStatus::Unlisted => {
            return denied(
                "add this host's address to responder.allow there, or configure the same key file on both \
                 hosts",
            );
        }
        WelcomeStatus::Unauthentic => {
            return denied("unknown key: configure the same key file on both hosts");
        }
        WelcomeStatus::Full => return denied("its connection limit is reached"),
        WelcomeStatus::Length => return denied("it does not accept messages of this size"),
    }
    // Without kernel timestamps messages are timed by this process, and counted as such.
    let _ = kernel::request_timestamps(&stream);
    Ok(Box::new(TcpLink {
        stream,
        to,
        clock: Clock::new(),
        seal: Seal::of(key, &hello, &welcome),
        bytes,
        outgoing: Vec::new(),
        written: 0,
        incoming: vec![0; bytes as usize],
        filled: 0,
        arrivals: Arrivals::new(Clock::now()),
        retry: None,
    }))
}

impl TcpLink {
    pub(super) fn send(&mut self, message: Message) -> Result<SendOutcome, ConnectError> {
        let from = Clock::now();
        self.seal.request(message, self.bytes, &mut self.outgoing);
        let has_room = self.flush()?;
        let sent_at = if has_room { self.sent_at(from) } else { None };
        Ok(SendOutcome { sent_at, has_room })
    }

    /// The transmit timestamp of the last byte, if it is between `from` and now.
    fn sent_at(&mut self, from: Timestamp) -> Option<Timestamp> {
        let (now, _) = self.clock.read();
        let timestamp = kernel::tx_timestamp(&self.stream, self.written.wrapping_sub(1))?;
        let sent_at = self.clock.monotonic_of(timestamp, from, now);
        (from <= sent_at && sent_at <= now).then_some(sent_at)
    }

    /// Writes as much as the kernel accepts. Returns whether everything was written.
    fn flush(&mut self) -> Result<bool, ConnectError> {
        let mut written_bytes = 0;
        while written_bytes < self.outgoing.len() {
            // Not through the runtime, which may not have seen yet that the socket is writable.
            match nix::sys::socket::send(
                self.stream.as_raw_fd(),
                &self.outgoing[written_bytes..],
                nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
            ) {
                Ok(accepted) => written_bytes += accepted,
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(self.to_connect_error("writing to", &error.into())),
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "the kernel counts modulo 2³², too")]
        let accepted = written_bytes as u32;
        self.written = self.written.wrapping_add(accepted);
        self.outgoing.drain(..written_bytes);
        Ok(self.outgoing.is_empty())
    }

    pub(super) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<LinkEvent> {
        if !self.outgoing.is_empty() {
            match self.flush() {
                Ok(true) => {
                    self.retry = None;
                    return Poll::Ready(LinkEvent::Writable);
                }
                Ok(false) => self.retry_later(context),
                Err(error) => return Poll::Ready(LinkEvent::Closed(error)),
            }
        }
        loop {
            // Reads one reply at a time, so that the timestamp is that of its last byte.
            let room = &mut self.incoming[self.filled..];
            match self.arrivals.receive(&self.stream, room) {
                Ok((0, _)) => {
                    let text = format!("{} closed the connection", self.to);
                    return Poll::Ready(LinkEvent::Closed(ConnectError::new(ConnectErrorKind::Closed, text)));
                }
                Ok((count, timestamp)) => {
                    self.filled += count;
                    if self.filled == self.incoming.len() {
                        self.filled = 0;
                        return Poll::Ready(self.read_reply(timestamp));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Err(error) = ready!(self.stream.poll_read_ready(context)) {
                        return Poll::Ready(LinkEvent::Closed(self.to_connect_error("reading from", &error)));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Poll::Ready(LinkEvent::Closed(self.to_connect_error("reading from", &error)));
                }
            }
        }
    }

    fn retry_later(&mut self, context: &mut Context<'_>) {
        let retry = self.retry.get_or_insert_with(|| Box::pin(sleep(FULL_RETRY_INTERVAL)));
        if retry.as_mut().poll(context).is_ready() {
            let mut again = Box::pin(sleep(FULL_RETRY_INTERVAL));
            let _ = again.as_mut().poll(context);
            self.retry = Some(again);
        }
    }

    fn read_reply(&mut self, timestamp: Option<WallTime>) -> LinkEvent {
        let (at, by) = self.arrivals.arrival(&self.stream, timestamp, &mut self.clock);
        match self.seal.read_reply(&self.incoming) {
            Ok(echoed) => LinkEvent::Reply(StreamReply {
                message: echoed.message,
                at,
                by,
                turnaround: echoed.turnaround,
            }),
            Err(DecodeError::Unauthentic { .. }) => LinkEvent::Mismatch(Mismatch::Unauthentic),
            // The start of the next reply is unknown.
            Err(
                error @ (DecodeError::Truncated { .. }
                | DecodeError::Unrecognized { .. }
                | DecodeError::Version { .. }),
            ) => LinkEvent::Closed(ConnectError::new(
                ConnectErrorKind::Protocol,
                format!("reading from {}: {error}", self.to),
            )),
        }
    }

    pub(super) fn tcp_info(&self) -> Option<TcpInfo> {
        kernel::tcp_info(&self.stream)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    pub(super) fn source(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    fn to_connect_error(&self, operation: &str, error: &io::Error) -> ConnectError {
        ConnectError::from_io(&format!("{operation} {}", self.to), error)
    }
}
