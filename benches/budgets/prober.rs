//! Cost of a path: CPU per echo, memory, and its part of a scrape.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::agent::{BenchAgent, NO_PATHS, PathLoad};
use super::bare;
use super::report::{Row, median};

const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(4);
/// Time until every path has had its first reply and the responder is identified.
const SETTLED: Duration = Duration::from_secs(5);
const SCRAPES: u32 = 10;

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let responder = BenchAgent::start(NO_PATHS)?;
    let idle = responder.memory()?.resident;
    let few = round_trips_of_few(responder.stamp_port)?;
    let mut rows = Vec::new();
    for (count, budget) in [(1_000, 20.0), (10_000, 8.0)] {
        let agent =
            BenchAgent::start(PathLoad { count, interval: "1s", flows: 1, port: responder.stamp_port })?;
        sleep(SETTLED);
        let (ours, share) = echoes(&agent, &responder)?;
        let many = Figures { idle, few, share, count };
        let about_paths = if count == 10_000 { many.rows(&agent)? } else { Vec::new() };
        drop(agent);
        let bare = (0..ROUNDS)
            .map(|_| bare::probe(count, responder.stamp_port, ROUND))
            .collect::<io::Result<_>>()?;
        let what = format!("CPU per echo, prober, {count} paths at 1/s");
        rows.push(Row::new(what, ours, "µs").bare(median(bare)).budget(budget));
        rows.extend(about_paths);
    }
    Ok(rows)
}

/// CPU per echo in microseconds, and share of a core in percent.
fn echoes(agent: &BenchAgent, responder: &BenchAgent) -> io::Result<(f64, f64)> {
    let (mut costs, mut shares) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (cpu, replies, begin) = (agent.cpu()?, responder.replies()?, Instant::now());
        sleep(ROUND);
        let (cpu, span) = (agent.cpu()? - cpu, begin.elapsed());
        costs.push(bare::per_echo(cpu, responder.replies()? - replies));
        shares.push(cpu.as_secs_f64() * 100.0 / span.as_secs_f64());
    }
    Ok((median(costs), median(shares)))
}

/// Round trips in microseconds, from the metrics page.
#[derive(Debug, Clone, Copy)]
struct RttSummary {
    mean: f64,
    p50: f64,
    p99: f64,
}

impl RttSummary {
    fn of(agent: &BenchAgent) -> io::Result<Self> {
        let page = agent.scrape()?;
        Ok(Self { mean: page.rtt_mean_us(), p50: page.rtt_bucket_us(0.5), p99: page.rtt_bucket_us(0.99) })
    }
}

/// Round trips of ten paths, at 20/s, so that p99 has twenty round trips above it.
fn round_trips_of_few(port: u16) -> io::Result<RttSummary> {
    let agent = BenchAgent::start(PathLoad { count: 10, interval: "50ms", flows: 1, port })?;
    sleep(Duration::from_secs(10));
    RttSummary::of(&agent)
}

/// Figures measured before those of many paths.
struct Figures {
    /// RSS of an agent without paths, in KiB.
    idle: f64,
    few: RttSummary,
    /// Percent of a core.
    share: f64,
    count: u32,
}

impl Figures {
    fn rows(&self, agent: &BenchAgent) -> io::Result<Vec<Row>> {
        let Self { idle, few, share, count } = *self;
        let resident = agent.memory()?.resident;
        let mut rows = vec![
            Row::new(format!("{count} paths at 1/s, share of one core"), share, "%").budget(10.0),
            Row::new("memory of a path", (resident - idle) / f64::from(count), "KiB").budget(4.0),
        ];
        let page = agent.scrape()?;
        let all = RttSummary::of(agent)?;
        let unsent = page.sum("pathmeter_echo_unsent_total");
        let sent = page.sum("pathmeter_echo_sent_total");
        let not_network = ["host_dropped", "late", "very_late", "mismatched", "send_errors"]
            .map(|name| page.sum(&format!("pathmeter_echo_{name}_total")));
        rows.extend([
            Row::new("… unsent", unsent * 100.0 / (sent + unsent), "%").budget(0.0),
            Row::new("… lost", page.sum("pathmeter_echo_lost_total"), "").budget(0.0),
            Row::new("… late, host-dropped, mismatched, send errors", not_network.iter().sum(), "")
                .budget(0.0),
            Row::new("… RTT p50, bucket (budget: as 10 paths)", all.p50, "µs").budget(few.p50),
            Row::new("… RTT p99, bucket (budget: as 10 paths)", all.p99, "µs").budget(few.p99),
            Row::new("… RTT mean (bare loop column: 10 paths)", all.mean, "µs").bare(few.mean),
        ]);
        rows.extend(scrapes(agent, share)?);
        Ok(rows)
    }
}

/// `share` is the percentage of a core that the agent uses without scrapes.
fn scrapes(agent: &BenchAgent, share: f64) -> io::Result<Vec<Row>> {
    agent.reset_memory_max()?;
    let (memory, cpu, begin) = (agent.memory()?, agent.cpu()?, Instant::now());
    let mut bytes = 0;
    for _ in 0..SCRAPES {
        bytes = agent.scrape()?.0.len();
    }
    let (cpu, span) = (agent.cpu()? - cpu, begin.elapsed().as_secs_f64());
    let of_scrapes = cpu.as_secs_f64() - span * share / 100.0;
    let megabytes = f64::from(u32::try_from(bytes).map_err(io::Error::other)?) / 1e6;
    let grown = (agent.memory()?.resident_max - memory.resident) / 1024.0;
    Ok(vec![
        Row::new("scrape of 10,000 paths, CPU", of_scrapes * 1e3 / f64::from(SCRAPES), "ms").budget(50.0),
        Row::new("… its length", megabytes, "MB"),
        Row::new("… growth of the largest RSS", grown, "MiB").budget(1.0),
    ])
}
