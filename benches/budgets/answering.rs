//! Duration of HTTP pings while the metrics page of the same agent is scraped.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Read as _, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use super::agent::{BenchAgent, NO_PATHS, PathLoad};
use super::report::{median, short};

/// Paths on the page.
const PATHS: u32 = 10_000;
/// Interval of pings. They are sent on schedule whether or not earlier ones were answered, so that a pause
/// counts for every ping that falls into it.
const INTERVAL: Duration = Duration::from_millis(10);
/// A ping without a response after this time is lost, even if one comes later.
const LOST_AFTER: Duration = Duration::from_secs(15);
/// A response that takes longer is slow.
const SLOW: Duration = Duration::from_millis(10);

const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(12);
/// Time until every path has had its first reply.
const SETTLE_TIME: Duration = Duration::from_secs(5);

/// The scrapers during a measurement.
#[derive(Debug, Clone, Copy)]
struct ScraperLoad {
    name: &'static str,
    count: usize,
    /// From the start of a scrape to the start of the next by the same scraper.
    every: Duration,
}

const LOADS: [ScraperLoad; 3] = [
    ScraperLoad { name: "no scraper", count: 0, every: Duration::ZERO },
    ScraperLoad { name: "1 scraper, every 2 s", count: 1, every: Duration::from_secs(2) },
    ScraperLoad { name: "16 scrapers, without a pause", count: 16, every: Duration::ZERO },
];

const HEAD: &str = "
### Answering

| scraped by | ping p50 | p99 | mean | above 10 ms | lost | scrapes a second | CPU of the agent |
|---|---|---|---|---|---|---|---|";

/// Prints a table.
pub(crate) fn measure(out: &mut dyn Write) -> io::Result<()> {
    let responder = BenchAgent::start(NO_PATHS)?;
    let agent =
        BenchAgent::start(PathLoad { count: PATHS, interval: "1s", flows: 1, port: responder.stamp_port })?;
    sleep(SETTLE_TIME);
    writeln!(out, "{HEAD}")?;
    for load in LOADS {
        let rounds = (0..ROUNDS).map(|_| round(&agent, load)).collect::<io::Result<Vec<_>>>()?;
        let of = |figure: fn(&PingRound) -> f64| short(median(rounds.iter().map(figure).collect()));
        writeln!(
            out,
            "| {} | {} ms | {} ms | {} ms | {} % | {} % | {} | {} % |",
            load.name,
            of(|round| round.p50_ms),
            of(|round| round.p99_ms),
            of(|round| round.mean_ms),
            of(|round| round.slow_percent),
            of(|round| round.lost_percent),
            of(|round| round.scrapes_per_second),
            of(|round| round.cpu_percent),
        )?;
    }
    Ok(())
}

#[derive(Debug)]
struct PingRound {
    p50_ms: f64,
    p99_ms: f64,
    /// Mean of the answered pings.
    mean_ms: f64,
    slow_percent: f64,
    lost_percent: f64,
    scrapes_per_second: f64,
    cpu_percent: f64,
}

fn round(agent: &BenchAgent, load: ScraperLoad) -> io::Result<PingRound> {
    let (is_stopped, scrapes) = (AtomicBool::new(false), AtomicU64::new(0));
    scope(|scope| {
        let scrapers: Vec<_> = (0..load.count)
            .map(|_| scope.spawn(|| scrape(agent, load.every, &is_stopped, &scrapes)))
            .collect();
        let (cpu, begin) = (agent.cpu()?, Instant::now());
        let pinged = ping(agent);
        let (cpu, span) = (agent.cpu()? - cpu, begin.elapsed().as_secs_f64());
        is_stopped.store(true, Relaxed);
        let scrapes_per_second = f64::from(u32::try_from(scrapes.load(Relaxed)).unwrap_or(u32::MAX)) / span;
        for scraper in scrapers {
            scraper.join().expect("a scraper does not panic")?;
        }
        let cpu_percent = cpu.as_secs_f64() * 100.0 / span;
        Ok(PingRound { scrapes_per_second, cpu_percent, ..summary(pinged?) })
    })
}

