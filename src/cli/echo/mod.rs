//! `pathmeter probe echo`.

mod summary;

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use clap::builder::{NonEmptyStringValueParser, PossibleValuesParser};
use pathmeter_proto::echo::EchoReport;

use self::summary::DecidedJson;
pub(super) use self::summary::{EchoSummary, SummaryJson};
use super::target::{Command, ProbeTarget, Request, TargetArguments};
use super::{Failure, print_out, runtime, seed};
use crate::bulk::Bulk;
use crate::config::Probe;
use crate::config::echo::Echo;
use crate::config::probe_options::{Argument, probe_from_options};
use crate::config::units::display;
use crate::datagram::{self, TimestampMatching};
use crate::echo::{EchoPath, EchoPlan, FiniteRun};
use crate::loops::{EVENTS_PENDING_MAX, LoopEvent};
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, OwnFlowPermission, StartContext};
use crate::stream;

#[derive(Debug, Args)]
pub(super) struct EchoArguments {
    /// The host to measure.
    #[arg(value_name = "TARGET", help = TARGET_HELP)]
    target: String,
    /// Protocol that carries the echo requests
    #[arg(long, short = 'p', default_value = "udp", value_parser = PossibleValuesParser::new(PROTOCOLS))]
    protocol: String,
    /// Number of datagrams, messages or requests to send
    #[arg(long, short = 'c', default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: u64,
    /// Time between two sends
    #[arg(long, short = 'i', default_value = "1s", value_name = "DURATION")]
    interval: String,
    /// Size of the UDP payload, of the ICMP message with its header, or of the message
    #[arg(long, short = 's', value_name = "SIZE")]
    size: Option<String>,
    /// Number of flows (source ports or ICMP identifiers) to spread datagrams over, 1 to 16
    #[arg(long, value_name = "N")]
    flows: Option<u16>,
    /// Forbid fragmentation
    #[arg(long)]
    dont_fragment: bool,
    /// Format of WebSocket messages (default: text)
    #[arg(long, value_parser = PossibleValuesParser::new(["text", "binary"]))]
    format: Option<String>,
    /// Expected HTTP status, instead of 200 to 299; may be repeated
    #[arg(long, value_name = "STATUS")]
    expect_status: Vec<u16>,
    /// Text that the body of HTTP responses must contain
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    expect_body: Option<String>,
    #[command(flatten)]
    to: TargetArguments,
    /// Print the summary as one JSON object
    #[arg(long)]
    json: bool,
    /// Also print one JSON object per datagram, as soon as its verdict is known
    #[arg(long, requires = "json")]
    json_each: bool,
}

/// What another command chooses of the arguments.
pub(super) struct EchoRequests {
    pub(super) target: String,
    pub(super) protocol: String,
    pub(super) count: u64,
    pub(super) interval: String,
    pub(super) size: Option<String>,
}

const TARGET_HELP: &str = "Name of a peer or target in --config, or [https://]HOST[:HTTP_PORT] of an agent; \
                           with --port, HOST of a STAMP reflector; with --protocol icmp, any HOST; \
                           with --protocol websocket or http, any URL";

const PROTOCOLS: [&str; 5] = ["udp", "icmp", "tcp", "websocket", "http"];

impl EchoArguments {
    /// So many requests at this interval, with the defaults of the other options.
    pub(super) fn of_requests(requests: EchoRequests, to: TargetArguments, json: bool) -> Self {
        let EchoRequests { target, protocol, count, interval, size } = requests;
        Self {
            target,
            protocol,
            count,
            interval,
            size,
            flows: None,
            dont_fragment: false,
            format: None,
            expect_status: Vec::new(),
            expect_body: None,
            to,
            json,
            json_each: false,
        }
    }

