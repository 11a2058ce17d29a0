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

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::probe_budget::ProbeBudget;
use tokio::sync::mpsc::{Receiver, channel, unbounded_channel};

use self::enumeration::print_enumeration;
use self::names::names_text;
pub(super) use self::routes::{DirectedFlow, Routes};
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
use crate::loops::{EVENTS_PENDING_MAX, LoopEvent};
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
    #[arg(long, short = 'm', default_value_t = MAX_HOPS_DEFAULT, value_parser = clap::value_parser!(u8).range(1..=MAX_HOPS.into()))]
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

/// Time in which the router of the target's link reports that it has not found the target for three seconds.
const LATE_REJECTION_WAIT: Duration = Duration::from_secs(4);

/// The largest value of `--wait`.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Parses the value of `--wait`.
fn wait(text: &str) -> Result<Duration, String> {
    let wait = duration(text).map_err(|error| format!("{}; {}", error.what(), error.remedy()))?;
    if wait <= WAIT_MAX { Ok(wait) } else { Err(format!("write 0s to {}", display(WAIT_MAX))) }
}

/// The largest value of `--max-hops`.
const MAX_HOPS: u8 = 64;

/// As of traceroute(8).
const MAX_HOPS_DEFAULT: u8 = 30;

impl TraceArguments {
    /// One flow, and a late rejection is waited for; the other options have their defaults.
    pub(super) fn of_one_flow(target: String, protocol: String, to: TargetArguments) -> Self {
        let wait = if protocol == "tcp" { Duration::ZERO } else { LATE_REJECTION_WAIT };
        Self {
            target,
            protocol,
            max_hops: MAX_HOPS_DEFAULT,
            flows: 1,
            enumerate: false,
            wait,
            numeric: true,
            to,
            json: false,
        }
    }

    /// The echo probe whose packets are traced. The rules are those of a configuration file.
    fn probe(&self) -> Result<Probe, Failure> {
        let Self { protocol, flows, .. } = self;
        let mut options = vec![("protocol", Argument::Text(protocol.clone()))];
        match (protocol.as_str(), flows) {
            ("tcp", 1) => {}
            ("tcp", _) => {
                let problem =
                    "--flows is not valid with --protocol tcp, whose segments all have the same ports";
                return Err(Failure::Usage(problem.to_owned()));
            }
            (_, flows) => options.push(("flows", Argument::Number(*flows))),
        }
        if protocol == "tcp" && !self.wait.is_zero() {
            let problem =
                "--wait is not valid with --protocol tcp, whose connection attempts have ended by then";
            return Err(Failure::Usage(problem.to_owned()));
        }
        if self.to.port.is_some() && protocol == "icmp" {
            return Err(Failure::Usage(
                "--port is not valid with --protocol icmp, which has no ports".to_owned(),
            ));
        }
        if self.enumerate && protocol != "udp" {
            return Err(Failure::Usage("--enumerate needs --protocol udp".to_owned()));
        }
        options.extend(self.to.options());
        probe_from_options(options).map_err(Failure::Usage)
    }
}

/// Traces the target of the arguments and prints the routes.
pub(super) fn run(arguments: &TraceArguments) -> Result<(), Failure> {
    let measurement = TraceMeasurement::new(arguments)?;
    runtime()?.block_on(async {
        let session = measurement.start().await?;
        if arguments.enumerate {
            return session.enumerate().await;
        }
        let mut routes = session.routes();
        if !arguments.json {
            print_out(&routes.title())?;
        }
        let outcome = session.trace(&mut routes, !arguments.json).await;
        if arguments.json && (outcome.is_ok() || routes.has_trace()) {
            print_out(&(routes.json().to_string() + "\n"))?;
        }
        outcome?;
        if !arguments.json && !arguments.numeric {
            print_out(&names_text(routes.routers()).await)?;
        }
        if routes.is_reached() { Ok(()) } else { Err(Failure::AlreadyReported) }
    })
}

/// What to trace, before anything is sent.
pub(super) struct TraceMeasurement<'a> {
    arguments: &'a TraceArguments,
    probe: Probe,
    target: ProbeTarget,
}

