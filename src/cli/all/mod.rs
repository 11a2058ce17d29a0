//! `pathmeter probe all`.

mod summary;

use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::bandwidth::RunDirection;
use pathmeter_proto::trace::Direction;

use self::summary::{Part, Summary};
use super::bandwidth::{BandwidthArguments, BandwidthMeasurement, LoadArguments};
use super::echo::{EchoArguments, EchoMeasurement, EchoRequests};
use super::interrupt::Interrupt;
use super::target::{NoIdentity, TargetArguments};
use super::trace::{DirectedFlow, TraceArguments, TraceMeasurement};
use super::{Failure, error_with_causes, print_out, runtime};

#[derive(Debug, Args)]
pub(super) struct AllArguments {
    /// The host to measure.
    #[arg(value_name = "TARGET", help = TARGET_HELP)]
    target: String,
    /// Packets that measure latency and route: udp (an agent or a STAMP reflector answers), icmp (any host),
    /// tcp (an agent answers), auto (icmp if TARGET is a host without an agent, else udp)
    #[arg(long, short = 'p', default_value = AUTO)]
    #[arg(value_parser = PossibleValuesParser::new([AUTO, "udp", "icmp", "tcp"]))]
    protocol: String,
    /// Number of echo requests to send
    #[arg(long, short = 'c', default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: u64,
    /// Size of the UDP payload, of the ICMP message with its header, or of the message
    #[arg(long, short = 's', value_name = "SIZE")]
    size: Option<String>,
    #[command(flatten)]
    load: LoadArguments,
    #[command(flatten)]
    to: TargetArguments,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

const TARGET_HELP: &str = "Name of a peer or target in --config, or [https://]HOST[:HTTP_PORT] of an agent; \
                           without an agent only latency and route are measured";

const AUTO: &str = "auto";

/// Chosen: the default of 20 requests takes 2 s, and ten small packets a second load no path.
const INTERVAL: &str = "100ms";

impl AllArguments {
    fn echo(&self, protocol: &str) -> EchoArguments {
        let requests = EchoRequests {
            target: self.target.clone(),
            protocol: protocol.to_owned(),
            count: self.count,
            interval: INTERVAL.to_owned(),
            size: self.size.clone(),
        };
        EchoArguments::of_requests(requests, self.to.clone(), self.json)
    }

    fn trace(&self, protocol: &str) -> TraceArguments {
        TraceArguments::of_one_flow(self.target.clone(), protocol.to_owned(), self.to.clone())
    }

    fn bandwidth(&self, direction: RunDirection) -> BandwidthArguments {
        // The port is that of the packets that measure latency and route. Agents report theirs.
        let (target, load, to) = (self.target.clone(), self.load.clone(), self.to.without_port());
        BandwidthArguments::of_direction(direction, target, load, to, self.json)
    }
}

/// Measures everything about the target of the arguments and prints the results.
pub(super) fn run(arguments: &AllArguments) -> Result<(), Failure> {
    let protocol = if arguments.protocol == AUTO { "udp" } else { &arguments.protocol };
    // Invalid arguments and a name that is not in the configuration are no failures of single parts.
    EchoMeasurement::new(&arguments.echo(protocol))?;
    TraceMeasurement::new(&arguments.trace(protocol))?;
    BandwidthMeasurement::new(&arguments.bandwidth(RunDirection::Reverse), name_of)?;
    runtime()?.block_on(async {
        let (summary, interrupted) = (Summary::new(&arguments.target), Interrupt::watch());
        Run { arguments, protocol: protocol.to_owned(), summary, interrupted }.measure().await
    })
}

/// The name of a direction as the host that measures sees it.
const fn name_of(direction: RunDirection) -> &'static str {
    Part::of_direction(direction).name()
}

/// A running measurement.
struct Run<'a> {
    arguments: &'a AllArguments,
    /// Carries the packets that measure latency and route.
    protocol: String,
    summary: Summary,
    interrupted: Interrupt,
}