/// Summarizes the durations of pings; `None` is a lost ping.
fn summary(pings: Vec<Option<Duration>>) -> PingRound {
    let count = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    let all = count(pings.len());
    let lost = count(pings.iter().filter(|ping| ping.is_none()).count());
    let slow = count(pings.iter().filter(|ping| ping.is_none_or(|duration| duration > SLOW)).count());
    // A lost ping counts as longer than any other.
    let mut sorted: Vec<f64> = pings
        .iter()
        .map(|ping| ping.map_or(f64::INFINITY, |duration| duration.as_secs_f64() * 1e3))
        .collect();
    sorted.sort_by(f64::total_cmp);
    let quantile = |percent: usize| sorted[(sorted.len() - 1) * percent / 100];
    let mean_ms = pings.iter().flatten().sum::<Duration>().as_secs_f64() * 1e3 / (all - lost).max(1.0);
    PingRound {
        p50_ms: quantile(50),
        p99_ms: quantile(99),
        mean_ms,
        slow_percent: slow * 100.0 / all,
        lost_percent: lost * 100.0 / all,
        scrapes_per_second: 0.0,
        cpu_percent: 0.0,
    }
}

/// Scrapes with gzip, over a new connection for each scrape, until stopped.
fn scrape(
    agent: &BenchAgent,
    every: Duration,
    is_stopped: &AtomicBool,
    scrapes: &AtomicU64,
) -> io::Result<()> {
    let mut page = vec![0; 1 << 20];
    while !is_stopped.load(Relaxed) {
        let begin = Instant::now();
        let mut stream = agent.connect()?;
        stream.write_all(
            b"GET /metrics HTTP/1.1\r\nHost: bench\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n",
        )?;
        while stream.read(&mut page)? > 0 {}
        scrapes.fetch_add(1, Relaxed);
        while begin.elapsed() < every && !is_stopped.load(Relaxed) {
            sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

/// Pings over one persistent connection; responses come in request order.
fn ping(agent: &BenchAgent) -> io::Result<Vec<Option<Duration>>> {
    let mut writer = agent.connect()?;
    writer.set_nodelay(true)?;
    let mut reader = BufReader::new(writer.try_clone()?);
    reader.get_ref().set_read_timeout(Some(LOST_AFTER))?;
    let total = usize::try_from(ROUND.as_nanos() / INTERVAL.as_nanos()).expect("some thousand");
    let sent: Mutex<VecDeque<Instant>> = Mutex::default();
    scope(|scope| {
        scope.spawn(|| {
            let begin = Instant::now();
            for number in (0..).take(total) {
                let due = begin + INTERVAL * number;
                sleep(due.saturating_duration_since(Instant::now()));
                sent.lock().unwrap_or_else(PoisonError::into_inner).push_back(Instant::now());
                // A ping that cannot be written is not answered, and so counts as lost.
                let _ = writer.write_all(b"GET /api/v1/ping HTTP/1.1\r\nHost: bench\r\n\r\n");
            }
        });
        let mut pings = Vec::with_capacity(total);
        while pings.len() < total && answer(&mut reader).is_ok() {
            let left = sent.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let duration = left.expect("an answer follows its request").elapsed();
            pings.push((duration < LOST_AFTER).then_some(duration));
        }
        pings.resize(total, None);
        Ok(pings)
    })
}

/// Reads one whole response.
fn answer(reader: &mut BufReader<TcpStream>) -> io::Result<()> {
    let (mut line, mut length) = (String::new(), 0);
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end().split_once(": ") {
            Some(("content-length", value)) => length = value.parse().map_err(io::Error::other)?,
            None if line == "\r\n" => break,
            Some(_) | None => {}
        }
    }
    io::copy(&mut reader.take(length), &mut io::sink()).map(drop)
}
