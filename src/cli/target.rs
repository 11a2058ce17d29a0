//! The target of `probe`: a peer, a target, or any host.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::echo::Quirks;
use pathmeter_proto::wire::stamp;

use super::tls::{TlsArguments, scheme};
use super::{Failure, IdentityArguments, host};
use crate::bulk::LeaseClient;
use crate::config::defaults::{AGENT_PORT, HTTP_PORT, REFLECTOR_PORT, STAMP_PORT};
use crate::config::echo::transport::Transport;
use crate::config::probe_options::Argument;
use crate::config::{self, Config, FamilyChoice, Https, Peer, Probe, Scheme, Tls, Trust, Url};
use crate::http::auth::Signer;
use crate::http::client::{Client, authority};
use crate::identity::{Identity, WouldAnswer};
use crate::identity_poller::fetch_identity;
use crate::probe::Remote;
use crate::resolver;
use crate::settings::Settings;

/// How a command finds and reaches its target.
#[derive(Debug, Clone, Args)]
pub(super) struct TargetArguments {
    /// DSCP: a number or a name such as ef (default: best effort; of bandwidth: le)
    #[arg(long)]
    pub(super) dscp: Option<String>,
    /// Address family
    #[arg(long, default_value = "auto", value_parser = PossibleValuesParser::new(["auto", "ipv4", "ipv6"]))]
    pub(super) family: String,
    /// Source address
    #[arg(long, value_name = "ADDRESS")]
    pub(super) source: Option<IpAddr>,
    /// UDP port of a STAMP reflector without an agent; with --protocol tcp, the TCP port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) port: Option<u16>,
    /// Configuration file that has TARGET as a peer or target
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Key file shared with the responder
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    #[command(flatten)]
    tls: TlsArguments,
}

impl TargetArguments {
    /// The same target with the ports that its agent reports.
    pub(super) fn without_port(&self) -> Self {
        Self { port: None, ..self.clone() }
    }

    /// The options that every probe has, as in a configuration file.
    pub(super) fn options(&self) -> Vec<(&'static str, Argument)> {
        let text = |text: &str| Argument::Text(text.to_owned());
        let mut options = vec![("family", text(&self.family))];
        options.extend(self.dscp.as_deref().map(|dscp| ("dscp", text(dscp))));
        options.extend(self.source.map(|source| ("source", text(&source.to_string()))));
        options
    }
}

/// What is done with the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// `probe echo`.
    Echo,
    /// `probe bandwidth`, which needs an agent.
    Bandwidth,
    /// `probe trace`, which can trace any TCP port.
    Trace,
}

/// The target of a command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) command: Command,
    pub(super) target: &'a str,
    pub(super) protocol: &'a str,
    pub(super) arguments: &'a TargetArguments,
}

/// A host on the command line does not report the identity of an agent.
#[derive(Debug, thiserror::Error)]
#[error("{reason}\n{remedy}")]
pub(super) struct NoIdentity {
    pub(super) reason: String,
    remedy: String,
}

/// The host that is measured, with the settings for it.
pub(super) struct ProbeTarget {
    remote: DeclaredTarget,
    settings: Settings,
    ports: PortSource,
    command: Command,
}

/// A peer or target, in the form of the configuration.
enum DeclaredTarget {
    Peer(Peer),
    Target(config::Target),
}

/// The source of a peer's port numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortSource {
    /// The configuration. The peer is still requested to report whether it answers.
    Configured,
    /// The command line. No request is sent to the peer.
    CommandLine,
    /// The identity that the peer reports.
    Identity,
}

impl ProbeTarget {
    /// Finds the target of the command line, in the configuration if one is given.
    pub(super) fn new(request: Request<'_>) -> Result<Self, Failure> {
        match &request.arguments.config {
            Some(path) => {
                let settings = Settings::read(path, &host(&IdentityArguments::default()))?;
                Self::by_name(request, settings.config)
            }
            None => Self::by_host(request),
        }
    }

