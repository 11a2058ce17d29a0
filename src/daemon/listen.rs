//! Binds the sockets that the agent listens on.

use std::net::{SocketAddr, TcpListener};

use anyhow::Context as _;
use tracing::{info, warn};

use crate::datagram::{Binding, Socket, SocketError, TimestampMatching, both_families};
use crate::http::server;
use crate::systemd::passed_listeners;

/// The listeners of the HTTP port: those that the service manager passed, or else new ones at `address`.
pub(super) fn bind_http(address: SocketAddr) -> anyhow::Result<Vec<TcpListener>> {
    let passed = passed_listeners()?;
    if passed.is_empty() {
        return Ok(server::bind(address)?);
    }
    let sockets: Vec<SocketAddr> = passed.iter().map(|(_, socket)| *socket).collect();
    if sockets.iter().all(|socket| is_within(*socket, address)) {
        info!(?sockets, "using the HTTP sockets from the service manager");
    } else {
        warn!(
            ?sockets,
            "listen.http" = %address,
            "the HTTP sockets from the service manager differ from listen.http; \
             using those of the service manager"
        );
    }
    let adopted = passed.into_iter().map(|(listener, socket)| {
        let adopted = listener.set_nonblocking(true).map(|()| listener);
        adopted.with_context(|| format!("using socket {socket} from the service manager"))
    });
    adopted.collect()
}

/// Whether all clients that can reach `socket` could also reach `address`. A socket that more clients can
/// reach contradicts the configuration, even with the same port.
fn is_within(socket: SocketAddr, address: SocketAddr) -> bool {
    // The unspecified IPv6 address stands for both families.
    let is_any = address.ip().is_unspecified() && (address.is_ipv6() || socket.is_ipv4());
    let is_reached = is_any || socket.ip() == address.ip();
    is_reached && [0, socket.port()].contains(&address.port())
}

/// Binds an address. One that stands for both families is bound for each family that this host has. `errors`:
/// see [`Binding::errors`].
pub(super) fn bind_all(
    address: SocketAddr,
    errors: bool,
    timestamps: TimestampMatching,
) -> Result<Vec<Socket>, SocketError> {
    let mut sockets: Vec<Socket> = Vec::new();
    for mut address in both_families(address) {
        if let (0, Some(first)) = (address.port(), sockets.first()) {
            address.set_port(first.address().port());
        }
        let binding = Binding { address, dont_fragment: false, errors, destinations: true };
        match Socket::bind(&binding, timestamps) {
            Ok(socket) => sockets.push(socket),
            Err(error) if error.is_unsupported_family() && !sockets.is_empty() => {
                warn!(%error, "this host has no IPv6: listening on IPv4 only");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// Binds the agent port over UDP and TCP. If the kernel chooses the UDP port, that port may be in use over
/// TCP; then another one is tried.
pub(super) fn bind_agent(
    address: SocketAddr,
    timestamps: TimestampMatching,
) -> anyhow::Result<(Vec<Socket>, Vec<TcpListener>)> {
    let mut tries = if address.port() == 0 { AGENT_PORT_TRIES } else { 1 };
    loop {
        let sockets = bind_all(address, false, timestamps)?;
        tries -= 1;
        match server::bind(SocketAddr::new(address.ip(), port_of(&sockets))) {
            Ok(listeners) => return Ok((sockets, listeners)),
            Err(_) if tries > 0 => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Maximum ports that are tried if the kernel chooses the port.
const AGENT_PORT_TRIES: u32 = 16;

pub(super) fn port_of(sockets: &[Socket]) -> u16 {
    sockets.first().map_or(0, |socket| socket.address().port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_that_more_clients_can_reach_contradicts_the_configuration() {
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
