//! Reads the section of a probe: the keys that all kinds have in common.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use pathmeter_proto::selection::Zones;

use super::bandwidth;
use super::defaults::ZONE_LABEL;
use super::diagnostic::{nearest, quoted};
use super::echo;
use super::file::Node;
use super::hosts::DeclaredHosts;
use super::kind::KindReader;
use super::reader::{MappingReader, ValueReader};
use super::trace;
use super::values::{dscp, duration, is_name, label_name, name, source};
use super::{FamilyChoice, Listen, Probe, Selection};

/// Maximum number of paths of all probes. Chosen: ten times the number that the budgets are measured with.
pub const PATHS_MAX: usize = 100_000;

/// Number of peers that a rule selects in the own zone, or in each other zone.
const COUNT_ALLOWED: RangeInclusive<i128> = 0..=1000;
/// Number of peers that a ring selects. With 0, no agent would be measured.
const RING_COUNT_ALLOWED: RangeInclusive<i128> = 1..=1000;

/// The parts of a configuration that a probe is checked against.
#[derive(Debug)]
pub(super) struct ProbeContext<'a, 'r> {
    own_name: Option<&'r str>,
    listen: Option<&'r Listen>,
    declared: &'r DeclaredHosts<'a>,
    names: BTreeSet<&'a str>,
    /// The probes read so far, which later ones can follow.
    probes: Vec<Probe>,
    paths: usize,
}

impl<'a, 'r> ProbeContext<'a, 'r> {
    pub(super) fn new(
        own_name: Option<&'r str>,
        listen: Option<&'r Listen>,
        declared: &'r DeclaredHosts<'a>,
    ) -> Self {
        Self { own_name, listen, declared, names: BTreeSet::new(), probes: Vec::new(), paths: 0 }
    }
}

/// Returns the reader for the keys that are specific to the kind of the probe, as given by the key `kind`,
/// and the probe that it follows, if it follows one.
fn reader(
    section: &mut MappingReader<'_, '_>,
    probes: &[Probe],
) -> Option<(Box<dyn KindReader>, Option<Probe>)> {
    #[derive(Clone, Copy)]
    enum Name {
        Echo,
        Trace,
        Bandwidth,
        #[cfg(test)]
        Sample,
    }
    const KINDS: &[(&str, Name)] = &[
        ("echo", Name::Echo),
        ("trace", Name::Trace),
        ("bandwidth", Name::Bandwidth),
        #[cfg(test)]
        ("sample", Name::Sample),
    ];
    match section.key("kind", |value| value.one_of(KINDS)).or(Name::Echo)? {
        Name::Echo => echo::reader(section).map(|reader| (reader, None)),
        Name::Bandwidth => Some((Box::new(bandwidth::BandwidthReader), None)),
        Name::Trace => trace::followed(section, probes).map(|(reader, probe)| (reader, Some(probe))),
        #[cfg(test)]
        Name::Sample => Some((Box::new(super::sample::SampleReader), None)),
    }
}

pub(super) fn probe<'a>(
    section: &mut MappingReader<'a, '_>,
    context: &mut ProbeContext<'a, '_>,
) -> Option<Probe> {
    let name = section.required("name", |value| unique_name(value, &mut context.names));
    let Some((reader, followed)) = reader(section, &context.probes) else {
        return section.ignore_rest();
    };
    let interval = section
        .key("interval", |value| duration(value, &reader.interval_allowed()))
        .or(reader.interval_default());
    if let Some(followed) = followed {
        let kind = reader.read(section, context.listen);
        return Some(Probe { name: name?.to_owned(), interval: interval?, kind: kind?, ..followed });
    }
    let dscp = section.key("dscp", dscp).or(reader.dscp_default());
    let source = section.key("source", source).optional();
    let family = section.key("family", |value| value.one_of(&FAMILIES)).or(FamilyChoice::Auto);
    let kind = reader.read(section, context.listen);

    check_source(section, source.flatten(), family);
    let selections = selections(section, &*reader, family, context);

    let (peers, targets) = selections?;
    let probe = Probe {
        name: name?.to_owned(),
        peers,
        targets,
        family: family?,
        source: source?,
        interval: interval?,
        dscp: dscp?,
        kind: kind?,
    };
    context.probes.push(probe.clone());
    Some(probe)
}

const FAMILIES: [(&str, FamilyChoice); 4] = [
    ("auto", FamilyChoice::Auto),
    ("ipv4", FamilyChoice::Ipv4),
    ("ipv6", FamilyChoice::Ipv6),
    ("both", FamilyChoice::Both),
];

fn unique_name<'a>(value: ValueReader<'a, '_>, names: &mut BTreeSet<&'a str>) -> Option<&'a str> {
    let name = name(value.clone())?;
    if names.insert(name) {
        Some(name)
    } else {
        value.reject(format!("another probe is already named {name}"), "use a unique name")
    }
}

fn check_source(section: &MappingReader<'_, '_>, source: Option<IpAddr>, family: Option<FamilyChoice>) {
    let (Some(source), Some(family)) = (source, family) else {
        return;
    };
    let fits = match family {
        FamilyChoice::Auto => true,
        FamilyChoice::Ipv4 => source.is_ipv4(),
        FamilyChoice::Ipv6 => source.is_ipv6(),
        FamilyChoice::Both => false,
    };
    if !fits {
        let own = if source.is_ipv4() { "ipv4" } else { "ipv6" };
        let remedy = format!("write family: {own}, or remove source");
        section.reject::<()>("source", format!("{source} does not match the address family"), remedy);
    }
}

