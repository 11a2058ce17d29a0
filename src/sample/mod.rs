//! A kind of probe that exists only in tests. It shows what a new kind must provide, and that no other code
//! has to change.
//!
//! It sends datagrams and counts those that are returned unchanged.

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
