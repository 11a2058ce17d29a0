//! The configuration. A [`Config`] is valid: its users do not have to check it again.
//!
//! [`load`] parses the text of a configuration file into a [`Config`] or into all its problems, and
//! [`web::load`] that of a web config file. Neither opens a socket, resolves a name or reads another file, so
//! a configuration can be checked on a different machine.

pub mod bandwidth;
pub mod defaults;
mod diagnostic;
pub mod discovery;
pub mod echo;
mod file;
pub mod file_sd;
mod hosts;
mod kind;
mod origin;
pub mod probe_options;
mod probes;
mod reader;
#[cfg(test)]
pub mod sample;
mod schema;
mod tls;
pub mod trace;
pub mod units;
mod url;
mod value_path;
mod values;
pub mod web;
mod websocket;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::Quirks;
use pathmeter_proto::prefix::Prefix;
use pathmeter_proto::selection;

pub use bandwidth::BandwidthRules;
pub use diagnostic::{Display, Location, Problem, Problems};
pub use discovery::Provider;
pub use kind::KindConfig;
pub use origin::{NotAnOrigin, Origin};
pub use probes::PATHS_MAX;
pub use tls::TlsTemplate;
pub use url::{Scheme, Url};
pub use values::label_argument;

/// Reads a configuration. An empty text is valid: the agent answers other agents and measures nothing.
///
/// # Errors
/// All problems of the text at once. If the text is not valid YAML, only the first problem.
pub fn load(text: &[u8], host: &LoadContext) -> Result<Loaded, Problems> {
    let tree = file::read(text)?;
    let diagnostics = reader::Diagnostics::default();
    let config = schema::read(&tree, host, &diagnostics);
    finish(text, config, diagnostics)
}

/// Returns the configuration with its warnings, or the problems with their locations.
fn finish<T>(
    text: &[u8],
    config: Option<T>,
    mut diagnostics: reader::Diagnostics<'_>,
) -> Result<Loaded<T>, Problems> {
    let mut locator = file::Locator::new(text);
    let mut problem = |diagnostic: reader::Diagnostic<'_>| Problem {
        location: locator.find(&diagnostic.path),
        path: diagnostic.path.to_string(),
        what: diagnostic.what,
        remedy: Some(diagnostic.remedy),
    };
    let (problems, dropped) = diagnostics.problems();
    match config {
        Some(config) if problems.is_empty() => {
            Ok(Loaded { config, warnings: diagnostics.warnings().into_iter().map(problem).collect() })
        }
        Some(_) | None => {
            let more = problems.len().saturating_sub(Problems::LISTED_MAX) + dropped;
            let listed = problems.into_iter().take(Problems::LISTED_MAX).map(&mut problem).collect();
            Err(Problems::new(listed, more))
        }
    }
}

/// Properties of this host and of the command line that a configuration is read with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadContext {
    /// The value of `--name` or `$PATHMETER_NAME`, which overrides `agent.name`.
    pub name_override: Option<String>,
    /// The name of the host: the name of the agent if no other is set.
    pub hostname: String,
    /// The values of `--label` and `$PATHMETER_LABELS`, which override those of `agent.labels`.
    pub labels: BTreeMap<String, String>,
    /// The value of `$STATE_DIRECTORY`, the default of `state_dir`.
    pub state_dir: Option<PathBuf>,
}

/// A valid configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T = Config> {
    /// The configuration.
    pub config: T,
    /// Valid settings that are probably a mistake.
    pub warnings: Vec<Problem>,
}

/// The configuration of an agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name and labels of this agent.
    pub agent: Agent,
    /// Addresses to listen on.
    pub listen: Listen,
    /// The folder for what survives a restart; `None`: nothing does.
    pub state_dir: Option<PathBuf>,
    /// The file of the mesh key; `None`: packets are not authenticated.
    pub key_file: Option<PathBuf>,
    /// TLS.
    pub tls: Tls,
    /// Which requests the responder answers.
    pub responder: ResponderRules,
    /// Which WebSocket messages the agent echoes.
    pub websocket: WebSocketRules,
    /// What bandwidth runs may use of this host.
    pub bandwidth: BandwidthRules,
    /// The other agents, without this one, sorted by name.
    pub peers: Vec<Peer>,
    /// Hosts without an agent, sorted by name.
    pub targets: Vec<Target>,
    /// Providers of further peers and targets, in the order of the file.
    pub providers: Vec<Provider>,
    /// The probes, in the order of the file.
    pub probes: Vec<Probe>,
    /// What applies to all traces.
    pub trace: trace::TraceRules,
    /// What is exported.
    pub metrics: Metrics,
    /// What is logged.
    pub log: Log,
}

