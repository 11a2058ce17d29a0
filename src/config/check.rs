//! What the keys of a file mean, which values they allow, and their defaults.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::echo::{Profile, Quirks, ReflectorTimes};

use super::discovery::{self, is_provider};
use super::file::Node;
use super::probes::{Surroundings, probe};
use super::problem::{nearest, quoted};
use super::section::{Notes, Section, Setting, Value};
use super::tls::{asked, https, tls};
use super::url::{Scheme, url};
use super::values::{
    NAME_RULE, duration, host, is_name, label_name, labels, listen_address, name, packet_rate, path, port,
    prefix,
};
use super::websocket::websocket;
use super::{
    Agent, Config, Host, Level, Listen, Log, LogFormat, Metrics, Peer, Provider, Responder, Target, Trust,
};

/// How long a stop may take by default, and at most: systemd waits 90 s before it kills.
const GRACE: Duration = Duration::from_secs(5);
const GRACE_ALLOWED: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);

/// Where we listen. Chosen: above 1024, so that no privilege is needed. Over UDP, 9862 speaks STAMP.
const HTTP_PORT: u16 = 9862;
const STAMP_PORT: u16 = 9862;
const AGENT_PORT: u16 = 9863;

/// The port of STAMP and TWAMP-Light reflectors (RFC 8762 section 4.1).
pub(super) const REFLECTOR_PORT: u16 = 862;

/// Datagrams that are answered per second. Chosen: what one core does beside other work,
/// and that ten sources at their limit share it.
const RATE: u64 = 100_000;
const RATE_PER_SOURCE: u64 = 10_000;
const RATE_ALLOWED: RangeInclusive<u64> = 1..=100_000_000;

/// Sessions that are remembered. Chosen: more than the flows of a thousand peers.
const SESSIONS: usize = 65_536;
const SESSIONS_ALLOWED: RangeInclusive<i128> = 1..=16_777_216;

/// Networks in `responder.allow`: each datagram from a stranger is compared with all of them.
const ALLOW_MAX: usize = 1000;

/// Peers and targets together. Chosen: twice the 10,000 paths that one agent is built for.
const HOSTS_MAX: usize = 20_000;

/// Providers of peers and targets together; each is a task.
const PROVIDERS_MAX: usize = 64;

/// Probes of a file.
const PROBES_MAX: usize = 256;

/// Series of paths. Chosen: 70 for each of 10,000 paths, and some.
const SERIES: usize = 1_000_000;
const SERIES_ALLOWED: RangeInclusive<i128> = 1..=10_000_000;

const LEVELS: [(&str, bool); 2] = [("pair", false), ("group", true)];

/// The label that tells a zone, unless another is named.
pub(super) const ZONE: &str = "zone";

/// Worst paths that have series of their own. Chosen: what fits a screen.
const WORST: usize = 20;
const WORST_ALLOWED: RangeInclusive<i128> = 0..=1000;

