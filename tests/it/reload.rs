//! A reload applies only what has changed, or nothing if the configuration is invalid.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::{Request, StatusCode};
use nix::sys::signal::Signal;
use pathmeter::api::routes::{AppState, metrics_renderer};
use pathmeter::bulk::Leases;
use pathmeter::config;
use pathmeter::http::auth::{Signer, Verifier};
use pathmeter::metrics::{Exporter, Responders};
use pathmeter::websocket::WebSocketResponder;
use pathmeter_proto::key::{Key, Keys};
use tokio::sync::mpsc;

use crate::fixture::{Agent, Host, MetricsPage};

const SENT: &str = "pathmeter_echo_sent_total";
const OK: &str = "pathmeter_echo_rtt_seconds_count";
const SUCCESSFUL: &str = "pathmeter_config_last_reload_successful";

/// An agent that answers every host on loopback.
fn responder(host: &Host) -> Agent {
    Agent::start(host, &host.config("b", "responder: {allow: [127.0.0.0/8]}"))
}

/// A configuration that measures `to` with these probes, each a name and further keys.
fn prober_config(own: &Host, to: &Host, probes: &[(&str, &str)]) -> String {
    let probe = |(name, more): &(&str, &str)| format!("  - {{name: {name}, {more}}}\n");
    let probes: String = probes.iter().map(probe).collect();
    own.config("a", &format!("peers: [{{name: b, address: {to}}}]\nprobes:\n{probes}"))
}

fn probe_label(probe: &str) -> String {
    format!("probe=\"{probe}\"")
}

#[test]
fn unchanged_paths_keep_their_ports_and_counters() {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = responder(&b);
    let fast = "interval: 20ms, flows: 2";
    let before = [("same", fast), ("slower", "interval: 20ms"), ("gone", fast)];
    let after = [("same", fast), ("slower", "interval: 40ms, late_after: 2s"), ("new", "interval: 1h")];
    let agent = Agent::start(&a, &prober_config(&a, &b, &before));
    let page = agent.page_when("each path has sent ten", |page| {
        before.iter().all(|(probe, _)| page.count(SENT, &[&probe_label(probe)]) >= 10)
    });
    let ports = ["same", "slower"].map(|probe| agent.sources(probe, "b"));
    let sent = |page: &MetricsPage, probe| page.count(SENT, &[&probe_label(probe)]);

    agent.rewrite(&prober_config(&a, &b, &after));
    let answer = agent.reload();
    assert_eq!((answer.status, answer.body.as_str()), (200, "reloaded\n"));

    let now = agent.page();
    for probe in ["same", "slower"] {
        assert!(sent(&now, probe) >= sent(&page, probe), "{now}");
    }
    assert_eq!(now.count_series(|series| series.contains(&probe_label("gone"))), 0, "{}", now.text());
    assert_eq!(now.count("pathmeter_echo_verdicts_total", &[&probe_label("new")]), 0);
    assert_eq!(now.count(OK, &[&probe_label("new")]), 0);
    assert_eq!(ports, ["same", "slower"].map(|probe| agent.sources(probe, "b")));
    agent.page_when("the paths go on", |page| {
        ["same", "slower"].iter().all(|probe| sent(page, probe) >= sent(&now, probe) + 10)
    });
    assert_eq!(agent.page().count("pathmeter_accounting_errors_total", &[]), 0);
    let limit = agent.page().seconds("pathmeter_echo_late_after_seconds", &[&probe_label("slower")]);
    assert!((limit - 2.0).abs() < 1e-9, "{limit}");
}

#[test]
fn changing_path_mtu_keeps_the_path() {
    const BYTES: &str = "pathmeter_path_mtu_bytes";
    let (a, b) = (Host::claim(), Host::claim());
    let _b = responder(&b);
    let with = |path_mtu: &str| {
        prober_config(&a, &b, &[("same", &format!("interval: 20ms, lost_after: 60s, path_mtu: {path_mtu}"))])
    };
    let agent = Agent::start(&a, &with("off"));
    let mut page = agent.page_when("ten are sent", |page| page.count(SENT, &[]) >= 10);
    assert_eq!(page.count_series(|series| series.starts_with("pathmeter_path_mtu_")), 0, "{page}");
    let ports = agent.sources("same", "b");
    for (path_mtu, bytes) in [
        ("{interval: 1s}", Some(9_000)),
        ("{interval: 1s, ceiling: 1400B}", Some(1_400)),
        ("{interval: 2s, ceiling: 1400B}", Some(1_400)),
        ("off", None),
    ] {
        agent.rewrite(&with(path_mtu));
        assert_eq!(agent.reload().status, 200);
        let is_as_wished = |page: &MetricsPage| page.has(BYTES, &[]).then(|| page.count(BYTES, &[])) == bytes;
        let now = agent.page_when(path_mtu, is_as_wished);
        assert_eq!(now.count("pathmeter_echo_withdrawn_total", &[]), 0, "{now}");
        assert!(now.count(SENT, &[]) >= page.count(SENT, &[]), "{now}");
        assert_eq!(agent.sources("same", "b"), ports);
        page = now;
    }
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0);
}