    /// The name of what is sent, in the plural.
    fn units(&self) -> &'static str {
        match self.protocol.as_str() {
            "udp" | "icmp" => "datagrams",
            "http" => "requests",
            _ => "messages",
        }
    }

    /// The probe that the arguments describe. The rules are those of a configuration file.
    fn probe(&self) -> Result<Probe, Failure> {
        let text = |text: &str| Argument::Text(text.to_owned());
        let mut options = vec![("protocol", text(&self.protocol)), ("interval", text(&self.interval))];
        options.extend(self.to.options());
        options.extend(self.size.as_deref().map(|size| ("size", text(size))));
        options.extend(self.flows.map(|flows| ("flows", Argument::Number(flows))));
        options.extend(self.dont_fragment.then_some(("dont_fragment", Argument::On)));
        options.extend(self.format.as_deref().map(|format| ("format", text(format))));
        if !self.expect_status.is_empty() {
            options.push(("expect_status", Argument::Numbers(self.expect_status.clone())));
        }
        options.extend(self.expect_body.as_deref().map(|body| ("expect_body", text(body))));
        if self.to.port.is_some() && !["udp", "tcp"].contains(&self.protocol.as_str()) {
            let problem = format!("--port: only valid with --protocol udp or tcp, not {}", self.protocol);
            return Err(Failure::Usage(problem));
        }
        probe_from_options(options).map_err(Failure::Usage)
    }
}

/// Interval at which the progress line is updated on a terminal.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Measures the target of the arguments and prints the result.
pub(super) fn run(arguments: &EchoArguments) -> Result<(), Failure> {
    let measurement = EchoMeasurement::new(arguments)?;
    runtime()?.block_on(async {
        let session = measurement.locate().await?;
        if !arguments.json {
            print_out(&session.title())?;
        }
        let mut summary = session.measure().await?;
        session.print_summary(&mut summary)?;
        if summary.has_answer() && summary.unexpected == 0 { Ok(()) } else { Err(Failure::AlreadyReported) }
    })
}

/// What to measure, before anything is sent.
pub(super) struct EchoMeasurement<'a> {
    arguments: &'a EchoArguments,
    probe: Probe,
    target: ProbeTarget,
}

impl<'a> EchoMeasurement<'a> {
    /// # Errors
    /// If the arguments are not valid, or the target is not in the configuration.
    pub(super) fn new(arguments: &'a EchoArguments) -> Result<Self, Failure> {
        let probe = arguments.probe()?;
        let (target, protocol) = (arguments.target.as_str(), arguments.protocol.as_str());
        let request = Request { command: Command::Echo, target, protocol, arguments: &arguments.to };
        Ok(Self { arguments, probe, target: ProbeTarget::new(request)? })
    }

    /// Finds the address and the ports of the target.
    pub(super) async fn locate(self) -> anyhow::Result<EchoSession<'a>> {
        let Self { arguments, probe, mut target } = self;
        let echo = probe.kind.downcast::<Echo>().expect("the arguments describe an echo probe");
        let located = target.locate(&arguments.to, &probe, &echo.transport).await?;
        let plan =
            EchoPlan::new(&probe, &Arc::new(echo.clone()), &target.remote(), located, target.settings());
        let address = match plan.to().port() {
            // ICMP has no ports.
            0 => plan.to().ip().to_string(),
            _ => plan.to().to_string(),
        };
        let (interval, grace) = (probe.interval, echo.lost_after);
        Ok(EchoSession { arguments, target, plan, address, interval, grace })
    }
}

/// A measurement whose address is known.
pub(super) struct EchoSession<'a> {
    arguments: &'a EchoArguments,
    target: ProbeTarget,
    plan: EchoPlan,
    /// With the port, if the protocol has ports.
    pub(super) address: String,
    interval: Duration,
    /// How long to wait for the last replies after an interruption.
    grace: Duration,
}

