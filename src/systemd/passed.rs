//! Socket activation: sockets that the service manager passes (sd_listen_fds(3)).

use std::net::{SocketAddr, TcpListener};

use listenfd::ListenFd;
use socket2::SockRef;

/// Why passed sockets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PassedError {
    /// A socket is not a listening TCP socket.
    #[error(
        "socket {number} of LISTEN_FDS is not a listening TCP socket: use only ListenStream=9862 in the \
         socket unit"
    )]
    NotAListener {
        /// Its number in `LISTEN_FDS`, from 1.
        number: usize,
    },
    /// The sockets have different ports, so the HTTP port is ambiguous.
    #[error(
        "sockets of LISTEN_FDS have different ports, {first} and {other}: use one port in the socket unit"
    )]
    Ports {
        /// Address of the first socket.
        first: SocketAddr,
        /// Address of a socket with another port.
        other: SocketAddr,
    },
}

/// Returns the passed listening sockets, which all have the same port; empty if no sockets were passed.
///
/// # Errors
/// [`PassedError`]; no socket is used then.
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
