//! `pathmeter probe bandwidth`.

mod summary;

use std::io::{self, IsTerminal as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::bandwidth::harm::HarmLimits;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::bandwidth::{RunDirection, StopReason};
use pathmeter_proto::dscp::{Dscp, DscpError};
use tokio::task::JoinSet;

use self::summary::{ClientResult, live_line};
pub(super) use self::summary::{DirectionName, Summary};
use super::interrupt::Interrupt;
use super::target::{Command, ProbeTarget, Request, TargetArguments};
use super::{Failure, print_out, runtime, seed};
use crate::bandwidth::latency::{LatencyWatch, PathEchoes, echo_probe};
use crate::bandwidth::run::measure as measure_run;
use crate::bulk::{
    BulkThreads, Grant, LeaseClient, LeaseError, LeaseRequest, QueuePlace, Run, RunMethod, RunOutcome,
};
use crate::config::Probe;
use crate::config::bandwidth::{CHECK_TIME, Method, TRAIN_BYTES, check_bytes};
use crate::config::echo::Echo;
use crate::config::units;
use crate::datagram::{self, DatagramHandle, TimestampMatching};
use crate::echo::EchoPlan;
use crate::loops::EVENTS_PENDING_MAX;
use crate::paths::PathId;

#[derive(Debug, Args)]
pub(super) struct BandwidthArguments {
    /// The agent to measure.
    #[arg(value_name = "TARGET", help = TARGET_HELP)]
    target: String,
    /// How to measure: tcp: payload over connections; train: short trains of datagrams, whose dispersion
    /// tells the rate of the narrowest link, 300kB unless --bytes is given; check: whether the path carries
    /// --rate, for 1 s unless --seconds is given
    #[arg(long, short = 'm', default_value = DEFAULT_METHOD)]
    #[arg(value_parser = PossibleValuesParser::new([DEFAULT_METHOD, "train", "check"]))]
    method: String,
    /// Direction to load: forward is to TARGET; both: one after the other
    #[arg(long, short = 'd', default_value = "both")]
    #[arg(value_parser = PossibleValuesParser::new(["forward", "reverse", "both"]))]
    direction: String,
    #[command(flatten)]
    load: LoadArguments,
    #[command(flatten)]
    to: TargetArguments,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// How long, and how much, a path is loaded.
#[derive(Debug, Clone, Args)]
pub(super) struct LoadArguments {
    /// Stop after SIZE of payload in each direction; by default as much as TARGET allows, or as the
    /// method needs
    #[arg(long, value_name = "SIZE")]
    bytes: Option<String>,
    /// Stop after N seconds in each direction; by default 10
    #[arg(long, short = 't', value_name = "N", value_parser = clap::value_parser!(u64).range(1..=300))]
    seconds: Option<u64>,
    /// Number of connections that share the load
    #[arg(long, short = 'P', value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: u16,
    /// Maximum rate of payload, such as 50Mbit/s; a check requires it
    #[arg(long, value_name = "RATE")]
    rate: Option<String>,
    /// Stop when replies to echo requests are this much later than on the idle path, or missing; off: never
    #[arg(long, value_name = "DURATION|off", default_value = "10ms")]
    added_delay_max: String,
    /// Number of clients that measure at the same time, each with its own lease; above 1 the latency under
    /// load is not measured, and delay stops no run
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    concurrent: u16,
}

const TARGET_HELP: &str =
    "Name of a peer in --config, or [https://]HOST[:HTTP_PORT] of an agent, which must grant the run";

/// The default method.
const DEFAULT_METHOD: &str = "tcp";

/// What the arguments ask for.
#[derive(Debug, Clone)]
struct Wanted {
    method: Method,
    seconds: u64,
    directions: Vec<RunDirection>,
    bytes: Option<u64>,
    rate_bytes_per_second: Option<u64>,
    /// `None`: a run is never stopped because it does harm.
    harm: Option<HarmLimits>,
    dscp: Dscp,
}

/// Smallest values, as in a configuration file.
const RATE_MIN: u64 = 100_000;
const ADDED_DELAY_MIN: Duration = Duration::from_millis(1);

/// Seconds of a run, except of a check.
const DEFAULT_SECONDS: u64 = 10;

/// Scavenger traffic, which gives way to all other (RFC 8622).
const DSCP: &str = "le";

impl BandwidthArguments {
    /// A measurement of one direction.
    pub(super) fn of_direction(
        direction: RunDirection,
        target: String,
        load: LoadArguments,
        to: TargetArguments,
        json: bool,
    ) -> Self {
        Self {
            target,
            method: DEFAULT_METHOD.to_owned(),
            direction: direction.as_str().to_owned(),
            load,
            to,
            json,
        }
    }

    fn wanted(&self) -> Result<Wanted, Failure> {
        let usage = |option: &str| {
            let option = option.to_owned();
            move |error: units::UnitError| Failure::Usage(format!("--{option}: {error}"))
        };
        let bytes = self.load.bytes.as_deref().map(units::size).transpose().map_err(usage("bytes"))?;
        let rate = self.load.rate.as_deref().map(units::bit_rate).transpose().map_err(usage("rate"))?;
        if let (Some(text), Some(_)) = (&self.load.rate, rate.filter(|bits| *bits < RATE_MIN)) {
            let least = units::display_bit_rate(RATE_MIN);
            return Err(Failure::Usage(format!("--rate: {text} is out of range; write at least {least}")));
        }
        let harm = match self.load.added_delay_max.as_str() {
            "off" => None,
            text => {
                let added_delay_max = units::duration(text).map_err(usage("added-delay-max"))?;
                if added_delay_max < ADDED_DELAY_MIN {
                    let problem =
                        format!("--added-delay-max: {text} is out of range; write at least 1ms, or off");
                    return Err(Failure::Usage(problem));
                }
                Some(HarmLimits { added_delay_max })
            }
        };
        let method = match self.method.as_str() {
            "train" => Method::Train,
            "check" => Method::Check,
            _ => Method::Tcp,
        };
        if method.is_udp() && self.load.streams != 1 {
            let problem =
                format!("--streams: not valid with --method {}, which has no connections", self.method);
            return Err(Failure::Usage(problem));
        }
        let default_seconds = if method == Method::Check { CHECK_TIME.as_secs() } else { DEFAULT_SECONDS };
        let seconds = self.load.seconds.unwrap_or(default_seconds);
        let bytes = match (method, rate) {
            (Method::Check, None) => {
                let problem = "--rate: missing; --method check needs the rate to test, such as 50Mbit/s";
                return Err(Failure::Usage(problem.to_owned()));
            }
            (Method::Check, Some(rate)) => {
                bytes.or_else(|| Some(check_bytes(rate, Duration::from_secs(seconds))))
            }
            (Method::Train, _) => bytes.or(Some(TRAIN_BYTES)),
            (Method::Tcp, _) => bytes,
        };
        let directions = match self.direction.as_str() {
            "forward" => vec![RunDirection::Forward],
            "reverse" => vec![RunDirection::Reverse],
            _ => vec![RunDirection::Forward, RunDirection::Reverse],
        };
        let dscp = self.to.dscp.as_deref().unwrap_or(DSCP);
        let dscp =
            dscp.parse().map_err(|error: DscpError| Failure::Usage(format!("--dscp: {dscp} {error}")))?;
        let rate_bytes_per_second = rate.map(|bits| bits.div_ceil(8));
        Ok(Wanted { method, seconds, directions, bytes, rate_bytes_per_second, harm, dscp })
    }

    /// The echo probe that watches the latency of the path.
    fn echo(&self) -> Result<Probe, Failure> {
        echo_probe(self.to.options()).map_err(Failure::Usage)
    }
}

/// Reports of the progress, each 10 ms, between two updates of the progress line.
const TICKS_PER_LINE: u32 = 10;

/// Measures the target of the arguments and prints the result.
pub(super) fn run(arguments: &BandwidthArguments) -> Result<(), Failure> {
    let measurement = BandwidthMeasurement::new(arguments, RunDirection::as_str)?;
    runtime()?.block_on(async {
        let session = measurement.start().await?;
        let mut interrupted = Interrupt::watch();
        let on_measured = |summary: &Summary, direction| {
            if let Some(error) = summary.error_of(direction) {
                // Standard error may be closed.
                let _ = writeln!(io::stderr(), "error: {}: {error}", direction.as_str());
            }
            if arguments.json { Ok(()) } else { print_out(&summary.text_of(direction)) }
        };
        let summary = session.measure(&mut interrupted, on_measured).await?;
        if arguments.json {
            print_out(&(summary.json().to_string() + "\n"))?;
        }
        if summary.has_failures() { Err(Failure::AlreadyReported) } else { Ok(()) }
    })
}

/// What to measure, before anything is sent.
pub(super) struct BandwidthMeasurement<'a> {
    arguments: &'a BandwidthArguments,
    wanted: Wanted,
    echo: Probe,
    target: ProbeTarget,
    name_of: DirectionName,
}

impl<'a> BandwidthMeasurement<'a> {
    /// # Errors
    /// If the arguments are not valid, or the target is not in the configuration.
    pub(super) fn new(arguments: &'a BandwidthArguments, name_of: DirectionName) -> Result<Self, Failure> {
        let (wanted, echo) = (arguments.wanted()?, arguments.echo()?);
        if arguments.to.port.is_some() {
            let problem = "--port: not valid with bandwidth, whose ports the agent reports".to_owned();
            return Err(Failure::Usage(problem));
        }
        let request = Request {
            command: Command::Bandwidth,
            target: &arguments.target,
            protocol: "udp",
            arguments: &arguments.to,
        };
        let target = ProbeTarget::new(request)?;
        Ok(Self { arguments, wanted, echo, target, name_of })
    }

    /// Finds the agent, and starts the thread of the echoes.
    pub(super) async fn start(self) -> Result<Session<'a>, Failure> {
        let Self { arguments, wanted, echo, mut target, name_of } = self;
        let kind = echo.kind.downcast::<Echo>().expect("the arguments describe an echo probe");
        let address = target.locate(&arguments.to, &echo, &kind.transport).await?;
        let runner = Runner {
            wanted,
            streams: arguments.load.streams,
            source: arguments.to.source,
            leases: target.lease_client(address, &arguments.to)?,
            address,
            threads: Arc::default(),
            name_of,
        };
        let (events, _) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
        let prober = datagram::spawn("prober", Vec::new(), TimestampMatching::detect(), events)?;
        let plan =
            EchoPlan::new(&echo, &Arc::new(kind.clone()), &target.remote(), address, target.settings());
        let echoes = PathEchoes {
            keys: plan.keys(target.settings(), target.name()),
            plan,
            prober: prober.sender(),
            id: PathId(1),
        };
        Ok(Session { arguments, runner, prober, echoes })
    }
}

