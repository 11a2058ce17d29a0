//! The protocol of an echo probe, and the keys that only some protocols have.

use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::mtu::CEILING_MIN;
use pathmeter_proto::wire::icmp::IcmpEcho;
use pathmeter_proto::wire::stream::{MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN};
use pathmeter_proto::wire::websocket::MessageFormat;

use super::super::defaults::REFLECTOR_PORT;
use super::super::diagnostic::quoted;
use super::super::file::Node;
use super::super::hosts::DeclaredHost;
use super::super::reader::{MappingReader, ValueReader};
use super::super::url::Scheme;
use super::super::values::{duration, port, size};
use super::super::{Listen, Target};

/// The protocol of an echo probe, with its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// STAMP over UDP.
    Udp(Udp),
    /// ICMP echo.
    Icmp(Icmp),
    /// The echo protocol of agents over TCP.
    Tcp(Tcp),
    /// Messages over a WebSocket.
    WebSocket(WebSocket),
    /// HTTP requests.
    Http(Http),
}

impl Transport {
    /// The value of the key `protocol`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Udp(_) => "udp",
            Self::Icmp(_) => "icmp",
            Self::Tcp(_) => "tcp",
            Self::WebSocket(_) => "websocket",
            Self::Http(_) => "http",
        }
    }

    /// Checks that a target can be measured over this protocol.
    ///
    /// # Errors
    /// What the target lacks, and the remedy.
    pub fn check_target(&self, target: &Target) -> Result<(), String> {
        let protocol = match self {
            Self::Udp(_) => Protocol::Udp,
            Self::Icmp(_) => Protocol::Icmp,
            Self::Tcp(_) => Protocol::Tcp,
            Self::WebSocket(_) => Protocol::WebSocket,
            Self::Http(_) => Protocol::Http,
        };
        let declared =
            DeclaredHost { name: target.name.clone(), scheme: target.url.as_ref().map(|url| url.scheme) };
        protocol.check_target(&declared).map_err(|(what, remedy)| format!("{what}: {remedy}"))
    }
}

/// The parameters of UDP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Udp {
    /// Number of flows (source ports) of a path, 1..=16.
    pub flows: u8,
    /// Bytes of UDP payload; `None`: no padding.
    pub size: Option<u16>,
    /// Whether routers may not fragment.
    pub dont_fragment: bool,
    /// Source port of flow 0; each further flow uses the next port. `None`: the kernel chooses ports, which
    /// are kept as long as the agent runs.
    pub source_port: Option<u16>,
    /// The parameters of the path MTU search; `None`: no search.
    pub path_mtu: Option<PathMtu>,
}

/// The parameters of ICMP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Icmp {
    /// Number of flows (identifiers) of a path, 1..=16.
    pub flows: u8,
    /// Bytes of the ICMP message with its header; `None`: no padding.
    pub size: Option<u16>,
    /// Whether routers may not fragment.
    pub dont_fragment: bool,
}

/// The parameters of TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tcp {
    /// Bytes of a message.
    pub size: u32,
    /// Interval at which a new connection is timed; `None`: never.
    pub connect_interval: Option<Duration>,
}

/// The parameters of WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebSocket {
    /// Bytes of a message.
    pub size: u32,
    /// The format of messages.
    pub format: MessageFormat,
    /// Interval at which a new connection is timed; `None`: never.
    pub connect_interval: Option<Duration>,
}

/// The parameters of HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Expected status codes; empty: 200 to 299.
    pub status: Vec<u16>,
    /// Text that the body must contain; `None`: any body.
    pub body: Option<String>,
    /// Interval at which a new connection is timed; `None`: never.
    pub connect_interval: Option<Duration>,
}

/// The parameters of the path MTU search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathMtu {
    /// Time between two confirmations of the path MTU that was found.
    pub interval: Duration,
    /// The longest IP packet that is tried, in bytes.
    pub ceiling: u16,
}

