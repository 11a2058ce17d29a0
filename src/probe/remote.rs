//! The remote end of a path: a peer or a target.

use std::net::IpAddr;

use crate::config::defaults::{PING_PATH, WEBSOCKET_PATH};
use crate::config::echo::transport::Transport;
use crate::config::{Https, Kind, Peer, Target};
use crate::http::client::authority;

/// The remote end of a path.
#[derive(Debug, Clone, Copy)]
pub enum Remote<'a> {
    /// Another agent.
    Peer(&'a Peer),
    /// A host without an agent.
    Target(&'a Target),
}

/// The resource that is requested from an HTTP or WebSocket server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResource {
    /// The TCP port of the server.
    pub port: u16,
    /// The host name to look up; `None`: the host is an IP address.
    pub host: Option<String>,
    /// The value of the `Host` header.
    pub authority: String,
    /// The path and the query.
    pub path: String,
    /// TLS parameters; `None`: without TLS.
    pub https: Option<Https>,
}

impl Remote<'_> {
    /// Checks that a kind of probe can measure it.
    ///
    /// # Errors
    /// What it lacks, and the remedy.
    pub fn check_kind(&self, kind: &Kind) -> Result<(), String> {
        match self {
            Self::Peer(_) => Ok(()),
            Self::Target(target) => kind.as_kind_config().check_target(target),
        }
    }

    /// The port to which an echo probe sends; 0 for ICMP.
    #[must_use]
    pub fn port(&self, transport: &Transport) -> u16 {
        match (transport, self) {
            (Transport::Udp(_), Self::Peer(peer)) => peer.stamp_port,
            (Transport::Udp(_) | Transport::Tcp(_), Self::Target(target)) => target.port,
            (Transport::Icmp(_), _) => 0,
            (Transport::Tcp(_), Self::Peer(peer)) => peer.agent_port,
            (Transport::WebSocket(_), _) => self.http_resource(WEBSOCKET_PATH).port,
            (Transport::Http(_), _) => self.http_resource(PING_PATH).port,
        }
    }

    /// The host name to look up; `None`: the host is an IP address.
    #[must_use]
    pub fn host(&self) -> Option<String> {
        match self {
            Self::Peer(peer) => host_name(&peer.address),
            Self::Target(target) => host_name(&target.address),
        }
    }

    /// The resource for an HTTP or WebSocket probe: `path` of an agent, or the URL of a target.
    ///
    /// # Panics
    /// If a target has no URL. [`check_kind`](Self::check_kind) rejects such targets for probes that need
    /// one.
    #[must_use]
    pub fn http_resource(&self, path: &str) -> HttpResource {
        match self {
            Self::Peer(peer) => HttpResource {
                port: peer.http_port,
                host: host_name(&peer.address),
                authority: authority(&peer.address, peer.http_port),
                path: path.to_owned(),
                https: peer.https.clone(),
            },
            Self::Target(target) => {
                let url = target.url.as_ref().expect("the target was checked to have a URL");
                HttpResource {
                    port: url.port,
                    host: host_name(&url.host),
                    authority: url.authority(),
                    path: url.path.clone(),
                    https: target.https.clone(),
                }
            }
        }
    }
}

/// The host name to look up; `None` if `host` is an IP address.
fn host_name(host: &str) -> Option<String> {
    host.parse::<IpAddr>().is_err().then(|| host.to_owned())
}
