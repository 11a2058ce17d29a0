//! The loop: wake, read everything, step what is due, send, sleep.
//!
//! With kernel stamps a wake-up is not a measurement, so sends that are due within a tick leave together, and replies are
//! read when it suits us. The tick grows with the load and is exported.

mod receive;
mod seats;
mod send;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use pathmeter_proto::admission::Policy;
use pathmeter_proto::key::Keys;
use pathmeter_proto::machine::HostDrops;
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::wire::Goodbye;

use super::actor::{Actor, Traffic};
use super::outbox::{OUTBOX, Outbox};
use super::overruns::Overruns;
use super::socket::{ReceiveBatch, SendBatch, Socket, StampNames};
use super::stamps::Awaited;
use super::watch::{Watch, sleep_precisely};
use super::{Command, Duties, Event, PathId, SourceChoice};
use crate::clock::{Clock, Upset};
use crate::metrics::agent::LoopSeries;

/// The longest tick: replies and sends are at most this much later than they could be.
pub const RECEIVE_TICK_MAX: Duration = Duration::from_millis(5);

/// The loop wakes at least this often, to look at the clocks and at its own accounts.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// The namespace's overruns are looked at this often, to forget those that were not ours: reading them is not cheap.
const SETTLE_EVERY: Duration = Duration::from_secs(10);

/// Sockets that no path uses are kept this long: a path that is changed comes back at once, and keeps its ports.
const IDLE_GROUP_KEPT: Duration = Duration::from_secs(5);

/// The longest pause between two reads while replies are outstanding.
const DRAIN_MAX: Duration = Duration::from_millis(80);

/// A loop with everything it owns.
pub(super) struct Thread {
    clock: Clock,
    /// Everything that had arrived by then has been read.
    drained: Timestamp,
    stamps: StampNames,
    groups: Vec<Group>,
    /// Which group a choice of source has.
    choices: BTreeMap<(SourceChoice, Protocol, bool), usize>,
    actors: Vec<Option<Seat>>,
    free: Vec<usize>,
    lives: u32,
    places: HashMap<PathId, usize>,
    /// Who looks for the MTU of a path.
    searches: HashMap<PathId, usize>,
    routes: HashMap<(SocketAddr, u16), usize>,
    /// For replies that carry no session identifier.
    by_source: HashMap<SocketAddr, Vec<usize>>,
    alarms: BinaryHeap<Reverse<(Timestamp, usize)>>,
    /// Whose alarm rings; kept for its allocation.
    due: Vec<usize>,
    /// Whether more was due than one turn steps.
    is_behind: bool,
    outbox: Outbox,
    batch: SendBatch,
    awaited: Awaited,
    traffic: Traffic,
    pace: Pace,
    check_next: usize,
    answers_at_once: bool,
    bell: Arc<EventFd>,
    /// `None` when sockets were added since it was made.
    watch: Option<Watch>,
    /// Whether the watch has just been waited on, and knows which sockets are ready.
    has_looked: bool,
    drops_looked: Timestamp,
    overruns: Overruns,
    settled: Timestamp,
    events: tokio::sync::mpsc::Sender<Event>,
    series: Arc<LoopSeries>,
    stopping: Option<Timestamp>,
}

/// What the sockets of a group carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Protocol {
    Udp,
    /// Echoes. An address stands for a whole host: its port is 0.
    Icmp,
}

/// Sockets that share an address and options, one for each flow; or those on which somebody listens.
struct Group {
    protocol: Protocol,
    sockets: Vec<Socket>,
    drops: HostDrops,
    looked: Timestamp,
    /// Gets everything that arrives here; `None`: by session.
    owner: Option<usize>,
    /// When it was last seen in use.
    used: Timestamp,
}

/// An actor in its place.
struct Seat {
    actor: Actor,
    group: usize,
    life: u32,
    /// The alarm that counts; others of this seat are stale.
    alarm: Timestamp,
    routes: Vec<(SocketAddr, u16)>,
    interval: Duration,
}

