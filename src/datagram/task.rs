//! The tasks of a datagram loop: machines, each with a recorder that counts its reports.
//!
//! The loop does not depend on kinds of probe. Each kind provides a [`Machine`] and a [`Recorder`], which
//! [`MachineTask`] combines into a [`Task`].

use std::fmt;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::key::Keys;
use pathmeter_proto::machine::{
    Arrival, HostDrops, Machine, NotSent, Now, Send, SendId, Step, TimestampSource,
};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Goodbye;
use std::sync::Arc;

use crate::loops::PathEvent;
use crate::paths::PathId;

/// A unit of work that a loop runs. No method has a default, so that every kind of probe decides each of
/// them.
pub trait Task: fmt::Debug + std::marker::Send {
    /// See [`Machine::received`].
    fn received(&mut self, datagram: &[u8], arrival: &Arrival);
    /// See [`Machine::before_send`].
    fn before_send(&mut self, id: SendId, datagram: &mut [u8], now: Now);
    /// See [`Machine::sent`].
    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource);
    /// See [`Machine::not_sent`].
    fn not_sent(&mut self, id: SendId, why: NotSent);
    /// Steps the machine and counts its reports until another kind of step results. Appends a datagram to
    /// send to `arena`.
    fn step(
        &mut self,
        now: Now,
        drops: &mut HostDrops,
        arena: &mut Vec<u8>,
        traffic: &mut Traffic,
    ) -> TaskStep;
    /// See [`Machine::stop`].
    fn stop(&mut self);
    /// See [`Machine::withdraw`].
    fn withdraw(&mut self);
    /// See [`Machine::peer_leaving`].
    fn peer_leaving(&mut self, at: Timestamp);
    /// Applies a change of access rules.
    fn set_access(&mut self, access: &Access);
    /// Whether a stopping loop waits for this task, within its grace period.
    fn delays_stop(&self) -> bool;
    /// Whether the counters agree with the machine: sent = decided + in flight.
    fn is_balanced(&self, now: Timestamp) -> bool;
    /// Whether a datagram without a known session identifier answers a request of this task: a reply, or the
    /// quotation of an ICMP error.
    fn claims(&self, datagram: &[u8], arrival: &Arrival) -> bool;
}

/// The next action that a task requests from its loop.
#[derive(Debug)]
pub enum TaskStep {
    /// Send the datagram that was appended to the arena.
    Send(Send),
    /// Wait until this time or until the next input.
    Wait(Timestamp),
    /// Send a notice to the daemon.
    Notify(Notice),
    /// The task has finished and must be removed.
    Finished,
}

/// A notice from a task to the daemon.
#[derive(Debug)]
pub enum Notice {
    /// A peer sent a goodbye.
    PeerLeaving(Goodbye),
    /// An event of the task's path.
    Path(Box<dyn PathEvent>),
    /// The task of another path has something to do. It does not leave the loop.
    Wake(PathId),
}

/// The sources that responders answer, and the keys.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Allowed sources and their rate limits.
    pub policy: Policy,
    /// Keys of the mesh; `None`: no authentication.
    pub keys: Option<Arc<Keys>>,
}

/// Totals of a loop across its tasks, which determine how often it wakes.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Datagrams that were sent and have no verdict yet.
    pub outstanding: u64,
    /// Datagrams sent since the start.
    pub sent: u64,
    /// Until when replies are read at once, because what is sent next depends on them; `None`: they are read
    /// rarely, since kernel timestamps say when they came.
    pub prompt_until: Option<Timestamp>,
}

/// Counts the reports of a machine.
pub trait Recorder<M: Machine>: fmt::Debug + std::marker::Send {
    /// Counts a report. Returns a notice if the daemon must be informed.
    fn record(&mut self, report: M::Report, traffic: &mut Traffic) -> Option<Notice>;
    /// Called before the machine is stepped.
    fn stepping(&mut self, machine: &mut M, now: Timestamp);
    /// Called when all reports are recorded and the machine waits.
    fn waiting(&mut self, machine: &M, now: Timestamp);
    /// Called before the machine receives a datagram or an ICMP error.
    fn received(&mut self, arrival: &Arrival);
    /// Called when a datagram of the machine could not be sent.
    fn not_sent(&mut self);
    /// See [`Task::set_access`].
    fn set_access(&mut self, machine: &mut M, access: &Access);
    /// See [`Task::delays_stop`].
    fn delays_stop(&self) -> bool;
    /// See [`Task::is_balanced`].
    fn is_balanced(&self, machine: &M, now: Timestamp) -> bool;
    /// See [`Task::claims`].
    fn claims(&self, machine: &M, datagram: &[u8], arrival: &Arrival) -> bool;
}

/// A machine and its recorder.
#[derive(Debug)]
pub struct MachineTask<M, R> {
    /// The machine, which decides.
    pub machine: M,
    /// The recorder, which counts.
    pub recorder: R,
}

impl<M, R> Task for MachineTask<M, R>
where
    M: Machine + fmt::Debug + std::marker::Send,
    R: Recorder<M>,
{
    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        self.recorder.received(arrival);
        self.machine.received(datagram, arrival);
    }

    fn before_send(&mut self, id: SendId, datagram: &mut [u8], now: Now) {
        self.machine.before_send(id, datagram, now);
    }

    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource) {
        self.machine.sent(id, at, by);
    }

    fn not_sent(&mut self, id: SendId, why: NotSent) {
        self.recorder.not_sent();
        self.machine.not_sent(id, why);
    }

    fn step(
        &mut self,
        now: Now,
        drops: &mut HostDrops,
        arena: &mut Vec<u8>,
        traffic: &mut Traffic,
    ) -> TaskStep {
        self.recorder.stepping(&mut self.machine, now.at);
        loop {
            match self.machine.step(now, drops, arena) {
                Step::Send(send) => return TaskStep::Send(send),
                Step::Report(report) => {
                    if let Some(notice) = self.recorder.record(report, traffic) {
                        return TaskStep::Notify(notice);
                    }
                }
                Step::Wait(until) => {
                    self.recorder.waiting(&self.machine, now.at);
                    return TaskStep::Wait(until);
                }
                Step::Finished => return TaskStep::Finished,
            }
        }
    }

    fn stop(&mut self) {
        self.machine.stop();
    }

    fn withdraw(&mut self) {
        self.machine.withdraw();
    }

    fn peer_leaving(&mut self, at: Timestamp) {
        self.machine.peer_leaving(at);
    }

    fn set_access(&mut self, access: &Access) {
        self.recorder.set_access(&mut self.machine, access);
    }

    fn delays_stop(&self) -> bool {
        self.recorder.delays_stop()
    }

    fn is_balanced(&self, now: Timestamp) -> bool {
        self.recorder.is_balanced(&self.machine, now)
    }

    fn claims(&self, datagram: &[u8], arrival: &Arrival) -> bool {
        self.recorder.claims(&self.machine, datagram, arrival)
    }
}
