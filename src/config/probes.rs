//! What the keys of a probe mean.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::mtu::CEILING_MIN;

use super::check::{REFLECTOR_PORT, Roster};
use super::file::Node;
use super::problem::{nearest, quoted};
use super::section::{Section, Value};
use super::units::display;
use super::values::{dscp, duration, name, port, size, source};
use super::{EchoProbe, FamilyChoice, Listen, PathMtu, Probe};

const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(3600);

const LATE_AFTER: Duration = Duration::from_secs(1);
const LOST_AFTER: Duration = Duration::from_secs(3);
const LOST_AFTER_MAX: Duration = Duration::from_secs(60);
const DEADLINE_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(1)..=LOST_AFTER_MAX;

/// Datagrams of a path that wait for their verdict. The limits of `interval` and `lost_after` keep it.
const PENDING_MAX: u128 = 65_536;
const _: () = assert!(LOST_AFTER_MAX.as_nanos() / INTERVAL_ALLOWED.start().as_nanos() <= PENDING_MAX);

const FLOWS_ALLOWED: RangeInclusive<i128> = 1..=16;

/// UDP payload: from the smallest STAMP packet (RFC 8762 section 4.2.1) to a jumbo frame.
const SIZE_ALLOWED: RangeInclusive<u64> = 44..=9000;

const PATH_MTU_INTERVAL: Duration = Duration::from_secs(60);
const PATH_MTU_INTERVAL_ALLOWED: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(3600);

/// A whole IP packet: up to a jumbo frame, which an older agent's full-length reply still brings into our buffer.
const CEILING_ALLOWED: RangeInclusive<u16> = CEILING_MIN..=9000;

/// Paths of all probes. Chosen: ten times what the budgets are measured with.
const PATHS_MAX: usize = 100_000;

/// What a probe is checked against.
#[derive(Debug)]
pub(super) struct Surroundings<'a, 'r> {
    own_name: Option<&'r str>,
    listen: Option<&'r Listen>,
    roster: &'r Roster<'a>,
    names: BTreeSet<&'a str>,
    paths: usize,
}

impl<'a, 'r> Surroundings<'a, 'r> {
    pub(super) fn new(own_name: Option<&'r str>, listen: Option<&'r Listen>, roster: &'r Roster<'a>) -> Self {
        Self { own_name, listen, roster, names: BTreeSet::new(), paths: 0 }
    }
}

pub(super) fn probe<'a>(section: &mut Section<'a, '_>, around: &mut Surroundings<'a, '_>) -> Option<Probe> {
    match section.key("kind", |value| value.one_of(&[("echo", Kind::Echo)])).or(Kind::Echo) {
        Some(Kind::Echo) => echo(section, around).map(Probe::Echo),
        None => section.give_up(),
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Echo,
}

#[derive(Debug, Clone, Copy)]
enum Protocol {
    Udp,
}

fn echo<'a>(section: &mut Section<'a, '_>, around: &mut Surroundings<'a, '_>) -> Option<EchoProbe> {
    let name = section.required("name", |value| unique_name(value, &mut around.names));
    let protocol = section.key("protocol", |value| value.one_of(&[("udp", Protocol::Udp)])).or(Protocol::Udp);
    let interval = section.key("interval", |value| duration(value, &INTERVAL_ALLOWED)).or(INTERVAL);
    let flows = section.key("flows", |value| value.number::<u8>(&FLOWS_ALLOWED)).or(1);
    let size = section.key("size", |value| size(value, &SIZE_ALLOWED)).optional();
    let dscp = section.key("dscp", dscp).or(Dscp::DEFAULT);
    let dont_fragment = section.key("dont_fragment", Value::flag).or(false);
    let source = section.key("source", source).optional();
    let source_port = section.key("source_port", port).optional();
    let family = section.key("family", |value| value.one_of(&FAMILIES)).or(FamilyChoice::Auto);
    let late_after = section.key("late_after", |value| duration(value, &DEADLINE_ALLOWED)).or(LATE_AFTER);
    let lost_after = section.key("lost_after", |value| duration(value, &DEADLINE_ALLOWED)).or(LOST_AFTER);

    let path_mtu = section.key("path_mtu", path_mtu).or(None);

    check_deadlines(section, late_after, lost_after);
    check_source(section, source.flatten(), family);
    check_source_ports(section, source_port.flatten(), flows, around.listen);
    let towards = towards(section, family, around);

    let Protocol::Udp = protocol?;
    Some(EchoProbe {
        name: name?.to_owned(),
        towards: towards?,
        interval: interval?,
        flows: flows?,
        size: size?.and_then(|bytes| bytes.try_into().ok()),
        dscp: dscp?,
        dont_fragment: dont_fragment?,
        source: source?,
        source_port: source_port?,
        family: family?,
        late_after: late_after?,
        lost_after: lost_after?,
        path_mtu: path_mtu?,
    })
}

/// `off`, `on`, or what differs from the defaults.
fn path_mtu(value: Value<'_, '_>) -> Option<Option<PathMtu>> {
    match value.node() {
        Node::Mapping(_) => value.section(path_mtu_keys).map(Some),
        Node::Text(text) if text == "on" => {
            Some(Some(PathMtu { interval: PATH_MTU_INTERVAL, ceiling: *CEILING_ALLOWED.end() }))
        }
        Node::Text(text) if text == "off" => Some(None),
        Node::Text(text) => {
            value.wrong(format!("{} is not supported", quoted(text)), format!("write {PATH_MTU_WANTED}"))
        }
        Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) => {
            value.mismatch(PATH_MTU_WANTED)
        }
    }
}

