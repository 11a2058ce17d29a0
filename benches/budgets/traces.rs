//! Cost of traces: thousands of destinations behind a few routers.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use pathmeter_lab::{Net, NetPlan};

use super::agent::{AgentNamespace, AgentPorts, BenchAgent};
use super::report::Row;
use super::scale::totals::Totals;

const DESTINATIONS: u16 = 10_000;
const ROUTERS: [&str; 3] = ["r1", "r2", "r3"];

/// Agents that answer for all destinations. One alone would have to send more replies with a limited TTL at
/// the start than it keeps turns for.
const RESPONDERS: usize = 20;

/// Each hop of a route is probed once in this time, which is also the length of the measurement.
const TRACE_INTERVAL: Duration = Duration::from_secs(300);

/// Of the echoes that the traces follow: as rare as may be, so that the figures are those of the traces.
const ECHO_INTERVAL: &str = "60s";

/// Far above what the rounds need, so that the first traces are complete soon. The routers have no limits.
const LIMITS: &str = "trace: {router_rate: 1kpps, agent_rate: 3kpps}";

/// Measurement of the echoes alone.
const ECHOES_ONLY: Duration = Duration::from_secs(60);

/// Time until every path has had its first reply.
const SETTLED: Duration = Duration::from_secs(10);

/// Time from the last first trace to the measurement, for the way back and for retries.
const FIRST_RETRIES: Duration = Duration::from_secs(60);

/// Longest time until all were traced for the first time.
const FIRST_TRACES_TIMEOUT: Duration = Duration::from_secs(120);

/// Pause between two looks at whether they are.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

const MEBI: f64 = 1024.0;

/// The `index`-th destination, in a network that is local to host `b`.
fn destination(index: u16) -> Ipv4Addr {
    let [high, low] = (index + 1).to_be_bytes();
    Ipv4Addr::new(10, 99, high, low)
}

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let net = network();
    let (prober, responder) = (Some(net.share("a")), Some(net.share("b")));
    let responders = (0..RESPONDERS)
        .map(|_| start(&responder, AgentPorts::free(&responder)?, &format!("{LIMITS}\n")))
        .collect::<io::Result<Vec<_>>>()?;
    let idle = responders[0].memory()?.resident;
    let responder_ports: Vec<u16> = responders.iter().map(|agent| agent.stamp_port).collect();
    let echoes = {
        let agent = start_prober(&prober, &responder_ports, "")?;
        sleep(SETTLED);
        CpuTimes::begin(&agent)?.share_after(ECHOES_ONLY)?
    };
    let interval = TRACE_INTERVAL.as_secs();
    let traces = format!("  - {{name: routes, kind: trace, follows: mesh, interval: {interval}s}}\n");
    let agent = start_prober(&prober, &responder_ports, &traces)?;
    let first = FirstTraces::wait_for(&agent)?;
    sleep(FIRST_RETRIES);
    let before = Readings::of(&net, &agent)?;
    let share = CpuTimes::begin(&agent)?.share_after(TRACE_INTERVAL)?;
    let memory = agent.memory()?.resident;
    let after = Readings::of(&net, &agent)?;
    let mut rows = after.rows(&before);
    rows.extend([
        Row::new("… share of one core", share * 100.0, "%"),
        Row::new("… of which the echoes that they follow, once a minute", echoes * 100.0, "%"),
        Row::new("… RSS", memory / MEBI, "MiB"),
        Row::new(
            "… memory of a traced path, with its echoes",
            (memory - idle) / f64::from(DESTINATIONS),
            "KiB",
        ),
        Row::new("… all traced for the first time after", first.duration.as_secs_f64(), "s"),
        Row::new("… first traces: some routers did not answer in time", first.partial, "%"),
        Row::new("… first traces: the destination did not answer in time", first.unreached, "%"),
    ]);
    Ok(rows)
}

