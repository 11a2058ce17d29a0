//! `pathmeter probe echo`.

use std::io::{self, IsTerminal as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::{anyhow, bail};
use pathmeter_proto::echo::{Quirks, Report, Spec, Wire};
use pathmeter_proto::key::Keys;
use pathmeter_proto::wire::stamp;

use super::summary::{Decided, Findings};
use super::tls::scheme;
use super::{EchoArguments, Failure, Family, host, runtime, say};
use crate::config::{Https, Trust};
use crate::datagram::{Duties, EVENTS, Event, Handle, NewPath, PathId, SourceChoice, StampNames};
use crate::http::auth::Signer;
use crate::http::client::{Client, Secure};
use crate::keys;
use crate::metrics::echo::EchoSeries;
use crate::peers::{authority, identity_of};
use crate::resolver;
use crate::settings::Settings;

/// The HTTP port of an agent, unless TARGET says another.
const HTTP_PORT: u16 = 9_862;

const LATE_AFTER: Duration = Duration::from_secs(1);
const LOST_AFTER: Duration = Duration::from_secs(3);

/// How often the live line is written.
const LINE_EVERY: Duration = Duration::from_millis(100);

/// Whom to measure.
struct Aim {
    host: String,
    http_port: u16,
    /// How its HTTP port is asked with TLS; `None`: without.
    secure: Option<Secure>,
    /// The reflector's port, when it need not be asked for.
    stamp_port: Option<u16>,
    /// Whether an agent is known to be there, which says whether it will answer.
    is_agent: bool,
    keys: Option<Arc<Keys>>,
}

pub(super) fn echo(arguments: &EchoArguments) -> Result<(), Failure> {
    let aim = aim(arguments)?;
    runtime()?.block_on(async {
        let to = responder(arguments, &aim).await?;
        if !arguments.json {
            let every = crate::config::units::display(arguments.interval);
            let mode = if aim.keys.is_some() { ", authenticated" } else { "" };
            say(&format!(
                "{} ({to}): {} datagrams every {every}{mode}\n",
                arguments.target, arguments.count
            ))?;
        }
        measure(arguments, &aim, to).await
    })
}

fn aim(arguments: &EchoArguments) -> Result<Aim, Failure> {
    let own_keys = match &arguments.key_file {
        Some(path) => Some(Arc::new(keys::read(path).map_err(crate::settings::SettingsError::from)?.0)),
        None => None,
    };
    if let Some(path) = &arguments.config {
        let settings = Settings::read(path, &host(None))?;
        let name = &arguments.target;
        if let Some(peer) = settings.config.peers.iter().find(|peer| peer.name == *name) {
            return Ok(Aim {
                host: peer.address.clone(),
                http_port: peer.http_port,
                secure: match &peer.https {
                    Some(https) => Some(arguments.tls.secure(https)?),
                    None => arguments.tls.none(name)?,
                },
                stamp_port: arguments.port.or(Some(peer.stamp_port)),
                is_agent: arguments.port.is_none(),
                keys: own_keys.or(settings.keys.mesh),
            });
        }
        if let Some(target) = settings.config.targets.iter().find(|target| target.name == *name) {
            return Ok(Aim {
                host: target.address.clone(),
                http_port: HTTP_PORT,
                secure: arguments.tls.none(name)?,
                stamp_port: arguments.port.or(Some(target.port)),
                is_agent: false,
                keys: own_keys.or_else(|| settings.keys.targets.get(name).cloned()),
            });
        }
        return Err(anyhow!("{} has no peer or target called {name}", path.display()).into());
    }
    let target = &arguments.target;
    let (is_https, authority) = scheme(target);
    let (host, http_port) = split(authority)?;
    let secure = match is_https {
        true => {
            let https = Https { trust: Trust::default(), server_name: host.clone() };
            Some(arguments.tls.secure(&https)?)
        }
        false => arguments.tls.none(target)?,
    };
    Ok(Aim {
        host,
        http_port,
        secure,
        stamp_port: arguments.port,
        is_agent: arguments.port.is_none(),
        keys: own_keys,
    })
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

/// Where the responder listens, and that it will answer.
async fn responder(arguments: &EchoArguments, aim: &Aim) -> anyhow::Result<SocketAddr> {
    let addresses = resolver::once(&aim.host).await.map_err(|reason| anyhow!(reason))?;
    let fits = |address: &&IpAddr| match arguments.family {
        Family::Auto => arguments.source.is_none_or(|source| source.is_ipv4() == address.is_ipv4()),
        Family::Ipv4 => address.is_ipv4(),
        Family::Ipv6 => address.is_ipv6(),
    };
    let address = addresses.iter().find(fits).copied();
    let address =
        address.ok_or_else(|| anyhow!("{} has no address of the family that was asked for", aim.host))?;
    if let (Some(port), false) = (aim.stamp_port, aim.is_agent) {
        return Ok(SocketAddr::new(address, port));
    }
    let signer = aim.keys.as_deref().map(Signer::new);
    let secure = aim.secure.clone();
    let client = Client { signer, source: arguments.source, secure, ..Client::default() };
    let host = authority(&aim.host, aim.http_port);
    let told = identity_of(&client, SocketAddr::new(address, aim.http_port), &host).await;
    let identity = match (told, aim.stamp_port) {
        (Ok(identity), _) => identity,
        // The configuration knows the port, and HTTP may be closed between the hosts where STAMP is not.
        (Err(_), Some(port)) => return Ok(SocketAddr::new(address, port)),
        (Err(reason), None) => bail!(
            "{reason}\nis an agent there? for a reflector without one give its port, for example --port {}",
            stamp::PORT
        ),
    };
    if !identity.you.stamp.answers {
        let unknown = format!("{} does not say why", identity.name);
        bail!("{}", identity.you.stamp.reason.unwrap_or(unknown));
    }
    Ok(SocketAddr::new(address, aim.stamp_port.unwrap_or(identity.ports.stamp)))
}

async fn measure(arguments: &EchoArguments, aim: &Aim, to: SocketAddr) -> Result<(), Failure> {
    let (reports, tap) = channel();
    let (sender, mut events) = tokio::sync::mpsc::channel(EVENTS);
    let prober = Handle::spawn("prober", Duties::default(), StampNames::detect(), sender)?;
    prober.add(path(arguments, aim, to, reports)?);
    let mut findings = Findings::default();
    let is_live = !arguments.json && io::stdout().is_terminal();
    let mut ticker = tokio::time::interval(LINE_EVERY);
    let mut is_interrupted = false;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(Event::Failed { error, .. }) => return Err(anyhow::Error::from(error).into()),
                Some(Event::Finished(_)) | None => break,
                Some(
                    Event::Started { .. }
                    | Event::Broken { .. }
                    | Event::PathMtu { .. }
                    | Event::Goodbye(_)
                    | Event::ClockStepped(_)
                    | Event::Suspended(_),
                ) => {}
            },
            _ = ticker.tick() => {
                take(&tap, &mut findings, arguments)?;
                if is_live {
                    say(&format!("\r\x1b[K{}", findings.line(arguments.count)))?;
                }
            }
            _ = tokio::signal::ctrl_c(), if !is_interrupted => {
                is_interrupted = true;
                prober.stop(LOST_AFTER);
            }
        }
        if prober.is_finished() {
            break;
        }
    }
    take(&tap, &mut findings, arguments)?;
    prober.stop(Duration::ZERO);
    if is_live {
        say("\r\x1b[K")?;
    }
    let summary = match arguments.json {
        true => findings.json(&arguments.target, to).map_err(anyhow::Error::from)? + "\n",
        false => findings.text(&arguments.target, to),
    };
    say(&summary)?;
    if findings.has_answer() { Ok(()) } else { Err(Failure::Quiet) }
}

