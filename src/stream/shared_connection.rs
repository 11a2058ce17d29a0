//! The connection of an echo path, as the path that traces it sees it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pathmeter_proto::trace::{ConnectionEnd, OwnFlowRefusal};
use tokio::sync::watch;

use super::kernel::{self, Delivery};

/// The connection of an echo path. A path that traces its packets watches it; both run on the stream loop.
/// Keeps nothing while there is no watcher.
#[derive(Debug)]
pub struct SharedConnection {
    connections: watch::Sender<Connections>,
    status: Mutex<OwnFlowStatus>,
}

/// Whether a trace sends its probes on the connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnFlowStatus {
    /// Whether it does.
    pub is_on_connection: bool,
    /// Why it does not; `None`: it does, or may soon.
    pub refusal: Option<Refusal>,
}

/// Why a trace does not send its probes on the connection of the echoes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// This process may not open raw sockets.
    #[error("raw sockets need CAP_NET_RAW")]
    NotPermitted,
    /// The limit is reached.
    #[error("{} paths are traced on their connections", super::OWN_FLOW_PATHS_MAX)]
    TooMany,
    /// The kernel has refused a raw socket or a segment.
    #[error("{0}")]
    RawSocket(String),
    /// The connection cannot be used.
    #[error(transparent)]
    Connection(#[from] OwnFlowRefusal),
}

/// The connections of an echo path so far.
#[derive(Debug, Default)]
pub(super) struct Connections {
    /// Their number.
    count: u64,
    open: Option<OpenConnection>,
    /// How the latest one has ended.
    ended: Option<EndedConnection>,
}

#[derive(Debug)]
struct OpenConnection {
    /// A duplicate descriptor: while it is open, so is the connection.
    socket: OwnedFd,
    addresses: NumberedAddresses,
}

/// The addresses and ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NumberedAddresses {
    /// Which connection of the path it is, from 1.
    pub(super) number: u64,
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
}

/// How a connection has ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndedConnection {
    pub(super) number: u64,
    pub(super) end: ConnectionEnd,
    /// How it delivered data until then; `None` if the kernel did not say.
    pub(super) delivery: Option<Delivery>,
}

impl Default for SharedConnection {
    fn default() -> Self {
        Self { connections: watch::Sender::new(Connections::default()), status: Mutex::default() }
    }
}

impl SharedConnection {
    /// Whether probes of the path that traces the echoes are sent on their connection, and why not.
    #[must_use]
    pub fn status(&self) -> OwnFlowStatus {
        self.lock_status().clone()
    }

    /// Sets that probes are not sent on the connection, and why.
    pub fn refuse(&self, refusal: Refusal) {
        self.set_status(false, Some(refusal));
    }

    pub(super) fn set_status(&self, is_on_connection: bool, refusal: Option<Refusal>) {
        *self.lock_status() = OwnFlowStatus { is_on_connection, refusal };
    }

    /// Whether a path watches the connection.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.connections.receiver_count() > 0
    }

    /// Watches the connection until the receiver is dropped, which learns of each change.
    pub(super) fn watch(&self) -> watch::Receiver<Connections> {
        self.connections.subscribe()
    }

    /// The echo path has a connection, of which `duplicate` makes another descriptor. Has no effect if it is
    /// known, or if there is no watcher.
    pub(super) fn offer(&self, duplicate: impl FnOnce() -> Option<(OwnedFd, SocketAddr)>, peer: SocketAddr) {
        if !self.is_watched() {
            self.close(ConnectionEnd::Closed);
            return;
        }
        if self.connections.borrow().open.is_some() {
            return;
        }
        let Some((socket, local)) = duplicate() else { return };
        if peer.is_ipv6() {
            // As the segments of the trace have. A connection that was opened without a watcher may take
            // another route from now on. If this fails, the segments may take another route than the data.
            let _ = kernel::disable_flow_label(&socket);
        }
        self.connections.send_modify(|connections| {
            connections.count += 1;
            let addresses = NumberedAddresses { number: connections.count, local, peer };
            connections.open = Some(OpenConnection { socket, addresses });
        });
    }

    /// The echo path closes its connection, for this reason.
    pub(super) fn close(&self, end: ConnectionEnd) {
        self.connections.send_if_modified(|connections| {
            let Some(OpenConnection { socket, addresses }) = connections.open.take() else { return false };
            let (number, delivery) = (addresses.number, kernel::delivery(&socket));
            connections.ended = Some(EndedConnection { number, end, delivery });
            true
        });
    }

    /// The connection; `None`: there is none.
    pub(super) fn addresses(&self) -> Option<NumberedAddresses> {
        self.connections.borrow().open.as_ref().map(|open| open.addresses)
    }

    /// How the connection with this number has ended; `None`: it has not, or another one has since.
    pub(super) fn ended(&self, number: u64) -> Option<EndedConnection> {
        self.connections.borrow().ended.filter(|ended| ended.number == number)
    }

    /// How the connection delivers data; `None` if there is none, or the kernel does not say.
    pub(super) fn delivery(&self) -> Option<Delivery> {
        kernel::delivery(&self.connections.borrow().open.as_ref()?.socket)
    }

    fn lock_status(&self) -> MutexGuard<'_, OwnFlowStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::net::TcpStream;
    use std::os::fd::AsFd as _;

    use super::*;

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn offer(shared: &SharedConnection, stream: &TcpStream) {
        let duplicate = || Some((stream.as_fd().try_clone_to_owned().unwrap(), stream.local_addr().unwrap()));
        shared.offer(duplicate, stream.peer_addr().unwrap());
    }

    #[test]
    fn nothing_is_kept_without_a_watcher() {
        let (shared, (client, server)) = (SharedConnection::default(), connection());
        offer(&shared, &client);
        assert_eq!(shared.addresses(), None);
        let watcher = shared.watch();
        offer(&shared, &client);
        assert_eq!(shared.addresses().unwrap().local, client.local_addr().unwrap());
        drop(watcher);
        offer(&shared, &client);
        assert_eq!(shared.addresses(), None, "its descriptor is closed");
        drop(client);
        assert_eq!(std::io::Read::read(&mut &server, &mut [0]).unwrap(), 0, "so the connection ends");
    }

    #[test]
    fn watcher_learns_of_each_connection_and_of_its_end() {
        let (shared, (client, _server)) = (SharedConnection::default(), connection());
        let mut watcher = shared.watch();
        for number in 1..=2 {
            offer(&shared, &client);
            assert!(watcher.has_changed().unwrap());
            watcher.mark_unchanged();
            offer(&shared, &client);
            assert!(!watcher.has_changed().unwrap(), "it is known");
            assert_eq!(shared.addresses().unwrap().number, number);
            assert!(shared.ended(number).is_none() && shared.delivery().is_none(), "nothing was sent");
            shared.close(ConnectionEnd::Reset);
            assert!(watcher.has_changed().unwrap());
            watcher.mark_unchanged();
            shared.close(ConnectionEnd::TimedOut);
            assert!(!watcher.has_changed().unwrap(), "it is closed once");
            assert_eq!(shared.ended(number).unwrap().end, ConnectionEnd::Reset);
        }
    }
}
