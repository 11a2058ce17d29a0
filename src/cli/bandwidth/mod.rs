//! `pathmeter probe bandwidth`.

mod latency;
mod summary;

use std::io::{self, IsTerminal as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::bandwidth::harm::HarmLimits;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::{Dscp, DscpError};
use tokio::task::JoinSet;

use self::latency::LatencyWatch;
use self::summary::{ClientResult, Summary, live_line};
use super::target::{Command, ProbeTarget, Request, TargetArguments};
use super::{Failure, print_out, runtime};
use crate::bandwidth::{
    BulkConnections, Grant, LeaseClient, LeaseError, LeaseRequest, Method, QueuePlace, RunOutcome, TcpRun,
};
use crate::config::Probe;
use crate::config::echo::Echo;
use crate::config::probe_options::{Argument, probe_from_options};
use crate::config::units;

#[derive(Debug, Args)]
pub(super) struct BandwidthArguments {
    /// The agent to measure.
    #[arg(value_name = "TARGET", help = TARGET_HELP)]
    target: String,
    /// How to measure
    #[arg(long, short = 'm', default_value = "tcp", value_parser = PossibleValuesParser::new(["tcp"]))]
    method: String,
    /// Direction to load: forward is to TARGET; both: one after the other
    #[arg(long, short = 'd', default_value = "both")]
    #[arg(value_parser = PossibleValuesParser::new(["forward", "reverse", "both"]))]
    direction: String,
    /// Stop after SIZE of payload in each direction; by default as much as TARGET allows
    #[arg(long, value_name = "SIZE")]
    bytes: Option<String>,
    /// Stop after N seconds in each direction
    #[arg(long, short = 't', value_name = "N", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=300))]
    seconds: u64,
    /// Number of connections that share the load
    #[arg(long, short = 'P', value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: u16,
    /// Maximum rate of payload, such as 50Mbit/s
    #[arg(long, value_name = "RATE")]
    rate: Option<String>,
    /// Stop when replies to echo requests are this much later than on the idle path, or missing; off: never
    #[arg(long, value_name = "DURATION|off", default_value = "10ms")]
    added_delay_max: String,
    /// Number of clients that measure at the same time, each with its own lease
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    concurrent: u16,
    #[command(flatten)]
    to: TargetArguments,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

const TARGET_HELP: &str =
    "Name of a peer in --config, or [https://]HOST[:HTTP_PORT] of an agent, which must grant the run";

/// What the arguments ask for.
#[derive(Debug, Clone)]
struct Wanted {
    directions: Vec<RunDirection>,
    bytes: Option<u64>,
    rate_bytes_per_second: Option<u64>,
    /// `None`: a run is never stopped because it does harm.
    harm: Option<HarmLimits>,
    dscp: Dscp,
}

/// Scavenger traffic, which gives way to all other (RFC 8622).
const DSCP: &str = "le";

impl BandwidthArguments {
    fn wanted(&self) -> Result<Wanted, Failure> {
        let usage = |option: &str| {
            let option = option.to_owned();
            move |error: units::UnitError| Failure::Usage(format!("--{option}: {error}"))
        };
        let bytes = self.bytes.as_deref().map(units::size).transpose().map_err(usage("bytes"))?;
        let rate = self.rate.as_deref().map(units::bit_rate).transpose().map_err(usage("rate"))?;
        let harm = match self.added_delay_max.as_str() {
            "off" => None,
            text => {
                let added_delay_max = units::duration(text).map_err(usage("added-delay-max"))?;
                Some(HarmLimits { added_delay_max })
            }
        };
        let directions = match self.direction.as_str() {
            "forward" => vec![RunDirection::Forward],
            "reverse" => vec![RunDirection::Reverse],
            _ => vec![RunDirection::Forward, RunDirection::Reverse],
        };
        let dscp = self.to.dscp.as_deref().unwrap_or(DSCP);
        let dscp =
            dscp.parse().map_err(|error: DscpError| Failure::Usage(format!("--dscp: {dscp} {error}")))?;
        Ok(Wanted { directions, bytes, rate_bytes_per_second: rate.map(|bits| bits.div_ceil(8)), harm, dscp })
    }

    /// The echo probe that watches the latency of the path.
    fn echo(&self) -> Result<Probe, Failure> {
        let text = |text: &str| Argument::Text(text.to_owned());
        let mut options = vec![("protocol", text("udp")), ("interval", text("20ms"))];
        options.extend(self.to.options());
        probe_from_options(options).map_err(Failure::Usage)
    }
}

/// Interval at which the replies of the path are examined and the progress line is updated.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);

/// Examinations of the path between two updates of the progress line.
const WATCHES_PER_LINE: u32 = 10;

/// Measures the target of the arguments and prints the result.
pub(super) fn run(arguments: &BandwidthArguments) -> Result<(), Failure> {
    let (wanted, echo) = (arguments.wanted()?, arguments.echo()?);
    let request = Request {
        command: Command::Bandwidth,
        target: &arguments.target,
        protocol: "udp",
        arguments: &arguments.to,
    };
    let target = ProbeTarget::new(request)?;
    runtime()?.block_on(measure(arguments, &wanted, &echo, target))
}

async fn measure(
    arguments: &BandwidthArguments,
    wanted: &Wanted,
    echo: &Probe,
    mut target: ProbeTarget,
) -> Result<(), Failure> {
    let transport = &echo.kind.downcast::<Echo>().expect("the arguments describe an echo probe").transport;
    let address = target.locate(&arguments.to, echo, transport).await?;
    let runner = Runner {
        wanted: wanted.clone(),
        seconds: arguments.seconds,
        streams: arguments.streams,
        source: arguments.to.source,
        leases: target.lease_client(address, &arguments.to)?,
        address,
        threads: Arc::default(),
    };
    let mut summary = Summary::new(&arguments.target, runner.leases.to);
    for direction in &wanted.directions {
        if arguments.concurrent > 1 {
            summary.add_clients(runner.measure_at_once(*direction, arguments.concurrent).await);
        } else {
            let is_live = !arguments.json && io::stdout().is_terminal();
            let measured = runner.measure(*direction, echo, &target, is_live).await?;
            summary.add(measured);
        }
        if !arguments.json {
            print_out(&summary.text_of(*direction))?;
        }
    }
    if arguments.json {
        print_out(&(summary.json().to_string() + "\n"))?;
    }
    if summary.has_failures() { Err(Failure::AlreadyReported) } else { Ok(()) }
}

/// Measures one target.
#[derive(Debug, Clone)]
struct Runner {
    wanted: Wanted,
    seconds: u64,
    streams: u16,
    source: Option<IpAddr>,
    leases: LeaseClient,
    address: IpAddr,
    threads: Arc<BulkConnections>,
}

/// A run in progress, seen by the thread that runs it and by the one that watches it.
#[derive(Debug, Default)]
struct LiveRun {
    state: Mutex<LiveState>,
}

#[derive(Debug, Clone, Copy, Default)]
struct LiveState {
    progress: Progress,
    stop: Option<StopReason>,
}

impl LiveRun {
    fn update<T>(&self, update: impl FnOnce(&mut LiveState) -> T) -> T {
        update(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Runner {
    /// Waits for a lease.
    async fn lease(
        &self,
        direction: RunDirection,
        on_place: impl FnMut(QueuePlace),
    ) -> Result<Grant, LeaseError> {
        let request = LeaseRequest {
            lease: None,
            method: Method::Tcp,
            direction,
            connections: self.streams,
            bytes_max: self.wanted.bytes,
            seconds_max: self.seconds,
            rate_bytes_per_second: self.wanted.rate_bytes_per_second,
            dscp: self.wanted.dscp.value(),
        };
        self.leases.acquire(request, on_place).await
    }

    /// Runs with a lease, on the thread for bulk connections.
    async fn run(
        &self,
        direction: RunDirection,
        grant: &Grant,
        live: Arc<LiveRun>,
    ) -> anyhow::Result<RunOutcome> {
        let (lease, secret) =
            grant.decode().ok_or_else(|| anyhow!("{} granted no valid lease", self.leases.host))?;
        let run = TcpRun {
            to: SocketAddr::new(self.address, grant.agent_port),
            source: self.source,
            dscp: self.wanted.dscp,
            lease,
            secret,
            direction,
            streams: self.streams,
            bytes_max: grant.bytes_max,
            duration: Duration::from_secs(self.seconds),
            rate_max: grant.rate_bytes_per_second,
        };
        let supervise = move |progress| {
            live.update(|state| {
                state.progress = progress;
                state.stop
            })
        };
        let running = self.threads.runtime()?.spawn(run.run(supervise));
        Ok(running.await??)
    }

    /// Measures one direction and the latency meanwhile.
    async fn measure(
        &self,
        direction: RunDirection,
        echo: &Probe,
        target: &ProbeTarget,
        is_live: bool,
    ) -> Result<RunOutcome, Failure> {
        let show = |line: &str| if is_live { print_out(&format!("\r\x1b[K{line}")) } else { Ok(()) };
        let mut latency = LatencyWatch::start(echo, target, self.address, self.wanted.harm)?;
        show(&format!("{}: measuring the idle path", direction.as_str()))?;
        latency.idle().await;
        let grant = self.lease(direction, |place| {
            let QueuePlace { position, expected_start_seconds } = place;
            // Standard error may be closed.
            let _ = writeln!(
                io::stderr(),
                "waiting for other runs: position {position}, at most {expected_start_seconds:.0} s"
            );
        });
        let grant = grant.await.map_err(anyhow::Error::from)?;
        if !latency.load_begins() && self.wanted.harm.is_some() {
            let _ = writeln!(
                io::stderr(),
                "{} does not answer echo requests: the run is not stopped if it adds delay",
                self.leases.host
            );
        }
        let live = Arc::<LiveRun>::default();
        let mut run = std::pin::pin!(self.run(direction, &grant, Arc::clone(&live)));
        let mut ticker = tokio::time::interval(WATCH_INTERVAL);
        let (mut ticks, mut shown) = (0_u32, Progress::default());
        let outcome = loop {
            tokio::select! {
                outcome = &mut run => break outcome?,
                _ = ticker.tick() => {
                    let harm = latency.check().map(StopReason::from);
                    let progress = live.update(|state| {
                        state.stop = state.stop.or(harm);
                        state.progress
                    });
                    ticks += 1;
                    if ticks.is_multiple_of(WATCHES_PER_LINE) {
                        show(&live_line(direction, shown, progress, latency.last_rtt()))?;
                        shown = progress;
                    }
                }
                _ = tokio::signal::ctrl_c() => live.update(|state| state.stop = Some(StopReason::Operator)),
            }
        };
        show("")?;
        latency.check();
        Ok(outcome.with_latency(latency.result()))
    }

    /// Measures one direction with several clients at the same time.
    async fn measure_at_once(&self, direction: RunDirection, clients: u16) -> Vec<ClientResult> {
        let mut tasks = JoinSet::new();
        for client in 1..=clients {
            let runner = self.clone();
            tasks.spawn(async move {
                let outcome = match runner.lease(direction, |_| {}).await {
                    Ok(grant) => runner.run(direction, &grant, Arc::default()).await,
                    Err(error) => Err(error.into()),
                };
                ClientResult { client, direction, outcome: outcome.map_err(|error| format!("{error:#}")) }
            });
        }
        tasks.join_all().await
    }
}
