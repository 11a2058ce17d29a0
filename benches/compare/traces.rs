//! How soon a trace is complete, and with how many probes.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use pathmeter_lab::{Program, eventually, get, request};
use serde_json::Value;

use crate::commands::Commands;
use crate::router_chain::{RTT, RouterChain, ToolRun};
use crate::table::{NO_VALUE, median, table};
use crate::tools::ours;
use crate::tools::traceroutes::{self, TRACEROUTES};

/// Runs of which the median is shown.
const RUNS: usize = 5;

/// Runs of programs that take longer than [`SLOW`].
const SLOW_RUNS: usize = 3;
const SLOW: Duration = Duration::from_secs(5);

/// A program that has not ended after this time is killed.
const LIMIT: Duration = Duration::from_secs(60);

const HTTP_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_862);

/// What the programs trace.
#[derive(Clone, Copy)]
struct Situation {
    name: &'static str,
    routers: u8,
    /// The router that sends no ICMP errors.
    silent: Option<u8>,
    is_target_dead: bool,
}

const NORMAL: Situation = Situation { name: "8 routers", routers: 8, silent: None, is_target_dead: false };
const LONG: Situation = Situation { name: "16 routers", routers: 16, ..NORMAL };
const SILENT: Situation = Situation { name: "8 routers, the fourth silent", silent: Some(4), ..NORMAL };
const DEAD: Situation = Situation { name: "8 routers, dead target", is_target_dead: true, ..NORMAL };

/// The runs of a program in a situation.
#[derive(Debug, Default)]
struct Runs {
    /// Seconds; infinite if it was killed at the limit.
    seconds: Vec<f64>,
    /// Seconds that the trace took by its own report.
    reported: Vec<f64>,
    probes: Vec<f64>,
    /// TTL-limited probes and that to the target, of the way there, by its own report.
    own_probes: Vec<f64>,
    /// Routers that it reported, of the run with the fewest.
    found: Option<usize>,
}

/// Compares one program after the other, each cold.
pub(crate) fn measure(is_quick: bool, commands: &mut Commands) -> io::Result<String> {
    let runs = if is_quick { 1 } else { RUNS };
    let mut rows = Vec::new();
    let mut expectations = Expectations::default();
    for situation in [NORMAL, LONG, SILENT, DEAD] {
        let chain = RouterChain::new(situation.routers)?;
        if let Some(router) = situation.silent {
            chain.silence(router);
        }
        let target = if situation.is_target_dead { chain.dead_target() } else { chain.target() };
        let _responder = start_agent(&chain, "b", None)?;
        let once = situation.measure_ours(&chain, target, runs, commands);
        rows.push(situation.row("**pathmeter probe trace**", &once));
        expectations.add_first(situation, &once);
        if !situation.is_target_dead {
            let known = situation.measure_agent(&chain, target, runs)?;
            rows.push(situation.row("**pathmeter agent**, distance known", &known));
            expectations.add_known(situation, &known);
        }
        for tool in TRACEROUTES {
            if !commands.has(tool.program) {
                continue;
            }
            let (target, path) = (target.to_string(), traceroutes::path(tool.program));
            let command = [&[path.as_str()], tool.arguments, &[target.as_str()]].concat();
            let words = [&[tool.program], tool.arguments].concat().join(" ");
            commands.add(format!("{words} TARGET"));
            let measured = Runs::of(&chain, runs, || chain.run(&command, LIMIT), |_| None);
            rows.push(situation.row(&words, &measured));
        }
    }
    let head =
        ["chain", "program", "seconds", "of the way there, by its report", "probes sent", "routers found"];
    let rtt = RTT.as_millis();
    Ok(format!(
        "RTT {rtt} ms to the target, {} ms to the routers; no router limits its ICMP errors \
         (`icmp_ratelimit=0`, `icmp_ratemask=0`), and pathmeter's limits are raised accordingly for the way \
         back. Median of {runs} runs, of {SLOW_RUNS} where one takes more than {} s. pathmeter runs without \
         capabilities, and its seconds and probes include the way back; the others run as root. Probes are \
         the UDP datagrams and ICMP echoes that left the host.\n\n{}\n{}",
        rtt / 2,
        SLOW.as_secs(),
        table(head, &rows),
        expectations.text()
    ))
}

