//! blackbox_exporter: sends one ICMP echo for each scrape, so we are its Prometheus. The kernel on the other side answers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pathmeter_lab::exchange::Protocol;
use pathmeter_lab::{Program, eventually, get};

use super::{Asker, Run, Said, Timed, Which};
use crate::lane::{Lane, wall};

pub(crate) const PROGRAM: &str = "prometheus-blackbox-exporter";
pub(crate) const FRONT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9_115);
const CONFIG: &str = "\
modules:
  icmp: {prober: icmp, timeout: 1s, icmp: {preferred_ip_protocol: ip4}}
  tcp_connect: {prober: tcp, timeout: 1s, tcp: {preferred_ip_protocol: ip4}}
  http_2xx: {prober: http, timeout: 1s, http: {preferred_ip_protocol: ip4}}
";

/// Round trip, a little for itself, and every now and then a second for a loss: one scraper asks this often.
const TURN: Duration = Duration::from_millis(100);
/// A hundred a second are more than any Prometheus asks for; what comes on top costs the host more than it tells.
const SCRAPERS: u16 = 10;

pub(crate) struct Blackbox {
    program: Program,
    scrapers: Scrapers,
}

/// At its own pace.
pub(crate) fn start(lane: &mut Lane, _: Run) -> io::Result<Box<dyn Asker>> {
    let targets = lane.targets(SCRAPERS);
    let program = launch(lane)?;
    // Each has a target of its own, by which its requests are known.
    let scrapers = Scrapers::start(lane, targets.into_iter().map(|target| vec![target]), TURN);
    Ok(Box::new(Blackbox { program, scrapers }))
}

pub(crate) fn launch(lane: &mut Lane) -> io::Result<Program> {
    let file = format!("--config.file={}", lane.write("blackbox.yml", CONFIG)?.display());
    let program = lane.ask(PROGRAM, &[&file]);
    eventually("blackbox_exporter serves", || lane.here().within(|| get(FRONT, "/metrics")).ok());
    Ok(program)
}

/// Threads that scrape.
pub(crate) struct Scrapers {
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<Vec<Answer>>>>,
}

/// What one scrape said: the round trip in seconds, `None` without success.
type Answer = (Which, Option<f64>);

impl Scrapers {
    /// One thread for each list of targets, which scrapes one of them after the other, one each turn.
    pub(crate) fn start(lane: &Lane, lists: impl Iterator<Item = Vec<IpAddr>>, turn: Duration) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let lists: Vec<_> = lists.collect();
        let count = u32::try_from(lists.len()).expect("few");
        let threads = (0..).zip(lists).map(|(number, list)| {
            let is_over = Arc::clone(&is_over);
            let first = Instant::now() + turn * number / count;
            lane.here().spawn(move || scrape_all(&list, turn, first, &is_over))
        });
        Self { threads: threads.collect(), is_over }
    }

    pub(crate) fn finish(self) -> io::Result<Vec<Answer>> {
        self.is_over.store(true, Relaxed);
        let lists = self.threads.into_iter().map(|thread| thread.join().expect("it does not panic"));
        Ok(lists.collect::<io::Result<Vec<_>>>()?.concat())
    }
}

fn scrape_all(
    list: &[IpAddr],
    turn: Duration,
    first: Instant,
    is_over: &AtomicBool,
) -> io::Result<Vec<Answer>> {
    let mut due = first;
    let mut answers = Vec::new();
    for target in list.iter().cycle() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if is_over.load(Relaxed) {
            break;
        }
        let begin = wall();
        let answer = get(FRONT, &format!("/probe?module=icmp&target={target}"))?.body;
        let said =
            |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        let is_answered = said("probe_success ").is_some_and(|success| success > 0.5);
        let round_trip = said("probe_icmp_duration_seconds{phase=\"rtt\"} ").filter(|_| is_answered);
        answers.push((Which::Between(*target, begin, wall()), round_trip));
        // Turns that a lost one took are not made up for.
        while due <= Instant::now() {
            due += turn;
        }
    }
    Ok(answers)
}

impl Asker for Blackbox {
    fn name(&self) -> &'static str {
        "blackbox_exporter"
    }

    fn protocol(&self) -> Protocol {
        Protocol::Icmp
    }

    fn finish(self: Box<Self>, _: &Lane) -> io::Result<Said> {
        let answers = self.scrapers.finish()?;
        drop(self.program);
        let timed = |(of, seconds): &Answer| Some(Timed { of: *of, nanos: (*seconds)? * 1e9 });
        Ok(Said {
            lost: answers.iter().filter(|(_, answer)| answer.is_none()).count() as u64,
            round_trips: answers.iter().filter_map(timed).collect(),
            ..Said::default()
        })
    }
}