/// Reads everything; `None` when a problem was noted.
pub(super) fn check<'a>(tree: &'a Node, host: &'a Host, notes: &Notes<'a>) -> Option<Config> {
    Value::top(tree, notes).section(|file| {
        let agent = file.section("agent", |section| agent(section, host));
        let listen = file.section("listen", listen);
        let key_file = file.key("key_file", path).optional();
        let tls = file.section("tls", tls);
        let responder = file.section("responder", responder);
        let websocket = file.section("websocket", websocket);

        let mut roster = Roster::default();
        let trust = tls.as_ref().map(|tls| tls.client.clone()).unwrap_or_default();
        let peers = file.sections("peers", |section| match is_provider(section) {
            true => {
                roster.finds_peers = true;
                let provider = discovery::peers(section, listen.as_ref(), &trust);
                roster.enter_provider(section, provider)
            }
            false if discovery::is_neither(section) => None,
            false => peer(section, listen.as_ref(), &trust, &mut roster).map(Listed::Host),
        });
        let targets = file.sections("targets", |section| match is_provider(section) {
            true => {
                roster.finds_targets = true;
                let provider = discovery::targets(section, &trust);
                roster.enter_provider(section, provider)
            }
            false if discovery::is_neither(section) => None,
            false => target(section, &trust, &mut roster).map(Listed::Host),
        });
        let hosts = roster.peers.len() + roster.targets.len();
        if hosts > HOSTS_MAX {
            let remedy = format!("peers and targets are at most {HOSTS_MAX} together");
            file.wrong::<()>("peers", format!("{hosts} peers and targets"), remedy);
        }

        let own_name = agent.as_ref().map(|agent| agent.name.as_str());
        let mut around = Surroundings::new(own_name, listen.as_ref(), &roster);
        let probes = file.sections("probes", |section| probe(section, &mut around));
        if probes.as_ref().is_some_and(|probes| probes.len() > PROBES_MAX) {
            file.wrong::<()>("probes", "too many probes", format!("at most {PROBES_MAX} are allowed"));
        }

        let metrics = file.section("metrics", metrics);
        let log = file.section("log", log);
        if matches!(key_file, Some(None)) {
            let remedy = "give every agent the same key file, for example /etc/pathmeter/mesh.key";
            file.warn("key_file", "nothing is authenticated: addresses alone decide who is answered", remedy);
        }

        let agent = agent?;
        let (mut peers, mut providers) = apart(peers?);
        let (mut targets, of_targets) = apart(targets?);
        providers.extend(of_targets);
        if providers.len() > PROVIDERS_MAX {
            let what = format!("{} providers", providers.len());
            file.wrong::<()>("peers", what, format!("at most {PROVIDERS_MAX} are allowed"));
        }
        peers.retain(|peer| peer.name != agent.name);
        peers.sort_by(|a, b| a.name.cmp(&b.name));
        targets.sort_by(|a, b| a.name.cmp(&b.name));
        Some(Config {
            agent,
            listen: listen?,
            key_file: key_file?,
            tls: tls?,
            responder: responder?,
            websocket: websocket?,
            peers,
            targets,
            providers,
            probes: probes?,
            metrics: metrics?,
            log: log?,
        })
    })
}

/// An entry of `peers` or `targets`.
enum Listed<T> {
    Host(T),
    Provider(Box<Provider>),
}

fn apart<T>(listed: Vec<Listed<T>>) -> (Vec<T>, Vec<Provider>) {
    let (mut hosts, mut providers) = (Vec::new(), Vec::new());
    for entry in listed {
        match entry {
            Listed::Host(host) => hosts.push(host),
            Listed::Provider(provider) => providers.push(*provider),
        }
    }
    (hosts, providers)
}

fn agent(section: &mut Section<'_, '_>, host: &Host) -> Option<Agent> {
    let given = section.key("name", name).optional();
    let labels = section.key("labels", labels).or(BTreeMap::new());
    let grace = section.key("grace", |value| duration(value, &GRACE_ALLOWED)).or(GRACE);

    let (name, origin) = match (&host.name_override, given?) {
        (Some(name), _) => (name.as_str(), "--name or $PATHMETER_NAME"),
        (None, Some(name)) => (name, "the file"),
        (None, None) => (host.hostname.as_str(), "the host's name"),
    };
    if !is_name(name) {
        let what = format!("{} ({origin}) is not a name", quoted(name));
        return section.wrong("name", what, format!("{NAME_RULE}; give another"));
    }
    let mut labels = labels?;
    labels.extend(host.labels.clone());
    Some(Agent { name: name.to_owned(), labels, grace: grace? })
}

fn listen(section: &mut Section<'_, '_>) -> Option<Listen> {
    let everywhere = |port| SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let http = section.key("http", listen_address).or(everywhere(HTTP_PORT));
    let stamp = section.key("stamp", listen_address).or(everywhere(STAMP_PORT));
    let agent = section.key("agent", listen_address).or(everywhere(AGENT_PORT));

    let listen = Listen { http: http?, stamp: stamp?, agent: agent? };
    // The agent port is open over UDP as stamp is, and over TCP as http is.
    for (other, address) in [("http", listen.http), ("stamp", listen.stamp)] {
        if overlap(listen.agent, address) {
            let what = format!("{} is also where {other} listens", listen.agent);
            return section.wrong("agent", what, format!("give agent and {other} different ports"));
        }
    }
    Some(listen)
}

/// Whether one socket would take the other's place.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // Port 0 is a different one each time; `[::]` is both families, `0.0.0.0` only its own.
    let covers = |a: IpAddr, b: IpAddr| a == b || a.is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() == b.port() && a.port() != 0 && (covers(a.ip(), b.ip()) || covers(b.ip(), a.ip()))
}

