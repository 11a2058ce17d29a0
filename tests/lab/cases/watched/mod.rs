//! A fleet monitored by Prometheus with the shipped rules, alerts and dashboards: what they show for known
//! faults. Hosts `a` and `b` are in zone west, `c` and `d` in zone east; Prometheus and Alertmanager run on
//! `e`. These agents serve HTTPS. An agent on `f` is the peer of bandwidth runs of `b` only, so that their
//! load does not delay the echoes of others. `expected.yaml` has the expected result of each recorded series,
//! dashboard query and alert.

mod expected;
mod prometheus;
pub(crate) mod time_scale;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pathmeter_lab::pki::{Authority, Validity};
use pathmeter_lab::{DEADLINE, Net, NetPlan};
use pathmeter_proto::sim::{Jitter, Link, Loss, Queue};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::expected::{AlertSelector, DashboardQuery, Expected, ExpectedValues, by_name};
use self::prometheus::{Prometheus, Server};
use self::time_scale::scaled;
use crate::agent::NodeAgent;
use crate::testbed::Inconclusive;

const AGENTS: [(&str, &str); 4] = [("a", "west"), ("b", "west"), ("c", "east"), ("d", "east")];

/// Speed of time, relative to a fleet that is scraped every 15 s and sends a datagram a second.
const SPEEDUP: u32 = 15;

/// Delay of a wire in nanoseconds. A round trip crosses four wires, so 4 ms.
const DELAY: u64 = 1_000_000;
/// The mean difference between consecutive datagrams is a third of this, 60 ms.
const SWINGING: Jitter = Jitter::Uniform(180_000_000);

/// Bits per second of the wire of `f`, and the time in which its queue is sent.
const SLOW: u64 = 10_000_000;
const SLOW_QUEUE: Duration = Duration::from_secs(2);

/// The longest window of a recording rule about echoes of a path.
const LONGEST_WINDOW: Duration = Duration::from_secs(16 * 60);

/// The accelerated trial: a few minutes.
pub(crate) fn accelerated() -> Result<(), Inconclusive> {
    watched(SPEEDUP)
}

/// The trial in real time: an hour.
pub(crate) fn real_time() -> Result<(), Inconclusive> {
    watched(1)
}

/// A fleet with faults: every tenth packet that `a` sends is lost; packets that `c` sends have variable
/// delay, and packets to `c` lose their DSCP; `b` gets an invalid configuration; `d` is killed; the wire of
/// `f` becomes slow and has a long queue. From the start, because their alerts wait longest, a router
/// rewrites the TTL of what `b` sends to `c`, and `c` has a budget for one bandwidth run.
fn watched(speedup: u32) -> Result<(), Inconclusive> {
    let expected: Expected = serde_yaml::from_str(include_str!("expected.yaml")).unwrap();
    let net = NetPlan::mesh(6).build(7);
    let folder = TempDir::new().unwrap();
    list(&net, folder.path());
    let calm = link(Loss::Random(0.0), Jitter::None);
    net.wires().for_each(|(_, wire)| wire.set_links(&calm, &calm));
    net.node("core").nft(&format!(
        "add table ip clamp\n\
         add chain ip clamp forward {{ type filter hook forward priority mangle; }}\n\
         add rule ip clamp forward ip saddr {} ip daddr {} udp dport 9862 ip ttl set 64\n",
        net.v4("b"),
        net.v4("c")
    ));
    // A run of some tenths of a second needs many segments to tell the capacity. The wire of `f` is the
    // sixth.
    net.node("f").ip("link set e5 mtu 1500");
    let unmonitored = json!({"agent": {"name": "f", "grace": "1s"}, "key_file": "the lab's"});
    let _f = NodeAgent::spawn(net.node("f"), unmonitored);
    let configured = |name| config(name, &net, folder.path(), speedup);
    let start = |name| NodeAgent::spawn(net.node(name), configured(name));
    let [_a, b, _c, d] = ["a", "b", "c", "d"].map(start);
    let prometheus = Prometheus::start(net.node("e"), folder.path(), speedup);
    let fleet = Fleet { prometheus, expected, queries: queries(speedup), speedup };

    fleet.wait_until("all paths are measured and no alert fires", 10, Fleet::missing_measurements)?;
    let since = Instant::now();
    let mut remarking = calm.clone();
    remarking.rewrite.dscp = Some(0);
    net.wire("a", "core").set_links(&link(Loss::Every(10), Jitter::None), &calm);
    net.wire("c", "core").set_links(&link(Loss::Random(0.0), SWINGING), &remarking);
    let mut slow = calm.clone();
    slow.queue = Some(Queue { rate: SLOW, burst: 0, room: SLOW / 8 * SLOW_QUEUE.as_secs() });
    net.wire("f", "core").set_links(&slow, &slow);
    b.configure(json!("no configuration"));
    d.signal(Signal::SIGKILL);
    fleet.wait_until("every expected alert fires", 30, |fleet| {
        let missing = fleet.missing_alerts()?;
        let is_young = since.elapsed() < LONGEST_WINDOW / speedup;
        Ok(missing.into_iter().chain(is_young.then(|| "the longest window".to_owned())).collect())
    })?;
    // A pause of the machine for a second shows in recorded series until their window has passed.
    fleet.wait_until("all results are as expected", 15, |fleet| Ok(fleet.problems()))?;

    net.wires().for_each(|(_, wire)| wire.set_links(&calm, &calm));
    // Rewritten TTLs are looked for again after a day, and a budget is for a day: these alerts end with the
    // probes.
    let mut echoes_only = configured("b");
    echoes_only["probes"].as_array_mut().unwrap().retain(|probe| probe["kind"].is_null());
    b.configure(echoes_only);
    let d = start("d");
    let events = &fleet.expected.events;
    fleet.wait_until("the repair is shown", 5, |fleet| Ok(fleet.answers(&events.repaired)))?;
    fleet.wait_until("no alert fires", 60, Fleet::firing_alerts)?;
    d.signal(Signal::SIGTERM);
    fleet.wait_until("the goodbye is shown", 5, |fleet| {
        let mut missing = fleet.answers(&events.leaving);
        missing.extend(fleet.not_firing(&events.goodbye)?);
        Ok(missing)
    })
}