impl Situation {
    /// `pathmeter probe trace`, which does not know the distance.
    fn measure_ours(self, chain: &RouterChain, target: IpAddr, runs: usize, commands: &mut Commands) -> Runs {
        let (program, target) = (ours::program(), target.to_string());
        let mut arguments = vec!["probe", "trace", &target, "-n", "--json"];
        let port = ours::PORT.to_string();
        if self.is_target_dead {
            // Without a port it would ask the target over HTTP first.
            arguments.extend(["--port", &port]);
        }
        let words = arguments.join(" ").replace(&target, "TARGET");
        commands.add(format!("setpriv {} pathmeter {words}", UNPRIVILEGED.join(" ")));
        let command = [&["setpriv"], &UNPRIVILEGED[..], &[program.as_str()], &arguments].concat();
        Runs::of(
            chain,
            runs,
            || chain.run(&command, LIMIT),
            |output| serde_json::from_str::<Value>(output.lines().last()?).ok()?["duration_seconds"].as_f64(),
        )
    }

    /// Traces on request, of an agent that has traced the target before.
    fn measure_agent(self, chain: &RouterChain, target: IpAddr, runs: usize) -> io::Result<Runs> {
        let _agent = start_agent(chain, "a", Some(target))?;
        let traces = |trigger: &str| -> Vec<Value> {
            let page = chain.prober_host().within(|| get(HTTP_ADDRESS, "/api/v1/traces"));
            let all = page.ok().and_then(|page| serde_json::from_str::<Value>(&page.body).ok());
            let all = all.and_then(|all| all["traces"].as_array().cloned()).unwrap_or_default();
            all.into_iter().filter(|trace| trace["trigger"] == trigger && trace["reached"] == true).collect()
        };
        eventually("the first traces of both directions", || (traces("start").len() >= 2).then_some(()));
        let mut measured = Runs::default();
        for run in 0..runs {
            let before = chain.probes_sent();
            chain.prober_host().within(|| request("POST", HTTP_ADDRESS, "/api/v1/traces?target=b"))?;
            let found = eventually("the requested traces", || {
                let found = traces("request");
                (found.len() >= 2 * (run + 1)).then_some(found)
            });
            chain.drain();
            measured.probes.push(float(chain.probes_sent() - before));
            let forward = found.iter().filter(|trace| trace["direction"] == "forward");
            let newest = forward.max_by_key(|trace| trace["number"].as_u64());
            let Some(trace) = newest else { return Err(io::Error::other("no trace of the way there")) };
            measured.reported.extend(trace["duration_seconds"].as_f64());
            let hops = trace["hops"].as_array().map_or(&[][..], Vec::as_slice);
            let sent = hops.iter().filter_map(|hop| hop["sent"].as_f64()).sum::<f64>();
            measured.own_probes.push(sent + 1.0);
            measured.add_found(&chain.routers(), &trace.to_string());
        }
        Ok(measured)
    }

    fn row(self, program: &str, runs: &Runs) -> [String; 6] {
        let expected = usize::from(self.routers) - usize::from(self.silent.is_some());
        let found = runs.found.unwrap_or(0);
        let found = format!("{found} of {expected}");
        [
            self.name.to_owned(),
            program.to_owned(),
            seconds(&runs.seconds),
            seconds(&runs.reported),
            format!("{:.0}", median(&runs.probes)),
            if runs.found == Some(expected) { found } else { format!("**{found}**") },
        ]
    }
}

/// Arguments of `setpriv` that leave a program of root without any capability.
const UNPRIVILEGED: [&str; 3] = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];

/// Starts an agent, on `a` with a traced path to `target`, and waits until it is ready. Routers answer as
/// fast as they are probed.
fn start_agent(chain: &RouterChain, name: &str, target: Option<IpAddr>) -> io::Result<Program> {
    let mut text = format!(
        "log: {{level: warn}}\nagent: {{name: {name}}}\nresponder: {{allow: [10.77.0.0/16]}}\n\
         trace: {{router_rate: 1kpps, agent_rate: 1kpps}}\n"
    );
    if let Some(target) = target {
        let _ = write!(
            text,
            "peers: [{{name: b, address: {target}}}]\n\
             probes: [{{name: mesh, interval: 60s}}, {{name: routes, kind: trace, follows: mesh, interval: 1h}}]\n"
        );
    }
    let file = chain.file(&format!("{name}.yaml"));
    std::fs::write(&file, text)?;
    let node = if target.is_some() { chain.prober_host() } else { chain.responder_host() };
    let mut command = node.command(&ours::program());
    command.args(["run", "--config", &file.display().to_string()]);
    let agent = Program::start(&mut command, &chain.file(&format!("{name}.log")));
    ours::wait_until_ready(node);
    Ok(agent)
}