fn responder(section: &mut Section<'_, '_>) -> Option<Responder> {
    let allow = section.key("allow", allow).or(Vec::new());
    let open = section.key("open", Value::flag).or(false);
    let rate = section.key("rate", |value| packet_rate(value, &RATE_ALLOWED)).or(RATE);
    let rate_per_source =
        section.key("rate_per_source", |value| packet_rate(value, &RATE_ALLOWED)).or(RATE_PER_SOURCE);
    let sessions = section.key("sessions", |value| value.number(&SESSIONS_ALLOWED)).or(SESSIONS);

    if open == Some(true) {
        let remedy = "list the networks that may ask in responder.allow instead";
        section.warn("open", "anyone is answered, within the rates", remedy);
    }
    Some(Responder {
        allow: allow?,
        open: open?,
        rate: rate?,
        rate_per_source: rate_per_source?,
        sessions: sessions?,
    })
}

fn allow(value: Value<'_, '_>) -> Option<Vec<super::Prefix>> {
    let whole = value.clone();
    let networks = value.list("a list of networks", prefix)?;
    if networks.len() > ALLOW_MAX {
        return whole
            .wrong(format!("{} networks", networks.len()), format!("at most {ALLOW_MAX} are allowed"));
    }
    Some(networks)
}

fn peer<'a>(
    section: &mut Section<'a, '_>,
    listen: Option<&Listen>,
    trust: &Trust,
    roster: &mut Roster<'a>,
) -> Option<Peer> {
    let name = section.required("name", |value| roster.enter(value, Entry::Peer));
    let address = section.required("address", host);
    let http_port = peer_port(section, "http_port", listen.map(|listen| listen.http));
    let stamp_port = peer_port(section, "stamp_port", listen.map(|listen| listen.stamp));
    let agent_port = peer_port(section, "agent_port", listen.map(|listen| listen.agent));
    let https = https(section, address.as_deref(), trust);
    let labels = section.key("labels", labels).or(BTreeMap::new());
    Some(Peer {
        name: name?.to_owned(),
        address: address?,
        https: https?,
        http_port: http_port?,
        stamp_port: stamp_port?,
        agent_port: agent_port?,
        labels: labels?,
    })
}

/// A peer's port, by default our own.
pub(super) fn peer_port(
    section: &mut Section<'_, '_>,
    key: &'static str,
    ours: Option<SocketAddr>,
) -> Option<u16> {
    match (section.key(key, port), ours?.port()) {
        (Setting::Given(port), _) => Some(port),
        (Setting::Wrong, _) => None,
        (Setting::Absent, 0) => {
            section.wrong(key, "missing", "our own port is 0, which is no default: write the peer's")
        }
        (Setting::Absent, ours) => Some(ours),
    }
}

fn target<'a>(section: &mut Section<'a, '_>, trust: &Trust, roster: &mut Roster<'a>) -> Option<Target> {
    let name = section.required("name", |value| roster.enter(value, Entry::Target));
    let url = section.key("url", url).optional();
    let secure = url.iter().flatten().find(|url| url.scheme.is_secure());
    let https = asked("url", section, secure.is_some(), secure.map(|url| url.host.as_str()), trust);
    let address = match &url {
        Some(Some(url)) => section.key("address", host).or(url.host.clone()),
        Some(None) => section.required("address", host),
        None => section.key("address", host).or(String::new()),
    };
    let reflector = reflector(section);
    let key_file = section.key("key_file", path).optional();
    let labels = section.key("labels", labels).or(BTreeMap::new());
    if let (Some(name), Some(Some(url))) = (name, &url)
        && let Some(entrant) = roster.targets.get_mut(name)
    {
        entrant.scheme = Some(url.scheme);
    }
    let (port, quirks) = reflector?;
    Some(Target {
        name: name?.to_owned(),
        address: address?,
        port,
        quirks,
        url: url?,
        https: https?,
        key_file: key_file?,
        labels: labels?,
    })
}

/// The port of a reflector, and what it does otherwise than it should.
pub(super) fn reflector(section: &mut Section<'_, '_>) -> Option<(u16, Quirks)> {
    let port = section.key("port", port).or(REFLECTOR_PORT);
    let profile = section.key("profile", |value| value.one_of(&PROFILES)).or(Profile::Detect);
    let times = section.key("timestamps", |value| value.one_of(&TIMES)).or(ReflectorTimes::Marked);
    Some((port?, Quirks { profile: profile?, times: times? }))
}

/// See [`Profile`].
const PROFILES: [(&str, Profile); 4] = [
    ("auto", Profile::Detect),
    ("stamp", Profile::Stamp),
    ("plain", Profile::Plain),
    ("twamp-light", Profile::TwampLight),
];

