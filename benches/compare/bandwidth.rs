//! Throughput of bandwidth runs, and what they cost.

use std::collections::BTreeMap;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::Program;

use crate::commands::Commands;
use crate::direct_hosts::DirectHosts;
use crate::table::{median, short, table};
use crate::tools::throughput::{self, THROUGHPUT_TOOLS, TcpLoad, ThroughputTool, Transfer, UdpLoad};

/// Rounds of which the median is shown.
const ROUNDS: usize = 9;
const QUICK_ROUNDS: usize = 3;

/// Numbers of connections.
const STREAMS: [u16; 2] = [1, 4];

/// Time of a run. Chosen: the slow start is a few percent of it.
const SECONDS: u16 = 2;

/// Time after the end of a client, in which its server ends the run too.
const SETTLE_TIME: Duration = Duration::from_millis(200);

/// A program whose runs fail more often ends the comparison. Chosen: on a busy host a client of nuttcp may
/// connect before its server listens.
const FAILURES_MAX: usize = 3;

/// The least throughput of pathmeter, and the most CPU time for each byte, as parts of the best other's.
const THROUGHPUT_MIN: f64 = 0.97;
const CPU_MAX: f64 = 1.0;

/// The least datagrams per second of pathmeter, each of 1,200 bytes.
const DATAGRAMS_MIN: f64 = 1e6;
const DATAGRAM_BYTES: f64 = 1_200.0;

/// Compares over each link, with each number of connections.
pub(crate) fn measure(is_quick: bool, commands: &mut Commands) -> io::Result<String> {
    let rounds = if is_quick { QUICK_ROUNDS } else { ROUNDS };
    let tools: Vec<ThroughputTool> =
        THROUGHPUT_TOOLS.into_iter().filter(|tool| commands.has(tool.program)).collect();
    let mut summary = Summary::default();
    let mut congestion_control = String::new();
    for make_hosts in [DirectHosts::loopback, DirectHosts::veth_pair] {
        let hosts = make_hosts()?;
        congestion_control = hosts.congestion_control()?;
        let load =
            |streams| TcpLoad { streams, seconds: SECONDS, congestion_control: congestion_control.clone() };
        let mut servers = Servers::start(hosts, &tools, commands)?;
        let mut idle = Entry::new(&servers, THROUGHPUT_TOOLS[0], throughput::ours_without_load, &load(1));
        for _ in 0..rounds {
            idle.run(&mut servers)?;
        }
        summary.add_idle(servers.hosts.link, &idle);
        for streams in STREAMS {
            let load = load(streams);
            let entries = tools.iter().map(|tool| Entry::new(&servers, *tool, tool.tcp, &load));
            let mut entries: Vec<Entry> = entries.collect();
            take_turns(&mut entries, rounds, &mut servers, commands)?;
            let connections =
                if streams == 1 { "1 connection".to_owned() } else { format!("{streams} connections") };
            summary.add(servers.hosts.link, &format!("TCP, {connections}"), &entries);
        }
        let load = UdpLoad { seconds: SECONDS };
        let over_udp = tools.iter().filter_map(|tool| Some(Entry::new(&servers, *tool, tool.udp?, &load)));
        let mut entries: Vec<Entry> = over_udp.collect();
        take_turns(&mut entries, rounds, &mut servers, commands)?;
        summary.add(servers.hosts.link, "UDP, 1,200 bytes", &entries);
        summary.add_datagrams(servers.hosts.link, &entries[0]);
    }
    Ok(format!(
        "Payload in one direction for {SECONDS} s, congestion control {congestion_control}; over UDP pathmeter \
         sends at 10 Gbit/s, others as fast as they can. Median of \
         {rounds} rounds, in each of which one program runs after the other. CPU is the time of both ends, \
         user and system; that of pathmeter includes its echoes on the idle path before the run, and during \
         it.\n\n{}",
        summary.text()
    ))
}

/// Runs all programs in each round. No program always follows the same one.
fn take_turns(
    entries: &mut [Entry],
    rounds: usize,
    servers: &mut Servers,
    commands: &mut Commands,
) -> io::Result<()> {
    for entry in entries.iter() {
        commands.add(entry.shown.clone());
    }
    for round in 0..rounds {
        for index in 0..entries.len() {
            let turn = (index + round) % entries.len();
            entries[turn].run(servers)?;
        }
    }
    Ok(())
}

/// The servers of all programs on their host.
struct Servers {
    // Programs are dropped before their network.
    all: BTreeMap<&'static str, Program>,
    hosts: DirectHosts,
}

impl Servers {
    fn start(hosts: DirectHosts, tools: &[ThroughputTool], commands: &mut Commands) -> io::Result<Self> {
        let mut all = BTreeMap::new();
        for tool in tools {
            if !all.contains_key(tool.program) {
                let (server, shown) = throughput::start_server(&hosts, tool.program)?;
                commands.add(shown);
                all.insert(tool.program, server);
            }
        }
        Ok(Self { all, hosts })
    }

    /// Starts the server of a program again, which may still wait for a client that has failed.
    fn restart(&mut self, program: &'static str) -> io::Result<()> {
        // The old one is killed first: both use the same port.
        self.all.remove(program);
        let (server, _) = throughput::start_server(&self.hosts, program)?;
        self.all.insert(program, server);
        Ok(())
    }
}

/// A program with its arguments, and its runs.
struct Entry {
    tool: ThroughputTool,
    arguments: Vec<String>,
    /// The command as typed in a shell.
    shown: String,
    gigabits_per_second: Vec<f64>,
    /// CPU time of both ends in seconds.
    cpu: Vec<f64>,
    /// The same for each 10⁹ bytes.
    cpu_per_gigabyte: Vec<f64>,
    /// Attempts that failed, of all runs.
    failures: usize,
}

