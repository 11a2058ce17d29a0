//! The loop: wake, read everything, step what is due, send, sleep.
//!
//! With kernel stamps a wake-up is not a measurement, so sends that are due within a tick leave together, and replies are
//! read when it suits us. The tick grows with the load and is exported.

mod groups;
mod receive;
mod send;
mod slots;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use pathmeter_proto::time::{Timestamp, nanos};

use self::groups::{SocketGroup, SocketGroupKey};
use self::slots::{PathTasks, Slot};
use super::outbox::{OUTBOX_MAX, Outbox};
use super::poller::{PollSet, sleep_precisely};
use super::socket::{ReceiveBatch, SendBatch, TimestampMatching};
use super::socket_drops::BufferOverflows;
use super::task::Traffic;
use super::tx_timestamps::PendingTimestamps;
use super::{Control, NewTask, Service};
use crate::clock::{Clock, ClockEvent};
use crate::loops::{CommandReceiver, LoopCommand, LoopEvent};
use crate::metrics::agent::LoopSeries;
use crate::paths::PathId;

/// The longest tick: replies and sends are at most this much later than they could be.
pub const RECEIVE_TICK_MAX: Duration = Duration::from_millis(5);

/// The loop wakes at least this often, to look at the clocks and at its own accounts.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// The namespace's overruns are looked at this often, to forget those that were not ours: reading them is not cheap.
const OVERFLOWS_RESET_INTERVAL: Duration = Duration::from_secs(10);

/// Sockets that no path uses are kept this long: a path that is changed comes back at once, and keeps its ports.
const IDLE_GROUP_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest pause between two reads while replies are outstanding.
const DRAIN_INTERVAL_MAX: Duration = Duration::from_millis(80);

/// A loop with everything it owns.
pub(super) struct DatagramLoop {
    clock: Clock,
    /// Everything that had arrived by then has been read.
    drained: Timestamp,
    timestamps: TimestampMatching,
    groups: Vec<SocketGroup>,
    /// Which group a choice of source has.
    group_of: BTreeMap<SocketGroupKey, usize>,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    last_generation: u32,
    paths: HashMap<PathId, PathTasks>,
    timers: BinaryHeap<Reverse<(Timestamp, usize)>>,
    /// Slots whose timer has fired; kept for its allocation.
    due: Vec<usize>,
    /// Whether more was due than one turn steps.
    is_behind: bool,
    outbox: Outbox,
    batch: SendBatch,
    pending_timestamps: PendingTimestamps,
    traffic: Traffic,
    wakeups: Wakeups,
    /// The slot whose balance was checked last.
    checked: usize,
    /// Whether it serves, and so answers at once instead of in ticks.
    is_serving: bool,
    wakeup: Arc<EventFd>,
    /// `None` when sockets were added since it was made.
    poll_set: Option<PollSet>,
    /// Whether the watch has just been waited on, and knows which sockets are ready.
    has_polled: bool,
    drops_read: Timestamp,
    overflows: BufferOverflows,
    overflows_reset: Timestamp,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
    series: Arc<LoopSeries>,
    stop_deadline: Option<Timestamp>,
}

/// How often the loop wakes.
struct Wakeups {
    tick: Duration,
    last_wakeup: Timestamp,
    /// How long after a turn sockets are read again while replies are outstanding: soon after a send, then less often.
    drain_after: Duration,
    /// Datagrams that had left when `drain_after` was last reset.
    sent: u64,
    counted_at: Timestamp,
    counted: u64,
}

