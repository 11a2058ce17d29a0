//! Peers and targets, as probes see them.

use std::net::IpAddr;

use crate::config::{Https, Kind, Peer, Target};
use crate::http::client::authority;

/// What a path leads to.
#[derive(Debug, Clone, Copy)]
pub enum Remote<'a> {
    /// Another agent.
    Peer(&'a Peer),
    /// A host without an agent.
    Target(&'a Target),
}

/// What is requested of an HTTP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpResource {
    /// Its TCP port.
    pub port: u16,
    /// The name that is looked up; `None`: an address is given.
    pub host: Option<String>,
    /// The `Host` header.
    pub authority: String,
    /// The path and the query.
    pub path: String,
    /// With TLS; `None`: without.
    pub https: Option<Https>,
}

impl Remote<'_> {
    /// Whether a kind of probe can measure it.
    ///
    /// # Errors
    /// What it lacks, and the remedy.
    pub fn check_kind(&self, kind: &Kind) -> Result<(), String> {
        match self {
            Self::Peer(_) => Ok(()),
            Self::Target(target) => kind.as_probe_kind().check_target(target),
        }
    }

    /// The name that is looked up; `None`: an address is given.
    #[must_use]
    pub fn host(&self) -> Option<String> {
        match self {
            Self::Peer(peer) => host_name(&peer.address),
            Self::Target(target) => host_name(&target.address),
        }
    }

    /// What is requested of its HTTP server: `path` of an agent, its URL of a target.
    ///
    /// # Panics
    /// For a target without a URL, which the configuration refuses for probes that need one.
    #[must_use]
    pub fn site(&self, path: &str) -> HttpResource {
        match self {
            Self::Peer(peer) => HttpResource {
                port: peer.http_port,
                host: host_name(&peer.address),
                authority: authority(&peer.address, peer.http_port),
                path: path.to_owned(),
                https: peer.https.clone(),
            },
            Self::Target(target) => {
                let url = target.url.as_ref().expect("the configuration was checked for a URL");
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

/// What there is to look up; `None` for an address.
fn host_name(host: &str) -> Option<String> {
    host.parse::<IpAddr>().is_err().then(|| host.to_owned())
}
