//! Listening: one address, or both families at once.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};
use tracing::warn;

/// The listening sockets of an address, not blocking: one, or for `[::]` one of each family with the same port.
///
/// The IPv6 socket never takes IPv4 connections, so that an address in a log is what it looks like. A host without IPv6
/// gets the IPv4 socket of `[::]`, and a warning.
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

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket listens there.
    #[error("binding {address}: address already in use (is another pathmeter running?)")]
    InUse {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// A port below 1024, as a rule.
    #[error("binding {address}: permission denied (needs CAP_NET_BIND_SERVICE)")]
    Denied {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// No interface of this host has the address.
    #[error("binding {address}: no interface has this address")]
    NotOurs {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// The host does not speak the address' family.
    #[error("binding {address}: this host has no {family}", family = family(address))]
    NoFamily {
        /// What was to be bound.
        address: SocketAddr,
    },
    /// Anything else.
    #[error("binding {address}: {source}")]
    Io {
        /// What was to be bound.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

impl BindError {
    fn new(address: SocketAddr, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EADDRINUSE) => Self::InUse { address },
            Some(libc::EACCES | libc::EPERM) => Self::Denied { address },
            // An unspecified address that is not available: the family is switched off by sysctl.
            Some(libc::EADDRNOTAVAIL) if !address.ip().is_unspecified() => Self::NotOurs { address },
            Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => Self::NoFamily { address },
            Some(_) | None => Self::Io { address, source },
        }
    }
}

/// Connections that wait to be accepted, the kernel's own limit (`net.core.somaxconn`) permitting.
const BACKLOG: i32 = 1024;

fn listen(address: SocketAddr) -> Result<TcpListener, BindError> {
    let socket = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // A restart does not wait for the connections of its predecessor to leave TIME_WAIT.
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
    fn the_unspecified_ipv6_address_takes_ipv4_connections_by_a_socket_of_their_own() {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        // The IPv6 port that the kernel chose may be taken in IPv4.
        let listeners = (0..100).find_map(|_| bind(any).ok()).expect("one port of a hundred is free");
        let four = listeners.last().unwrap();
        assert!(four.local_addr().unwrap().is_ipv4());
        let port = four.local_addr().unwrap().port();
        assert!(listeners.iter().all(|listener| listener.local_addr().unwrap().port() == port));

        let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        // Connected, it can be accepted at once.
        let (_, peer) = four.accept().unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
    }

    #[test]
    fn an_address_in_use_is_said_with_a_likely_cause() {
        let first = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let address = first[0].local_addr().unwrap();
        let problem = format!("binding {address}: address already in use (is another pathmeter running?)");
        assert_eq!(bind(address).unwrap_err().to_string(), problem);
    }

    #[test]
    fn an_address_of_nobody_is_not_ours() {
        let problem = "binding 192.0.2.1:9862: no interface has this address";
        assert_eq!(bind("192.0.2.1:9862".parse().unwrap()).unwrap_err().to_string(), problem);
    }

    #[test]
    fn the_kernels_reasons_become_sentences() {
        let why = |address: &str, errno| {
            BindError::new(address.parse().unwrap(), io::Error::from_raw_os_error(errno)).to_string()
        };
        assert_eq!(
            why("0.0.0.0:862", libc::EACCES),
            "binding 0.0.0.0:862: permission denied (needs CAP_NET_BIND_SERVICE)"
        );
        assert_eq!(why("[::]:9862", libc::EAFNOSUPPORT), "binding [::]:9862: this host has no IPv6");
        assert_eq!(why("[::]:9862", libc::EADDRNOTAVAIL), "binding [::]:9862: this host has no IPv6");
        assert!(why("[::]:9862", libc::ENOBUFS).starts_with("binding [::]:9862: No buffer space"));
    }
}