/// The peers and the targets that a probe measures. All peers if it has neither of the keys.
fn selections<'a>(
    section: &mut MappingReader<'a, '_>,
    reader: &dyn KindReader,
    family: Option<FamilyChoice>,
    context: &mut ProbeContext<'a, '_>,
) -> Option<(Selection, Selection)> {
    let declared = context.declared;
    let targets: BTreeSet<&str> = declared.targets.keys().copied().collect();
    let of_peers =
        KnownNames { what: "peer", known: &declared.peers, has_providers: declared.has_peer_providers };
    let of_targets =
        KnownNames { what: "target", known: &targets, has_providers: declared.has_target_providers };
    let peer_selection = section.key("peers", |value| selection(value, &of_peers, &of_targets)).optional();
    let target_selection =
        section.key("targets", |value| selection(value, &of_targets, &of_peers)).optional();
    let none = || Selection::Named(Vec::new());
    let (peers, targets) = match (peer_selection?, target_selection?) {
        (None, None) => (Selection::All, none()),
        (peers, targets) => (peers.unwrap_or_else(none), targets.unwrap_or_else(none)),
    };

    let own_name = context.own_name?;
    let known_peers = of_peers.selected(&peers, own_name);
    let known_targets = of_targets.selected(&targets, own_name);
    for target in known_targets.iter().filter_map(|name| declared.targets.get(name)) {
        if let Err((what, remedy)) = reader.check_target(target) {
            section.reject::<()>("targets", what, remedy);
        }
    }
    let hosts = known_peers.len().min(peers.max_len()) + known_targets.len();
    if hosts == 0 && !declared.has_peer_providers && !declared.has_target_providers {
        section.warn("peers", "this probe selects no host other than this one", "add peers or targets");
    }
    context.paths += match family? {
        FamilyChoice::Auto | FamilyChoice::Ipv4 | FamilyChoice::Ipv6 => hosts,
        FamilyChoice::Both => 2 * hosts,
    };
    if context.paths > PATHS_MAX {
        let what = format!("with this probe the file has {} paths", context.paths);
        return section.reject("peers", what, format!("at most {PATHS_MAX} are allowed: select fewer hosts"));
    }
    Some((peers, targets))
}

/// The names of all peers, or of all targets, that the file declares.
struct KnownNames<'a, 'r> {
    what: &'static str,
    known: &'r BTreeSet<&'a str>,
    /// Whether the file has providers, which may list further names.
    has_providers: bool,
}

impl<'a> KnownNames<'a, '_> {
    /// The declared names that a selection includes, without that of this agent.
    fn selected(&self, selection: &Selection, own_name: &str) -> BTreeSet<&'a str> {
        let is_selected = |name: &str| match selection {
            Selection::All | Selection::Ring { .. } | Selection::Zones { .. } => true,
            Selection::Named(names) => names.binary_search_by(|selected| selected.as_str().cmp(name)).is_ok(),
        };
        self.known.iter().copied().filter(|name| *name != own_name && is_selected(name)).collect()
    }
}

impl Selection {
    /// The most hosts that it can select. With zones this depends on their number, so there is no limit.
    fn max_len(&self) -> usize {
        match self {
            Self::All | Self::Named(_) | Self::Zones { .. } => usize::MAX,
            Self::Ring { k } => *k,
        }
    }
}

/// Reads `all`, a list of names, or a rule. `others` are the names that belong under the other key.
fn selection(
    value: ValueReader<'_, '_>,
    names: &KnownNames<'_, '_>,
    others: &KnownNames<'_, '_>,
) -> Option<Selection> {
    let what = names.what;
    let expected = format!("all, or a list of {what} names such as [a-1, a-2]");
    match value.node() {
        Node::Text(text) if text == "all" => return Some(Selection::All),
        Node::Text(text) => {
            return value.reject(format!("{} is not a list", quoted(text)), format!("write {expected}"));
        }
        Node::Mapping(_) if what == "peer" => return value.section(selection_rule),
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) | Node::Mapping(_) => {}
    }
    let mut selected = value.list(&expected, |value| {
        let name = value.text(&format!("the name of a {what}"))?;
        if names.known.contains(name) || (names.has_providers && is_name(name)) {
            return Some(name.to_owned());
        }
        let remedy = if others.known.contains(name) {
            format!("it is a {other}: list it under {other}s", other = others.what)
        } else {
            nearest(name, names.known.iter().copied())
                .map_or_else(|| format!("add it to {what}s"), |near| format!("did you mean {near}?"))
        };
        value.reject(format!("no {what} is named {}", quoted(name)), remedy)
    })?;
    selected.sort_unstable();
    selected.dedup();
    Some(Selection::Named(selected))
}

/// Reads the rule by which each agent selects its own peers.
fn selection_rule(section: &mut MappingReader<'_, '_>) -> Option<Selection> {
    #[derive(Clone, Copy)]
    enum Rule {
        All,
        Ring,
        Zones,
    }
    const RULES: [(&str, Rule); 3] = [("all", Rule::All), ("ring", Rule::Ring), ("zones", Rule::Zones)];
    let Some(rule) = section.required("select", |value| value.one_of(&RULES)) else {
        return section.ignore_rest();
    };
    let count = |value: ValueReader<'_, '_>| value.number(&COUNT_ALLOWED);
    match rule {
        Rule::All => Some(Selection::All),
        Rule::Ring => {
            section.required("k", |value| value.number(&RING_COUNT_ALLOWED)).map(|k| Selection::Ring { k })
        }
        Rule::Zones => {
            let within = section.required("within", count);
            let across = section.required("across", count);
            let label = section.key("label", label_name).or(ZONE_LABEL.to_owned());
            let choice = Zones { within: within?, across: across? };
            Some(Selection::Zones { choice, label: label? })
        }
    }
}