/// Name and labels of this agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// The name of this agent among its peers.
    pub name: String,
    /// Labels that are reported to peers.
    pub labels: BTreeMap<String, String>,
    /// The longest duration of a shutdown.
    pub grace: Duration,
}

/// Addresses to listen on. The unspecified IPv6 address stands for both families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// HTTP, over TCP.
    pub http: SocketAddr,
    /// STAMP, over UDP.
    pub stamp: SocketAddr,
    /// Messages between agents over UDP, and echo over TCP.
    pub agent: SocketAddr,
}

/// TLS of the HTTP port and of outgoing connections.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tls {
    /// The file that configures the HTTP port, in the format of Prometheus; `None`: plain HTTP without
    /// passwords.
    pub web_config_file: Option<PathBuf>,
    /// The default for outgoing connections.
    pub client: Trust,
}

/// The trusted CAs and the certificate of a TLS client. All files are in PEM format.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Trust {
    /// Certificates of trusted CAs; `None`: those of the system.
    pub ca_file: Option<PathBuf>,
    /// The client certificate, for servers that require one; `None`: none.
    pub identity: Option<KeyPair>,
}

/// A certificate and its private key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyPair {
    /// The certificate, followed by its chain of intermediate certificates.
    pub cert_file: PathBuf,
    /// The private key.
    pub key_file: PathBuf,
}

/// Which requests the responder answers, and at which rate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponderRules {
    /// Networks that are answered without a key, in addition to peers.
    pub allow: Vec<Prefix>,
    /// Whether requests from any source are answered.
    pub open: bool,
    /// Maximum datagrams per second that are answered.
    pub rate: u64,
    /// Maximum datagrams per second that are answered for one source address.
    pub rate_per_source: u64,
    /// Maximum sessions; at the limit a new session replaces the one that has been idle longest.
    pub sessions: usize,
}

/// Which WebSocket messages the agent echoes, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebSocketRules {
    /// Whether `/ws` is served.
    pub enabled: bool,
    /// The web pages that may connect. Clients other than browsers send no origin and are not restricted by
    /// this.
    pub origins: Origins,
    /// Whether clients from any source are served, regardless of the rules of the responder.
    pub open: bool,
    /// Maximum concurrent clients.
    pub clients_max: usize,
    /// Maximum concurrent clients from one source address.
    pub clients_per_source: usize,
    /// Maximum messages per second of one client; above it the agent reads them more slowly.
    pub messages_per_second: u32,
    /// Maximum bytes of a message; a client that sends more is disconnected.
    pub message_bytes_max: usize,
    /// A client that sends nothing for this long is disconnected.
    pub idle_timeout: Duration,
    /// The clients to which the route is traced.
    pub trace: TracedClients,
    /// How these traces are made: `unprivileged` with packets of their own; `own_flow` on the client's own
    /// TCP connection. `own_flow` needs CAP_NET_RAW: without it traces are made as with `unprivileged`, and
    /// the log and `fallback_reason` of each trace say so.
    pub trace_method: TraceMethod,
    /// Largest TTL of these traces.
    pub trace_hops_max: u8,
    /// How long a router, or the client, may take to answer a probe.
    pub trace_timeout: Duration,
    /// Maximum traces of clients that begin per second, five of them at once. Each address, or IPv6 /64, has
    /// a quarter of it, two at once: with 1, one address is traced every 4 s.
    pub traces_per_second: u32,
}

/// The clients of `/ws` to which the route is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TracedClients {
    /// None.
    Off,
    /// Those that ask for it by a subprotocol.
    Asked,
    /// All.
    All,
}

/// How the route of a TCP connection is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceMethod {
    /// With packets from another source port, which needs no privilege.
    Unprivileged,
    /// On the connection itself, which needs CAP_NET_RAW; without it as with
    /// [`Unprivileged`](Self::Unprivileged).
    OwnFlow,
}

const TRACE_METHODS: [(&str, TraceMethod); 2] =
    [("unprivileged", TraceMethod::Unprivileged), ("own_flow", TraceMethod::OwnFlow)];

/// The web pages that may connect to `/ws`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Pages of the host and port that they connect to. From loopback, any page of loopback.
    Same,
    /// As with [`Same`](Self::Same), and pages of these origins.
    These(Vec<Origin>),
    /// Any page.
    Any,
}