fn link(loss: Loss, jitter: Jitter) -> Link {
    let mut link = Link::perfect(DELAY);
    (link.loss, link.jitter) = (loss, jitter);
    link
}

/// Writes the list of agents, for Prometheus and for the agents, and the files for HTTPS.
fn list(net: &Net, folder: &Path) {
    let host = |(name, zone): (&str, &str)| json!({"targets": [format!("{}:9862", net.v4(name))], "labels": {"instance": name, "zone": zone}});
    let hosts = AGENTS.map(host);
    fs::write(folder.join("targets.yaml"), Value::from(hosts.to_vec()).to_string()).unwrap();
    let ca = Authority::new("lab");
    ca.write(folder, "ca");
    for (name, _) in AGENTS {
        let (certificate, key) =
            ca.issue(&[&net.v4(name).to_string()], Validity::Current).write(folder, name);
        let web = json!({"tls_server_config": {"cert_file": certificate, "key_file": key}});
        fs::write(folder.join(format!("{name}.web.yml")), web.to_string()).unwrap();
    }
}

fn config(name: &str, net: &Net, folder: &Path, speedup: u32) -> Value {
    let zone = AGENTS.iter().find(|(other, _)| *other == name).unwrap().1;
    let shorter = |milliseconds: u32| format!("{}ms", milliseconds / speedup);
    let after = |seconds: u32| shorter(seconds * 1_000);
    let ca = folder.join("ca.pem");
    let stream = |name: &str, protocol: &str| {
        json!({
            "name": name, "protocol": protocol, "interval": after(3), "connect_interval": after(30),
            "late_after": "1s", "lost_after": after(30),
        })
    };
    let mut config = json!({
        "agent": {"name": name, "grace": "1s", "labels": {"zone": zone}},
        "key_file": "the lab's",
        // Paths with short intervals need not wait for each other: no two use the same slow wire.
        "bandwidth": {"runs_max": 4},
        "tls": {"web_config_file": folder.join(format!("{name}.web.yml")), "ca_file": ca},
        "peers": [{"files": [folder.join("targets.yaml")], "scheme": "https", "refresh": "1s"}],
        "probes": [
            {
                "name": "fast", "interval": shorter(900), "flows": 2, "dscp": "ef", "late_after": "500ms", "lost_after": "1s",
                "path_mtu": {"interval": after(60)},
            },
            {"name": "routes", "kind": "trace", "follows": "fast", "interval": after(30), "hop_metrics": true},
            stream("chat", "tcp"),
            stream("live", "websocket"),
            stream("web", "http"),
        ],
    });
    let run = |name: &str, peer: &str, bytes: &str| {
        let interval = after(150);
        json!({"name": name, "kind": "bandwidth", "interval": interval, "peers": [peer], "bytes": bytes})
    };
    match name {
        "a" => {
            let mut limited = run("capacity", "b", "100kB");
            limited["rate"] = "2Mbit/s".into();
            // A tenth of its echoes is lost.
            limited["added_delay_max"] = "off".into();
            add(&mut config["probes"], [limited]);
        }
        "b" => {
            add(&mut config["peers"], [json!({"name": "f", "address": net.v4("f")})]);
            let is_echo = |probe: &&mut Value| probe["kind"].is_null();
            for probe in config["probes"].as_array_mut().unwrap().iter_mut().filter(is_echo) {
                probe["peers"] = json!(["a", "c", "d"]);
            }
            add(&mut config["probes"], [run("slow", "f", "1MB"), run("spent", "c", "100kB")]);
        }
        "c" => {
            config["metrics"] = json!({"level": "group", "worst": 5});
            config["bandwidth"] = json!({"bytes_per_day": "100kB"});
        }
        _ => {}
    }
    config
}

