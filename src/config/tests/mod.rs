use pathmeter_proto::probe_budget::{ProbeLimits, TokenRate};

use super::echo::Echo;
use super::echo::transport::{PathMtu, Transport, Udp};
use super::*;

mod limits;
mod rejections;
mod web;

const EXAMPLE: &str = include_str!("../../../config.example.yaml");

fn host(name: &str) -> LoadContext {
    LoadContext { name_override: None, hostname: name.to_owned(), labels: BTreeMap::new(), state_dir: None }
}

fn load_on(hostname: &str, text: &str) -> Loaded {
    load(text.as_bytes(), &host(hostname)).unwrap_or_else(|problems| panic!("{problems}"))
}

fn rejected(text: impl AsRef<[u8]>) -> Problems {
    match load(text.as_ref(), &host("fra-1")) {
        Ok(loaded) => panic!("accepted: {loaded:#?}"),
        Err(problems) => problems,
    }
}

fn lines<'a>(problems: impl IntoIterator<Item = &'a Problem>) -> Vec<String> {
    problems.into_iter().map(Problem::to_string).collect()
}

/// Checks the problems of texts, each as one line.
fn check(cases: &[(&str, &[&str])]) {
    for (text, problems) in cases {
        assert_eq!(lines(&rejected(text)), *problems, "{text:?}");
    }
}

fn echo(probe: &Probe) -> &Echo {
    probe.kind.downcast().unwrap()
}

/// The example with the keys that are commented out because they differ by host. It requires TLS.
#[cfg(feature = "tls")]
fn whole_example() -> String {
    let uncommented = EXAMPLE.lines().map(|line| match line.trim_start().strip_prefix('#') {
        Some(key) if key.starts_with(|c: char| c.is_ascii_alphabetic()) => line.replacen('#', "", 1),
        Some(_) | None => line.to_owned(),
    });
    let text = uncommented.collect::<Vec<_>>().join("\n");
    // The example has http:// because builds without TLS must accept it too.
    text.replace("http://inventory", "https://inventory")
}

#[test]
fn empty_file_configures_an_agent_that_only_answers() {
    let expected = Config {
        agent: Agent { name: "fra-1".into(), labels: BTreeMap::new(), grace: Duration::from_secs(5) },
        listen: Listen {
            http: "[::]:9862".parse().unwrap(),
            stamp: "[::]:9862".parse().unwrap(),
            agent: "[::]:9863".parse().unwrap(),
        },
        state_dir: None,
        key_file: None,
        tls: Tls::default(),
        responder: ResponderRules {
            allow: Vec::new(),
            open: false,
            rate: 100_000,
            rate_per_source: 10_000,
            sessions: 65_536,
        },
        bandwidth: BandwidthRules {
            enabled: true,
            quiet_hours: Vec::new(),
            runs_max: 1,
            rate_max: None,
            run_bytes_max: 2_000_000_000,
            run_time_max: Duration::from_secs(30),
            bytes_per_day: 20_000_000_000,
            path_bytes_per_day: 10_000_000_000,
        },
        websocket: WebSocketRules {
            enabled: true,
            origins: Origins::Same,
            open: false,
            clients_max: 10_000,
            clients_per_source: 1000,
            messages_per_second: 1000,
            message_bytes_max: 65_536,
            idle_timeout: Duration::from_secs(60),
            trace: TracedClients::Asked,
            trace_method: TraceMethod::Unprivileged,
            trace_hops_max: 30,
            trace_timeout: Duration::from_millis(1_200),
            traces_per_second: 1,
        },
        peers: Vec::new(),
        targets: Vec::new(),
        providers: Vec::new(),
        probes: Vec::new(),
        trace: trace::TraceRules {
            router_rate: TokenRate { spacing: Duration::from_millis(1_250), burst: 5 },
            router_rate_ipv6: TokenRate { spacing: Duration::from_millis(125), burst: 5 },
            agent_rate: TokenRate { spacing: Duration::from_millis(20), burst: 50 },
            quoted_headers: false,
        },
        metrics: Metrics { series_max: 1_000_000, level: SeriesLevel::Pair },
        log: Log { level: "info".into(), format: LogFormat::Text },
    };
    for text in
        ["", "# nothing yet\n", "---\n", "---\n...\n", "{}", "agent:\nlisten:\npeers:\nprobes:\n", "\u{feff}"]
    {
        let loaded = load_on("fra-1", text);
        assert_eq!(loaded.config, expected, "{text:?}");
        assert_eq!(
            lines(&loaded.warnings),
            ["key_file: packets are not authenticated: requests are accepted by source address alone; \
              give every agent the same key file, for example /etc/pathmeter/mesh.key"],
            "{text:?}"
        );
    }
}

