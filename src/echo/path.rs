//! A running echo path.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use pathmeter_proto::echo::EchoReport;
use pathmeter_proto::mtu;
use serde_json::{Map, Value, json};

use super::plan::EchoPlan;
use super::task::{DatagramEcho, mtu_search};
use crate::datagram::Control;
use crate::loops::NewPath;
use crate::metrics::AnySeries;
use crate::metrics::echo::{EchoSeries, Quantile};
use crate::metrics::path_mtu::PathMtuSeries;
use crate::metrics::stream::StreamSeries;
use crate::paths::{PathId, PathKey};
use crate::probe::{Loops, Measured, Path, Plan, StartContext, TableRow};
use crate::stream::{Observer, StreamTask};

/// A measurement with a fixed count whose reports are received by the caller.
#[derive(Debug)]
pub struct FiniteRun {
    /// Number of datagrams, messages or requests to send.
    pub count: u64,
    /// Receives a copy of every report.
    pub reports: mpsc::Sender<EchoReport>,
}

/// A running echo path.
#[derive(Debug)]
pub struct EchoPath {
    pub(super) id: PathId,
    pub(super) plan: EchoPlan,
    pub(super) series: Arc<EchoSeries>,
    /// Series of its connections; `None` over datagrams.
    pub(super) stream: Option<Arc<StreamSeries>>,
    /// Series of its path MTU; `None` if there is no MTU search.
    pub(super) path_mtu: Option<Arc<PathMtuSeries>>,
}

impl EchoPath {
    /// Starts a path. It continues the counters of `earlier`, and with `finite_run` it ends after a fixed
    /// count.
    #[must_use]
    pub fn start(
        plan: EchoPlan,
        start: &StartContext<'_>,
        earlier: Option<Self>,
        finite_run: Option<FiniteRun>,
    ) -> Self {
        let PathKey { probe, peer, family } = start.key;
        let (series, stream, mtu_series) = match earlier {
            Some(earlier) => {
                earlier.series.continue_with(plan.flows().into());
                (earlier.series, earlier.stream, earlier.path_mtu)
            }
            None => (Arc::new(EchoSeries::new(probe, peer, family, plan.flows().into())), None, None),
        };
        let (count, reports) = match finite_run {
            Some(FiniteRun { count, reports }) => (Some(count), Some(reports)),
            None => (None, None),
        };
        let (id, peer_left_at) = (start.id, start.peer_left_at);
        let keys = start.settings.keys.get(plan.keys, peer);
        series.set_load(start.loops.bulk.loads.of(plan.to().ip()));
        let mut path = Self { id, plan, series, stream: None, path_mtu: None };
        path.path_mtu = path.plan.mtu_series(start, mtu_series);
        if let Some((spec, source)) = path.plan.datagrams(keys.clone(), count, start.seed) {
            let echo = DatagramEcho {
                spec,
                source,
                series: Arc::clone(&path.series),
                path_mtu: path.mtu_search(start),
                reports,
                followed: Arc::clone(&start.followed),
            };
            start.loops.prober.start(NewPath { id, task: echo.into_task(), peer_left_at });
        } else if let Some(protocol) = path.plan.stream_protocol(keys.as_deref(), start.settings) {
            let new = || Arc::new(StreamSeries::new(probe, peer, family));
            let stream = stream.unwrap_or_else(new);
            path.stream = Some(Arc::clone(&stream));
            let followed = Arc::clone(&start.followed);
            let observer = Observer(Box::new(move |report| {
                // A path that follows takes what it finds within a second.
                let _ = followed.record(report);
                if let Some(reports) = &reports {
                    // The receiver may be gone.
                    let _ = reports.send(*report);
                }
            }));
            let task = path.plan.stream(protocol, count, start, Arc::clone(&path.series), stream, observer);
            start.loops.streams.start(NewPath { id, task: StreamTask::Echo(Box::new(task)), peer_left_at });
        }
        path
    }

    /// Number of HTTP responses with an unexpected status or body.
    #[must_use]
    pub fn unexpected_responses(&self) -> u64 {
        self.stream.as_ref().map_or(0, |stream| stream.unexpected_responses())
    }

    /// The specification and the series of the MTU search.
    pub(super) fn mtu_search(&self, start: &StartContext<'_>) -> Option<(mtu::MtuSpec, Arc<PathMtuSeries>)> {
        let series = self.path_mtu.as_ref()?;
        Some((self.plan.mtu_spec(start, series.bytes())?, Arc::clone(series)))
    }
}

impl Plan for EchoPlan {
    fn to(&self) -> SocketAddr {
        Self::to(self)
    }

    fn can_continue(&self, other: &dyn Plan) -> bool {
        let other = other.as_any().downcast_ref::<Self>();
        other.is_some_and(|other| self.differs_only_in_path_mtu(other))
    }