impl DatagramLoop {
    pub(super) fn new(
        services: Vec<Service>,
        timestamps: TimestampMatching,
        wakeup: Arc<EventFd>,
        events: tokio::sync::mpsc::Sender<LoopEvent>,
        series: Arc<LoopSeries>,
    ) -> Self {
        let now = Clock::now();
        let mut thread = Self {
            clock: Clock::new(),
            drained: now,
            timestamps,
            groups: Vec::new(),
            group_of: BTreeMap::new(),
            slots: Vec::new(),
            free: Vec::new(),
            last_generation: 0,
            paths: HashMap::new(),
            timers: BinaryHeap::new(),
            due: Vec::new(),
            is_behind: false,
            outbox: Outbox::default(),
            batch: SendBatch::new(OUTBOX_MAX),
            pending_timestamps: PendingTimestamps::new(timestamps),
            traffic: Traffic::default(),
            wakeups: Wakeups {
                tick: Duration::ZERO,
                last_wakeup: now,
                drain_after: RECEIVE_TICK_MAX,
                sent: 0,
                counted_at: now,
                counted: 0,
            },
            checked: 0,
            is_serving: !services.is_empty(),
            wakeup,
            poll_set: None,
            has_polled: false,
            drops_read: now,
            overflows: BufferOverflows::new(),
            overflows_reset: now,
            events,
            series,
            stop_deadline: None,
        };
        for service in services {
            thread.add_service(service, now);
        }
        thread
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self, mut commands: CommandReceiver<NewTask, Control>) {
        // Without it sends are up to 50 µs later, which the lag shows.
        let _ = sleep_precisely();
        let mut receive_batch = ReceiveBatch::new();
        loop {
            while let Ok(command) = commands.try_recv() {
                self.handle_command(command);
            }
            self.run_turn(&mut receive_batch);
            if self.is_finished() {
                return;
            }
            self.sleep();
        }
    }

    fn run_turn(&mut self, receive_batch: &mut ReceiveBatch) {
        let (now, event) = self.clock.read();
        self.wakeups.last_wakeup = now;
        self.series.progress.inc();
        if let Some(event) = event {
            self.on_clock_event(event);
        }
        if self.read(receive_batch, now) {
            self.drained = now;
        }
        self.flush();
        self.fire_timers(now);
        self.flush();
        self.measure_load(now);
    }

    fn on_clock_event(&mut self, event: ClockEvent) {
        match event {
            ClockEvent::Step(nanos) => {
                self.series.clock_steps.inc();
                self.emit(LoopEvent::ClockStepped(nanos));
            }
            ClockEvent::Suspend(span) => {
                self.series.suspends.inc();
                self.emit(LoopEvent::Suspended(span));
                self.for_each_task(|slot| slot.task.withdraw());
            }
        }
    }

    fn measure_load(&mut self, now: Timestamp) {
        let span = now.since(self.wakeups.counted_at);
        if span < HEARTBEAT {
            return;
        }
        let sent = self.traffic.sent - self.wakeups.counted;
        (self.wakeups.counted_at, self.wakeups.counted) = (now, self.traffic.sent);
        let rate = sent * 1_000_000_000 / nanos(span).max(1);
        let shortest = self.slots.iter().flatten().map(|slot| slot.interval).min().unwrap_or(Duration::MAX);
        // 5 µs of tick for each send a second: 1,000/s and more leave in 200 batches a second, a handful singly.
        self.wakeups.tick = Duration::from_micros(5 * rate).min(RECEIVE_TICK_MAX).min(shortest / 4);
        self.series.tick.set(nanos(self.wakeups.tick));
        self.series.outstanding.set(self.traffic.outstanding);
        self.close_idle_groups(now);
        if now.since(self.overflows_reset) >= OVERFLOWS_RESET_INTERVAL {
            self.overflows_reset = now;
            // What is ours is taken first: it would be forgotten with the rest.
            self.read_all_drops(now);
            self.overflows.reset();
        }
        self.check_balances();
    }

    /// Checks a quarter of the tasks, so that each is checked about once a second.
    fn check_balances(&mut self) {
        let count = self.slots.len().div_ceil(4);
        for _ in 0..count {
            self.checked = (self.checked + 1) % self.slots.len().max(1);
            if let Some(Some(slot)) = self.slots.get(self.checked)
                && !slot.task.is_balanced(self.wakeups.last_wakeup)
            {
                self.series.accounting_errors.inc();
            }
        }
    }

