//! The addresses that the agent listens on.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tracing::warn;

use crate::datagram::{Binding, Socket, SocketError, StampNames, both_families};
use crate::http::server;
use crate::systemd::passed_listeners;

/// Where HTTP is served: on what the service manager passed, or else where the configuration says.
pub(super) fn front(address: SocketAddr) -> anyhow::Result<Vec<TcpListener>> {
    let passed = passed_listeners()?;
    let Some((_, first)) = passed.first() else { return Ok(server::bind(address)?) };
    if ![0, first.port()].contains(&address.port()) {
        warn!(%first, "listen.http" = %address, "the service manager passed another port, which is served");
    }
    let adopt = |listener: std::net::TcpListener| {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    let adopted = passed.into_iter().map(|(listener, address)| {
        adopt(listener).with_context(|| format!("serving {address}, which the service manager passed"))
    });
    adopted.collect()
}

/// Binds an address; one that stands for both families is bound for each that this host has.
pub(super) fn bind_all(address: SocketAddr, stamps: StampNames) -> Result<Vec<Socket>, SocketError> {
    let mut sockets: Vec<Socket> = Vec::new();
    for mut address in both_families(address) {
        if let (0, Some(first)) = (address.port(), sockets.first()) {
            address.set_port(first.address().port());
        }
        let binding = Binding { address, dont_fragment: false, errors: false };
        match Socket::bind(&binding, stamps) {
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
    stamps: StampNames,
) -> anyhow::Result<(Vec<Socket>, Vec<TcpListener>)> {
    let mut tries = if address.port() == 0 { AGENT_PORT_TRIES } else { 1 };
    loop {
        let sockets = bind_all(address, stamps)?;
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
