//! Datagrams that are queued for sending.

use pathmeter_proto::machine::{NotSent, Send};

/// Datagrams that tasks want to send, stored back to back in one arena.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pub(super) arena: Vec<u8>,
    pub(super) queued: Vec<Outgoing>,
}

/// A queued datagram.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outgoing {
    pub(super) slot: usize,
    pub(super) generation: u32,
    pub(super) group: usize,
    pub(super) send: Send,
    /// Its offset in the arena.
    pub(super) offset: usize,
    pub(super) length: usize,
}

/// Capacity of the outbox, which is sent as one batch; a full outbox is sent before further datagrams are
/// queued.
pub(super) const OUTBOX_MAX: usize = 64;

impl Outbox {
    pub(super) fn is_full(&self) -> bool {
        self.queued.len() >= OUTBOX_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queued.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.arena.clear();
        self.queued.clear();
    }
}

/// Maps a send error of the kernel to a reason for [`NotSent`].
pub(crate) fn not_sent_reason(error: &std::io::Error) -> NotSent {
    match error.raw_os_error() {
        Some(
            libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EHOSTDOWN | libc::EADDRNOTAVAIL,
        ) => NotSent::Unreachable,
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => NotSent::Buffer,
        Some(libc::EPERM | libc::EACCES) => NotSent::Permission,
        Some(libc::EMSGSIZE) => NotSent::TooBig,
        _ => NotSent::Other,
    }
}