    fn by_name(request: Request<'_>, config: Config) -> Result<Self, Failure> {
        let Request { target: name, arguments, .. } = request;
        if let Some(peer) = config.peers.iter().find(|peer| peer.name == name) {
            let mut peer = Peer { https: request.https(peer.https.clone())?, ..peer.clone() };
            let ports = match arguments.port {
                Some(port) => {
                    (peer.stamp_port, peer.agent_port) = (port, port);
                    PortSource::CommandLine
                }
                None => PortSource::Configured,
            };
            return Self::with(DeclaredTarget::Peer(peer), ports, config, request);
        }
        if let Some(target) = config.targets.iter().find(|target| target.name == name) {
            if (request.command, request.protocol) == (Command::Trace, "tcp") {
                let peer = tcp_server(target, arguments.port)?;
                return Self::with(DeclaredTarget::Peer(peer), PortSource::CommandLine, config, request);
            }
            let target = config::Target {
                https: request.https(target.https.clone())?,
                port: arguments.port.unwrap_or(target.port),
                ..target.clone()
            };
            return Self::with(DeclaredTarget::Target(target), PortSource::Configured, config, request);
        }
        Err(anyhow!("the configuration has no peer or target named {name}").into())
    }

    fn by_host(request: Request<'_>) -> Result<Self, Failure> {
        let Request { protocol, arguments, .. } = request;
        let config = config::load(b"", &host(&IdentityArguments::default()))
            .map_err(|problems| anyhow!("an empty configuration: {problems}"))?
            .config;
        let name = request.target.to_owned();
        let default_https = |host: &str| Https { trust: Trust::default(), server_name: host.to_owned() };
        if let Some(url) = request.url()? {
            let https = url.scheme.is_secure().then(|| default_https(&url.host));
            let https = request.https(https)?;
            let target = config::Target {
                name,
                address: url.host.clone(),
                port: REFLECTOR_PORT,
                quirks: Quirks::default(),
                https,
                url: Some(url),
                key_file: None,
                labels: config.agent.labels.clone(),
            };
            return Self::with(DeclaredTarget::Target(target), PortSource::Configured, config, request);
        }
        let (is_https, authority) = scheme(&name);
        let (address, http_port) = split(authority)?;
        let https = request.https(is_https.then(|| default_https(&address)))?;
        let labels = config.agent.labels.clone();
        let is_reflector = match protocol {
            "udp" => arguments.port.is_some(),
            protocol => protocol == "icmp",
        };
        if is_reflector {
            let target = config::Target {
                name,
                address,
                port: arguments.port.unwrap_or(REFLECTOR_PORT),
                quirks: Quirks::default(),
                url: None,
                https: None,
                key_file: None,
                labels,
            };
            return Self::with(DeclaredTarget::Target(target), PortSource::CommandLine, config, request);
        }
        let (stamp_port, agent_port) = (STAMP_PORT, arguments.port.unwrap_or(AGENT_PORT));
        let peer = Peer { name, address, http_port, stamp_port, agent_port, https, labels };
        let ports = if arguments.port.is_some() { PortSource::CommandLine } else { PortSource::Identity };
        Self::with(DeclaredTarget::Peer(peer), ports, config, request)
    }

    /// Completes the settings: this one peer or target, with its keys and certificates, and nothing else.
    fn with(
        mut remote: DeclaredTarget,
        ports: PortSource,
        config: Config,
        request: Request<'_>,
    ) -> Result<Self, Failure> {
        let Request { command, arguments, .. } = request;
        let mut config = Config {
            tls: Tls::default(),
            peers: Vec::new(),
            targets: Vec::new(),
            providers: Vec::new(),
            ..config
        };
        match &mut remote {
            DeclaredTarget::Peer(peer) => {
                config.key_file = arguments.key_file.clone().or(config.key_file);
                config.peers.push(peer.clone());
            }
            DeclaredTarget::Target(target) => {
                config.key_file = None;
                target.key_file = arguments.key_file.clone().or_else(|| target.key_file.take());
                config.targets.push(target.clone());
            }
        }
        Ok(Self { remote, settings: Settings::complete(config, b"")?, ports, command })
    }

    /// The name of the peer or target.
    pub(super) fn name(&self) -> &str {
        match &self.remote {
            DeclaredTarget::Peer(peer) => &peer.name,
            DeclaredTarget::Target(target) => &target.name,
        }
    }

