//! How a path is measured: what of the configuration decides whether it is still the same.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{Quirks, Spec, StreamSpec, Wire};
use pathmeter_proto::key::Keys;
use pathmeter_proto::wire;
use pathmeter_proto::wire::websocket::Format;

use crate::config::{EchoProbe, Https, Peer, Target, Transport};
use crate::datagram::SourceChoice;
use crate::http::auth::Signer;
use crate::http::client::authority;
use crate::keys::KeyRing;
use crate::settings::Settings;
use crate::stream::{Expected, Over, Place};

/// How a path is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) to: SocketAddr,
    pub(super) interval: Duration,
    pub(super) dscp: Dscp,
    pub(super) late_after: Duration,
    pub(super) lost_after: Duration,
    pub(super) secret: Secret,
    pub(super) way: Way,
}

/// By what a path is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// By datagrams.
    Datagrams(Datagrams),
    /// By messages over a connection.
    Stream(Box<Connected>),
}

/// From where datagrams are sent, and what they look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Datagrams {
    pub(super) from: SourceChoice,
    flows: u8,
    size: Option<u16>,
    written: Written,
}

/// How connections are made, and how often only to time one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connected {
    pub(super) source: Option<IpAddr>,
    pub(super) host: Option<String>,
    pub(super) fresh: Option<Duration>,
    pub(super) over: Spoken,
}

/// How datagrams are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    Stamp(Quirks),
    Icmp,
}

/// What is spoken over a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spoken {
    Tcp { bytes: u32 },
    WebSocket { at: Asked, format: Format, bytes: u32 },
    Http { at: Asked, expected: Expected },
}

/// What is asked for at a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    authority: String,
    path: String,
    https: Option<Https>,
}

/// Which keys authenticate a path, and in which state of their file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Secret {
    None,
    Mesh { generation: u64 },
    Target { generation: u64 },
}

impl Secret {
    pub(super) fn among(self, keys: &KeyRing, peer: &str) -> Option<Arc<Keys>> {
        match self {
            Self::None => None,
            Self::Mesh { .. } => keys.mesh.clone(),
            Self::Target { .. } => keys.targets.get(peer).cloned(),
        }
    }
}

fn mesh_secret(keys: &KeyRing) -> Secret {
    match keys.mesh {
        Some(_) => Secret::Mesh { generation: keys.generation },
        None => Secret::None,
    }
}

fn target_secret(keys: &KeyRing, name: &str) -> Secret {
    match keys.targets.contains_key(name) {
        true => Secret::Target { generation: keys.generation },
        false => Secret::None,
    }
}

impl Spoken {
    /// With everything that it takes.
    pub(super) fn with(&self, keys: Option<&Keys>, settings: &Settings) -> Over {
        match self {
            Self::Tcp { bytes } => {
                let keys = keys.map(|keys| Arc::new(keys.derive(wire::stream::PURPOSE)));
                Over::Tcp { bytes: *bytes, keys }
            }
            Self::WebSocket { at, format, bytes } => {
                Over::WebSocket { place: at.with(keys, settings), format: *format, bytes: *bytes as usize }
            }
            Self::Http { at, expected } => {
                Over::Http { place: at.with(keys, settings), expected: expected.clone() }
            }
        }
    }
}

impl Asked {
    fn with(&self, keys: Option<&Keys>, settings: &Settings) -> Place {
        Place {
            authority: self.authority.clone(),
            path: self.path.clone(),
            signer: keys.map(Signer::new),
            secure: self.https.as_ref().map(|https| settings.secure(https)),
        }
    }
}

/// Who is measured.
pub(super) enum Remote<'a> {
    Peer(&'a Peer),
    Target(&'a Target),
}

impl Remote<'_> {
    /// Whether a probe can measure it; a sentence if not.
    pub(super) fn is_reached_by(&self, transport: &Transport) -> Result<(), String> {
        match self {
            Self::Peer(_) => Ok(()),
            Self::Target(target) => transport.reaches(target),
        }
    }

    /// The port, the name to look up, and what is asked for: `path` of an agent.
    fn web(&self, path: &str) -> (u16, Option<String>, Asked) {
        match self {
            Self::Peer(peer) => {
                let authority = authority(&peer.address, peer.http_port);
                let at = Asked { authority, path: path.to_owned(), https: peer.https.clone() };
                (peer.http_port, name_of(&peer.address), at)
            }
            Self::Target(target) => {
                let url = target.url.as_ref().expect("the configuration was checked for it");
                let (authority, https) = (url.authority(), target.https.clone());
                (url.port, name_of(&url.host), Asked { authority, path: url.path.clone(), https })
            }
        }
    }
}

