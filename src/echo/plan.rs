//! The plan of an echo path.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{EchoReport, EchoSpec, Quirks, StreamSpec, WireFormat};
use pathmeter_proto::key::Keys;
use pathmeter_proto::mtu;
use pathmeter_proto::schedule::mix;
use pathmeter_proto::wire;

use super::task::DatagramEcho;
use crate::config::Probe;
use crate::config::defaults::{PING_PATH, WEBSOCKET_PATH};
use crate::config::echo::Echo;
use crate::config::echo::transport::{PathMtu, Transport};
use crate::datagram::{NewTask, SourceChoice};
use crate::http::auth::Signer;
use crate::keys::KeyChoice;
use crate::metrics::echo::EchoSeries;
use crate::metrics::path_mtu::PathMtuSeries;
use crate::metrics::stream::StreamSeries;
use crate::paths::PathKey;
use crate::probe::{HttpResource, Remote, StartContext};
use crate::settings::Settings;
use crate::stream::{self, Dial, ExpectedResponse, Observer, StreamEcho, StreamProtocol};

/// The plan of an echo path: the part of the configuration that decides whether a running path can continue
/// unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EchoPlan {
    to: SocketAddr,
    interval: Duration,
    dscp: Dscp,
    source: Option<IpAddr>,
    /// Shared by all paths of the probe. Its `path_mtu` can change while the path runs.
    echo: Arc<Echo>,
    quirks: Quirks,
    /// The keys that authenticate the path.
    pub(super) keys: KeyChoice,
    /// The host name of the peer over TCP; otherwise the resource has it.
    host: Option<Box<str>>,
    /// The resource to request over WebSocket and HTTP.
    resource: Option<Box<HttpResource>>,
    is_agent: bool,
}