/// How often the loop wakes.
struct Pace {
    tick: Duration,
    woke: Timestamp,
    /// How long after a turn sockets are read again while replies are outstanding: soon after a send, then less often.
    drain_after: Duration,
    /// Datagrams that had left when `drain_after` was last reset.
    sent: u64,
    counted_at: Timestamp,
    counted: u64,
}

impl Thread {
    pub(super) fn new(
        duties: Duties,
        stamps: StampNames,
        bell: Arc<EventFd>,
        events: tokio::sync::mpsc::Sender<Event>,
        series: Arc<LoopSeries>,
    ) -> Self {
        let now = Clock::now();
        let mut thread = Self {
            clock: Clock::new(),
            drained: now,
            stamps,
            groups: Vec::new(),
            choices: BTreeMap::new(),
            actors: Vec::new(),
            free: Vec::new(),
            lives: 0,
            places: HashMap::new(),
            searches: HashMap::new(),
            routes: HashMap::new(),
            by_source: HashMap::new(),
            alarms: BinaryHeap::new(),
            due: Vec::new(),
            is_behind: false,
            outbox: Outbox::default(),
            batch: SendBatch::new(OUTBOX),
            awaited: Awaited::new(stamps),
            traffic: Traffic::default(),
            pace: Pace {
                tick: Duration::ZERO,
                woke: now,
                drain_after: RECEIVE_TICK_MAX,
                sent: 0,
                counted_at: now,
                counted: 0,
            },
            check_next: 0,
            answers_at_once: duties.answer.is_some(),
            bell,
            watch: None,
            has_looked: false,
            drops_looked: now,
            overruns: Overruns::new(),
            settled: now,
            events,
            series,
            stopping: None,
        };
        thread.take_up(duties, now);
        thread
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self, commands: &mpsc::Receiver<Command>) {
        // Without it sends are up to 50 µs later, which the lag shows.
        let _ = sleep_precisely();
        let mut inbox = ReceiveBatch::new();
        loop {
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            self.wake(&mut inbox);
            if self.is_over() {
                return;
            }
            self.sleep();
        }
    }

    fn wake(&mut self, inbox: &mut ReceiveBatch) {
        let (now, upset) = self.clock.look();
        self.pace.woke = now;
        self.series.progress.inc();
        if let Some(upset) = upset {
            self.note(upset);
        }
        if self.read(inbox, now) {
            self.drained = now;
        }
        self.flush();
        self.ring(now);
        self.flush();
        self.keep_pace(now);
    }

