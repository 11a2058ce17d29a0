//! What an echo costs whoever asks and whoever answers, over each transport, and what its round trips look like.

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

use super::agent::{Agent, Home};
use super::bare::per_echo;
use super::report::{median, short};
use agents::{Duty, Village};
use round_trips::RoundTrips;

/// What is measured over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Udp,
    Icmp(Sockets),
    Tcp,
    WebSocket { format: MessageFormat, is_secure: bool },
    Http { is_secure: bool },
}

/// With what ICMP is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sockets {
    /// Those that need no privilege.
    Ping,
    Raw,
}

/// One line of the table: so many paths, each asked so often.
#[derive(Debug, Clone, Copy)]
struct Load {
    name: &'static str,
    over: Over,
    paths: u32,
    interval: Duration,
}

/// A thousand echoes a second over `over`, from a hundred paths.
const fn hundred(name: &'static str, over: Over) -> Load {
    Load { name, over, paths: 100, interval: Duration::from_millis(100) }
}

const ALL: [Load; 10] = [
    hundred("UDP", Over::Udp),
    hundred("ICMP, ping sockets", Over::Icmp(Sockets::Ping)),
    hundred("ICMP, raw sockets", Over::Icmp(Sockets::Raw)),
    Load {
        name: "ICMP, ping sockets, 1,000 targets at 1/s",
        over: Over::Icmp(Sockets::Ping),
        paths: 1_000,
        interval: Duration::from_secs(1),
    },
    hundred("TCP", Over::Tcp),
    hundred("WebSocket, text", Over::WebSocket { format: MessageFormat::Text, is_secure: false }),
    hundred("WebSocket, binary", Over::WebSocket { format: MessageFormat::Binary, is_secure: false }),
    hundred("WebSocket with TLS, text", Over::WebSocket { format: MessageFormat::Text, is_secure: true }),
    hundred("HTTP", Over::Http { is_secure: false }),
    hundred("HTTPS", Over::Http { is_secure: true }),
];

const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(5);
/// Until every path is connected and the peers have been asked who they are, which they are again after a minute.
const SETTLED: Duration = Duration::from_secs(4);

const HEAD: &str = "
### Transports

| over | CPU per echo, prober | bare loop | × | CPU per echo, responder | bare loop | × | RTT p50 | p99 | p99.9 | user stamps: sent, received | lost, unsent |
|---|---|---|---|---|---|---|---|---|---|---|---|";

/// Prints a table.
pub(crate) fn measure(out: &mut dyn Write) -> io::Result<()> {
    let home = home();
    writeln!(out, "{HEAD}")?;
    if home.is_none() {
        writeln!(out, "| ICMP is left out: it needs a network namespace, and so root |{}", "|".repeat(11))?;
    }
    for load in ALL {
        let is_here = match load.over {
            Over::Icmp(_) => home.is_some(),
            Over::WebSocket { is_secure, .. } | Over::Http { is_secure } => {
                !is_secure || cfg!(feature = "tls")
            }
            Over::Udp | Over::Tcp => true,
        };
        if is_here {
            writeln!(out, "{}", line(&load, &home)?)?;
        }
    }
    Ok(())
}

/// A network of its own, in which ICMP may be opened to everybody. `None` where this process may not make one.
fn home() -> Home {
    let may = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET).is_ok());
    may.join().expect("it does not panic").then(|| Arc::new(Namespace::new("bench")))
}

/// Groups that may open ping sockets.
const ROOT: &str = "0 0";
const NOBODY: &str = "1 0";

fn open_to(home: &Home, groups: &str) {
    if let Some(namespace) = home {
        namespace.set("ipv4/ping_group_range", groups);
    }
}

fn line(load: &Load, home: &Home) -> io::Result<String> {
    let groups = match load.over {
        Over::Icmp(Sockets::Raw) => NOBODY,
        Over::Icmp(Sockets::Ping) | Over::Udp | Over::Tcp | Over::WebSocket { .. } | Over::Http { .. } => {
            ROOT
        }
    };
    open_to(home, groups);
    let village = Village::new(load, home)?;
    let responder = village.responder()?;
    let rounds = rounds(load, &village, &responder)?;
    open_to(home, groups);
    let found = round_trips::measure(load, &village)?;
    Ok(row(load, &rounds, &found))
}

/// CPU time of an echo in microseconds.
#[derive(Debug, Clone, Copy)]
struct Cost {
    prober: f64,
    /// `None` where the kernel answers.
    responder: Option<f64>,
}

/// What an echo takes of two agents, each a process of its own, beyond what they take while the same paths are hardly
/// asked; and of bare loops right after that.
struct Round {
    ours: Cost,
    bare: Cost,
}

fn rounds(load: &Load, village: &Village<'_>, responder: &Agent) -> io::Result<Vec<Round>> {
    let idle = {
        let prober = village.prober(&Duty::Idle)?;
        sleep(SETTLED);
        Used::within(ROUND, &prober, responder)?
    };
    let prober = village.prober(&Duty::Ask)?;
    sleep(SETTLED);
    // It has its sockets by now.
    open_to(&village.home, ROOT);
    let answered = || prober.scrape().map(|page| page.sum("pathmeter_echo_rtt_seconds_count"));
    let has_responder = !matches!(load.over, Over::Icmp(_));
    let round = || {
        let before = answered()?;
        let used = Used::within(ROUND, &prober, responder)?;
        let echoes = answered()? - before;
        let each = |used: Duration, idle: Duration| per_echo(used.saturating_sub(idle), echoes);
        let answering = has_responder.then(|| each(used.responder, idle.responder));
        let ours = Cost { prober: each(used.prober, idle.prober), responder: answering };
        Ok(Round { ours, bare: bare::cost(load, &village.home, ROUND)? })
    };
    (0..ROUNDS).map(|_| round()).collect()
}

/// CPU time of two processes.
struct Used {
    prober: Duration,
    responder: Duration,
}

impl Used {
    fn within(span: Duration, prober: &Agent, responder: &Agent) -> io::Result<Self> {
        let (asking, answering, begin) = (prober.cpu()?, responder.cpu()?, Instant::now());
        sleep(span);
        // A machine that stands still for a while makes the window longer.
        let scale = span.as_secs_f64() / begin.elapsed().as_secs_f64();
        Ok(Self {
            prober: (prober.cpu()? - asking).mul_f64(scale),
            responder: (responder.cpu()? - answering).mul_f64(scale),
        })
    }
}

fn row(load: &Load, rounds: &[Round], found: &RoundTrips) -> String {
    let micros = |cost: f64| format!("{} µs", short(cost));
    let cells = [
        vec![load.name.to_owned()],
        beside(rounds, |cost| Some(cost.prober)),
        beside(rounds, |cost| cost.responder),
        [0.5, 0.99, 0.999].map(|q| micros(found.quantile(q))).to_vec(),
        vec![
            format!("{} %, {} %", short(found.user_sent), short(found.user_received)),
            format!("{}, {}", found.lost, found.unsent),
        ],
    ];
    format!("| {} |", cells.concat().join(" | "))
}

/// Medians of ours, of the bare loop's, and of their ratios.
fn beside(rounds: &[Round], figure: fn(&Cost) -> Option<f64>) -> Vec<String> {
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