#[test]
fn default_rates_of_traces_are_those_of_the_protocol() {
    assert_eq!(load_on("fra-1", "").config.trace.probe_limits(), ProbeLimits::default());
    let raised = load_on("fra-1", "trace: {router_rate: 200pps, agent_rate: 1.5kpps}").config.trace;
    let rate = |nanos, burst| TokenRate { spacing: Duration::from_nanos(nanos), burst };
    assert_eq!(raised.router_rate, rate(5_000_000, 5));
    assert_eq!(raised.agent_rate, rate(666_666, 1_500));
    assert_eq!(raised.probe_limits().others, rate(1_333_332, 750));
}

#[test]
fn quoted_headers_are_read_only_if_configured() {
    assert!(!load_on("fra-1", "trace: {agent_rate: 1.5kpps}").config.trace.quoted_headers);
    assert!(load_on("fra-1", "trace: {quoted_headers: true}").config.trace.quoted_headers);
}

#[test]
fn defaults_of_hosts_and_probes_depend_on_the_rest_of_the_file() {
    let text = "
listen: {http: '127.0.0.1:8001', stamp: '127.0.0.1:8002', agent: '127.0.0.1:8003'}
peers: [{name: b, address: b.example.net}]
targets: [{name: gw, address: 192.0.2.1}]
probes: [{name: p}]
";
    let config = load_on("a", text).config;
    let peer = &config.peers[0];
    assert_eq!((peer.http_port, peer.stamp_port, peer.agent_port), (8001, 8002, 8003));
    assert_eq!(config.targets[0].port, 862);
    let probe = Probe {
        name: "p".into(),
        peers: Selection::All,
        targets: Selection::Named(Vec::new()),
        family: FamilyChoice::Auto,
        source: None,
        interval: Duration::from_secs(1),
        dscp: Dscp::DEFAULT,
        kind: Kind::Echo(Arc::new(Echo {
            transport: Transport::Udp(Udp {
                flows: 1,
                size: None,
                dont_fragment: false,
                source_port: None,
                path_mtu: None,
            }),
            late_after: Duration::from_secs(1),
            lost_after: Duration::from_secs(3),
        })),
    };
    assert_eq!(config.probes, [probe]);
}

#[test]
fn same_file_makes_every_host_measure_the_others() {
    let text = "
peers: [{name: c, address: c}, {name: a, address: a}, {name: b, address: b}]
targets: [{name: gw, address: 192.0.2.1}]
probes:
  - {name: peers}
  - {name: everything, peers: all, targets: all}
  - {name: some, peers: [b, a, b]}
  - {name: gateway, targets: [gw]}
";
    for host in ["a", "b", "elsewhere"] {
        let config = load_on(host, text).config;
        assert_eq!(config.agent.name, host);
        assert!(config.peers.iter().all(|peer| peer.name != host));
        assert!(config.peers.is_sorted_by_key(|peer| &peer.name));
        let named = |names: &[&str]| Selection::Named(names.iter().map(|name| (*name).to_owned()).collect());
        let selected: Vec<_> =
            config.probes.iter().map(|probe| (probe.peers.clone(), probe.targets.clone())).collect();
        let expected = [
            (Selection::All, named(&[])),
            (Selection::All, Selection::All),
            (named(&["a", "b"]), named(&[])),
            (named(&[]), named(&["gw"])),
        ];
        assert_eq!(selected, expected);
    }
}