/// The protocol of an echo probe, without its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Protocol {
    Udp,
    Icmp,
    Tcp,
    WebSocket,
    Http,
}

pub(in crate::config) const PROTOCOLS: [(&str, Protocol); 5] = [
    ("udp", Protocol::Udp),
    ("icmp", Protocol::Icmp),
    ("tcp", Protocol::Tcp),
    ("websocket", Protocol::WebSocket),
    ("http", Protocol::Http),
];

const FLOWS_ALLOWED: RangeInclusive<i128> = 1..=16;

/// UDP payload: from the smallest STAMP packet (RFC 8762 section 4.2.1) to a jumbo frame.
const UDP_SIZE_ALLOWED: RangeInclusive<u64> = 44..=9000;

/// An ICMP message: from the fields of an echo request to a jumbo frame.
const ICMP_SIZE_ALLOWED: RangeInclusive<u64> = IcmpEcho::BYTES as u64..=9000;

const TCP_SIZE_ALLOWED: RangeInclusive<u64> = MESSAGE_BYTES_MIN as u64..=MESSAGE_BYTES_MAX as u64;

/// Maximum bytes of a WebSocket message that responders accept.
const WEBSOCKET_SIZE_MAX: u64 = 65_536;

const CONNECT_INTERVAL: Duration = Duration::from_secs(30);
const CONNECT_INTERVAL_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

const PATH_MTU_INTERVAL: Duration = Duration::from_secs(60);
const PATH_MTU_INTERVAL_ALLOWED: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(3600);

/// A whole IP packet, up to a jumbo frame: the full-length reply of an older agent to it fits the receive
/// buffer.
const CEILING_ALLOWED: RangeInclusive<u16> = CEILING_MIN..=9000;

/// Maximum characters of the text that a body is searched for.
const BODY_CHARS_MAX: usize = 1_024;

impl Protocol {
    /// Whether the protocol uses connections.
    pub(super) const fn is_stream(self) -> bool {
        match self {
            Self::Udp | Self::Icmp => false,
            Self::Tcp | Self::WebSocket | Self::Http => true,
        }
    }

    /// Checks that a target can be measured over this protocol; if not, returns what is wrong and the remedy.
    pub(super) fn check_target(self, target: &DeclaredHost) -> Result<(), (String, String)> {
        let name = &target.name;
        let (schemes, example): (&[Scheme], _) = match self {
            Self::Udp | Self::Icmp => return Ok(()),
            Self::Tcp => {
                let remedy = "select peers, or use protocol udp, icmp, websocket or http";
                return Err((format!("{name} has no agent, which protocol tcp requires"), remedy.to_owned()));
            }
            Self::WebSocket => (&[Scheme::Ws, Scheme::Wss], "ws:// or wss://"),
            Self::Http => (&[Scheme::Http, Scheme::Https], "http:// or https://"),
        };
        match target.scheme {
            Some(scheme) if schemes.contains(&scheme) => Ok(()),
            Some(_) => Err((
                format!("the url of {name} is for another protocol"),
                format!("the url must begin with {example}"),
            )),
            None => Err((format!("{name} has no url"), format!("add a url that begins with {example}"))),
        }
    }
}

/// Keys that only some protocols have, with these protocols.
const PROTOCOL_KEYS: [(&str, &[Protocol]); 9] = [
    ("flows", &[Protocol::Udp, Protocol::Icmp]),
    ("size", &[Protocol::Udp, Protocol::Icmp, Protocol::Tcp, Protocol::WebSocket]),
    ("dont_fragment", &[Protocol::Udp, Protocol::Icmp]),
    ("source_port", &[Protocol::Udp]),
    ("path_mtu", &[Protocol::Udp]),
    ("connect_interval", &[Protocol::Tcp, Protocol::WebSocket, Protocol::Http]),
    ("format", &[Protocol::WebSocket]),
    ("expect_status", &[Protocol::Http]),
    ("expect_body", &[Protocol::Http]),
];

