//! Echo probes: loss, RTT and jitter.

mod events;
mod groups;
mod path;
mod plan;
mod responder;
mod task;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::Arc;

use crate::config::Probe;
use crate::config::echo::Echo;
use crate::metrics::AnySeries;
use crate::metrics::echo::EchoLimits;
use crate::probe::{Groups, Plan, ProbeKind, Remote};
use crate::settings::Settings;

pub use path::{EchoPath, FiniteRun};
pub use plan::EchoPlan;
pub use responder::responder;
pub use task::DatagramEcho;

impl ProbeKind for Arc<Echo> {
    fn plan(
        &self,
        probe: &Probe,
        remote: &Remote<'_>,
        address: IpAddr,
        settings: &Settings,
    ) -> Box<dyn Plan> {
        Box::new(EchoPlan::new(probe, self, remote, address, settings))
    }

    fn probe_series(&self, probe: &Probe) -> Vec<Arc<dyn AnySeries>> {
        vec![Arc::new(EchoLimits::new(&probe.name, self.late_after, self.lost_after))]
    }

    fn groups(&self) -> Option<Box<dyn Groups>> {
        Some(Box::<groups::EchoGroups>::default())
    }
}