const PATH_MTU_WANTED: &str = "on, off, or a mapping such as {interval: 60s, ceiling: 9000B}";

fn path_mtu_keys(section: &mut Section<'_, '_>) -> Option<PathMtu> {
    let interval =
        section.key("interval", |value| duration(value, &PATH_MTU_INTERVAL_ALLOWED)).or(PATH_MTU_INTERVAL);
    let allowed = u64::from(*CEILING_ALLOWED.start())..=u64::from(*CEILING_ALLOWED.end());
    let ceiling = section.key("ceiling", |value| size(value, &allowed)).or(*allowed.end());
    Some(PathMtu { interval: interval?, ceiling: ceiling?.try_into().ok()? })
}

const FAMILIES: [(&str, FamilyChoice); 4] = [
    ("auto", FamilyChoice::Auto),
    ("ipv4", FamilyChoice::Ipv4),
    ("ipv6", FamilyChoice::Ipv6),
    ("both", FamilyChoice::Both),
];

fn unique_name<'a>(value: Value<'a, '_>, names: &mut BTreeSet<&'a str>) -> Option<&'a str> {
    let name = name(value.clone())?;
    if names.insert(name) {
        Some(name)
    } else {
        value.wrong(format!("another probe is already called {name}"), "give it another name")
    }
}

fn check_deadlines(section: &Section<'_, '_>, late_after: Option<Duration>, lost_after: Option<Duration>) {
    if let (Some(late), Some(lost)) = (late_after, lost_after)
        && lost < late
    {
        let late = display(late);
        let what = format!("{} is shorter than late_after, {late}", display(lost));
        let remedy =
            format!("a reply must be able to be late before its datagram is lost; use at least {late}");
        section.wrong::<()>("lost_after", what, remedy);
    }
}

fn check_source(section: &Section<'_, '_>, source: Option<IpAddr>, family: Option<FamilyChoice>) {
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
        let remedy = format!("write family: {own}, or no source");
        section.wrong::<()>("source", format!("{source} cannot send what family asks for"), remedy);
    }
}

fn check_source_ports(
    section: &Section<'_, '_>,
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
        let what = format!("{flows} flows from port {first} on do not fit below 65536");
        section.wrong::<()>("source_port", what, format!("write at most {last_allowed}"));
    }
    let ours =
        listen.map(|listen| [(listen.stamp.port(), "listen.stamp"), (listen.agent.port(), "listen.agent")]);
    let reflector = (REFLECTOR_PORT, "the port of reflectors, which no responder answers");
    for (port, owner) in ours.into_iter().flatten().chain([reflector]) {
        if ports.contains(&port.into()) {
            let what = format!("the flows would send from port {port}: {owner}");
            section.wrong::<()>("source_port", what, "choose ports that nobody listens on");
            return;
        }
    }
}

/// The hosts that a probe measures; all peers when it names none.
fn towards<'a>(
    section: &mut Section<'a, '_>,
    family: Option<FamilyChoice>,
    around: &mut Surroundings<'a, '_>,
) -> Option<Vec<String>> {
    let Roster { peers, targets, .. } = around.roster;
    let chosen_peers =
        section.key("peers", |value| selection(value, ("peer", peers), ("target", targets))).optional();
    let chosen_targets =
        section.key("targets", |value| selection(value, ("target", targets), ("peer", peers))).optional();

    let mut hosts = match (chosen_peers?, chosen_targets?) {
        (None, None) => peers.clone(),
        (chosen_peers, chosen_targets) => chosen_peers.into_iter().chain(chosen_targets).flatten().collect(),
    };
    let own_name = around.own_name?;
    hosts.remove(own_name);
    if hosts.is_empty() {
        section.warn("peers", "nothing is measured: no host is left but this one", "add peers or targets");
    }
    around.paths += match family? {
        FamilyChoice::Auto | FamilyChoice::Ipv4 | FamilyChoice::Ipv6 => hosts.len(),
        FamilyChoice::Both => 2 * hosts.len(),
    };
    if around.paths > PATHS_MAX {
        let what = format!("with this probe the file has {} paths", around.paths);
        return section.wrong("peers", what, format!("at most {PATHS_MAX} are allowed: name fewer hosts"));
    }
    Some(hosts.into_iter().map(str::to_owned).collect())
}

/// `all`, or a list of names; `other` is what belongs under the other key.
fn selection<'a>(
    value: Value<'a, '_>,
    (what, known): (&str, &BTreeSet<&'a str>),
    (other, others): (&str, &BTreeSet<&'a str>),
) -> Option<BTreeSet<&'a str>> {
    let wanted = format!("all, or a list of {what} names such as [a-1, a-2]");
    if let Node::Text(text) = value.node() {
        if text == "all" {
            return Some(known.clone());
        }
        return value.wrong(format!("{} is not a list", quoted(text)), format!("write {wanted}"));
    }
    let names = value.list(&wanted, |value| {
        let name = value.text(&format!("a {what}'s name"))?;
        if known.contains(name) {
            return Some(name);
        }
        let remedy = if others.contains(name) {
            format!("it is a {other}: write it under {other}s")
        } else {
            nearest(name, known.iter().copied())
                .map_or_else(|| format!("add it to {what}s"), |near| format!("did you mean {near}?"))
        };
        value.wrong(format!("no {what} is called {}", quoted(name)), remedy)
    })?;
    Some(names.into_iter().collect())
}
