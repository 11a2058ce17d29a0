//! What a datagram loop runs: machines, each with a recorder that counts what it reports.
//!
//! The loop knows tasks and no kinds of probe. A kind brings a [`Machine`] and a [`Recorder`]; [`MachineTask`] makes a
//! [`Task`] of both.

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

/// Something that a loop runs. No method has a default: each is a question that every kind of probe must answer.
pub trait Task: fmt::Debug + std::marker::Send {
    /// See [`Machine::received`].
    fn received(&mut self, datagram: &[u8], arrival: &Arrival);
    /// See [`Machine::before_send`].
    fn before_send(&mut self, id: SendId, datagram: &mut [u8], now: Now);
    /// See [`Machine::sent`].
    fn sent(&mut self, id: SendId, at: Timestamp, by: TimestampSource);
    /// See [`Machine::not_sent`].
    fn not_sent(&mut self, id: SendId, why: NotSent);
    /// Steps until something other than a counted report comes out. A datagram to send is appended to `arena`.
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
    /// Whom to answer has changed.
    fn set_access(&mut self, access: &Access);
    /// Whether a loop that stops waits for it, within its grace period.
    fn delays_stop(&self) -> bool;
    /// Whether what was counted agrees with what the machine still holds.
    fn is_balanced(&self, now: Timestamp) -> bool;
    /// Whether a reply without a session identifier, received on `flow`, answers a datagram of this task.
    fn claims(&self, reply: &[u8], flow: u8) -> bool;
}

/// What a task asks of its loop.
#[derive(Debug)]
pub enum TaskStep {
    /// Send what was appended to the arena.
    Send(Send),
    /// Do nothing until then, or until something happens.
    Wait(Timestamp),
    /// Tell the daemon.
    Notify(Notice),
    /// Remove the task.
    Finished,
}

/// What a task has to tell the daemon.
#[derive(Debug)]
pub enum Notice {
    /// A peer announced that it is leaving.
    PeerLeaving(Goodbye),
    /// An event of the task's path.
    Path(Box<dyn PathEvent>),
}

/// Who is answered, and with which keys.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Who is answered, and how fast.
    pub policy: Policy,
    /// The mesh's keys; `None`: nothing is authenticated.
    pub keys: Option<Arc<Keys>>,
}

/// What a loop counts across its tasks, to choose how often it wakes.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Datagrams that left and have no verdict.
    pub outstanding: u64,
    /// Datagrams that left since the start.
    pub sent: u64,
}

/// Counts what a machine reports.
pub trait Recorder<M: Machine>: fmt::Debug + std::marker::Send {
    /// Counts a report. Returns what the daemon should know of it.
    fn record(&mut self, report: M::Report, traffic: &mut Traffic) -> Option<Notice>;
    /// Everything is recorded, and the machine waits.
    fn waiting(&mut self, machine: &M, now: Timestamp);
    /// A datagram is about to be handed to the machine.
    fn received(&mut self);
    /// A datagram of the machine did not leave this host.
    fn not_sent(&mut self);
    /// See [`Task::set_access`].
    fn set_access(&mut self, machine: &mut M, access: &Access);
    /// See [`Task::delays_stop`].
    fn delays_stop(&self) -> bool;
    /// See [`Task::is_balanced`].
    fn is_balanced(&self, machine: &M, now: Timestamp) -> bool;
    /// See [`Task::claims`].
    fn claims(&self, machine: &M, reply: &[u8], flow: u8) -> bool;
}

/// A machine and its recorder.
#[derive(Debug)]
pub struct MachineTask<M, R> {
    /// Decides.
    pub machine: M,
    /// Counts.
    pub recorder: R,
}

impl<M, R> Task for MachineTask<M, R>
where
    M: Machine + fmt::Debug + std::marker::Send,
    R: Recorder<M>,
{
    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        self.recorder.received();
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

    fn claims(&self, reply: &[u8], flow: u8) -> bool {
        self.recorder.claims(&self.machine, reply, flow)
    }
}
