//! The addresses that the agent listens on.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context as _;
use tracing::{info, warn};

use crate::datagram::{Binding, Socket, SocketError, TimestampMatching, both_families};
use crate::http::server;
use crate::systemd::passed_listeners;

/// Where HTTP is served: on what the service manager passed, or else where the configuration says.
pub(super) fn front(address: SocketAddr) -> anyhow::Result<Vec<TcpListener>> {
    let passed = passed_listeners()?;
    if passed.is_empty() {
        return Ok(server::bind(address)?);
    }
    let sockets: Vec<SocketAddr> = passed.iter().map(|(_, socket)| *socket).collect();
    if sockets.iter().all(|socket| is_within(*socket, address)) {
        info!(?sockets, "the service manager passed the HTTP port");
    } else {
        warn!(
            ?sockets,
            "listen.http" = %address,
            "the service manager passed another HTTP port than listen.http says; it is served"
        );
    }
    let adopted = passed.into_iter().map(|(listener, socket)| {
        let adopted = listener.set_nonblocking(true).map(|()| listener);
        adopted.with_context(|| format!("serving {socket}, which the service manager passed"))
    });
    adopted.collect()
}

/// Whether whoever reaches a socket would be served at `address`, too: a socket that is open to more is
/// another promise than that of the configuration, even with its port.
fn is_within(socket: SocketAddr, address: SocketAddr) -> bool {
    // The unspecified address of IPv6 stands for both families.
    let is_any = address.ip().is_unspecified() && (address.is_ipv6() || socket.is_ipv4());
    let is_reached = is_any || socket.ip() == address.ip();
    is_reached && [0, socket.port()].contains(&address.port())
}

/// Binds an address; one that stands for both families is bound for each that this host has.
pub(super) fn bind_all(
    address: SocketAddr,
    timestamps: TimestampMatching,
) -> Result<Vec<Socket>, SocketError> {
    let mut sockets: Vec<Socket> = Vec::new();
    for mut address in both_families(address) {
        if let (0, Some(first)) = (address.port(), sockets.first()) {
            address.set_port(first.address().port());
        }
        let binding = Binding { address, dont_fragment: false, errors: false };
        match Socket::bind(&binding, timestamps) {
            Ok(socket) => sockets.push(socket),
            Err(error) if error.is_no_family() && !sockets.is_empty() => {
                warn!(%error, "this host has no IPv6: listening on IPv4 only");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// The agent port, over UDP and over TCP. Where the kernel chooses, it may choose one that is taken over TCP.
pub(super) fn bind_agent(
    address: SocketAddr,
    timestamps: TimestampMatching,
) -> anyhow::Result<(Vec<Socket>, Vec<TcpListener>)> {
    let mut tries = if address.port() == 0 { AGENT_PORT_TRIES } else { 1 };
    loop {
        let sockets = bind_all(address, timestamps)?;
        tries -= 1;
        match server::bind(SocketAddr::new(address.ip(), port_of(&sockets))) {
            Ok(listeners) => return Ok((sockets, listeners)),
            Err(_) if tries > 0 => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ports that are tried where the kernel chooses.
const AGENT_PORT_TRIES: u32 = 16;

pub(super) fn port_of(sockets: &[Socket]) -> u16 {
    sockets.first().map_or(0, |socket| socket.address().port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_others_reach_contradicts_the_configuration() {
        let is_within =
            |socket: &str, address: &str| is_within(socket.parse().unwrap(), address.parse().unwrap());
        for socket in ["0.0.0.0:9862", "[::]:9862", "192.0.2.1:9862", "[::1]:9862"] {
            assert!(is_within(socket, "[::]:9862") && is_within(socket, "[::]:0"), "{socket}");
            assert!(!is_within(socket, "[::]:80"), "{socket}");
        }
        assert!(is_within("192.0.2.1:9862", "0.0.0.0:9862") && !is_within("[::]:9862", "0.0.0.0:9862"));
        assert!(
            is_within("127.0.0.1:9862", "127.0.0.1:9862") && !is_within("0.0.0.0:9862", "127.0.0.1:9862")
        );
    }
}
