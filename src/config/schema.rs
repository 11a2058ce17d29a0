//! The keys of a configuration file, their allowed values and their defaults.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::bandwidth::bandwidth;
use super::defaults::{AGENT_PORT, HTTP_PORT, STAMP_PORT, ZONE_LABEL};
use super::diagnostic::{nearest, quoted};
use super::discovery::{self, is_provider};
use super::file::Node;
use super::hosts::{DeclaredHosts, peer, target};
use super::probes::{ProbeContext, probe};
use super::reader::{Diagnostics, MappingReader, ValueReader};
use super::tls::tls;
use super::trace;
use super::values::{
    NAME_RULE, duration, is_name, label_name, labels, listen_address, name, packet_rate, path, prefix,
};
use super::websocket::websocket;
use super::{
    Agent, Config, Listen, LoadContext, Log, LogFormat, Metrics, Provider, ResponderRules, SeriesLevel,
};

/// Duration of a shutdown, by default and at most. Chosen: systemd kills after 90 s.
const GRACE: Duration = Duration::from_secs(5);
const GRACE_ALLOWED: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);

/// Datagrams that are answered per second. Chosen: one core can answer these and do other work, and ten
/// sources at their limit share them.
const RATE: u64 = 100_000;
const RATE_PER_SOURCE: u64 = 10_000;
const RATE_ALLOWED: RangeInclusive<u64> = 1..=100_000_000;

/// Sessions of the responder. Chosen: more than the flows of a thousand peers.
const SESSIONS: usize = 65_536;
const SESSIONS_ALLOWED: RangeInclusive<i128> = 1..=16_777_216;

/// Maximum networks in `responder.allow`: each datagram from a source that is not a peer is compared with all
/// of them.
const ALLOW_MAX: usize = 1000;

/// Maximum peers and targets together. Chosen: twice the 10,000 paths that one agent is built for.
const HOSTS_MAX: usize = 20_000;

/// Maximum providers of peers and targets together; each is a task.
const PROVIDERS_MAX: usize = 64;

/// Maximum probes of a file.
const PROBES_MAX: usize = 256;

/// Series of all paths. Chosen: 70 for each of 10,000 paths, with a margin.
const SERIES: usize = 1_000_000;
const SERIES_ALLOWED: RangeInclusive<i128> = 1..=10_000_000;

const LEVELS: [(&str, bool); 2] = [("pair", false), ("group", true)];

/// Worst paths that have series of their own. Chosen: fits on a screen.
const WORST: usize = 20;
const WORST_ALLOWED: RangeInclusive<i128> = 0..=1000;