impl EchoPlan {
    /// The plan of a path of `probe` to an address of `remote`.
    #[must_use]
    pub fn new(
        probe: &Probe,
        echo: &Arc<Echo>,
        remote: &Remote<'_>,
        address: IpAddr,
        settings: &Settings,
    ) -> Self {
        let transport = &echo.transport;
        let resource = match transport {
            Transport::Udp(_) | Transport::Icmp(_) | Transport::Tcp(_) => None,
            Transport::WebSocket(_) => Some(Box::new(remote.http_resource(WEBSOCKET_PATH))),
            Transport::Http(_) => Some(Box::new(remote.http_resource(PING_PATH))),
        };
        let quirks = match remote {
            Remote::Peer(_) => Quirks::default(),
            Remote::Target(target) => target.quirks,
        };
        let keys = match (remote, transport) {
            (_, Transport::Icmp(_)) => KeyChoice::None,
            (Remote::Peer(_), _) => settings.keys.mesh_choice(),
            (Remote::Target(target), Transport::Udp(_)) => settings.keys.target_choice(&target.name),
            // A key that is shared with a reflector is not used towards a web server.
            (Remote::Target(_), Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_)) => {
                KeyChoice::None
            }
        };
        Self {
            to: SocketAddr::new(address, remote.port(transport)),
            interval: probe.interval,
            dscp: probe.dscp,
            source: probe.source,
            echo: Arc::clone(echo),
            quirks,
            keys,
            host: match transport {
                Transport::Tcp(_) => remote.host().map(String::into_boxed_str),
                Transport::Udp(_) | Transport::Icmp(_) | Transport::WebSocket(_) | Transport::Http(_) => None,
            },
            resource,
            is_agent: matches!(remote, Remote::Peer(_)),
        }
    }

    /// The destination address and port.
    #[must_use]
    pub fn to(&self) -> SocketAddr {
        self.to
    }

    /// Whether the echoes, or the requests that start them, are authenticated.
    #[must_use]
    pub fn is_authenticated(&self) -> bool {
        self.keys != KeyChoice::None
    }

    /// The host name that connection probes resolve; `None`: the host is an IP address.
    fn host(&self) -> Option<&str> {
        let of_resource = || self.resource.as_ref().and_then(|resource| resource.host.as_deref());
        self.host.as_deref().or_else(of_resource)
    }

    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    pub(super) fn lost_after(&self) -> Duration {
        self.echo.lost_after
    }

    pub(super) fn path_mtu(&self) -> Option<PathMtu> {
        match &self.echo.transport {
            Transport::Udp(udp) => udp.path_mtu,
            Transport::Icmp(_) | Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => None,
        }
    }

    /// Whether a path with the other plan can continue without a restart.
    pub(super) fn differs_only_in_path_mtu(&self, other: &Self) -> bool {
        let mut echo = Echo::clone(&other.echo);
        if let Transport::Udp(udp) = &mut echo.transport {
            udp.path_mtu = self.path_mtu();
        }
        echo == *self.echo && Self { echo: Arc::clone(&self.echo), ..other.clone() } == *self
    }

    pub(super) fn is_stream(&self) -> bool {
        match self.echo.transport {
            Transport::Udp(_) | Transport::Icmp(_) => false,
            Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => true,
        }
    }

    /// Number of flows in its series.
    pub(super) fn flows(&self) -> u8 {
        match &self.echo.transport {
            Transport::Udp(udp) => udp.flows,
            Transport::Icmp(icmp) => icmp.flows,
            Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => 1,
        }
    }

    /// The series of the MTU search, which continues those of an earlier search; `None` if there is no
    /// search.
    pub(super) fn mtu_series(
        &self,
        start: &StartContext<'_>,
        earlier: Option<Arc<PathMtuSeries>>,
    ) -> Option<Arc<PathMtuSeries>> {
        let PathKey { probe, peer, family } = start.key;
        let ceiling = self.path_mtu()?.ceiling;
        let series = earlier.unwrap_or_else(|| Arc::new(PathMtuSeries::new(probe, peer, family)));
        series.continue_with(ceiling);
        Some(series)
    }

    /// The specification of the MTU search; `None` if there is no search.
    pub(super) fn mtu_spec(&self, start: &StartContext<'_>, known: Option<u16>) -> Option<mtu::MtuSpec> {
        let PathMtu { interval, ceiling } = self.path_mtu()?;
        Some(mtu::MtuSpec {
            to: self.to,
            ssid: 0,
            interval,
            ceiling,
            dscp: self.dscp,
            lost_after: self.echo.lost_after,
            keys: start.settings.keys.get(self.keys, &start.key.peer),
            known,
            seed: mix(start.seed),
        })
    }

    /// The task that sends these datagrams and passes its reports on, without series; `None` if the path is
    /// measured over connections.
    #[must_use]
    pub fn observed_task(
        &self,
        keys: Option<Arc<Keys>>,
        seed: u64,
        reports: mpsc::Sender<EchoReport>,
    ) -> Option<NewTask> {
        let (spec, source) = self.datagrams(keys, None, seed)?;
        let series = Arc::new(EchoSeries::new("", "", "", self.flows().into()));
        let echo = DatagramEcho {
            spec,
            source,
            series,
            path_mtu: None,
            reports: Some(reports),
            followed: Arc::default(),
        };
        Some(echo.into_task())
    }

    /// The keys that authenticate the path to `peer`.
    #[must_use]
    pub fn keys(&self, settings: &Settings, peer: &str) -> Option<Arc<Keys>> {
        settings.keys.get(self.keys, peer)
    }

    /// The datagrams to send, and their source; `None` if the path is measured over connections.
    pub(super) fn datagrams(
        &self,
        keys: Option<Arc<Keys>>,
        count: Option<u64>,
        seed: u64,
    ) -> Option<(EchoSpec, SourceChoice)> {
        let (wire, size, port, dont_fragment) = match &self.echo.transport {
            Transport::Udp(udp) => {
                let wire = WireFormat::Stamp { keys, quirks: self.quirks };
                (wire, udp.size, udp.source_port, udp.dont_fragment)
            }
            Transport::Icmp(icmp) => (WireFormat::Icmp, icmp.size, None, icmp.dont_fragment),
            Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_) => return None,
        };
        let spec = EchoSpec {
            to: self.to,
            wire,
            interval: self.interval,
            ssids: vec![0; usize::from(self.flows())],
            size,
            dscp: self.dscp,
            late_after: self.echo.late_after,
            lost_after: self.echo.lost_after,
            tx_timestamps: true,
            count,
            seed,
        };
        Some((spec, SourceChoice::toward(self.to.ip(), self.source, port, dont_fragment)))
    }

    /// The protocol over connections; `None` if the path is measured over datagrams.
    pub(super) fn stream_protocol(&self, keys: Option<&Keys>, settings: &Settings) -> Option<StreamProtocol> {
        let target = || {
            let resource = self.resource.as_ref()?;
            Some(stream::HttpTarget {
                authority: resource.authority.clone(),
                path: resource.path.clone(),
                signer: keys.map(Signer::new),
                secure: resource.https.as_ref().map(|https| settings.secure(https)),
            })
        };
        match &self.echo.transport {
            Transport::Udp(_) | Transport::Icmp(_) => None,
            Transport::Tcp(tcp) => {
                let keys = keys.map(|keys| Arc::new(keys.derive(wire::stream::PURPOSE)));
                Some(StreamProtocol::Tcp { bytes: tcp.size, keys })
            }
            Transport::WebSocket(websocket) => Some(StreamProtocol::WebSocket {
                target: target()?,
                format: websocket.format,
                bytes: websocket.size as usize,
            }),
            Transport::Http(http) => {
                let (status, body) = (http.status.clone(), http.body.clone());
                let expected = ExpectedResponse { status, body, is_agent: self.is_agent };
                Some(StreamProtocol::Http { target: target()?, expected })
            }
        }
    }

    /// The task for the stream loop.
    pub(super) fn stream(
        &self,
        protocol: StreamProtocol,
        count: Option<u64>,
        start: &StartContext<'_>,
        series: Arc<EchoSeries>,
        stream: Arc<StreamSeries>,
        observer: Observer,
    ) -> StreamEcho {
        let connect_interval = match &self.echo.transport {
            Transport::Udp(_) | Transport::Icmp(_) => None,
            Transport::Tcp(tcp) => tcp.connect_interval,
            Transport::WebSocket(websocket) => websocket.connect_interval,
            Transport::Http(http) => http.connect_interval,
        };
        StreamEcho {
            spec: StreamSpec {
                interval: self.interval,
                late_after: self.echo.late_after,
                lost_after: self.echo.lost_after,
                unanswered_max: protocol.at_once(),
                on_demand: protocol.is_on_demand(),
                count,
                seed: start.seed,
            },
            dial: Dial {
                to: self.to,
                host: self.host().map(str::to_owned),
                source: self.source,
                dscp: self.dscp,
                protocol,
            },
            // A run with a fixed count makes no connection probes.
            connect_interval: connect_interval.filter(|_| count.is_none()),
            series,
            stream,
            observer,
            shared: Arc::clone(start.followed.connection()),
        }
    }
}
