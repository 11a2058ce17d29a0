//! The tasks of an echo path on a datagram loop: the prober and the MTU search.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use pathmeter_proto::echo::{EchoReport, EchoSpec, Prober, WireFormat};
use pathmeter_proto::machine::{Arrival, Machine as _};
use pathmeter_proto::mtu::{self, MtuSearch};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::Trigger;

use super::events::MtuChanged;
use crate::datagram::{
    Access, Companion, DatagramProtocol, MachineTask, NewTask, Notice, Recorder, SourceChoice, Traffic,
};
use crate::metrics::echo::EchoSeries;
use crate::metrics::path_mtu::PathMtuSeries;
use crate::probe::Followed;

/// An echo path over datagrams.
#[derive(Debug)]
pub struct DatagramEcho {
    /// What to measure. Only the number of session identifiers matters: the loop chooses their values.
    pub spec: EchoSpec,
    /// The source address and port.
    pub source: SourceChoice,
    /// The series that count the reports.
    pub series: Arc<EchoSeries>,
    /// The MTU search and its series; `None`: no search. Supported only with STAMP.
    pub path_mtu: Option<(mtu::MtuSpec, Arc<PathMtuSeries>)>,
    /// Receives a copy of every report; `None` if not needed.
    pub reports: Option<mpsc::Sender<EchoReport>>,
    /// The link to the path that follows this one.
    pub followed: Arc<Followed>,
}

impl DatagramEcho {
    /// The task for a datagram loop.
    ///
    /// # Panics
    /// If there are more than 255 flows; the configuration allows 16.
    #[must_use]
    pub fn into_task(self) -> NewTask {
        let Self { mut spec, source, series, path_mtu, reports, followed } = self;
        let protocol = match spec.wire {
            WireFormat::Stamp { .. } => DatagramProtocol::Udp,
            WireFormat::Icmp => DatagramProtocol::Icmp,
        };
        if protocol == DatagramProtocol::Icmp {
            spec.to.set_port(0);
        }
        let path_mtu = path_mtu.filter(|_| protocol == DatagramProtocol::Udp);
        NewTask {
            protocol,
            to: spec.to,
            source,
            flows: u8::try_from(spec.ssids.len()).expect("few flows"),
            interval: spec.interval,
            seed: spec.seed,
            companion: path_mtu.map(|(spec, series)| mtu_search(spec, series, Arc::clone(&followed))),
            is_following: false,
            build: Box::new(move |ssids, at| {
                spec.ssids = ssids;
                let recorder = EchoRecorder { series, reports, since: at, followed };
                Box::new(MachineTask { machine: Prober::new(spec, at), recorder })
            }),
        }
    }
}

/// The MTU search of an echo path, as a companion of its prober.
pub(super) fn mtu_search(
    mut spec: mtu::MtuSpec,
    series: Arc<PathMtuSeries>,
    followed: Arc<Followed>,
) -> Companion {
    Companion {
        seed: spec.seed,
        build: Box::new(move |ssid, at| {
            spec.ssid = ssid;
            Box::new(MachineTask {
                machine: MtuSearch::new(spec, at),
                recorder: MtuRecorder { series, followed },
            })
        }),
    }
}

#[derive(Debug)]
struct EchoRecorder {
    series: Arc<EchoSeries>,
    reports: Option<mpsc::Sender<EchoReport>>,
    /// When this prober started. Another prober, on another thread, may have used the series before.
    since: Timestamp,
    followed: Arc<Followed>,
}

/// Time after which an earlier prober of the same path has ended.
const SETTLING_TIME: Duration = Duration::from_secs(1);

impl Recorder<Prober> for EchoRecorder {
    fn record(&mut self, report: EchoReport, traffic: &mut Traffic) -> Option<Notice> {
        match report {
            EchoReport::Sent { .. } => {
                traffic.outstanding += 1;
                traffic.sent += 1;
            }
            EchoReport::Decided { .. } => traffic.outstanding = traffic.outstanding.saturating_sub(1),
            EchoReport::Unsent(_)
            | EchoReport::SendError(_)
            | EchoReport::Ipdv(_)
            | EchoReport::Duplicate
            | EchoReport::Reordered
            | EchoReport::VeryLate
            | EchoReport::Mismatched(_)
            | EchoReport::BurstBegan
            | EchoReport::BurstEnded(_)
            | EchoReport::TransmitLag(_)
            | EchoReport::TurnaroundInvalid
            | EchoReport::Icmp(_)
            | EchoReport::LossyFlows(_) => {}
        }
        self.series.record(&report);
        let wake = self.followed.record(&report);
        if let Some(reports) = &self.reports {
            // The receiver may be gone.
            let _ = reports.send(report);
        }
        wake.map(Notice::Wake)
    }

    fn stepping(&mut self, _: &mut Prober, _: Timestamp) {}

    fn waiting(&mut self, prober: &Prober, now: Timestamp) {
        self.series.set_draining(prober.is_draining(now));
    }

    fn received(&mut self, _: &Arrival) {}

    fn not_sent(&mut self) {}

    fn set_access(&mut self, _: &mut Prober, _: &Access) {}

    fn delays_stop(&self) -> bool {
        true
    }

    fn is_balanced(&self, prober: &Prober, now: Timestamp) -> bool {
        if now.since(self.since) < SETTLING_TIME {
            return true;
        }
        let in_flight = u64::try_from(prober.in_flight()).unwrap_or(u64::MAX);
        self.series.sent.get().checked_sub(self.series.decided()) == Some(in_flight)
    }

    fn claims(&self, prober: &Prober, datagram: &[u8], arrival: &Arrival) -> bool {
        prober.owns_reply(datagram, arrival.flow)
    }
}

#[derive(Debug)]
struct MtuRecorder {
    series: Arc<PathMtuSeries>,
    followed: Arc<Followed>,
}

impl Recorder<MtuSearch> for MtuRecorder {
    fn record(&mut self, report: mtu::MtuReport, _: &mut Traffic) -> Option<Notice> {
        self.series.record(&report);
        match report {
            mtu::MtuReport::Changed { from, to } => {
                if from.is_some() {
                    // The follower acts on it with its next probe.
                    self.followed.trigger(Trigger::Mtu);
                }
                Some(Notice::Path(Box::new(MtuChanged { from, to })))
            }
            mtu::MtuReport::Sent
            | mtu::MtuReport::Acknowledged
            | mtu::MtuReport::Lost
            | mtu::MtuReport::TooBig => None,
        }
    }

    fn stepping(&mut self, _: &mut MtuSearch, _: Timestamp) {}

    fn waiting(&mut self, _: &MtuSearch, _: Timestamp) {}

    fn received(&mut self, _: &Arrival) {}

    fn not_sent(&mut self) {}

    fn set_access(&mut self, _: &mut MtuSearch, _: &Access) {}

    fn delays_stop(&self) -> bool {
        false
    }

    /// There is nothing to balance: each probe packet is either answered or lost.
    fn is_balanced(&self, _: &MtuSearch, _: Timestamp) -> bool {
        true
    }

    fn claims(&self, search: &MtuSearch, datagram: &[u8], _: &Arrival) -> bool {
        search.owns_reply(datagram)
    }
}
