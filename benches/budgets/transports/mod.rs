//! Cost of an echo for prober and responder over each transport, and its round trips.

mod agents;
mod bare;
mod round_trips;

use std::io::{self, Write};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use pathmeter_lab::Namespace;
use pathmeter_proto::wire::websocket::MessageFormat;

use super::agent::{AgentNamespace, BenchAgent};
use super::bare::per_echo;
use super::report::{median, short};
use agents::{ProberMode, TransportSetup};
use round_trips::RttSamples;

/// Transport of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CaseTransport {
    Udp,
    Icmp(IcmpSockets),
    Tcp,
    WebSocket { format: MessageFormat, is_secure: bool },
    Http { is_secure: bool },
}

/// Sockets for ICMP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IcmpSockets {
    /// Ping sockets, which need no privilege.
    Ping,
    Raw,
}

/// A row of the table.
#[derive(Debug, Clone, Copy)]
struct TransportCase {
    name: &'static str,
    transport: CaseTransport,
    paths: u32,
    interval: Duration,
}

/// A thousand echoes a second over `transport`, from a hundred paths.
const fn hundred(name: &'static str, transport: CaseTransport) -> TransportCase {
    TransportCase { name, transport, paths: 100, interval: Duration::from_millis(100) }
}

const ALL: [TransportCase; 10] = [
    hundred("UDP", CaseTransport::Udp),
    hundred("ICMP, ping sockets", CaseTransport::Icmp(IcmpSockets::Ping)),
    hundred("ICMP, raw sockets", CaseTransport::Icmp(IcmpSockets::Raw)),
    TransportCase {
        name: "ICMP, ping sockets, 1,000 targets at 1/s",
        transport: CaseTransport::Icmp(IcmpSockets::Ping),
        paths: 1_000,
        interval: Duration::from_secs(1),
    },
    hundred("TCP", CaseTransport::Tcp),
    hundred("WebSocket, text", CaseTransport::WebSocket { format: MessageFormat::Text, is_secure: false }),
    hundred(
        "WebSocket, binary",
        CaseTransport::WebSocket { format: MessageFormat::Binary, is_secure: false },
    ),
    hundred(
        "WebSocket with TLS, text",
        CaseTransport::WebSocket { format: MessageFormat::Text, is_secure: true },
    ),
    hundred("HTTP", CaseTransport::Http { is_secure: false }),
    hundred("HTTPS", CaseTransport::Http { is_secure: true }),
];

const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(5);
/// Time until every path is connected and the peers are identified. Peers are polled again after a minute.
const SETTLED: Duration = Duration::from_secs(4);

const HEAD: &str = "
### Transports

| over | CPU per echo, prober | bare loop | × | CPU per echo, responder | bare loop | × | RTT p50 | p99 | p99.9 | user timestamps: transmit, receive | lost, unsent |
|---|---|---|---|---|---|---|---|---|---|---|---|";

/// Prints a table.
pub(crate) fn measure(out: &mut dyn Write) -> io::Result<()> {
    let namespace = namespace();
    writeln!(out, "{HEAD}")?;
    if namespace.is_none() {
        writeln!(out, "| ICMP is left out: it needs a network namespace, and so root |{}", "|".repeat(11))?;
    }
    for load in ALL {
        let is_here = match load.transport {
            CaseTransport::Icmp(_) => namespace.is_some(),
            CaseTransport::WebSocket { is_secure, .. } | CaseTransport::Http { is_secure } => {
                !is_secure || cfg!(feature = "tls")
            }
            CaseTransport::Udp | CaseTransport::Tcp => true,
        };
        if is_here {
            writeln!(out, "{}", measure_case(&load, &namespace)?)?;
        }
    }
    Ok(())
}

/// A network namespace in which ICMP can be permitted. `None` if this process may not create one.
fn namespace() -> AgentNamespace {
    let may = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET).is_ok());
    may.join().expect("it does not panic").then(|| Arc::new(Namespace::new("bench")))
}

/// Groups that may open ping sockets: root, none.
const ROOT: &str = "0 0";
const NO_GROUP: &str = "1 0";

fn open_to(namespace: &AgentNamespace, groups: &str) {
    if let Some(namespace) = namespace {
        namespace.set_sysctl("ipv4/ping_group_range", groups);
    }
}