    /// The settings for this peer or target.
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The address of the target. Requests the identity of an agent to learn its ports and whether it answers
    /// this host.
    pub(super) async fn locate(
        &mut self,
        arguments: &TargetArguments,
        probe: &Probe,
        transport: &Transport,
    ) -> anyhow::Result<IpAddr> {
        self.remote().check_kind(&probe.kind).map_err(|reason| anyhow!(reason))?;
        let address = self.address(probe, transport).await?;
        match (transport, self.ports) {
            (Transport::Udp(_), ports) => self.request_stamp_port(address, arguments, ports).await?,
            (Transport::Tcp(_), PortSource::Identity) => {
                let identity = self.identity(address, arguments).await;
                let hint = match self.command {
                    Command::Echo | Command::Bandwidth => "is an agent running there?",
                    Command::Trace => {
                        "is an agent running there? for any other host, give its TCP port, for example --port 443"
                    }
                };
                self.set_ports(&identity.map_err(|reason| anyhow!("{reason}\n{hint}"))?);
            }
            (Transport::WebSocket(_), _) => {
                if let DeclaredTarget::Peer(peer) = &self.remote {
                    let you = self.identity(address, arguments).await?.you;
                    you.websocket.as_ref().map_or(Ok(()), |answers| check_answers(answers, &peer.address))?;
                }
            }
            (Transport::Tcp(_), PortSource::Configured | PortSource::CommandLine)
            | (Transport::Icmp(_) | Transport::Http(_), _) => {}
        }
        Ok(address)
    }

    /// The peer or target.
    pub(super) fn remote(&self) -> Remote<'_> {
        match &self.remote {
            DeclaredTarget::Peer(peer) => Remote::Peer(peer),
            DeclaredTarget::Target(target) => Remote::Target(target),
        }
    }

    async fn address(&self, probe: &Probe, transport: &Transport) -> anyhow::Result<IpAddr> {
        let host = match (&self.remote, transport) {
            (DeclaredTarget::Peer(peer), _) => &peer.address,
            (DeclaredTarget::Target(target), Transport::WebSocket(_) | Transport::Http(_)) => {
                target.url.as_ref().map_or(&target.address, |url| &url.host)
            }
            (DeclaredTarget::Target(target), Transport::Udp(_) | Transport::Icmp(_) | Transport::Tcp(_)) => {
                &target.address
            }
        };
        let addresses = resolver::once(host).await.map_err(|reason| anyhow!(reason))?;
        let fits = |address: &&IpAddr| match probe.family {
            FamilyChoice::Auto | FamilyChoice::Both => {
                probe.source.is_none_or(|source| source.is_ipv4() == address.is_ipv4())
            }
            FamilyChoice::Ipv4 => address.is_ipv4(),
            FamilyChoice::Ipv6 => address.is_ipv6(),
        };
        let address = addresses.iter().find(fits).copied();
        address.ok_or_else(|| anyhow!("{host} has no address of the requested family"))
    }

    /// Requests the STAMP port from an agent, and checks that the agent answers this host.
    async fn request_stamp_port(
        &mut self,
        address: IpAddr,
        arguments: &TargetArguments,
        ports: PortSource,
    ) -> anyhow::Result<()> {
        if ports == PortSource::CommandLine || matches!(self.remote, DeclaredTarget::Target(_)) {
            return Ok(());
        }
        match self.identity(address, arguments).await {
            Ok(identity) => {
                if ports == PortSource::Identity {
                    self.set_ports(&identity);
                }
                check_answers(&identity.you.stamp, &identity.name)
            }
            // The port is configured, and a firewall may block HTTP but not STAMP.
            Err(_) if ports == PortSource::Configured => Ok(()),
            Err(reason) => {
                let other = match self.command {
                    Command::Bandwidth => bail!("{reason}\nis an agent running there? bandwidth needs one"),
                    Command::Echo => "pathmeter probe echo --protocol icmp",
                    Command::Trace => "--protocol icmp, or --protocol tcp with a --port",
                };
                let port = stamp::PORT;
                let remedy = format!(
                    "is an agent running there? for a STAMP reflector, give its port, for example --port {port}; \
                     for any other host, use {other}"
                );
                Err(NoIdentity { reason: reason.to_string(), remedy }.into())
            }
        }
    }

    fn set_ports(&mut self, identity: &Identity) {
        if let DeclaredTarget::Peer(peer) = &mut self.remote {
            (peer.stamp_port, peer.agent_port) = (identity.ports.stamp, identity.ports.agent);
        }
    }

    /// Requests leases of the agent at `address`.
    pub(super) fn lease_client(
        &self,
        address: IpAddr,
        arguments: &TargetArguments,
    ) -> anyhow::Result<LeaseClient> {
        let DeclaredTarget::Peer(peer) = &self.remote else { bail!("{} is not an agent", self.name()) };
        let (to, host) = (SocketAddr::new(address, peer.http_port), authority(&peer.address, peer.http_port));
        Ok(LeaseClient { client: self.client(peer, arguments), to, host })
    }

    /// The HTTP client for requests to a peer.
    fn client(&self, peer: &Peer, arguments: &TargetArguments) -> Client {
        let signer = self.settings.keys.mesh.as_deref().map(Signer::new);
        let secure = peer.https.as_ref().map(|https| self.settings.secure(https));
        Client { signer, source: arguments.source, secure, ..Client::default() }
    }

    async fn identity(&self, address: IpAddr, arguments: &TargetArguments) -> anyhow::Result<Identity> {
        let DeclaredTarget::Peer(peer) = &self.remote else { bail!("{} is not an agent", self.name()) };
        let client = self.client(peer, arguments);
        let host = authority(&peer.address, peer.http_port);
        let identity = fetch_identity(&client, SocketAddr::new(address, peer.http_port), &host).await;
        identity.map_err(|reason| anyhow!("{reason}"))
    }
}

