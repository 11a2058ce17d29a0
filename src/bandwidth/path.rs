//! A running bandwidth path.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::bandwidth::RunDirection;
use pathmeter_proto::time::nanos;
use serde_json::{Map, Value, json};
use tokio::task::AbortHandle;

use super::latency::PathEchoes;
use super::plan::{BandwidthPlan, DirectionSeries};
use super::task::BandwidthTask;
use crate::bulk::LeaseClient;
use crate::http::auth::Signer;
use crate::http::client::Client;
use crate::metrics::AnySeries;
use crate::metrics::bandwidth::BandwidthSeries;
use crate::paths::PathKey;
use crate::probe::{Loops, Measured, Path, Plan, StartContext, TableRow};

impl Plan for BandwidthPlan {
    fn to(&self) -> SocketAddr {
        self.to
    }

    fn can_continue(&self, other: &dyn Plan) -> bool {
        other.as_any().downcast_ref::<Self>() == Some(self)
    }

    fn start(self: Box<Self>, start: &StartContext<'_>, earlier: Option<Box<dyn Path>>) -> Box<dyn Path> {
        let PathKey { probe, peer, family } = start.key;
        let earlier = earlier.and_then(|path| path.into_any().downcast::<BandwidthPath>().ok());
        let known = earlier.map(|path| path.series).unwrap_or_default();
        let series_of = |direction: &RunDirection| {
            let earlier = known.iter().find(|(known, _)| known == direction);
            let new = || Arc::new(BandwidthSeries::new(probe, peer, family, *direction));
            (*direction, earlier.map_or_else(new, |(_, series)| Arc::clone(series)))
        };
        let series: DirectionSeries = self.bandwidth.direction.list().iter().map(series_of).collect();
        series.iter().for_each(|(_, series)| series.interval.set(nanos(self.interval)));
        let client = Client {
            signer: start.settings.keys.mesh.as_deref().map(Signer::new),
            source: self.source,
            secure: self.https.as_ref().map(|https| start.settings.secure(https)),
            ..Client::default()
        };
        let task = BandwidthTask {
            name: format!("{probe}/{peer}/{family}"),
            plan: (*self).clone(),
            leases: LeaseClient { client, to: self.http, host: self.host.clone() },
            echoes: PathEchoes {
                plan: self.echo.clone(),
                keys: self.echo.keys(start.settings, peer),
                prober: start.loops.prober.sender(),
                id: start.id,
            },
            bulk: start.loops.bulk.clone(),
            series: series.clone(),
            seed: start.seed,
        };
        let runtime = start.loops.bulk.threads.runtime();
        let (task, failure) = match runtime {
            Ok(runtime) => (Some(runtime.spawn(task.run()).abort_handle()), None),
            Err(error) => (None, Some(format!("starting the thread for bulk connections: {error}"))),
        };
        Box::new(BandwidthPath { plan: *self, series, task, failure })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct BandwidthPath {
    plan: BandwidthPlan,
    series: DirectionSeries,
    /// `None` if there is no thread to run it.
    task: Option<AbortHandle>,
    failure: Option<String>,
}

impl Path for BandwidthPath {
    fn plan(&self) -> &dyn Plan {
        &self.plan
    }

    fn adjust(&mut self, _: Box<dyn Plan>, _: &StartContext<'_>) {}

    fn stop(&self, _: &Loops) {
        // A run in progress ends with it.
        self.task.iter().for_each(AbortHandle::abort);
    }

    fn series(&self) -> Vec<Arc<dyn AnySeries>> {
        self.series.iter().map(|(_, series)| Arc::clone(series) as _).collect()
    }

    fn measured(&self) -> Arc<dyn Measured> {
        Arc::new(BandwidthMeasured { series: self.series.clone(), failure: self.failure.clone() })
    }

    fn reply_interval_max(&self) -> Option<Duration> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[derive(Debug)]
struct BandwidthMeasured {
    series: DirectionSeries,
    failure: Option<String>,
}

impl Measured for BandwidthMeasured {
    fn last_reply(&self) -> u64 {
        self.series.iter().filter_map(|(_, series)| series.last()).map(|last| last.at).max().unwrap_or(0)
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn local_failure(&self) -> Option<String> {
        self.failure.clone()
    }

    fn json(&self) -> Map<String, Value> {
        let last = self.series.iter().filter_map(|(_, series)| series.last());
        let runs: Vec<Value> = last.map(|last| last.json).collect();
        [("bandwidth".to_owned(), json!(runs))].into_iter().collect()
    }

    fn row(&self) -> TableRow {
        let cell = |direction: RunDirection| {
            let series = self.series.iter().find(|(known, _)| *known == direction);
            let throughput = series.and_then(|(_, series)| series.last()?.throughput);
            #[expect(clippy::cast_precision_loss, reason = "display only")]
            let megabits = |bytes: u64| format!("{:.1}", bytes as f64 * 8.0 / 1e6);
            format!("{:>16}", throughput.map_or_else(|| "-".to_owned(), megabits))
        };
        let runs: u64 = self.series.iter().map(|(_, series)| series.runs()).sum();
        let cells = [RunDirection::Forward, RunDirection::Reverse].map(cell).concat();
        TableRow { head: TABLE_HEAD, cells: format!("{cells}{runs:>7}") }
    }
}

/// The table head of [`BandwidthMeasured::row`].
const TABLE_HEAD: &str = "  forward Mbit/s  reverse Mbit/s   runs";