/// See [`ReflectorTimes`].
const TIMES: [(&str, ReflectorTimes); 4] = [
    ("auto", ReflectorTimes::Marked),
    ("ntp", ReflectorTimes::Ntp),
    ("ptp", ReflectorTimes::Ptp),
    ("ignore", ReflectorTimes::Ignored),
];

fn metrics(section: &mut Section<'_, '_>) -> Option<Metrics> {
    let max_series = section.key("max_series", |value| value.number(&SERIES_ALLOWED)).or(SERIES);
    let is_by_group = section.key("level", |value| value.one_of(&LEVELS)).or(false);
    let label = section.key("group_by", label_name).optional();
    let worst = section.key("worst", |value| value.number(&WORST_ALLOWED)).optional();
    let (is_by_group, label, worst) = (is_by_group?, label?, worst?);
    for (key, is_given) in [("group_by", label.is_some()), ("worst", worst.is_some())] {
        if is_given && !is_by_group {
            section.warn(key, "not used: the level is pair", "write level: group beside it, or remove it");
        }
    }
    let level = match is_by_group {
        true => {
            Level::Group { label: label.unwrap_or_else(|| ZONE.to_owned()), worst: worst.unwrap_or(WORST) }
        }
        false => Level::Pair,
    };
    Some(Metrics { max_series: max_series?, level })
}

fn log(section: &mut Section<'_, '_>) -> Option<Log> {
    let level = section.key("level", log_level).or("info".to_owned());
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json)];
    let format = section.key("format", |value| value.one_of(&formats)).or(LogFormat::Text);
    Some(Log { level: level?, format: format? })
}

/// A level, or a filter: the filter's own grammar takes a misspelt level for a module, so words that stand alone
/// are compared here.
fn log_level(value: Value<'_, '_>) -> Option<String> {
    let text = value.text("a level such as info")?;
    let remedy =
        || format!("write {}, or a filter such as warn,pathmeter::http=debug", LOG_LEVELS.join(", "));
    for word in text.split(',').map(str::trim).filter(|part| !part.contains(['=', '[', ']', '{', '}'])) {
        if !LOG_LEVELS.contains(&word) {
            let guess = nearest(word, LOG_LEVELS).map(|level| format!("did you mean {level}? "));
            return value
                .wrong(format!("{} is not a level", quoted(word)), guess.unwrap_or_default() + &remedy());
        }
    }
    match tracing_subscriber::EnvFilter::builder().parse(text) {
        Ok(_) => Some(text.to_owned()),
        Err(_) => value.wrong(format!("{} is not a filter", quoted(text)), remedy()),
    }
}

const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The names of a file, those of entries with other problems too: a probe that uses them is not to blame.
#[derive(Debug, Default)]
pub(super) struct Roster<'a> {
    /// Where each name was first given.
    places: BTreeMap<&'a str, String>,
    pub(super) peers: BTreeSet<&'a str>,
    pub(super) targets: BTreeMap<&'a str, Entrant>,
    /// Whether there are providers: then names may be unknown.
    pub(super) finds_peers: bool,
    pub(super) finds_targets: bool,
    /// Of providers.
    providers: BTreeSet<String>,
}

/// What probes must know of a target.
#[derive(Debug)]
pub(super) struct Entrant {
    pub(super) name: String,
    /// Of its URL; `None`: it has none.
    pub(super) scheme: Option<Scheme>,
}

#[derive(Debug, Clone, Copy)]
enum Entry {
    Peer,
    Target,
}

impl<'a> Roster<'a> {
    fn enter_provider<T>(
        &mut self,
        section: &Section<'_, '_>,
        provider: Option<Provider>,
    ) -> Option<Listed<T>> {
        let provider = provider?;
        if !self.providers.insert(provider.name.clone()) {
            let what = format!("{} is asked already", provider.name);
            return section.wrong(provider.key(), what, "remove one of the two");
        }
        Some(Listed::Provider(Box::new(provider)))
    }

    fn enter(&mut self, value: Value<'a, '_>, entry: Entry) -> Option<&'a str> {
        let name = name(value.clone())?;
        if let Some(first) = self.places.get(name) {
            let remedy = "peers and targets need different names, the label `peer` tells them apart";
            return value.wrong(format!("{name} is already {first}"), remedy);
        }
        self.places.insert(name, value.place().to_string());
        match entry {
            Entry::Peer => drop(self.peers.insert(name)),
            Entry::Target => {
                drop(self.targets.insert(name, Entrant { name: name.to_owned(), scheme: None }));
            }
        }
        Some(name)
    }
}
