//! Lists of hosts in the format of Prometheus' `file_sd` and `http_sd`, YAML or JSON.
//!
//! The same list can serve Prometheus, which scrapes its hosts, and the agent, which measures them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::diagnostic::{Problems, quoted};
use super::file::{self, Node};
use super::reader::{Diagnostics, MappingReader, ValueReader};
use super::url::Url;
use super::values::{LABELS_MAX, NAME_RULE, is_host_name, is_name, is_unicast, label, label_of};
use super::{Loaded, finish};

/// A host that a provider lists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Member {
    /// Its name; `None`: the list does not have it. An agent reports its own.
    pub name: Option<String>,
    /// An IP address or a host name.
    pub host: String,
    /// The port in the list: the HTTP port of an agent, or the reflector port of a target.
    pub port: Option<u16>,
    /// The STAMP port of an agent; `None`: that of the provider.
    pub stamp_port: Option<u16>,
    /// The agent port of an agent; `None`: that of the provider.
    pub agent_port: Option<u16>,
    /// The URL of a target for HTTP and WebSocket probes.
    pub url: Option<Url>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// Maximum members of one list. Chosen: as many as the peers and targets of a configuration.
pub const MEMBERS_MAX: usize = 20_000;

/// Labels that the agent evaluates. Others that begin with `__` are internal to the producer of the list.
const NAME: &str = "instance";
const STAMP_PORT: &str = "__pathmeter_stamp_port";
const AGENT_PORT: &str = "__pathmeter_agent_port";

/// Reads a list.
///
/// # Errors
/// All problems of the list at once. A list with a problem is rejected as a whole, so that a mistake does not
/// remove part of a fleet.
pub fn read(text: &[u8]) -> Result<Vec<Member>, Problems> {
    let tree = file::read(text)?;
    let diagnostics = Diagnostics::default();
    let mut capacity = MEMBERS_MAX;
    let members = ValueReader::top(&tree, &diagnostics)
        .list("a list of {targets: […], labels: {…}}", |group| {
            group.section(|group| read_group(group, &mut capacity))
        });
    let Loaded { config, .. } = finish(text, members, diagnostics)?;
    let members: Vec<Member> = config.into_iter().flatten().collect();
    Ok(members)
}

/// Returns the member for a DNS service (SRV) record: its host name is also its name.
///
/// # Errors
/// If the host name is not valid as a name.
pub fn service(host: &str, port: u16) -> Result<Member, String> {
    if !is_host_name(host) || !is_name(host) {
        return Err(format!("{} is not a valid host name: {NAME_RULE}", quoted(host)));
    }
    let (name, host) = (Some(host.to_owned()), host.to_owned());
    Ok(Member { name, host, port: Some(port), ..Member::default() })
}

/// Reads a group of at most `capacity` hosts, and reduces `capacity` by their number.
fn read_group(section: &mut MappingReader<'_, '_>, capacity: &mut usize) -> Option<Vec<Member>> {
    let labels = section.key("labels", group_labels).or(GroupLabels::default());
    let members = section.key("targets", |value| value.list("a list of host:port", member)).or(Vec::new());
    let (GroupLabels { name, stamp_port, agent_port, labels }, members) = (labels?, members?);
    let Some(remaining) = capacity.checked_sub(members.len()) else {
        let what = format!("with this group the list has more than {MEMBERS_MAX} hosts");
        return section.reject("targets", what, format!("at most {MEMBERS_MAX} are allowed"));
    };
    *capacity = remaining;
    if name.is_some() && members.len() > 1 {
        let what = format!("{} hosts have the same label {NAME}", members.len());
        return section.reject("labels", what, "write one group per host, or remove the label");
    }
    let named = members.into_iter().map(|member| Member {
        name: name.clone().or(member.name),
        stamp_port,
        agent_port,
        labels: labels.clone(),
        ..member
    });
    Some(named.collect())
}

/// The labels of a group, which apply to each of its hosts.
#[derive(Debug, Default)]
struct GroupLabels {
    name: Option<String>,
    stamp_port: Option<u16>,
    agent_port: Option<u16>,
    labels: BTreeMap<String, String>,
}

