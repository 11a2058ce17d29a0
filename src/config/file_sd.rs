//! Lists of hosts in the format of Prometheus' `file_sd` and `http_sd`, YAML or JSON.
//!
//! One list serves both: Prometheus takes from it whom to scrape, and we take whom to measure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::diagnostic::{Problems, quoted};
use super::file::{self, Node};
use super::reader::{Diagnostics, MappingReader, ValueReader};
use super::url::Url;
use super::values::{LABELS_MAX, NAME_RULE, is_host_name, is_name, is_one_host, label, label_of};
use super::{Loaded, finish};

/// A host that a provider knows of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Member {
    /// What it is called; `None`: only it can tell, if it is an agent.
    pub name: Option<String>,
    /// An IP address or a host name.
    pub host: String,
    /// The port that stands beside it: that of HTTP of an agent, of the reflector of a target.
    pub port: Option<u16>,
    /// An agent's STAMP port, where it is another than all have.
    pub stamp_port: Option<u16>,
    /// An agent's agent port, where it is another than all have.
    pub agent_port: Option<u16>,
    /// What is measured of a target over HTTP or a WebSocket.
    pub url: Option<Url>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Members of one list. Chosen: as many peers and targets as a configuration may have.
pub const MEMBERS_MAX: usize = 20_000;

/// Labels that are for us; others that begin with `__` are for whoever made the list.
const NAME: &str = "instance";
const STAMP_PORT: &str = "__pathmeter_stamp_port";
const AGENT_PORT: &str = "__pathmeter_agent_port";

/// Reads a list.
///
/// # Errors
/// Everything that is wrong with it at once. A list is taken as a whole or not at all: half of a fleet is not the fleet.
pub fn read(text: &[u8]) -> Result<Vec<Member>, Problems> {
    let tree = file::read(text)?;
    let diagnostics = Diagnostics::default();
    let mut room = MEMBERS_MAX;
    let members = ValueReader::top(&tree, &diagnostics)
        .list("a list of {targets: […], labels: {…}}", |group| {
            group.section(|group| read_group(group, &mut room))
        });
    let Loaded { config, .. } = finish(text, members, diagnostics)?;
    let members: Vec<Member> = config.into_iter().flatten().collect();
    Ok(members)
}

/// A service as the DNS has it: a host with a name and a port.
///
/// # Errors
/// A sentence, if nobody can be called that.
pub fn service(host: &str, port: u16) -> Result<Member, String> {
    if !is_host_name(host) || !is_name(host) {
        return Err(format!("{} is not a name for a host: {NAME_RULE}", quoted(host)));
    }
    let (name, host) = (Some(host.to_owned()), host.to_owned());
    Ok(Member { name, host, port: Some(port), ..Member::default() })
}

/// Reads a group, for whose hosts there is so much `room`.
fn read_group(section: &mut MappingReader<'_, '_>, room: &mut usize) -> Option<Vec<Member>> {
    let shared = section.key("labels", shared).or(GroupLabels::default());
    let found = section.key("targets", |value| value.list("a list of host:port", member)).or(Vec::new());
    let (GroupLabels { name, stamp_port, agent_port, labels }, found) = (shared?, found?);
    let Some(left) = room.checked_sub(found.len()) else {
        let what = format!("with these the list has more than {MEMBERS_MAX} hosts");
        return section.reject("targets", what, format!("at most {MEMBERS_MAX} are allowed"));
    };
    *room = left;
    if name.is_some() && found.len() > 1 {
        let what = format!("{} hosts have the same label {NAME}", found.len());
        return section.reject("labels", what, "make each a group of its own, or leave the label out");
    }
    let named = found.into_iter().map(|member| Member {
        name: name.clone().or(member.name),
        stamp_port,
        agent_port,
        labels: labels.clone(),
        ..member
    });
    Some(named.collect())
}

/// What the labels of a group say of each of its hosts.
#[derive(Debug, Default)]
struct GroupLabels {
    name: Option<String>,
    stamp_port: Option<u16>,
    agent_port: Option<u16>,
    labels: BTreeMap<String, String>,
}

fn shared(value: ValueReader<'_, '_>) -> Option<GroupLabels> {
    let whole = value.clone();
    let mut shared = GroupLabels::default();
    value.entries("a mapping of label names to texts", |key, value| {
        match key {
            // What Prometheus has no label of.
            _ if is_nothing(&value) => {}
            NAME => shared.name = Some(own_name(value)?),
            STAMP_PORT => shared.stamp_port = Some(port(value)?),
            AGENT_PORT => shared.agent_port = Some(port(value)?),
            _ if key.starts_with("__") => {}
            _ => {
                let (key, text) = match value.node() {
                    Node::Int(number) => label_of(key, &number.to_string(), &value)?,
                    Node::Null
                    | Node::Bool(_)
                    | Node::Float(_)
                    | Node::Text(_)
                    | Node::List(_)
                    | Node::Mapping(_) => label(key, value)?,
                };
                drop(shared.labels.insert(key, text));
            }
        }
        Some(())
    })?;
    if shared.labels.len() > LABELS_MAX {
        let what = format!("{} labels", shared.labels.len());
        return whole.reject(what, format!("at most {LABELS_MAX} are allowed"));
    }
    Some(shared)
}

fn is_nothing(value: &ValueReader<'_, '_>) -> bool {
    match value.node() {
        Node::Null => true,
        Node::Text(text) => text.is_empty(),
        Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) | Node::Mapping(_) => false,
    }
}

fn own_name(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a name")?;
    match is_name(text) {
        true => Some(text.to_owned()),
        false => value.reject(
            format!("{} is not a name", quoted(text)),
            format!("the label {NAME} is the host's name among peers and targets: {NAME_RULE}"),
        ),
    }
}

