//! Sockets that the service manager opened for us, see sd_listen_fds(3).

use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;
use socket2::SockRef;

/// Why a socket that was passed cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PassedError {
    /// It is something else.
    #[error(
        "the service manager passed something else than a listening TCP socket, as number {number} of LISTEN_FDS: give the unit ListenStream=9862 only"
    )]
    NotAListener {
        /// Which one, counted from 1.
        number: usize,
    },
    /// They have different ports: which is ours, nobody can say.
    #[error(
        "the service manager passed sockets of different ports, {first} and {other}: give the unit one port"
    )]
    Ports {
        /// Of the first.
        first: SocketAddr,
        /// Of another one.
        other: SocketAddr,
    },
}

/// The listening sockets that were passed, all of one port; empty without a manager that passes any.
///
/// # Errors
/// [`PassedError`]; none of them is then used.
pub fn passed_listeners() -> Result<Vec<(TcpListener, SocketAddr)>, PassedError> {
    let mut passed = ListenFd::from_env();
    let mut listeners: Vec<(TcpListener, SocketAddr)> = Vec::new();
    for index in 0..passed.len() {
        let not_a_listener = PassedError::NotAListener { number: index + 1 };
        let Ok(Some(listener)) = passed.take_tcp_listener(index) else { return Err(not_a_listener) };
        let is_listening = SockRef::from(&listener).is_listener().unwrap_or(false);
        let (true, Ok(address)) = (is_listening, listener.local_addr()) else { return Err(not_a_listener) };
        if let Some((_, first)) = listeners.first()
            && first.port() != address.port()
        {
            return Err(PassedError::Ports { first: *first, other: address });
        }
        listeners.push((listener, address));
    }
    Ok(listeners)
}
