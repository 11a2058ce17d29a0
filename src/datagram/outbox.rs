//! Datagrams on their way to the kernel.

use pathmeter_proto::machine::{NotSent, Send};

/// Datagrams that machines have asked to send, back to back in one arena.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pub(super) arena: Vec<u8>,
    pub(super) queued: Vec<Outgoing>,
}

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outgoing {
    pub(super) slot: usize,
    pub(super) generation: u32,
    pub(super) group: usize,
    pub(super) send: Send,
    /// Where it stands in the arena.
    pub(super) at: usize,
    pub(super) length: usize,
}

/// Datagrams that are handed to the kernel at once; at the limit they are sent before more are made.
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

/// What the kernel's refusal means.
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