/// A measurement whose agent is known.
pub(super) struct Session<'a> {
    arguments: &'a BandwidthArguments,
    runner: Runner,
    prober: DatagramHandle,
    echoes: PathEchoes,
}

impl Session<'_> {
    /// Measures one direction after the other, until it is interrupted, and passes the results to
    /// `on_measured` after each.
    pub(super) async fn measure(
        self,
        interrupted: &mut Interrupt,
        on_measured: impl Fn(&Summary, RunDirection) -> Result<(), Failure>,
    ) -> Result<Summary, Failure> {
        let Self { arguments, runner, prober, echoes } = self;
        let mut summary = Summary::new(&arguments.target, runner.leases.to, runner.name_of);
        for direction in &runner.wanted.directions {
            if arguments.load.concurrent > 1 {
                tokio::select! {
                    results = runner.measure_at_once(*direction, arguments.load.concurrent) => {
                        summary.add_clients(results);
                    }
                    () = interrupted.wait() => {}
                }
            } else {
                let is_live = !arguments.json && io::stdout().is_terminal();
                let outcome = runner.measure(*direction, &echoes, is_live, interrupted).await;
                if let Some(outcome) = outcome? {
                    summary.add(*direction, outcome);
                }
            }
            on_measured(&summary, *direction)?;
            if interrupted.has_come() {
                break;
            }
        }
        prober.stop(Duration::ZERO);
        Ok(summary)
    }
}