#[test]
fn peers_are_selected_by_rules_and_listed_by_providers() {
    let text = "
peers:
  - {name: b, address: b}
  - {files: ['/etc/pathmeter/peers/*.yaml', more.json], refresh: 30s, labels: {site: x}, stamp_port: 862}
  - {http: 'http://inventory.example.net/peers'}
  - {dns: agents.example.net}
  - {dns: {name: _http._tcp.agents.example.net, type: srv}}
  - {kubernetes: {service: pathmeter}}
  - {kubernetes: {service: pathmeter, namespace: monitoring}}
  - {kubernetes: {service: pathmeter, namespace: monitoring, cluster_domain: example.net}}
targets:
  - {dns: {name: _stamp._udp.example.net, type: srv}, port: 4000, profile: plain}
probes:
  - {name: ring, peers: {select: ring, k: 10}}
  - {name: zones, peers: {select: zones, within: 5, across: 1}}
  - {name: racks, peers: {select: zones, within: 2, across: 0, label: rack}}
  - {name: some, peers: [b, who-is-not-here-yet], targets: [nor-this]}
metrics: {level: group, worst: 5}
";
    let config = load_on("a", text).config;
    let names: Vec<&str> = config.providers.iter().map(|provider| provider.name.as_str()).collect();
    let expected = [
        "files:/etc/pathmeter/peers/*.yaml,more.json",
        "http:inventory.example.net/peers",
        "dns:agents.example.net",
        "dns:_http._tcp.agents.example.net",
        "kubernetes:pathmeter",
        "kubernetes:pathmeter.monitoring.svc",
        "kubernetes:pathmeter.monitoring.svc.example.net.",
        "dns:_stamp._udp.example.net",
    ];
    assert_eq!(names, expected);
    let intervals: Vec<u64> = config.providers.iter().map(|provider| provider.refresh.as_secs()).collect();
    assert_eq!(intervals, [30, 60, 30, 30, 30, 30, 30, 30]);
    let zones = |within, across, label: &str| Selection::Zones {
        choice: selection::Zones { within, across },
        label: label.to_owned(),
    };
    let peers: Vec<Selection> = config.probes.iter().map(|probe| probe.peers.clone()).collect();
    assert_eq!(peers[..3], [Selection::Ring { k: 10 }, zones(5, 1, "zone"), zones(2, 0, "rack")]);
    assert_eq!(config.metrics.level, SeriesLevel::Group { label: "zone".into(), worst: 5 });
}

#[test]
fn trace_has_the_protocol_and_the_flows_of_the_probe_that_it_follows() {
    let text = "targets: [{name: web, address: a, url: 'https://a/'}]\n\
                probes: [{name: q, protocol: PROTOCOL, FLOWS targets: [web]}, {name: p, kind: trace, follows: q}]";
    for (protocol, flows, expected) in
        [("udp", "flows: 4,", ("udp", 4)), ("icmp", "flows: 3,", ("icmp", 3)), ("http", "", ("tcp", 1))]
    {
        let config = load_on("fra-1", &text.replace("PROTOCOL", protocol).replace("FLOWS", flows)).config;
        let Kind::Trace(trace) = &config.probes[1].kind else { panic!("{:?}", config.probes) };
        assert_eq!((trace.protocol(), trace.flows()), expected, "{protocol}");
    }
}

#[test]
fn labels_of_the_command_line_override_those_of_the_file() {
    let labels = BTreeMap::from([("zone".to_owned(), "b".to_owned()), ("rack".to_owned(), "7".to_owned())]);
    let host = LoadContext { labels: labels.clone(), ..host("a") };
    let loaded = load(b"agent: {labels: {zone: a}}", &host).unwrap();
    assert_eq!(loaded.config.agent.labels, labels);
}

#[test]
fn command_line_name_overrides_the_file_and_the_file_overrides_the_host() {
    let name = |text: &str, name_override: Option<&str>| {
        let host = LoadContext {
            name_override: name_override.map(str::to_owned),
            hostname: "host".into(),
            labels: BTreeMap::new(),
            state_dir: None,
        };
        load(text.as_bytes(), &host)
            .map(|loaded| loaded.config.agent.name)
            .map_err(|problems| lines(&problems))
    };
    assert_eq!(name("", None), Ok("host".into()));
    assert_eq!(name("agent: {name: file}", None), Ok("file".into()));
    assert_eq!(name("agent: {name: file}", Some("outside")), Ok("outside".into()));
    assert_eq!(
        name("agent: {name: file}", Some("two words")),
        Err(vec![
            "line 1, column 15: agent.name: `two words` from --name or $PATHMETER_NAME is not a valid name; \
             a name consists of 1 to 64 letters, digits, `_`, `.` and `-`; set agent.name, or use --name"
                .into()
        ])
    );
}

