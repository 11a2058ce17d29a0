//! CPU cost of a probe over TCP, HTTP and ICMP.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::Program;
use pathmeter_lab::exchange::ExchangeProtocol;

use crate::commands::Commands;
use crate::host_pair::{HostPair, wall_clock};
use crate::table::{short, table};
use crate::tools::ours::{self, AgentRole};
use crate::tools::prometheus::ScrapeDriver;
use crate::tools::{blackbox, fping};

/// Targets, each probed once a second. An agent accepts 256 connections over TCP from one address.
const TARGETS: u16 = 200;
const EVERY: Duration = Duration::from_secs(1);
/// Time until all targets are probed and the peers are identified. Peers are polled again after a minute.
const SETTLED: Duration = Duration::from_secs(4);
const WINDOW: Duration = Duration::from_secs(6);
const ROUNDS: usize = 3;
/// Connections to `blackbox_exporter`: enough for round trips of 80 ms.
const CONNECTIONS: usize = 50;

/// A tool and its task.
struct TransportEntry {
    transport: &'static str,
    name: &'static str,
    program: &'static str,
    start: fn(&mut HostPair, &[IpAddr]) -> io::Result<RunningTool>,
    count: ProbeCounting,
}

/// How probes are counted.
#[derive(Clone, Copy)]
enum ProbeCounting {
    /// By pathmeter's metrics page.
    MetricsPage(&'static str),
    /// By the wire's log.
    Wire,
    /// By successful scrapes.
    Scrapes,
}

const BY_CONNECTS: ProbeCounting =
    ProbeCounting::MetricsPage("pathmeter_echo_connect_duration_seconds_count");
const BY_ECHOES: ProbeCounting = ProbeCounting::MetricsPage("pathmeter_echo_rtt_seconds_count");

const ALL: [TransportEntry; 10] = [
    TransportEntry {
        transport: "TCP",
        name: "**pathmeter**, a connection for each probe",
        program: ours::PROGRAM,
        start: tcp_fresh,
        count: BY_CONNECTS,
    },
    TransportEntry {
        transport: "TCP",
        name: "blackbox_exporter, tcp_connect",
        program: blackbox::PROGRAM,
        start: blackbox_tcp,
        count: ProbeCounting::Scrapes,
    },
    TransportEntry {
        transport: "TCP",
        name: "**pathmeter**, a message on one that stands",
        program: ours::PROGRAM,
        start: tcp_kept,
        count: BY_ECHOES,
    },
    TransportEntry {
        transport: "HTTP",
        name: "**pathmeter**, a connection for each probe",
        program: ours::PROGRAM,
        start: http_fresh,
        count: BY_CONNECTS,
    },
    TransportEntry {
        transport: "HTTP",
        name: "blackbox_exporter, http_2xx",
        program: blackbox::PROGRAM,
        start: blackbox_http,
        count: ProbeCounting::Scrapes,
    },
    TransportEntry {
        transport: "HTTP",
        name: "**pathmeter**, a request on one that stands",
        program: ours::PROGRAM,
        start: http_kept,
        count: BY_ECHOES,
    },
    TransportEntry {
        transport: "ICMP",
        name: "**pathmeter**, ping sockets",
        program: ours::PROGRAM,
        start: icmp_ping,
        count: ProbeCounting::Wire,
    },
    TransportEntry {
        transport: "ICMP",
        name: "**pathmeter**, raw sockets",
        program: ours::PROGRAM,
        start: icmp_raw,
        count: ProbeCounting::Wire,
    },
    TransportEntry {
        transport: "ICMP",
        name: "fping -l",
        program: fping::PROGRAM,
        start: fping_loop,
        count: ProbeCounting::Wire,
    },
    TransportEntry {
        transport: "ICMP",
        name: "blackbox_exporter, icmp",
        program: blackbox::PROGRAM,
        start: blackbox_icmp,
        count: ProbeCounting::Wire,
    },
];

/// The probing process, which is measured, and the processes that it needs.
struct RunningTool {
    prober: Program,
    _responder: Option<Program>,
    driver: Option<ScrapeDriver>,
}

impl RunningTool {
    fn alone(prober: Program) -> Self {
        Self { prober, _responder: None, driver: None }
    }
}

fn tcp_fresh(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    ours(pair, "{name: echo, protocol: tcp, interval: 1h, connect_interval: 1s}", targets, Hosts::Peers)
}

fn tcp_kept(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    ours(pair, "{name: echo, protocol: tcp, interval: 1s, connect_interval: \"off\"}", targets, Hosts::Peers)
}

fn http_fresh(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    let probe = "{name: echo, protocol: http, interval: 1h, connect_interval: 1s, targets: all}";
    ours(pair, probe, targets, Hosts::Urls)
}

fn http_kept(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    let probe = "{name: echo, protocol: http, interval: 1s, connect_interval: \"off\", targets: all}";
    ours(pair, probe, targets, Hosts::Urls)
}

fn icmp_ping(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    ours(pair, "{name: echo, protocol: icmp, interval: 1s, targets: all}", targets, Hosts::Addresses)
}

fn icmp_raw(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    // Without permission for ping sockets, root uses raw sockets.
    pair.prober_host().set_sysctl("ipv4/ping_group_range", "1 0");
    icmp_ping(pair, targets)
}

fn fping_loop(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    let list: String = targets.iter().map(|target| format!("{target}\n")).collect();
    let file = pair.write("targets", &list)?.display().to_string();
    let arguments = ["-l", "-q", "-Q", "15", "-p", "1000", "-i", "4", "-f", &file];
    Ok(RunningTool::alone(pair.start_prober(fping::PROGRAM, &arguments)))
}

fn blackbox_tcp(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    let responder = ours::launch(pair, &AgentRole::Responder)?;
    scraped(pair, targets, Some(responder), |target| {
        format!("/probe?module=tcp_connect&target={target}:{}", ours::AGENT_PORT)
    })
}

fn blackbox_http(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    let responder = ours::launch(pair, &AgentRole::Responder)?;
    scraped(pair, targets, Some(responder), |target| format!("/probe?module=http_2xx&target={}", url(target)))
}

fn blackbox_icmp(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTool> {
    scraped(pair, targets, None, |target| format!("/probe?module=icmp&target={target}"))
}

fn scraped(
    pair: &mut HostPair,
    targets: &[IpAddr],
    responder: Option<Program>,
    path: fn(IpAddr) -> String,
) -> io::Result<RunningTool> {
    let prober = blackbox::launch(pair)?;
    let driver = ScrapeDriver::start(pair, blackbox::HTTP_ADDRESS, targets, EVERY, CONNECTIONS, path);
    Ok(RunningTool { prober, _responder: responder, driver: Some(driver) })
}

/// How pathmeter addresses the targets.
enum Hosts {
    Peers,
    Urls,
    Addresses,
}

/// The URL for `blackbox_exporter` and for pathmeter.
fn url(target: IpAddr) -> String {
    format!("http://{target}:{}/api/v1/ping", ours::PORT)
}

fn ours(pair: &mut HostPair, probe: &str, targets: &[IpAddr], hosts: Hosts) -> io::Result<RunningTool> {
    let kind = match hosts {
        Hosts::Peers => "peers",
        Hosts::Urls | Hosts::Addresses => "targets",
    };
    let mut text = format!("probes: [{probe}]\n{kind}:\n");
    for target in targets {
        let name = target.to_string().replace('.', "-");
        let place = match hosts {
            Hosts::Peers | Hosts::Addresses => format!("address: {target}"),
            Hosts::Urls => format!("url: \"{}\"", url(*target)),
        };
        let _ = writeln!(text, "  - {{name: t-{name}, {place}}}");
    }
    let responder = ours::launch(pair, &AgentRole::Responder)?;
    let prober = ours::launch(pair, &AgentRole::Configured(&text))?;
    Ok(RunningTool { prober, _responder: Some(responder), driver: None })
}

/// Measures in rounds; in each round the tools run one after the other.
pub(crate) fn measure(is_quick: bool, commands: &mut Commands) -> io::Result<String> {
    let rounds = if is_quick { 1 } else { ROUNDS };
    let present = ALL.into_iter().filter(|entry| commands.has(entry.program));
    let mut lines: Vec<(TransportEntry, Vec<ProbeCost>)> = present.map(|entry| (entry, Vec::new())).collect();
    for _ in 0..rounds {
        for (entry, costs) in &mut lines {
            costs.push(entry.cost(commands)?);
        }
    }
    let medians: Vec<(&'static str, f64)> = lines
        .iter()
        .map(|(entry, costs)| (entry.transport, sorted(costs, |cost| cost.cpu_per_probe)[costs.len() / 2]))
        .collect();
    let rows: Vec<_> = lines
        .iter()
        .zip(&medians)
        .map(|((entry, costs), (transport, cpu_per_probe))| {
            let ours = medians
                .iter()
                .find(|(other, _)| other == transport)
                .map_or(f64::NAN, |(_, cpu_per_probe)| *cpu_per_probe);
            let (all, rates) =
                (sorted(costs, |cost| cost.cpu_per_probe), sorted(costs, |cost| cost.probes_per_second));
            [
                (*transport).to_owned(),
                entry.name.to_owned(),
                short(rates[rates.len() / 2]),
                format!("{} µs", short(*cpu_per_probe)),
                format!("{} to {}", short(all[0]), short(all[all.len() - 1])),
                short(cpu_per_probe / ours),
            ]
        })
        .collect();
    Ok(table(["over", "program", "probes/s", "CPU per probe", "in all rounds", "× the first"], &rows))
}

fn sorted(costs: &[ProbeCost], figure: fn(&ProbeCost) -> f64) -> Vec<f64> {
    let mut all: Vec<f64> = costs.iter().map(figure).collect();
    all.sort_by(f64::total_cmp);
    all
}

/// Measured cost in one round.
struct ProbeCost {
    probes_per_second: f64,
    /// CPU time per probe in microseconds.
    cpu_per_probe: f64,
}

impl TransportEntry {
    fn cost(&self, commands: &mut Commands) -> io::Result<ProbeCost> {
        let mut pair = HostPair::new()?;
        let targets = pair.targets(TARGETS);
        let running = (self.start)(&mut pair, &targets)?;
        sleep(SETTLED);
        let before = self.count_probes(&pair, &running)?;
        let (cpu, begin) = (running.prober.cpu(), wall_clock());
        sleep(WINDOW);
        let (cpu, end) = (running.prober.cpu().saturating_sub(cpu), wall_clock());
        let counted = self.count_probes(&pair, &running)? - before;
        if let Some(driver) = running.driver {
            driver.finish()?;
        }
        drop(running.prober);
        commands.record(&pair);
        let probes = match self.count {
            ProbeCounting::MetricsPage(_) | ProbeCounting::Scrapes => counted,
            ProbeCounting::Wire => {
                let truth = pair.truth(ExchangeProtocol::Icmp);
                let sent = truth.iter().filter(|(_, exchange)| (begin..end).contains(&exchange.sent_at));
                sent.fold(0.0, |count, _| count + 1.0)
            }
        };
        let span = Duration::from_nanos(end - begin).as_secs_f64();
        Ok(ProbeCost { probes_per_second: probes / span, cpu_per_probe: cpu.as_secs_f64() * 1e6 / probes })
    }

    /// Number of probes so far; 0 if the wire counts them.
    fn count_probes(&self, pair: &HostPair, running: &RunningTool) -> io::Result<f64> {
        let count = match self.count {
            ProbeCounting::MetricsPage(name) => ours::scrape(pair)?.count(name, &[]),
            ProbeCounting::Scrapes => running.driver.as_ref().map_or(0, ScrapeDriver::succeeded),
            ProbeCounting::Wire => 0,
        };
        Ok(f64::from(u32::try_from(count).map_err(io::Error::other)?))
    }
}