/// Rejects the keys that `protocol` does not have.
fn reject_keys_of_other_protocols(section: &mut MappingReader<'_, '_>, protocol: Protocol) {
    for (key, protocols) in PROTOCOL_KEYS.iter().filter(|(_, protocols)| !protocols.contains(&protocol)) {
        if section.has(key) {
            let name =
                |protocol| PROTOCOLS.iter().find(|(_, known)| *known == protocol).map(|(name, _)| *name);
            let names: Vec<&str> = protocols.iter().filter_map(|protocol| name(*protocol)).collect();
            let remedy = "remove it, or choose another protocol";
            section.key::<()>(key, |value| {
                value.reject_key(format!("only valid with protocol: {}", names.join(", ")), remedy)
            });
        }
    }
}

/// Reads the keys that are specific to a protocol, and rejects those of other protocols.
pub(super) fn transport(
    section: &mut MappingReader<'_, '_>,
    protocol: Protocol,
    listen: Option<&Listen>,
) -> Option<Transport> {
    reject_keys_of_other_protocols(section, protocol);
    match protocol {
        Protocol::Udp => udp(section, listen).map(Transport::Udp),
        Protocol::Icmp => icmp(section).map(Transport::Icmp),
        Protocol::Tcp => {
            let size =
                section.key("size", |value| size(value, &TCP_SIZE_ALLOWED)).or(*TCP_SIZE_ALLOWED.start());
            let connect_interval = connect_interval(section);
            Some(Transport::Tcp(Tcp { size: size?.try_into().ok()?, connect_interval: connect_interval? }))
        }
        Protocol::WebSocket => websocket(section).map(Transport::WebSocket),
        Protocol::Http => http(section).map(Transport::Http),
    }
}

fn udp(section: &mut MappingReader<'_, '_>, listen: Option<&Listen>) -> Option<Udp> {
    let flows = section.key("flows", |value| value.number::<u8>(&FLOWS_ALLOWED)).or(1);
    let size = section.key("size", |value| size(value, &UDP_SIZE_ALLOWED)).optional();
    let dont_fragment = section.key("dont_fragment", ValueReader::boolean).or(false);
    let source_port = section.key("source_port", port).optional();
    let path_mtu = section.key("path_mtu", path_mtu).or(None);
    check_source_ports(section, source_port.flatten(), flows, listen);
    Some(Udp {
        flows: flows?,
        size: size?.and_then(|bytes| bytes.try_into().ok()),
        dont_fragment: dont_fragment?,
        source_port: source_port?,
        path_mtu: path_mtu?,
    })
}

fn icmp(section: &mut MappingReader<'_, '_>) -> Option<Icmp> {
    let flows = section.key("flows", |value| value.number::<u8>(&FLOWS_ALLOWED)).or(1);
    let size = section.key("size", |value| size(value, &ICMP_SIZE_ALLOWED)).optional();
    let dont_fragment = section.key("dont_fragment", ValueReader::boolean).or(false);
    Some(Icmp {
        flows: flows?,
        size: size?.and_then(|bytes| bytes.try_into().ok()),
        dont_fragment: dont_fragment?,
    })
}

fn websocket(section: &mut MappingReader<'_, '_>) -> Option<WebSocket> {
    let formats = [("text", MessageFormat::Text), ("binary", MessageFormat::Binary)];
    let format = section.key("format", |value| value.one_of(&formats)).or(MessageFormat::Text);
    let allowed = format?.bytes_min() as u64..=WEBSOCKET_SIZE_MAX;
    let size = section.key("size", |value| size(value, &allowed)).or(*allowed.start());
    let connect_interval = connect_interval(section);
    Some(WebSocket { size: size?.try_into().ok()?, format: format?, connect_interval: connect_interval? })
}