    fn sleep(&mut self) {
        let now = Clock::now();
        let due = self.timers.peek().map_or(Timestamp::NEVER, |Reverse((at, _))| *at);
        if self.is_behind {
            self.series.lag.observe(now.since(due + self.wakeups.tick));
            return;
        }
        let mut until = due.max(self.wakeups.last_wakeup + self.wakeups.tick).min(now + HEARTBEAT);
        if self.wakeups.sent != self.traffic.sent || self.traffic.outstanding == 0 {
            self.wakeups.sent = self.traffic.sent;
            self.wakeups.drain_after = RECEIVE_TICK_MAX;
        }
        if self.traffic.outstanding > 0 && now + self.wakeups.drain_after < until {
            until = now + self.wakeups.drain_after;
            self.wakeups.drain_after = (self.wakeups.drain_after * 2).min(DRAIN_INTERVAL_MAX);
        }
        if !self.outbox.is_empty() || until <= now {
            self.series.lag.observe(now.since(until));
            return;
        }
        let span = until.since(now);
        let polls_sockets = self.is_serving;
        let poll_set = self.poll_set();
        let has_event = if polls_sockets { poll_set.wait(span) } else { poll_set.wait_for_wakeup(span) };
        if poll_set.is_woken() {
            // It only wakes; what it is about waits in the channel.
            let _ = self.wakeup.read();
        }
        self.has_polled = polls_sockets;
        self.series.wakeups.inc();
        if !has_event {
            self.series.lag.observe(Clock::now().since(until));
        }
    }

    fn poll_set(&mut self) -> &mut PollSet {
        let sockets = self.groups.iter().flat_map(|group| &group.sockets);
        self.poll_set.get_or_insert_with(|| PollSet::new(self.wakeup.as_fd(), sockets))
    }

    fn handle_command(&mut self, command: LoopCommand<NewTask, Control>) {
        match command {
            LoopCommand::Start(path) => {
                let id = path.id;
                if let Err(error) = self.start(*path) {
                    self.emit(LoopEvent::NotStarted { id, reason: error.to_string() });
                }
            }
            LoopCommand::Remove(id) => self.remove(id),
            LoopCommand::PeerLeaving { ids, at } => {
                for tasks in ids.iter().filter_map(|id| self.paths.get(id)).copied().collect::<Vec<_>>() {
                    for index in [Some(tasks.main), tasks.companion].into_iter().flatten() {
                        if let Some(Some(slot)) = self.slots.get_mut(index) {
                            slot.task.peer_leaving(at);
                            self.step(index);
                        }
                    }
                }
            }
            LoopCommand::Stop { grace } => {
                self.stop_deadline = Some(Clock::now() + grace);
                self.for_each_task(|slot| {
                    // A service goes on until the end: peers that stop at the same time still ask.
                    if slot.path.is_some() {
                        slot.task.stop();
                    }
                });
            }
            LoopCommand::Control(Control::SetCompanion(id, companion)) => self.set_companion(id, companion),
            LoopCommand::Control(Control::SetAccess(access)) => {
                self.for_each_task(|slot| slot.task.set_access(&access));
            }
            LoopCommand::Control(Control::StopAnswering) => self.stop_answering(),
        }
    }

    /// Does something to every task, and steps each.
    fn for_each_task(&mut self, mut act: impl FnMut(&mut Slot)) {
        for index in 0..self.slots.len() {
            if let Some(slot) = &mut self.slots[index] {
                act(slot);
                self.step(index);
            }
        }
    }

    fn is_finished(&mut self) -> bool {
        let Some(deadline) = self.stop_deadline else { return false };
        let is_late = Clock::now() >= deadline;
        if is_late {
            self.for_each_task(|slot| slot.task.withdraw());
        }
        is_late || (!self.is_serving && !self.slots.iter().flatten().any(|slot| slot.task.delays_stop()))
    }

    fn emit(&self, event: LoopEvent) {
        if self.events.try_send(event).is_err() {
            self.series.events_dropped.inc();
        }
    }
}

#[cfg(test)]
mod tests;
