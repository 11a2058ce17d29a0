//! The TCP connection of an HTTP client.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};

use tokio::net::TcpStream;

/// An accepted TCP connection, which another part of the agent may use besides the server.
#[derive(Debug)]
pub struct AcceptedConnection {
    /// A duplicate descriptor of its socket. While it is open, so is the connection.
    pub socket: OwnedFd,
    /// The address and port of this host.
    pub local: SocketAddr,
    /// The address and port of the client.
    pub peer: SocketAddr,
}

impl AcceptedConnection {
    /// The connection of a stream, with the addresses that are in its packets.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated.
    pub fn of(stream: &TcpStream, peer: SocketAddr) -> io::Result<Self> {
        let local = stream.local_addr()?;
        let socket = stream.as_fd().try_clone_to_owned()?;
        // An IPv4-mapped address becomes IPv4. The scope of a link-local one stays.
        let local = match local.ip().to_canonical() {
            IpAddr::V4(address) => SocketAddr::new(address.into(), local.port()),
            IpAddr::V6(_) => local,
        };
        Ok(Self { socket, local, peer })
    }
}
