//! How many clients there are, and from where.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};
use pathmeter_proto::admission::rate_limit_key;
use tokio::sync::Notify;

use crate::config::WebSocketRules;
use crate::metrics::websocket::WebSocketSeries;

/// The clients that are connected. An IPv6 /64 is one source.
#[derive(Debug)]
pub(super) struct ConnectionLimit {
    open: Mutex<OpenConnections>,
    emptied: Notify,
    series: Arc<WebSocketSeries>,
}

#[derive(Debug, Default)]
struct OpenConnections {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// Which limit is reached, and how many clients it allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LimitReached {
    /// There are as many clients as there may be.
    Total(usize),
    /// There are as many as our file descriptors allow.
    Descriptors(usize),
    /// The source has as many as one may.
    Source(usize),
}

impl ConnectionLimit {
    /// No clients; how many there are is counted in `series`.
    pub(super) fn new(series: Arc<WebSocketSeries>) -> Self {
        Self { open: Mutex::default(), emptied: Notify::new(), series }
    }

    /// A permit for a client from `source`.
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
        let room = room();
        if open.total >= room {
            return Err(LimitReached::Descriptors(room));
        }
        let of_source = open.by_source.get(&source).copied().unwrap_or(0);
        if of_source >= rules.clients_per_source {
            return Err(LimitReached::Source(rules.clients_per_source));
        }
        open.by_source.insert(source, of_source + 1);
        open.total += 1;
        self.series.clients.set(open.total as u64);
        Ok(ConnectionPermit { limit: Arc::clone(self), source })
    }

    /// Waits until nobody is connected.
    pub(super) async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.open().total == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn open(&self) -> MutexGuard<'_, OpenConnections> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that counts; dropping this makes room for another.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    limit: Arc<ConnectionLimit>,
    source: IpAddr,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut open = self.limit.open();
        open.total -= 1;
        let left = open.by_source.remove(&self.source).unwrap_or(1) - 1;
        if left > 0 {
            open.by_source.insert(self.source, left);
        }
        self.limit.series.clients.set(open.total as u64);
        if open.total == 0 {
            self.limit.emptied.notify_waiters();
        }
    }
}

/// Clients for which there are descriptors: a quarter is left to sockets that measure, and to whoever asks for metrics.
pub(super) fn room() -> usize {
    getrlimit(Resource::RLIMIT_NOFILE)
        .map_or(usize::MAX, |(soft, _)| usize::try_from(soft / 4 * 3).unwrap_or(usize::MAX))
}
