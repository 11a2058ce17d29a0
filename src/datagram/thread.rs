//! The loop: wake, read everything, step what is due, send, sleep.
//!
//! With kernel stamps a wake-up is not a measurement, so sends that are due within a tick leave together, and replies are
//! read when it suits us. The tick grows with the load and is exported.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use pathmeter_proto::echo::{Prober, Responder};
use pathmeter_proto::grid::mix;
use pathmeter_proto::machine::{Arrival, HostDrops, Now, StampedBy};
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::wire::stamp;

use super::actor::{Actor, Answerer, Asked, Echo, Listener, Traffic};
use super::cmsg::{About, Told};
use super::outbox::{Outbox, Outgoing, refusal};
use super::socket::{Binding, RECEIVE_BATCH, ReceiveBatch, SendBatch, Socket, SocketError, StampNames, TTL};
use super::stamps::Awaited;
use super::{Command, Duties, Event, NewPath, PathId, SourceChoice};
use crate::clock::{Clock, Upset};
use crate::metrics::agent::LoopSeries;
use pathmeter_proto::wire::Goodbye;

/// The longest tick: replies and sends are at most this much later than they could be.
pub const RECEIVE_TICK_MAX: Duration = Duration::from_millis(5);

/// The loop wakes at least this often, to look at the clocks and at its own accounts.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// The longest pause between two reads while replies are outstanding.
const DRAIN_MAX: Duration = Duration::from_millis(80);

/// Batches that are read from a socket before anything else gets its turn.
const ROUNDS: usize = 64;

/// Answers that leave together. T3 is read before an answer waits for the others of its batch and for their way through
/// the kernel: what it waits is in the round trip. Measured 2026-11-20 at 10,000 paths: batches of 32 answers make the mean
/// round trip 67 µs, of 8 19 µs, of 4 9 µs, of 2 6 µs; below 4 an answer costs more.
const ANSWERS: usize = 4;

/// A loop with everything it owns.
pub(super) struct Thread {
    clock: Clock,
    /// Everything that had arrived by then has been read.
    drained: Timestamp,
    stamps: StampNames,
    groups: Vec<Group>,
    /// Which group a choice of source has.
    choices: BTreeMap<(SourceChoice, bool), usize>,
    actors: Vec<Option<Seat>>,
    free: Vec<usize>,
    lives: u32,
    places: HashMap<PathId, usize>,
    routes: HashMap<(SocketAddr, u16), usize>,
    /// For replies that carry no session identifier.
    by_source: HashMap<SocketAddr, usize>,
    alarms: BinaryHeap<Reverse<(Timestamp, usize)>>,
    /// Whose alarm rings; kept for its allocation.
    due: Vec<usize>,
    outbox: Outbox,
    batch: SendBatch,
    awaited: Awaited,
    traffic: Traffic,
    pace: Pace,
    check_next: usize,
    answers_at_once: bool,
    events: tokio::sync::mpsc::Sender<Event>,
    series: Arc<LoopSeries>,
    stopping: Option<Timestamp>,
}

/// Sockets that share an address and options, one for each flow; or those on which somebody listens.
struct Group {
    sockets: Vec<Socket>,
    drops: HostDrops,
    looked: Timestamp,
    /// Gets everything that arrives here; `None`: by session.
    owner: Option<usize>,
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
    drain_after: Duration,
    counted_at: Timestamp,
    counted: u64,
}

