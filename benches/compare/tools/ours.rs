//! Our agent, and `pathmeter probe echo`.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use pathmeter_lab::exchange::Protocol;
use pathmeter_lab::{Page, Program, eventually, get};
use serde_json::Value;

use super::{Asker, Exported, Run, Said, Timed, Which, asked, wait_for};
use crate::lane::Lane;

pub(crate) const PROGRAM: &str = "pathmeter";
pub(crate) const PORT: u16 = 9_862;
/// Where echo over TCP is answered.
pub(crate) const AGENT_PORT: u16 = 9_863;
const FRONT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_862);

/// The binary that was built for this benchmark, or the one that `$PATHMETER` names.
fn program() -> String {
    std::env::var("PATHMETER").unwrap_or_else(|_| env!("CARGO_BIN_EXE_pathmeter").to_owned())
}

pub(crate) fn version() -> Option<String> {
    asked(&program())
}

/// What is asked of an agent.
pub(crate) enum Duty<'a> {
    Answer,
    Ask(Run),
    /// Each of them once a second.
    AskAll(&'a [IpAddr]),
    /// What these keys of a configuration say.
    Written(&'a str),
}

/// Starts an agent and waits until it is ready.
pub(crate) fn launch(lane: &mut Lane, duty: &Duty<'_>) -> io::Result<Program> {
    let text = config(lane, duty);
    let is_asking = !matches!(duty, Duty::Answer);
    let name = if is_asking { "a.yaml" } else { "b.yaml" };
    let file = lane.write(name, &text)?.display().to_string();
    let arguments = ["run", "--config", &file];
    let program =
        if is_asking { lane.ask(&program(), &arguments) } else { lane.answer(&program(), &arguments) };
    let node = if is_asking { lane.here() } else { lane.there() };
    eventually("an agent is ready", || {
        let answer = node.within(|| get(FRONT, "/-/ready")).ok();
        answer.filter(|answer| answer.status == 200)
    });
    Ok(program)
}

fn config(lane: &Lane, duty: &Duty<'_>) -> String {
    let mut text = "log: {level: warn}\nresponder: {allow: [10.77.0.0/24]}\n".to_owned();
    match duty {
        Duty::Answer => text += "agent: {name: b}\n",
        Duty::Ask(run) => {
            let _ = write!(
                text,
                "agent: {{name: a}}\nprobes: [{{name: echo, interval: {}ms, targets: all, peers: []}}]\n\
                 targets: [{{name: b, address: {}, port: {PORT}}}]\n",
                run.interval.as_millis(),
                lane.target()
            );
        }
        Duty::Written(keys) => {
            text += "agent: {name: a}\n";
            text += keys;
        }
        Duty::AskAll(targets) => {
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

pub(crate) fn scrape(lane: &Lane) -> io::Result<Page> {
    Ok(Page::parse(&lane.here().within(|| get(FRONT, "/metrics"))?.body))
}

struct Agent {
    _asking: Program,
    _answering: Program,
}

pub(crate) fn agent(lane: &mut Lane, run: Run) -> io::Result<Box<dyn Asker>> {
    let answering = launch(lane, &Duty::Answer)?;
    let asking = launch(lane, &Duty::Ask(run))?;
    Ok(Box::new(Agent { _asking: asking, _answering: answering }))
}

impl Asker for Agent {
    fn name(&self) -> &'static str {
        "**pathmeter**"
    }

    fn protocol(&self) -> Protocol {
        Protocol::Stamp(PORT)
    }

    fn finish(self: Box<Self>, lane: &Lane) -> io::Result<Said> {
        lane.sever();
        let mut last = None;
        let page = eventually("all is decided", || {
            std::thread::sleep(Duration::from_millis(50));
            let page = scrape(lane).ok()?;
            let sent = page.count("pathmeter_echo_sent_total", &[]);
            let is_over =
                page.count("pathmeter_echo_in_flight", &[]) == 0 && last.replace(sent) == Some(sent);
            is_over.then_some(page)
        });
        let lost = |labels: &[&str]| page.count("pathmeter_echo_lost_total", labels);
        let signed = |count: u64| i64::try_from(count).map_err(io::Error::other);
        let directions =
            [signed(lost(&["direction=\"forward\""]))?, signed(lost(&["direction=\"reverse\""]))?];
        Ok(Said {
            lost: lost(&[]),
            directions: Some(directions),
            duplicates: Some(page.count("pathmeter_echo_duplicates_total", &[])),
            reordered: Some(page.count("pathmeter_echo_reordered_total", &[])),
            page: Some(Exported { text: page.text().to_owned(), name: "pathmeter_echo_rtt_seconds" }),
            ..Said::default()
        })
    }
}

struct Once {
    prober: Program,
    _answering: Program,
}

pub(crate) fn once(lane: &mut Lane, run: Run) -> io::Result<Box<dyn Asker>> {
    let answering = launch(lane, &Duty::Answer)?;
    let (target, port, count) = (lane.target().to_string(), PORT.to_string(), run.count().to_string());
    let interval = format!("{}ms", run.interval.as_millis());
    let prober = lane.ask(
        &program(),
        &["probe", "echo", &target, "--port", &port, "-c", &count, "-i", &interval, "--json", "--json-each"],
    );
    Ok(Box::new(Once { prober, _answering: answering }))
}

impl Asker for Once {
    fn name(&self) -> &'static str {
        "**pathmeter**"
    }

    fn protocol(&self) -> Protocol {
        Protocol::Stamp(PORT)
    }

    fn finish(mut self: Box<Self>, _: &Lane) -> io::Result<Said> {
        wait_for(&mut self.prober)?;
        let mut said = Said::default();
        for line in self.prober.output().lines().filter(|line| line.starts_with("{\"flow\"")) {
            let line: Value = serde_json::from_str(line)?;
            let sequence = line["sequence"].as_u64().and_then(|sequence| u32::try_from(sequence).ok());
            match sequence.zip(line["rtt_seconds"].as_f64()) {
                Some((sequence, seconds)) => {
                    said.round_trips.push(Timed { of: Which::Sequence(sequence), nanos: seconds * 1e9 });
                }
                None => said.lost += 1,
            }
        }
        Ok(said)
    }
}
