//! Peers and targets that come and go while an agent runs.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use serde_json::json;
use tempfile::TempDir;

use crate::fixture::{Agent, DEADLINE, Host, Page, eventually};

const OK: &str = "pathmeter_echo_rtt_seconds_count";
const MEMBERS: &str = "pathmeter_discovery_members";
const FAILURES: &str = "pathmeter_discovery_failures_total";
const TARGETS: &str = "pathmeter_probe_targets";

const PROBE: &str = "probes: [{name: fast, interval: 20ms, late_after: 60s, lost_after: 60s}]";

fn answering(host: &Host, name: &str) -> Agent {
    Agent::start(host, &host.config(name, "responder: {allow: [127.0.0.0/8]}"))
}

/// An agent that finds its peers as `providers` say.
fn finding(host: &Host, providers: &str) -> Agent {
    Agent::start(host, &host.config("a", &format!("{providers}\n{PROBE}")))
}

/// A list as Prometheus reads it, too.
fn list(hosts: &[(&str, &Host)]) -> String {
    let groups = hosts.iter().map(|(name, host)| {
        json!({"targets": [host.front().to_string()], "labels": {"instance": name, "zone": "z", "__meta_x": "y"}})
    });
    json!(groups.collect::<Vec<_>>()).to_string()
}

/// A file that is there as a whole or not at all.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, file).unwrap();
}

fn of(peer: &str) -> String {
    format!("peer=\"{peer}\"")
}

fn answered(agent: &Agent, peers: &[&str]) -> Page {
    agent.page_when("answers of all", |page| {
        peers.iter().all(|peer| page.has(OK, &[&of(peer)]) && page.count(OK, &[&of(peer)]) >= 10)
    })
}

