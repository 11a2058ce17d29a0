//! Enumerations of the equal-cost paths to a host.

use pathmeter_proto::machine::Arrival;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{
    Completeness, Enumerated, EnumeratedHop, Enumeration, EnumerationEnd, EnumerationLimit,
    EnumerationReport, Enumerator, Link, Reached,
};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::TraceParameters;
use super::path::TracePlan;
use crate::datagram::{Access, DatagramProtocol, MachineTask, NewTask, Notice, Recorder, Traffic};
use crate::loops::NewPath;
use crate::probe::{Plan, StartContext};

/// Starts an enumeration on the datagram loop of `start`, and passes every report to `reports`. It uses as
/// many sockets as an enumeration has flows, which the loop keeps for a while.
pub fn enumerate(
    parameters: TraceParameters<'_>,
    start: &StartContext<'_>,
    reports: UnboundedSender<EnumerationReport>,
) {
    run(&TracePlan::new(parameters, start.settings), start, reports);
}

/// Whether the paths to the destination of a plan can be enumerated: it is the plan of traces over UDP.
#[must_use]
pub fn can_be_enumerated(plan: &dyn Plan) -> bool {
    plan.as_any().downcast_ref::<TracePlan>().is_some_and(TracePlan::is_over_udp)
}

/// Starts an enumeration as [`enumerate`] does, to the destination of a running path. No effect if its paths
/// [cannot be enumerated](can_be_enumerated).
pub fn enumerate_path(
    plan: &dyn Plan,
    start: &StartContext<'_>,
    reports: UnboundedSender<EnumerationReport>,
) {
    if let Some(plan) = plan.as_any().downcast_ref::<TracePlan>().filter(|plan| plan.is_over_udp()) {
        run(plan, start, reports);
    }
}

fn run(plan: &TracePlan, start: &StartContext<'_>, reports: UnboundedSender<EnumerationReport>) {
    let source = plan.source();
    let mut spec = plan.spec(start);
    let task = NewTask {
        protocol: DatagramProtocol::Udp,
        to: spec.to,
        source,
        flows: Enumeration::FLOWS_MAX,
        interval: spec.interval,
        seed: spec.seed,
        companion: None,
        is_following: false,
        build: Box::new(move |ssids, at| {
            spec.ssids = ssids;
            let recorder = EnumerationRecorder { reports, in_flight: 0 };
            Box::new(MachineTask { machine: Enumerator::new(spec, at), recorder })
        }),
    };
    start.loops.prober.start(NewPath { id: start.id, task, peer_left_at: None });
}

#[derive(Debug)]
struct EnumerationRecorder {
    reports: UnboundedSender<EnumerationReport>,
    in_flight: u64,
}

impl Recorder<Enumerator> for EnumerationRecorder {
    fn record(&mut self, report: EnumerationReport, traffic: &mut Traffic) -> Option<Notice> {
        match &report {
            EnumerationReport::Sent { .. } => {
                self.in_flight += 1;
                traffic.outstanding += 1;
                traffic.sent += 1;
            }
            EnumerationReport::Answered { .. }
            | EnumerationReport::Unanswered { .. }
            | EnumerationReport::Withdrawn => {
                self.in_flight = self.in_flight.saturating_sub(1);
                traffic.outstanding = traffic.outstanding.saturating_sub(1);
            }
            EnumerationReport::SendError(_)
            | EnumerationReport::Deferred(_)
            | EnumerationReport::Unmatched
            | EnumerationReport::Enumerated(_) => {}
        }
        // The receiver may be gone.
        let _ = self.reports.send(report);
        None
    }

    fn stepping(&mut self, _: &mut Enumerator, _: Timestamp) {}

    fn waiting(&mut self, _: &Enumerator, _: Timestamp) {}

    fn received(&mut self, _: &Arrival) {}

    fn not_sent(&mut self) {}

    fn set_access(&mut self, _: &mut Enumerator, _: &Access) {}

    /// One that is cut short loses nothing.
    fn delays_stop(&self) -> bool {
        false
    }

    fn is_balanced(&self, enumerator: &Enumerator, _: Timestamp) -> bool {
        use pathmeter_proto::machine::Machine as _;
        u64::try_from(enumerator.in_flight()).ok() == Some(self.in_flight)
    }

    fn claims(&self, enumerator: &Enumerator, datagram: &[u8], arrival: &Arrival) -> bool {
        enumerator.owns(datagram, arrival)
    }
}

/// The result as the API and the command show it.
#[must_use]
pub fn enumerated_json(enumerated: &Enumerated) -> Value {
    let paths = &enumerated.paths;
    json!({
        "reached": paths.end == EnumerationEnd::Destination,
        "end": end_name(paths.end),
        "flows": paths.flows,
        "probes": paths.probes,
        "duration_seconds": enumerated.duration.as_secs_f64(),
        "hops": paths.hops.iter().map(hop_json).collect::<Vec<Value>>(),
        "links": paths.links.iter().map(link_json).collect::<Vec<Value>>(),
    })
}

fn hop_json(hop: &EnumeratedHop) -> Value {
    let routers = hop.routers.iter();
    let routers = routers.map(|router| json!({"address": router.address, "flows": router.flows.len()}));
    json!({
        "ttl": hop.ttl,
        "completeness": completeness_name(hop.completeness),
        "routers": routers.collect::<Vec<Value>>(),
        "destination_flows": hop.destination_flows.len(),
        "unanswered_flows": hop.unanswered_flows.len(),
    })
}

fn link_json(link: &Link) -> Value {
    let to = match link.to {
        Reached::Router(router) => Some(router),
        Reached::Destination => None,
    };
    json!({"ttl": link.ttl, "from": link.from, "to": to})
}

/// Whether all routers of a hop were found, as the API and the command show it.
#[must_use]
pub const fn completeness_name(completeness: Completeness) -> &'static str {
    match completeness {
        Completeness::Complete => "complete",
        Completeness::CompleteIfUniform => "complete_if_uniform",
        Completeness::PartlySilent => "partly_silent",
        Completeness::Silent => "silent",
        Completeness::PerPacket => "per_packet",
        Completeness::Limited(limit) => limit_name(limit),
    }
}

const fn end_name(end: EnumerationEnd) -> &'static str {
    match end {
        EnumerationEnd::Destination => "destination",
        EnumerationEnd::Loop => "loop",
        EnumerationEnd::Silent => "silent",
        EnumerationEnd::HopsMax => "hops_max",
        EnumerationEnd::Limited(limit) => limit_name(limit),
    }
}

const fn limit_name(limit: EnumerationLimit) -> &'static str {
    match limit {
        EnumerationLimit::Flows => "limited_by_flows",
        EnumerationLimit::Routers => "limited_by_routers",
        EnumerationLimit::Probes => "limited_by_probes",
        EnumerationLimit::NotSent => "limited_by_this_host",
    }
}
