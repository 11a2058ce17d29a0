//! Agents that discover each other through the DNS, and the names of routers.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use pathmeter_lab::{MetricsPage, Net, NetPlan, Program, eventually};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{NodeAgent, PROGRAM, resolving};

const OK: &str = "pathmeter_echo_rtt_seconds_count";
const MEMBERS: &str = "pathmeter_discovery_members";
const FAILURES: &str = "pathmeter_discovery_failures_total";

/// dnsmasq on a host of its own. Records live for one second.
struct NameServer {
    program: Program,
    hosts: PathBuf,
    dir: TempDir,
}

impl NameServer {
    fn start(net: &Net, node: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, "").unwrap();
        fs::write(dir.path().join("resolv.conf"), resolv_conf(net, node)).unwrap();
        let program = Self::serve(net, node, &dir);
        Self { program, hosts, dir }
    }

    fn serve(net: &Net, node: &str, dir: &TempDir) -> Program {
        let mut command = net.node(node).command("dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--log-queries",
                "--pid-file=",
            ])
            .args(["--user=root", "--group=root", "--log-facility=-", "--local=/lab.test/", "--local-ttl=1"])
            .args(["--srv-host=_http._tcp.agents.lab.test,b.lab.test,9862"])
            // A service without targets.
            .args(["--srv-host=_none._tcp.lab.test"])
            .arg(format!("--addn-hosts={}", dir.path().join("hosts").display()));
        let program = Program::start(&mut command, &dir.path().join("dnsmasq.log"));
        // Before that a SIGHUP would end it.
        eventually("a name server has started", || program.output().contains("started").then_some(()));
        program
    }

    /// Publishes the addresses of `agents.lab.test`, and a name for each host.
    fn list(&self, net: &Net, members: &[&str]) {
        self.list_by(&[Net::v4, Net::v6], net, members);
    }

    /// [`Self::list`] with addresses of some families.
    fn list_by(&self, families: &[fn(&Net, &str) -> IpAddr], net: &Net, members: &[&str]) {
        let mut lines = String::new();
        for member in members {
            for address in families.iter().map(|family| family(net, member)) {
                lines.push_str(&format!("{address} agents.lab.test\n{address} {member}.lab.test\n"));
            }
        }
        fs::write(&self.hosts, lines).unwrap();
        self.program.signal(Signal::SIGHUP);
    }

    /// Starts an agent on `node` that uses this name server.
    fn agent<'a>(&self, net: &'a Net, node: &str, provider: Value) -> NodeAgent<'a> {
        let config = json!({
            "agent": {"name": node, "grace": "1s", "labels": {"zone": format!("zone-{node}")}},
            "peers": [provider],
            "probes": [{
                "name": "found", "interval": "20ms", "family": "both", "late_after": "60s", "lost_after": "60s",
                "peers": {"select": "zones", "within": 5, "across": 1},
            }],
        });
        NodeAgent::start_resolving(net.node(node), config, &self.dir.path().join("resolv.conf"))
    }
}

/// A resolver configuration as in pods: names with few dots are completed first.
fn resolv_conf(net: &Net, node: &str) -> String {
    format!("nameserver {}\nsearch lab.test\noptions ndots:5 timeout:1 attempts:1\n", net.v4(node))
}

fn answered(page: &MetricsPage, peer: &str) -> bool {
    ["ipv4", "ipv6"].iter().all(|family| {
        let path = [format!("peer=\"{peer}\""), format!("family=\"{family}\"")];
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        page.has(OK, &path) && page.count(OK, &path) >= 10
    })
}

/// Pods appear, disappear, and lose their name server.
pub(crate) fn dns() {
    let net = NetPlan::mesh(4).build(5);
    let mut server = NameServer::start(&net, "d");
    server.list(&net, &["a", "b"]);
    let service = || json!({"kubernetes": {"service": "agents"}, "refresh": "1s"});
    let a = server.agent(&net, "a", service());
    let b = server.agent(&net, "b", service());
    let page = a.page_when("b is identified and answers over both families", |page| answered(page, "b"));
    assert_eq!(page.count(MEMBERS, &[]), 4, "{page}");
    assert_eq!(page.count("pathmeter_discovery_unidentified", &[]), 0, "{page}");
    assert_eq!(page.count("pathmeter_probe_targets", &[]), 1, "an agent is not its own peer\n{page}");
    assert!(page.has("pathmeter_peer_info", &["peer=\"b\"", "label_zone=\"zone-b\""]), "{page}");
    let before = sources(&a, "b");

    let c = server.agent(&net, "c", service());
    server.list(&net, &["a", "b", "c"]);
    for (agent, peers) in [(&a, ["b", "c"]), (&b, ["a", "c"]), (&c, ["a", "b"])] {
        agent.page_when("all agents have discovered each other", |page| {
            peers.iter().all(|peer| answered(page, peer))
        });
    }
    assert_eq!(sources(&a, "b"), before, "unchanged paths keep their sockets");

    server.program.signal(Signal::SIGKILL);
    server.program.wait();
    let page = a.page_when("discovery fails without the server", |page| page.count(FAILURES, &[]) >= 1);
    assert_eq!(page.count(MEMBERS, &[]), 6, "{page}");
    assert!(answered(&page, "b") && answered(&page, "c"), "{page}");

    server.program = NameServer::serve(&net, "d", &server.dir);
    server.list(&net, &["a", "c"]);
    let page = a.page_when("b is gone", |page| !page.has(OK, &["peer=\"b\""]));
    assert!(answered(&page, "c"), "{page}");
    assert_eq!(page.count("pathmeter_accounting_errors_total", &[]), 0, "{page}");
    for name in ["lost_total", "late_total", "send_errors_total"] {
        assert_eq!(page.count(&format!("pathmeter_echo_{name}"), &[]), 0, "{name}\n{page}");
    }
}

