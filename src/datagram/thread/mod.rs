//! The event loop: wake, read all sockets, fire due timers, send, sleep.
//!
//! With kernel timestamps the time of a wakeup does not affect measurements, so sends that are due within one
//! tick are sent together, and replies are read in batches. The tick grows with the load and is exported as a
//! metric.

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
use self::slots::{PathTasks, TaskEntry};
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

/// The longest tick. It is the maximum delay that batching adds to sends and to reading replies.
pub const RECEIVE_TICK_MAX: Duration = Duration::from_millis(5);

/// The loop wakes at least this often, to read the clocks and to check its balances.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// How often unattributed overflows of the namespace are discarded. Reading the counters is expensive.
const OVERFLOWS_RESET_INTERVAL: Duration = Duration::from_secs(10);

/// How long unused sockets stay open: a path that is changed restarts at once and keeps its ports.
const IDLE_GROUP_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest interval between two reads while replies are outstanding.
const DRAIN_INTERVAL_MAX: Duration = Duration::from_millis(80);

/// The longest interval between two reads while replies are awaited.
const PROMPT_INTERVAL: Duration = Duration::from_millis(1);

/// A datagram loop and all its state.
pub(super) struct DatagramLoop {
    clock: Clock,
    /// All datagrams that arrived before this time have been read.
    drained: Timestamp,
    timestamps: TimestampMatching,
    groups: Vec<SocketGroup>,
    /// The group of each key.
    group_of: BTreeMap<SocketGroupKey, usize>,
    slots: Vec<Option<TaskEntry>>,
    free: Vec<usize>,
    last_generation: u32,
    paths: HashMap<PathId, PathTasks>,
    timers: BinaryHeap<Reverse<(Timestamp, usize)>>,
    /// Slots whose timer has fired; empty between turns, kept for its allocation.
    due: Vec<usize>,
    /// Whether more timers are due than one turn fires.
    is_behind: bool,
    outbox: Outbox,
    batch: SendBatch,
    pending_timestamps: PendingTimestamps,
    traffic: Traffic,
    wakeups: Wakeups,
    /// The slot that was checked last.
    last_checked: usize,
    /// Whether the loop has services. It then replies at once instead of once per tick.
    is_serving: bool,
    wakeup: Arc<EventFd>,
    /// `None` after sockets were added or closed; it is then rebuilt.
    poll_set: Option<PollSet>,
    /// Whether the last wait already polled the sockets.
    has_polled: bool,
    drops_read: Timestamp,
    overflows: BufferOverflows,
    overflows_reset: Timestamp,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
    series: Arc<LoopSeries>,
    stop_deadline: Option<Timestamp>,
}

/// State that determines when the loop wakes.
struct Wakeups {
    tick: Duration,
    last_wakeup: Timestamp,
    /// Time from a turn to the next read while replies are outstanding: short after a send, then doubled each
    /// time.
    drain_after: Duration,
    /// [`Traffic::sent`] when `drain_after` was last reset.
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
        let mut datagram_loop = Self {
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
            last_checked: 0,
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
            datagram_loop.add_service(service, now);
        }
        datagram_loop
    }

    /// Runs the loop until it is stopped.
    pub(super) fn run(mut self, mut commands: CommandReceiver<NewTask, Control>) {
        // If this fails, sends are up to 50 µs later, which the lag metric shows.
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
        // 5 µs of tick per send per second: from 1,000 sends/s on there are 200 batches per second, at low
        // rates datagrams are sent singly.
        self.wakeups.tick = Duration::from_micros(5 * rate).min(RECEIVE_TICK_MAX).min(shortest / 4);
        self.series.tick.set(nanos(self.wakeups.tick));
        self.series.outstanding.set(self.traffic.outstanding);
        self.close_idle_groups(now);
        if now.since(self.overflows_reset) >= OVERFLOWS_RESET_INTERVAL {
            self.overflows_reset = now;
            // Drops of this loop's sockets are attributed first; otherwise they would be discarded.
            self.read_all_drops(now);
            self.overflows.reset();
        }
        self.check_balances();
    }

    /// Checks the balance of a quarter of the tasks, so that each is checked about once a second.
    fn check_balances(&mut self) {
        let count = self.slots.len().div_ceil(4);
        for _ in 0..count {
            self.last_checked = (self.last_checked + 1) % self.slots.len().max(1);
            if let Some(Some(slot)) = self.slots.get(self.last_checked)
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
        if self.traffic.prompt_until.is_some_and(|end| now < end) {
            until = until.min(now + PROMPT_INTERVAL);
        } else if self.traffic.outstanding > 0 && now + self.wakeups.drain_after < until {
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
            // Resets the eventfd; the commands are in the channel.
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
                    // Services run until the end: peers that stop at the same time still send requests.
                    if slot.path.is_some() {
                        slot.task.stop();
                    }
                });
            }
            LoopCommand::Control(Control::SetCompanion(id, companion)) => self.set_companion(id, companion),
            LoopCommand::Control(Control::Wake(id)) => self.wake(id),
            LoopCommand::Control(Control::SetAccess(access)) => {
                self.for_each_task(|slot| slot.task.set_access(&access));
            }
            LoopCommand::Control(Control::StopAnswering) => self.stop_answering(),
        }
    }

    /// Applies `act` to every task, and steps each.
    fn for_each_task(&mut self, mut act: impl FnMut(&mut TaskEntry)) {
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
