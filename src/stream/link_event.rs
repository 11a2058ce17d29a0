//! What comes of a connection.

use pathmeter_proto::echo::{Answer, Mismatch};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Message;

use super::trouble::Trouble;
use crate::metrics::stream::Unexpected;

/// What came of a connection.
#[derive(Debug)]
pub(super) enum Heard {
    /// An answer.
    Answer(Answer),
    /// An answer, which may be another one than was expected.
    Page(Answer, Option<Unexpected>),
    /// Something that is no answer.
    Mismatch(Mismatch),
    /// There is room for messages again.
    Room,
    /// Something that is between the libraries.
    Nothing,
    /// Its end.
    End(Trouble),
    /// Its end, which the other side had decided on before it could see this message.
    Stale(Message, Trouble),
}

/// What became of a message that was handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handed {
    /// When the kernel let it go, if it did so while it was handed over and says so.
    pub(super) left: Option<Timestamp>,
    /// Whether there is room for another one.
    pub(super) has_room: bool,
}