/// Hosts `a` and `b` behind three routers that answer as fast as they are probed. All destinations are
/// addresses of `b`.
fn network() -> Net {
    let mut plan = NetPlan::default();
    plan.host("a").host("b");
    for router in ROUTERS {
        plan.router(router);
    }
    plan.cable("a", "r1").cable("r1", "r2").cable("r2", "r3").cable("r3", "b");
    let net = plan.build(1);
    for (hop, node) in ["a", "r1", "r2", "r3"].into_iter().enumerate() {
        net.node(node).ip(&format!("route add 10.99.0.0/16 via 10.77.{hop}.2\n"));
    }
    net.node("b").ip("route add local 10.99.0.0/16 dev lo\n");
    for router in ROUTERS {
        net.node(router).set_sysctl("ipv4/icmp_ratemask", "0");
    }
    net
}

/// Starts an agent with further keys, and waits for its first metrics page.
fn start(namespace: &AgentNamespace, ports: AgentPorts, keys: &str) -> io::Result<BenchAgent> {
    let AgentPorts { http, stamp, agent } = ports;
    let text = format!(
        "agent: {{name: bench-{http}}}\n\
         listen: {{http: \"127.0.0.1:{http}\", stamp: \"0.0.0.0:{stamp}\", agent: \"127.0.0.1:{agent}\"}}\n\
         responder: {{allow: [10.0.0.0/8], rate: 100Mpps, rate_per_source: 100Mpps}}\n\
         metrics: {{series_max: 10000000}}\n\
         log: {{level: \"off\"}}\n{keys}"
    );
    let agent = BenchAgent::launch(namespace, ports, &text)?;
    agent.wait_for(|| agent.scrape())?;
    Ok(agent)
}

/// Starts an agent that measures all destinations, with further probes.
fn start_prober(namespace: &AgentNamespace, ports: &[u16], probes: &str) -> io::Result<BenchAgent> {
    let mut keys = format!(
        "{LIMITS}\nprobes:\n  - {{name: mesh, interval: {ECHO_INTERVAL}, targets: all, peers: []}}\n\
         {probes}targets:\n"
    );
    for (index, port) in (0..DESTINATIONS).zip(ports.iter().cycle()) {
        let _ = writeln!(keys, "  - {{name: host-{index}, address: {}, port: {port}}}", destination(index));
    }
    start(namespace, AgentPorts::free(namespace)?, &keys)
}

/// The first trace of each destination. All begin at the same time.
struct FirstTraces {
    duration: Duration,
    /// Percentages of those that some routers, or the destination, did not answer in time.
    partial: f64,
    unreached: f64,
}

impl FirstTraces {
    /// Waits until every destination was traced.
    fn wait_for(agent: &BenchAgent) -> io::Result<Self> {
        let begin = Instant::now();
        loop {
            let page = Totals::of(&agent.scrape()?);
            let [complete, partial, unreached] = ["complete", "partial", "unreached"].map(|result| {
                let labels = format!("direction=\"forward\",result=\"{result}\"");
                page.get(&format!("pathmeter_trace_traces_total{{{labels}}}"))
            });
            let all = complete + partial + unreached;
            if all >= f64::from(DESTINATIONS) || begin.elapsed() > FIRST_TRACES_TIMEOUT {
                let share = |count: f64| count * 100.0 / all;
                let duration = begin.elapsed();
                return Ok(Self { duration, partial: share(partial), unreached: share(unreached) });
            }
            sleep(POLL_INTERVAL);
        }
    }
}

/// CPU time of an agent from a time on.
struct CpuTimes<'a> {
    agent: &'a BenchAgent,
    begin: Instant,
    used: Duration,
}

impl<'a> CpuTimes<'a> {
    fn begin(agent: &'a BenchAgent) -> io::Result<Self> {
        Ok(Self { agent, begin: Instant::now(), used: agent.cpu()? })
    }

