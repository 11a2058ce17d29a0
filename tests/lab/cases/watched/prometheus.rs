//! Debian's Prometheus and Alertmanager with the shipped configuration and rules.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use pathmeter_lab::{Namespace, Program, get};
use serde::Deserialize;
use serde_json::Value;

use super::time_scale::scaled;

/// All servers on one node, where their configured addresses reach each other.
pub(super) struct Prometheus<'a> {
    node: &'a Namespace,
    programs: Vec<Program>,
}

/// A Prometheus server, by its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Server {
    /// Scrapes the agents.
    First = 9_090,
    /// Receives the remote write meant for Mimir.
    Mimir = 9_091,
    /// Receives the remote write meant for Thanos or VictoriaMetrics.
    Thanos = 9_092,
    /// Federates from the first server.
    Federation = 9_094,
}

const ALERTMANAGER: u16 = 9_093;

/// A series of a query result, without its metric name.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

/// An alert in the Alertmanager.
#[derive(Debug)]
pub(super) struct Notified {
    pub(super) labels: BTreeMap<String, String>,
    /// Whether another alert inhibits it.
    pub(super) is_inhibited: bool,
}

impl<'a> Prometheus<'a> {
    /// Starts all servers. `folder` contains the list of agents, and `ca.pem` for their certificates.
    pub(super) fn start(node: &'a Namespace, folder: &Path, speedup: u32) -> Self {
        let rules = folder.join("rules");
        fs::create_dir(&rules).unwrap();
        for entry in fs::read_dir(Path::new(SHIPPED_FOLDER).join("rules")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".rules.yaml") {
                fs::write(rules.join(&name), shipped(&format!("rules/{name}"), speedup)).unwrap();
            }
        }
        let read = |name| serde_yaml::from_str::<serde_yaml::Value>(&shipped(name, speedup)).unwrap();
        let mut first = read("prometheus.yml");
        let scrape = &mut first["scrape_configs"][0];
        scrape["scheme"] = "https".into();
        scrape["tls_config"] = serde_yaml::from_str("{ca_file: ca.pem}").unwrap();
        let mut sent = read("remote_write.example.yaml");
        let receivers = [Server::Mimir, Server::Thanos];
        for (index, receiver) in receivers.into_iter().enumerate() {
            let url = format!("http://127.0.0.1:{}/api/v1/write", receiver as u16);
            sent["remote_write"][index]["url"] = url.into();
        }
        let sent = sent["remote_write"].as_sequence().unwrap();
        first["remote_write"] = sent[..receivers.len()].to_vec().into();
        let mut above = read("federation.example.yaml");
        above["global"] = first["global"].clone();
        above["rule_files"] = vec!["rules/echo_peers.rules.yaml"].into();
        let targets = &mut above["scrape_configs"][0]["static_configs"][0]["targets"];
        *targets = vec![format!("127.0.0.1:{}", Server::First as u16)].into();
        let nothing = serde_yaml::Value::Mapping(serde_yaml::Mapping::new());

