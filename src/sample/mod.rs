//! A kind of probe that exists in tests only: it shows what a new kind brings, and that nothing else has to change.
//!
//! It sends datagrams and counts those that come back as they were sent.

mod machine;
mod path;
mod task;
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::config::Probe;
use crate::config::sample::Sample;
use crate::metrics::AnySeries;
use crate::probe::{Groups, Plan, ProbeKind, Remote};
use crate::settings::Settings;

use path::SamplePlan;

impl ProbeKind for Sample {
    fn plan(&self, probe: &Probe, remote: &Remote<'_>, address: IpAddr, _: &Settings) -> Box<dyn Plan> {
        let port = match remote {
            Remote::Peer(peer) => peer.stamp_port,
            Remote::Target(target) => target.port,
        };
        let to = SocketAddr::new(address, port);
        Box::new(SamplePlan { to, interval: probe.interval, size: self.size })
    }

    fn probe_series(&self, _: &Probe) -> Vec<Arc<dyn AnySeries>> {
        Vec::new()
    }

    fn groups(&self) -> Option<Box<dyn Groups>> {
        None
    }
}
