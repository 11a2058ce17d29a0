//! Whom `probe` measures, and by which way.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{anyhow, bail, ensure};
use pathmeter_proto::echo::{Quirks, Wire};
use pathmeter_proto::key::Keys;
use pathmeter_proto::wire::icmp::Echo;
use pathmeter_proto::wire::stream::{MESSAGE_BYTES_MAX, MESSAGE_BYTES_MIN, PURPOSE};
use pathmeter_proto::wire::{stamp, websocket};

use super::tls::scheme;
use super::{EchoArguments, Failure, Family, Format, IdentityArguments, Protocol, host};
use crate::config::units::display;
use crate::config::{Https, Scheme, Trust, Url};
use crate::http::auth::Signer;
use crate::http::client::{Client, Secure, authority};
use crate::identity::{Answers, Identity};
use crate::identity_poller::fetch_identity;
use crate::keys;
use crate::resolver;
use crate::settings::{Settings, SettingsError};
use crate::stream::{Expected, Over, Place};

/// Over connections a millisecond is the runtime's grain.
const INTERVAL_MIN: Duration = Duration::from_millis(10);

/// The HTTP port of an agent, unless TARGET says another.
const HTTP_PORT: u16 = 9_862;

/// Whom to measure, as the command line and the configuration say.
pub(super) struct Aim {
    host: String,
    http_port: u16,
    /// How its HTTP port, or its URL, is asked with TLS; `None`: without.
    secure: Option<Secure>,
    /// The ports that need not be asked for.
    stamp_port: Option<u16>,
    agent_port: Option<u16>,
    /// What is asked of a server without an agent.
    url: Option<Url>,
    quirks: Quirks,
    /// Whether an agent is known to be there, which says whether it will answer.
    is_agent: bool,
    keys: Option<Arc<Keys>>,
}

/// Where to, and by which way.
pub(super) struct Course {
    pub(super) to: SocketAddr,
    pub(super) way: Way,
}

/// By datagrams, or over a connection.
pub(super) enum Way {
    Datagrams(Wire),
    Stream(Box<Over>),
}

impl Aim {
    /// Reads what is said of the target.
    pub(super) fn of(arguments: &EchoArguments) -> Result<Self, Failure> {
        check(arguments).map_err(|error| Failure::Usage(error.to_string()))?;
        let own_keys = match &arguments.key_file {
            Some(path) => Some(Arc::new(keys::read(path).map_err(SettingsError::from)?.0)),
            None => None,
        };
        match &arguments.config {
            Some(path) => Self::by_name(
                arguments,
                &Settings::read(path, &host(&IdentityArguments::default()))?,
                own_keys,
            ),
            None => Self::by_host(arguments, own_keys),
        }
    }

    fn by_name(
        arguments: &EchoArguments,
        settings: &Settings,
        own_keys: Option<Arc<Keys>>,
    ) -> Result<Self, Failure> {
        let (name, config) = (&arguments.target, &settings.config);
        let secure = |https: &Option<Https>| -> Result<Option<Secure>, Failure> {
            match https {
                Some(https) => Ok(Some(arguments.tls.secure(https)?)),
                None => Ok(arguments.tls.none(name)?),
            }
        };
        if let Some(peer) = config.peers.iter().find(|peer| peer.name == *name) {
            return Ok(Self {
                host: peer.address.clone(),
                http_port: peer.http_port,
                secure: secure(&peer.https)?,
                stamp_port: arguments.port.or(Some(peer.stamp_port)),
                agent_port: arguments.port.or(Some(peer.agent_port)),
                url: None,
                quirks: Quirks::default(),
                is_agent: arguments.port.is_none(),
                keys: own_keys.or_else(|| settings.keys.mesh.clone()),
            });
        }
        if let Some(target) = config.targets.iter().find(|target| target.name == *name) {
            let wants_url = match arguments.protocol {
                Protocol::Websocket | Protocol::Http => true,
                Protocol::Udp | Protocol::Icmp | Protocol::Tcp => false,
            };
            let schemes: &[Scheme] = match arguments.protocol {
                Protocol::Websocket => &[Scheme::Ws, Scheme::Wss],
                Protocol::Http => &[Scheme::Http, Scheme::Https],
                Protocol::Udp | Protocol::Icmp | Protocol::Tcp => &[],
            };
            if wants_url && !target.url.as_ref().is_some_and(|url| schemes.contains(&url.scheme)) {
                let protocol = arguments.protocol.name();
                return Err(anyhow!("{name} has no url for {protocol} in the configuration").into());
            }
            let host = target.url.as_ref().filter(|_| wants_url).map_or(&target.address, |url| &url.host);
            return Ok(Self {
                host: host.clone(),
                http_port: HTTP_PORT,
                secure: secure(&target.https)?,
                stamp_port: arguments.port.or(Some(target.port)),
                agent_port: arguments.port,
                url: target.url.clone(),
                quirks: target.quirks,
                is_agent: false,
                keys: own_keys.or_else(|| settings.keys.targets.get(name).cloned()),
            });
        }
        Err(anyhow!("the configuration has no peer or target called {name}").into())
    }

