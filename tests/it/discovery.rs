//! Peers and targets that appear and disappear while an agent runs.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use serde_json::json;
use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host, MetricsPage, eventually};

const OK: &str = "pathmeter_echo_rtt_seconds_count";
const MEMBERS: &str = "pathmeter_discovery_members";
const FAILURES: &str = "pathmeter_discovery_failures_total";

/// The failed polls of the matching providers. Their series appear with the first page after the first poll.
fn failures(page: &MetricsPage, labels: &[&str]) -> u64 {
    if page.has(FAILURES, labels) { page.count(FAILURES, labels) } else { 0 }
}
const TARGETS: &str = "pathmeter_probe_targets";

const PROBE: &str = "probes: [{name: fast, interval: 20ms, late_after: 60s, lost_after: 60s}]";

fn open_responder(host: &Host, name: &str) -> Agent {
    Agent::start(host, &host.config(name, "responder: {allow: [127.0.0.0/8]}"))
}

/// An agent with these discovery providers.
fn discovering(host: &Host, providers: &str) -> Agent {
    Agent::start(host, &host.config("a", &format!("{providers}\n{PROBE}")))
}

/// A target list in the format of Prometheus' `file_sd`.
fn target_list(hosts: &[(&str, &Host)]) -> String {
    let groups = hosts.iter().map(|(name, host)| {
        json!({"targets": [host.service_address().to_string()], "labels": {"instance": name, "zone": "z", "__meta_x": "y"}})
    });
    json!(groups.collect::<Vec<_>>()).to_string()
}

/// Replaces a file atomically.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, file).unwrap();
}

fn peer_label(peer: &str) -> String {
    format!("peer=\"{peer}\"")
}

fn wait_for_replies(agent: &Agent, peers: &[&str]) -> MetricsPage {
    agent.page_when("replies of all peers", |page| {
        peers
            .iter()
            .all(|peer| page.has(OK, &[&peer_label(peer)]) && page.count(OK, &[&peer_label(peer)]) >= 10)
    })
}