/// Reads the whole file; `None` if a problem was reported.
pub(super) fn read<'a>(
    tree: &'a Node,
    host: &'a LoadContext,
    diagnostics: &Diagnostics<'a>,
) -> Option<Config> {
    ValueReader::top(tree, diagnostics).section(|file| {
        let agent = file.section("agent", |section| agent(section, host));
        let listen = file.section("listen", listen);
        let state_dir = file.key("state_dir", path).optional();
        let key_file = file.key("key_file", path).optional();
        let tls = file.section("tls", tls);
        let responder = file.section("responder", responder);
        let websocket = file.section("websocket", websocket);
        let bandwidth = file.section("bandwidth", bandwidth);

        let mut declared = DeclaredHosts::default();
        let mut provider_names = BTreeSet::new();
        let trust = tls.as_ref().map(|tls| tls.client.clone()).unwrap_or_default();
        let peers = file.sections("peers", |section| match is_provider(section) {
            true => {
                declared.has_peer_providers = true;
                let read = discovery::peers(section, listen.as_ref(), &trust);
                provider(section, &mut provider_names, read)
            }
            false if discovery::is_neither(section) => None,
            false => peer(section, listen.as_ref(), &trust, &mut declared).map(ListEntry::Host),
        });
        let targets = file.sections("targets", |section| match is_provider(section) {
            true => {
                declared.has_target_providers = true;
                let read = discovery::targets(section, &trust);
                provider(section, &mut provider_names, read)
            }
            false if discovery::is_neither(section) => None,
            false => target(section, &trust, &mut declared).map(ListEntry::Host),
        });
        let hosts = declared.peers.len() + declared.targets.len();
        if hosts > HOSTS_MAX {
            let remedy = format!("at most {HOSTS_MAX} are allowed together");
            file.reject::<()>("peers", format!("{hosts} peers and targets"), remedy);
        }

        let own_name = agent.as_ref().map(|agent| agent.name.as_str());
        let mut context = ProbeContext::new(own_name, listen.as_ref(), &declared);
        let probes = file.sections("probes", |section| probe(section, &mut context));
        if probes.as_ref().is_some_and(|probes| probes.len() > PROBES_MAX) {
            file.reject::<()>("probes", "too many probes", format!("at most {PROBES_MAX} are allowed"));
        }

        let trace = file.section("trace", trace::rules);
        let metrics = file.section("metrics", metrics);
        let log = file.section("log", log);
        if matches!(key_file, Some(None)) {
            let remedy = "give every agent the same key file, for example /etc/pathmeter/mesh.key";
            file.warn(
                "key_file",
                "packets are not authenticated: requests are accepted by source address alone",
                remedy,
            );
        }

        let agent = agent?;
        let (mut peers, mut providers) = split(peers?);
        let (mut targets, of_targets) = split(targets?);
        providers.extend(of_targets);
        if providers.len() > PROVIDERS_MAX {
            let what = format!("{} providers", providers.len());
            file.reject::<()>("peers", what, format!("at most {PROVIDERS_MAX} are allowed"));
        }
        peers.retain(|peer| peer.name != agent.name);
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        targets.sort_by(|a, b| a.name.cmp(&b.name));
        Some(Config {
            agent,
            listen: listen?,
            state_dir: state_dir?.or_else(|| host.state_dir.clone()),
            key_file: key_file?,
            tls: tls?,
            responder: responder?,
            websocket: websocket?,
            bandwidth: bandwidth?,
            peers,
            targets,
            providers,
            probes: probes?,
            trace: trace?,
            metrics: metrics?,
            log: log?,
        })
    })
}

/// An entry of `peers` or `targets`.
enum ListEntry<T> {
    Host(T),
    Provider(Box<Provider>),
}

fn split<T>(listed: Vec<ListEntry<T>>) -> (Vec<T>, Vec<Provider>) {
    let (mut hosts, mut providers) = (Vec::new(), Vec::new());
    for entry in listed {
        match entry {
            ListEntry::Host(host) => hosts.push(host),
            ListEntry::Provider(provider) => providers.push(*provider),
        }
    }
    (hosts, providers)
}

/// An entry that is a provider. Reports a problem if an earlier provider has the same name.
fn provider<T>(
    section: &MappingReader<'_, '_>,
    known: &mut BTreeSet<String>,
    provider: Option<Provider>,
) -> Option<ListEntry<T>> {
    let provider = provider?;
    if !known.insert(provider.name.clone()) {
        let what = format!("duplicate provider {}", provider.name);
        return section.reject(provider.key(), what, "remove one of the two");
    }
    Some(ListEntry::Provider(Box::new(provider)))
}

fn agent(section: &mut MappingReader<'_, '_>, host: &LoadContext) -> Option<Agent> {
    let given = section.key("name", name).optional();
    let labels = section.key("labels", labels).or(BTreeMap::new());
    let grace = section.key("grace", |value| duration(value, &GRACE_ALLOWED)).or(GRACE);

    let (name, origin) = match (&host.name_override, given?) {
        (Some(name), _) => (name.as_str(), "--name or $PATHMETER_NAME"),
        (None, Some(name)) => (name, "the file"),
        (None, None) => (host.hostname.as_str(), "the host name"),
    };
    if !is_name(name) {
        let what = format!("{} from {origin} is not a valid name", quoted(name));
        return section.reject("name", what, format!("{NAME_RULE}; set agent.name, or use --name"));
    }
    let mut labels = labels?;
    labels.extend(host.labels.clone());
    Some(Agent { name: name.to_owned(), labels, grace: grace? })
}

fn listen(section: &mut MappingReader<'_, '_>) -> Option<Listen> {
    let unspecified = |port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let http = section.key("http", listen_address).or(unspecified(HTTP_PORT));
    let stamp = section.key("stamp", listen_address).or(unspecified(STAMP_PORT));
    let agent = section.key("agent", listen_address).or(unspecified(AGENT_PORT));

    let listen = Listen { http: http?, stamp: stamp?, agent: agent? };
    // The agent port uses UDP as the STAMP port does, and TCP as the HTTP port does.
    for (other, address) in [("http", listen.http), ("stamp", listen.stamp)] {
        if overlap(listen.agent, address) {
            let what = format!("{} is also used by listen.{other}", listen.agent);
            return section.reject(
                "agent",
                what,
                format!("use different ports for listen.agent and listen.{other}"),
            );
        }
    }
    Some(listen)
}