    fn by_host(arguments: &EchoArguments, own_keys: Option<Arc<Keys>>) -> Result<Self, Failure> {
        let target = &arguments.target;
        let trusting = |host: &str| Https { trust: Trust::default(), server_name: host.to_owned() };
        let aim = Self {
            host: String::new(),
            http_port: HTTP_PORT,
            secure: None,
            stamp_port: arguments.port,
            agent_port: arguments.port,
            url: None,
            quirks: Quirks::default(),
            is_agent: arguments.port.is_none(),
            keys: own_keys,
        };
        if let Some(url) = url(arguments)? {
            let secure = match url.scheme.is_secure() {
                true => Some(arguments.tls.secure(&trusting(&url.host))?),
                false => arguments.tls.none(target)?,
            };
            return Ok(Self { host: url.host.clone(), secure, url: Some(url), is_agent: false, ..aim });
        }
        let (is_https, authority) = scheme(target);
        let (host, http_port) = split(authority)?;
        let secure = match is_https {
            true => Some(arguments.tls.secure(&trusting(&host))?),
            false => arguments.tls.none(target)?,
        };
        Ok(Self { host, http_port, secure, ..aim })
    }

    /// Whether what is sent is proven with a key.
    pub(super) fn is_authenticated(&self, way: &Way) -> bool {
        match way {
            Way::Datagrams(Wire::Stamp { keys, .. }) => keys.is_some(),
            Way::Datagrams(Wire::Icmp) => false,
            Way::Stream(over) => match &**over {
                Over::Tcp { keys, .. } => keys.is_some(),
                Over::WebSocket { place, .. } | Over::Http { place, .. } => place.signer.is_some(),
            },
        }
    }

    /// Where the target is, and that it will answer.
    pub(super) async fn course(&self, arguments: &EchoArguments) -> anyhow::Result<Course> {
        let address = self.address(arguments).await?;
        let at = |port| SocketAddr::new(address, port);
        let (port, way) = match arguments.protocol {
            Protocol::Udp => {
                let port = self.stamp(address, arguments).await?;
                (port, Way::Datagrams(Wire::Stamp { keys: self.keys.clone(), quirks: self.quirks }))
            }
            Protocol::Icmp => (0, Way::Datagrams(Wire::Icmp)),
            Protocol::Tcp => {
                let port = match self.agent_port {
                    Some(port) => port,
                    None => self.identity(address, arguments).await?.ports.agent,
                };
                let keys = self.keys.as_ref().map(|keys| Arc::new(keys.derive(PURPOSE)));
                let bytes = arguments.size.unwrap_or(MESSAGE_BYTES_MIN);
                (port, Way::Stream(Box::new(Over::Tcp { bytes, keys })))
            }
            Protocol::Websocket => {
                let (port, place) = self.place("/ws");
                if self.url.is_none() {
                    let you = self.identity(address, arguments).await?.you;
                    you.websocket.as_ref().map_or(Ok(()), |answers| answered(answers, &self.host))?;
                }
                let format = wire_format(arguments.format);
                let bytes = arguments.size.map_or_else(|| format.bytes_min(), |bytes| bytes as usize);
                (port, Way::Stream(Box::new(Over::WebSocket { place, format, bytes })))
            }
            Protocol::Http => {
                let (port, place) = self.place(PING);
                let expected = Expected {
                    status: arguments.expect_status.clone(),
                    body: arguments.expect_body.clone(),
                    is_agent: place.path == PING,
                };
                (port, Way::Stream(Box::new(Over::Http { place, expected })))
            }
        };
        Ok(Course { to: at(port), way })
    }

