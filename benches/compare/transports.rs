//! What a probe costs whoever asks, over TCP, HTTP and ICMP.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::Program;
use pathmeter_lab::exchange::Protocol;

use crate::commands::Commands;
use crate::lane::{Lane, wall};
use crate::table::{short, table};
use crate::tools::ours::{self, Duty};
use crate::tools::prometheus::Prometheus;
use crate::tools::{blackbox, fping};

/// All of them are asked once a second. An agent lets one address have 256 connections over TCP.
const TARGETS: u16 = 200;
const EVERY: Duration = Duration::from_secs(1);
/// Until all targets are asked, and the peers have been asked who they are, which they are again after a minute.
const SETTLED: Duration = Duration::from_secs(4);
const WINDOW: Duration = Duration::from_secs(6);
const ROUNDS: usize = 3;
/// On which `blackbox_exporter` is asked: enough for round trips of 80 ms.
const CONNECTIONS: usize = 50;

/// A program, and what it is to do.
struct Entry {
    over: &'static str,
    name: &'static str,
    program: &'static str,
    start: fn(&mut Lane, &[IpAddr]) -> io::Result<Crew>,
    count: Count,
}

/// How probes are counted.
#[derive(Clone, Copy)]
enum Count {
    /// By our own page of metrics.
    Page(&'static str),
    /// By the wire.
    Wire,
    /// By the scrapes that succeeded.
    Scrapes,
}

const CONNECTS: Count = Count::Page("pathmeter_echo_connect_duration_seconds_count");
const ECHOES: Count = Count::Page("pathmeter_echo_rtt_seconds_count");

#[rustfmt::skip]
const ALL: [Entry; 10] = [
    Entry { over: "TCP", name: "**pathmeter**, a connection for each probe", program: ours::PROGRAM, start: tcp_fresh, count: CONNECTS },
    Entry { over: "TCP", name: "blackbox_exporter, tcp_connect", program: blackbox::PROGRAM, start: blackbox_tcp, count: Count::Scrapes },
    Entry { over: "TCP", name: "**pathmeter**, a message on one that stands", program: ours::PROGRAM, start: tcp_kept, count: ECHOES },
    Entry { over: "HTTP", name: "**pathmeter**, a connection for each probe", program: ours::PROGRAM, start: http_fresh, count: CONNECTS },
    Entry { over: "HTTP", name: "blackbox_exporter, http_2xx", program: blackbox::PROGRAM, start: blackbox_http, count: Count::Scrapes },
    Entry { over: "HTTP", name: "**pathmeter**, a request on one that stands", program: ours::PROGRAM, start: http_kept, count: ECHOES },
    Entry { over: "ICMP", name: "**pathmeter**, ping sockets", program: ours::PROGRAM, start: icmp_ping, count: Count::Wire },
    Entry { over: "ICMP", name: "**pathmeter**, raw sockets", program: ours::PROGRAM, start: icmp_raw, count: Count::Wire },
    Entry { over: "ICMP", name: "fping -l", program: fping::PROGRAM, start: fping_loop, count: Count::Wire },
    Entry { over: "ICMP", name: "blackbox_exporter, icmp", program: blackbox::PROGRAM, start: blackbox_icmp, count: Count::Wire },
];

/// Who asks, which is watched, and what it needs.
struct Crew {
    asking: Program,
    _answering: Option<Program>,
    prometheus: Option<Prometheus>,
}

impl Crew {
    fn alone(asking: Program) -> Self {
        Self { asking, _answering: None, prometheus: None }
    }
}

fn tcp_fresh(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    ours(lane, "{name: echo, protocol: tcp, interval: 1h, connect_interval: 1s}", targets, Hosts::Peers)
}

fn tcp_kept(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    ours(lane, "{name: echo, protocol: tcp, interval: 1s, connect_interval: \"off\"}", targets, Hosts::Peers)
}

fn http_fresh(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let probe = "{name: echo, protocol: http, interval: 1h, connect_interval: 1s, targets: all}";
    ours(lane, probe, targets, Hosts::Urls)
}

fn http_kept(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let probe = "{name: echo, protocol: http, interval: 1s, connect_interval: \"off\", targets: all}";
    ours(lane, probe, targets, Hosts::Urls)
}

fn icmp_ping(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    ours(lane, "{name: echo, protocol: icmp, interval: 1s, targets: all}", targets, Hosts::Addresses)
}

fn icmp_raw(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    // Without ping sockets root asks with raw ones.
    lane.here().set("ipv4/ping_group_range", "1 0");
    icmp_ping(lane, targets)
}

fn fping_loop(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let list: String = targets.iter().map(|target| format!("{target}\n")).collect();
    let file = lane.write("targets", &list)?.display().to_string();
    let arguments = ["-l", "-q", "-Q", "15", "-p", "1000", "-i", "4", "-f", &file];
    Ok(Crew::alone(lane.ask(fping::PROGRAM, &arguments)))
}

fn blackbox_tcp(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let answering = ours::launch(lane, &Duty::Answer)?;
    scraped(lane, targets, Some(answering), |target| {
        format!("/probe?module=tcp_connect&target={target}:{}", ours::AGENT_PORT)
    })
}

fn blackbox_http(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let answering = ours::launch(lane, &Duty::Answer)?;
    scraped(lane, targets, Some(answering), |target| format!("/probe?module=http_2xx&target={}", url(target)))
}

fn blackbox_icmp(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    scraped(lane, targets, None, |target| format!("/probe?module=icmp&target={target}"))
}

fn scraped(
    lane: &mut Lane,
    targets: &[IpAddr],
    answering: Option<Program>,
    path: fn(IpAddr) -> String,
) -> io::Result<Crew> {
    let asking = blackbox::launch(lane)?;
    let prometheus = Prometheus::start(lane, blackbox::FRONT, targets, EVERY, CONNECTIONS, path);
    Ok(Crew { asking, _answering: answering, prometheus: Some(prometheus) })
}

/// What the targets are to us.
enum Hosts {
    Peers,
    Urls,
    Addresses,
}

/// The same for `blackbox_exporter` and for us.
fn url(target: IpAddr) -> String {
    format!("http://{target}:{}/api/v1/ping", ours::PORT)
}

fn ours(lane: &mut Lane, probe: &str, targets: &[IpAddr], hosts: Hosts) -> io::Result<Crew> {
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
    let answering = ours::launch(lane, &Duty::Answer)?;
    let asking = ours::launch(lane, &Duty::Written(&text))?;
    Ok(Crew { asking, _answering: Some(answering), prometheus: None })
}

/// Rounds, in each of which one program asks after the other.
pub(crate) fn measure(is_quick: bool, commands: &mut Commands) -> io::Result<String> {
    let rounds = if is_quick { 1 } else { ROUNDS };
    let present = ALL.into_iter().filter(|entry| commands.has(entry.program));
    let mut lines: Vec<(Entry, Vec<Cost>)> = present.map(|entry| (entry, Vec::new())).collect();
    for _ in 0..rounds {
        for (entry, costs) in &mut lines {
            costs.push(entry.cost(commands)?);
        }
    }
    let medians: Vec<(&'static str, f64)> = lines
        .iter()
        .map(|(entry, costs)| (entry.over, sorted(costs, |cost| cost.each)[costs.len() / 2]))
        .collect();
    let rows: Vec<_> = lines
        .iter()
        .zip(&medians)
        .map(|((entry, costs), (over, each))| {
            let ours = medians.iter().find(|(other, _)| other == over).map_or(f64::NAN, |(_, each)| *each);
            let (all, rates) =
                (sorted(costs, |cost| cost.each), sorted(costs, |cost| cost.probes_per_second));
            [
                (*over).to_owned(),
                entry.name.to_owned(),
                short(rates[rates.len() / 2]),
                format!("{} µs", short(*each)),
                format!("{} to {}", short(all[0]), short(all[all.len() - 1])),
                short(each / ours),
            ]
        })
        .collect();
    Ok(table(["over", "program", "probes/s", "CPU per probe", "in all rounds", "× the first"], &rows))
}

fn sorted(costs: &[Cost], figure: fn(&Cost) -> f64) -> Vec<f64> {
    let mut all: Vec<f64> = costs.iter().map(figure).collect();
    all.sort_by(f64::total_cmp);
    all
}

/// What one round took.
struct Cost {
    probes_per_second: f64,
    /// CPU time of a probe in microseconds.
    each: f64,
}

impl Entry {
    fn cost(&self, commands: &mut Commands) -> io::Result<Cost> {
        let mut lane = Lane::new()?;
        let targets = lane.targets(TARGETS);
        let crew = (self.start)(&mut lane, &targets)?;
        sleep(SETTLED);
        let before = self.counted(&lane, &crew)?;
        let (cpu, begin) = (crew.asking.cpu(), wall());
        sleep(WINDOW);
        let (cpu, end) = (crew.asking.cpu().saturating_sub(cpu), wall());
        let counted = self.counted(&lane, &crew)? - before;
        if let Some(prometheus) = crew.prometheus {
            prometheus.finish()?;
        }
        drop(crew.asking);
        commands.note(&lane);
        let probes = match self.count {
            Count::Page(_) | Count::Scrapes => counted,
            Count::Wire => {
                let truth = lane.truth(Protocol::Icmp);
                let sent = truth.iter().filter(|(_, exchange)| (begin..end).contains(&exchange.left));
                sent.fold(0.0, |count, _| count + 1.0)
            }
        };
        let span = Duration::from_nanos(end - begin).as_secs_f64();
        Ok(Cost { probes_per_second: probes / span, each: cpu.as_secs_f64() * 1e6 / probes })
    }

    /// Probes so far; of those that the wire counts 0.
    fn counted(&self, lane: &Lane, crew: &Crew) -> io::Result<f64> {
        let count = match self.count {
            Count::Page(name) => ours::scrape(lane)?.count(name, &[]),
            Count::Scrapes => crew.prometheus.as_ref().map_or(0, Prometheus::succeeded),
            Count::Wire => 0,
        };
        Ok(f64::from(u32::try_from(count).map_err(io::Error::other)?))
    }
}
