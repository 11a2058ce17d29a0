//! Debian's Prometheus and Alertmanager, with the configuration and the rules that we ship.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use pathmeter_lab::{Namespace, Program, get};
use serde_json::Value;

use super::haste::hastened;

/// Both on one node, where each finds the other as configured.
pub(super) struct Prometheus<'a> {
    node: &'a Namespace,
    prometheus: Program,
    alertmanager: Program,
}

/// A series of an answer, without its name.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

impl<'a> Prometheus<'a> {
    /// Starts both. `folder` has the list of agents, and `ca.pem` of whoever signed their certificates.
    pub(super) fn start(node: &'a Namespace, folder: &Path, times: u32) -> Self {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/prometheus");
        let read = |path: &Path| {
            let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            hastened(&text, times)
        };
        let rules = folder.join("rules");
        fs::create_dir(&rules).unwrap();
        for entry in fs::read_dir(shipped.join("rules")).unwrap() {
            let path = entry.unwrap().path();
            if path.to_string_lossy().ends_with(".rules.yaml") {
                fs::write(rules.join(path.file_name().unwrap()), read(&path)).unwrap();
            }
        }
        let mut config: serde_yaml::Value =
            serde_yaml::from_str(&read(&shipped.join("prometheus.yml"))).unwrap();
        let scrape = &mut config["scrape_configs"][0];
        scrape["scheme"] = "https".into();
        scrape["tls_config"] = serde_yaml::from_str("{ca_file: ca.pem}").unwrap();
        let file = folder.join("prometheus.yml");
        fs::write(&file, serde_yaml::to_string(&config).unwrap()).unwrap();
        let mut command = node.command("prometheus");
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("series").display()))
            .args(["--web.listen-address=127.0.0.1:9090", "--log.level=warn"]);
        let prometheus = Program::start(&mut command, &folder.join("prometheus.log"));
        let file = folder.join("alertmanager.yml");
        fs::write(&file, read(&shipped.join("alertmanager.yml"))).unwrap();
        let mut command = node.command("prometheus-alertmanager");
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.path={}", folder.join("silences").display()))
            .args(["--web.listen-address=127.0.0.1:9093", "--cluster.listen-address=", "--log.level=warn"]);
        let alertmanager = Program::start(&mut command, &folder.join("alertmanager.log"));
        Self { node, prometheus, alertmanager }
    }

    /// What a query comes to; `Err` with the reason if it is none.
    pub(super) fn ask(&self, query: &str) -> Result<Vec<Sample>, String> {
        let path = format!("/api/v1/query?query={}", encoded(query));
        let answer = self.get(9_090, &path)?;
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

    /// Names of all recording rules that are loaded.
    pub(super) fn recorded(&self) -> Result<Vec<String>, String> {
        let answer = self.get(9_090, "/api/v1/rules?type=record")?;
        let groups = answer["data"]["groups"].as_array().ok_or("no groups")?;
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        Ok(rules.map(|rule| rule["name"].as_str().unwrap().to_owned()).collect())
    }

    /// Rules that could not be evaluated, with the reason.
    pub(super) fn broken(&self) -> Result<Vec<String>, String> {
        let answer = self.get(9_090, "/api/v1/rules")?;
        let groups = answer["data"]["groups"].as_array().ok_or("no groups")?;
        let rules = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
        let broken = rules.filter(|rule| rule["health"] == "err");
        Ok(broken.map(|rule| format!("{}: {}", rule["name"], rule["lastError"])).collect())
    }

    /// The alerts that the Alertmanager has, by whether it would tell somebody: labels, and `true` if it is inhibited.
    pub(super) fn notified(&self) -> Result<Vec<(BTreeMap<String, String>, bool)>, String> {
        let answer = self.get(9_093, "/api/v2/alerts")?;
        let alerts = answer.as_array().ok_or("no list")?.iter();
        let alert = |alert: &Value| {
            let labels = serde_json::from_value(alert["labels"].clone()).unwrap();
            (labels, alert["status"]["state"] == "suppressed")
        };
        Ok(alerts.map(alert).collect())
    }

    fn get(&self, port: u16, path: &str) -> Result<Value, String> {
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let answer = self.node.within(|| get(to, path)).map_err(|error| error.to_string())?;
        serde_json::from_str(&answer.body).map_err(|error| format!("{error}: {}", answer.body))
    }

    /// Everything that both printed.
    pub(super) fn log(&self) -> String {
        format!("{}{}", self.prometheus.output(), self.alertmanager.output())
    }
}

/// As a part of a URL.
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