impl Runs {
    /// Runs a program several times. `reported` reads what it says the trace took.
    fn of(
        chain: &RouterChain,
        runs: usize,
        run: impl Fn() -> ToolRun,
        reported: impl Fn(&str) -> Option<f64>,
    ) -> Self {
        let mut all = Self::default();
        while all.seconds.len() < if all.is_slow() { runs.min(SLOW_RUNS) } else { runs } {
            let ToolRun { time, probes, output } = run();
            all.seconds.push(time.map_or(f64::INFINITY, |time| time.as_secs_f64()));
            all.reported.extend(reported(&output));
            all.probes.push(float(probes));
            all.add_found(&chain.routers(), &output);
        }
        all
    }

    fn is_slow(&self) -> bool {
        self.seconds.iter().any(|seconds| *seconds > SLOW.as_secs_f64())
    }

    /// Counts the routers whose addresses a program printed, each behind the one before it.
    fn add_found(&mut self, routers: &[IpAddr], output: &str) {
        let is_part = |character: char| character.is_ascii_digit() || character == '.';
        let words: Vec<&str> = output.split(|character: char| !is_part(character)).collect();
        let (mut rest, mut found) = (&words[..], 0);
        for router in routers.iter().map(ToString::to_string) {
            if let Some(at) = rest.iter().position(|word| **word == router) {
                (rest, found) = (&rest[at + 1..], found + 1);
            }
        }
        self.found = Some(self.found.map_or(found, |least| least.min(found)));
    }
}

fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// The median, or that it is above the limit.
fn seconds(values: &[f64]) -> String {
    match median(values) {
        seconds if seconds.is_infinite() => format!("> {}", LIMIT.as_secs()),
        seconds if seconds.is_nan() => NO_VALUE.to_owned(),
        seconds => format!("{seconds:.3}"),
    }
}

/// What a trace of ours should take, and what it took.
#[derive(Default)]
struct Expectations {
    lines: Vec<String>,
    /// Seconds of a trace of eight answering routers: the distance unknown, known.
    usual: [f64; 2],
}

impl Expectations {
    fn add_first(&mut self, situation: Situation, runs: &Runs) {
        let duration = median(&runs.reported);
        let rtt = RTT.as_secs_f64();
        if situation.is_target_dead {
            self.check("dead target, the whole command", median(&runs.seconds), 1.0, "1 s");
        } else if situation.silent.is_some() {
            self.check_silent("distance unknown", duration - self.usual[0]);
        } else {
            let name = format!("{}, distance unknown", situation.name);
            self.check(&name, duration, 2.1 * rtt + 0.005, "2.1 RTT + 5 ms");
        }
        if situation.routers == NORMAL.routers && situation.silent.is_none() && !situation.is_target_dead {
            self.usual[0] = duration;
        }
    }

    fn add_known(&mut self, situation: Situation, runs: &Runs) {
        let duration = median(&runs.reported);
        if situation.silent.is_some() {
            self.check_silent("distance known", duration - self.usual[1]);
            return;
        }
        let name = format!("{}, distance known", situation.name);
        self.check(&name, duration, 1.1 * RTT.as_secs_f64() + 0.005, "1.1 RTT + 5 ms");
        let packets = f64::from(situation.routers) + 1.0;
        let sent = median(&runs.own_probes);
        let met = if sent <= packets { "met" } else { "**missed**" };
        self.lines.push(format!("{name}: {sent} probes there, at most {packets}: {met}"));
        if situation.routers == NORMAL.routers {
            self.usual[1] = duration;
        }
    }

    fn check_silent(&mut self, name: &str, added: f64) {
        let limit = 1.25 * RTT.as_secs_f64() + 0.030;
        self.check(&format!("a silent router adds, {name}"), added, limit, "1.25 RTT + 30 ms");
    }

    fn check(&mut self, what: &str, seconds: f64, limit: f64, rule: &str) {
        let met = if seconds <= limit { "met" } else { "**missed**" };
        let line = format!("{what}: {:.1} ms, at most {rule} = {:.1} ms: {met}", seconds * 1e3, limit * 1e3);
        self.lines.push(line);
    }

    fn text(&self) -> String {
        self.lines.iter().map(|line| format!("* {line}\n")).collect()
    }
}