fn assert_nothing_missed(page: &MetricsPage) {
    for name in ["lost_total", "late_total", "withdrawn_total", "send_errors_total"] {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn file_changes_keep_unchanged_paths_and_invalid_files_change_nothing() {
    let [a, b, c, d] = [(); 4].map(|()| Host::claim());
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("peers.json");
    replace(&file, &target_list(&[("a", &a), ("b", &b)]));
    let _others = [open_responder(&b, "b"), open_responder(&c, "c"), open_responder(&d, "d")];
    let agent = discovering(
        &a,
        &format!(
            "peers: [{{files: '{}/*.json', refresh: 1s, labels: {{site: x}}}}]",
            folder.path().display()
        ),
    );
    let page = wait_for_replies(&agent, &["b"]);
    let provider = format!("provider=\"files:{}/*.json\"", folder.path().display());
    assert_eq!(page.count(MEMBERS, &[&provider]), 2, "{page}");
    assert_eq!(page.count(TARGETS, &[r#"probe="fast""#]), 1, "an agent is not its own peer\n{page}");
    assert!(
        page.has("pathmeter_peer_info", &[r#"peer="b""#, r#"label_zone="z""#, r#"label_site="x""#]),
        "{page}"
    );
    let sources = agent.sources("fast", "b");

    replace(&file, &target_list(&[("b", &b), ("c", &c)]));
    replace(&folder.path().join("more.json"), &target_list(&[("d", &d)]));
    let page = wait_for_replies(&agent, &["b", "c", "d"]);
    assert_nothing_missed(&page);
    assert_eq!(agent.sources("fast", "b"), sources);

    replace(&file, r#"[{"targets": ["b 1"]}]"#);
    let page = agent.page_when("a failure", |page| failures(page, &[&provider]) >= 1);
    assert_eq!(page.count(MEMBERS, &[&provider]), 3, "{page}");
    assert!(page.has(OK, &[&peer_label("c")]), "{page}");
    let why = eventually("the reason is shown", || {
        let shown = agent.json("/api/v1/discovery");
        shown["providers"][0]["reason"].as_str().map(str::to_owned)
    });
    assert!(why.contains("peers.json: 1 problem\n  line 1, column 15: [0].targets[0]: `b 1`"), "{why}");

    replace(&file, &target_list(&[("c", &c)]));
    let page = agent.page_when("b is gone", |page| !page.has(OK, &[&peer_label("b")]));
    assert!(page.has(OK, &[&peer_label("c")]) && page.has(OK, &[&peer_label("d")]), "{page}");
    assert!(!page.has("pathmeter_peer_info", &[&peer_label("b")]), "{page}");
    assert_nothing_missed(&wait_for_replies(&agent, &["c", "d"]));
}

/// An HTTP server for service discovery, with a response that tests can change.
struct DiscoveryServer {
    url: String,
    answer: Arc<Mutex<(u16, String)>>,
    /// The `Authorization` header of each request.
    authorizations: mpsc::Receiver<Option<String>>,
}

fn discovery_server() -> DiscoveryServer {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/agents", listener.local_addr().unwrap());
    let answer = Arc::new(Mutex::new((200, "[]".to_owned())));
    let shared = Arc::clone(&answer);
    let (sender, authorizations) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // One read is enough for a short request.
            let mut request = [0; 4096];
            let length = stream.read(&mut request).unwrap();
            let request = str::from_utf8(&request[..length]).unwrap();
            assert!(request.starts_with("GET /agents HTTP/1.1\r\n"), "{request}");
            let header = request.lines().find_map(|line| line.strip_prefix("authorization: "));
            // Most tests do not use this channel.
            let _ = sender.send(header.map(str::to_owned));
            let (status, body) = shared.lock().unwrap().clone();
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    });
    DiscoveryServer { url, answer, authorizations }
}

#[test]
fn failing_http_provider_keeps_its_last_members() {
    let [a, b, c] = [(); 3].map(|()| Host::claim());
    let DiscoveryServer { url, answer, authorizations } = discovery_server();
    *answer.lock().unwrap() = (200, target_list(&[("b", &b)]));
    let _others = [open_responder(&b, "b"), open_responder(&c, "c")];
    let agent = discovering(&a, &format!("peers: [{{http: '{url}', refresh: 1s}}]"));
    wait_for_replies(&agent, &["b"]);
    for (status, body) in [(500, String::new()), (200, "<html>".to_owned())] {
        *answer.lock().unwrap() = (status, body);
        let before = agent.page().count(FAILURES, &[]);
        let page = agent.page_when("a failure", |page| failures(page, &[]) > before);
        assert_eq!(page.count(MEMBERS, &[]), 1, "{page}");
        assert!(page.has(OK, &[&peer_label("b")]), "{page}");
    }
    assert!(agent.log().contains("responded with 500"), "{}", agent.log());
    *answer.lock().unwrap() = (200, target_list(&[("c", &c), ("b", &b)]));
    let page = wait_for_replies(&agent, &["b", "c"]);
    assert!(page.seconds("pathmeter_discovery_last_success_timestamp_seconds", &[]) > 1e9, "{page}");
    assert_nothing_missed(&page);
    assert!(authorizations.try_iter().all(|header| header.is_none()));
}

#[test]
fn http_provider_credentials_are_reread_from_their_files() {
    let (a, b) = (Host::claim(), Host::claim());
    let DiscoveryServer { url, answer, authorizations } = discovery_server();
    *answer.lock().unwrap() = (200, target_list(&[("b", &b)]));
    let _b = open_responder(&b, "b");
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, "first\n").unwrap();
    let credential_kinds = [
        (format!("authorization: {{credentials_file: {}}}", file.display()), "Bearer first", "Bearer second"),
        (
            format!("basic_auth: {{username: us, password_file: {}}}", file.display()),
            // us:first and us:second in base64.
            "Basic dXM6Zmlyc3Q=",
            "Basic dXM6c2Vjb25k",
        ),
    ];
    for (credentials, first, second) in credential_kinds {
        fs::write(&file, "first\n").unwrap();
        let agent =
            discovering(&a, &format!("peers: [{{http: {{url: '{url}', {credentials}}}, refresh: 1s}}]"));
        wait_for_replies(&agent, &["b"]);
        assert!(agent.log().contains("the credentials are sent unencrypted"), "{}", agent.log());
        let next_authorization = || eventually("it is asked", || authorizations.try_recv().ok());
        assert_eq!(next_authorization().as_deref(), Some(first));
        fs::write(&file, "").unwrap();
        let page = agent.page_when("a failure", |page| failures(page, &[]) > 0);
        assert_eq!(page.count(MEMBERS, &[]), 1, "{page}");
        assert!(agent.log().contains("secret: is empty"), "{}", agent.log());
        fs::write(&file, "second").unwrap();
        eventually("the new secret is sent", || {
            (next_authorization().as_deref() == Some(second)).then_some(())
        });
        drop(agent);
        for _ in authorizations.try_iter() {}
    }
}

#[test]
fn each_agent_in_a_ring_is_measured_by_exactly_k_peers() {
    const SIZE: usize = 5;
    let hosts: Vec<Host> = (0..SIZE).map(|_| Host::claim()).collect();
    let names: Vec<String> = (0..SIZE).map(|number| format!("n-{number}")).collect();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("all.yaml");
    let named: Vec<(&str, &Host)> = names.iter().map(String::as_str).zip(&hosts).collect();
    fs::write(&file, target_list(&named)).unwrap();
    let text = format!(
        "responder: {{allow: [127.0.0.0/8]}}\npeers: [{{files: {}}}]\nprobes: [{{name: ring, interval: 100ms, peers: {{select: ring, k: 2}}}}]",
        file.display()
    );
    let agents: Vec<Agent> =
        named.iter().map(|(name, host)| Agent::start(host, &host.config(name, &text))).collect();
    let measured = |agent: &Agent| {
        eventually("two paths", || {
            let paths = agent.json("/api/v1/paths")["paths"].as_array().unwrap().clone();
            let peers: Vec<String> =
                paths.iter().map(|path| path["peer"].as_str().unwrap().to_owned()).collect();
            (peers.len() == 2).then_some(peers)
        })
    };
    let mut all: Vec<String> = agents.iter().flat_map(measured).collect();
    all.sort();
    let twice: Vec<String> = names.iter().flat_map(|name| [name.clone(), name.clone()]).collect();
    assert_eq!(all, twice);
    for agent in &agents {
        agent.page_when("all are answered", |page| page.count("pathmeter_peers", &[r#"state="up""#]) == 2);
    }
}

#[test]
fn agent_listed_under_another_name_is_not_its_own_peer() {
    let a = Host::claim();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("peers.yaml");
    fs::write(&file, target_list(&[("not-a", &a)])).unwrap();
    let agent = discovering(&a, &format!("peers: [{{files: {}}}]", file.display()));
    agent.page_when("it is not a peer", |page| {
        page.count(MEMBERS, &[]) == 1 && page.count(TARGETS, &[]) == 0 && !page.has(OK, &[])
    });
    eventually("the log says so", || {
        agent.log().contains("peer not-a is this host, which calls itself a").then_some(())
    });
}

#[test]
fn watched_configuration_is_applied_when_it_changes() {
    let a = Host::claim();
    let mut config = a.config("a", "");
    let agent = Agent::start_with(&a, &config, &[("PATHMETER_WATCH", "true")]);
    config.push_str("targets: [{name: gw, address: 127.0.0.1}]\nprobes: [{name: gw, targets: all}]\n");
    agent.rewrite(&config);
    let gw = [r#"probe="gw""#];
    agent.page_when("the new probe", |page| page.has(TARGETS, &gw) && page.count(TARGETS, &gw) == 1);
    agent.rewrite("probes: [");
    agent.page_when("a refusal", |page| page.count("pathmeter_config_last_reload_successful", &[]) == 0);
    assert_eq!(agent.page().count(TARGETS, &[r#"probe="gw""#]), 1);
    agent.rewrite(&config);
    agent.page_when("the configuration is valid again", |page| {
        page.count("pathmeter_config_last_reload_successful", &[]) == 1
    });
}

#[test]
fn watched_key_file_is_applied_when_it_changes() {
    let (a, folder) = (Host::claim(), TempDir::new().unwrap());
    let key = folder.path().join("mesh.key");
    fs::write(&key, "the key of this year").unwrap();
    let config = a.config("a", &format!("key_file: {}\n", key.display()));
    let agent = Agent::start_with(&a, &config, &[("PATHMETER_WATCH", "true")]);
    let reloaded =
        |page: &MetricsPage| page.seconds("pathmeter_config_last_reload_success_timestamp_seconds", &[]);
    let before = reloaded(&agent.page());
    fs::write(&key, "too short").unwrap();
    agent.page_when("a refusal", |page| page.count("pathmeter_config_last_reload_successful", &[]) == 0);
    fs::write(&key, "the key of next year").unwrap();
    agent.page_when("the new key", |page| reloaded(page) > before);

    fs::remove_file(&key).unwrap();
    agent.page_within(2 * DEADLINE, "a missing key is reported", |page| {
        page.count("pathmeter_config_last_reload_successful", &[]) == 0
    });
    fs::write(&key, "the key of next year").unwrap();
    agent
        .page_when("the key is back", |page| page.count("pathmeter_config_last_reload_successful", &[]) == 1);
}

#[test]
fn groups_and_the_worst_paths_are_exported() {
    let [a, b, c] = [(); 3].map(|()| Host::claim());
    let _others = [open_responder(&b, "b"), open_responder(&c, "c")];
    let peers = |labels: &str| {
        format!(
            "metrics: {{level: group, group_by: site, worst: 1}}\n\
             peers: [{{name: b, address: {b}, labels: {{site: x}}}}, {{name: c, address: {c}, labels: {{{labels}}}}}]\n{PROBE}"
        )
    };
    let agent = Agent::start(&a, &a.config("a", &peers("site: y")));
    let requests = |page: &MetricsPage, group: &str| {
        page.count("pathmeter_echo_group_verdicts_total", &[&format!("group=\"{group}\"")])
    };
    let page = agent.page_when("verdicts", |page| requests(page, "x") >= 20 && requests(page, "y") >= 20);
    assert_eq!(page.count("pathmeter_echo_group_paths", &[]), 2, "{page}");
    assert_eq!(page.count("pathmeter_paths_not_exported", &[]), 0, "{page}");
    let exported = ["b", "c"].iter().filter(|peer| page.has(OK, &[&peer_label(peer)])).count();
    assert_eq!(exported, 1, "{page}");

    let before = (requests(&page, "x"), requests(&page, "y"));
    agent.rewrite(&a.config("a", &peers("site: x")));
    assert_eq!(agent.reload().status, 200);
    let x = [r#"group="x""#];
    let page = agent.page_when("both in one group", |page| page.count("pathmeter_echo_group_paths", &x) == 2);
    assert!(!page.has("pathmeter_echo_group_paths", &[r#"group="y""#]), "{page}");
    let now = requests(&page, "x");
    assert!(now >= before.0, "a counter does not fall: {now} after {before:?}");
    agent.page_when("the counter of the group continues", |page| requests(page, "x") > now + 20);
}
