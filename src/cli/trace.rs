//! `pathmeter probe trace`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::anyhow;
use clap::Args;
use clap::builder::PossibleValuesParser;
use pathmeter_proto::probe_budget::ProbeBudget;
use pathmeter_proto::trace::{
    AnswerExtensions, Completeness, DirectedReport, Direction, Enumerated, EnumerationReport, EqualCostPaths,
    Interface, Trace, TraceReport,
};
use pathmeter_proto::wire::icmp_extensions::MplsLabel;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, channel, unbounded_channel};

use super::target::{ProbeTarget, Request, TargetArguments};
use super::{Failure, print_out, runtime, seed};
use crate::config::Probe;
use crate::config::echo::Echo;
use crate::config::probe_options::{Argument, probe_from_options};
use crate::config::trace;
use crate::datagram::{self, TimestampMatching, opens_ping_sockets};
use crate::loops::{EVENTS_PENDING_MAX, LoopEvent};
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, Remote, StartContext};
use crate::trace::{completeness_name, enumerated_json};
use crate::trace_log::TraceRecord;
use crate::{resolver, stream};

#[derive(Debug, Args)]
pub(super) struct TraceArguments {
    /// The host to trace.
    #[arg(value_name = "TARGET", help = TARGET_HELP)]
    target: String,
    /// Packets to send: udp (an agent or a STAMP reflector answers), icmp (any host), tcp (any TCP port)
    #[arg(long, default_value = "udp", value_parser = PossibleValuesParser::new(["udp", "icmp", "tcp"]))]
    protocol: String,
    /// Largest TTL
    #[arg(long, short = 'm', default_value_t = 30, value_parser = clap::value_parser!(u8).range(1..=64))]
    max_hops: u8,
    /// Number of flows, 1 to 16: routers may send each over another of several equal paths; with tcp always 1
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    flows: u16,
    /// Find all equal-cost paths, with up to 96 flows over UDP: takes minutes if routers limit their answers
    #[arg(long, conflicts_with = "flows")]
    enumerate: bool,
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

/// How long to wait for the traces to the target. A dead target takes less than a second.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for the traces back, after those to the target. A target that cannot trace them does not
/// say so in every case.
const REVERSE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long to look up the names of routers.
const NAMES_TIMEOUT: Duration = Duration::from_secs(2);

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
    if arguments.enumerate && protocol != "udp" {
        return Err(Failure::Usage("--enumerate needs --protocol udp".to_owned()));
    }
    options.extend(arguments.to.options());
    let probe = probe_from_options(options).map_err(Failure::Usage)?;
    let request = Request { target: &arguments.target, protocol, arguments: &arguments.to };
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
        hop_metrics: false,
    };
    if arguments.enumerate {
        let remote = target.remote();
        let outcome = enumerate(arguments, (probe, &traced), &remote, address, &start, &mut events).await;
        loops.stop(Duration::ZERO);
        while events.recv().await.is_some() {}
        return outcome;
    }
    crate::trace::start((probe, &traced), &target.remote(), address, &start, sender);
    let mut routes = Routes::new(arguments, address);
    if !arguments.json {
        print_out(&routes.title())?;
    }
    let outcome = routes.watch(&mut reports, &mut events).await;
    loops.stop(Duration::ZERO);
    // The threads drop their senders when they end.
    while events.recv().await.is_some() {}
    outcome?;
    if arguments.json {
        print_out(&(routes.json().to_string() + "\n"))?;
    }
    if routes.is_reached() { Ok(()) } else { Err(Failure::AlreadyReported) }
}

/// Enumerates the paths to the target and prints them.
async fn enumerate(
    arguments: &TraceArguments,
    probe: (&Probe, &trace::Trace),
    remote: &Remote<'_>,
    address: IpAddr,
    start: &StartContext<'_>,
    events: &mut Receiver<LoopEvent>,
) -> Result<(), Failure> {
    let (sender, mut reports) = unbounded_channel();
    crate::trace::enumerate(probe, remote, address, start, sender);
    if !arguments.json {
        print_out(&format!("{address}: equal-cost paths over UDP, at most {} hops\n", arguments.max_hops))?;
    }
    let enumerated = loop {
        tokio::select! {
            Some(event) = events.recv() => {
                if let LoopEvent::NotStarted { reason, .. } = event {
                    return Err(anyhow!(reason).into());
                }
            }
            report = reports.recv() => match report {
                Some(EnumerationReport::Enumerated(enumerated)) => break enumerated,
                Some(_) => {}
                None => return Err(anyhow!("the enumeration ended early").into()),
            },
        }
    };
    let mut object = enumerated_json(&enumerated);
    let text = match arguments.json {
        true => {
            object["target"] = arguments.target.clone().into();
            object["address"] = address.to_string().into();
            object.to_string() + "\n"
        }
        false => enumerated_text(&enumerated),
    };
    print_out(&text)?;
    if object["reached"] == true { Ok(()) } else { Err(Failure::AlreadyReported) }
}

