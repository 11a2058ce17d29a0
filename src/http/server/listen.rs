//! Listening sockets for one address, or for both address families.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};
use tracing::warn;

/// Returns non-blocking listening sockets for an address: one, or for `[::]` one of each family with the same
/// port.
///
/// The IPv6 socket does not accept IPv4 connections, so that logs do not show IPv4-mapped addresses. On a
/// host without IPv6, `[::]` yields only the IPv4 socket, and a warning is logged.
///
/// # Errors
/// [`BindError`].
pub fn bind(address: SocketAddr) -> Result<Vec<TcpListener>, BindError> {
    if address.ip() != IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        return Ok(vec![listen(address)?]);
    }
    match listen(address) {
        Ok(six) => {
            let port = six.local_addr().map_err(|source| BindError::Io { address, source })?.port();
            Ok(vec![six, listen(any_ipv4(port))?])
        }
        Err(BindError::NoFamily { .. }) => {
            let instead = any_ipv4(address.port());
            warn!(%address, %instead, "this host has no IPv6: listening on IPv4 only");
            Ok(vec![listen(instead)?])
        }
        Err(error) => Err(error),
    }
}

/// Why listening on an address failed.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket is bound to the address.
    #[error("binding {address}: address already in use (is another pathmeter running?)")]
    InUse {
        /// Requested address.
        address: SocketAddr,
    },
    /// Permission denied, usually because the port is below 1024.
    #[error("binding {address}: permission denied (needs CAP_NET_BIND_SERVICE)")]
    Denied {
        /// Requested address.
        address: SocketAddr,
    },
    /// No interface of this host has the address.
    #[error("binding {address}: no interface has this address")]
    NotLocal {
        /// Requested address.
        address: SocketAddr,
    },
    /// The host does not support the address family.
    #[error("binding {address}: this host has no {family}", family = family(address))]
    NoFamily {
        /// Requested address.
        address: SocketAddr,
    },
    /// Any other error.
    #[error("binding {address}: {source}")]
    Io {
        /// Requested address.
        address: SocketAddr,
        /// Error of the kernel.
        source: io::Error,
    },
}

impl BindError {
    fn new(address: SocketAddr, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::InUse { address },
            Some(libc::EACCES | libc::EPERM) => Self::Denied { address },
            // If the unspecified address is not available, the family is disabled by sysctl.
            Some(libc::EADDRNOTAVAIL) if !address.ip().is_unspecified() => Self::NotLocal { address },
            Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => Self::NoFamily { address },
            Some(_) | None => Self::Io { address, source },
        }
    }
}

/// Maximum number of connections waiting to be accepted, subject to the kernel's limit
/// (`net.core.somaxconn`).
const BACKLOG: i32 = 1024;

fn listen(address: SocketAddr) -> Result<TcpListener, BindError> {
    let socket = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // After a restart, connections of the previous process in TIME_WAIT do not block the port.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(TcpListener::from(socket))
    };
    socket().map_err(|source| BindError::new(address, source))
}

fn any_ipv4(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
}

fn family(address: &SocketAddr) -> &'static str {
    if address.is_ipv6() { "IPv6" } else { "IPv4" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn unspecified_ipv6_address_also_binds_a_separate_ipv4_socket() {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        // The port that the kernel chose for IPv6 may be in use for IPv4.
        let listeners = (0..100).find_map(|_| bind(any).ok()).expect("one port of a hundred is free");
        let four = listeners.last().unwrap();
        assert!(four.local_addr().unwrap().is_ipv4());
        let port = four.local_addr().unwrap().port();
        assert!(listeners.iter().all(|listener| listener.local_addr().unwrap().port() == port));

        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        // The client is connected, so accepting does not block.
        let (_, peer) = four.accept().unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
    }

    #[test]
    fn address_in_use_is_reported_with_a_likely_cause() {
        let first = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = first[0].local_addr().unwrap();
        let problem = format!("binding {address}: address already in use (is another pathmeter running?)");
        assert_eq!(bind(address).unwrap_err().to_string(), problem);
    }

    #[test]
    fn address_of_no_interface_is_reported() {
        let problem = "binding 192.0.2.1:9862: no interface has this address";
        assert_eq!(bind("192.0.2.1:9862".parse().unwrap()).unwrap_err().to_string(), problem);
    }

    #[test]
    fn kernel_errors_are_reported_with_a_remedy() {
        let message = |address: &str, errno| {
            BindError::new(address.parse().unwrap(), io::Error::from_raw_os_error(errno)).to_string()
        };
        assert_eq!(
            message("0.0.0.0:862", libc::EACCES),
            "binding 0.0.0.0:862: permission denied (needs CAP_NET_BIND_SERVICE)"
        );
        assert_eq!(message("[::]:9862", libc::EAFNOSUPPORT), "binding [::]:9862: this host has no IPv6");
        assert_eq!(message("[::]:9862", libc::EADDRNOTAVAIL), "binding [::]:9862: this host has no IPv6");
        assert!(message("[::]:9862", libc::ENOBUFS).starts_with("binding [::]:9862: No buffer space"));
    }
}
