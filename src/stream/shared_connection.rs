//! The connection of an echo path, as the path that traces it sees it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::kernel::{self, Delivery};

/// The connection of an echo path. A path that traces its packets watches it; both run on the stream loop.
/// While nobody watches, nothing is kept.
#[derive(Debug, Default)]
pub struct SharedConnection {
    watchers: AtomicUsize,
    /// Whether probes are sent on the connection.
    is_probed: AtomicBool,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Number of connections so far.
    opened: u64,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    /// A duplicate descriptor: while it is open, so is the connection.
    socket: OwnedFd,
    ends: ConnectionEnds,
}

/// The addresses and ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConnectionEnds {
    /// Which connection of the path it is, from 1.
    pub(super) number: u64,
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

impl SharedConnection {
    /// Whether probes of the path that traces the echoes are sent on their connection.
    #[must_use]
    pub fn is_probed(&self) -> bool {
        self.is_probed.load(Relaxed)
    }

    /// Whether a path that traces the echoes watches their connection, to send its probes on it.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.watchers.load(Relaxed) > 0
    }

    pub(super) fn set_probed(&self, is_probed: bool) {
        self.is_probed.store(is_probed, Relaxed);
    }

    /// Begins to watch the connection, until [`unwatch`](Self::unwatch).
    pub(super) fn watch(&self) {
        self.watchers.fetch_add(1, Relaxed);
    }

    pub(super) fn unwatch(&self) {
        self.watchers.fetch_sub(1, Relaxed);
        self.set_probed(false);
    }

    /// The echo path has a connection, of which `duplicate` makes another descriptor. Has no effect if it is
    /// known or nobody watches.
    pub(super) fn offer(&self, duplicate: impl FnOnce() -> Option<(OwnedFd, SocketAddr)>, peer: SocketAddr) {
        if !self.is_watched() {
            self.close();
            return;
        }
        let mut state = self.lock();
        if state.open.is_some() {
            return;
        }
        let Some((socket, local)) = duplicate() else { return };
        if peer.is_ipv6() {
            // Segments of a trace have the flow label 0, so the connection must, or they take another route.
            // Best effort: without it the route may be that of other packets, as with SYN.
            let _ = kernel::disable_flow_label(&socket);
        }
        state.opened += 1;
        let ends = ConnectionEnds { number: state.opened, local, peer };
        state.open = Some(Open { socket, ends });
        self.changed.notify_one();
    }

    /// The echo path closes its connection.
    pub(super) fn close(&self) {
        if self.lock().open.take().is_some() {
            self.changed.notify_one();
        }
    }

    /// The connection; `None`: there is none.
    pub(super) fn ends(&self) -> Option<ConnectionEnds> {
        self.lock().open.as_ref().map(|open| open.ends)
    }

    /// How the connection delivers data; `None` if there is none, or the kernel does not say.
    pub(super) fn delivery(&self) -> Option<Delivery> {
        kernel::delivery(&self.lock().open.as_ref()?.socket)
    }

    /// Waits until a connection is opened or closed.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