#[test]
fn probable_mistakes_are_warnings() {
    let text = "
key_file: mesh.key
responder:
  open: true
websocket: {open: true}
peers: [{name: fra-1, address: fra-1}]
probes:
  - name: alone
";
    assert_eq!(
        lines(&load_on("fra-1", text).warnings),
        [
            "line 4, column 9: responder.open: requests from any source are answered, up to the rate limits; \
             list the allowed networks in responder.allow instead",
            "line 5, column 19: websocket.open: messages from any source are echoed, up to the limits; \
             list the allowed networks in responder.allow instead",
            "line 8, column 5: probes[0].peers: this probe selects no host other than this one; \
             add peers or targets",
        ]
    );
}

fn udp(probe: &Probe) -> Udp {
    let Transport::Udp(udp) = &echo(probe).transport else { panic!("{} is not over UDP", probe.name) };
    udp.clone()
}

#[test]
fn every_kind_of_value_is_read() {
    let text = "
agent: {name: a, labels: &labels {site: fra, empty: ''}, grace: 0s}
listen: {http: '127.0.0.1:0', stamp: '127.0.0.1:0', agent: '127.0.0.1:0'}
responder: {allow: [10.0.0.0/8, '2001:db8::/32', 192.0.2.1], rate: 0.5Mpps}
websocket: {enabled: false, origins: ['https://Page.example.net', 'http://10.0.0.1:8080'], message_bytes_max: 1MiB, idle_timeout: 1h}
peers: [{name: b, address: '2001:db8::b', http_port: 1, stamp_port: 2, agent_port: 65535, labels: *labels}]
probes:
  - {name: p, dscp: 46, size: 1KiB, family: both, source_port: 65520, flows: 16, late_after: 60s, lost_after: 1m, path_mtu: {ceiling: 1500B}}
  - {name: q, dscp: AF41, dont_fragment: true, source: '::ffff:192.0.2.1', family: ipv4, path_mtu: on}
log: {level: 'warn,pathmeter::http=debug', format: json}
";
    let config = load_on("a", text).config;
    assert_eq!(config.peers[0].labels, config.agent.labels);
    assert_eq!(config.responder.allow.len(), 3);
    assert_eq!(config.responder.rate, 500_000);
    assert_eq!(config.log.format, LogFormat::Json);
    let origins = ["https://page.example.net", "http://10.0.0.1:8080"].map(|text| text.parse().unwrap());
    assert_eq!(config.websocket.origins, Origins::These(origins.into()));
    assert_eq!((config.websocket.enabled, config.websocket.message_bytes_max), (false, 1 << 20));
    assert_eq!(load_on("a", "websocket: {origins: any}").config.websocket.origins, Origins::Any);
    let [p, q] = &config.probes[..] else { panic!("two probes") };
    assert_eq!((p.dscp.value(), p.family), (46, FamilyChoice::Both));
    let (of_p, of_q) = (udp(p), udp(q));
    assert_eq!((of_p.size, of_p.source_port), (Some(1024), Some(65_520)));
    assert_eq!((q.dscp.value(), q.source), (34, Some("192.0.2.1".parse().unwrap())));
    let path_mtu = |ceiling| Some(PathMtu { interval: Duration::from_secs(60), ceiling });
    assert_eq!((of_p.path_mtu, of_q.path_mtu), (path_mtu(1500), path_mtu(9000)));
}

#[test]
fn example_is_valid_on_both_of_its_hosts() {
    for (host, other) in [("fra-1", "ams-1"), ("ams-1", "fra-1")] {
        let loaded = load_on(host, EXAMPLE);
        assert_eq!(loaded.warnings, []);
        assert!(loaded.config.peers.iter().any(|peer| peer.name == other));
    }
    #[cfg(feature = "tls")]
    assert_eq!(load_on("ams-1", &whole_example()).config.agent.name, "fra-1");
}

