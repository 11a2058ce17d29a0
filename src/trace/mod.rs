//! Trace probes: the routes of an echo probe's flows.

mod events;
mod json;
mod path;
mod task;

use std::net::IpAddr;
use std::sync::Arc;

use crate::config::Probe;
use crate::config::trace::Trace;
use crate::metrics::AnySeries;
use crate::probe::{Groups, Plan, ProbeKind, Remote};
use crate::settings::Settings;

use path::TracePlan;

impl ProbeKind for Trace {
    fn plan(
        &self,
        probe: &Probe,
        remote: &Remote<'_>,
        address: IpAddr,
        settings: &Settings,
    ) -> Box<dyn Plan> {
        Box::new(TracePlan::new(probe, self, remote, address, settings))
    }

    fn probe_series(&self, _: &Probe) -> Vec<Arc<dyn AnySeries>> {
        Vec::new()
    }

    fn groups(&self) -> Option<Box<dyn Groups>> {
        None
    }
}
