//! The plan of a sample path, and a running sample path.

use std::any::Any;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::machine::SampleMachine;
use super::task::SampleRecorder;
use crate::datagram::{DatagramProtocol, MachineTask, NewTask, SourceChoice};
use crate::loops::NewPath;
use crate::metrics::AnySeries;
use crate::metrics::sample::SampleSeries;
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, Measured, Path, Plan, StartContext, TableRow};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SamplePlan {
    pub(super) to: SocketAddr,
    pub(super) interval: Duration,
    pub(super) size: u64,
}

impl Plan for SamplePlan {
    fn to(&self) -> SocketAddr {
        self.to
    }

    fn can_continue(&self, other: &dyn Plan) -> bool {
        other.as_any().downcast_ref::<Self>() == Some(self)
    }

    fn start(self: Box<Self>, start: &StartContext<'_>, earlier: Option<Box<dyn Path>>) -> Box<dyn Path> {
        let PathKey { probe, peer, family } = start.key;
        let earlier = earlier.and_then(|path| path.into_any().downcast::<SamplePath>().ok());
        let series =
            earlier.map_or_else(|| Arc::new(SampleSeries::new(probe, peer, family)), |path| path.series);
        let (plan, recorder) = (*self, SampleRecorder { series: Arc::clone(&series) });
        let Self { to, interval, size } = plan.clone();
        let task = NewTask {
            protocol: DatagramProtocol::Udp,
            to,
            source: SourceChoice {
                address: IpAddr::from(Ipv4Addr::UNSPECIFIED),
                port: 0,
                dont_fragment: false,
            },
            flows: 1,
            interval,
            seed: start.seed,
            companion: None,
            is_following: false,
            build: Box::new(move |ssids, at| {
                let size = usize::try_from(size).unwrap();
                let machine = SampleMachine::new(to, ssids[0], interval, size, at);
                Box::new(MachineTask { machine, recorder })
            }),
        };
        start.loops.prober.start(NewPath { id: start.id, task, peer_left_at: start.peer_left_at });
        Box::new(SamplePath { id: start.id, plan, series })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct SamplePath {
    id: PathId,
    plan: SamplePlan,
    series: Arc<SampleSeries>,
}

impl Path for SamplePath {
    fn plan(&self) -> &dyn Plan {
        &self.plan
    }

    fn adjust(&mut self, _: Box<dyn Plan>, _: &StartContext<'_>) {}

    fn stop(&self, loops: &Loops) {
        loops.prober.remove(self.id);
    }

    fn series(&self) -> Vec<Arc<dyn AnySeries>> {
        vec![Arc::clone(&self.series) as _]
    }

    fn measured(&self) -> Arc<dyn Measured> {
        Arc::new(SampleMeasured { series: Arc::clone(&self.series) })
    }

    fn reply_interval_max(&self) -> Option<Duration> {
        Some(Duration::from_secs(1))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[derive(Debug)]
struct SampleMeasured {
    series: Arc<SampleSeries>,
}

impl Measured for SampleMeasured {
    fn last_reply(&self) -> u64 {
        self.series.answered.get()
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn local_failure(&self) -> Option<String> {
        None
    }

    fn json(&self) -> Map<String, Value> {
        [("answered".to_owned(), self.series.answered.get().into())].into_iter().collect()
    }

    fn row(&self) -> TableRow {
        TableRow { head: "answered", cells: self.series.answered.get().to_string() }
    }
}
