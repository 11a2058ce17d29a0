//! The pathmeter agent, and `pathmeter probe echo`.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use pathmeter_lab::exchange::ExchangeProtocol;
use pathmeter_lab::{MetricsPage, Namespace, Program, eventually, get};
use serde_json::Value;

use super::{
    ExportedHistogram, MeasuringTool, ProbeRun, ReportedRtt, RequestRef, ToolReport, version_of, wait_for,
};
use crate::host_pair::HostPair;

pub(crate) const PROGRAM: &str = "pathmeter";
pub(crate) const PORT: u16 = 9_862;
/// Port of echo over TCP.
pub(crate) const AGENT_PORT: u16 = 9_863;
const HTTP_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_862);

/// The binary: `$PATHMETER`, or the one built for this benchmark.
pub(crate) fn program() -> String {
    std::env::var("PATHMETER").unwrap_or_else(|_| env!("CARGO_BIN_EXE_pathmeter").to_owned())
}

pub(crate) fn version() -> Option<String> {
    version_of(&program())
}

/// The role of an agent.
pub(crate) enum AgentRole<'a> {
    Responder,
    Prober(ProbeRun),
    /// Probes each of these once a second.
    ProberOfAll(&'a [IpAddr]),
    /// Configured with these further keys.
    Configured(&'a str),
}

/// Starts an agent and waits until it is ready.
pub(crate) fn launch(pair: &mut HostPair, duty: &AgentRole<'_>) -> io::Result<Program> {
    let text = config(pair, duty);
    let is_asking = !matches!(duty, AgentRole::Responder);
    let name = if is_asking { "a.yaml" } else { "b.yaml" };
    let file = pair.write(name, &text)?.display().to_string();
    let arguments = ["run", "--config", &file];
    let program = if is_asking {
        pair.start_prober(&program(), &arguments)
    } else {
        pair.start_responder(&program(), &arguments)
    };
    wait_until_ready(if is_asking { pair.prober_host() } else { pair.responder_host() });
    Ok(program)
}

/// Waits until the agent on a host is ready.
pub(crate) fn wait_until_ready(host: &Namespace) {
    eventually("an agent is ready", || {
        let answer = host.within(|| get(HTTP_ADDRESS, "/-/ready")).ok();
        answer.filter(|answer| answer.status == 200)
    });
}

fn config(pair: &HostPair, duty: &AgentRole<'_>) -> String {
    let mut text = "log: {level: warn}\nresponder: {allow: [10.77.0.0/24]}\n".to_owned();
    match duty {
        AgentRole::Responder => text += "agent: {name: b}\n",
        AgentRole::Prober(run) => {
            let _ = write!(
                text,
                "agent: {{name: a}}\nprobes: [{{name: echo, interval: {}ms, targets: all, peers: []}}]\n\
                 targets: [{{name: b, address: {}, port: {PORT}}}]\n",
                run.interval.as_millis(),
                pair.target()
            );
        }
        AgentRole::Configured(keys) => {
            text += "agent: {name: a}\n";
            text += keys;
        }
        AgentRole::ProberOfAll(targets) => {
            text +=
                "agent: {name: a}\nprobes: [{name: echo, interval: 1s, targets: all, peers: []}]\ntargets:\n";
            for target in *targets {
                let name = target.to_string().replace('.', "-");
                let _ = writeln!(text, "  - {{name: t-{name}, address: {target}, port: {PORT}}}");
            }
        }
    }
    text
}

pub(crate) fn scrape(pair: &HostPair) -> io::Result<MetricsPage> {
    Ok(MetricsPage::parse(&pair.prober_host().within(|| get(HTTP_ADDRESS, "/metrics"))?.body))
}

struct AgentTool {
    _prober: Program,
    _responder: Program,
}

pub(crate) fn agent(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    let responder = launch(pair, &AgentRole::Responder)?;
    let prober = launch(pair, &AgentRole::Prober(run))?;
    Ok(Box::new(AgentTool { _prober: prober, _responder: responder }))
}

impl MeasuringTool for AgentTool {
    fn name(&self) -> &'static str {
        "**pathmeter**"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Stamp(PORT)
    }

    fn finish(self: Box<Self>, pair: &HostPair) -> io::Result<ToolReport> {
        pair.stop_prober_host();
        let mut last = None;
        let page = eventually("all is decided", || {
            std::thread::sleep(Duration::from_millis(50));
            let page = scrape(pair).ok()?;
            let sent = page.count("pathmeter_echo_sent_total", &[]);
            let is_stopped =
                page.count("pathmeter_echo_in_flight", &[]) == 0 && last.replace(sent) == Some(sent);
            is_stopped.then_some(page)
        });
        let lost = |labels: &[&str]| page.count("pathmeter_echo_lost_total", labels);
        let signed = |count: u64| i64::try_from(count).map_err(io::Error::other);
        let directions =
            [signed(lost(&["direction=\"forward\""]))?, signed(lost(&["direction=\"reverse\""]))?];
        Ok(ToolReport {
            lost: lost(&[]),
            directions: Some(directions),
            duplicates: Some(page.count("pathmeter_echo_duplicates_total", &[])),
            reordered: Some(page.count("pathmeter_echo_reordered_total", &[])),
            page: Some(ExportedHistogram {
                text: page.text().to_owned(),
                name: "pathmeter_echo_rtt_seconds",
            }),
            ..ToolReport::default()
        })
    }
}

struct ProbeTool {
    prober: Program,
    _responder: Program,
}

pub(crate) fn once(pair: &mut HostPair, run: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    let responder = launch(pair, &AgentRole::Responder)?;
    let (target, port, count) = (pair.target().to_string(), PORT.to_string(), run.count().to_string());
    let interval = format!("{}ms", run.interval.as_millis());
    let prober = pair.start_prober(
        &program(),
        &["probe", "echo", &target, "--port", &port, "-c", &count, "-i", &interval, "--json", "--json-each"],
    );
    Ok(Box::new(ProbeTool { prober, _responder: responder }))
}

impl MeasuringTool for ProbeTool {
    fn name(&self) -> &'static str {
        "**pathmeter**"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Stamp(PORT)
    }

    fn finish(mut self: Box<Self>, _: &HostPair) -> io::Result<ToolReport> {
        wait_for(&mut self.prober)?;
        let mut report = ToolReport::default();
        for line in self.prober.output().lines().filter(|line| line.starts_with("{\"flow\"")) {
            let line: Value = serde_json::from_str(line)?;
            let sequence = line["sequence"].as_u64().and_then(|sequence| u32::try_from(sequence).ok());
            match sequence.zip(line["rtt_seconds"].as_f64()) {
                Some((sequence, seconds)) => {
                    report
                        .round_trips
                        .push(ReportedRtt { of: RequestRef::Sequence(sequence), nanos: seconds * 1e9 });
                }
                None => report.lost += 1,
            }
        }
        Ok(report)
    }
}