fn enumerated_text(enumerated: &Enumerated) -> String {
    let EqualCostPaths { hops, flows, probes, .. } = &enumerated.paths;
    let mut text = String::new();
    for hop in hops {
        let mut found: Vec<String> = hop.routers.iter().map(|router| router.address.to_string()).collect();
        if !hop.destination_flows.is_empty() {
            found.push("target".to_owned());
        }
        if found.is_empty() {
            found.push("*".to_owned());
        }
        let note = match hop.completeness {
            Completeness::Complete => String::new(),
            Completeness::CompleteIfUniform
            | Completeness::PartlySilent
            | Completeness::Silent
            | Completeness::PerPacket
            | Completeness::Limited(_) => {
                format!("  ({})", completeness_name(hop.completeness).replace('_', "-"))
            }
        };
        let _ = writeln!(text, "{:>4}  {}{note}", hop.ttl, found.join("  "));
    }
    let seconds = enumerated.duration.as_secs_f64();
    let _ = writeln!(text, "{probes} probes of {flows} flows in {seconds:.1} s");
    text
}

/// The first trace of each flow in each direction.
struct Routes<'a> {
    arguments: &'a TraceArguments,
    address: IpAddr,
    traces: BTreeMap<(u8, Direction), Trace>,
    names: BTreeMap<IpAddr, String>,
}

impl<'a> Routes<'a> {
    fn new(arguments: &'a TraceArguments, address: IpAddr) -> Self {
        Self { arguments, address, traces: BTreeMap::new(), names: BTreeMap::new() }
    }

    /// Waits for the traces and, unless they are for JSON, prints each direction as soon as it is complete.
    async fn watch(
        &mut self,
        reports: &mut UnboundedReceiver<DirectedReport>,
        events: &mut Receiver<LoopEvent>,
    ) -> Result<(), Failure> {
        for (direction, timeout) in
            [(Direction::Forward, FORWARD_TIMEOUT), (Direction::Reverse, REVERSE_TIMEOUT)]
        {
            if direction == Direction::Reverse && (self.arguments.protocol != "udp" || !self.is_reached()) {
                break;
            }
            let complete = self.complete(direction, reports, events);
            // What is known after that time is shown.
            tokio::time::timeout(timeout, complete).await.unwrap_or(Ok(()))?;
            if self.arguments.json {
                continue;
            }
            self.look_up_names().await;
            print_out(&self.text(direction))?;
        }
        Ok(())
    }

    /// Waits until every flow has a trace in this direction.
    async fn complete(
        &mut self,
        direction: Direction,
        reports: &mut UnboundedReceiver<DirectedReport>,
        events: &mut Receiver<LoopEvent>,
    ) -> anyhow::Result<()> {
        while self.count(direction) < usize::from(self.arguments.flows) {
            tokio::select! {
                Some(event) = events.recv() => {
                    if let LoopEvent::NotStarted { reason, .. } = event {
                        return Err(anyhow!(reason));
                    }
                }
                Some(report) = reports.recv() => self.add(report),
                else => break,
            }
        }
        Ok(())
    }

    fn add(&mut self, DirectedReport { direction, report }: DirectedReport) {
        if let TraceReport::Traced(trace) = report {
            self.traces.entry((trace.flow, direction)).or_insert(*trace);
        }
    }

    fn count(&self, direction: Direction) -> usize {
        self.traces.keys().filter(|(_, found)| *found == direction).count()
    }

    fn is_reached(&self) -> bool {
        let mut forward = self.traces.iter().filter(|((_, direction), _)| *direction == Direction::Forward);
        forward.any(|(_, trace)| trace.rtt.is_some())
    }

    async fn look_up_names(&mut self) {
        if self.arguments.numeric {
            return;
        }
        let answers = self.traces.values().flat_map(|trace| &trace.hops).flat_map(|hop| &hop.answers);
        let mut unknown: Vec<IpAddr> =
            answers.map(|answer| answer.router).filter(|router| !self.names.contains_key(router)).collect();
        unknown.sort_unstable();
        unknown.dedup();
        self.names.extend(resolver::names_of(unknown, NAMES_TIMEOUT).await);
    }

    fn title(&self) -> String {
        let TraceArguments { target, protocol, max_hops, flows, .. } = self.arguments;
        let protocol = protocol.to_uppercase();
        let flows = if *flows == 1 { "one flow".to_owned() } else { format!("{flows} flows") };
        let address = self.address.to_string();
        let host = if *target == address { address } else { format!("{target} ({address})") };
        format!("{host}: {flows} over {protocol}, at most {max_hops} hops\n")
    }