/// Measures one target.
#[derive(Debug, Clone)]
struct Runner {
    wanted: Wanted,
    streams: u16,
    source: Option<IpAddr>,
    leases: LeaseClient,
    address: IpAddr,
    threads: Arc<BulkThreads>,
    name_of: DirectionName,
}

impl Runner {
    fn request(&self, direction: RunDirection) -> LeaseRequest {
        LeaseRequest {
            lease: None,
            method: self.wanted.method,
            direction,
            connections: self.streams,
            bytes_max: self.wanted.bytes,
            seconds_max: self.wanted.seconds,
            rate_bytes_per_second: self.wanted.rate_bytes_per_second,
            dscp: self.wanted.dscp.value(),
        }
    }

    /// Waits for a lease.
    async fn lease(
        &self,
        direction: RunDirection,
        on_place: impl FnMut(QueuePlace),
    ) -> Result<Grant, LeaseError> {
        self.leases.acquire(self.request(direction), on_place).await
    }

    /// The run of a lease.
    fn run(&self, direction: RunDirection, grant: &Grant) -> anyhow::Result<Run> {
        let no_lease = || anyhow!("{} granted no valid lease", self.leases.host);
        let (lease, secret) = grant.decode().ok_or_else(no_lease)?;
        Ok(Run {
            to: SocketAddr::new(self.address, grant.agent_port),
            source: self.source,
            dscp: self.wanted.dscp,
            lease,
            secret,
            direction,
            method: RunMethod::of(&self.request(direction)).context("a check needs a rate")?,
            bytes_max: self.wanted.bytes.map_or(grant.bytes_max, |bytes| bytes.min(grant.bytes_max)),
            duration: Duration::from_secs(self.wanted.seconds),
            rate_max: [self.wanted.rate_bytes_per_second, grant.rate_bytes_per_second]
                .into_iter()
                .flatten()
                .min(),
        })
    }