impl Run<'_> {
    /// Measures one part after the other, the idle path first, until it is interrupted.
    async fn measure(mut self) -> Result<(), Failure> {
        for part in Part::IN_ORDER {
            let outcome = match part {
                Part::Latency => Box::pin(self.measure_latency()).await,
                Part::Route => Box::pin(self.measure_route()).await,
                Part::Download => Box::pin(self.measure_bandwidth(RunDirection::Reverse)).await,
                Part::Upload => Box::pin(self.measure_bandwidth(RunDirection::Forward)).await,
            };
            if let Err(failure) = outcome {
                self.fail(part, message(failure)?)?;
            }
            if self.interrupted.has_come() {
                break;
            }
        }
        if self.arguments.json {
            print_out(&self.summary.json()?)?;
        }
        self.summary.check()
    }

    async fn measure_latency(&mut self) -> Result<(), Failure> {
        let mut echo = self.arguments.echo(&self.protocol);
        let mut session = self.until_interrupted(EchoMeasurement::new(&echo)?.locate()).await;
        if let Some(Err(error)) = &session
            && let Some(NoIdentity { reason, .. }) = error.downcast_ref()
            && self.arguments.protocol == AUTO
        {
            let target = &self.arguments.target;
            self.print(&format!("{target}: no agent: {reason}; latency and route over ICMP\n"))?;
            "icmp".clone_into(&mut self.protocol);
            echo = self.arguments.echo(&self.protocol);
            session = self.until_interrupted(EchoMeasurement::new(&echo)?.locate()).await;
        }
        let Some(session) = session.transpose()? else { return Ok(()) };
        let mut latency = session.measure().await?;
        if !latency.has_sent() && self.interrupted.has_come() {
            return Ok(());
        }
        self.summary.latency = Some(latency.json(&self.arguments.target, &session.address));
        let counts = latency.counts();
        match latency.rtts() {
            Some(rtts) => self.print(&format!("{}: {rtts}\n{}", Part::Latency.name(), indented(&counts))),
            None => {
                let mut message = format!("{} does not answer: {}", session.address, counts.trim_end());
                if self.protocol != "icmp" {
                    message += "\nwhether the host answers at all: use --protocol icmp";
                }
                self.fail(Part::Latency, message)
            }
        }
    }

    async fn measure_route(&mut self) -> Result<(), Failure> {
        let trace = self.arguments.trace(&self.protocol);
        let Some(session) = self.until_interrupted(TraceMeasurement::new(&trace)?.start()).await else {
            return Ok(());
        };
        let session = session?;
        let mut routes = session.routes();
        let outcome = self.until_interrupted(session.trace(&mut routes, false)).await;
        if routes.has_trace() {
            self.summary.route = Some(routes.json());
        }
        let is_reached = routes.is_reached();
        if is_reached {
            self.print(&format!("{}: target reached, {}", Part::Route.name(), routes.summary()))?;
        }
        let Some(outcome) = outcome else { return Ok(()) };
        outcome?;
        if is_reached {
            return Ok(());
        }
        self.print(&format!("{}: failed: {}", Part::Route.name(), routes.summary()))?;
        self.summary.fail(Part::Route, routes.conclusion(DirectedFlow::first(Direction::Forward)));
        Ok(())
    }

    async fn measure_bandwidth(&mut self, direction: RunDirection) -> Result<(), Failure> {
        let bandwidth = self.arguments.bandwidth(direction);
        let started = self.until_interrupted(BandwidthMeasurement::new(&bandwidth, name_of)?.start()).await;
        let Some(session) = started.transpose()? else { return Ok(()) };
        let results = session.measure(&mut self.interrupted, |_, _| Ok(())).await?;
        if results.is_empty() {
            return Ok(());
        }
        self.print(&results.text_of(direction))?;
        let json = Some(results.json());
        match direction {
            RunDirection::Forward => self.summary.upload = json,
            RunDirection::Reverse => self.summary.download = json,
        }
        results.failure().map_or(Ok(()), |failure| self.fail(Part::of_direction(direction), failure))
    }

    /// The output of a future, or `None` if it is interrupted before.
    async fn until_interrupted<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            output = future => Some(output),
            () = self.interrupted.wait() => None,
        }
    }

    /// Adds that a part has failed, and prints it.
    fn fail(&mut self, part: Part, message: String) -> Result<(), Failure> {
        self.print(&format!("{}: failed: {}\n", part.name(), indented(&message).trim()))?;
        self.summary.fail(part, message);
        Ok(())
    }

    /// Prints a text, unless the results are printed as JSON.
    fn print(&self, text: &str) -> Result<(), Failure> {
        if self.arguments.json { Ok(()) } else { print_out(text) }
    }
}

/// Why a part has failed.
///
/// # Errors
/// If standard output is closed, which ends the command.
fn message(failure: Failure) -> Result<String, Failure> {
    match failure {
        Failure::Runtime(error) => Ok(error_with_causes(&error)),
        Failure::Config(error) => Ok(error.to_string()),
        Failure::Usage(problem) => Ok(problem),
        Failure::AlreadyReported => Err(failure),
    }
}

/// The lines of a text, indented below the line that begins with the name of the part.
fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
