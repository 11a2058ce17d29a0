//! The recorder of the sample probe, and its event.

use std::sync::Arc;

use pathmeter_proto::machine::{Arrival, Machine as _};
use pathmeter_proto::time::Timestamp;
use serde::Serialize;

use super::machine::{SampleMachine, SampleReport};
use crate::datagram::{Access, Notice, Recorder, Traffic};
use crate::event_log::{EventLog, EventType};
use crate::loops::PathEvent;
use crate::metrics::sample::SampleSeries;
use crate::paths::PathKey;

#[derive(Debug)]
pub(super) struct SampleRecorder {
    pub(super) series: Arc<SampleSeries>,
}

impl Recorder<SampleMachine> for SampleRecorder {
    fn record(&mut self, report: SampleReport, _: &mut Traffic) -> Option<Notice> {
        match report {
            SampleReport::Sent => self.series.sent.inc(),
            SampleReport::Withdrawn => self.series.withdrawn.inc(),
            SampleReport::Answered { is_first } => {
                self.series.answered.inc();
                return is_first.then(|| Notice::Path(Box::new(FirstReply)));
            }
        }
        None
    }

    fn stepping(&mut self, _: &mut SampleMachine, _: Timestamp) {}

    fn waiting(&mut self, _: &SampleMachine, _: Timestamp) {}

    fn received(&mut self, _: &Arrival) {}

    fn not_sent(&mut self) {}

    fn set_access(&mut self, _: &mut SampleMachine, _: &Access) {}

    fn delays_stop(&self) -> bool {
        true
    }

    fn is_balanced(&self, machine: &SampleMachine, _: Timestamp) -> bool {
        let decided = self.series.answered.get() + self.series.withdrawn.get();
        self.series.sent.get() - decided == machine.in_flight() as u64
    }

    fn claims(&self, _: &SampleMachine, _: &[u8], _: &Arrival) -> bool {
        false
    }
}

#[derive(Debug)]
struct FirstReply;

#[derive(Serialize)]
struct SampleAnswered<'a> {
    peer: &'a str,
}

impl EventType for SampleAnswered<'_> {
    const NAME: &'static str = "sample_answered";
}

impl PathEvent for FirstReply {
    fn report(&self, path: &PathKey, log: &EventLog) {
        log.add(&SampleAnswered { peer: &path.peer });
    }
}
