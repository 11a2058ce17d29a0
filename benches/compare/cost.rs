//! What a thousand targets cost whoever asks them.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::exchange::Protocol;
use pathmeter_lab::{Page, Program};

use crate::commands::Commands;
use crate::lane::{Lane, wall};
use crate::table::{short, table};
use crate::tools::blackbox::{self, Scrapers};
use crate::tools::ours::{self, Duty};
use crate::tools::{fping, irtt, smokeping, stamp_suite};

const TARGETS: u16 = 1_000;
/// Processes of irtt: it takes one for each target, so a tenth has to do.
const SESSIONS: u16 = 100;
/// A Prometheus with defaults scrapes so often: once in a window of that length.
const SCRAPE_EVERY: Duration = Duration::from_secs(15);
const QUICK_WINDOW: Duration = Duration::from_secs(5);
/// Until all targets are asked.
const SETTLED: Duration = Duration::from_secs(4);
/// Who asks a thousand targets evenly sends ten datagrams in this time.
const MOMENT: Duration = Duration::from_millis(10);
/// Connections on which the targets of `blackbox_exporter` are scraped.
const SCRAPERS: usize = 8;

/// A program, and how it is told to ask many targets.
struct Rival {
    name: &'static str,
    program: &'static str,
    targets: u16,
    start: fn(&mut Lane, &[IpAddr]) -> io::Result<Crew>,
    protocol: Protocol,
    /// Its page of metrics, if it has one about its targets.
    scrape: Option<fn(&Lane) -> io::Result<Page>>,
    is_quick: bool,
}

const STAMP: Protocol = Protocol::Stamp(ours::PORT);

#[rustfmt::skip]
const ALL: [Rival; 7] = [
    Rival { name: "**pathmeter**", program: ours::PROGRAM, targets: TARGETS, start: start_ours, protocol: STAMP, scrape: Some(ours::scrape), is_quick: true },
    Rival { name: "fping -l", program: fping::PROGRAM, targets: TARGETS, start: start_fping, protocol: Protocol::Icmp, scrape: None, is_quick: true },
    Rival { name: "smokeping_prober, ping sockets", program: smokeping::PROGRAM, targets: TARGETS, start: start_smokeping, protocol: Protocol::Icmp, scrape: Some(smokeping::scrape), is_quick: true },
    Rival { name: "smokeping_prober, raw sockets (its default)", program: smokeping::PROGRAM, targets: TARGETS, start: start_smokeping_raw, protocol: Protocol::Icmp, scrape: Some(smokeping::scrape), is_quick: false },
    Rival { name: "stamp-suite, a session for each target", program: stamp_suite::PROGRAM, targets: TARGETS, start: start_stamp_suite, protocol: Protocol::Stamp(stamp_suite::PORT), scrape: None, is_quick: true },
    Rival { name: "irtt, a process for each target", program: irtt::PROGRAM, targets: SESSIONS, start: start_irtt, protocol: Protocol::Irtt(irtt::PORT), scrape: None, is_quick: true },
    Rival { name: "blackbox_exporter, each target every 15 s", program: blackbox::PROGRAM, targets: TARGETS, start: start_blackbox, protocol: Protocol::Icmp, scrape: None, is_quick: true },
];

/// Programs that ask, which are watched, and what they need.
struct Crew {
    asking: Vec<Program>,
    _answering: Option<Program>,
    scrapers: Option<Scrapers>,
}

fn start_ours(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let answering = ours::launch(lane, &Duty::Answer)?;
    let asking = ours::launch(lane, &Duty::AskAll(targets))?;
    Ok(Crew { asking: vec![asking], _answering: Some(answering), scrapers: None })
}

fn start_fping(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let list: String = targets.iter().map(|target| format!("{target}\n")).collect();
    let file = lane.write("targets", &list)?.display().to_string();
    // Between any two datagrams it pauses; its default of 10 ms allows a hundred a second.
    let arguments = ["-l", "-q", "-Q", "15", "-p", "1000", "-i", "0.5", "-f", &file];
    Ok(Crew { asking: vec![lane.ask(fping::PROGRAM, &arguments)], _answering: None, scrapers: None })
}

fn start_smokeping(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    smokeping_with(lane, targets, &["--no-privileged"])
}

fn start_smokeping_raw(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    smokeping_with(lane, targets, &[])
}

/// Targets of its configuration file get raw sockets whatever it is told, those of its command line do not.
fn smokeping_with(lane: &mut Lane, targets: &[IpAddr], arguments: &[&str]) -> io::Result<Crew> {
    let hosts: Vec<String> = targets.iter().map(ToString::to_string).collect();
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let asking = vec![smokeping::launch(lane, &[arguments, &hosts].concat())?];
    Ok(Crew { asking, _answering: None, scrapers: None })
}

fn start_stamp_suite(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let list: Vec<String> = targets.iter().map(ToString::to_string).collect();
    let (list, answering) = (list.join(","), stamp_suite::answer(lane, "0.0.0.0"));
    let port = stamp_suite::PORT.to_string();
    let arguments = ["-r", &list, "-p", &port, "-c", "0", "-d", "1000"];
    let asking = vec![lane.ask(&stamp_suite::program(), &arguments)];
    Ok(Crew { asking, _answering: Some(answering), scrapers: None })
}

