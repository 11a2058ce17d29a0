//! What the keys of a probe mean.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;

use super::check::Roster;
use super::file::Node;
use super::problem::{nearest, quoted};
use super::section::{Section, Value};
use super::transport::{PROTOCOLS, Protocol, transport};
use super::units::display;
use super::values::{dscp, duration, name, source};
use super::{EchoProbe, FamilyChoice, Listen, Probe};

const INTERVAL: Duration = Duration::from_secs(1);
pub(super) const INTERVAL_ALLOWED: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(3600);

const LATE_AFTER: Duration = Duration::from_secs(1);
const LOST_AFTER: Duration = Duration::from_secs(3);
/// Over a connection: by then TCP has sent a lost segment again six times.
const LOST_AFTER_STREAM: Duration = Duration::from_secs(15);
const LOST_AFTER_MAX: Duration = Duration::from_secs(60);
const DEADLINE_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(1)..=LOST_AFTER_MAX;

/// Datagrams of a path that wait for their verdict. The limits of `interval` and `lost_after` keep it.
const PENDING_MAX: u128 = 65_536;
const _: () = assert!(LOST_AFTER_MAX.as_nanos() / INTERVAL_ALLOWED.start().as_nanos() <= PENDING_MAX);

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

fn echo<'a>(section: &mut Section<'a, '_>, around: &mut Surroundings<'a, '_>) -> Option<EchoProbe> {
    let name = section.required("name", |value| unique_name(value, &mut around.names));
    let Some(protocol) = section.key("protocol", |value| value.one_of(&PROTOCOLS)).or(Protocol::Udp) else {
        return section.give_up();
    };
    let interval = section.key("interval", |value| duration(value, &protocol.intervals())).or(INTERVAL);
    let dscp = section.key("dscp", dscp).or(Dscp::DEFAULT);
    let source = section.key("source", source).optional();
    let family = section.key("family", |value| value.one_of(&FAMILIES)).or(FamilyChoice::Auto);
    let lost_after = if protocol.is_stream() { LOST_AFTER_STREAM } else { LOST_AFTER };
    let late_after = section.key("late_after", |value| duration(value, &DEADLINE_ALLOWED)).or(LATE_AFTER);
    let lost_after = section.key("lost_after", |value| duration(value, &DEADLINE_ALLOWED)).or(lost_after);
    let transport = transport(section, protocol, around.listen);

    check_deadlines(section, late_after, lost_after);
    check_source(section, source.flatten(), family);
    let towards = towards(section, protocol, family, around);

    Some(EchoProbe {
        name: name?.to_owned(),
        towards: towards?,
        transport: transport?,
        interval: interval?,
        dscp: dscp?,
        source: source?,
        family: family?,
        late_after: late_after?,
        lost_after: lost_after?,
    })
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

/// The hosts that a probe measures; all peers when it names none.
fn towards<'a>(
    section: &mut Section<'a, '_>,
    protocol: Protocol,
    family: Option<FamilyChoice>,
    around: &mut Surroundings<'a, '_>,
) -> Option<Vec<String>> {
    let Roster { peers, targets, .. } = around.roster;
    let targets = &targets.keys().copied().collect();
    let chosen_peers =
        section.key("peers", |value| selection(value, ("peer", peers), ("target", targets))).optional();
    let chosen_targets =
        section.key("targets", |value| selection(value, ("target", targets), ("peer", peers))).optional();

    let mut hosts = match (chosen_peers?, chosen_targets?) {
        (None, None) => peers.clone(),
        (chosen_peers, chosen_targets) => chosen_peers.into_iter().chain(chosen_targets).flatten().collect(),
    };
    for target in hosts.iter().filter_map(|host| around.roster.targets.get(host)) {
        if let Err((what, remedy)) = protocol.reaches(target) {
            section.wrong::<()>("targets", what, remedy);
        }
    }
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
