//! The configuration, already valid: a field that exists has a meaning, and nothing is checked twice.
//!
//! [`load`] turns the text of a file into a [`Config`] or into all its problems at once, [`web::load`] that of a web
//! config file. Nothing here opens a socket, resolves a name or reads a second file, so a configuration can be checked on
//! another machine than the one it is for.

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
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::Quirks;
use pathmeter_proto::prefix::Prefix;
use pathmeter_proto::selection;

pub use diagnostic::{Display, Location, Problem, Problems};
pub use discovery::Provider;
pub use kind::KindConfig;
pub use origin::{NotAnOrigin, Origin};
pub use probes::PATHS_MAX;
pub use tls::TlsTemplate;
pub use url::{Scheme, Url};
pub use values::label_argument;

/// Reads a configuration. An empty one is valid: an agent that only answers.
///
/// # Errors
/// Everything that is wrong with the text at once; only what makes it no YAML hides the rest.
pub fn load(text: &[u8], host: &LoadContext) -> Result<Loaded, Problems> {
    let tree = file::read(text)?;
    let diagnostics = reader::Diagnostics::default();
    let config = schema::read(&tree, host, &diagnostics);
    finish(text, config, diagnostics)
}

/// What was read, unless something was problems against it.
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

/// What a configuration is read for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadContext {
    /// `--name` or `$PATHMETER_NAME`: it wins over the file's `agent.name`.
    pub name_override: Option<String>,
    /// What the host calls itself: our name when nobody gives another.
    pub hostname: String,
    /// `--label` and `$PATHMETER_LABELS`: they win over the file's `agent.labels`.
    pub labels: BTreeMap<String, String>,
}

/// A configuration that can be used.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T = Config> {
    /// What was asked for.
    pub config: T,
    /// What is probably not meant.
    pub warnings: Vec<Problem>,
}

/// Everything the agent was told.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Who we are.
    pub agent: Agent,
    /// Where we listen.
    pub listen: Listen,
    /// The mesh key's file; `None`: nothing is authenticated.
    pub key_file: Option<PathBuf>,
    /// How HTTP is kept from others.
    pub tls: Tls,
    /// Whom we answer.
    pub responder: ResponderRules,
    /// Whose WebSocket messages we send back.
    pub websocket: WebSocketRules,
    /// The other agents, ourselves left out, sorted by name.
    pub peers: Vec<Peer>,
    /// Hosts without an agent, sorted by name.
    pub targets: Vec<Target>,
    /// Where further peers and targets are found, in the file's order.
    pub providers: Vec<Provider>,
    /// What to measure, in the file's order.
    pub probes: Vec<Probe>,
    /// Limits of what is exported.
    pub metrics: Metrics,
    /// What is logged.
    pub log: Log,
}

/// Who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// Our name among the peers.
    pub name: String,
    /// What peers may learn about us.
    pub labels: BTreeMap<String, String>,
    /// The longest a stop may take.
    pub grace: Duration,
}

/// Where we listen. An unspecified IPv6 address stands for both families.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// HTTP, over TCP.
    pub http: SocketAddr,
    /// STAMP, over UDP.
    pub stamp: SocketAddr,
    /// Messages between agents, over UDP.
    pub agent: SocketAddr,
}

/// How HTTP is kept from others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tls {
    /// Says how our own port is served, in the format of Prometheus; `None`: plain HTTP for everyone.
    pub web_config_file: Option<PathBuf>,
    /// How we ask others, where they do not differ.
    pub client: Trust,
}

/// Whom a client of TLS believes, and who it says it is. The files are PEM.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Trust {
    /// Certificates that may sign a server's; `None`: those of the system.
    pub ca_file: Option<PathBuf>,
    /// What the server is shown when it asks; `None`: nothing.
    pub identity: Option<KeyPair>,
}

/// A certificate and its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyPair {
    /// The certificate, first, and those that lead from it to a CA.
    pub cert_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// Whom we answer, and how fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponderRules {
    /// Sources that are answered without a key, besides the configured peers.
    pub allow: Vec<Prefix>,
    /// Whether anyone at all is answered.
    pub open: bool,
    /// Datagrams per second that are answered in all.
    pub rate: u64,
    /// Datagrams per second that are answered to one source address.
    pub rate_per_source: u64,
    /// Sessions that are remembered; at the limit the one that was silent longest is forgotten.
    pub sessions: usize,
}

