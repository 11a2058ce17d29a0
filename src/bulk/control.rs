//! Messages on a connection of a run.

use std::io;
use std::time::Duration;

use pathmeter_proto::bandwidth::RunEnd;
use pathmeter_proto::wire::DecodeError;
use pathmeter_proto::wire::bandwidth::{ActivationStatus, MESSAGE_BYTES, MessageSeal, RunMessage};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A connection that carries messages in both directions.
#[derive(Debug)]
pub(super) struct Control {
    stream: TcpStream,
    sent: MessageSeal,
    received: MessageSeal,
    /// The beginning of the next message.
    partial: [u8; MESSAGE_BYTES],
    filled: usize,
}

/// Why a message cannot be received.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    /// The connection has ended.
    #[error("the connection has ended")]
    Ended,
    /// The connection has failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is not a message of this run.
    #[error("a message {0}")]
    Invalid(#[from] DecodeError),
    /// It took too long.
    #[error("no message within {after:?}", after = MESSAGE_TIME_MAX)]
    Timeout,
}

/// How long a message may take to be written or, when one is expected, to be received. Chosen: several round
/// trips of a slow path under load.
pub(super) const MESSAGE_TIME_MAX: Duration = Duration::from_secs(5);

impl Control {
    /// A new connection at the prober.
    pub(super) fn opened(stream: TcpStream, secret: &[u8; 16]) -> Self {
        let (sent, received) =
            (MessageSeal::new(secret, RunEnd::Prober), MessageSeal::new(secret, RunEnd::Responder));
        Self { stream, sent, received, partial: [0; MESSAGE_BYTES], filled: 0 }
    }

    /// A connection at the responder, with the seal that has verified its first message.
    pub(super) fn accepted(stream: TcpStream, secret: &[u8; 16], received: MessageSeal) -> Self {
        let sent = MessageSeal::new(secret, RunEnd::Responder);
        Self { stream, sent, received, partial: [0; MESSAGE_BYTES], filled: 0 }
    }

    /// Receives the next message. Can be cancelled without loss.
    pub(super) async fn receive(&mut self) -> Result<RunMessage, ControlError> {
        self.fill().await?;
        Ok(self.received.decode(&self.partial)?)
    }

    /// Reads the bytes of the next message.
    async fn fill(&mut self) -> Result<(), ControlError> {
        while self.filled < MESSAGE_BYTES {
            self.stream.readable().await?;
            match self.stream.try_read(&mut self.partial[self.filled..]) {
                Ok(0) => return Err(ControlError::Ended),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.filled = 0;
        Ok(())
    }

    /// Receives the next message within [`MESSAGE_TIME_MAX`].
    pub(super) async fn receive_soon(&mut self) -> Result<RunMessage, ControlError> {
        timeout(MESSAGE_TIME_MAX, self.receive()).await.unwrap_or(Err(ControlError::Timeout))
    }

    /// Receives the response to the activation. A refusal is not signed, because the responder may not know
    /// the secret.
    pub(super) async fn receive_activation(&mut self) -> Result<ActivationStatus, ControlError> {
        let received = timeout(MESSAGE_TIME_MAX, self.fill()).await.unwrap_or(Err(ControlError::Timeout));
        received?;
        match RunMessage::decode(&self.partial)? {
            RunMessage::Activated { status, .. } if status != ActivationStatus::Granted => Ok(status),
            RunMessage::Activated { .. } => self
                .received
                .decode(&self.partial)
                .map_or_else(|error| Err(error.into()), |_| Ok(ActivationStatus::Granted)),
            RunMessage::Activate { .. }
            | RunMessage::Start
            | RunMessage::Progress { .. }
            | RunMessage::Result(_)
            | RunMessage::Stop(_) => {
                Err(DecodeError::Unrecognized { field: "response to an activation" }.into())
            }
        }
    }

    /// Sends a message.
    pub(super) async fn send(&mut self, message: &RunMessage) -> Result<(), ControlError> {
        let bytes = self.sent.encode(message);
        timeout(MESSAGE_TIME_MAX, write_all(&self.stream, &bytes)).await.unwrap_or(Err(ControlError::Timeout))
    }

    /// The connection, to set its options.
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The connection, for payload.
    pub(super) fn into_stream(self) -> TcpStream {
        self.stream
    }
}

/// Writes bytes.
pub(super) async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> Result<(), ControlError> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