impl EchoSession<'_> {
    fn title(&self) -> String {
        let mode = if self.plan.is_authenticated() { ", authenticated" } else { "" };
        format!(
            "{} ({}): {} {} every {}{mode}\n",
            self.arguments.target,
            self.address,
            self.arguments.count,
            self.arguments.units(),
            display(self.interval)
        )
    }

    /// Sends the requests and waits for the replies, or until it is interrupted.
    pub(super) async fn measure(&self) -> Result<EchoSummary, Failure> {
        let (tap, reports) = channel();
        let (sender, events) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
        let loops = Loops {
            prober: datagram::spawn("prober", Vec::new(), TimestampMatching::detect(), sender.clone())?,
            streams: stream::spawn(sender)?,
            probe_budget: Arc::default(),
            traces: Arc::default(),
            quoted_headers: Arc::default(),
            own_flow: OwnFlowPermission::default(),
            bulk: Bulk::default(),
        };
        let family = if self.plan.to().is_ipv4() { "ipv4" } else { "ipv6" };
        let key = PathKey { probe: "once".into(), peer: self.target.name().into(), family };
        let start = StartContext {
            id: PathId(1),
            key: &key,
            settings: self.target.settings(),
            loops: &loops,
            peer_left_at: None,
            seed: seed()?,
            followed: Arc::default(),
        };
        let finite = FiniteRun { count: self.arguments.count, reports: tap };
        let path = EchoPath::start(self.plan.clone(), &start, None, Some(finite));
        let run = Measurement { arguments: self.arguments, reports, loops, path, grace: self.grace };
        run.watch(events).await
    }

    fn print_summary(&self, summary: &mut EchoSummary) -> Result<(), Failure> {
        let (target, address) = (&self.arguments.target, &self.address);
        let text = match self.arguments.json {
            true => {
                serde_json::to_string(&summary.json(target, address)).map_err(anyhow::Error::from)? + "\n"
            }
            false => summary.text(target, address),
        };
        if self.arguments.json || summary.has_sent() { print_out(&text) } else { Ok(()) }
    }
}

/// A running measurement.
struct Measurement<'a> {
    arguments: &'a EchoArguments,
    reports: Receiver<EchoReport>,
    loops: Loops,
    path: EchoPath,
    /// How long to wait for the last replies after an interruption.
    grace: Duration,
}

impl Measurement<'_> {
    async fn watch(self, mut events: tokio::sync::mpsc::Receiver<LoopEvent>) -> Result<EchoSummary, Failure> {
        let mut summary = EchoSummary::default();
        let is_live = !self.arguments.json && io::stdout().is_terminal();
        let mut ticker = tokio::time::interval(PROGRESS_INTERVAL);
        let mut is_interrupted = false;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(LoopEvent::NotStarted { reason, .. }) => return Err(anyhow!(reason).into()),
                    Some(LoopEvent::Finished(_)) | None => break,
                    Some(LoopEvent::Disconnected { reason, .. }) => {
                        self.add_reports(&mut summary)?;
                        if is_live {
                            print_out("\r\x1b[K")?;
                        }
                        let has_never_answered = !summary.has_answer();
                        // Standard error may be closed.
                        let prefix = if has_never_answered { "error: " } else { "" };
                        let _ = writeln!(io::stderr(), "{prefix}{reason}");
                        if has_never_answered {
                            break;
                        }
                    }
                    Some(
                        LoopEvent::Started { .. }
                        | LoopEvent::OfPath { .. }
                        | LoopEvent::PeerLeaving(_)
                        | LoopEvent::ClockStepped(_)
                        | LoopEvent::Suspended(_),
                    ) => {}
                },
                _ = ticker.tick() => {
                    self.add_reports(&mut summary)?;
                    if is_live {
                        print_out(&format!("\r\x1b[K{}", summary.line(self.arguments.count)))?;
                    }
                }
                _ = tokio::signal::ctrl_c() => {
                    let grace = if is_interrupted { Duration::ZERO } else { self.grace };
                    is_interrupted = true;
                    self.loops.stop(grace);
                }
            }
            if self.loops.are_finished() {
                break;
            }
        }
        self.loops.stop(Duration::ZERO);
        while !self.loops.are_finished() {
            ticker.tick().await;
        }
        self.add_reports(&mut summary)?;
        summary.unexpected = self.path.unexpected_responses();
        if is_live {
            print_out("\r\x1b[K")?;
        }
        Ok(summary)
    }

    /// Adds the reports since the last call, and prints them with `--json-each`.
    fn add_reports(&self, summary: &mut EchoSummary) -> Result<(), Failure> {
        let mut lines = String::new();
        for report in self.reports.try_iter() {
            summary.add(&report);
            if self.arguments.json_each
                && let Some(datagram) = DecidedJson::of(&report)
            {
                lines += &(serde_json::to_string(&datagram).map_err(anyhow::Error::from)? + "\n");
            }
        }
        if lines.is_empty() { Ok(()) } else { print_out(&lines) }
    }
}
