//! Number of paths that one agent can measure.

use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::super::agent::{BenchAgent, NO_PATHS, PathLoad};
use super::super::process::{self, ThreadTimes};
use super::super::report::median;
use super::table::{self, Column};
use super::totals::{Totals, time_scrape};
use super::{Interference, LONG, Meter, OtherLoad, STEP, WINDOW};

/// A load and its duration.
struct PathCase {
    head: &'static str,
    count: u32,
    interval: &'static str,
    flows: u8,
    /// Datagrams per second of all paths.
    rate: f64,
    span: Duration,
}

const LOADS: [PathCase; 8] = [
    PathCase { head: "10 at 20/s", count: 10, interval: "50ms", flows: 1, rate: 200.0, span: LONG },
    once_a_second("10,000", 10_000, 1, LONG),
    once_a_second("10,000 of 16 flows", 10_000, 16, STEP),
    once_a_second("20,000", 20_000, 1, STEP),
    once_a_second("40,000", 40_000, 1, STEP),
    once_a_second("60,000", 60_000, 1, STEP),
    once_a_second("80,000", 80_000, 1, STEP),
    once_a_second("100,000", 100_000, 1, STEP),
];

/// The maximum number of paths at increasing rates.
const BEYOND: [PathCase; 3] = [
    hundred_thousand("125,000/s", "800ms", 125_000.0),
    hundred_thousand("167,000/s", "600ms", 166_667.0),
    hundred_thousand("200,000/s", "500ms", 200_000.0),
];

const fn hundred_thousand(head: &'static str, interval: &'static str, rate: f64) -> PathCase {
    PathCase { head, count: 100_000, interval, flows: 1, rate, span: STEP }
}

const fn once_a_second(head: &'static str, count: u32, flows: u8, span: Duration) -> PathCase {
    PathCase { head, count, interval: "1s", flows, rate: count as f64, span }
}

/// Time until every path has had its first reply and the responder is identified.
const SETTLED: Duration = Duration::from_secs(10);

/// Time until dropped datagrams have their verdict.
const DECIDED: Duration = Duration::from_secs(5);

/// More sessions than paths, so that the responder's session table is not the limit.
const RESPONDER: &str = "rate: 100Mpps, rate_per_source: 100Mpps, sessions: 1000000";

pub(crate) fn measure(out: &mut dyn io::Write) -> io::Result<()> {
    measure_all(out, "paths", &LOADS)
}

pub(crate) fn measure_beyond(out: &mut dyn io::Write) -> io::Result<()> {
    measure_all(out, "100,000 paths", &BEYOND)
}

fn measure_all(out: &mut dyn io::Write, corner: &str, loads: &[PathCase]) -> io::Result<()> {
    let columns = loads.iter().map(measure_case).collect::<io::Result<Vec<_>>>()?;
    table::print(out, corner, &columns)
}

fn measure_case(load: &PathCase) -> io::Result<Column> {
    let responder = BenchAgent::start_with(RESPONDER, NO_PATHS)?;
    let idle = responder.memory()?.resident;
    let PathCase { count, interval, flows, .. } = *load;
    let agent = BenchAgent::start(PathLoad { count, interval, flows, port: responder.stamp_port })?;
    sleep(SETTLED);
    let mut column = Column::new(load.head);
    Measurement::of(load, &agent, &responder)?.show(load, &mut column);
    let resident = agent.memory()?.resident;
    column.add("RSS", resident / 1024.0, "MiB");
    column.add("RSS of a path", (resident - idle) / f64::from(count), "KiB");
    column.add_load_average();
    Ok(column)
}

/// Readings before and after a load.
struct Measurement {
    /// Totals of the agent and of its responder.
    before: (Totals, Totals),
    after: (Totals, Totals),
    /// Seconds between the two pages of the agent.
    span: f64,
    /// Kernel drops at the sockets of the agent, of the responder, and in the whole namespace.
    drops: [f64; 3],
    /// Shares of a core: the prober's thread, its waiting time, the rest of the agent, the responder's
    /// thread.
    shares: [f64; 4],
    scrape: (f64, f64),
    other_load: Interference,
}

impl Measurement {
    fn of(load: &PathCase, agent: &BenchAgent, responder: &BenchAgent) -> io::Result<Self> {
        let drops_before = drops(agent, responder)?;
        let (begin, before) = (Instant::now(), (agent.scrape()?, responder.scrape()?));
        let other_load = OtherLoad::begin(vec![agent.pid(), responder.pid()])?;
        let mut meter = Meter::begin(used(agent, responder)?);
        let (mut windows, mut scrapes, mut bytes) = (Vec::new(), Vec::new(), 0.0);
        let windows_begin = Instant::now();
        for window in 1.. {
            let end = WINDOW * window;
            if end > load.span {
                break;
            }
            sleep(end.saturating_sub(windows_begin.elapsed()));
            let (duration, length) = time_scrape(agent)?;
            scrapes.push(duration.as_secs_f64());
            bytes = length;
            windows.push(meter.shares(used(agent, responder)?));
        }
        let other_load = other_load.finish()?;
        sleep(DECIDED);
        let (span, after) = (begin.elapsed().as_secs_f64(), (agent.scrape()?, responder.scrape()?));
        let drops_after = drops(agent, responder)?;
        Ok(Self {
            before: (Totals::of(&before.0), Totals::of(&before.1)),
            after: (Totals::of(&after.0), Totals::of(&after.1)),
            span,
            drops: std::array::from_fn(|at| drops_after[at] - drops_before[at]),
            shares: std::array::from_fn(|at| median(windows.iter().map(|shares| shares[at]).collect())),
            scrape: (median(scrapes), bytes),
            other_load,
        })
    }

