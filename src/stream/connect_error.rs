//! Why there is no connection.

use std::error::Error;
use std::io;

use pathmeter_proto::machine::NotSent;

use crate::datagram::not_sent_reason;
use crate::http::client::TlsClient;
use crate::metrics::stream::ConnectErrorKind;

/// Why there is no connection, or no longer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(super) struct ConnectError {
    pub(super) kind: ConnectErrorKind,
    /// What our own host could not do, where it is to blame: then nothing is sent, and nothing lost.
    pub(super) not_sent: Option<NotSent>,
    /// A sentence for people.
    pub(super) text: String,
}

impl ConnectError {
    pub(super) fn new(kind: ConnectErrorKind, text: impl Into<String>) -> Self {
        Self { kind, not_sent: None, text: text.into() }
    }

    /// What an error on a connection means; `doing`: what, and with whom.
    pub(super) fn from_io(operation: &str, error: &io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => ConnectErrorKind::Refused,
            Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => ConnectErrorKind::Unreachable,
            Some(libc::ETIMEDOUT) => ConnectErrorKind::Timeout,
            None if error.kind() == io::ErrorKind::UnexpectedEof => ConnectErrorKind::Closed,
            // The kernel has no opinion on what was said: a library has.
            None if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => {
                ConnectErrorKind::Protocol
            }
            Some(_) | None => ConnectErrorKind::Reset,
        };
        Self::new(kind, format!("{operation}: {error}"))
    }

    /// What TLS has against a connection that was agreed on, as in version 1.3 a server that wants another certificate says
    /// only then; `None`: nothing. `error` is what came of reading or writing.
    pub(super) fn of_tls(
        operation: &str,
        secure: Option<&TlsClient>,
        error: &(dyn Error + 'static),
    ) -> Option<Self> {
        let explained = secure?.connector.explain(error)?;
        Some(Self::new(ConnectErrorKind::Tls, format!("{operation}: {explained}")))
    }

    /// What it means that the kernel refused at once.
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