        let serve = |server, config: &serde_yaml::Value| {
            let name = format!("{server:?}");
            let file = folder.join(format!("{name}.yml"));
            fs::write(&file, serde_yaml::to_string(config).unwrap()).unwrap();
            let mut command = node.command("prometheus");
            command
                .arg(format!("--config.file={}", file.display()))
                .arg(format!("--storage.tsdb.path={}", folder.join(&name).display()))
                .arg(format!("--web.listen-address=127.0.0.1:{}", server as u16))
                .args(["--web.enable-remote-write-receiver", "--log.level=warn"]);
            Program::start(&mut command, &folder.join(format!("{name}.log")))
        };
        let programs = vec![
            serve(Server::Mimir, &nothing),
            serve(Server::Thanos, &nothing),
            serve(Server::First, &first),
            serve(Server::Federation, &above),
            alertmanager(node, folder, speedup),
        ];
        Self { node, programs }
    }

    /// The result of a query; `Err` with the reason if it fails.
    pub(super) fn query(&self, server: Server, query: &str) -> Result<Vec<Sample>, String> {
        let path = format!("/api/v1/query?query={}", encoded(query));
        let answer = self.get(server as u16, &path)?;
        if answer["status"] != "success" {
            return Err(format!("{query}: {}", answer["error"]));
        }
        let result = &answer["data"]["result"];
        let number = |value: &Value| value[1].as_str().unwrap().parse().unwrap();
        if answer["data"]["resultType"] == "scalar" {
            return Ok(vec![Sample { labels: BTreeMap::new(), value: number(result) }]);
        }
        let sample = |series: &Value| {
            let labels = series["metric"].as_object().unwrap().iter();
            let labels = labels.map(|(name, text)| (name.clone(), text.as_str().unwrap().to_owned()));
            let labels = labels.filter(|(name, _)| name != "__name__").collect();
            Sample { labels, value: number(&series["value"]) }
        };
        Ok(result.as_array().unwrap().iter().map(sample).collect())
    }

    /// The names of all loaded recording rules.
    pub(super) fn recorded(&self) -> Result<Vec<String>, String> {
        let answer = self.get(Server::First as u16, "/api/v1/rules?type=record")?;
        let groups = answer["data"]["groups"].as_array().ok_or("no groups")?;
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        Ok(rules.map(|rule| rule["name"].as_str().unwrap().to_owned()).collect())
    }

    /// Rules whose evaluation failed, with the reason.
    pub(super) fn broken(&self) -> Result<Vec<String>, String> {
        let answer = self.get(Server::First as u16, "/api/v1/rules")?;
        let groups = answer["data"]["groups"].as_array().ok_or("no groups")?;
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        let broken = rules.filter(|rule| rule["health"] == "err");
        Ok(broken.map(|rule| format!("{}: {}", rule["name"], rule["lastError"])).collect())
    }

    /// All alerts in the Alertmanager.
    pub(super) fn notified(&self) -> Result<Vec<Notified>, String> {
        let answer = self.get(ALERTMANAGER, "/api/v2/alerts")?;
        let alerts = answer.as_array().ok_or("no list")?.iter();
        let alert = |alert: &Value| {
            let labels = serde_json::from_value(alert["labels"].clone()).unwrap();
            Notified { labels, is_inhibited: alert["status"]["state"] == "suppressed" }
        };
        Ok(alerts.map(alert).collect())
    }

    fn get(&self, port: u16, path: &str) -> Result<Value, String> {
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let answer = self.node.within(|| get(to, path)).map_err(|error| error.to_string())?;
        serde_json::from_str(&answer.body).map_err(|error| format!("{error}: {}", answer.body))
    }

    /// The output of all servers.
    pub(super) fn log(&self) -> String {
        self.programs.iter().map(Program::output).collect()
    }
}

const SHIPPED_FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/prometheus");

/// Reads a shipped file and scales its durations.
fn shipped(name: &str, speedup: u32) -> String {
    let text = fs::read_to_string(Path::new(SHIPPED_FOLDER).join(name));
    scaled(&text.unwrap_or_else(|error| panic!("{name}: {error}")), speedup)
}

fn alertmanager(node: &Namespace, folder: &Path, speedup: u32) -> Program {
    let file = folder.join("alertmanager.yml");
    fs::write(&file, shipped("alertmanager.yml", speedup)).unwrap();
    let mut command = node.command("prometheus-alertmanager");
    command
        .arg(format!("--config.file={}", file.display()))
        .arg(format!("--storage.path={}", folder.join("silences").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{ALERTMANAGER}"))
        .args(["--cluster.listen-address=", "--log.level=warn"]);
    Program::start(&mut command, &folder.join("alertmanager.log"))
}

/// Percent-encodes a query.
fn encoded(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            out.push(byte.into());
        } else {
            write!(out, "%{byte:02X}").unwrap();
        }
    }
    out
}
