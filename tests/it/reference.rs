//! `docs/reference/configuration.md` is made from the program: which keys there are and what each allows is
//! asked of the reader itself, what a key means is the doc comment of the field that it sets, and the default
//! is the example's, compared with the reader's. `UPDATE_DOCS=1 cargo test --test it reference` writes the
//! page.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use pathmeter::config::{self, Config, LoadContext, Problems};

const PAGE: &str = "docs/reference/configuration.md";

/// A mapping of the file.
struct Mapping {
    title: &'static str,
    /// The file around it; `KEYS` is where its keys stand.
    file: &'static str,
    /// Where fields with the names of its keys are.
    fields: &'static [(&'static str, &'static str)],
    /// Where the example has it: the words with which the text before its keys begins, one after the other.
    example: &'static [&'static str],
    /// Keys whose meaning is another page's or another mapping's.
    elsewhere: &'static [(&'static str, &'static str)],
}

const MAPPINGS: &[Mapping] = &[
    Mapping {
        title: "The file",
        file: "KEYS",
        fields: &[("src/config/mod.rs", "Config")],
        example: &[],
        elsewhere: &[
            ("agent", "This agent: name and labels."),
            ("listen", "Addresses of the ports."),
            ("tls", "HTTPS, served and requested."),
            ("responder", "Who is answered, and at what rate."),
            ("websocket", "The echo service at `/ws`."),
            ("bandwidth", "What bandwidth runs may use of this host."),
            ("peers", "The other agents, and providers that list them. An entry for this agent is skipped."),
            ("targets", "Hosts without an agent, and providers that list them."),
            ("probes", "What is measured."),
            ("trace", "What applies to all traces."),
            ("metrics", "What is exported."),
            ("log", "What is logged, and how."),
        ],
    },
    Mapping {
        title: "`agent`",
        file: "agent: {KEYS}",
        fields: &[("src/config/mod.rs", "Agent")],
        example: &["agent:"],
        elsewhere: &[],
    },
    Mapping {
        title: "`listen`",
        file: "listen: {KEYS}",
        fields: &[("src/config/mod.rs", "Listen")],
        example: &["listen:"],
        elsewhere: &[],
    },
    Mapping {
        title: "`tls`",
        file: "tls: {KEYS}",
        fields: &[
            ("src/config/mod.rs", "Tls"),
            ("src/config/mod.rs", "Trust"),
            ("src/config/mod.rs", "KeyPair"),
        ],
        example: &["tls:"],
        elsewhere: &[],
    },
    Mapping {
        title: "`responder`",
        file: "responder: {KEYS}",
        fields: &[("src/config/mod.rs", "ResponderRules")],
        example: &["responder:"],
        elsewhere: &[],
    },
    Mapping {
        title: "`websocket`",
        file: "websocket: {KEYS}",
        fields: &[("src/config/mod.rs", "WebSocketRules")],
        example: &["websocket:"],
        elsewhere: &[],
    },
    Mapping {
        title: "`bandwidth`",
        file: "bandwidth: {KEYS}",
        fields: &[("src/config/bandwidth.rs", "BandwidthRules")],
        example: &["bandwidth:"],
        elsewhere: &[],
    },
    Mapping {
        title: "An entry of `peers`: an agent",
        file: "peers: [{name: a, address: 192.0.2.1, KEYS}]",
        fields: &[("src/config/mod.rs", "Peer")],
        example: &["peers:", "- name: ams-1"],
        elsewhere: &[("scheme", SCHEME), ("tls", TLS)],
    },
    Mapping {
        title: "An entry of `peers`: a provider",
        file: "peers: [{files: /etc/a.yaml, KEYS}]",
        fields: &[("src/config/discovery.rs", "PeerTemplate"), ("src/config/discovery.rs", "Provider")],
        example: &["peers:", "- files:"],
        elsewhere: &[
            ("refresh", REFRESH),
            ("files", FILES),
            ("http", HTTP),
            ("dns", DNS),
            ("kubernetes", KUBERNETES),
            ("scheme", SCHEME),
            ("tls", TLS),
        ],
    },
    Mapping {
        title: "An entry of `targets`: a host without an agent",
        file: "targets: [{name: a, address: 192.0.2.1, KEYS}]",
        fields: &[("src/config/mod.rs", "Target"), ("proto/src/echo/profile.rs", "Quirks")],
        example: &["targets:", "- name: gateway"],
        elsewhere: &[("tls", TLS), ("timestamps", TIMESTAMPS)],
    },
    Mapping {
        title: "An entry of `targets`: a provider",
        file: "targets: [{files: /etc/a.yaml, KEYS}]",
        fields: &[
            ("src/config/discovery.rs", "TargetTemplate"),
            ("src/config/discovery.rs", "Provider"),
            ("proto/src/echo/profile.rs", "Quirks"),
        ],
        example: &["targets:", "- files:"],
        elsewhere: &[
            ("refresh", REFRESH),
            ("files", FILES),
            ("http", HTTP),
            ("dns", DNS),
            ("kubernetes", KUBERNETES),
            ("tls", TLS),
            ("timestamps", TIMESTAMPS),
        ],
    },
    Mapping {
        title: "`tls` of a peer, target or provider",
        file: "peers: [{name: a, address: 192.0.2.1, scheme: https, tls: {KEYS}}]",
        fields: &[
            ("src/config/mod.rs", "Trust"),
            ("src/config/mod.rs", "KeyPair"),
            ("src/config/mod.rs", "Https"),
        ],
        example: &[],
        elsewhere: &[],
    },
    Mapping {
        title: "`http` of a provider",
        file: "peers: [{http: {url: 'http://a.example/', KEYS}}]",
        fields: &[("src/config/discovery.rs", "ProviderSource")],
        example: &[],
        elsewhere: &[("tls", TLS), ("authorization", AUTHORIZATION), ("basic_auth", BASIC_AUTH)],
    },
    Mapping {
        title: "`dns` of a provider",
        file: "peers: [{dns: {name: a.example, KEYS}}]",
        fields: &[("src/config/discovery.rs", "ProviderSource")],
        example: &["- dns:"],
        elsewhere: &[("type", "Which records are requested.")],
    },
    Mapping {
        title: "`kubernetes` of a provider",
        file: "peers: [{kubernetes: {service: a, namespace: b, cluster_domain: c, KEYS}}]",
        fields: &[],
        example: &[],
        elsewhere: &[
            ("service", "Name of the headless service whose pods are agents."),
            ("namespace", "Namespace of the service. Inside a pod the default is its own."),
            (
                "cluster_domain",
                "Domain of the cluster. Inside a pod the default comes from its search domains.",
            ),
        ],
    },
    Mapping {
        title: EVERY_PROBE,
        file: "probes: [{name: a, KEYS}]",
        fields: &[("src/config/mod.rs", "Probe"), ("src/config/echo/mod.rs", "Echo")],
        example: &["probes:", "- name: gateway"],
        elsewhere: &[
            (
                "kind",
                "What is measured. `echo`: loss, RTT and jitter. `trace`: the routes of an echo probe. `bandwidth`: throughput, and latency under load.",
            ),
            ("protocol", "What carries the probe. The sections below have the keys of each protocol."),
            (
                "lost_after",
                "Without a reply for so long a datagram or message is lost. Over connections the default is `15s`.",
            ),
            ("peers", "Peers to measure: all, a list of names, or a rule (`ring` or `zones`, below)."),
            ("flows", OF_PROTOCOL),
            ("size", OF_PROTOCOL),
            ("dont_fragment", OF_PROTOCOL),
            ("source_port", OF_PROTOCOL),
            ("path_mtu", OF_PROTOCOL),
        ],
    },
    Mapping {
        title: "`peers` of a probe: a ring",
        file: "peers: [{name: b, address: 192.0.2.1}]\nprobes: [{name: a, peers: {select: ring, KEYS}}]",
        fields: &[],
        example: &[],
        elsewhere: &[
            ("select", "The rule by which each agent selects the peers that it measures."),
            ("k", "Peers that each agent measures, and by how many it is measured."),
        ],
    },
    Mapping {
        title: "`peers` of a probe: zones",
        file: "peers: [{name: b, address: 192.0.2.1}]\nprobes: [{name: a, peers: {select: zones, KEYS}}]",
        fields: &[],
        example: &[],
        elsewhere: &[
            ("select", "The rule by which each agent selects the peers that it measures."),
            ("within", "Peers that each agent measures in its own zone."),
            ("across", "Peers that each agent measures in each other zone."),
            ("label", "The label of agents that names their zone."),
        ],
    },
    Mapping {
        title: "A probe with `protocol: udp`",
        file: "probes: [{name: a, protocol: udp, KEYS}]",
        fields: &[("src/config/echo/transport.rs", "Udp")],
        example: &["probes:", "- name: gateway"],
        elsewhere: &[],
    },
    Mapping {
        title: "`path_mtu` of a probe",
        file: "probes: [{name: a, path_mtu: {KEYS}}]",
        fields: &[("src/config/echo/transport.rs", "PathMtu")],
        example: &["path_mtu:"],
        elsewhere: &[],
    },
    Mapping {
        title: "A probe with `protocol: icmp`",
        file: "probes: [{name: a, protocol: icmp, KEYS}]",
        fields: &[("src/config/echo/transport.rs", "Icmp")],
        example: &["- name: ping"],
        elsewhere: &[],
    },
    Mapping {
        title: "A probe with `protocol: tcp`",
        file: "probes: [{name: a, protocol: tcp, KEYS}]",
        fields: &[("src/config/echo/transport.rs", "Tcp")],
        example: &["- name: chat"],
        elsewhere: &[],
    },
    Mapping {
        title: "A probe with `protocol: websocket`",
        file: "probes: [{name: a, protocol: websocket, KEYS}]",
        fields: &[("src/config/echo/transport.rs", "WebSocket")],
        example: &["- name: live"],
        elsewhere: &[],
    },
    Mapping {
        title: "A probe with `protocol: http`",
        file: "probes: [{name: a, protocol: http, KEYS}]",
        fields: &[("src/config/echo/transport.rs", "Http")],
        example: &["- name: web"],
        elsewhere: &[
            ("expect_status", "Statuses that are expected. Default: 200 to 299."),
            ("expect_body", "Text that is expected in the body. Default: any body."),
        ],
    },
    Mapping {
        title: "A probe with `kind: trace`",
        file: "probes: [{name: b}, {name: a, kind: trace, follows: b, KEYS}]",
        fields: &[("src/config/trace.rs", "Trace")],
        example: &["- name: routes"],
        elsewhere: &[],
    },
    Mapping {
        title: "A probe with `kind: bandwidth`",
        file: "probes: [{name: a, kind: bandwidth, KEYS}]",
        fields: &[("src/config/bandwidth.rs", "Bandwidth")],
        example: &["- name: capacity"],
        elsewhere: &[],
    },
    Mapping {
        title: "`trace`",
        file: "trace: {KEYS}",
        fields: &[("src/config/trace.rs", "TraceRules")],
        example: &["trace:"],
        elsewhere: &[],
    },
    Mapping {
        title: "`metrics`",
        file: "metrics: {level: group, KEYS}",
        fields: &[("src/config/mod.rs", "Metrics")],
        example: &["metrics:"],
        elsewhere: &[
            ("group_by", "The label of peers that names their group."),
            ("worst", "Paths with the most loss or latency that keep series of their own."),
        ],
    },
    Mapping {
        title: "`log`",
        file: "log: {KEYS}",
        fields: &[("src/config/mod.rs", "Log")],
        example: &["log:"],
        elsewhere: &[],
    },
];

