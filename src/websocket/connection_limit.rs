//! Limits on the number of clients, in total and per source.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};
use pathmeter_proto::admission::rate_limit_key;
use tokio::sync::Notify;

use crate::config::WebSocketRules;
use crate::metrics::websocket::WebSocketSeries;

/// Counts connected clients and enforces the limits. An IPv6 /64 is one source.
#[derive(Debug)]
pub(super) struct ConnectionLimit {
    open: Mutex<OpenConnections>,
    all_disconnected: Notify,
    series: Arc<WebSocketSeries>,
}

#[derive(Debug, Default)]
struct OpenConnections {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// The limit that was reached, with its number of clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LimitReached {
    /// `websocket.clients_max`.
    Total(usize),
    /// Limit of open files of this process.
    Descriptors(usize),
    /// `websocket.clients_per_source`.
    Source(usize),
}

impl ConnectionLimit {
    /// Returns a limit without clients. The number of clients is exported in `series`.
    pub(super) fn new(series: Arc<WebSocketSeries>) -> Self {
        Self { open: Mutex::default(), all_disconnected: Notify::new(), series }
    }

    /// Returns a permit for a client from `source`.
    ///
    /// # Errors
    /// [`LimitReached`].
    pub(super) fn take(
        self: &Arc<Self>,
        source: IpAddr,
        rules: &WebSocketRules,
    ) -> Result<ConnectionPermit, LimitReached> {
        let source = rate_limit_key(source);
        let mut open = self.open();
        if open.total >= rules.clients_max {
            return Err(LimitReached::Total(rules.clients_max));
        }
        let descriptor_limit = descriptor_limit();
        if open.total >= descriptor_limit {
            return Err(LimitReached::Descriptors(descriptor_limit));
        }
        let source_clients = open.by_source.get(&source).copied().unwrap_or(0);
        if source_clients >= rules.clients_per_source {
            return Err(LimitReached::Source(rules.clients_per_source));
        }
        open.by_source.insert(source, source_clients + 1);
        open.total += 1;
        self.series.clients.set(open.total as u64);
        Ok(ConnectionPermit { limit: Arc::clone(self), source })
    }

    /// Waits until no client is connected.
    pub(super) async fn all_disconnected(&self) {
        loop {
            let all_disconnected = self.all_disconnected.notified();
            if self.open().total == 0 {
                return;
            }
            all_disconnected.await;
        }
    }

    fn open(&self) -> MutexGuard<'_, OpenConnections> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Permit of one connected client. Dropping it frees the slot.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    limit: Arc<ConnectionLimit>,
    source: IpAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut open = self.limit.open();
        open.total -= 1;
        let remaining = open.by_source.remove(&self.source).unwrap_or(1) - 1;
        if remaining > 0 {
            open.by_source.insert(self.source, remaining);
        }
        self.limit.series.clients.set(open.total as u64);
        if open.total == 0 {
            self.limit.all_disconnected.notify_waiters();
        }
    }
}

/// Returns the number of clients that the limit of open files allows: three quarters of it. The rest is
/// reserved for probe sockets and HTTP connections.
pub(super) fn descriptor_limit() -> usize {
    getrlimit(Resource::RLIMIT_NOFILE)
        .map_or(usize::MAX, |(soft, _)| usize::try_from(soft / 4 * 3).unwrap_or(usize::MAX))
}
