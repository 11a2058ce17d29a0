//! Events of a connection.

use pathmeter_proto::echo::{Mismatch, StreamReply};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Message;

use super::connect_error::ConnectError;
use crate::metrics::stream::UnexpectedResponse;

/// An event of a connection.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// A reply to a message.
    Reply(StreamReply),
    /// An HTTP response; `Some` if it does not meet the expectations.
    Response(StreamReply, Option<UnexpectedResponse>),
    /// A message that is not a valid reply.
    Mismatch(Mismatch),
    /// The connection accepts messages again.
    Writable,
    /// A control message that a library handles.
    Ignored,
    /// The connection ended.
    Closed(ConnectError),
    /// The connection ended, and the server closed it before it could process this message.
    ClosedUnsent(Message, ConnectError),
}

/// The result of sending a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SendOutcome {
    /// The transmit timestamp, if it was available immediately.
    pub(super) sent_at: Option<Timestamp>,
    /// Whether the connection accepts another message.
    pub(super) has_room: bool,
}