    async fn address(&self, arguments: &EchoArguments) -> anyhow::Result<IpAddr> {
        let addresses = resolver::once(&self.host).await.map_err(|reason| anyhow!(reason))?;
        let fits = |address: &&IpAddr| match arguments.family {
            Family::Auto => arguments.source.is_none_or(|source| source.is_ipv4() == address.is_ipv4()),
            Family::Ipv4 => address.is_ipv4(),
            Family::Ipv6 => address.is_ipv6(),
        };
        let address = addresses.iter().find(fits).copied();
        address.ok_or_else(|| anyhow!("{} has no address of the family that was asked for", self.host))
    }

    /// The STAMP port, where whoever listens will answer as far as it says.
    async fn stamp(&self, address: IpAddr, arguments: &EchoArguments) -> anyhow::Result<u16> {
        if let (Some(port), false) = (self.stamp_port, self.is_agent) {
            return Ok(port);
        }
        let identity = match (self.identity(address, arguments).await, self.stamp_port) {
            (Ok(identity), _) => identity,
            // The configuration knows the port, and HTTP may be closed between the hosts where STAMP is not.
            (Err(_), Some(port)) => return Ok(port),
            (Err(reason), None) => bail!(
                "{reason}\nis an agent there? for a reflector without one give its port, for example --port {}; \
                 for any other host --protocol icmp",
                stamp::PORT
            ),
        };
        answered(&identity.you.stamp, &identity.name)?;
        Ok(self.stamp_port.unwrap_or(identity.ports.stamp))
    }

    async fn identity(&self, address: IpAddr, arguments: &EchoArguments) -> anyhow::Result<Identity> {
        let signer = self.keys.as_deref().map(Signer::new);
        let secure = self.secure.clone();
        let client = Client { signer, source: arguments.source, secure, ..Client::default() };
        let host = authority(&self.host, self.http_port);
        let told = fetch_identity(&client, SocketAddr::new(address, self.http_port), &host).await;
        told.map_err(|reason| anyhow!("{reason}"))
    }

    /// The port of an HTTP server and what is asked of it: `path` of an agent.
    fn place(&self, path: &str) -> (u16, Place) {
        let secure = self.secure.clone();
        match &self.url {
            Some(url) => {
                let (authority, path) = (url.authority(), url.path.clone());
                (url.port, Place { authority, path, signer: None, secure })
            }
            None => {
                let authority = authority(&self.host, self.http_port);
                let signer = self.keys.as_deref().map(Signer::new);
                (self.http_port, Place { authority, path: path.to_owned(), signer, secure })
            }
        }
    }
}

/// Where agents answer HTTP pings.
const PING: &str = "/api/v1/ping";

fn answered(answers: &Answers, name: &str) -> anyhow::Result<()> {
    if answers.answers {
        return Ok(());
    }
    bail!(
        "{}",
        answers.reason.clone().unwrap_or_else(|| format!("{name} will not answer, and does not say why"))
    )
}

/// The URL that a target is, if it is one: of an agent only the host is written, with `https://` before it at most.
fn url(arguments: &EchoArguments) -> anyhow::Result<Option<Url>> {
    let (target, wanted) = match arguments.protocol {
        Protocol::Udp | Protocol::Icmp | Protocol::Tcp => return Ok(None),
        Protocol::Websocket => (&arguments.target, [Scheme::Ws, Scheme::Wss]),
        Protocol::Http => (&arguments.target, [Scheme::Http, Scheme::Https]),
    };
    if !target.contains("://") {
        return Ok(None);
    }
    let url: Url = target.parse().map_err(|problem: String| anyhow!(problem))?;
    if wanted.contains(&url.scheme) {
        return Ok(Some(url));
    }
    ensure!(arguments.protocol == Protocol::Websocket, "{target} is for --protocol websocket");
    Ok(None)
}