/// A target as a host with a TCP port: that of the command line, or else of its URL.
fn tcp_server(target: &config::Target, port: Option<u16>) -> anyhow::Result<Peer> {
    let config::Target { name, address, url, labels, .. } = target;
    let (address, of_url) = match url {
        Some(url) => (&url.host, Some(url.port)),
        None => (address, None),
    };
    let Some(port) = port.or(of_url) else {
        bail!("the TCP port of {name} is not known; give it, for example --port 443");
    };
    Ok(Peer {
        name: name.clone(),
        address: address.clone(),
        http_port: HTTP_PORT,
        stamp_port: STAMP_PORT,
        agent_port: port,
        https: None,
        labels: labels.clone(),
    })
}

/// Returns an error with the reason of the agent if it would not answer this host.
fn check_answers(answers: &WouldAnswer, name: &str) -> anyhow::Result<()> {
    if answers.answers {
        return Ok(());
    }
    let reason = answers.reason.clone();
    bail!("{}", reason.unwrap_or_else(|| format!("{name} does not answer this host and gives no reason")))
}

impl Request<'_> {
    /// The TLS parameters of the target, with those of the command line in their place.
    fn https(&self, declared: Option<Https>) -> Result<Option<Https>, Failure> {
        match declared {
            Some(https) => Ok(Some(self.arguments.tls.replace(https))),
            None => Ok(self.arguments.tls.refuse(self.target).map(|()| None)?),
        }
    }

    /// The target as a URL; `None` if it is the host of an agent, which has `https://` as its only possible
    /// prefix.
    fn url(&self) -> anyhow::Result<Option<Url>> {
        let (target, schemes) = match self.protocol {
            "websocket" => (self.target, [Scheme::Ws, Scheme::Wss]),
            "http" => (self.target, [Scheme::Http, Scheme::Https]),
            _ => return Ok(None),
        };
        if !target.contains("://") {
            return Ok(None);
        }
        let url: Url = target.parse().map_err(|problem: String| anyhow!(problem))?;
        match schemes.contains(&url.scheme) {
            true => Ok(Some(url)),
            false if self.protocol == "http" => {
                bail!("{target} is a WebSocket URL; use --protocol websocket")
            }
            // `https://HOST` of an agent.
            false => Ok(None),
        }
    }
}

/// `HOST`, `HOST:PORT`, an IPv6 address with or without brackets, or `[IPv6]:PORT`.
fn split(target: &str) -> anyhow::Result<(String, u16)> {
    let unbracketed = target.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(target);
    if let Ok(address) = unbracketed.parse::<IpAddr>() {
        return Ok((address.to_string(), HTTP_PORT));
    }
    if let Ok(address) = target.parse::<SocketAddr>() {
        return Ok((address.ip().to_string(), address.port()));
    }
    let (host, port) = match target.rsplit_once(':') {
        Some((host, port)) => match port.parse() {
            Ok(port) if port > 0 => (host, port),
            _ => bail!("{target:?}: {port:?} is not a port; write HOST or HOST:HTTP_PORT"),
        },
        None => (target, HTTP_PORT),
    };
    if host.is_empty() {
        bail!("{target:?} has no host; write HOST or HOST:HTTP_PORT");
    }
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_is_a_host_with_an_optional_http_port() {
        let ok = |target: &str| split(target).unwrap();
        assert_eq!(ok("ams-1"), ("ams-1".to_owned(), HTTP_PORT));
        assert_eq!(ok("ams-1:80"), ("ams-1".to_owned(), 80));
        assert_eq!(ok("2001:db8::1"), ("2001:db8::1".to_owned(), HTTP_PORT));
        assert_eq!(ok("[2001:db8::1]:80"), ("2001:db8::1".to_owned(), 80));
        assert_eq!(ok("[::1]"), ("::1".to_owned(), HTTP_PORT));
        assert!(split("ams-1:http").is_err());
        assert!(split(":80").is_err());
    }
}
