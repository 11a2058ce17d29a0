//! The slots of tasks, and the timers that step them.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::time::Duration;

use pathmeter_proto::machine::Now;
use pathmeter_proto::time::Timestamp;

use super::super::outbox::Outgoing;
use super::super::socket::{Socket, SocketError};
use super::super::task::{Notice, Task, TaskStep};
use super::super::{Companion, NewTask};
use super::DatagramLoop;
use super::groups::SocketGroupKey;
use crate::clock::Clock;
use crate::loops::{LoopEvent, NewPath};
use crate::paths::PathId;

/// Maximum number of timers fired before sockets are read again. Requests that are sent together return
/// replies and transmit timestamps together: a delayed loop that sends everything at once overflows its own
/// receive buffer, and one that sends more per turn than it reads never catches up. Chosen: 256 timestamps
/// and replies fit the default receive buffer of Linux (512 of them, measured 2026-11-21), and at this length
/// the overhead of a further turn is negligible.
const TIMERS_PER_TURN_MAX: usize = 256;

/// A slot with its task.
pub(super) struct TaskEntry {
    pub(super) task: Box<dyn Task>,
    /// The path of the task; `None`: a service.
    pub(super) path: Option<PathId>,
    pub(super) group: usize,
    /// Distinguishes this task from earlier ones in the same slot.
    pub(super) generation: u32,
    /// The valid timer; other timers of this slot are stale.
    timer: Timestamp,
    sessions: Option<TaskSessions>,
    pub(super) interval: Duration,
}

/// The sessions of a task.
pub(super) struct TaskSessions {
    /// The responder.
    to: SocketAddr,
    ssids: Vec<u16>,
    /// See [`NewTask::is_following`].
    is_following: bool,
}

/// The slots of a path.
#[derive(Debug, Clone, Copy)]
pub(super) struct PathTasks {
    pub(super) main: usize,
    pub(super) companion: Option<usize>,
}

impl DatagramLoop {
    /// Puts a task into a free slot and returns the slot's index.
    pub(super) fn insert(
        &mut self,
        task: Box<dyn Task>,
        path: Option<PathId>,
        group: usize,
        sessions: Option<TaskSessions>,
        interval: Duration,
    ) -> usize {
        self.last_generation = self.last_generation.wrapping_add(1);
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        if let Some(TaskSessions { to, ssids, is_following }) = &sessions
            && let Some(current) = self.groups[group].demux.sessions_mut()
        {
            current.add(index, *to, ssids, *is_following);
        }
        let (generation, timer) = (self.last_generation, Timestamp::NEVER);
        self.slots[index] = Some(TaskEntry { task, path, group, generation, timer, sessions, interval });
        index
    }

    pub(super) fn start(&mut self, path: NewPath<NewTask>) -> Result<(), SocketError> {
        let NewPath { id, task, peer_left_at } = path;
        let NewTask { protocol, to, source, flows, interval, seed, build, companion, is_following } = task;
        let key = SocketGroupKey { source, protocol, is_v4: to.is_ipv4() };
        let group = self.group(key, flows)?;
        let ssids = self.session_ids(to, flows.into(), seed);
        let addresses = self.groups[group].sockets.iter().map(Socket::address);
        let sources = addresses.take(flows.into()).collect();
        let mut task = build(ssids.clone(), Clock::now());
        if let Some(at) = peer_left_at {
            task.peer_leaving(at);
        }
        let sessions = TaskSessions { to, ssids, is_following };
        let main = self.insert(task, Some(id), group, Some(sessions), interval);
        self.paths.insert(id, PathTasks { main, companion: None });
        self.emit(LoopEvent::Started { id, sources });
        self.step(main);
        self.set_companion(id, companion);
        Ok(())
    }

    /// Replaces or removes the companion of a path.
    pub(super) fn set_companion(&mut self, id: PathId, companion: Option<Companion>) {
        let Some(PathTasks { main, companion: current }) = self.paths.get(&id).copied() else { return };
        if let Some(current) = current {
            self.release(current);
        }
        let (Some(Companion { seed, build }), Some(Some(slot))) = (companion, self.slots.get(main)) else {
            return;
        };
        let (group, Some(TaskSessions { to, .. })) = (slot.group, &slot.sessions) else { return };
        let to = *to;
        let ssids = self.session_ids(to, 1, seed);
        let task = build(ssids[0], Clock::now());
        let sessions = TaskSessions { to, ssids, is_following: true };
        let index = self.insert(task, Some(id), group, Some(sessions), Duration::MAX);
        if let Some(tasks) = self.paths.get_mut(&id) {
            tasks.companion = Some(index);
        }
        self.step(index);
    }

