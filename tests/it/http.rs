//! The endpoints of the HTTP server and their errors.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::fixture::{Agent, Host, MetricsPage, eventually, request, skipped};

/// An agent that measures another one, which answers.
fn measuring() -> (Agent, Agent, [Host; 2]) {
    let (a, b) = (Host::claim(), Host::claim());
    let other = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let more = format!(
        "peers: [{{name: b, address: {b}, labels: {{site: \"a \\\"quoted\\\" \\\\ place\"}}}}]\n\
         probes: [{{name: fast, interval: 20ms, flows: 2, dscp: ef}}]"
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    (agent, other, [a, b])
}

fn measured(page: &MetricsPage) -> bool {
    page.count("pathmeter_echo_verdicts_total", &[]) >= 5 && page.has("pathmeter_peers", &[])
}

#[test]
fn metrics_page_is_well_formed() {
    let (agent, _b, _hosts) = measuring();
    // Parsing panics if a series occurs twice.
    let page = agent.page_when("measurements", measured);
    let kind = agent.get("/metrics");
    assert_eq!(kind.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));

    let names: Vec<&str> = page.families().iter().map(|(name, _)| *name).collect();
    let sorted: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(names, sorted.into_iter().collect::<Vec<_>>(), "families come sorted, each once");

    let (mut family, mut kind, mut has_help) = ("", "", false);
    for line in page.text().lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(words.ends_with('.') && !has_help, "{line}");
            (family, has_help) = (name, true);
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, found) = of.split_once(' ').unwrap();
            assert!(name == family && has_help, "{line}: TYPE follows the HELP of its family");
            assert_eq!(name.ends_with("_total"), found == "counter", "{line}");
            (kind, has_help) = (found, false);
        } else {
            let name = line.split(['{', ' ']).next().unwrap();
            let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is not of {family}"));
            let allowed: &[&str] = match kind {
                "histogram" => &["_bucket", "_sum", "_count"],
                "summary" => &["", "_sum", "_count"],
                _ => &[""],
            };
            assert!(allowed.contains(&suffix), "{line} is not a series of a {kind}");
        }
    }
}

#[test]
fn promtool_accepts_the_metrics_page() {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        return skipped("promtool is not on PATH");
    };
    let (agent, _b, _hosts) = measuring();
    let page = agent.page_when("measurements", measured);
    promtool.stdin.take().unwrap().write_all(page.text().as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{text:?}");
}

