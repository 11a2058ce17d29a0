//! CPU time and memory of each tool for a thousand targets.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::exchange::ExchangeProtocol;
use pathmeter_lab::{MetricsPage, Program};

use crate::commands::Commands;
use crate::host_pair::{HostPair, wall_clock};
use crate::table::{short, table};
use crate::tools::blackbox::{self, BlackboxScrapers};
use crate::tools::ours::{self, AgentRole};
use crate::tools::{fping, irtt, smokeping, stamp_suite};

const TARGETS: u16 = 1_000;
/// Processes of irtt, which needs one per target: a tenth of the targets.
const SESSIONS: u16 = 100;
/// Prometheus' default scrape interval, and the length of a window: one scrape per window.
const SCRAPE_EVERY: Duration = Duration::from_secs(15);
const QUICK_WINDOW: Duration = Duration::from_secs(5);
/// Time until all targets are probed.
const SETTLED: Duration = Duration::from_secs(4);
/// Window for bursts. A thousand targets probed evenly are ten datagrams in this time.
const BURST_WINDOW: Duration = Duration::from_millis(10);
/// Connections that scrape the targets of `blackbox_exporter`.
const SCRAPERS: usize = 8;

/// A tool, and how to make it probe many targets.
struct CostCase {
    name: &'static str,
    program: &'static str,
    targets: u16,
    start: fn(&mut HostPair, &[IpAddr]) -> io::Result<RunningTools>,
    protocol: ExchangeProtocol,
    /// Reads its metrics page, if it has one about its targets.
    scrape: Option<fn(&HostPair) -> io::Result<MetricsPage>>,
    is_quick: bool,
}

const STAMP: ExchangeProtocol = ExchangeProtocol::Stamp(ours::PORT);

const ALL: [CostCase; 7] = [
    CostCase {
        name: "**pathmeter**",
        program: ours::PROGRAM,
        targets: TARGETS,
        start: start_ours,
        protocol: STAMP,
        scrape: Some(ours::scrape),
        is_quick: true,
    },
    CostCase {
        name: "fping -l",
        program: fping::PROGRAM,
        targets: TARGETS,
        start: start_fping,
        protocol: ExchangeProtocol::Icmp,
        scrape: None,
        is_quick: true,
    },
    CostCase {
        name: "smokeping_prober, ping sockets",
        program: smokeping::PROGRAM,
        targets: TARGETS,
        start: start_smokeping,
        protocol: ExchangeProtocol::Icmp,
        scrape: Some(smokeping::scrape),
        is_quick: true,
    },
    CostCase {
        name: "smokeping_prober, raw sockets (its default)",
        program: smokeping::PROGRAM,
        targets: TARGETS,
        start: start_smokeping_raw,
        protocol: ExchangeProtocol::Icmp,
        scrape: Some(smokeping::scrape),
        is_quick: false,
    },
    CostCase {
        name: "stamp-suite, a session for each target",
        program: stamp_suite::PROGRAM,
        targets: TARGETS,
        start: start_stamp_suite,
        protocol: ExchangeProtocol::Stamp(stamp_suite::PORT),
        scrape: None,
        is_quick: true,
    },
    CostCase {
        name: "irtt, a process for each target",
        program: irtt::PROGRAM,
        targets: SESSIONS,
        start: start_irtt,
        protocol: ExchangeProtocol::Irtt(irtt::PORT),
        scrape: None,
        is_quick: true,
    },
    CostCase {
        name: "blackbox_exporter, each target every 15 s",
        program: blackbox::PROGRAM,
        targets: TARGETS,
        start: start_blackbox,
        protocol: ExchangeProtocol::Icmp,
        scrape: None,
        is_quick: true,
    },
];

/// The probing processes, which are measured, and the processes that they need.
struct RunningTools {
    probers: Vec<Program>,
    _responder: Option<Program>,
    scrapers: Option<BlackboxScrapers>,
}