const EVERY_PROBE: &str = "An entry of `probes`";
const SCHEME: &str = "How its HTTP port is reached.";
const TLS: &str = "What differs from the top-level `tls`: see the section on `tls` of a peer.";
const REFRESH: &str =
    "Time between two polls. Default: `10s` for files, `60s` for http, `30s` for dns and kubernetes.";
const FILES: &str = "Paths of lists in the format of Prometheus' `file_sd`; the last part may have one `*`.";
const HTTP: &str = "A server of Prometheus' `http_sd`: its URL, or a mapping with the keys below.";
const KUBERNETES: &str = "The pods of a headless service; see the keys below.";
const DNS: &str = "A name to look up, or a mapping with the keys below.";
const TIMESTAMPS: &str = "How the timestamps of its replies are read.";
const AUTHORIZATION: &str = "`{type: Bearer, credentials_file: PATH}`; the file is read for each request.";
const BASIC_AUTH: &str = "`{username: NAME, password_file: PATH}`; the file is read for each request.";
const OF_PROTOCOL: &str = "See the sections by protocol.";

#[test]
fn configuration_reference_is_what_the_reader_allows() {
    let mut page = HEAD.to_owned();
    let mut shared: Vec<(String, [String; 2])> = Vec::new();
    for mapping in MAPPINGS {
        let _ = write!(
            page,
            "\n## {}\n\n| key | allowed | default | meaning |\n|---|---|---|---|\n",
            mapping.title
        );
        for key in keys(mapping) {
            let allowed = allowed(mapping, &key);
            let default = match is_required(mapping, &key) {
                true => "required".to_owned(),
                false => default(mapping, &key),
            };
            let row = match meaning(mapping, &key) {
                Some(meaning) => format!("| `{key}` | {allowed} | {default} | {meaning} |"),
                // A key of every probe: only where it differs.
                None => {
                    let (_, common) = shared
                        .iter()
                        .find(|(known, _)| *known == key)
                        .unwrap_or_else(|| panic!("{}: no doc comment says what {key} means", mapping.title));
                    let differs = common[0] != allowed || (common[1] != default && !default.is_empty());
                    if !differs || key == "name" || key == "protocol" {
                        continue;
                    }
                    format!("| `{key}` | {allowed} | {default} | As for every probe. |")
                }
            };
            let _ = writeln!(page, "{row}");
            if mapping.title == EVERY_PROBE {
                shared.push((key, [allowed, default]));
            }
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(page == written, "{PAGE} is out of date: run UPDATE_DOCS=1 cargo test --test it reference");
}

const HEAD: &str = "# Configuration

Every key of the configuration file. The keys and allowed values are the answers of the program's own reader, the
defaults are compared with it, and the tests check this page. An empty file is valid: an agent that only replies. A
complete example with comments is [config.example.yaml](../../config.example.yaml). `pathmeter check FILE` reports every
problem with line and column. Limits of everything else: [limits](limits.md).

Durations have a unit (ns, us, ms, s, m, h, d), sizes too (B, kB, KiB, MB, MiB, GB, GiB), rates too (pps, kpps, Mpps).
";

fn load(text: &str) -> Result<Config, Problems> {
    let host = LoadContext {
        name_override: None,
        hostname: "host".to_owned(),
        labels: BTreeMap::new(),
        state_dir: None,
    };
    config::load(text.as_bytes(), &host).map(|loaded| loaded.config)
}

/// The file with these keys; one that it has already is replaced.
fn with(mapping: &Mapping, keys: &str) -> String {
    let mut file = mapping.file.to_owned();
    if let Some((key, _)) = keys.split_once(':')
        && let Some(start) = file.rfind(&format!("{key}: ")).filter(|start| !file[..*start].ends_with('_'))
        && let Some(length) = file[start..].find(", ").filter(|_| start < file.find("KEYS").unwrap())
    {
        file.replace_range(start..start + length + 2, "");
    }
    file.replace("KEYS", keys)
}

/// The keys that the reader lists where one is unknown.
fn keys(mapping: &Mapping) -> Vec<String> {
    let problems = load(&with(mapping, "zzzzzzzz: 1")).expect_err("an unknown key is refused");
    let remedies = problems.iter().filter_map(|problem| problem.remedy.as_deref());
    let listed = remedies.filter_map(|remedy| remedy.split_once("allowed: ")).map(|(_, keys)| keys);
    let mut listed = listed;
    let listed = listed.next_back().unwrap_or_else(|| panic!("{}: no list of keys", mapping.title));
    listed.split(", ").map(str::to_owned).collect()
}

/// Values that are wrong for every key, each in its own way.
const WRONG: [&str; 10] = [
    "{zz: 1}",
    "[[]]",
    "'zz!'",
    "-1",
    "99999999999999",
    "'99999d'",
    "'0s'",
    "'9999999GB'",
    "'9999999Mpps'",
    "'9999999kpps'",
];

/// What the reader asks for instead of wrong values: a range where it says one, else the form.
fn allowed(mapping: &Mapping, key: &str) -> String {
    let mut found: Vec<String> = Vec::new();
    let ending = format!(".{key}");
    for wrong in WRONG {
        let Err(problems) = load(&with(mapping, &format!("{key}: {wrong}"))) else { continue };
        for problem in
            problems.iter().filter(|problem| problem.path == key || problem.path.ends_with(&ending))
        {
            let remedy = problem.remedy.as_deref().unwrap_or_default();
            let Some(remedy) = remedy
                .strip_prefix("write ")
                .or_else(|| Some(remedy).filter(|text| text.starts_with("for example")))
            else {
                continue;
            };
            let is_about_the_value = !remedy.ends_with("in quotes") && !remedy.ends_with("or remove it");
            if is_about_the_value && !found.iter().any(|known| known == remedy) {
                found.push(remedy.to_owned());
            }
        }
    }
    let form = found.first().cloned().unwrap_or_default();
    let noun = form.split(" such as").next().unwrap_or(&form);
    let words: Vec<&str> = form.split(" or ").flat_map(|part| part.split(", ")).collect();
    let is_words = words.len() > 1 && !words.iter().any(|word| word.contains(' '));
    match (found.iter().find(|remedy| is_range(remedy)), found.get(1)) {
        (Some(range), _) => format!("{noun}, {range}"),
        (None, _) if is_words => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        (None, Some(example)) if example.starts_with("for example") => format!("{form}, {example}"),
        (None, Some(more)) if form.contains("such as") || form == "a DSCP" => format!("{noun}: {more}"),
        (None, Some(_) | None) => form,
    }
    .replace('|', "\\|")
}

/// Whether the reader reports a key as missing where it is not given.
fn is_required(mapping: &Mapping, key: &str) -> bool {
    let without = with(mapping, &format!("{key}: x")).replace(&format!("{key}: x"), "");
    let ending = format!(".{key}");
    let is_missing = |problem: &config::Problem| problem.path.ends_with(&ending) && problem.what == "missing";
    load(&without).is_err_and(|problems| problems.iter().any(is_missing))
}

/// Whether a remedy is two quantities: `1ms to 1h`.
fn is_range(remedy: &str) -> bool {
    let mut words = remedy.split(' ');
    let is_quantity =
        |word: Option<&str>| word.is_some_and(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    is_quantity(words.next())
        && words.next() == Some("to")
        && is_quantity(words.next())
        && words.next().is_none()
}

/// The example's value of a key, if the reader has the same without it.
fn default(mapping: &Mapping, key: &str) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config.example.yaml")).unwrap();
    let mut rest = text.as_str();
    for word in mapping.example {
        let Some(at) = rest.find(&format!("\n{word}")).or_else(|| rest.find(&format!(" {word}"))) else {
            panic!("{}: the example has no {word}", mapping.title);
        };
        rest = &rest[at + 1 + word.len()..];
    }
    // A mapping with a key that must be there has no other default either.
    let Ok(without) = load(&with(mapping, "")) else { return String::new() };
    let values = rest.lines().filter_map(|line| {
        let line = line.trim_start().trim_start_matches("- ").trim_start_matches('#');
        let value = line.strip_prefix(key)?.strip_prefix(':')?;
        Some(value.split(" #").next().unwrap_or(value).trim())
    });
    let candidates = values.take(1).filter(|value| !value.is_empty()).chain(USUAL_DEFAULTS);
    let is_default =
        |value: &&str| load(&with(mapping, &format!("{key}: {value}"))).is_ok_and(|config| config == without);
    candidates.filter(is_default).map(|value| format!("`{value}`")).next().unwrap_or_default()
}

/// What many defaults are, for keys that the example writes otherwise or not at all.
const USUAL_DEFAULTS: [&str; 17] = [
    "off", "[]", "{}", "echo", "udp", "all", "http", "auto", "1s", "3s", "10s", "15s", "862", "9862", "9863",
    "pair", "zone",
];

/// The doc comment of the field that a key sets.
fn meaning(mapping: &Mapping, key: &str) -> Option<String> {
    if let Some((_, meaning)) = mapping.elsewhere.iter().find(|(known, _)| *known == key) {
        return Some((*meaning).to_owned());
    }
    let doc = mapping.fields.iter().find_map(|(file, name)| field_doc(file, name, key))?;
    Some(doc.replace("`None`:", "not set:"))
}

fn field_doc(file: &str, name: &str, field: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let (_, body) = text
        .split_once(&format!("pub struct {name} {{\n"))
        .or_else(|| text.split_once(&format!("pub enum {name} {{\n")))?;
    let mut doc: Vec<&str> = Vec::new();
    for line in body.lines().take_while(|line| *line != "}") {
        let line = line.trim();
        if let Some(comment) = line.strip_prefix("///") {
            doc.push(comment.trim());
        } else if line.strip_prefix("pub ").unwrap_or(line).starts_with(&format!("{field}:")) {
            return Some(doc.join(" "));
        } else {
            doc.clear();
        }
    }
    None
}