impl Plan {
    /// As the loop of datagrams takes it.
    pub(super) fn spec(
        &self,
        datagrams: &Datagrams,
        keys: Option<Arc<Keys>>,
        transmit_stamps: bool,
        seed: u64,
    ) -> Spec {
        Spec {
            to: self.to,
            wire: match datagrams.written {
                Written::Stamp(quirks) => Wire::Stamp { keys, quirks },
                Written::Icmp => Wire::Icmp,
            },
            interval: self.interval,
            ssids: vec![0; usize::from(datagrams.flows)],
            size: datagrams.size,
            dscp: self.dscp,
            late_after: self.late_after,
            lost_after: self.lost_after,
            transmit_stamps,
            count: None,
            seed,
        }
    }

    /// As the thread of connections takes it.
    pub(super) fn stream_spec(&self, over: &Over, seed: u64) -> StreamSpec {
        StreamSpec {
            interval: self.interval,
            late_after: self.late_after,
            lost_after: self.lost_after,
            at_once: over.at_once(),
            on_demand: over.is_on_demand(),
            count: None,
            seed,
        }
    }

    /// How many flows its series tell of.
    pub(super) fn flows(&self) -> u64 {
        match self.way {
            Way::Datagrams(Datagrams { flows, .. }) => flows.into(),
            Way::Stream(_) => 1,
        }
    }
}

/// What should be measured of a path, and how.
pub(super) fn plan(echo: &EchoProbe, remote: &Remote<'_>, address: IpAddr, keys: &KeyRing) -> Plan {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let secret = match (remote, &echo.transport) {
        (_, Transport::Icmp(_)) => Secret::None,
        (Remote::Peer(_), _) => mesh_secret(keys),
        (Remote::Target(target), Transport::Udp(_)) => target_secret(keys, &target.name),
        // What is shared with a reflector is no business of a web server.
        (Remote::Target(_), Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_)) => Secret::None,
    };
    let from =
        |port, dont_fragment| SourceChoice { address: echo.source.unwrap_or(any), port, dont_fragment };
    let (port, way) = match &echo.transport {
        Transport::Udp(udp) => {
            let (port, quirks) = match remote {
                Remote::Peer(peer) => (peer.stamp_port, Quirks::default()),
                Remote::Target(target) => (target.port, target.quirks),
            };
            let from = from(udp.source_port.unwrap_or(0), udp.dont_fragment);
            let written = Written::Stamp(quirks);
            (port, Way::Datagrams(Datagrams { from, flows: udp.flows, size: udp.size, written }))
        }
        Transport::Icmp(icmp) => {
            let from = from(0, icmp.dont_fragment);
            let written = Written::Icmp;
            (0, Way::Datagrams(Datagrams { from, flows: icmp.flows, size: icmp.size, written }))
        }
        Transport::Tcp(tcp) => {
            let (port, host) = match remote {
                Remote::Peer(peer) => (peer.agent_port, name_of(&peer.address)),
                Remote::Target(target) => (target.port, name_of(&target.address)),
            };
            (port, stream(echo, host, tcp.connect_interval, Spoken::Tcp { bytes: tcp.size }))
        }
        Transport::WebSocket(websocket) => {
            let (port, host, at) = remote.web("/ws");
            let over = Spoken::WebSocket { at, format: websocket.format, bytes: websocket.size };
            (port, stream(echo, host, websocket.connect_interval, over))
        }
        Transport::Http(http) => {
            let (port, host, at) = remote.web("/api/v1/ping");
            let (status, body) = (http.status.clone(), http.body.clone());
            let expected = Expected { status, body, is_agent: matches!(remote, Remote::Peer(_)) };
            let over = Spoken::Http { at, expected };
            (port, stream(echo, host, http.connect_interval, over))
        }
    };
    Plan {
        to: SocketAddr::new(address, port),
        interval: echo.interval,
        dscp: echo.dscp,
        late_after: echo.late_after,
        lost_after: echo.lost_after,
        secret,
        way,
    }
}

fn stream(echo: &EchoProbe, host: Option<String>, fresh: Option<Duration>, over: Spoken) -> Way {
    Way::Stream(Box::new(Connected { source: echo.source, host, fresh, over }))
}

/// What there is to look up; `None` for an address.
fn name_of(host: &str) -> Option<String> {
    host.parse::<IpAddr>().is_err().then(|| host.to_owned())
}