#[test]
fn api_agent_shows_identity_and_admission() {
    let host = Host::claim();
    let config = host.config("fra-1", "").replace("grace", "labels: {site: fra}, grace");
    let agent = Agent::start(&host, &config);
    let shown = agent.json("/api/v1/agent");
    assert_eq!(shown["name"], "fra-1");
    assert_eq!(shown["labels"], json!({"site": "fra"}));
    assert_eq!(shown["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(shown["ports"], json!({"http": 9862, "stamp": 9862, "agent": 9863}));
    assert!(
        shown["boot_id"].as_str().is_some_and(|id| id.len() == 16 && u64::from_str_radix(id, 16).is_ok())
    );
    assert!(shown["capabilities"].as_array().unwrap().contains(&json!("echo/udp")));
    let reason = "fra-1 does not answer 127.0.0.1: add it to responder.allow there";
    assert_eq!(
        shown["you"],
        json!({"address": "127.0.0.1", "stamp": {"answers": false, "reason": reason}, "websocket": {"answers": true}})
    );
    assert_eq!(shown["state"], json!({"directory": null, "error": null}));
    assert_eq!(shown.as_object().unwrap().len(), 8);

    agent.rewrite(&(config + "responder: {allow: [127.0.0.1/32]}\n"));
    assert_eq!(agent.reload().status, 200);
    assert_eq!(agent.json("/api/v1/agent")["you"]["stamp"], json!({"answers": true}));
}

#[test]
fn unresolved_path_shows_its_reason() {
    let host = Host::claim();
    let more = "targets: [{name: typo, address: no-such-host.invalid}]\nprobes: [{name: fast, targets: all}]";
    let agent = Agent::start(&host, &host.config("a", more));
    let path = agent.path("fast", "typo");
    assert_eq!((&path["state"], &path["family"]), (&json!("not_measured"), &json!("auto")));
    // The first lookup may still be running.
    let reason = eventually("the look-up fails", || {
        let reason = agent.path("fast", "typo")["reason"].as_str().unwrap().to_owned();
        reason.starts_with("looking up no-such-host.invalid: ").then_some(reason)
    });
    assert!(reason.len() > "looking up no-such-host.invalid: ".len());
    let page = agent.page_when("the failure is counted", |page| page.has("pathmeter_peers", &[]));
    assert!(page.count("pathmeter_resolve_failures_total", &[]) >= 1, "{page}");
    assert!(!page.has("pathmeter_echo_sent_total", &[]), "{page}");
    agent
        .page_when("it is unresolved", |page| page.count("pathmeter_peers", &[r#"state="unresolved""#]) == 1);
}

#[test]
fn path_with_an_unassigned_source_address_shows_its_reason() {
    let host = Host::claim();
    let more = "targets: [{name: t, address: 127.0.0.1}]\n\
                probes: [{name: fast, targets: all, source: 192.0.2.1, family: ipv4}]";
    let agent = Agent::start(&host, &host.config("a", more));
    let path = eventually("the path is not measured", || {
        let path = agent.path("fast", "t");
        (path["state"] == "not_measured").then_some(path)
    });
    let reason = path["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("binding 192.0.2.1:0: ") && reason.ends_with("(no interface has this address)")
    );
}

#[test]
fn health_and_readiness_endpoints_answer() {
    let host = Host::claim();
    let agent = Agent::start(&host, &host.config("a", ""));
    for (path, body) in [("/-/healthy", "healthy\n"), ("/-/ready", "ready\n")] {
        let answer = agent.get(path);
        assert_eq!((answer.status, answer.body.as_str()), (200, body));
    }
}

#[test]
fn unknown_paths_are_404_and_wrong_methods_405() {
    let host = Host::claim();
    let agent = Agent::start(&host, &host.config("a", ""));
    for path in ["/nothing", "/metrics/", "/api/v1", "/../etc/passwd"] {
        let answer = agent.get(path);
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (404, "not found; see / for a list of paths\n"),
            "{path}"
        );
    }
    for (method, path, allowed) in
        [("POST", "/metrics", "GET"), ("GET", "/-/reload", "POST"), ("PUT", "/", "GET")]
    {
        let answer = request(method, host.service_address(), path).unwrap();
        assert_eq!((answer.status, answer.header("allow")), (405, Some(allowed)), "{method} {path}");
    }
    let answer = request("HEAD", host.service_address(), "/metrics").unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    let page = agent.page();
    assert_eq!(page.count("pathmeter_http_responses_total", &[r#"code="4xx""#]), 7, "{page}");
}

#[test]
fn index_page_links_to_every_endpoint() {
    let host = Host::claim();
    let agent = Agent::start(&host, &host.config("a", ""));
    let page = agent.get("/");
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let links: Vec<&str> =
        page.body.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(
        links,
        [
            "/metrics",
            "/api/v1/agent",
            "/api/v1/paths",
            "/api/v1/discovery",
            "/api/v1/events",
            "/api/v1/routes",
            "/api/v1/traces",
            "/api/v1/ping",
            "/-/healthy",
            "/-/ready"
        ]
    );
    for link in links {
        assert_eq!(agent.get(link).status, 200, "{link}");
    }
}

#[test]
fn path_beyond_the_series_limit_is_measured_but_not_exported() {
    let (a, b) = (Host::claim(), Host::claim());
    let _b = Agent::start(&b, &b.config("b", "responder: {allow: [127.0.0.0/8]}"));
    let more = format!(
        "peers: [{{name: b, address: {b}}}]\n\
         metrics: {{series_max: {}}}\n\
         probes: [{{name: first, interval: 20ms}}, {{name: second, interval: 20ms}}]",
        <pathmeter::metrics::echo::EchoSeries as pathmeter::metrics::Series>::LINES * 2 - 1
    );
    let agent = Agent::start(&a, &a.config("a", &more));
    let page = agent.page_when("measurements", |page| page.count("pathmeter_echo_sent_total", &[]) >= 5);
    assert_eq!(page.count("pathmeter_paths_not_exported", &[]), 1, "{page}");
    assert!(page.has("pathmeter_echo_sent_total", &[r#"probe="first""#]));
    assert!(!page.has("pathmeter_echo_sent_total", &[r#"probe="second""#]));
    eventually("the other is measured", || {
        (agent.path("second", "b")["counts"]["ok"].as_u64() >= Some(5)).then_some(())
    });
}

#[test]
fn events_accept_only_the_after_parameter() {
    let host = Host::claim();
    let agent = Agent::start(&host, &host.config("fra-1", ""));
    for path in ["/api/v1/events", "/api/v1/events?after=0", "/api/v1/events?after=18446744073709551615"] {
        let shown = agent.json(path);
        assert_eq!(shown["events"].as_array().map(Vec::len), Some(0), "{shown}");
        assert_eq!(shown["boot_id"], agent.json("/api/v1/agent")["boot_id"]);
    }
    for query in ["after=x", "after=-1", "after", "since=3", "after=1&after=2"] {
        let answer = agent.get(&format!("/api/v1/events?{query}"));
        assert_eq!(answer.status, 400, "{query}");
        assert_eq!(
            answer.body,
            format!("query {query} is invalid; allowed: after=N, where N is the number of an event\n")
        );
    }
}
