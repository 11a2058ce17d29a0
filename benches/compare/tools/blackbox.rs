//! blackbox_exporter: sends one ICMP echo per scrape, so this module scrapes it. The kernel of the other host
//! answers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pathmeter_lab::exchange::ExchangeProtocol;
use pathmeter_lab::{Program, eventually, get};

use super::{MeasuringTool, ProbeRun, ReportedRtt, RequestRef, ToolReport};
use crate::host_pair::{HostPair, wall_clock};

pub(crate) const PROGRAM: &str = "prometheus-blackbox-exporter";
pub(crate) const HTTP_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_115);
const CONFIG: &str = "\
modules:
  icmp: {prober: icmp, timeout: 1s, icmp: {preferred_ip_protocol: ip4}}
  tcp_connect: {prober: tcp, timeout: 1s, tcp: {preferred_ip_protocol: ip4}}
  http_2xx: {prober: http, timeout: 1s, http: {preferred_ip_protocol: ip4}}
";

/// Scrape interval of one thread: longer than a round trip; a lost echo takes a second.
const TURN: Duration = Duration::from_millis(100);
/// Ten threads send a hundred scrapes a second, more than any Prometheus; more would cost the host much and
/// prove little.
const SCRAPERS: u16 = 10;

pub(crate) struct Blackbox {
    program: Program,
    scrapers: BlackboxScrapers,
}

/// Ignores the interval of the run.
pub(crate) fn start(pair: &mut HostPair, _: ProbeRun) -> io::Result<Box<dyn MeasuringTool>> {
    let targets = pair.targets(SCRAPERS);
    let program = launch(pair)?;
    // Each thread has a target of its own, which identifies its requests.
    let scrapers = BlackboxScrapers::start(pair, targets.into_iter().map(|target| vec![target]), TURN);
    Ok(Box::new(Blackbox { program, scrapers }))
}

pub(crate) fn launch(pair: &mut HostPair) -> io::Result<Program> {
    let file = format!("--config.file={}", pair.write("blackbox.yml", CONFIG)?.display());
    let program = pair.start_prober(PROGRAM, &[&file]);
    eventually("blackbox_exporter serves", || {
        pair.prober_host().within(|| get(HTTP_ADDRESS, "/metrics")).ok()
    });
    Ok(program)
}

/// Threads that scrape.
pub(crate) struct BlackboxScrapers {
    is_stopped: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<Vec<ScrapeResult>>>>,
}

/// Result of a scrape: the round trip in seconds, `None` without success.
type ScrapeResult = (RequestRef, Option<f64>);

impl BlackboxScrapers {
    /// Starts one thread per list, which scrapes its targets in turn, one per `turn`.
    pub(crate) fn start(pair: &HostPair, lists: impl Iterator<Item = Vec<IpAddr>>, turn: Duration) -> Self {
        let is_stopped = Arc::new(AtomicBool::new(false));
        let lists: Vec<_> = lists.collect();
        let count = u32::try_from(lists.len()).expect("few");
        let threads = (0..).zip(lists).map(|(parse_number, list)| {
            let is_stopped = Arc::clone(&is_stopped);
            let first = Instant::now() + turn * parse_number / count;
            pair.prober_host().spawn(move || scrape_all(&list, turn, first, &is_stopped))
        });
        Self { threads: threads.collect(), is_stopped }
    }

    pub(crate) fn finish(self) -> io::Result<Vec<ScrapeResult>> {
        self.is_stopped.store(true, Relaxed);
        let lists = self.threads.into_iter().map(|thread| thread.join().expect("it does not panic"));
        Ok(lists.collect::<io::Result<Vec<_>>>()?.concat())
    }
}

fn scrape_all(
    list: &[IpAddr],
    turn: Duration,
    first: Instant,
    is_stopped: &AtomicBool,
) -> io::Result<Vec<ScrapeResult>> {
    let mut due = first;
    let mut answers = Vec::new();
    for target in list.iter().cycle() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if is_stopped.load(Relaxed) {
            break;
        }
        let begin = wall_clock();
        let answer = get(HTTP_ADDRESS, &format!("/probe?module=icmp&target={target}"))?.body;
        let report =
            |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        let is_answered = report("probe_success ").is_some_and(|success| success > 0.5);
        let round_trip = report("probe_icmp_duration_seconds{phase=\"rtt\"} ").filter(|_| is_answered);
        answers.push((RequestRef::Between(*target, begin, wall_clock()), round_trip));
        // Turns missed because of a lost echo are skipped.
        while due <= Instant::now() {
            due += turn;
        }
    }
    Ok(answers)
}

impl MeasuringTool for Blackbox {
    fn name(&self) -> &'static str {
        "blackbox_exporter"
    }

    fn protocol(&self) -> ExchangeProtocol {
        ExchangeProtocol::Icmp
    }

    fn finish(self: Box<Self>, _: &HostPair) -> io::Result<ToolReport> {
        let answers = self.scrapers.finish()?;
        drop(self.program);
        let timed = |(of, seconds): &ScrapeResult| Some(ReportedRtt { of: *of, nanos: (*seconds)? * 1e9 });
        Ok(ToolReport {
            lost: answers.iter().filter(|(_, answer)| answer.is_none()).count() as u64,
            round_trips: answers.iter().filter_map(timed).collect(),
            ..ToolReport::default()
        })
    }
}