#[test]
fn sighup_reloads() {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = responder(&b);
    let probe = ("same", "interval: 20ms");
    let agent = Agent::start(&a, &prober_config(&a, &b, &[probe]));
    let page = agent.page_when("ten are sent", |page| page.count(SENT, &[]) >= 10);
    let ports = agent.sources("same", "b");

    agent.rewrite(&prober_config(&a, &b, &[probe, ("more", "interval: 20ms")]));
    agent.signal(Signal::SIGHUP);
    let now = agent.page_when("the new path is there", |page| page.has(SENT, &[&probe_label("more")]));
    assert!(now.count(SENT, &[&probe_label("same")]) >= page.count(SENT, &[&probe_label("same")]));
    assert_eq!(agent.sources("same", "b"), ports);
    assert_eq!(now.count(SUCCESSFUL, &[]), 1);

    agent.rewrite("agent: {nmae: a}\n");
    agent.signal(Signal::SIGHUP);
    agent.page_when("the failed reload is exported", |page| page.count(SUCCESSFUL, &[]) == 0);
    assert!(agent.log().contains("line 1, column 9: agent.nmae: unknown key"), "{}", agent.log());
    assert_eq!(agent.sources("same", "b"), ports);
}

#[test]
fn invalid_file_changes_nothing_and_a_valid_one_is_applied() {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = responder(&b);
    let good = prober_config(&a, &b, &[("same", "interval: 20ms")]);
    let agent = Agent::start(&a, &good);
    let page = agent.page_when("ten are sent", |page| page.count(SENT, &[]) >= 10);
    let ports = agent.sources("same", "b");
    let hash = |page: &MetricsPage| {
        page.text().lines().find(|line| line.starts_with("pathmeter_config_info")).map(str::to_owned)
    };

    let bad = prober_config(&a, &b, &[("same", "intervall: 1s"), ("same", "interval: 5")]);
    for (text, problems) in [
        (
            Some(bad.as_str()),
            &["3 problems", "line 5, column 18: probes[0].intervall: unknown key", "probes[1].interval"][..],
        ),
        (Some("probes: ["), &["line 2, column 1"]),
        (Some("key_file: /nowhere/mesh.key\nagent: {name: a}\n"), &["reading key file /nowhere/mesh.key"]),
        (None, &["reading ", "No such file"]),
    ] {
        match text {
            Some(text) => agent.rewrite(text),
            None => fs::remove_file(agent.config_file()).unwrap(),
        }
        let answer = agent.reload();
        assert_eq!(answer.status, 400, "{}", answer.body);
        for problem in problems {
            assert!(answer.body.contains(problem), "{problem:?} is not in {}", answer.body);
        }
        assert!(answer.body.ends_with("\nthe old configuration stays in use\n"), "{}", answer.body);
        let now = agent.page();
        assert_eq!(now.count(SUCCESSFUL, &[]), 0);
        assert_eq!(hash(&now), hash(&page));
        assert_eq!(agent.sources("same", "b"), ports);
        agent.page_when("measuring goes on", |page| page.count(SENT, &[]) > now.count(SENT, &[]));
    }

    agent.rewrite(&good.replace("20ms", "30ms"));
    assert_eq!(agent.reload().status, 200);
    let now = agent.page();
    assert_eq!(now.count(SUCCESSFUL, &[]), 1);
    assert_ne!(hash(&now), hash(&page));
    assert_eq!(agent.sources("same", "b"), ports);
}

#[test]
fn changes_that_need_a_restart_are_refused() {
    let host = Host::claim();
    let config = host.config("a", "");
    let agent = Agent::start(&host, &config);
    let moved = host.at(10_862);
    for (from, to, sentence) in [
        (
            format!("stamp: \"{}\"", host.service_address()),
            format!("stamp: \"{moved}\""),
            format!("listen.stamp changed from {} to {moved}", host.service_address()),
        ),
        (
            format!("http: \"{}\"", host.service_address()),
            format!("http: \"{moved}\""),
            format!("listen.http changed from {} to {moved}", host.service_address()),
        ),
        ("name: a".to_owned(), "name: b".to_owned(), "agent.name changed from a to b".to_owned()),
    ] {
        let changed = config.replace(&from, &to);
        assert_ne!(changed, config);
        agent.rewrite(&changed);
        let answer = agent.reload();
        let expected = format!("{sentence}, which requires a restart; nothing was applied\n");
        assert_eq!(answer.status, 400);
        assert!(answer.body.starts_with(&expected), "{}", answer.body);
        assert_eq!(agent.page().count(SUCCESSFUL, &[]), 0);
    }
    agent.rewrite(&config);
    assert_eq!(agent.reload().status, 200);
    assert_eq!(agent.page().count(SUCCESSFUL, &[]), 1);
}

