//! `pathmeter probe trace`.

mod enumeration;
#[cfg(test)]
mod fixture;
mod names;
mod route_json;
mod route_text;
mod routes;
mod table;
mod timeouts;
mod watcher;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::probe_budget::ProbeBudget;
use tokio::sync::mpsc::{channel, unbounded_channel};

use self::enumeration::enumerate;
use self::names::names_text;
use self::routes::Routes;
use self::watcher::Watcher;
use super::target::{Command, ProbeTarget, Request, TargetArguments};
use super::{Failure, print_out, runtime, seed};
use crate::bulk::Bulk;
use crate::config::echo::Echo;
use crate::config::probe_options::{Argument, probe_from_options};
use crate::config::trace;
use crate::config::units::{display, duration};
use crate::config::{Probe, TraceMethod};
use crate::datagram::{self, TimestampMatching};
use crate::loops::EVENTS_PENDING_MAX;
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, OwnFlowPermission, StartContext};
use crate::stream;
use crate::trace::TraceParameters;

#[derive(Debug, Args)]
pub(super) struct TraceArguments {
    /// The host to trace.
    #[arg(value_name = "TARGET", help = TARGET_HELP)]
    target: String,
    /// Packets to send: udp (an agent or a STAMP reflector answers), icmp (any host), tcp (any TCP port)
    #[arg(long, default_value = "udp", value_parser = PossibleValuesParser::new(["udp", "icmp", "tcp"]))]
    protocol: String,
    /// Largest TTL
    #[arg(long, short = 'm', default_value_t = 30, value_parser = clap::value_parser!(u8).range(1..=MAX_HOPS.into()))]
    max_hops: u8,
    /// Number of flows, 1 to 16: routers may send each over another of several equal paths; with tcp always 1
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    flows: u16,
    /// Find all equal-cost paths, with up to 96 flows over UDP: takes minutes if routers limit their answers
    #[arg(long, conflicts_with_all = ["flows", "wait"])]
    enumerate: bool,
    /// If TARGET does not answer: time to wait for a late rejection by a router, up to 60s; not with tcp
    #[arg(long, short = 'w', default_value = "0s", value_name = "DURATION", value_parser = wait)]
    wait: Duration,
    /// Show addresses only, without a look-up of the names of routers
    #[arg(long, short = 'n')]
    numeric: bool,
    #[command(flatten)]
    to: TargetArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

const TARGET_HELP: &str = "Name of a peer or target in --config, or [https://]HOST[:HTTP_PORT] of an agent; \
                           with --port, HOST of a STAMP reflector; with --protocol icmp or tcp, any HOST";

/// The largest value of `--wait`.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Parses the value of `--wait`.
fn wait(text: &str) -> Result<Duration, String> {
    let wait = duration(text).map_err(|error| format!("{}; {}", error.what(), error.remedy()))?;
    if wait <= WAIT_MAX { Ok(wait) } else { Err(format!("write 0s to {}", display(WAIT_MAX))) }
}

/// The largest value of `--max-hops`.
const MAX_HOPS: u8 = 64;

/// Traces the target of the arguments and prints the routes.
pub(super) fn run(arguments: &TraceArguments) -> Result<(), Failure> {
    let TraceArguments { protocol, flows, .. } = arguments;
    let mut options = vec![("protocol", Argument::Text(protocol.clone()))];
    match (protocol.as_str(), flows) {
        ("tcp", 1) => {}
        ("tcp", _) => {
            let problem = "--flows is not valid with --protocol tcp, whose segments all have the same ports";
            return Err(Failure::Usage(problem.to_owned()));
        }
        (_, flows) => options.push(("flows", Argument::Number(*flows))),
    }
    if protocol == "tcp" && !arguments.wait.is_zero() {
        let problem = "--wait is not valid with --protocol tcp, whose connection attempts have ended by then";
        return Err(Failure::Usage(problem.to_owned()));
    }
    if arguments.to.port.is_some() && protocol == "icmp" {
        return Err(Failure::Usage(
            "--port is not valid with --protocol icmp, which has no ports".to_owned(),
        ));
    }
    if arguments.enumerate && protocol != "udp" {
        return Err(Failure::Usage("--enumerate needs --protocol udp".to_owned()));
    }
    options.extend(arguments.to.options());
    let probe = probe_from_options(options).map_err(Failure::Usage)?;
    let (command, target) = (Command::Trace, arguments.target.as_str());
    let request = Request { command, target, protocol, arguments: &arguments.to };
    let target = ProbeTarget::new(request)?;
    runtime()?.block_on(trace(arguments, &probe, target))
}

async fn trace(arguments: &TraceArguments, probe: &Probe, mut target: ProbeTarget) -> Result<(), Failure> {
    let echo = probe.kind.downcast::<Echo>().expect("the options describe an echo probe");
    let address = target.locate(&arguments.to, probe, &echo.transport).await?;
    let limits = target.settings().config.trace.probe_limits();
    let (sender, mut reports) = unbounded_channel();
    let (events_sender, mut events) = channel(EVENTS_PENDING_MAX);
    let loops = Loops {
        prober: datagram::spawn("prober", Vec::new(), TimestampMatching::detect(), events_sender.clone())?,
        streams: stream::spawn(events_sender)?,
        probe_budget: Arc::new(Mutex::new(ProbeBudget::new(limits))),
        traces: Arc::default(),
        quoted_headers: Arc::default(),
        own_flow: OwnFlowPermission::default(),
        bulk: Bulk::default(),
    };
    let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
    let key = PathKey { probe: "once".into(), peer: target.name().into(), family };
    let start = StartContext {
        id: PathId(1),
        key: &key,
        settings: target.settings(),
        loops: &loops,
        peer_left_at: None,
        seed: seed()?,
        followed: Arc::default(),
    };
    let traced = trace::Trace {
        follows: String::new(),
        transport: echo.transport.clone(),
        hops_max: arguments.max_hops,
        method: TraceMethod::Unprivileged,
        hop_metrics: false,
    };
    let parameters = TraceParameters { probe, trace: &traced, remote: target.remote(), address };
    if arguments.enumerate {
        let outcome = enumerate(arguments, parameters, &start, &mut events).await;
        loops.stop(Duration::ZERO);
        while events.recv().await.is_some() {}
        return outcome;
    }
    let to = SocketAddr::new(address, target.remote().port(&echo.transport));
    crate::trace::start(parameters, &start, sender);
    let mut routes = Routes::new(arguments, to);
    if !arguments.json {
        print_out(&routes.title())?;
    }
    let mut watcher = Watcher { routes: &mut routes, reports: &mut reports, events: &mut events };
    let outcome = watcher.watch().await;
    loops.stop(Duration::ZERO);
    // The threads drop their senders when they end.
    while events.recv().await.is_some() {}
    if arguments.json && (outcome.is_ok() || routes.has_trace()) {
        print_out(&(routes.json().to_string() + "\n"))?;
    }
    outcome?;
    if !arguments.json && !arguments.numeric {
        print_out(&names_text(routes.routers()).await)?;
    }
    if routes.is_reached() { Ok(()) } else { Err(Failure::AlreadyReported) }
}
