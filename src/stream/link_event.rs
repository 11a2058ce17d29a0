//! What comes of a connection.

use pathmeter_proto::echo::{Mismatch, StreamReply};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Message;

use super::connect_error::ConnectError;
use crate::metrics::stream::UnexpectedResponse;

/// What came of a connection.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// An answer.
    Reply(StreamReply),
    /// An answer, which may be another one than was expected.
    Response(StreamReply, Option<UnexpectedResponse>),
    /// Something that is no answer.
    Mismatch(Mismatch),
    /// There is room for messages again.
    Writable,
    /// Something that is between the libraries.
    Ignored,
    /// Its end.
    Closed(ConnectError),
    /// Its end, which the other side had decided on before it could see this message.
    ClosedUnsent(Message, ConnectError),
}

/// What became of a message that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SendOutcome {
    /// When the kernel let it go, if it did so while it was handed over and says so.
    pub(super) sent_at: Option<Timestamp>,
    /// Whether there is room for another one.
    pub(super) has_room: bool,
}