#[test]
fn reloads_rotate_keys() {
    let (a, b) = (Host::claim(), Host::claim());
    let keys = tempfile::tempdir().unwrap();
    let [prober_key, responder_key] = ["prober", "responder"].map(|name| keys.path().join(name));
    for file in [&prober_key, &responder_key] {
        fs::write(file, "the key of last year").unwrap();
    }
    let responder = Agent::start(&b, &b.config("b", &format!("key_file: {}", responder_key.display())));
    let probes = format!(
        "key_file: {}\n\
         peers: [{{name: b, address: {b}}}]\n\
         probes: [{{name: fast, interval: 20ms, late_after: 200ms, lost_after: 200ms}}]",
        prober_key.display()
    );
    let agent = Agent::start(&a, &a.config("a", &probes));
    agent.page_when("answers", |page| page.count(OK, &[]) >= 10);
    let ports = agent.sources("fast", "b");

    fs::write(&prober_key, "the key of this year").unwrap();
    assert_eq!(agent.reload().status, 200);
    let rejected =
        |page: &MetricsPage| page.count("pathmeter_responder_rejected_total", &[r#"reason="auth""#]);
    responder.page_when("rejections of the unknown key", |page| rejected(page) >= 10);

    fs::write(&responder_key, "the key of this year\nthe key of last year").unwrap();
    assert_eq!(responder.reload().status, 200);
    let then = agent.page();
    let now = agent.page_when("answers again", |page| page.count(OK, &[]) >= then.count(OK, &[]) + 10);
    assert!(now.count("pathmeter_echo_lost_total", &[]) >= 1, "{now}");
    assert_eq!(agent.sources("fast", "b"), ports);
    assert_eq!(now.count("pathmeter_accounting_errors_total", &[]), 0);
}

/// The status of the response; a reload request that is accepted succeeds.
async fn reload_status(
    app_state: &Arc<AppState>,
    reloads: &mut mpsc::Receiver<pathmeter::api::routes::ReloadRequest>,
    request: Request<Bytes>,
    from: &str,
) -> StatusCode {
    let from: SocketAddr = from.parse().unwrap();
    let answer = tokio::spawn(Arc::clone(app_state).answer(request, from));
    tokio::select! {
        Some(reload) = reloads.recv() => reload.send(Ok(())).unwrap(),
        () = async { while !answer.is_finished() { tokio::task::yield_now().await } } => {}
    }
    answer.await.unwrap().status()
}

#[tokio::test]
async fn reload_is_accepted_from_loopback_or_with_the_key() {
    let keys = Keys::only(Key::new(b"the key of this year"));
    let (sender, mut reloads) = mpsc::channel(1);
    let context = config::LoadContext {
        name_override: None,
        hostname: "a".to_owned(),
        labels: std::collections::BTreeMap::new(),
        state_dir: None,
    };
    let rules = config::load(b"", &context).unwrap().config;
    let app_state = Arc::new(AppState {
        websocket: WebSocketResponder::new(rules.websocket, Arc::default()),
        leases: Arc::new(Leases::new(rules.bandwidth, 3)),
        events: Arc::default(),
        traces: Arc::default(),
        trace_requests: mpsc::channel(1).0,
        status: ArcSwap::default(),
        verifier: ArcSwap::from_pointee(Some(Verifier::new(&keys))),
        reloads: sender,
        web_config: Arc::default(),
        control: tokio::runtime::Handle::current(),
        renderer: metrics_renderer(
            Arc::new(Exporter::new(Vec::new(), Responders::default())),
            Arc::default(),
            Arc::default(),
        ),
    });
    let plain = || Request::post("/-/reload").body(Bytes::new()).unwrap();
    let signed = |keys: &Keys| {
        let mut request = plain();
        Signer::new(keys).sign(&mut request, SystemTime::now()).unwrap();
        request
    };
    let other = Keys::only(Key::new(b"the key of last year"));
    for (request, from, expected) in [
        (plain(), "127.0.0.1:9", StatusCode::OK),
        (plain(), "[::1]:9", StatusCode::OK),
        (plain(), "192.0.2.1:9", StatusCode::FORBIDDEN),
        (signed(&other), "192.0.2.1:9", StatusCode::FORBIDDEN),
        (signed(&keys), "192.0.2.1:9", StatusCode::OK),
    ] {
        assert_eq!(reload_status(&app_state, &mut reloads, request, from).await, expected, "from {from}");
    }
}