/// Whether the addresses of two sockets conflict.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // The kernel replaces port 0 by a different port each time. `[::]` stands for both families, `0.0.0.0`
    // for IPv4.
    let covers = |a: IpAddr, b: IpAddr| a == b || a.is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
}

fn responder(section: &mut MappingReader<'_, '_>) -> Option<ResponderRules> {
    let allow = section.key("allow", allow).or(Vec::new());
    let open = section.key("open", ValueReader::boolean).or(false);
    let rate = section.key("rate", |value| packet_rate(value, &RATE_ALLOWED)).or(RATE);
    let rate_per_source =
        section.key("rate_per_source", |value| packet_rate(value, &RATE_ALLOWED)).or(RATE_PER_SOURCE);
    let sessions = section.key("sessions", |value| value.number(&SESSIONS_ALLOWED)).or(SESSIONS);

    if open == Some(true) {
        let remedy = "list the allowed networks in responder.allow instead";
        section.warn("open", "requests from any source are answered, up to the rate limits", remedy);
    }
    Some(ResponderRules {
        allow: allow?,
        open: open?,
        rate: rate?,
        rate_per_source: rate_per_source?,
        sessions: sessions?,
    })
}

fn allow(value: ValueReader<'_, '_>) -> Option<Vec<super::Prefix>> {
    let whole = value.clone();
    let networks = value.list("a list of networks", prefix)?;
    if networks.len() > ALLOW_MAX {
        return whole
            .reject(format!("{} networks", networks.len()), format!("at most {ALLOW_MAX} are allowed"));
    }
    Some(networks)
}

fn metrics(section: &mut MappingReader<'_, '_>) -> Option<Metrics> {
    let series_max = section.key("series_max", |value| value.number(&SERIES_ALLOWED)).or(SERIES);
    let is_by_group = section.key("level", |value| value.one_of(&LEVELS)).or(false);
    let label = section.key("group_by", label_name).optional();
    let worst = section.key("worst", |value| value.number(&WORST_ALLOWED)).optional();
    let (is_by_group, label, worst) = (is_by_group?, label?, worst?);
    for (key, is_given) in [("group_by", label.is_some()), ("worst", worst.is_some())] {
        if is_given && !is_by_group {
            section.warn(key, "has no effect with level: pair", "write level: group, or remove it");
        }
    }
    let level = match is_by_group {
        true => SeriesLevel::Group {
            label: label.unwrap_or_else(|| ZONE_LABEL.to_owned()),
            worst: worst.unwrap_or(WORST),
        },
        false => SeriesLevel::Pair,
    };
    Some(Metrics { series_max: series_max?, level })
}

fn log(section: &mut MappingReader<'_, '_>) -> Option<Log> {
    let level = section.key("level", log_level).or("info".to_owned());
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json)];
    let format = section.key("format", |value| value.one_of(&formats)).or(LogFormat::Text);
    Some(Log { level: level?, format: format? })
}

/// A level or a filter. The parser of filters accepts a misspelt level as the name of a module, so single
/// words are compared with the levels here.
fn log_level(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a level such as info")?;
    let remedy =
        || format!("write {}, or a filter such as warn,pathmeter::http=debug", LOG_LEVELS.join(", "));
    for word in text.split(',').map(str::trim).filter(|part| !part.contains(['=', '[', ']', '{', '}'])) {
        if !LOG_LEVELS.contains(&word) {
            let guess = nearest(word, LOG_LEVELS).map(|level| format!("did you mean {level}? "));
            return value.reject(
                format!("{} is not a log level", quoted(word)),
                guess.unwrap_or_default() + &remedy(),
            );
        }
    }
    match tracing_subscriber::EnvFilter::builder().parse(text) {
        Ok(_) => Some(text.to_owned()),
        Err(_) => value.reject(format!("{} is not a valid log filter", quoted(text)), remedy()),
    }
}

const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
