//! Reads the peers and targets that a file declares.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use pathmeter_proto::echo::{Profile, Quirks, ReflectorTimes};

use super::defaults::REFLECTOR_PORT;
use super::reader::{MappingReader, Setting, ValueReader};
use super::tls::{https_for, peer_https};
use super::url::{Scheme, url};
use super::values::{host, labels, name, path, port};
use super::{Listen, Peer, Target, Trust};

/// The names that a file declares. Entries with other problems are included, so that these are not reported
/// again for the probes that select them.
#[derive(Debug, Default)]
pub(super) struct DeclaredHosts<'a> {
    /// The path at which each name was declared first.
    paths: BTreeMap<&'a str, String>,
    pub(super) peers: BTreeSet<&'a str>,
    pub(super) targets: BTreeMap<&'a str, DeclaredHost>,
    /// Whether providers may list further peers.
    pub(super) has_peer_providers: bool,
    /// Whether providers may list further targets.
    pub(super) has_target_providers: bool,
}

/// The properties of a target that probes are checked against.
#[derive(Debug)]
pub(super) struct DeclaredHost {
    pub(super) name: String,
    /// The scheme of its URL; `None`: it has no URL.
    pub(super) scheme: Option<Scheme>,
}

#[derive(Debug, Clone, Copy)]
enum EntryKind {
    Peer,
    Target,
}

impl<'a> DeclaredHosts<'a> {
    fn declare(&mut self, value: ValueReader<'a, '_>, entry: EntryKind) -> Option<&'a str> {
        let name = name(value.clone())?;
        if let Some(first) = self.paths.get(name) {
            let remedy = "use unique names: peers and targets are identified by the label `peer`";
            return value.reject(format!("{name} is already used at {first}"), remedy);
        }
        self.paths.insert(name, value.path().to_string());
        match entry {
            EntryKind::Peer => drop(self.peers.insert(name)),
            EntryKind::Target => {
                drop(self.targets.insert(name, DeclaredHost { name: name.to_owned(), scheme: None }));
            }
        }
        Some(name)
    }
}

pub(super) fn peer<'a>(
    section: &mut MappingReader<'a, '_>,
    listen: Option<&Listen>,
    trust: &Trust,
    declared_hosts: &mut DeclaredHosts<'a>,
) -> Option<Peer> {
    let name = section.required("name", |value| declared_hosts.declare(value, EntryKind::Peer));
    let address = section.required("address", host);
    let http_port = peer_port(section, "http_port", listen.map(|listen| listen.http));
    let stamp_port = peer_port(section, "stamp_port", listen.map(|listen| listen.stamp));
    let agent_port = peer_port(section, "agent_port", listen.map(|listen| listen.agent));
    let https = peer_https(section, address.as_deref(), trust);
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

/// A port of a peer; by default the same as that of this agent.
pub(super) fn peer_port(
    section: &mut MappingReader<'_, '_>,
    key: &'static str,
    own: Option<SocketAddr>,
) -> Option<u16> {
    match (section.key(key, port), own?.port()) {
        (Setting::Given(port), _) => Some(port),
        (Setting::Invalid, _) => None,
        (Setting::Absent, 0) => {
            section.reject(key, "missing", "set it: the default is the own port, which is 0")
        }
        (Setting::Absent, own) => Some(own),
    }
}

pub(super) fn target<'a>(
    section: &mut MappingReader<'a, '_>,
    trust: &Trust,
    declared_hosts: &mut DeclaredHosts<'a>,
) -> Option<Target> {
    let name = section.required("name", |value| declared_hosts.declare(value, EntryKind::Target));
    let url = section.key("url", url).optional();
    let secure = url.iter().flatten().find(|url| url.scheme.is_secure());
    let https = https_for("url", section, secure.is_some(), secure.map(|url| url.host.as_str()), trust);
    let address = match &url {
        Some(Some(url)) => section.key("address", host).or(url.host.clone()),
        Some(None) => section.required("address", host),
        None => section.key("address", host).or(String::new()),
    };
    let reflector = reflector(section);
    let key_file = section.key("key_file", path).optional();
    let labels = section.key("labels", labels).or(BTreeMap::new());
    if let (Some(name), Some(Some(url))) = (name, &url)
        && let Some(declared) = declared_hosts.targets.get_mut(name)
    {
        declared.scheme = Some(url.scheme);
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

/// The port of a reflector, and its known deviations from the protocol.
pub(super) fn reflector(section: &mut MappingReader<'_, '_>) -> Option<(u16, Quirks)> {
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