fn http(section: &mut MappingReader<'_, '_>) -> Option<Http> {
    let status = section.key("expect_status", |value| match value.node() {
        Node::List(_) => value.list("a list of status codes such as [200, 204]", status),
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::Text(_) | Node::Mapping(_) => {
            status(value).map(|status| vec![status])
        }
    });
    let body = section.key("expect_body", |value| {
        let text = value.text("the text that the body must contain")?;
        if (1..=BODY_CHARS_MAX).contains(&text.chars().count()) {
            Some(text.to_owned())
        } else {
            value.reject("the text is empty or too long", format!("write 1 to {BODY_CHARS_MAX} characters"))
        }
    });
    let connect_interval = connect_interval(section);
    Some(Http { status: status.or(Vec::new())?, body: body.optional()?, connect_interval: connect_interval? })
}

fn status(value: ValueReader<'_, '_>) -> Option<u16> {
    value.number(&(100..=599))
}

/// Reads the interval at which new connections are timed, or `off`.
fn connect_interval(section: &mut MappingReader<'_, '_>) -> Option<Option<Duration>> {
    section
        .key("connect_interval", |value| match value.node() {
            Node::Text(text) if text == "off" => Some(None),
            Node::Null
            | Node::Bool(_)
            | Node::Int(_)
            | Node::Float(_)
            | Node::Text(_)
            | Node::List(_)
            | Node::Mapping(_) => duration(value, &CONNECT_INTERVAL_ALLOWED).map(Some),
        })
        .or(Some(CONNECT_INTERVAL))
}

/// Reads `off`, `on`, or a section with the values that differ from the defaults.
fn path_mtu(value: ValueReader<'_, '_>) -> Option<Option<PathMtu>> {
    match value.node() {
        Node::Mapping(_) => value.section(path_mtu_keys).map(Some),
        Node::Text(text) if text == "on" => {
            Some(Some(PathMtu { interval: PATH_MTU_INTERVAL, ceiling: *CEILING_ALLOWED.end() }))
        }
        Node::Text(text) if text == "off" => Some(None),
        Node::Text(text) => {
            value.reject(format!("{} is not supported", quoted(text)), format!("write {PATH_MTU_WANTED}"))
        }
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) => {
            value.reject_type(PATH_MTU_WANTED)
        }
    }
}

const PATH_MTU_WANTED: &str = "on, off, or a mapping such as {interval: 60s, ceiling: 9000B}";

fn path_mtu_keys(section: &mut MappingReader<'_, '_>) -> Option<PathMtu> {
    let interval =
        section.key("interval", |value| duration(value, &PATH_MTU_INTERVAL_ALLOWED)).or(PATH_MTU_INTERVAL);
    let allowed = u64::from(*CEILING_ALLOWED.start())..=u64::from(*CEILING_ALLOWED.end());
    let ceiling = section.key("ceiling", |value| size(value, &allowed)).or(*allowed.end());
    Some(PathMtu { interval: interval?, ceiling: ceiling?.try_into().ok()? })
}

fn check_source_ports(
    section: &MappingReader<'_, '_>,
    first: Option<u16>,
    flows: Option<u8>,
    listen: Option<&Listen>,
) {
    let (Some(first), Some(flows)) = (first, flows) else {
        return;
    };
    let ports = u32::from(first)..u32::from(first) + u32::from(flows);
    let last_allowed = 65_536 - u32::from(flows);
    if u32::from(first) > last_allowed {
        let what = format!("{flows} flows from port {first} exceed port 65535");
        section.reject::<()>("source_port", what, format!("write at most {last_allowed}"));
    }
    let own =
        listen.map(|listen| [(listen.stamp.port(), "listen.stamp"), (listen.agent.port(), "listen.agent")]);
    let reflector =
        (REFLECTOR_PORT, "the port of STAMP reflectors, from which responders accept no requests");
    for (port, owner) in own.into_iter().flatten().chain([reflector]) {
        if ports.contains(&port.into()) {
            let what = format!("the flows would use source port {port}: {owner}");
            section.reject::<()>("source_port", what, "choose ports that are not in use");
            return;
        }
    }
}