impl Thread {
    pub(super) fn new(
        duties: Duties,
        stamps: StampNames,
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
            routes: HashMap::new(),
            by_source: HashMap::new(),
            alarms: BinaryHeap::new(),
            due: Vec::new(),
            outbox: Outbox::default(),
            batch: SendBatch::new(super::outbox::OUTBOX),
            awaited: Awaited::new(stamps),
            traffic: Traffic::default(),
            pace: Pace {
                tick: Duration::ZERO,
                woke: now,
                drain_after: RECEIVE_TICK_MAX,
                counted_at: now,
                counted: 0,
            },
            check_next: 0,
            answers_at_once: duties.answer.is_some(),
            events,
            series,
            stopping: None,
        };
        thread.take_up(duties, now);
        thread
    }

    fn take_up(&mut self, duties: Duties, now: Timestamp) {
        let Some(answering) = duties.answer else { return };
        let heard_with = answering.keys.as_ref().map(|keys| keys.derive(Goodbye::PURPOSE));
        let responder = Responder::new(answering.policy, answering.keys, answering.sessions);
        let series = Arc::clone(&answering.series);
        let actor = Actor::Responder(Box::new(Answerer { responder, series }));
        self.seat_owner(actor, answering.sockets, now);
        let listener = Listener { keys: heard_with, heard: None, series: answering.series };
        self.seat_owner(Actor::Listener(Box::new(listener)), duties.listen, now);
    }

    fn seat_owner(&mut self, actor: Actor, sockets: Vec<Socket>, now: Timestamp) {
        let group = self.groups.len();
        let index = self.seat(actor, group, Vec::new(), Duration::MAX);
        self.groups.push(Group { sockets, drops: HostDrops::default(), looked: now, owner: Some(index) });
    }

    fn seat(
        &mut self,
        actor: Actor,
        group: usize,
        routes: Vec<(SocketAddr, u16)>,
        interval: Duration,
    ) -> usize {
        self.lives = self.lives.wrapping_add(1);
        let seat = Seat { actor, group, life: self.lives, alarm: Timestamp::NEVER, routes, interval };
        match self.free.pop() {
            Some(index) => {
                self.actors[index] = Some(seat);
                index
            }
            None => {
                self.actors.push(Some(seat));
                self.actors.len() - 1
            }
        }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self, commands: &mpsc::Receiver<Command>, bell: &EventFd) {
        // Without this the kernel adds up to 50 µs to every sleep.
        #[expect(unsafe_code, reason = "prctl has no safe wrapper for the timer slack")]
        // SAFETY: PR_SET_TIMERSLACK reads one integer and touches no memory.
        unsafe {
            libc::prctl(libc::PR_SET_TIMERSLACK, 1);
        }
        let mut inbox = ReceiveBatch::new();
        loop {
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            self.wake(&mut inbox);
            if self.is_over() {
                return;
            }
            self.sleep(bell);
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

    /// Reads all sockets; true if everything that had arrived was read.
    fn read(&mut self, inbox: &mut ReceiveBatch, now: Timestamp) -> bool {
        let mut is_drained = true;
        for group in 0..self.groups.len() {
            for socket in 0..self.groups[group].sockets.len() {
                self.read_errors(inbox, group, socket, now);
                is_drained &= self.read_datagrams(inbox, group, socket, now);
            }
            self.look_for_drops(group, now);
        }
        is_drained
    }

    fn look_for_drops(&mut self, group: usize, now: Timestamp) {
        let Group { sockets, drops, looked, .. } = &mut self.groups[group];
        drops.forget(*looked - Duration::from_secs(120));
        for (flow, socket) in sockets.iter_mut().enumerate() {
            let dropped = socket.new_drops();
            drops.add(u8::try_from(flow).unwrap_or(u8::MAX), *looked, now, dropped);
            self.series.rx_dropped.add(dropped.into());
        }
        *looked = now;
    }

    fn read_errors(&mut self, inbox: &mut ReceiveBatch, group: usize, socket: usize, now: Timestamp) {
        let flow = u8::try_from(socket).unwrap_or(u8::MAX);
        for _ in 0..ROUNDS {
            let Ok(count) = inbox.receive(&self.groups[group].sockets[socket], true) else { return };
            for index in 0..count {
                let found = inbox.at(index);
                match (found.said.about, found.said.stamp) {
                    (Some(About::Stamp { name }), Some(stamp)) => {
                        let Some(entry) = self.awaited.find(name, found.bytes) else { continue };
                        let at = self.clock.place(stamp, entry.handed, Clock::now());
                        let seat = self.actors.get_mut(entry.actor).and_then(Option::as_mut);
                        if let Some(seat) = seat.filter(|seat| seat.life == entry.life) {
                            seat.actor.sent(entry.id, at, StampedBy::Kernel);
                            self.step(entry.actor);
                        }
                    }
                    (Some(About::Icmp(icmp)), _) => {
                        let Some(to) = found.from else { continue };
                        let arrival = Arrival {
                            at: now,
                            by: StampedBy::User,
                            from: to,
                            to: None,
                            flow,
                            ttl: None,
                            tos: None,
                            icmp: Some(icmp),
                        };
                        self.deliver(group, found.bytes, &arrival);
                    }
                    (Some(About::Stamp { .. } | About::Local { .. }) | None, _) => {}
                }
            }
            if count < RECEIVE_BATCH {
                return;
            }
        }
    }

    fn read_datagrams(
        &mut self,
        inbox: &mut ReceiveBatch,
        group: usize,
        socket: usize,
        now: Timestamp,
    ) -> bool {
        let flow = u8::try_from(socket).unwrap_or(u8::MAX);
        let mut complaints = 0;
        for _ in 0..ROUNDS {
            let count = match inbox.receive(&self.groups[group].sockets[socket], false) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                // A refusal of an earlier send is told here first; the datagrams are behind it.
                Err(_) if complaints < RECEIVE_BATCH => {
                    complaints += 1;
                    continue;
                }
                Err(_) => return false,
            };
            for index in 0..count {
                let found = inbox.at(index);
                let Some(from) = found.from else { continue };
                if found.is_cut {
                    self.series.oversized.inc();
                    continue;
                }
                let (at, by) = match found.said.stamp {
                    Some(stamp) => {
                        (self.clock.place(stamp, self.drained, now.max(Clock::now())), StampedBy::Kernel)
                    }
                    None => (Clock::now(), StampedBy::User),
                };
                let arrival = Arrival {
                    at,
                    by,
                    from: canonical(from),
                    to: found.said.to,
                    flow,
                    ttl: found.said.ttl,
                    tos: found.said.tos,
                    icmp: None,
                };
                self.deliver(group, found.bytes, &arrival);
                if self.answers_at_once && self.outbox.waiting.len() >= ANSWERS {
                    self.flush();
                }
            }
            if self.answers_at_once {
                self.flush();
            }
            if count < RECEIVE_BATCH {
                return true;
            }
        }
        false
    }

    fn deliver(&mut self, group: usize, datagram: &[u8], arrival: &Arrival) {
        let to = self.groups[group].owner.or_else(|| self.route(arrival.from, datagram));
        let Some(index) = to else {
            self.series.unrouted.inc();
            return;
        };
        if let Some(Some(seat)) = self.actors.get_mut(index) {
            seat.actor.received(datagram, arrival);
            self.step(index);
        }
    }

    fn route(&self, from: SocketAddr, datagram: &[u8]) -> Option<usize> {
        let by_session = stamp::ssids(datagram).into_iter().find_map(|ssid| self.routes.get(&(from, ssid)));
        by_session.or_else(|| self.by_source.get(&from)).copied()
    }

    fn step(&mut self, index: usize) {
        loop {
            if self.outbox.is_full() {
                self.flush();
            }
            let Some(Some(seat)) = self.actors.get_mut(index) else { return };
            let now = Now { at: Clock::now(), drained: self.drained, wall: self.clock.offset() };
            let at = self.outbox.arena.len();
            let drops = &mut self.groups[seat.group].drops;
            match seat.actor.step(now, drops, &mut self.outbox.arena, &mut self.traffic) {
                Asked::Send(send) => {
                    let length = self.outbox.arena.len() - at;
                    let (life, group) = (seat.life, seat.group);
                    self.outbox.waiting.push(Outgoing { actor: index, life, group, send, at, length });
                }
                Asked::Wait(until) => {
                    if until < seat.alarm {
                        seat.alarm = until;
                        self.alarms.push(Reverse((until, index)));
                    }
                    return;
                }
                Asked::Heard(goodbye) => self.tell(Event::Goodbye(goodbye)),
                Asked::Finished => {
                    self.unseat(index);
                    return;
                }
            }
        }
    }

    fn unseat(&mut self, index: usize) {
        let Some(seat) = self.actors.get_mut(index).and_then(Option::take) else { return };
        for route in &seat.routes {
            self.routes.remove(route);
            if self.by_source.get(&route.0) == Some(&index) {
                self.by_source.remove(&route.0);
            }
        }
        self.free.push(index);
        if let Actor::Echo(echo) = seat.actor {
            if !echo.is_conserved() {
                self.series.accounting_errors.inc();
            }
            self.places.remove(&echo.id);
            self.tell(Event::Finished(echo.id));
        }
    }

    /// Steps everything that is due, once: what asks for the past again gets its turn after the next read.
    fn ring(&mut self, now: Timestamp) {
        let mut due = std::mem::take(&mut self.due);
        while let Some(Reverse((at, index))) = self.alarms.peek().copied() {
            if at > now {
                break;
            }
            self.alarms.pop();
            let Some(Some(seat)) = self.actors.get_mut(index) else { continue };
            if seat.alarm == at {
                seat.alarm = Timestamp::NEVER;
                due.push(index);
            }
        }
        for index in due.drain(..) {
            self.step(index);
        }
        self.due = due;
    }

    /// Hands everything in the outbox to the kernel.
    fn flush(&mut self) {
        while !self.outbox.is_empty() {
            let mut outbox = std::mem::take(&mut self.outbox);
            outbox.waiting.sort_by_key(|outgoing| (outgoing.group, outgoing.send.flow));
            let by_socket = |a: &Outgoing, b: &Outgoing| (a.group, a.send.flow) == (b.group, b.send.flow);
            for run in outbox.waiting.chunk_by(by_socket) {
                self.hand_over(run, &outbox.arena);
            }
            outbox.clear();
            if self.outbox.is_empty() {
                self.outbox = outbox;
            }
        }
    }

    /// Sends datagrams of one socket.
    fn hand_over(&mut self, run: &[Outgoing], arena: &[u8]) {
        let now = Clock::now();
        let mut batch = std::mem::replace(&mut self.batch, SendBatch::new(0));
        batch.clear();
        for outgoing in run {
            let Outgoing { actor, life, send, at, length, .. } = *outgoing;
            let datagram = &arena[at..at + length];
            let name = send.stamp.then(|| self.awaited.expect(actor, life, send.id, now, datagram));
            let told = Told {
                to: send.to,
                from: send.from,
                tos: send.tos,
                ttl: (send.ttl != TTL).then_some(send.ttl),
                stamp: send.stamp,
                name: name.filter(|_| self.awaited.by_name()),
                segment: send.segment,
            };
            batch.push(&told, at, length);
        }
        let (group, socket) = (run[0].group, usize::from(run[0].send.flow));
        let (mut first, mut tries) = (0, 0);
        while first < batch.len() {
            match batch.send(&self.groups[group].sockets[socket], arena, first) {
                Ok(sent) => {
                    for outgoing in &run[first..first + sent] {
                        self.sent(outgoing, now);
                    }
                    (first, tries) = (first + sent, 0);
                }
                // An earlier datagram's refusal is told to the next send; that clears it.
                Err(error) if tries == 0 && !is_lasting(&error) => tries = 1,
                Err(error) => {
                    let outgoing = &run[first];
                    let seat = self.actors.get_mut(outgoing.actor).and_then(Option::as_mut);
                    if let Some(seat) = seat.filter(|seat| seat.life == outgoing.life) {
                        seat.actor.not_sent(outgoing.send.id, refusal(&error));
                        self.step(outgoing.actor);
                    }
                    (first, tries) = (first + 1, 0);
                }
            }
        }
        self.batch = batch;
    }

    fn sent(&mut self, outgoing: &Outgoing, at: Timestamp) {
        let seat = self.actors.get_mut(outgoing.actor).and_then(Option::as_mut);
        if let Some(seat) = seat.filter(|seat| seat.life == outgoing.life) {
            seat.actor.sent(outgoing.send.id, at, StampedBy::User);
            self.step(outgoing.actor);
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
        self.check_accounts();
    }

    /// Looks at a quarter of the paths, so that each is looked at about once a second.
    fn check_accounts(&mut self) {
        let count = self.actors.len().div_ceil(4);
        for _ in 0..count {
            self.check_next = (self.check_next + 1) % self.actors.len().max(1);
            if let Some(Some(Seat { actor: Actor::Echo(echo), .. })) = self.actors.get(self.check_next)
                && !echo.is_conserved()
            {
                self.series.accounting_errors.inc();
            }
        }
    }

    fn sleep(&mut self, bell: &EventFd) {
        let now = Clock::now();
        let due = self.alarms.peek().map_or(Timestamp::NEVER, |Reverse((at, _))| *at);
        let mut until = due.max(self.pace.woke + self.pace.tick).min(now + HEARTBEAT);
        if self.traffic.outstanding > 0 && !self.answers_at_once {
            let drain = now + self.pace.drain_after;
            if drain < until {
                until = drain;
                self.pace.drain_after = (self.pace.drain_after * 2).min(DRAIN_MAX);
            } else {
                self.pace.drain_after = RECEIVE_TICK_MAX;
            }
        }
        if !self.outbox.is_empty() || until <= now {
            self.series.lag.observe(now.since(until));
            return;
        }
        let span = until.since(now);
        let mut polled = vec![PollFd::new(bell.as_fd(), PollFlags::POLLIN)];
        if self.answers_at_once {
            let sockets = self.groups.iter().flat_map(|group| &group.sockets);
            polled.extend(sockets.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        }
        let rang = ppoll(&mut polled, Some(TimeSpec::from_duration(span)), None).unwrap_or(0);
        self.series.wakeups.inc();
        if rang == 0 {
            self.series.lag.observe(Clock::now().since(until));
        } else {
            let _ = bell.read();
        }
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
            Command::Stop { grace } => {
                self.stopping = Some(Clock::now() + grace);
                for index in 0..self.actors.len() {
                    if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
                        echo.prober.stop();
                        self.step(index);
                    }
                }
            }
        }
    }

    fn answer(
        &mut self,
        policy: &pathmeter_proto::admission::Policy,
        keys: Option<&Arc<pathmeter_proto::key::Keys>>,
    ) {
        for seat in self.actors.iter_mut().flatten() {
            match &mut seat.actor {
                Actor::Responder(answerer) => answerer.responder.change(policy.clone(), keys.cloned()),
                Actor::Listener(listener) => listener.keys = keys.map(|keys| keys.derive(Goodbye::PURPOSE)),
                Actor::Echo(_) => {}
            }
        }
    }

    fn add(&mut self, path: NewPath) -> Result<(), SocketError> {
        let NewPath { id, mut spec, from, series, tap } = path;
        let flows = spec.ssids.len();
        let group = self.group(from, spec.to.is_ipv4(), flows)?;
        spec.ssids = self.sessions(spec.to, flows, spec.seed);
        let routes: Vec<_> = spec.ssids.iter().map(|ssid| (spec.to, *ssid)).collect();
        let (to, interval) = (spec.to, spec.interval);
        let sources = self.groups[group].sockets[..flows].iter().map(Socket::address).collect();
        let echo = Echo { id, prober: Prober::new(spec, Clock::now()), series, tap };
        let index = self.seat(Actor::Echo(Box::new(echo)), group, routes.clone(), interval);
        self.routes.extend(routes.into_iter().map(|route| (route, index)));
        self.by_source.entry(to).or_insert(index);
        self.places.insert(id, index);
        self.tell(Event::Started { id, sources });
        self.step(index);
        Ok(())
    }

    /// The group of a choice of source, with at least `flows` sockets.
    fn group(&mut self, choice: SourceChoice, is_v4: bool, flows: usize) -> Result<usize, SocketError> {
        let now = Clock::now();
        let index = *self.choices.entry((choice, is_v4)).or_insert_with(|| {
            self.groups.push(Group {
                sockets: Vec::new(),
                drops: HostDrops::default(),
                looked: now,
                owner: None,
            });
            self.groups.len() - 1
        });
        while self.groups[index].sockets.len() < flows {
            let flow = u16::try_from(self.groups[index].sockets.len()).unwrap_or(u16::MAX);
            let port = if choice.port == 0 { 0 } else { choice.port.saturating_add(flow) };
            let address = SocketAddr::new(choice.address, port);
            let binding = Binding { address, dont_fragment: choice.dont_fragment, errors: true };
            let socket = Socket::bind(&binding, self.stamps)?;
            self.groups[index].sockets.push(socket);
        }
        Ok(index)
    }

    /// Session identifiers that no other path to the same responder has.
    fn sessions(&self, to: SocketAddr, flows: usize, seed: u64) -> Vec<u16> {
        let mut found = Vec::with_capacity(flows);
        let mut draw = seed;
        while found.len() < flows {
            draw = mix(draw);
            #[expect(clippy::cast_possible_truncation, reason = "16 well-mixed bits are wanted")]
            let ssid = draw as u16;
            if ssid != 0 && !found.contains(&ssid) && !self.routes.contains_key(&(to, ssid)) {
                found.push(ssid);
            }
        }
        found
    }

    fn remove(&mut self, id: PathId) {
        let Some(index) = self.places.get(&id).copied() else { return };
        if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
            echo.prober.stop();
            echo.prober.withdraw();
        }
        self.step(index);
        self.unseat(index);
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

/// Whether a refusal is about this datagram and not about an earlier one.
fn is_lasting(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::EAGAIN | libc::ENOBUFS))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => (ip, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}