fn assert_nothing_missed(page: &Page) {
    for name in ["lost_total", "late_total", "withdrawn_total", "send_errors_total"] {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
}

#[test]
fn files_are_followed_without_disturbing_who_stays_and_a_broken_one_changes_nothing() {
    let [a, b, c, d] = [(); 4].map(|()| Host::claim());
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("peers.json");
    replace(&file, &list(&[("a", &a), ("b", &b)]));
    let _others = [answering(&b, "b"), answering(&c, "c"), answering(&d, "d")];
    let agent = finding(
        &a,
        &format!(
            "peers: [{{files: '{}/*.json', refresh: 1s, labels: {{site: x}}}}]",
            folder.path().display()
        ),
    );
    let page = answered(&agent, &["b"]);
    let provider = format!("provider=\"files:{}/*.json\"", folder.path().display());
    assert_eq!(page.count(MEMBERS, &[&provider]), 2, "{page}");
    assert_eq!(page.count(TARGETS, &[r#"probe="fast""#]), 1, "we are not our own peer\n{page}");
    assert!(
        page.has("pathmeter_peer_info", &[r#"peer="b""#, r#"label_zone="z""#, r#"label_site="x""#]),
        "{page}"
    );
    let sources = agent.sources("fast", "b");

    replace(&file, &list(&[("b", &b), ("c", &c)]));
    replace(&folder.path().join("more.json"), &list(&[("d", &d)]));
    let page = answered(&agent, &["b", "c", "d"]);
    assert_nothing_missed(&page);
    assert_eq!(agent.sources("fast", "b"), sources);

    replace(&file, r#"[{"targets": ["b 1"]}]"#);
    let page = agent.page_when("a failure", |page| page.count(FAILURES, &[&provider]) >= 1);
    assert_eq!(page.count(MEMBERS, &[&provider]), 3, "{page}");
    assert!(page.has(OK, &[&of("c")]), "{page}");
    let why = eventually("the reason is shown", || {
        let shown = agent.json("/api/v1/discovery");
        shown["providers"][0]["reason"].as_str().map(str::to_owned)
    });
    assert!(why.contains("peers.json: 1 problem\n  line 1, column 15: [0].targets[0]: `b 1`"), "{why}");

    replace(&file, &list(&[("c", &c)]));
    let page = agent.page_when("b is gone", |page| !page.has(OK, &[&of("b")]));
    assert!(page.has(OK, &[&of("c")]) && page.has(OK, &[&of("d")]), "{page}");
    assert!(!page.has("pathmeter_peer_info", &[&of("b")]), "{page}");
    assert_nothing_missed(&answered(&agent, &["c", "d"]));
}

/// A server that answers every request with what is there at the moment.
struct Inventory {
    url: String,
    answer: Arc<Mutex<(u16, String)>>,
    /// The `Authorization` header of each request.
    told: mpsc::Receiver<Option<String>>,
}

fn inventory() -> Inventory {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/agents", listener.local_addr().unwrap());
    let answer = Arc::new(Mutex::new((200, "[]".to_owned())));
    let shared = Arc::clone(&answer);
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // One read is enough for the short request of one client.
            let mut request = [0; 4096];
            let length = stream.read(&mut request).unwrap();
            let request = str::from_utf8(&request[..length]).unwrap();
            assert!(request.starts_with("GET /agents HTTP/1.1\r\n"), "{request}");
            let header = request.lines().find_map(|line| line.strip_prefix("authorization: "));
            // Most tests do not listen.
            let _ = tell.send(header.map(str::to_owned));
            let (status, body) = shared.lock().unwrap().clone();
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    });
    Inventory { url, answer, told }
}

#[test]
fn a_server_is_asked_and_one_that_fails_keeps_its_last_members() {
    let [a, b, c] = [(); 3].map(|()| Host::claim());
    let Inventory { url, answer, told } = inventory();
    *answer.lock().unwrap() = (200, list(&[("b", &b)]));
    let _others = [answering(&b, "b"), answering(&c, "c")];
    let agent = finding(&a, &format!("peers: [{{http: '{url}', refresh: 1s}}]"));
    answered(&agent, &["b"]);
    for (status, body) in [(500, String::new()), (200, "<html>".to_owned())] {
        *answer.lock().unwrap() = (status, body);
        let before = agent.page().count(FAILURES, &[]);
        let page = agent.page_when("a failure", |page| page.count(FAILURES, &[]) > before);
        assert_eq!(page.count(MEMBERS, &[]), 1, "{page}");
        assert!(page.has(OK, &[&of("b")]), "{page}");
    }
    assert!(agent.log().contains("responded with 500"), "{}", agent.log());
    *answer.lock().unwrap() = (200, list(&[("c", &c), ("b", &b)]));
    let page = answered(&agent, &["b", "c"]);
    assert!(page.seconds("pathmeter_discovery_last_success_timestamp_seconds", &[]) > 1e9, "{page}");
    assert_nothing_missed(&page);
    assert!(told.try_iter().all(|header| header.is_none()));
}

#[test]
fn a_server_that_wants_to_know_who_asks_is_told_by_files_that_may_change() {
    let (a, b) = (Host::claim(), Host::claim());
    let Inventory { url, answer, told } = inventory();
    *answer.lock().unwrap() = (200, list(&[("b", &b)]));
    let _b = answering(&b, "b");
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("secret");
    fs::write(&file, "first\n").unwrap();
    let who = [
        (format!("authorization: {{credentials_file: {}}}", file.display()), "Bearer first", "Bearer second"),
        (
            format!("basic_auth: {{username: us, password_file: {}}}", file.display()),
            // As base64 encodes us:first and us:second.
            "Basic dXM6Zmlyc3Q=",
            "Basic dXM6c2Vjb25k",
        ),
    ];
    for (credentials, first, second) in who {
        fs::write(&file, "first\n").unwrap();
        let agent = finding(&a, &format!("peers: [{{http: {{url: '{url}', {credentials}}}, refresh: 1s}}]"));
        answered(&agent, &["b"]);
        assert!(agent.log().contains("the credentials are sent unencrypted"), "{}", agent.log());
        let said = || eventually("it is asked", || told.try_recv().ok());
        assert_eq!(said().as_deref(), Some(first));
        fs::write(&file, "").unwrap();
        let page = agent.page_when("a failure", |page| page.count(FAILURES, &[]) > 0);
        assert_eq!(page.count(MEMBERS, &[]), 1, "{page}");
        assert!(agent.log().contains("secret: is empty"), "{}", agent.log());
        fs::write(&file, "second").unwrap();
        eventually("the new secret is shown", || (said().as_deref() == Some(second)).then_some(()));
        drop(agent);
        for _ in told.try_iter() {}
    }
}

#[test]
fn agents_in_a_ring_are_each_measured_by_exactly_k_and_by_nobody_twice() {
    const SIZE: usize = 5;
    let hosts: Vec<Host> = (0..SIZE).map(|_| Host::claim()).collect();
    let names: Vec<String> = (0..SIZE).map(|number| format!("n-{number}")).collect();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("all.yaml");
    let named: Vec<(&str, &Host)> = names.iter().map(String::as_str).zip(&hosts).collect();
    fs::write(&file, list(&named)).unwrap();
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
fn an_agent_that_is_listed_under_another_name_notices_that_it_is_itself() {
    let a = Host::claim();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("peers.yaml");
    fs::write(&file, list(&[("not-a", &a)])).unwrap();
    let agent = finding(&a, &format!("peers: [{{files: {}}}]", file.display()));
    agent.page_when("it is no peer", |page| {
        page.count(MEMBERS, &[]) == 1 && page.count(TARGETS, &[]) == 0 && !page.has(OK, &[])
    });
    eventually("it says so", || {
        agent.log().contains("peer not-a is this host, which calls itself a").then_some(())
    });
}

#[test]
fn a_configuration_that_is_watched_is_in_force_when_it_has_changed() {
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
    agent.page_when("it is right again", |page| {
        page.count("pathmeter_config_last_reload_successful", &[]) == 1
    });
}

#[test]
fn a_key_of_a_configuration_that_is_watched_is_in_force_when_it_has_changed() {
    let (a, folder) = (Host::claim(), TempDir::new().unwrap());
    let key = folder.path().join("mesh.key");
    fs::write(&key, "the key of this year").unwrap();
    let config = a.config("a", &format!("key_file: {}\n", key.display()));
    let agent = Agent::start_with(&a, &config, &[("PATHMETER_WATCH", "true")]);
    let reloaded = |page: &Page| page.seconds("pathmeter_config_last_reload_success_timestamp_seconds", &[]);
    let before = reloaded(&agent.page());
    fs::write(&key, "too short").unwrap();
    agent.page_when("a refusal", |page| page.count("pathmeter_config_last_reload_successful", &[]) == 0);
    fs::write(&key, "the key of next year").unwrap();
    agent.page_when("the new key", |page| reloaded(page) > before);

    fs::remove_file(&key).unwrap();
    agent.page_within(2 * DEADLINE, "a key that stays away is told", |page| {
        page.count("pathmeter_config_last_reload_successful", &[]) == 0
    });
    fs::write(&key, "the key of next year").unwrap();
    agent.page_when("it is back", |page| page.count("pathmeter_config_last_reload_successful", &[]) == 1);
}

#[test]
fn paths_are_exported_by_groups_and_the_worst_by_themselves() {
    let [a, b, c] = [(); 3].map(|()| Host::claim());
    let _others = [answering(&b, "b"), answering(&c, "c")];
    let peers = |labels: &str| {
        format!(
            "metrics: {{level: group, group_by: site, worst: 1}}\n\
             peers: [{{name: b, address: {b}, labels: {{site: x}}}}, {{name: c, address: {c}, labels: {{{labels}}}}}]\n{PROBE}"
        )
    };
    let agent = Agent::start(&a, &a.config("a", &peers("site: y")));
    let requests = |page: &Page, group: &str| {
        page.count("pathmeter_echo_group_verdicts_total", &[&format!("group=\"{group}\"")])
    };
    let page = agent.page_when("verdicts", |page| requests(page, "x") >= 20 && requests(page, "y") >= 20);
    assert_eq!(page.count("pathmeter_echo_group_paths", &[]), 2, "{page}");
    assert_eq!(page.count("pathmeter_series_limit_dropped", &[]), 0, "{page}");
    let exported = ["b", "c"].iter().filter(|peer| page.has(OK, &[&of(peer)])).count();
    assert_eq!(exported, 1, "{page}");

    let before = (requests(&page, "x"), requests(&page, "y"));
    agent.rewrite(&a.config("a", &peers("site: x")));
    assert_eq!(agent.reload().status, 200);
    let x = [r#"group="x""#];
    let page = agent.page_when("both in one group", |page| page.count("pathmeter_echo_group_paths", &x) == 2);
    assert!(!page.has("pathmeter_echo_group_paths", &[r#"group="y""#]), "{page}");
    let now = requests(&page, "x");
    assert!(now >= before.0, "a counter does not fall: {now} after {before:?}");
    agent.page_when("it goes on", |page| requests(page, "x") > now + 20);
}