/// A service with addresses of one family: for the other family the search continues to a server that
/// refuses.
pub(crate) fn one_family() {
    let net = NetPlan::mesh(3).build(8);
    let server = NameServer::start(&net, "c");
    for family in [Net::v4, Net::v6] {
        server.list_by(&[family], &net, &["a", "b"]);
        let service = || json!({"kubernetes": {"service": "agents"}, "refresh": "1s"});
        let a = server.agent(&net, "a", service());
        let _b = server.agent(&net, "b", service());
        let page = a.page_when("b is identified", |page| page.has(OK, &["peer=\"b\""]));
        assert_eq!(page.count(MEMBERS, &[]), 2, "{page}");
        // A request may have failed before the server had read its list.
        let last_success =
            |page: &MetricsPage| page.seconds("pathmeter_discovery_last_success_timestamp_seconds", &[]);
        let later =
            a.page_when("the provider polls again", |later| last_success(later) > last_success(&page) + 2.0);
        assert_eq!(later.count(FAILURES, &[]), page.count(FAILURES, &[]), "{later}");
    }
}

/// SRV records provide names and ports.
pub(crate) fn services() {
    let net = NetPlan::mesh(4).build(6);
    let server = NameServer::start(&net, "d");
    server.list(&net, &["a", "b"]);
    let _b = server.agent(&net, "b", json!({"dns": "agents.lab.test"}));
    let a = server.agent(&net, "a", json!({"dns": {"name": "_http._tcp.agents", "type": "srv"}}));
    a.page_when("the service answers", |page| answered(page, "b.lab.test"));
    drop(a);
    let a = server.agent(&net, "a", json!({"dns": {"name": "_none._tcp", "type": "srv"}}));
    let page = a.page_when("the empty service is a failure", |page| page.count(FAILURES, &[]) >= 1);
    assert_eq!(page.count(MEMBERS, &[]), 0, "{page}");
    assert!(!page.has("pathmeter_peer_info", &[]), "{page}");
}

fn sources(agent: &NodeAgent<'_>, peer: &str) -> Vec<Value> {
    eventually("paths show their sources", || {
        let shown: Value = serde_json::from_str(&agent.get("/api/v1/paths").body).unwrap();
        let paths = shown["paths"].as_array().unwrap().iter().filter(|path| path["peer"] == peer);
        let sources: Vec<Value> = paths.map(|path| path["sources"].clone()).collect();
        let are_all =
            sources.len() == 2 && sources.iter().all(|of| of.as_array().is_some_and(|of| !of.is_empty()));
        are_all.then_some(sources)
    })
}

/// `pathmeter probe trace` shows addresses while it measures, and looks up their names after that.
pub(crate) fn names_of_routers() {
    let net = NetPlan::chain(2).build(23);
    net.node("r2").ip(&format!("route add blackhole {}/32\n", net.v4("b")));
    let server = NameServer::start(&net, "a");
    fs::write(&server.hosts, "10.77.0.2 first.lab.test\n").unwrap();
    server.program.signal(Signal::SIGHUP);
    let mut command = resolving(net.node("a"), &server.dir.path().join("resolv.conf"));
    let b = net.v4("b").to_string();
    command.arg(PROGRAM).args(["probe", "trace", &b, "--protocol", "tcp", "--port", "80"]);
    let mut program = Program::start(&mut command, &server.dir.path().join("output"));
    // The target does not answer, so each silent hop takes 0.9 s.
    eventually("the first hop", || program.output().contains(" 10.77.0.2\n").then_some(()));
    let log = server.program.output();
    assert_eq!(program.try_wait(), None, "{}", program.output());
    assert!(!log.contains("query["), "{log}");
    program.wait();
    let output = program.output();
    assert!(output.ends_with("\n\nnames\n  10.77.0.2  first.lab.test\n"), "{output}");
}