/// Another agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name, unique among peers and targets: the `peer` label.
    pub name: String,
    /// An IP address or a host name.
    pub address: String,
    /// Its HTTP port.
    pub http_port: u16,
    /// Its STAMP port.
    pub stamp_port: u16,
    /// Its agent port.
    pub agent_port: u16,
    /// TLS parameters for its HTTP port; `None`: plain HTTP.
    pub https: Option<Https>,
    /// Labels from the file.
    pub labels: BTreeMap<String, String>,
}

/// TLS parameters for connections to one host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Https {
    /// The trusted CAs and the client certificate.
    pub trust: Trust,
    /// The DNS name or IP address that the certificate of the host must have.
    pub server_name: String,
}

/// A host without an agent: a STAMP or TWAMP-Light reflector, an HTTP or WebSocket server, or any host that
/// answers ICMP echo requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name, unique among peers and targets: the `peer` label.
    pub name: String,
    /// An IP address or a host name.
    pub address: String,
    /// The UDP port of its reflector.
    pub port: u16,
    /// Known deviations of its reflector from the protocol.
    pub quirks: Quirks,
    /// The URL for HTTP and WebSocket probes.
    pub url: Option<Url>,
    /// TLS parameters for the URL; `None`: without TLS.
    pub https: Option<Https>,
    /// The file of the key that it shares with this agent; `None`: open mode.
    pub key_file: Option<PathBuf>,
    /// Labels from the file.
    pub labels: BTreeMap<String, String>,
}

/// A probe: what all kinds have in common, and the configuration of its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Its name, unique: the `probe` label.
    pub name: String,
    /// The peers that it measures.
    pub peers: Selection,
    /// The hosts without an agent that it measures.
    pub targets: Selection,
    /// Address families.
    pub family: FamilyChoice,
    /// Source address; `None`: the kernel chooses it.
    pub source: Option<IpAddr>,
    /// Time between two measurements of one path; with echo, between two datagrams, messages or requests.
    pub interval: Duration,
    /// The DSCP of sent packets.
    pub dscp: Dscp,
    /// The kind, with its configuration.
    pub kind: Kind,
}

/// A kind of probe, with its configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Loss, RTT and jitter.
    Echo(Arc<echo::Echo>),
    /// The routes of an echo probe's flows.
    Trace(trace::Trace),
    /// Throughput, and latency under load.
    Bandwidth(bandwidth::Bandwidth),
    /// Counts replies; in tests only.
    #[cfg(test)]
    Sample(sample::Sample),
}

impl Kind {
    /// The interface that all kinds implement.
    #[must_use]
    pub fn as_kind_config(&self) -> &dyn KindConfig {
        match self {
            Self::Echo(echo) => &**echo,
            Self::Trace(trace) => trace,
            Self::Bandwidth(bandwidth) => bandwidth,
            #[cfg(test)]
            Self::Sample(sample) => sample,
        }
    }

    /// The configuration of the kind `K`; `None` if this is another kind.
    #[must_use]
    pub fn downcast<K: KindConfig + 'static>(&self) -> Option<&K> {
        self.as_kind_config().as_any().downcast_ref()
    }
}

/// The peers or targets that a probe selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All.
    All,
    /// These names, sorted, without duplicates. Names that are not in the roster are not measured.
    Named(Vec<String>),
    /// `k` neighbours on a ring of all agents, see [`selection::ring`].
    Ring {
        /// The number of peers that each agent measures, and by which each is measured.
        k: usize,
    },
    /// Peers by zone, see [`selection::zones`].
    Zones {
        /// The numbers of peers within the own zone and in each other zone.
        choice: selection::Zones,
        /// The label that denotes the zone.
        label: String,
    },
}

/// The address families that are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyChoice {
    /// The family that the resolver prefers.
    Auto,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// IPv4 and IPv6, as two paths.
    Both,
}

/// What is exported, and its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// Maximum series of paths. A path beyond the limit is measured but not exported, and counted as such.
    pub series_max: usize,
    /// Whether paths or groups have series.
    pub level: SeriesLevel,
}

/// Whether paths or groups have series.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeriesLevel {
    /// Each path has series.
    Pair,
    /// The paths of a probe to all peers of a group have series of their sum; the worst paths also have their
    /// own.
    Group {
        /// The label of peers and targets that denotes the group.
        label: String,
        /// The number of worst paths that have series of their own.
        worst: usize,
    },
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A level (`info`) or a filter by module (`warn,pathmeter::http=debug`).
    pub level: String,
    /// The format of lines.
    pub format: LogFormat,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// The value of `log.format`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}
