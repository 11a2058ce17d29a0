//! The UDP responder: a STAMP responder on a datagram loop.

use std::sync::{Arc, Mutex};

use pathmeter_proto::echo::{ResponderReport, StampResponder};
use pathmeter_proto::machine::Arrival;
use pathmeter_proto::probe_budget::ProbeBudget;
use pathmeter_proto::time::Timestamp;

use crate::datagram::{Access, MachineTask, Notice, Recorder, Service, ServiceTasks, Socket, Traffic};
use crate::metrics::agent::ResponderSeries;

/// A service that answers STAMP requests on `sockets` and keeps state of at most `sessions` sessions. Its
/// replies whose TTL ends at a router share the limits of `budget`.
#[must_use]
pub fn responder(
    sockets: Vec<Socket>,
    access: Access,
    sessions: usize,
    budget: Arc<Mutex<ProbeBudget>>,
    series: Arc<ResponderSeries>,
) -> Service {
    let machine = StampResponder::with_probe_budget(access.policy, access.keys, sessions, budget);
    let task = MachineTask { machine, recorder: ResponderRecorder { series } };
    Service { sockets, tasks: ServiceTasks::One(Box::new(task)), answers_probes: true }
}

#[derive(Debug)]
struct ResponderRecorder {
    series: Arc<ResponderSeries>,
}

impl Recorder<StampResponder> for ResponderRecorder {
    fn record(&mut self, report: ResponderReport, _: &mut Traffic) -> Option<Notice> {
        match report {
            ResponderReport::Answered => self.series.replies.inc(),
            ResponderReport::Refused(refusal) => self.series.refused(refusal),
            ResponderReport::Sources(count) => {
                self.series.peers_seen.set(u64::try_from(count).unwrap_or(u64::MAX));
            }
        }
        None
    }

    fn stepping(&mut self, _: &mut StampResponder, _: Timestamp) {}

    fn waiting(&mut self, _: &StampResponder, _: Timestamp) {}

    fn received(&mut self, arrival: &Arrival) {
        if arrival.icmp.is_none() {
            self.series.requests.inc();
        }
    }

    fn not_sent(&mut self) {
        self.series.reply_errors.inc();
    }

    fn set_access(&mut self, machine: &mut StampResponder, access: &Access) {
        machine.change(access.policy.clone(), access.keys.clone());
    }

    fn delays_stop(&self) -> bool {
        false
    }

    fn is_balanced(&self, _: &StampResponder, _: Timestamp) -> bool {
        true
    }

    fn claims(&self, _: &StampResponder, _: &[u8], _: &Arrival) -> bool {
        false
    }
}
