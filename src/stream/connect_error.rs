//! Connection errors.

use std::error::Error;
use std::io;

use pathmeter_proto::machine::NotSent;

use crate::datagram::not_sent_reason;
use crate::http::client::TlsClient;
use crate::metrics::stream::ConnectErrorKind;

/// Why a connection could not be made or has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(super) struct ConnectError {
    pub(super) kind: ConnectErrorKind,
    /// The local cause, if this host is the cause: messages then count as not sent instead of lost.
    pub(super) not_sent: Option<NotSent>,
    /// The error text for logs.
    pub(super) text: String,
}

impl ConnectError {
    pub(super) fn new(kind: ConnectErrorKind, text: impl Into<String>) -> Self {
        Self { kind, not_sent: None, text: text.into() }
    }

    /// Converts an I/O error on a connection. `operation` names the operation and the address.
    pub(super) fn from_io(operation: &str, error: &io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => ConnectErrorKind::Refused,
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => ConnectErrorKind::Unreachable,
            Some(libc::ETIMEDOUT) => ConnectErrorKind::Timeout,
            None if error.kind() == io::ErrorKind::UnexpectedEof => ConnectErrorKind::Closed,
            // These kinds come from protocol libraries, not from the kernel.
            None if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => {
                ConnectErrorKind::Protocol
            }
            Some(_) | None => ConnectErrorKind::Reset,
        };
        Self::new(kind, format!("{operation}: {error}"))
    }

    /// The TLS cause of an error on an established connection; `None` if there is none. In TLS 1.3 a server
    /// rejects a client certificate only after the handshake. `error` is the error of a read or write.
    pub(super) fn of_tls(
        operation: &str,
        secure: Option<&TlsClient>,
        error: &(dyn Error + 'static),
    ) -> Option<Self> {
        let explained = secure?.connector.explain(error)?;
        Some(Self::new(ConnectErrorKind::Tls, format!("{operation}: {explained}")))
    }

    /// Converts an error that the kernel returned immediately, which is a local cause except for
    /// ECONNREFUSED.
    pub(super) fn local(operation: &str, error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            return Self::from_io(operation, error);
        }
        Self {
            kind: ConnectErrorKind::Local,
            not_sent: Some(not_sent_reason(error)),
            text: format!("{operation}: {error}"),
        }
    }
}
