//! The machine of the sample probe.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use pathmeter_proto::machine::{
    Arrival, HostDrops, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use pathmeter_proto::time::Timestamp;

/// Sends a datagram each interval.
#[derive(Debug)]
pub(super) struct SampleMachine {
    pub(super) to: SocketAddr,
    pub(super) ssid: u16,
    pub(super) interval: Duration,
    pub(super) size: usize,
    pub(super) next: Timestamp,
    sequence: u64,
    in_flight: Vec<u64>,
    is_stopping: bool,
    reports: VecDeque<SampleReport>,
}

/// A report of [`SampleMachine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SampleReport {
    Sent,
    Answered { is_first: bool },
    Withdrawn,
}

/// Offset of the session identifier in a STAMP packet (RFC 8972 section 3), which assigns replies to their
/// task.
const SSID_AT: usize = 14;

impl SampleMachine {
    pub(super) fn new(to: SocketAddr, ssid: u16, interval: Duration, size: usize, at: Timestamp) -> Self {
        let (in_flight, reports) = (Vec::new(), VecDeque::new());
        Self { to, ssid, interval, size, next: at, sequence: 0, in_flight, is_stopping: false, reports }
    }
}

impl Machine for SampleMachine {
    type Report = SampleReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        let sequence = datagram.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let index = self.in_flight.iter().position(|known| Some(*known) == sequence);
        if let (None, Some(index)) = (arrival.icmp, index) {
            let is_first = self.in_flight.remove(index) == 0;
            self.reports.push_back(SampleReport::Answered { is_first });
        }
    }

    fn sent(&mut self, id: SendId, _: Timestamp, by: TimestampSource) {
        if by == TimestampSource::User {
            self.in_flight.push(id.0);
            self.reports.push_back(SampleReport::Sent);
        }
    }

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {
        self.reports.extend(self.in_flight.drain(..).map(|_| SampleReport::Withdrawn));
    }

    fn peer_leaving(&mut self, _: Timestamp) {
        self.withdraw();
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn step(&mut self, now: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<SampleReport> {
        if let Some(report) = self.reports.pop_front() {
            return Step::Report(report);
        }
        if self.is_stopping {
            return if self.in_flight.is_empty() { Step::Finished } else { Step::Wait(Timestamp::NEVER) };
        }
        if now.at < self.next {
            return Step::Wait(self.next);
        }
        self.next = now.at + self.interval;
        let start = arena.len();
        arena.resize(start + self.size, 0);
        arena[start..start + 8].copy_from_slice(&self.sequence.to_be_bytes());
        arena[start + SSID_AT..start + SSID_AT + 2].copy_from_slice(&self.ssid.to_be_bytes());
        self.sequence += 1;
        Step::Send(Send {
            id: SendId(self.sequence - 1),
            flow: 0,
            from: None,
            to: self.to,
            tos: 0,
            ttl: 64,
            dont_fragment: false,
            segment: None,
            timestamp: false,
        })
    }
}
