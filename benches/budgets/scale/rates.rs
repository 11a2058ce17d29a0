//! Number of requests per second that one agent can answer.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use pathmeter_proto::stats::quantile;

use super::super::agent::{BenchAgent, NO_PATHS};
use super::super::process::{self, ThreadTimes};
use super::super::report::median;
use super::offer::{GeneratorResult, LoadGenerator, RequestSources, SOURCES};
use super::table::{self, Column};
use super::totals::Totals;
use super::{LONG, Meter, OtherLoad, STEP, WINDOW};

/// A load, its duration, and the responder's limits.
struct RateCase {
    head: &'static str,
    rate: u32,
    sources: RequestSources,
    /// Keys of `responder`.
    responder: &'static str,
    span: Duration,
}

const RAISED: &str = "rate: 100Mpps, rate_per_source: 100Mpps";
const RAISED_ALL: &str = "rate: 100Mpps, rate_per_source: 100Mpps, sessions: 1000000";
/// Default limits, written as a key that has no effect.
const DEFAULTS: &str = "open: false";

const TEN_THOUSAND: RequestSources = RequestSources { addresses: SOURCES, sessions: 10_000 };
/// More than the default limit `sessions`.
const HUNDRED_THOUSAND: RequestSources = RequestSources { addresses: SOURCES, sessions: 100_000 };

const RATES: [RateCase; 7] = [
    raised("100,000/s", 100_000, LONG),
    raised("150,000/s", 150_000, STEP),
    raised("200,000/s", 200_000, STEP),
    raised("250,000/s", 250_000, STEP),
    raised("300,000/s", 300_000, STEP),
    raised("350,000/s", 350_000, STEP),
    raised("400,000/s", 400_000, STEP),
];

const fn raised(head: &'static str, rate: u32, span: Duration) -> RateCase {
    RateCase { head, rate, sources: TEN_THOUSAND, responder: RAISED, span }
}

/// 100,000/s against the limits of the configuration.
const CONFIGURED: [RateCase; 4] = [
    at_100k("defaults, 1 address", RequestSources { addresses: 1, sessions: 10_000 }, DEFAULTS),
    at_100k("defaults, 16 addresses", TEN_THOUSAND, DEFAULTS),
    at_100k("rates raised, 100,000 sessions", HUNDRED_THOUSAND, RAISED),
    at_100k("rates and sessions raised, 100,000 sessions", HUNDRED_THOUSAND, RAISED_ALL),
];

const fn at_100k(head: &'static str, sources: RequestSources, responder: &'static str) -> RateCase {
    RateCase { head, rate: 100_000, sources, responder, span: STEP }
}

pub(crate) fn measure(out: &mut dyn io::Write) -> io::Result<()> {
    for (corner, loads) in [("offered", &RATES[..]), ("100,000/s", &CONFIGURED[..])] {
        let columns = loads.iter().map(measure_case).collect::<io::Result<Vec<_>>>()?;
        table::print(out, corner, &columns)?;
    }
    Ok(())
}

fn measure_case(load: &RateCase) -> io::Result<Column> {
    let agent = BenchAgent::start_with(load.responder, NO_PATHS)?;
    let offer = LoadGenerator::new(load.sources, SocketAddrV4::new(Ipv4Addr::LOCALHOST, agent.stamp_port))?;
    let (before, drops_before) = (Totals::of(&agent.scrape()?), drops(&agent)?);
    let other_load = OtherLoad::begin(vec![agent.pid()])?;
    let mut meter = Meter::begin(used(&agent)?);
    let mut windows = Vec::new();
    let offered = offer.run(load.rate, load.span, WINDOW, || {
        windows.push(meter.shares(used(&agent)?));
        Ok(())
    })?;
    let other_load = other_load.finish()?;
    let (after, drops_after) = (Totals::of(&agent.scrape()?), drops(&agent)?);
    let drops: [f64; 3] = std::array::from_fn(|at| drops_after[at] - drops_before[at]);
    let share = |at: usize| median(windows.iter().map(|shares| shares[at]).collect());
    let mut column = Column::new(load.head);
    show_answers(&offered, load, &after, &before, &mut column);
    let exported = after.one_since(&before, "pathmeter_socket_rx_dropped_total{loop=\"responder\"}");
    column.add_all("dropped at its socket, from the agent", &[exported]);
    column.add_all("… agent / generator / whole namespace, from the kernel", &drops);
    let answered = after.since(&before, "pathmeter_responder_replies_total") / offered.span.as_secs_f64();
    column.add("responder's thread, share of a core", share(0) * 100.0, "%");
    column.add("… CPU per answer", share(0) * 1e6 / answered, "µs");
    column.add("… waited for a core", share(1) * 100.0, "%");
    column.add("generator, share of a core", share(2) * 100.0, "%");
    other_load.show(&mut column);
    column.add("RSS", agent.memory()?.resident / 1024.0, "MiB");
    let lag = after.quantile_since(&before, "pathmeter_loop_lag_seconds", "loop=\"responder\",", 0.99);
    column.add("lag of the loop p99, bucket", lag * 1e3, "ms");
    column.add_load_average();
    Ok(column)
}

fn show_answers(
    offered: &GeneratorResult,
    load: &RateCase,
    after: &Totals,
    before: &Totals,
    column: &mut Column,
) {
    let rate = offered.requests / offered.span.as_secs_f64();
    column.add("really offered a second", rate, "");
    column.add("answered, of what was offered", offered.replies * 100.0 / offered.requests, "%");
    column.add("answered a second", offered.replies / offered.span.as_secs_f64(), "");
    let refused = ["source_rate", "total_rate", "replay"].map(|reason| {
        let series = format!("pathmeter_responder_rejected_total{{protocol=\"stamp\",reason=\"{reason}\"}}");
        after.one_since(before, &series)
    });
    column.add_all("refused: source_rate / total_rate / replay", &refused);
    column.add_all("reply errors", &[after.since(before, "pathmeter_responder_reply_errors_total")]);
    for (name, q) in [("turnaround p50", 0.5), ("turnaround p99", 0.99), ("turnaround p99.9", 0.999)] {
        let found = quantile(&offered.turnarounds, q).map_or(f64::NAN, |found| found.as_secs_f64() * 1e6);
        column.add(name, found, "µs");
    }
    let anew = offered.restarted * 100.0 / offered.repeated;
    column.add("sessions forgotten between two answers", anew, "%");
    let is_short = offered.replies < offered.requests || rate < f64::from(load.rate) * 0.99;
    column.mark_exceeded(is_short || offered.restarted > 0.0);
}

fn drops(agent: &BenchAgent) -> io::Result<[f64; 3]> {
    Ok([
        process::socket_drops(agent.pid())?,
        process::socket_drops(std::process::id())?,
        process::receive_buffer_errors()?,
    ])
}

fn used(agent: &BenchAgent) -> io::Result<Vec<Duration>> {
    let responder = ThreadTimes::of(agent.pid(), "pm-responder")?;
    Ok(vec![responder.ran, responder.waited, process::cpu_of_this_thread()])
}