/// Appends to a list of the configuration.
fn add<const N: usize>(list: &mut Value, new: [Value; N]) {
    list.as_array_mut().unwrap().extend(new);
}

/// Prometheus, its queries and the expected results.
struct Fleet<'a> {
    prometheus: Prometheus<'a>,
    expected: Expected,
    queries: BTreeMap<String, String>,
    speedup: u32,
}

impl Fleet<'_> {
    /// Waits until `missing` returns nothing, for `minutes` in the time of the rules.
    fn wait_until(
        &self,
        what: &str,
        minutes: u32,
        missing: impl Fn(&Self) -> Result<Vec<String>, String>,
    ) -> Result<(), Inconclusive> {
        let timeout = Duration::from_secs(60) * minutes / self.speedup + DEADLINE;
        let start = Instant::now();
        loop {
            let missing_now = missing(self).unwrap_or_else(|error| vec![error]);
            if missing_now.is_empty() {
                return Ok(());
            }
            if start.elapsed() > timeout {
                self.check_reliable()?;
                panic!(
                    "timed out waiting for: {what}: {}\n{}",
                    missing_now.join("\n"),
                    self.prometheus.log()
                );
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// Returns an error if an agent did not get enough processor time: it reports that, and its other alerts
    /// are inhibited.
    fn check_reliable(&self) -> Result<(), Inconclusive> {
        match self.firing().unwrap().contains("PathmeterMeasurementUnreliable") {
            true => Err(Inconclusive("an agent reported that it did not run on time".to_owned())),
            false => Ok(()),
        }
    }

    fn number(&self, query: &str) -> Result<f64, String> {
        Ok(self.prometheus.query(Server::First, query)?.first().map_or(0.0, |sample| sample.value))
    }

    /// What is missing until all agents have measured all others over a whole window.
    fn missing_measurements(&self) -> Result<Vec<String>, String> {
        let mut missing = self.firing()?.into_iter().collect::<Vec<_>>();
        for (query, least) in [
            ("count(up == 1)", 4.0),
            // Three agents with four probes of three peers each, and one that exports groups.
            ("count(pathmeter_pair:echo_network_verdicts:rate5m{instance!=\"c\"} > 0)", 36.0),
            ("count(pathmeter_zone_pair:echo_network_verdicts:rate5m > 0)", 16.0),
            ("count(pathmeter_zone_pair:echo_rtt_seconds:p99_5m{probe=\"fast\"})", 4.0),
            ("count(pathmeter_path_mtu_bytes{instance!=\"c\"} == 9000)", 9.0),
            ("count(pathmeter_trace_reached == 1)", 24.0),
        ] {
            let found = self.number(query)?;
            if found < least {
                missing.push(format!("{query} is {found}, waiting for {least}"));
            }
        }
        Ok(missing)
    }

    /// The names of firing alerts.
    fn firing(&self) -> Result<BTreeSet<String>, String> {
        let alerts = self.prometheus.query(Server::First, "ALERTS{alertstate=\"firing\"}")?;
        Ok(alerts.into_iter().map(|alert| alert.labels["alertname"].clone()).collect())
    }

    fn firing_alerts(&self) -> Result<Vec<String>, String> {
        Ok(self.firing()?.into_iter().collect())
    }

    /// Describes alerts that should fire, be notified or be inhibited, and are not.
    fn missing_alerts(&self) -> Result<Vec<String>, String> {
        let notified = self.prometheus.notified()?;
        let alerts = &self.expected.alerts;
        let expected = alerts.notified.iter().map(|alert| (alert, false));
        let mut lacking = Vec::new();
        for (alert, is_inhibited) in expected.chain(alerts.inhibited.iter().map(|alert| (alert, true))) {
            lacking.extend(self.not_firing(alert)?);
            let alert: AlertSelector = alert.parse()?;
            let mut found = notified.iter().filter(|found| alert.selects(&found.labels)).peekable();
            if found.peek().is_none() {
                lacking.push(format!("the Alertmanager does not have {alert}"));
            } else if found.any(|found| found.is_inhibited != is_inhibited) {
                lacking.push(format!(
                    "the Alertmanager should {} {alert}",
                    if is_inhibited { "inhibit" } else { "notify" }
                ));
            }
        }
        Ok(lacking)
    }

    /// Describes an alert that does not fire.
    fn not_firing(&self, alert: &str) -> Result<Option<String>, String> {
        let alert: AlertSelector = alert.parse()?;
        let fires = !self.prometheus.query(Server::First, &alert.firing())?.is_empty();
        Ok((!fires).then(|| format!("{alert} does not fire")))
    }

    /// Describes everything that differs from the expected results.
    fn problems(&self) -> Vec<String> {
        [self.unexpected_alerts(), self.recorded(), self.dashboards(), self.downstream()].concat()
    }

    /// Describes unexpected alerts and rules that fail.
    fn unexpected_alerts(&self) -> Vec<String> {
        let alerts = &self.expected.alerts;
        let selectors = alerts.notified.iter().chain(&alerts.inhibited);
        let names = selectors.map(|alert| alert.split('{').next().unwrap_or_default());
        let expected: BTreeSet<&str> = names.chain(alerts.possible.iter().map(String::as_str)).collect();
        let firing = self.firing().unwrap();
        let firing = firing.into_iter().filter(|name| !expected.contains(name.as_str()));
        firing.map(|name| format!("{name} fires")).chain(self.prometheus.broken().unwrap()).collect()
    }

    /// Describes recorded series that differ.
    fn recorded(&self) -> Vec<String> {
        let queries = &self.expected.recorded;
        let is_queried = |name: &String| queries.keys().any(|query| query.split('{').next() == Some(name));
        let unexpected = self.prometheus.recorded().unwrap().into_iter().filter(|name| !is_queried(name));
        let mut problems: Vec<String> =
            unexpected.map(|name| format!("{name}: has no expected result")).collect();
        problems.extend(self.differences(Server::First, queries));
        problems
    }

    /// Describes query results that differ.
    fn differences(&self, server: Server, queries: &BTreeMap<String, ExpectedValues>) -> Vec<String> {
        let difference = |(query, values): (&String, &ExpectedValues)| {
            let answer = self.prometheus.query(server, query).unwrap();
            let tell = || format!("{server:?}: {query}: expected {values:?}, found {:?}", by_name(&answer));
            (!values.matches(&answer, self.speedup)).then(tell)
        };
        queries.iter().filter_map(difference).collect()
    }

    /// Describes results on downstream servers that differ.
    fn downstream(&self) -> Vec<String> {
        let servers = self.expected.downstream.iter();
        servers.flat_map(|(server, queries)| self.differences(*server, queries)).collect()
    }

    /// Describes dashboard queries that differ or have no expected result.
    fn dashboards(&self) -> Vec<String> {
        let expected = self.expected.dashboards();
        let mut problems = self.answers(&expected);
        let unexpected = self.queries.keys().filter(|name| !expected.contains_key(*name));
        problems.extend(unexpected.map(|name| format!("{name}: has no expected result")));
        problems
    }

    /// Describes dashboard queries whose result differs.
    fn answers(&self, expected: &BTreeMap<String, ExpectedValues>) -> Vec<String> {
        let difference = |(name, values): (&String, &ExpectedValues)| {
            let Some(query) = self.queries.get(name) else {
                return Some(format!("{name} is not a dashboard query"));
            };
            match self.prometheus.query(Server::First, query) {
                Err(error) => Some(format!("{name}: {error}")),
                Ok(answer) if values.matches(&answer, self.speedup) => None,
                Ok(answer) => Some(format!("{name}: expected {values:?}, found {:?}", by_name(&answer))),
            }
        };
        expected.iter().filter_map(difference).collect()
    }
}

/// All dashboard queries for the pair of `a` and `b`, by dashboard, panel and letter.
fn queries(speedup: u32) -> BTreeMap<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-dashboards.py");
    let mut command = Command::new("python3");
    command.arg(script).args(["--list", "--set", "instance=a", "--set", "peer=b"]);
    let listed = command.args(["--set", "__rate_interval=5m"]).output().unwrap();
    let queries: Vec<DashboardQuery> = serde_json::from_slice(&listed.stdout).unwrap();
    queries.into_iter().map(|query| (query.to_string(), scaled(&query.expr, speedup))).collect()
}