fn take(tap: &Receiver<Report>, findings: &mut Findings, arguments: &EchoArguments) -> Result<(), Failure> {
    let mut lines = String::new();
    for report in tap.try_iter() {
        findings.add(&report);
        if arguments.json_each
            && let Some(datagram) = Decided::of(&report)
        {
            lines += &(serde_json::to_string(&datagram).map_err(anyhow::Error::from)? + "\n");
        }
    }
    if lines.is_empty() { Ok(()) } else { say(&lines) }
}

fn path(
    arguments: &EchoArguments,
    aim: &Aim,
    to: SocketAddr,
    reports: mpsc::Sender<Report>,
) -> anyhow::Result<NewPath> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|error| anyhow!("drawing a random number: {error}"))?;
    let family = if to.is_ipv4() { "ipv4" } else { "ipv6" };
    Ok(NewPath {
        id: PathId(1),
        spec: Spec {
            to,
            wire: Wire::Stamp { keys: aim.keys.clone(), quirks: Quirks::default() },
            interval: arguments.interval,
            ssids: vec![0; usize::from(arguments.flows)],
            size: arguments.size,
            dscp: arguments.dscp,
            late_after: LATE_AFTER,
            lost_after: LOST_AFTER,
            transmit_stamps: true,
            count: Some(arguments.count),
            seed: u64::from_ne_bytes(seed),
        },
        from: SourceChoice {
            address: arguments.source.unwrap_or(any),
            port: 0,
            dont_fragment: arguments.dont_fragment,
        },
        series: Arc::new(EchoSeries::new("once", &arguments.target, family, arguments.flows.into())),
        path_mtu: None,
        absent_since: None,
        tap: Some(reports),
    })
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