fn wire_format(format: Option<Format>) -> websocket::Format {
    match format {
        Some(Format::Binary) => websocket::Format::Binary,
        Some(Format::Text) | None => websocket::Format::Text,
    }
}

/// Refuses options that the protocol does not have.
fn check(arguments: &EchoArguments) -> anyhow::Result<()> {
    let EchoArguments { protocol, .. } = arguments;
    let name = protocol.name();
    let is_stream = protocol.is_stream();
    let strange = [
        ("--flows", is_stream && arguments.flows.is_some(), "udp and icmp"),
        ("--dont-fragment", is_stream && arguments.dont_fragment, "udp and icmp"),
        ("--port", !protocol.has_port() && arguments.port.is_some(), "udp and tcp"),
        ("--format", *protocol != Protocol::Websocket && arguments.format.is_some(), "websocket"),
        ("--expect-status", *protocol != Protocol::Http && !arguments.expect_status.is_empty(), "http"),
        ("--expect-body", *protocol != Protocol::Http && arguments.expect_body.is_some(), "http"),
    ];
    if let Some((option, _, whose)) = strange.iter().find(|(_, is_strange, _)| *is_strange) {
        bail!("{option} is for {whose}, not for {name}");
    }
    if is_stream && arguments.interval < INTERVAL_MIN {
        bail!("--interval over {name} is at least {}", display(INTERVAL_MIN));
    }
    let sizes: RangeInclusive<u32> = match protocol {
        Protocol::Udp => 44..=9_000,
        Protocol::Icmp => Echo::BYTES.into()..=9_000,
        Protocol::Tcp => MESSAGE_BYTES_MIN..=MESSAGE_BYTES_MAX,
        Protocol::Websocket => {
            u32::try_from(wire_format(arguments.format).bytes_min()).unwrap_or(u32::MAX)..=65_536
        }
        Protocol::Http => {
            ensure!(
                arguments.size.is_none(),
                "--size is not for http: what is asked for says how long it is"
            );
            return Ok(());
        }
    };
    if let Some(size) = arguments.size.filter(|size| !sizes.contains(size)) {
        bail!("--size {size}B is out of range for {name}: {}B to {}B", sizes.start(), sizes.end());
    }
    Ok(())
}

/// `HOST`, `HOST:PORT`, an IPv6 address, or `[IPv6]:PORT`.
fn split(target: &str) -> anyhow::Result<(String, u16)> {
    if let Ok(address) = target.parse::<IpAddr>() {
        return Ok((address.to_string(), HTTP_PORT));
    }
    if let Ok(address) = target.parse::<SocketAddr>() {
        return Ok((address.ip().to_string(), address.port()));
    }
    let (host, port) = match target.rsplit_once(':') {
        Some((host, port)) => match port.parse() {
            Ok(port) if port > 0 => (host, port),
            _ => bail!("{target:?}: {port:?} is no port; write HOST or HOST:HTTP_PORT"),
        },
        None => (target, HTTP_PORT),
    };
    if host.is_empty() {
        bail!("{target:?} names no host; write HOST or HOST:HTTP_PORT");
    }
    Ok((host.to_owned(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_host_with_or_without_the_http_port() {
        let ok = |target: &str| split(target).unwrap();
        assert_eq!(ok("ams-1"), ("ams-1".to_owned(), 9_862));
        assert_eq!(ok("ams-1:80"), ("ams-1".to_owned(), 80));
        assert_eq!(ok("2001:db8::1"), ("2001:db8::1".to_owned(), 9_862));
        assert_eq!(ok("[2001:db8::1]:80"), ("2001:db8::1".to_owned(), 80));
        assert!(split("ams-1:http").is_err());
        assert!(split(":80").is_err());
    }
}