fn start_irtt(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let target = lane.target().to_string();
    let answering = lane.answer(irtt::PROGRAM, &["server", "-b", &target]);
    lane.wait_for_udp(irtt::PORT);
    let client = |_| lane.ask(irtt::PROGRAM, &["client", "-i", "1s", "-d", "10m", "-Q", &target]);
    Ok(Crew { asking: targets.iter().map(client).collect(), _answering: Some(answering), scrapers: None })
}

fn start_blackbox(lane: &mut Lane, targets: &[IpAddr]) -> io::Result<Crew> {
    let asking = vec![blackbox::launch(lane)?];
    let lists = targets.chunks(targets.len().div_ceil(SCRAPERS)).map(<[IpAddr]>::to_vec);
    let turn =
        SCRAPE_EVERY * u32::try_from(SCRAPERS).expect("few") / u32::try_from(targets.len()).expect("few");
    let scrapers = Some(Scrapers::start(lane, lists, turn));
    Ok(Crew { asking, _answering: None, scrapers })
}

/// What was used.
struct Cost {
    rival: &'static str,
    targets: u16,
    probes_per_second: f64,
    /// The most that left within [`MOMENT`].
    burst: usize,
    /// CPU time of a probe in microseconds.
    each: f64,
    /// With all targets, in KiB.
    memory: f64,
    /// Of each target beyond the first, in KiB.
    memory_each: f64,
}

/// One after the other.
pub(crate) fn measure(is_quick: bool, commands: &mut Commands) -> io::Result<String> {
    let window = if is_quick { QUICK_WINDOW } else { SCRAPE_EVERY };
    let mut costs: Vec<Cost> = Vec::new();
    for rival in ALL {
        if commands.has(rival.program) && (rival.is_quick || !is_quick) {
            costs.push(rival.cost(window, commands)?);
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

impl Rival {
    fn cost(&self, window: Duration, commands: &mut Commands) -> io::Result<Cost> {
        let memory_of_one = self.memory_of_one()?;
        let mut lane = Lane::new()?;
        let targets = lane.targets(self.targets);
        let crew = (self.start)(&mut lane, &targets)?;
        sleep(SETTLED);
        let (cpu, begin) = (crew.cpu(), wall());
        sleep(window / 2);
        self.scrape(&lane)?;
        sleep(window / 2);
        let (cpu, end) = (crew.cpu().saturating_sub(cpu), wall());
        let memory = crew.memory()?;
        crew.end()?;
        commands.note(&lane);
        let truth = lane.truth(self.protocol);
        let mut sent: Vec<u64> = truth.iter().map(|(_, exchange)| exchange.left).collect();
        sent.retain(|left| (begin..end).contains(left));
        sent.sort_unstable();
        let probes = f64::from(u32::try_from(sent.len()).map_err(io::Error::other)?);
        Ok(Cost {
            rival: self.name,
            targets: self.targets,
            burst: burst(&sent),
            probes_per_second: probes / Duration::from_nanos(end - begin).as_secs_f64(),
            each: cpu.as_secs_f64() * 1e6 / probes,
            memory,
            memory_each: (memory - memory_of_one) / f64::from(self.targets - 1),
        })
    }

    fn memory_of_one(&self) -> io::Result<f64> {
        let mut lane = Lane::new()?;
        let targets = lane.targets(1);
        let crew = (self.start)(&mut lane, &targets)?;
        sleep(SETTLED / 2);
        self.scrape(&lane)?;
        let memory = crew.memory()?;
        crew.end()?;
        Ok(memory)
    }

    fn scrape(&self, lane: &Lane) -> io::Result<()> {
        self.scrape.map_or(Ok(()), |scrape| scrape(lane).map(drop))
    }
}

/// The most of these times, which are sorted, that lie within one [`MOMENT`].
fn burst(sent: &[u64]) -> usize {
    let until =
        |first: u64| sent.partition_point(|left| Duration::from_nanos(left.saturating_sub(first)) < MOMENT);
    sent.iter().enumerate().map(|(index, first)| until(*first) - index).max().unwrap_or(0)
}

impl Crew {
    fn cpu(&self) -> Duration {
        self.asking.iter().map(Program::cpu).sum()
    }

    /// Resident memory in KiB, of which what processes share counts once.
    fn memory(&self) -> io::Result<f64> {
        let of = |program: &Program| -> io::Result<f64> {
            let told = fs::read_to_string(format!("/proc/{}/smaps_rollup", program.id()))?;
            let line = told.lines().find_map(|line| line.strip_prefix("Pss:"));
            let figure = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
            figure.ok_or_else(|| io::Error::other(format!("no Pss in {told:?}")))
        };
        self.asking.iter().map(of).sum()
    }

    fn end(self) -> io::Result<()> {
        self.scrapers.map_or(Ok(()), |scrapers| scrapers.finish().map(drop))
    }
}

impl Cost {
    fn row(&self, ours: &Self) -> [String; 9] {
        [
            self.rival.to_owned(),
            self.targets.to_string(),
            short(self.probes_per_second),
            self.burst.to_string(),
            format!("{} µs", short(self.each)),
            short(self.each / ours.each),
            format!("{} MiB", short(self.memory / 1024.0)),
            format!("{} KiB", short(self.memory_each)),
            short(self.memory_each / ours.memory_each),
        ]
    }
}