fn measure_case(load: &TransportCase, namespace: &AgentNamespace) -> io::Result<String> {
    let groups = match load.transport {
        CaseTransport::Icmp(IcmpSockets::Raw) => NO_GROUP,
        CaseTransport::Icmp(IcmpSockets::Ping)
        | CaseTransport::Udp
        | CaseTransport::Tcp
        | CaseTransport::WebSocket { .. }
        | CaseTransport::Http { .. } => ROOT,
    };
    open_to(namespace, groups);
    let setup = TransportSetup::new(load, namespace)?;
    let responder = setup.responder()?;
    let rounds = rounds(load, &setup, &responder)?;
    open_to(namespace, groups);
    let found = round_trips::measure(load, &setup)?;
    Ok(row(load, &rounds, &found))
}

/// CPU time per echo in microseconds.
#[derive(Debug, Clone, Copy)]
struct EchoCost {
    prober: f64,
    /// `None` if the kernel answers.
    responder: Option<f64>,
}

/// CPU time per echo of two agents in separate processes, minus their CPU time with hardly any echoes on the
/// same paths; and of bare loops right after.
struct CostRound {
    ours: EchoCost,
    bare: EchoCost,
}

fn rounds(
    load: &TransportCase,
    setup: &TransportSetup<'_>,
    responder: &BenchAgent,
) -> io::Result<Vec<CostRound>> {
    let idle = {
        let prober = setup.prober(&ProberMode::Idle)?;
        sleep(SETTLED);
        CpuUsed::within(ROUND, &prober, responder)?
    };
    let prober = setup.prober(&ProberMode::Probe)?;
    sleep(SETTLED);
    // The agent has opened its sockets by now.
    open_to(&setup.namespace, ROOT);
    let answered = || prober.scrape().map(|page| page.sum("pathmeter_echo_rtt_seconds_count"));
    let has_responder = !matches!(load.transport, CaseTransport::Icmp(_));
    let round = || {
        let before = answered()?;
        let used = CpuUsed::within(ROUND, &prober, responder)?;
        let echoes = answered()? - before;
        let each = |used: Duration, idle: Duration| per_echo(used.saturating_sub(idle), echoes);
        let answering = has_responder.then(|| each(used.responder, idle.responder));
        let ours = EchoCost { prober: each(used.prober, idle.prober), responder: answering };
        Ok(CostRound { ours, bare: bare::cost(load, &setup.namespace, ROUND)? })
    };
    (0..ROUNDS).map(|_| round()).collect()
}

/// CPU time of two processes.
struct CpuUsed {
    prober: Duration,
    responder: Duration,
}

impl CpuUsed {
    fn within(span: Duration, prober: &BenchAgent, responder: &BenchAgent) -> io::Result<Self> {
        let (asking, answering, begin) = (prober.cpu()?, responder.cpu()?, Instant::now());
        sleep(span);
        // A pause of the machine makes the window longer.
        let scale = span.as_secs_f64() / begin.elapsed().as_secs_f64();
        Ok(Self {
            prober: (prober.cpu()? - asking).mul_f64(scale),
            responder: (responder.cpu()? - answering).mul_f64(scale),
        })
    }
}

fn row(load: &TransportCase, rounds: &[CostRound], found: &RttSamples) -> String {
    let micros = |cost: f64| format!("{} µs", short(cost));
    let cells = [
        vec![load.name.to_owned()],
        compare_columns(rounds, |cost| Some(cost.prober)),
        compare_columns(rounds, |cost| cost.responder),
        [0.5, 0.99, 0.999].map(|q| micros(found.quantile(q))).to_vec(),
        vec![
            format!("{} %, {} %", short(found.user_sent), short(found.user_received)),
            format!("{}, {}", found.lost, found.unsent),
        ],
    ];
    format!("| {} |", cells.concat().join(" | "))
}

/// Medians of pathmeter, of the bare loop, and of their ratios.
fn compare_columns(rounds: &[CostRound], figure: fn(&EchoCost) -> Option<f64>) -> Vec<String> {
    let pairs: Option<Vec<(f64, f64)>> =
        rounds.iter().map(|round| figure(&round.ours).zip(figure(&round.bare))).collect();
    let Some(pairs) = pairs else { return vec!["–".to_owned(); 3] };
    let of = |figure: fn(&(f64, f64)) -> f64| short(median(pairs.iter().map(figure).collect()));
    vec![
        format!("{} µs", of(|pair| pair.0)),
        format!("{} µs", of(|pair| pair.1)),
        of(|(ours, bare)| ours / bare),
    ]
}