    /// The hops of all flows in one direction.
    fn text(&self, direction: Direction) -> String {
        let target = &self.arguments.target;
        let way = match direction {
            Direction::Forward => "to",
            Direction::Reverse => "back from",
        };
        let mut text = String::new();
        for ((flow, _), trace) in self.traces.iter().filter(|((_, found), _)| *found == direction) {
            let of_flow = if self.arguments.flows == 1 { String::new() } else { format!(", flow {flow}") };
            let routers = match (trace.rtt, trace.routers) {
                (None, _) => format!("{target} does not answer"),
                (Some(_), Some(1)) => "1 router".to_owned(),
                (Some(_), Some(routers)) => format!("{routers} routers"),
                (Some(_), None) => "unknown number of routers".to_owned(),
            };
            let _ = writeln!(text, "\n{way} {target}{of_flow}: {routers}");
            for hop in &trace.hops {
                let (router, rtt) = match hop.answers.first() {
                    Some(answer) => {
                        let attached = answer.extensions.as_deref().map_or_else(String::new, attached_text);
                        (self.name(answer.router) + &attached, milliseconds(answer.rtt))
                    }
                    None => ("*".to_owned(), hop.state.as_str().replace('_', "-")),
                };
                let _ = writeln!(text, "{:>4}  {rtt:>12}  {router}", hop.ttl);
            }
            if let Some(rtt) = trace.rtt {
                let last =
                    trace.routers.map_or_else(String::new, |routers| (u16::from(routers) + 1).to_string());
                let end = match direction {
                    Direction::Forward => self.address.to_string(),
                    Direction::Reverse => "this host".to_owned(),
                };
                let _ = writeln!(text, "{last:>4}  {:>12}  {end}", milliseconds(rtt));
            }
        }
        if text.is_empty() && direction == Direction::Reverse {
            let _ = writeln!(text, "\nback from {target}: no trace of the way back within 3 s");
        }
        text
    }

    fn name(&self, router: IpAddr) -> String {
        match self.names.get(&router) {
            Some(name) => format!("{router} ({name})"),
            None => router.to_string(),
        }
    }

    fn json(&self) -> Value {
        let of = |flow: u8, direction| self.traces.get(&(flow, direction)).map(TraceRecord::from);
        let first = json!(of(0, Direction::Forward));
        let flows = (0..self.arguments.flows).map(|flow| {
            let flow = u8::try_from(flow).unwrap_or(u8::MAX);
            json!({"forward": of(flow, Direction::Forward), "reverse": of(flow, Direction::Reverse)})
        });
        json!({
            "target": self.arguments.target,
            "address": self.address.to_string(),
            "method": self.arguments.protocol,
            "privileged": self.arguments.protocol == "icmp" && !opens_ping_sockets(self.address),
            "reached": self.is_reached(),
            "routers": first["routers"],
            "duration_seconds": first["duration_seconds"],
            "rtt_seconds": first["rtt_seconds"],
            "hops": first["hops"],
            "flows": flows.collect::<Vec<Value>>(),
        })
    }
}

/// What a router attached to its answer: labels as traceroute -e shows them, then interfaces.
fn attached_text(extensions: &AnswerExtensions) -> String {
    let AnswerExtensions { labels, interfaces } = extensions;
    let mut text = String::new();
    if !labels.is_empty() {
        let labels = labels.iter().map(|MplsLabel { label, traffic_class, is_bottom, ttl }| {
            format!("L={label} E={traffic_class} S={} T={ttl}", u8::from(*is_bottom))
        });
        let _ = write!(text, " [MPLS: {}]", labels.collect::<Vec<String>>().join(" / "));
    }
    for Interface { role, index, address, name, mtu } in interfaces {
        let _ = write!(text, " [{}:", role.as_str().replace('_', "-"));
        for (key, value) in [
            ("", name.clone()),
            ("", address.map(|address| address.to_string())),
            ("index=", index.map(|index| index.to_string())),
            ("mtu=", mtu.map(|mtu| mtu.to_string())),
        ] {
            if let Some(value) = value {
                let _ = write!(text, " {key}{value}");
            }
        }
        text.push(']');
    }
    text
}

fn milliseconds(rtt: Duration) -> String {
    format!("{:.3} ms", rtt.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::wire::icmp_extensions::InterfaceRole;

    use super::*;

    #[test]
    fn labels_and_interfaces_follow_the_address() {
        let label = |label, is_bottom| MplsLabel { label, traffic_class: 5, is_bottom, ttl: 1 };
        let interface = Interface {
            role: InterfaceRole::IncomingSubIp,
            index: Some(513),
            address: Some([192, 0, 2, 1].into()),
            name: Some("ge-0/0/1".into()),
            mtu: Some(1_500),
        };
        let one = AnswerExtensions { labels: vec![label(16_004, true)], interfaces: Vec::new() };
        assert_eq!(attached_text(&one), " [MPLS: L=16004 E=5 S=1 T=1]");
        let both = AnswerExtensions {
            labels: vec![label(16_004, false), label(24_015, true)],
            interfaces: vec![interface.clone(), Interface { address: None, name: None, ..interface }],
        };
        assert_eq!(
            attached_text(&both),
            " [MPLS: L=16004 E=5 S=0 T=1 / L=24015 E=5 S=1 T=1] \
             [incoming-sub-ip: ge-0/0/1 192.0.2.1 index=513 mtu=1500] [incoming-sub-ip: index=513 mtu=1500]"
        );
    }
}
