//! Bandwidth probes: how fast a path is, and what a load does to its latency.

pub mod latency;
mod path;
mod plan;
pub mod run;
mod task;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::config::Probe;
use crate::config::bandwidth::Bandwidth;
use crate::config::echo::Echo;
use crate::echo::EchoPlan;
use crate::http::client::authority;
use crate::metrics::AnySeries;
use crate::probe::{Groups, Plan, ProbeKind, Remote};
use crate::settings::Settings;

use self::plan::BandwidthPlan;

impl ProbeKind for Bandwidth {
    fn plan(
        &self,
        probe: &Probe,
        remote: &Remote<'_>,
        address: IpAddr,
        settings: &Settings,
    ) -> Box<dyn Plan> {
        let (http_port, agent_port, name, https) = match remote {
            Remote::Peer(peer) => (peer.http_port, peer.agent_port, &peer.address, peer.https.clone()),
            // `check_kind` refuses targets.
            Remote::Target(target) => (target.port, target.port, &target.address, None),
        };
        // The echoes have best effort: they stand for other traffic.
        let mut echo = latency::echo_probe(Vec::new()).expect("there are no options");
        echo.source = probe.source;
        let kind = echo.kind.downcast::<Echo>().expect("the options describe an echo probe");
        Box::new(BandwidthPlan {
            to: SocketAddr::new(address, agent_port),
            http: SocketAddr::new(address, http_port),
            host: authority(name, http_port),
            https,
            source: probe.source,
            dscp: probe.dscp,
            interval: probe.interval,
            bandwidth: self.clone(),
            echo: EchoPlan::new(&echo, &Arc::new(kind.clone()), remote, address, settings),
        })
    }

    fn probe_series(&self, _: &Probe) -> Vec<Arc<dyn AnySeries>> {
        Vec::new()
    }

    fn groups(&self) -> Option<Box<dyn Groups>> {
        None
    }
}