    fn note(&mut self, upset: Upset) {
        match upset {
            Upset::Step(nanos) => {
                self.series.clock_steps.inc();
                self.tell(Event::ClockStepped(nanos));
            }
            Upset::Suspend(span) => {
                self.series.suspends.inc();
                self.tell(Event::Suspended(span));
                for index in 0..self.actors.len() {
                    if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
                        echo.prober.withdraw();
                        self.step(index);
                    }
                }
            }
        }
    }

    fn keep_pace(&mut self, now: Timestamp) {
        let span = now.since(self.pace.counted_at);
        if span < HEARTBEAT {
            return;
        }
        let sent = self.traffic.sent - self.pace.counted;
        (self.pace.counted_at, self.pace.counted) = (now, self.traffic.sent);
        let rate = sent * 1_000_000_000 / nanos(span).max(1);
        let shortest = self.actors.iter().flatten().map(|seat| seat.interval).min().unwrap_or(Duration::MAX);
        // 5 µs of tick for each send a second: 1,000/s and more leave in 200 batches a second, a handful singly.
        self.pace.tick = Duration::from_micros(5 * rate).min(RECEIVE_TICK_MAX).min(shortest / 4);
        self.series.tick.set(nanos(self.pace.tick));
        self.series.outstanding.set(self.traffic.outstanding);
        self.close_idle_groups(now);
        if now.since(self.settled) >= SETTLE_EVERY {
            self.settled = now;
            // What is ours is taken first: it would be forgotten with the rest.
            self.look_for_all_drops(now);
            self.overruns.settle();
        }
        self.check_accounts();
    }

    /// Looks at a quarter of the paths, so that each is looked at about once a second.
    fn check_accounts(&mut self) {
        let count = self.actors.len().div_ceil(4);
        for _ in 0..count {
            self.check_next = (self.check_next + 1) % self.actors.len().max(1);
            if let Some(Some(Seat { actor: Actor::Echo(echo), .. })) = self.actors.get(self.check_next)
                && !echo.is_conserved(self.pace.woke)
            {
                self.series.accounting_errors.inc();
            }
        }
    }

    fn sleep(&mut self) {
        let now = Clock::now();
        let due = self.alarms.peek().map_or(Timestamp::NEVER, |Reverse((at, _))| *at);
        if self.is_behind {
            self.series.lag.observe(now.since(due + self.pace.tick));
            return;
        }
        let mut until = due.max(self.pace.woke + self.pace.tick).min(now + HEARTBEAT);
        if self.pace.sent != self.traffic.sent || self.traffic.outstanding == 0 {
            self.pace.sent = self.traffic.sent;
            self.pace.drain_after = RECEIVE_TICK_MAX;
        }
        if self.traffic.outstanding > 0 && now + self.pace.drain_after < until {
            until = now + self.pace.drain_after;
            self.pace.drain_after = (self.pace.drain_after * 2).min(DRAIN_MAX);
        }
        if !self.outbox.is_empty() || until <= now {
            self.series.lag.observe(now.since(until));
            return;
        }
        let span = until.since(now);
        let at_once = self.answers_at_once;
        let watch = self.watch();
        let happened = if at_once { watch.wait(span) } else { watch.wait_for_bell(span) };
        if watch.bell_rang() {
            // It only wakes; what it is about waits in the channel.
            let _ = self.bell.read();
        }
        self.has_looked = at_once;
        self.series.wakeups.inc();
        if !happened {
            self.series.lag.observe(Clock::now().since(until));
        }
    }

    fn watch(&mut self) -> &mut Watch {
        let sockets = self.groups.iter().flat_map(|group| &group.sockets);
        self.watch.get_or_insert_with(|| Watch::new(self.bell.as_fd(), sockets))
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add(path) => {
                let id = path.id;
                if let Err(error) = self.add(*path) {
                    self.tell(Event::Failed { id, error });
                }
            }
            Command::Remove(id) => self.remove(id),
            Command::Search(id, search) => self.search(id, search.map(|search| *search)),
            Command::Goodbye { ids, at } => {
                for id in ids {
                    let Some(index) = self.places.get(&id).copied() else { continue };
                    if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
                        echo.prober.goodbye(at);
                        self.step(index);
                    }
                }
            }
            Command::Answer { policy, keys } => self.answer(&policy, keys.as_ref()),
            Command::FallSilent => self.fall_silent(),
            Command::Stop { grace } => {
                self.stopping = Some(Clock::now() + grace);
                for index in 0..self.actors.len() {
                    if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
                        echo.prober.stop();
                        self.step(index);
                    } else if let Some(Seat { actor: Actor::PathMtu(mtu), .. }) = &mut self.actors[index] {
                        mtu.search.stop();
                        self.step(index);
                    }
                }
            }
        }
    }

    fn answer(&mut self, policy: &Policy, keys: Option<&Arc<Keys>>) {
        for seat in self.actors.iter_mut().flatten() {
            match &mut seat.actor {
                Actor::Responder(answerer) => answerer.responder.change(policy.clone(), keys.cloned()),
                Actor::Listener(listener) => listener.keys = keys.map(|keys| keys.derive(Goodbye::PURPOSE)),
                Actor::Echo(_) | Actor::PathMtu(_) => {}
            }
        }
    }

    fn is_over(&mut self) -> bool {
        let Some(deadline) = self.stopping else { return false };
        let is_measuring = |seat: &Seat| matches!(seat.actor, Actor::Echo(_));
        if Clock::now() >= deadline {
            for index in 0..self.actors.len() {
                if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
                    echo.prober.withdraw();
                    self.step(index);
                }
            }
        }
        Clock::now() >= deadline || (!self.answers_at_once && !self.actors.iter().flatten().any(is_measuring))
    }

    fn tell(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            self.series.events_dropped.inc();
        }
    }
}

#[cfg(test)]
mod tests;