#[test]
fn example_shows_the_defaults() {
    let example = load_on("fra-1", EXAMPLE).config;
    let default = load_on("fra-1", "").config;
    assert_eq!(example.agent.grace, default.agent.grace);
    assert_eq!(example.listen, default.listen);
    assert_eq!(
        example.responder,
        ResponderRules { allow: example.responder.allow.clone(), ..default.responder }
    );
    assert_eq!(example.websocket, default.websocket);
    assert_eq!(example.trace, default.trace);
    assert_eq!((&example.metrics, &example.log), (&default.metrics, &default.log));

    let text = "targets: [{name: gateway, address: a}]\nprobes: [{name: gateway, targets: [gateway]}]";
    let default = load_on("fra-1", text).config;
    let gateway =
        |config: &Config| config.probes.iter().find(|probe| probe.name == "gateway").unwrap().clone();
    let example = gateway(&example);
    let default = gateway(&default);
    let (of_example, of_default) = (udp(&example), udp(&default));
    let same = Udp { size: of_example.size, source_port: of_example.source_port, ..of_default };
    let echo = Echo { transport: Transport::Udp(same), ..echo(&default).clone() };
    let kind = Kind::Echo(Arc::new(echo));
    assert_eq!(example, Probe { kind, ..default });
}

/// Adds an unknown key to every mapping of the example: the problems then list all keys that are allowed
/// there, and each of these must be in at least one mapping of that kind.
#[cfg(feature = "tls")]
#[test]
fn example_has_every_key() {
    use super::file::Node;
    use std::collections::BTreeSet;

    const UNKNOWN: &str = "not-a-key-of-any-kind";

    /// Adds the unknown key to all mappings, and collects their keys by path without indices.
    fn mark(node: &mut Node, kind: &str, keys: &mut BTreeMap<String, BTreeSet<String>>) {
        match node {
            Node::Null | Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::Text(_) => {}
            Node::List(items) => items.iter_mut().for_each(|item| mark(item, &format!("{kind}[]"), keys)),
            Node::Mapping(entries) => {
                for (key, node) in entries.iter_mut().filter(|(key, _)| key != "labels") {
                    mark(node, &format!("{kind}.{key}"), keys);
                }
                keys.entry(kind.to_owned()).or_default().extend(entries.iter().map(|(key, _)| key.clone()));
                entries.push((UNKNOWN.to_owned(), Node::Null));
            }
        }
    }

    let mut tree = file::read(whole_example().as_bytes()).unwrap();
    let mut in_example = BTreeMap::new();
    mark(&mut tree, "", &mut in_example);
    let host = host("fra-1");
    let mut diagnostics = reader::Diagnostics::default();
    schema::read(&tree, &host, &diagnostics);

    let (problems, _) = diagnostics.problems();
    assert!(problems.len() > in_example.len(), "{in_example:?}");
    for diagnostic in problems {
        let path = diagnostic.path.to_string();
        let section = path.strip_suffix(UNKNOWN).unwrap().trim_end_matches('.');
        let digits = |c: char| c.is_ascii_digit();
        let kind: String = format!(".{section}").replace(digits, "");
        let kind = if section.is_empty() { "" } else { &kind };
        for key in diagnostic.remedy.strip_prefix("allowed: ").unwrap().split(", ") {
            assert!(in_example[kind].contains(key), "{kind}.{key} is not in config.example.yaml");
        }
    }
}

#[test]
fn secret_in_the_query_of_a_url_is_not_in_the_provider_name() {
    let name = |url: &str| {
        let config = load_on("b", &format!("peers: [{{http: '{url}'}}]")).config;
        config.providers[0].name.clone()
    };
    let (first, second) = (name("http://a/x?token=hunter2"), name("http://a/x?token=hunter3"));
    assert!(first.starts_with("http:a/x?") && !first.contains("hunter"), "{first}");
    assert_ne!(first, second);
    assert_eq!(name("http://a/x"), "http:a/x");
}