    /// Measures one direction and the latency meanwhile. `None` if it was interrupted before it began.
    async fn measure(
        &self,
        direction: RunDirection,
        echoes: &PathEchoes,
        is_live: bool,
        interrupted: &mut Interrupt,
    ) -> Result<Option<Result<RunOutcome, String>>, Failure> {
        let name = (self.name_of)(direction);
        let show = |line: &str| if is_live { print_out(&format!("\r\x1b[K{line}")) } else { Ok(()) };
        let (mut shown_position, mut has_waited) = (0, false);
        let waiting = self.lease(direction, |place| {
            let QueuePlace { position, expected_start_seconds } = place;
            // The own run in the other direction may just be ending there.
            if !std::mem::replace(&mut has_waited, true) || shown_position == position {
                return;
            }
            shown_position = position;
            // Standard error may be closed.
            let _ = writeln!(
                io::stderr(),
                "waiting for other runs: position {position}, about {expected_start_seconds:.0} s"
            );
        });
        let grant = tokio::select! {
            grant = waiting => grant,
            () = interrupted.wait() => return Ok(None),
        };
        let grant = match grant {
            Ok(grant) => grant,
            Err(error) => return Ok(Some(Err(error.to_string()))),
        };
        show(&format!("{name}: measuring the idle path"))?;
        let mut watch = LatencyWatch::start(echoes.clone(), self.wanted.harm, seed()?);
        let has_baseline = tokio::select! {
            has_baseline = watch.idle() => has_baseline,
            () = interrupted.wait() => return Ok(None),
        };
        if !has_baseline && self.wanted.harm.is_some() {
            let _ = writeln!(
                io::stderr(),
                "{} does not answer echo requests: the run is not stopped if it adds delay",
                self.leases.host
            );
        }
        let (mut ticks, mut shown) = (0_u32, Progress::default());
        let mut is_closed = false;
        let on_progress = |progress: Progress, rtt: Option<Duration>| {
            ticks += 1;
            if ticks.is_multiple_of(TICKS_PER_LINE) && !is_closed {
                is_closed = show(&live_line(name, shown, progress, rtt)).is_err();
                shown = progress;
            }
        };
        let run = self.run(direction, &grant)?;
        let stop = async {
            interrupted.wait().await;
            StopReason::Operator
        };
        let outcome = measure_run(run, &self.threads, &mut watch, |_| None, on_progress, stop).await;
        show("")?;
        Ok(Some(outcome.map_err(|error| error.to_string())))
    }

    /// Measures one direction with several clients at the same time.
    async fn measure_at_once(&self, direction: RunDirection, clients: u16) -> Vec<ClientResult> {
        let mut tasks = JoinSet::new();
        for client in 1..=clients {
            let runner = self.clone();
            tasks.spawn(async move {
                let outcome = runner.measure_alone(direction).await;
                ClientResult { client, direction, outcome: outcome.map_err(|error| format!("{error:#}")) }
            });
        }
        tasks.join_all().await
    }

    /// Measures one direction without its latency.
    async fn measure_alone(&self, direction: RunDirection) -> anyhow::Result<RunOutcome> {
        let grant = self.lease(direction, |_| {}).await?;
        let run = self.run(direction, &grant)?;
        Ok(self.threads.runtime()?.spawn(run.run(Arc::clone(&self.threads), |_| None)).await??)
    }
}