fn group_labels(value: ValueReader<'_, '_>) -> Option<GroupLabels> {
    let whole = value.clone();
    let mut group = GroupLabels::default();
    value.entries("a mapping of label names to strings", |key, value| {
        match key {
            // To Prometheus, a label without a value does not exist.
            _ if is_empty(&value) => {}
            NAME => group.name = Some(instance(value)?),
            STAMP_PORT => group.stamp_port = Some(port(value)?),
            AGENT_PORT => group.agent_port = Some(port(value)?),
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
                drop(group.labels.insert(key, text));
            }
        }
        Some(())
    })?;
    if group.labels.len() > LABELS_MAX {
        let what = format!("{} labels", group.labels.len());
        return whole.reject(what, format!("at most {LABELS_MAX} are allowed"));
    }
    Some(group)
}

fn is_empty(value: &ValueReader<'_, '_>) -> bool {
    match value.node() {
        Node::Null => true,
        Node::Text(text) => text.is_empty(),
        Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::List(_) | Node::Mapping(_) => false,
    }
}

fn instance(value: ValueReader<'_, '_>) -> Option<String> {
    let text = value.text("a name")?;
    match is_name(text) {
        true => Some(text.to_owned()),
        false => value.reject(
            format!("{} is not a valid name", quoted(text)),
            format!("the label {NAME} is the name of the peer or target: {NAME_RULE}"),
        ),
    }
}

/// Reads a port. Label values are strings, so ports are too.
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
        return is_unicast(address).then_some((text, None));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        let (host, _) = text.rsplit_once(':')?;
        let is_usable = is_unicast(address.ip()) && address.port() > 0;
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
    fn prometheus_list_is_read_as_yaml_and_as_json() {
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
    fn own_internal_labels_are_evaluated_and_others_are_ignored() {
        let text = "- targets: ['192.0.2.1:80']\n  labels: {instance: fra-1, zone: a, __meta_x: y, __pathmeter_stamp_port: '862'}\n";
        let member = read(text.as_bytes()).unwrap().remove(0);
        assert_eq!((member.name.as_deref(), member.port), (Some("fra-1"), Some(80)));
        assert_eq!((member.stamp_port, member.agent_port), (Some(862), None));
        assert_eq!(member.labels, BTreeMap::from([("zone".to_owned(), "a".to_owned())]));
    }

    #[test]
    fn url_is_kept_for_http_probes() {
        let member = read(b"- targets: ['https://shop.example.net/health']\n  labels: {instance: shop}\n")
            .unwrap()
            .remove(0);
        assert_eq!((member.host.as_str(), member.port), ("shop.example.net", None));
        assert_eq!(member.url.unwrap().path, "/health");
    }

    #[test]
    fn all_problems_are_reported_at_once_with_their_locations() {
        let text = "- targets: [a b, 'x:0', 10.0.0.256]\n  labels: {instance: 'a/b', 0x: y, __pathmeter_agent_port: many}\n- target: []\n- targets: [a, b]\n  labels: {instance: c}\n";
        let problems = read(text.as_bytes()).unwrap_err();
        let found: Vec<String> = problems.iter().map(|problem| problem.to_string()).collect();
        assert_eq!(found.len(), 8, "{found:#?}");
        assert!(found[0].starts_with("line 1, column 13: [0].targets[0]: `a b` is not a host"), "{found:#?}");
        assert!(found.iter().any(|line| line.contains("2 hosts have the same label instance")), "{found:#?}");
    }

    #[test]
    fn labels_are_read_as_prometheus_reads_them_and_a_group_may_be_empty() {
        let text =
            "- labels: {x: y}\n- targets: [a]\n  labels: {instance: '', rack: 5, none: null, empty: ''}\n";
        let members = read(text.as_bytes()).unwrap_or_else(|problems| panic!("{problems}"));
        let labels = BTreeMap::from([("rack".to_owned(), "5".to_owned())]);
        assert_eq!(
            members,
            [Member { name: Some("a".into()), host: "a".into(), labels, ..Member::default() }]
        );
    }

    #[test]
    fn limit_of_a_list_applies_to_all_groups_together() {
        let group = |number| format!("- targets: [h{number}]\n");
        let list: String = (0..MEMBERS_MAX).map(group).collect();
        assert_eq!(read(list.as_bytes()).unwrap().len(), MEMBERS_MAX);
        let why = read((list + &group(MEMBERS_MAX)).as_bytes()).unwrap_err().to_string();
        assert!(why.contains("[20000].targets: with this group the list has more than 20000 hosts"), "{why}");
    }
}