impl Entry {
    fn new<L>(
        servers: &Servers,
        tool: ThroughputTool,
        arguments: fn(&L, &str) -> Vec<String>,
        load: &L,
    ) -> Self {
        Self {
            tool,
            arguments: arguments(load, &servers.hosts.target.to_string()),
            shown: format!("{} {}", tool.program, arguments(load, "TARGET").join(" ")),
            gigabits_per_second: Vec::new(),
            cpu: Vec::new(),
            cpu_per_gigabyte: Vec::new(),
            failures: 0,
        }
    }

    /// Runs once. An attempt that fails is repeated.
    fn run(&mut self, servers: &mut Servers) -> io::Result<()> {
        let mut attempt = self.attempt(servers);
        while attempt.is_err() && self.failures < FAILURES_MAX {
            self.failures += 1;
            servers.restart(self.tool.program)?;
            attempt = self.attempt(servers);
        }
        let (Transfer { bytes, bits_per_second }, cpu) = attempt?;
        self.gigabits_per_second.push(bits_per_second / 1e9);
        self.cpu.push(cpu);
        self.cpu_per_gigabyte.push(cpu / (bytes / 1e9));
        Ok(())
    }

    /// The result of a run, and the CPU time of both ends in seconds.
    fn attempt(&self, servers: &Servers) -> io::Result<(Transfer, f64)> {
        let server = &servers.all[self.tool.program];
        let before = server.cpu();
        let mut client = servers.hosts.start_client(&throughput::path(self.tool.program), &self.arguments);
        let (_, client_cpu) = client.wait_with_cpu();
        sleep(SETTLE_TIME);
        let cpu = client_cpu + server.cpu().saturating_sub(before);
        let output = client.output();
        match (self.tool.read)(&output) {
            Ok(transfer) => Ok((transfer, cpu.as_secs_f64())),
            Err(error) => Err(io::Error::other(format!("{}: {error}:\n{output}", self.shown))),
        }
    }
}

/// The rows of the table, and below it what is expected of pathmeter.
#[derive(Default)]
struct Summary {
    rows: Vec<[String; 7]>,
    expectations: Vec<String>,
    notes: Vec<String>,
}

impl Summary {
    /// Adds the runs of all programs under one load; pathmeter is the first.
    fn add(&mut self, link: &str, load: &str, entries: &[Entry]) {
        for entry in entries {
            self.rows.push([
                link.to_owned(),
                load.to_owned(),
                entry.tool.name.to_owned(),
                short(median(&entry.gigabits_per_second)),
                range(&entry.gigabits_per_second, short),
                seconds(median(&entry.cpu_per_gigabyte)),
                range(&entry.cpu_per_gigabyte, seconds),
            ]);
            if entry.failures > 0 {
                self.notes.push(format!(
                    "{link}, {load}: {} runs of {} failed and were repeated",
                    entry.failures, entry.tool.name
                ));
            }
        }
        let Some((ours, others)) = entries.split_first() else { return };
        let throughput = |entry: &Entry| median(&entry.gigabits_per_second);
        let cpu = |entry: &Entry| median(&entry.cpu_per_gigabyte);
        let best = others.iter().max_by(|one, other| throughput(one).total_cmp(&throughput(other)));
        if let Some(best) = best {
            let ratio = throughput(ours) / throughput(best);
            let met = if ratio >= THROUGHPUT_MIN { "met" } else { "**missed**" };
            self.expectations.push(format!(
                "{link}, {load}: throughput {ratio:.3} × {}, at least {THROUGHPUT_MIN}: {met}",
                best.tool.name
            ));
        }
        let best = others.iter().min_by(|one, other| cpu(one).total_cmp(&cpu(other)));
        if let Some(best) = best {
            let ratio = cpu(ours) / cpu(best);
            let met = if ratio <= CPU_MAX { "met" } else { "**missed**" };
            self.expectations.push(format!(
                "{link}, {load}: CPU for each byte {ratio:.3} × {}, at most {CPU_MAX:.1}: {met}",
                best.tool.name
            ));
        }
    }

    /// Adds whether pathmeter's datagrams arrived at the rate that is expected.
    fn add_datagrams(&mut self, link: &str, runs: &Entry) {
        let per_second = median(&runs.gigabits_per_second) * 1e9 / 8.0 / DATAGRAM_BYTES;
        let met = if per_second >= DATAGRAMS_MIN { "met" } else { "**missed**" };
        self.expectations.push(format!(
            "{link}: {:.2} million datagrams per second received, at least {:.0}: {met}",
            per_second / 1e6,
            DATAGRAMS_MIN / 1e6
        ));
    }

    /// Adds what a run of pathmeter costs that transfers almost nothing.
    fn add_idle(&mut self, link: &str, runs: &Entry) {
        let milliseconds: Vec<f64> = runs.cpu.iter().map(|seconds| seconds * 1e3).collect();
        self.notes.push(format!(
            "{link}: of each run of pathmeter {} ms of CPU ({}) are for the start of the command, the lease \
             and 2 s of echoes on the idle path, as a run of 1 kB takes them",
            short(median(&milliseconds)),
            range(&milliseconds, short)
        ));
    }

    fn text(&self) -> String {
        let head =
            ["link", "load", "program", "Gbit/s", "in all rounds", "CPU seconds per GB", "in all rounds"];
        let lines = self.expectations.iter().chain(&self.notes);
        let lines: String = lines.map(|line| format!("* {line}\n")).collect();
        format!("{}\n{lines}", table(head, &self.rows))
    }
}

fn seconds(value: f64) -> String {
    format!("{value:.3}")
}

/// The smallest and the largest value.
fn range(values: &[f64], format: fn(f64) -> String) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} to {}", format(least), format(most))
}