    pub(super) fn remove(&mut self, id: PathId) {
        let Some(PathTasks { main, .. }) = self.paths.get(&id).copied() else { return };
        if let Some(slot) = &mut self.slots[main] {
            slot.task.stop();
            slot.task.withdraw();
        }
        self.step(main);
        self.release(main);
    }

    pub(super) fn step(&mut self, index: usize) {
        loop {
            if self.outbox.is_full() {
                self.flush();
            }
            let Some(Some(slot)) = self.slots.get_mut(index) else { return };
            let now = Now { at: Clock::now(), drained: self.drained, wall: self.clock.offset() };
            let offset = self.outbox.arena.len();
            let drops = &mut self.groups[slot.group].drops;
            match slot.task.step(now, drops, &mut self.outbox.arena, &mut self.traffic) {
                TaskStep::Send(send) => {
                    let length = self.outbox.arena.len() - offset;
                    let (generation, group) = (slot.generation, slot.group);
                    self.outbox.queued.push(Outgoing {
                        slot: index,
                        generation,
                        group,
                        send,
                        offset,
                        length,
                    });
                }
                TaskStep::Wait(until) => {
                    if until < slot.timer {
                        slot.timer = until;
                        self.timers.push(Reverse((until, index)));
                    }
                    return;
                }
                TaskStep::Notify(Notice::PeerLeaving(goodbye)) => self.emit(LoopEvent::PeerLeaving(goodbye)),
                TaskStep::Notify(Notice::Wake(id)) => self.wake(id),
                TaskStep::Notify(Notice::Path(event)) => {
                    if let Some(id) = slot.path {
                        self.emit(LoopEvent::OfPath { id, event });
                    }
                }
                TaskStep::Finished => {
                    self.release(index);
                    return;
                }
            }
        }
    }

    /// Steps the task of a path in this turn or the next.
    pub(super) fn wake(&mut self, id: PathId) {
        let Some(PathTasks { main, .. }) = self.paths.get(&id).copied() else { return };
        if let Some(Some(slot)) = self.slots.get_mut(main) {
            slot.timer = self.wakeups.last_wakeup;
            self.timers.push(Reverse((slot.timer, main)));
        }
    }

    /// Frees a slot. When the main task of a path ends, its companion and the path end too.
    pub(super) fn release(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index).and_then(Option::take) else { return };
        if !slot.task.is_balanced(Clock::now()) {
            self.series.accounting_errors.inc();
        }
        if let Some(TaskSessions { to, ssids, .. }) = &slot.sessions
            && let Some(current) = self.groups[slot.group].demux.sessions_mut()
        {
            current.remove(index, *to, ssids);
        }
        self.free.push(index);
        let Some(id) = slot.path else { return };
        match self.paths.get_mut(&id) {
            Some(tasks) if tasks.main == index => {
                let companion = tasks.companion;
                self.paths.remove(&id);
                if let Some(companion) = companion {
                    self.release(companion);
                }
                self.emit(LoopEvent::Finished(id));
            }
            Some(tasks) => tasks.companion = None,
            None => {}
        }
    }

    /// Fires due timers, each once and at most [`TIMERS_PER_TURN_MAX`]. The remaining ones, and timers that
    /// are set in the past meanwhile, fire after the next read.
    pub(super) fn fire_timers(&mut self, now: Timestamp) {
        let mut due = std::mem::take(&mut self.due);
        self.is_behind = false;
        while let Some(Reverse((at, index))) = self.timers.peek().copied() {
            if at > now {
                break;
            }
            if due.len() == TIMERS_PER_TURN_MAX {
                self.is_behind = true;
                break;
            }
            self.timers.pop();
            let Some(Some(slot)) = self.slots.get_mut(index) else { continue };
            if slot.timer == at {
                slot.timer = Timestamp::NEVER;
                due.push(index);
            }
        }
        for index in due.drain(..) {
            self.step(index);
        }
        self.due = due;
    }
}