    fn start(self: Box<Self>, start: &StartContext<'_>, earlier: Option<Box<dyn Path>>) -> Box<dyn Path> {
        let earlier = earlier.and_then(|path| path.into_any().downcast::<EchoPath>().ok());
        Box::new(EchoPath::start(*self, start, earlier.map(|path| *path), None))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Path for EchoPath {
    fn plan(&self) -> &dyn Plan {
        &self.plan
    }

    fn adjust(&mut self, plan: Box<dyn Plan>, start: &StartContext<'_>) {
        let Some(plan) = plan.as_any().downcast_ref::<EchoPlan>() else { return };
        if plan.path_mtu() == self.plan.path_mtu() {
            return;
        }
        self.plan = plan.clone();
        self.path_mtu = self.plan.mtu_series(start, self.path_mtu.take());
        let companion = self
            .mtu_search(start)
            .map(|(spec, series)| mtu_search(spec, series, Arc::clone(&start.followed)));
        start.loops.prober.control(Control::SetCompanion(self.id, companion));
    }

    fn stop(&self, loops: &Loops) {
        match self.plan.is_stream() {
            false => loops.prober.remove(self.id),
            true => loops.streams.remove(self.id),
        }
    }

    fn series(&self) -> Vec<Arc<dyn AnySeries>> {
        let mut series: Vec<Arc<dyn AnySeries>> = vec![Arc::clone(&self.series) as _];
        series.extend(self.path_mtu.iter().map(|series| Arc::clone(series) as _));
        series.extend(self.stream.iter().map(|series| Arc::clone(series) as _));
        series
    }

    fn measured(&self) -> Arc<dyn Measured> {
        Arc::new(EchoMeasured { series: Arc::clone(&self.series), path_mtu: self.path_mtu.clone() })
    }

    fn reply_interval_max(&self) -> Option<Duration> {
        Some(self.plan.lost_after() + 2 * self.plan.interval())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The results of an echo path.
#[derive(Debug)]
struct EchoMeasured {
    series: Arc<EchoSeries>,
    path_mtu: Option<Arc<PathMtuSeries>>,
}

impl Measured for EchoMeasured {
    fn last_reply(&self) -> u64 {
        self.series.last_reply()
    }

    fn is_draining(&self) -> bool {
        self.series.is_draining()
    }

    fn local_failure(&self) -> Option<String> {
        let (error, count) = self.series.send_errors().max_by_key(|(_, count)| *count)?;
        let nothing_sent = self.series.sent.get() == 0;
        nothing_sent
            .then(|| format!("this host could not send any datagram of the path: {error}, {count} times"))
    }

    fn json(&self) -> Map<String, Value> {
        let [forward, reverse, unknown] = self.series.lost();
        let mut counts = json!({
            "sent": self.series.sent.get(),
            "decided": self.series.decided(),
            "ok": self.series.ok.get(),
            "lost": {"forward": forward, "reverse": reverse, "unknown": unknown},
        });
        let send_errors = self.series.send_errors().map(|(error, count)| (error.to_owned(), count.into()));
        let icmp_errors = self.series.icmp_errors().map(|(kind, count)| (kind.to_owned(), count.into()));
        let errors: [(&str, Map<String, Value>); 2] =
            [("send_errors", send_errors.collect()), ("icmp_errors", icmp_errors.collect())];
        for (name, errors) in errors.into_iter().filter(|(_, errors)| !errors.is_empty()) {
            counts[name] = errors.into();
        }
        let path_mtu = self.path_mtu.as_ref().and_then(|series| series.bytes());
        let fields = [("counts".to_owned(), counts), ("path_mtu_bytes".to_owned(), json!(path_mtu))];
        fields.into_iter().collect()
    }

    fn row(&self) -> TableRow {
        #[expect(clippy::cast_precision_loss, reason = "display only")]
        let milliseconds = |nanos: u64| format!("{:.3}", nanos as f64 / 1e6);
        let quantile = |q| match self.series.rtt_quantile(q) {
            None => "-".to_owned(),
            Some(Quantile::Below(nanos)) => format!("<{}", milliseconds(nanos)),
            Some(Quantile::About(nanos)) => milliseconds(nanos),
        };
        let [forward, reverse, unknown] = self.series.lost();
        let (sum, count) = self.series.ipdv();
        let cells = format!(
            "{:>7} {forward:>9} {reverse:>9} {unknown:>9} {:>10} {:>10} {:>10}",
            self.series.sent.get(),
            quantile(0.5),
            quantile(0.99),
            sum.checked_div(count).map_or_else(|| "-".to_owned(), milliseconds)
        );
        TableRow { head: TABLE_HEAD, cells }
    }
}

/// The table head of [`EchoMeasured::row`].
const TABLE_HEAD: &str = "   sent  lost fwd  lost rev    lost ?     p50 ms     p99 ms  jitter ms";
