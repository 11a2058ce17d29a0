//! How many clients there are, and from where.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};
use pathmeter_proto::admission::paced_as;
use tokio::sync::Notify;

use crate::config::WebSocket;
use crate::metrics::websocket::WebSocketSeries;

/// The clients that are connected. An IPv6 /64 is one source.
#[derive(Debug)]
pub(super) struct Places {
    taken: Mutex<Taken>,
    emptied: Notify,
    series: Arc<WebSocketSeries>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// There are as many clients as there may be.
    Total(usize),
    /// There are as many as our file descriptors allow.
    Descriptors(usize),
    /// The source has as many as one may.
    Source(usize),
}

impl Places {
    /// No clients; how many there are is counted in `series`.
    pub(super) fn new(series: Arc<WebSocketSeries>) -> Self {
        Self { taken: Mutex::default(), emptied: Notify::new(), series }
    }

    /// A place for a client from `source`.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn take(self: &Arc<Self>, source: IpAddr, rules: &WebSocket) -> Result<Place, Full> {
        let source = paced_as(source);
        let mut taken = self.taken();
        if taken.total >= rules.clients_max {
            return Err(Full::Total(rules.clients_max));
        }
        let room = room();
        if taken.total >= room {
            return Err(Full::Descriptors(room));
        }
        let of_source = taken.by_source.get(&source).copied().unwrap_or(0);
        if of_source >= rules.clients_per_source {
            return Err(Full::Source(rules.clients_per_source));
        }
        taken.by_source.insert(source, of_source + 1);
        taken.total += 1;
        self.series.clients.set(taken.total as u64);
        Ok(Place { places: Arc::clone(self), source })
    }

    /// Waits until nobody is connected.
    pub(super) async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.taken().total == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place, free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.total -= 1;
        let left = taken.by_source.remove(&self.source).unwrap_or(1) - 1;
        if left > 0 {
            taken.by_source.insert(self.source, left);
        }
        self.places.series.clients.set(taken.total as u64);
        if taken.total == 0 {
            self.places.emptied.notify_waiters();
        }
    }
}

/// Clients for which there are descriptors: a quarter is left to sockets that measure, and to whoever asks for metrics.
pub(super) fn room() -> usize {
    getrlimit(Resource::RLIMIT_NOFILE)
        .map_or(usize::MAX, |(soft, _)| usize::try_from(soft / 4 * 3).unwrap_or(usize::MAX))
}