/// Labels are texts, ports too.
fn port(value: ValueReader<'_, '_>) -> Option<u16> {
    let text = value.text("a port")?;
    match text.parse() {
        Ok(port) if port > 0 => Some(port),
        Ok(_) | Err(_) => value.reject(format!("{} is not a port", quoted(text)), "write 1 to 65535"),
    }
}

fn member(value: ValueReader<'_, '_>) -> Option<Member> {
    let text = value.text("a host and a port such as fra-1.example.net:9862")?;
    if text.contains("://") {
        return match text.parse::<Url>() {
            Ok(url) => Some(Member { host: url.host.clone(), url: Some(url), ..Member::default() }),
            Err(what) => value.reject(what, "for example https://shop.example.net/health"),
        };
    }
    let Some((host, port)) = host_and_port(text) else {
        let what = format!("{} is not a host, or a host and a port", quoted(text));
        return value
            .reject(what, "for example fra-1.example.net:9862, 192.0.2.1:9862 or [2001:db8::1]:9862");
    };
    let name = Some(host).filter(|host| host.parse::<IpAddr>().is_err() && is_name(host));
    Some(Member { name: name.map(str::to_owned), host: host.to_owned(), port, ..Member::default() })
}

fn host_and_port(text: &str) -> Option<(&str, Option<u16>)> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return is_one_host(address).then_some((text, None));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        let (host, _) = text.rsplit_once(':')?;
        let is_usable = is_one_host(address.ip()) && address.port() > 0;
        return is_usable.then_some((host.trim_matches(['[', ']']), Some(address.port())));
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, Some(port.parse().ok().filter(|port| *port > 0)?)),
        None => (text, None),
    };
    is_host_name(host).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<(Option<String>, String, Option<u16>)> {
        let members = read(text.as_bytes()).unwrap_or_else(|problems| panic!("{problems}"));
        members.into_iter().map(|member| (member.name, member.host, member.port)).collect()
    }

    fn named(name: &str, host: &str, port: Option<u16>) -> (Option<String>, String, Option<u16>) {
        (Some(name.to_owned()), host.to_owned(), port)
    }

    #[test]
    fn a_list_of_prometheus_is_read_in_yaml_and_in_json() {
        let yaml =
            "- targets: [fra-1.example.net:9862, '192.0.2.1', '[2001:db8::1]:9100']\n  labels: {site: fra}\n";
        let json = r#"[{"targets": ["fra-1.example.net:9862", "192.0.2.1", "[2001:db8::1]:9100"], "labels": {"site": "fra"}}]"#;
        assert_eq!(read(yaml.as_bytes()), read(json.as_bytes()));
        let nameless = |host: &str, port| (None, host.to_owned(), port);
        let expected = vec![
            named("fra-1.example.net", "fra-1.example.net", Some(9862)),
            nameless("192.0.2.1", None),
            nameless("2001:db8::1", Some(9100)),
        ];
        assert_eq!(names(yaml), expected);
        assert_eq!(names("[]"), []);
    }

    #[test]
    fn labels_that_are_for_us_are_taken_and_those_of_others_left_alone() {
        let text = "- targets: ['192.0.2.1:80']\n  labels: {instance: fra-1, zone: a, __meta_x: y, __pathmeter_stamp_port: '862'}\n";
        let member = read(text.as_bytes()).unwrap().remove(0);
        assert_eq!((member.name.as_deref(), member.port), (Some("fra-1"), Some(80)));
        assert_eq!((member.stamp_port, member.agent_port), (Some(862), None));
        assert_eq!(member.labels, BTreeMap::from([("zone".to_owned(), "a".to_owned())]));
    }

    #[test]
    fn a_url_is_what_is_measured() {
        let member = read(b"- targets: ['https://shop.example.net/health']\n  labels: {instance: shop}\n")
            .unwrap()
            .remove(0);
        assert_eq!((member.host.as_str(), member.port), ("shop.example.net", None));
        assert_eq!(member.url.unwrap().path, "/health");
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once_with_its_place() {
        let text = "- targets: [a b, 'x:0', 10.0.0.256]\n  labels: {instance: 'a/b', 0x: y, __pathmeter_agent_port: many}\n- target: []\n- targets: [a, b]\n  labels: {instance: c}\n";
        let problems = read(text.as_bytes()).unwrap_err();
        let found: Vec<String> = problems.iter().map(|problem| problem.to_string()).collect();
        assert_eq!(found.len(), 8, "{found:#?}");
        assert!(found[0].starts_with("line 1, column 13: [0].targets[0]: `a b` is not a host"), "{found:#?}");
        assert!(found.iter().any(|line| line.contains("2 hosts have the same label instance")), "{found:#?}");
    }

    #[test]
    fn labels_are_what_prometheus_makes_of_them_and_a_group_may_be_empty() {
        let text =
            "- labels: {x: y}\n- targets: [a]\n  labels: {instance: '', rack: 5, none: null, empty: ''}\n";
        let found = read(text.as_bytes()).unwrap_or_else(|problems| panic!("{problems}"));
        let labels = BTreeMap::from([("rack".to_owned(), "5".to_owned())]);
        assert_eq!(found, [Member { name: Some("a".into()), host: "a".into(), labels, ..Member::default() }]);
    }

    #[test]
    fn a_list_has_a_limit_however_it_is_grouped() {
        let group = |number| format!("- targets: [h{number}]\n");
        let list: String = (0..MEMBERS_MAX).map(group).collect();
        assert_eq!(read(list.as_bytes()).unwrap().len(), MEMBERS_MAX);
        let why = read((list + &group(MEMBERS_MAX)).as_bytes()).unwrap_err().to_string();
        assert!(why.contains("[20000].targets: with these the list has more than 20000 hosts"), "{why}");
    }
}