fn start_ours(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    let responder = ours::launch(pair, &AgentRole::Responder)?;
    let probers = ours::launch(pair, &AgentRole::ProberOfAll(targets))?;
    Ok(RunningTools { probers: vec![probers], _responder: Some(responder), scrapers: None })
}

fn start_fping(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    let list: String = targets.iter().map(|target| format!("{target}\n")).collect();
    let file = pair.write("targets", &list)?.display().to_string();
    // Pause between two datagrams; the default of 10 ms allows a hundred per second.
    let arguments = ["-l", "-q", "-Q", "15", "-p", "1000", "-i", "0.5", "-f", &file];
    Ok(RunningTools {
        probers: vec![pair.start_prober(fping::PROGRAM, &arguments)],
        _responder: None,
        scrapers: None,
    })
}

fn start_smokeping(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    smokeping_with(pair, targets, &["--no-privileged"])
}

fn start_smokeping_raw(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    smokeping_with(pair, targets, &[])
}

/// Targets of its configuration file always get raw sockets, those of its command line do not.
fn smokeping_with(pair: &mut HostPair, targets: &[IpAddr], arguments: &[&str]) -> io::Result<RunningTools> {
    let hosts: Vec<String> = targets.iter().map(ToString::to_string).collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let probers = vec![smokeping::launch(pair, &[arguments, &hosts].concat())?];
    Ok(RunningTools { probers, _responder: None, scrapers: None })
}

fn start_stamp_suite(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    let list: Vec<String> = targets.iter().map(ToString::to_string).collect();
    let (list, responder) = (list.join(","), stamp_suite::answer(pair, "0.0.0.0"));
    let port = stamp_suite::PORT.to_string();
    let arguments = ["-r", &list, "-p", &port, "-c", "0", "-d", "1000"];
    let probers = vec![pair.start_prober(&stamp_suite::program(), &arguments)];
    Ok(RunningTools { probers, _responder: Some(responder), scrapers: None })
}

fn start_irtt(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    let target = pair.target().to_string();
    let responder = pair.start_responder(irtt::PROGRAM, &["server", "-b", &target]);
    pair.wait_for_udp(irtt::PORT);
    let client = |_| pair.start_prober(irtt::PROGRAM, &["client", "-i", "1s", "-d", "10m", "-Q", &target]);
    Ok(RunningTools {
        probers: targets.iter().map(client).collect(),
        _responder: Some(responder),
        scrapers: None,
    })
}

fn start_blackbox(pair: &mut HostPair, targets: &[IpAddr]) -> io::Result<RunningTools> {
    let probers = vec![blackbox::launch(pair)?];
    let lists = targets.chunks(targets.len().div_ceil(SCRAPERS)).map(<[IpAddr]>::to_vec);
    let turn =
        SCRAPE_EVERY * u32::try_from(SCRAPERS).expect("few") / u32::try_from(targets.len()).expect("few");
    let scrapers = Some(BlackboxScrapers::start(pair, lists, turn));
    Ok(RunningTools { probers, _responder: None, scrapers })
}

/// Measured cost of a tool.
struct ToolCost {
    case: &'static str,
    targets: u16,
    probes_per_second: f64,
    /// Most requests within [`BURST_WINDOW`].
    burst: usize,
    /// CPU time per probe in microseconds.
    cpu_per_probe: f64,
    /// Memory with all targets, in KiB.
    memory: f64,
    /// Memory per target beyond the first, in KiB.
    memory_per_target: f64,
}

/// Measures one tool after the other.
pub(crate) fn measure(is_quick: bool, commands: &mut Commands) -> io::Result<String> {
    let window = if is_quick { QUICK_WINDOW } else { SCRAPE_EVERY };
    let mut costs: Vec<ToolCost> = Vec::new();
    for case in ALL {
        if commands.has(case.program) && (case.is_quick || !is_quick) {
            costs.push(case.cost(window, commands)?);
        }
    }
    let Some(ours) = costs.first() else { return Ok(String::new()) };
    let rows: Vec<_> = costs.iter().map(|cost| cost.row(ours)).collect();
    let head = [
        "program",
        "targets",
        "probes/s",
        "most in 10 ms",
        "CPU per probe",
        "× ours",
        "memory",
        "per target",
        "× ours",
    ];
    Ok(table(head, &rows))
}