impl<'a> TraceMeasurement<'a> {
    /// # Errors
    /// If the arguments are not valid, or the target is not in the configuration.
    pub(super) fn new(arguments: &'a TraceArguments) -> Result<Self, Failure> {
        let probe = arguments.probe()?;
        let (target, protocol) = (arguments.target.as_str(), arguments.protocol.as_str());
        let request = Request { command: Command::Trace, target, protocol, arguments: &arguments.to };
        Ok(Self { arguments, probe, target: ProbeTarget::new(request)? })
    }

    /// Finds the target, and starts the threads that measure.
    pub(super) async fn start(self) -> Result<TraceSession<'a>, Failure> {
        let Self { arguments, probe, mut target } = self;
        let echo = probe.kind.downcast::<Echo>().expect("the options describe an echo probe");
        let transport = echo.transport.clone();
        let address = target.locate(&arguments.to, &probe, &transport).await?;
        let limits = target.settings().config.trace.probe_limits();
        let (sender, events) = channel(EVENTS_PENDING_MAX);
        let loops = Loops {
            prober: datagram::spawn("prober", Vec::new(), TimestampMatching::detect(), sender.clone())?,
            streams: stream::spawn(sender)?,
            probe_budget: Arc::new(Mutex::new(ProbeBudget::new(limits))),
            traces: Arc::default(),
            quoted_headers: Arc::default(),
            own_flow: OwnFlowPermission::default(),
            bulk: Bulk::default(),
        };
        let traced = trace::Trace {
            follows: String::new(),
            transport,
            hops_max: arguments.max_hops,
            method: TraceMethod::Unprivileged,
            hop_metrics: false,
        };
        let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
        let key = PathKey { probe: "once".into(), peer: target.name().into(), family };
        Ok(TraceSession { arguments, probe, target, address, loops, events, traced, key, seed: seed()? })
    }
}

/// A measurement whose address is known.
pub(super) struct TraceSession<'a> {
    arguments: &'a TraceArguments,
    probe: Probe,
    target: ProbeTarget,
    address: IpAddr,
    loops: Loops,
    events: Receiver<LoopEvent>,
    traced: trace::Trace,
    key: PathKey,
    seed: u64,
}

impl<'a> TraceSession<'a> {
    /// No routes yet.
    pub(super) fn routes(&self) -> Routes<'a> {
        let port = self.target.remote().port(&self.traced.transport);
        Routes::new(self.arguments, SocketAddr::new(self.address, port))
    }

    /// Traces the target, and prints each hop as soon as it is known if `is_printed`. If the future is
    /// dropped, the routes have what is known so far.
    pub(super) async fn trace(mut self, routes: &mut Routes<'_>, is_printed: bool) -> Result<(), Failure> {
        let (sender, mut reports) = unbounded_channel();
        crate::trace::start(self.parameters(), &self.context(), sender);
        let (reports, events) = (&mut reports, &mut self.events);
        let outcome = Watcher { routes, reports, events, is_printed }.watch().await;
        self.stop().await;
        outcome
    }

    async fn enumerate(mut self) -> Result<(), Failure> {
        let (sender, mut reports) = unbounded_channel();
        crate::trace::enumerate(self.parameters(), &self.context(), sender);
        let outcome = print_enumeration(self.arguments, self.address, &mut reports, &mut self.events).await;
        self.stop().await;
        outcome
    }

    fn parameters(&self) -> TraceParameters<'_> {
        let remote = self.target.remote();
        TraceParameters { probe: &self.probe, trace: &self.traced, remote, address: self.address }
    }

    fn context(&self) -> StartContext<'_> {
        StartContext {
            id: PathId(1),
            key: &self.key,
            settings: self.target.settings(),
            loops: &self.loops,
            peer_left_at: None,
            seed: self.seed,
            followed: Arc::default(),
        }
    }

    /// Waits until the threads have ended: they drop their senders then.
    async fn stop(mut self) {
        self.loops.stop(Duration::ZERO);
        while self.events.recv().await.is_some() {}
    }
}