    /// The share of a core in the time until then.
    fn share_after(self, span: Duration) -> io::Result<f64> {
        sleep(span.saturating_sub(self.begin.elapsed()));
        Ok((self.agent.cpu()? - self.used).as_secs_f64() / self.begin.elapsed().as_secs_f64())
    }
}

/// The agent's counters and those of the routers' kernels.
struct Readings {
    at: Instant,
    page: Totals,
    /// ICMP time exceeded that the routers sent.
    time_exceeded: f64,
}

impl Readings {
    fn of(net: &Net, agent: &BenchAgent) -> io::Result<Self> {
        let (at, page) = (Instant::now(), Totals::of(&agent.scrape()?));
        let mut time_exceeded = 0.0;
        for router in ROUTERS {
            time_exceeded += net.node(router).within(time_exceeded_sent)?;
        }
        Ok(Self { at, page, time_exceeded })
    }

    fn rows(&self, before: &Self) -> Vec<Row> {
        let span = (self.at - before.at).as_secs_f64();
        let one = |name: &str, direction: &str| {
            let series = format!("pathmeter_trace_{name}_total{{direction=\"{direction}\"}}");
            self.page.one_since(&before.page, &series)
        };
        // All routers of the route, and the destination.
        let hops = f64::from(u8::try_from(ROUTERS.len()).expect("few"));
        let rate = f64::from(DESTINATIONS) / TRACE_INTERVAL.as_secs_f64();
        let due = rate * (hops + 1.0) * span;
        let mut rows = vec![Row::new(
            format!(
                "traces: {DESTINATIONS} destinations behind {ROUTERS} routers, every {} min, TTL-limited sends due",
                TRACE_INTERVAL.as_secs() / 60,
                ROUTERS = ROUTERS.len()
            ),
            rate * hops,
            "/s",
        )];
        for (direction, name) in [("forward", "there"), ("reverse", "back")] {
            let (sent, answered) = (one("probes", direction), one("answers", direction));
            let series = |reason| {
                format!("pathmeter_trace_deferred_total{{direction=\"{direction}\",reason=\"{reason}\"}}")
            };
            let deferred =
                ["router", "agent"].map(|reason| self.page.one_since(&before.page, &series(reason)));
            let unsent = (due - sent).max(0.0) * 100.0 / due;
            let unanswered = (sent - answered).max(0.0) * 100.0 / sent;
            rows.extend([
                Row::new(format!("… {name}: sent, with those to the end of the route"), sent / span, "/s"),
                Row::new(format!("… {name}: not sent, of those due"), unsent, "%").budget(1.0),
                Row::new(format!("… {name}: not answered, of those sent"), unanswered, "%").budget(1.0),
                Row::new(format!("… {name}: deferred"), deferred.iter().sum::<f64>() / span, "/s"),
            ]);
        }
        let total = |name: &str| self.page.since(&before.page, &format!("pathmeter_{name}_total"));
        rows.extend([
            Row::new(
                "… answers of routers, both ways, by their kernels",
                (self.time_exceeded - before.time_exceeded) / span,
                "/s",
            ),
            Row::new("… unmatched, send errors", total("trace_unmatched") + total("trace_send_errors"), ""),
            Row::new("… echoes in the same time", total("echo_sent") / span, "/s"),
            Row::new(
                "… echoes lost, late, host-dropped, unsent, mismatched",
                ["lost", "late", "host_dropped", "unsent", "mismatched"]
                    .iter()
                    .map(|name| total(&format!("echo_{name}")))
                    .sum(),
                "",
            )
            .budget(0.0),
        ]);
        rows
    }
}

/// ICMP time exceeded that the calling thread's namespace has sent.
fn time_exceeded_sent() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/thread-self/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Icmp: "));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let place = names.split(' ').position(|name| name == "OutTimeExcds");
    let value = place.and_then(|place| values.split(' ').nth(place)?.parse().ok());
    value.ok_or_else(|| io::Error::other("/proc/net/snmp has no OutTimeExcds"))
}