impl CostCase {
    fn cost(&self, window: Duration, commands: &mut Commands) -> io::Result<ToolCost> {
        let memory_of_one = self.memory_of_one()?;
        let mut pair = HostPair::new()?;
        let targets = pair.targets(self.targets);
        let running = (self.start)(&mut pair, &targets)?;
        sleep(SETTLED);
        let (cpu, begin) = (running.cpu(), wall_clock());
        sleep(window / 2);
        self.scrape(&pair)?;
        sleep(window / 2);
        let (cpu, end) = (running.cpu().saturating_sub(cpu), wall_clock());
        let memory = running.memory()?;
        running.end()?;
        commands.record(&pair);
        let truth = pair.truth(self.protocol);
        let mut sent: Vec<u64> = truth.iter().map(|(_, exchange)| exchange.sent_at).collect();
        sent.retain(|left| (begin..end).contains(left));
        sent.sort_unstable();
        let probes = f64::from(u32::try_from(sent.len()).map_err(io::Error::other)?);
        Ok(ToolCost {
            case: self.name,
            targets: self.targets,
            burst: burst(&sent),
            probes_per_second: probes / Duration::from_nanos(end - begin).as_secs_f64(),
            cpu_per_probe: cpu.as_secs_f64() * 1e6 / probes,
            memory,
            memory_per_target: (memory - memory_of_one) / f64::from(self.targets - 1),
        })
    }

    fn memory_of_one(&self) -> io::Result<f64> {
        let mut pair = HostPair::new()?;
        let targets = pair.targets(1);
        let running = (self.start)(&mut pair, &targets)?;
        sleep(SETTLED / 2);
        self.scrape(&pair)?;
        let memory = running.memory()?;
        running.end()?;
        Ok(memory)
    }

    fn scrape(&self, pair: &HostPair) -> io::Result<()> {
        self.scrape.map_or(Ok(()), |scrape| scrape(pair).map(drop))
    }
}

/// The largest number of these sorted times within one [`BURST_WINDOW`].
fn burst(sent: &[u64]) -> usize {
    let until = |first: u64| {
        sent.partition_point(|left| Duration::from_nanos(left.saturating_sub(first)) < BURST_WINDOW)
    };
    sent.iter().enumerate().map(|(index, first)| until(*first) - index).max().unwrap_or(0)
}

impl RunningTools {
    fn cpu(&self) -> Duration {
        self.probers.iter().map(Program::cpu).sum()
    }

    /// Resident memory in KiB; memory shared between processes counts once.
    fn memory(&self) -> io::Result<f64> {
        let of = |program: &Program| -> io::Result<f64> {
            let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", program.id()))?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
            let figure = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
            figure.ok_or_else(|| io::Error::other(format!("no Pss in {rollup:?}")))
        };
        self.probers.iter().map(of).sum()
    }

    fn end(self) -> io::Result<()> {
        self.scrapers.map_or(Ok(()), |scrapers| scrapers.finish().map(drop))
    }
}

impl ToolCost {
    fn row(&self, ours: &Self) -> [String; 9] {
        [
            self.case.to_owned(),
            self.targets.to_string(),
            short(self.probes_per_second),
            self.burst.to_string(),
            format!("{} µs", short(self.cpu_per_probe)),
            short(self.cpu_per_probe / ours.cpu_per_probe),
            format!("{} MiB", short(self.memory / 1024.0)),
            format!("{} KiB", short(self.memory_per_target)),
            short(self.memory_per_target / ours.memory_per_target),
        ]
    }
}