/// Whose WebSocket messages we send back, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebSocketRules {
    /// Whether there is a `/ws` at all.
    pub enabled: bool,
    /// Which pages may connect; programs that are no browsers name none.
    pub origins: Origins,
    /// Whether anyone may, whoever the responder answers.
    pub open: bool,
    /// Clients at once.
    pub clients_max: usize,
    /// Clients at once from one source address.
    pub clients_per_source: usize,
    /// Messages per second of one client; at the limit we read more slowly.
    pub messages_per_second: u32,
    /// The most bytes of a message; beyond, the client is disconnected.
    pub message_bytes_max: usize,
    /// A client from which nothing comes for so long is disconnected.
    pub idle_timeout: Duration,
}

/// Which web pages may connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Those of the host and port that they connect to; from loopback, any of loopback.
    Same,
    /// Those and these.
    These(Vec<Origin>),
    /// All.
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
    /// How its HTTP port is asked with TLS; `None`: it speaks plain HTTP.
    pub https: Option<Https>,
    /// Labels from the file.
    pub labels: BTreeMap<String, String>,
}

/// How a peer or target is asked with TLS.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Https {
    /// Whom we believe, and who we are.
    pub trust: Trust,
    /// The DNS name or IP address that its certificate must have.
    pub server_name: String,
}

/// A host without an agent: a router's STAMP or TWAMP-Light reflector, a server of HTTP or WebSockets, or any host that
/// answers ICMP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name, unique among peers and targets: the `peer` label.
    pub name: String,
    /// An IP address or a host name.
    pub address: String,
    /// Its reflector's UDP port.
    pub port: u16,
    /// What its reflector is known to do otherwise than it should.
    pub quirks: Quirks,
    /// What HTTP and WebSocket probes ask for.
    pub url: Option<Url>,
    /// How that is asked with TLS; `None`: without.
    pub https: Option<Https>,
    /// The key it shares with us; `None`: open mode.
    pub key_file: Option<PathBuf>,
    /// Labels from the file.
    pub labels: BTreeMap<String, String>,
}

/// A configured measurement: what all kinds of probe have in common, and the rest.
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
    /// Address to send from; `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// Time between two measurements of one path: of datagrams or messages with echo.
    pub interval: Duration,
    /// The class of service that is sent.
    pub dscp: Dscp,
    /// What is measured.
    pub kind: Kind,
}

/// What a probe measures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Loss, RTT and jitter.
    Echo(echo::Echo),
    /// Counts replies; in tests only.
    #[cfg(test)]
    Sample(sample::Sample),
}

impl Kind {
    /// What can be asked of every kind.
    #[must_use]
    pub fn as_probe_kind(&self) -> &dyn KindConfig {
        match self {
            Self::Echo(echo) => echo,
            #[cfg(test)]
            Self::Sample(sample) => sample,
        }
    }

    /// The configuration of one kind, if this is it.
    #[must_use]
    pub fn downcast<K: KindConfig + 'static>(&self) -> Option<&K> {
        self.as_probe_kind().as_any().downcast_ref()
    }
}

/// Which peers, or targets, are measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// All.
    All,
    /// These, sorted, without repeats. One that is not there is not measured.
    Named(Vec<String>),
    /// So many peers, each agent others: [`selection::ring`].
    Ring {
        /// How many each measures, and by how many each is measured.
        k: usize,
    },
    /// By zones: [`selection::zones`].
    Zones {
        /// How many.
        choice: selection::Zones,
        /// The label that tells the zone.
        label: String,
    },
}

/// Which address families of a target are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyChoice {
    /// The one the resolver prefers.
    Auto,
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// Each is a path of its own.
    Both,
}

/// What is exported, and its limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// Series of paths; a path that would exceed it is measured but not exported, and counted.
    pub max_series: usize,
    /// What has series.
    pub level: SeriesLevel,
}

/// What has series.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SeriesLevel {
    /// Each path.
    Pair,
    /// The paths of a probe towards all peers of a group, summed; and the worst paths.
    Group {
        /// The label of peers and targets that tells the group.
        label: String,
        /// How many of the worst paths have series of their own.
        worst: usize,
    },
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A level (`info`) or a filter by module (`warn,pathmeter::http=debug`).
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
