//! Trace probes: the routes of an echo probe's flows.

mod enumeration;
mod events;
mod flow_events;
mod json;
mod path;
mod quoted;
mod series;
mod task;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::trace::{DirectedReport, ProbeProtocol};
use tokio::sync::mpsc::UnboundedSender;

use crate::config::Probe;
use crate::config::trace::Trace;
use crate::metrics::AnySeries;
use crate::probe::{Groups, Path, Plan, ProbeKind, Remote, StartContext};
use crate::settings::Settings;

pub use enumeration::{can_be_enumerated, completeness_name, enumerate, enumerate_path, enumerated_json};
use path::{TracePath, TracePlan};

/// What is traced or enumerated.
#[derive(Debug, Clone, Copy)]
pub struct TraceParameters<'a> {
    /// The keys that every kind of probe has.
    pub probe: &'a Probe,
    /// Those of a trace.
    pub trace: &'a Trace,
    /// The peer or target.
    pub remote: Remote<'a>,
    /// The address of `remote`.
    pub address: IpAddr,
}

/// Starts traces of one path on the loops of `start`, and passes every report to `reports`.
pub fn start(
    parameters: TraceParameters<'_>,
    start: &StartContext<'_>,
    reports: UnboundedSender<DirectedReport>,
) {
    let plan = TracePlan::new(parameters, start.settings);
    TracePath::start(plan, start, None, Some(reports));
}

/// A trace of one flow to any host, which is not repeated.
#[derive(Debug, Clone, Copy)]
pub struct SingleTrace {
    /// The packets of its probes.
    pub protocol: ProbeProtocol,
    /// The host. The port is not used for ICMP.
    pub to: SocketAddr,
    /// Largest TTL.
    pub hops_max: u8,
    /// How long to wait for each answer.
    pub answer_wait: Duration,
}

/// Starts a single trace, and passes every report to `reports`. It must be stopped after the first complete
/// trace.
pub fn start_once(
    once: &SingleTrace,
    start: &StartContext<'_>,
    reports: UnboundedSender<DirectedReport>,
) -> Box<dyn Path> {
    Box::new(TracePath::start(TracePlan::once(once), start, None, Some(reports)))
}

impl ProbeKind for Trace {
    fn plan(
        &self,
        probe: &Probe,
        remote: &Remote<'_>,
        address: IpAddr,
        settings: &Settings,
    ) -> Box<dyn Plan> {
        let parameters = TraceParameters { probe, trace: self, remote: *remote, address };
        Box::new(TracePlan::new(parameters, settings))
    }

    fn probe_series(&self, _: &Probe) -> Vec<Arc<dyn AnySeries>> {
        Vec::new()
    }

    fn groups(&self) -> Option<Box<dyn Groups>> {
        None
    }
}