    fn show(&self, load: &PathCase, column: &mut Column) {
        let echo = |name: &str| self.after.0.since(&self.before.0, &format!("pathmeter_echo_{name}"));
        let (sent, unsent, errors) = (echo("sent_total"), echo("unsent_total"), echo("send_errors_total"));
        let due = load.rate * self.span;
        column.add("sent a second", sent / self.span, "");
        column.add("slots due that are sent, unsent or refused", (sent + unsent + errors) * 100.0 / due, "%");
        column.add("unsent", unsent * 100.0 / (sent + unsent), "%");
        let lost = ["forward", "reverse", "unknown"].map(|direction| {
            let series = format!("pathmeter_echo_lost_total{{direction=\"{direction}\"}}");
            self.after.0.one_since(&self.before.0, &series)
        });
        column.add_all("lost: forward / reverse / unknown", &lost);
        let dropped = echo("host_dropped_total");
        column.add_all("host-dropped", &[dropped]);
        let decided = echo("verdicts_total");
        let in_flight = self.after.0.get("pathmeter_echo_in_flight");
        column.add_all("in flight at the end", &[in_flight]);
        let late = [echo("late_total"), echo("very_late_total")];
        column.add_all("late / very late", &late);
        let rest = ["withdrawn_total", "mismatched_total", "send_errors_total", "duplicates_total"].map(echo);
        column.add_all("withdrawn / mismatched / send errors / duplicates", &rest);
        let ours = |(after, before): (&Totals, &Totals), of: &str| {
            after.one_since(before, &format!("pathmeter_socket_rx_dropped_total{{loop=\"{of}\"}}"))
        };
        let exported = [
            ours((&self.after.0, &self.before.0), "prober"),
            ours((&self.after.1, &self.before.1), "responder"),
        ];
        column.add_all("dropped at the sockets: prober / responder, from the agents", &exported);
        column.add_all("… prober / responder / whole namespace, from the kernel", &self.drops);
        let own = ["transmit", "receive"].map(|kind| {
            let series = format!("pathmeter_echo_user_timestamps_total{{timestamp=\"{kind}\"}}");
            self.after.0.one_since(&self.before.0, &series)
        });
        column.add_all("without kernel timestamp: transmit / receive", &own);
        let errors = self.after.0.since(&self.before.0, "pathmeter_accounting_errors_total");
        column.add_all("accounting errors", &[errors]);
        column.mark_exceeded(
            decided < sent * 0.99 || unsent + lost.iter().sum::<f64>() + dropped + late[0] > 0.0,
        );
        self.show_round_trips(column);
        self.show_cost(sent / self.span, column);
    }

    fn show_round_trips(&self, column: &mut Column) {
        const RTT: &str = "pathmeter_echo_rtt_seconds";
        let (after, before) = (&self.after.0, &self.before.0);
        for (name, q) in [("RTT p50, bucket", 0.5), ("RTT p99, bucket", 0.99), ("RTT p99.9, bucket", 0.999)] {
            column.add(name, after.quantile_since(before, RTT, "", q) * 1e6, "µs");
        }
        let count = after.since(before, &format!("{RTT}_count"));
        let short = after.one_since(before, &format!("{RTT}_bucket{{le=\"5e-05\"}}"));
        column.add("RTT above 50 µs", (count - short) * 100.0 / count, "%");
        column.add("RTT mean", after.since(before, &format!("{RTT}_sum")) * 1e6 / count, "µs");
    }

    fn show_cost(&self, rate: f64, column: &mut Column) {
        const LAG: &str = "pathmeter_loop_lag_seconds";
        let (after, before) = (&self.after.0, &self.before.0);
        let [prober, waited, rest, responder] = self.shares;
        column.add("prober's thread, share of a core", prober * 100.0, "%");
        column.add("… CPU per echo", prober * 1e6 / rate, "µs");
        column.add("… waited for a core", waited * 100.0, "%");
        column.add("rest of the agent: scrapes", rest * 100.0, "%");
        column.add("the other agent's responder", responder * 100.0, "%");
        self.other_load.show(column);
        column.add("a scrape", self.scrape.0 * 1e3, "ms");
        column.add("… its length", self.scrape.1 / 1e6, "MB");
        let lag = after.quantile_since(before, LAG, "loop=\"prober\",", 0.99);
        column.add("lag of the loop p99, bucket", lag * 1e3, "ms");
        let wakeups = after.one_since(before, "pathmeter_loop_wakeups_total{loop=\"prober\"}");
        column.add("wake-ups a second", wakeups / self.span, "");
        column.add("tick", after.get("pathmeter_loop_tick_seconds{loop=\"prober\"}") * 1e3, "ms");
        column.add("descriptors", after.get("process_open_fds"), "");
    }
}

fn drops(agent: &BenchAgent, responder: &BenchAgent) -> io::Result<[f64; 3]> {
    Ok([
        process::socket_drops(agent.pid())?,
        process::socket_drops(responder.pid())?,
        process::receive_buffer_errors()?,
    ])
}

fn used(agent: &BenchAgent, responder: &BenchAgent) -> io::Result<Vec<Duration>> {
    let prober = ThreadTimes::of(agent.pid(), "pm-prober")?;
    let rest = agent.cpu()?.saturating_sub(prober.ran);
    let responder = ThreadTimes::of(responder.pid(), "pm-responder")?;
    Ok(vec![prober.ran, prober.waited, rest, responder.ran])
}
