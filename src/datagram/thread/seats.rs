//! Who sits in the loop: machines with their sockets, sessions and alarms.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::echo::{Prober, Responder, Wire};
use pathmeter_proto::grid::mix;
use pathmeter_proto::machine::{HostDrops, Now};
use pathmeter_proto::mtu::Search;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Goodbye;

use super::super::actor::{Actor, Answerer, Asked, Echo, Listener, PathMtu};
use super::super::outbox::Outgoing;
use super::super::socket::{Binding, Socket, SocketError};
use super::super::{Duties, Event, NewPath, NewSearch, PathId, SourceChoice};
use super::{Group, IDLE_GROUP_KEPT, Protocol, Seat, Thread};
use crate::clock::Clock;

/// Identifiers that are drawn before one that is taken is taken again. Chosen: 65,535 there are, drawn evenly.
const SESSION_TRIES: u32 = 100_000;

/// Alarms that ring before sockets are read again. What leaves at once comes back at once, each with its stamp: a loop that
/// was held up and then sends everything fills its own receive buffer, and one that sends more in a turn than it reads never
/// catches up. Chosen: 256 stamps and replies fit a receive buffer as Linux grants it by default (512 of them, measured
/// 2026-11-21), and in turns this long another one costs nothing.
const RINGS: usize = 256;

impl Thread {
    pub(super) fn take_up(&mut self, duties: Duties, now: Timestamp) {
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
        self.groups.push(Group {
            protocol: Protocol::Udp,
            sockets,
            drops: HostDrops::default(),
            looked: now,
            owner: Some(index),
            used: now,
        });
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

    pub(super) fn add(&mut self, path: NewPath) -> Result<(), SocketError> {
        let NewPath { id, mut spec, from, series, path_mtu, absent_since, tap } = path;
        let flows = spec.ssids.len();
        let protocol = match spec.wire {
            Wire::Stamp { .. } => Protocol::Udp,
            Wire::Icmp => Protocol::Icmp,
        };
        if protocol == Protocol::Icmp {
            spec.to.set_port(0);
        }
        let group = self.group(from, protocol, spec.to.is_ipv4(), flows)?;
        spec.ssids = self.sessions(spec.to, flows, spec.seed);
        let routes: Vec<_> = spec.ssids.iter().map(|ssid| (spec.to, *ssid)).collect();
        let (to, interval) = (spec.to, spec.interval);
        let sources = self.groups[group].sockets[..flows].iter().map(Socket::address).collect();
        let mut prober = Prober::new(spec, Clock::now());
        if let Some(at) = absent_since {
            prober.goodbye(at);
        }
        let echo = Echo { id, prober, series, tap, since: Clock::now() };
        let index = self.seat(Actor::Echo(Box::new(echo)), group, routes.clone(), interval);
        self.routes.extend(routes.into_iter().map(|route| (route, index)));
        self.by_source.entry(to).or_default().push(index);
        self.places.insert(id, index);
        self.tell(Event::Started { id, sources });
        self.step(index);
        self.search(id, path_mtu);
        Ok(())
    }

    /// Looks for the MTU of a path from now on in this way, from the socket of its first flow; `None`: not at all. It speaks STAMP:
    /// a path that does not has no search.
    pub(super) fn search(&mut self, id: PathId, search: Option<NewSearch>) {
        if let Some(index) = self.searches.remove(&id) {
            self.unseat(index);
        }
        let echo = self.places.get(&id).and_then(|index| self.actors[*index].as_ref());
        let (Some(NewSearch { mut spec, series }), Some(echo)) = (search, echo) else { return };
        let group = echo.group;
        if self.groups[group].protocol != Protocol::Udp {
            return;
        }
        spec.ssid = self.sessions(spec.to, 1, spec.seed)[0];
        let route = (spec.to, spec.ssid);
        let search = Search::new(spec, Clock::now());
        let actor = Actor::PathMtu(Box::new(PathMtu { id, search, series }));
        let index = self.seat(actor, group, vec![route], Duration::MAX);
        self.routes.insert(route, index);
        self.by_source.entry(route.0).or_default().push(index);
        self.searches.insert(id, index);
        self.step(index);
    }

    /// The group of a choice of source, with at least `flows` sockets.
    fn group(
        &mut self,
        choice: SourceChoice,
        protocol: Protocol,
        is_v4: bool,
        flows: usize,
    ) -> Result<usize, SocketError> {
        let now = Clock::now();
        let index = *self.choices.entry((choice, protocol, is_v4)).or_insert_with(|| {
            self.groups.push(Group {
                protocol,
                sockets: Vec::new(),
                drops: HostDrops::default(),
                looked: now,
                owner: None,
                used: now,
            });
            self.groups.len() - 1
        });
        while self.groups[index].sockets.len() < flows {
            let flow = u16::try_from(self.groups[index].sockets.len()).unwrap_or(u16::MAX);
            let port = if choice.port == 0 { 0 } else { choice.port.saturating_add(flow) };
            let address = SocketAddr::new(choice.address, port);
            let binding = Binding { address, dont_fragment: choice.dont_fragment, errors: true };
            let is_taken = |identifier: u16| {
                let sockets = self.groups.iter().flat_map(|group| &group.sockets);
                sockets.into_iter().any(|socket| socket.address().port() == identifier)
            };
            let socket = match protocol {
                Protocol::Udp => Socket::bind(&binding, self.stamps)?,
                Protocol::Icmp => Socket::echo(&binding, self.stamps, is_taken)?,
            };
            self.groups[index].sockets.push(socket);
            self.watch = None;
        }
        Ok(index)
    }

    /// Session identifiers that no other path to the same responder has.
    fn sessions(&self, to: SocketAddr, flows: usize, seed: u64) -> Vec<u16> {
        let mut found = Vec::with_capacity(flows);
        let mut draw = seed;
        for tries in 0_u32.. {
            if found.len() == flows {
                break;
            }
            draw = mix(draw);
            #[expect(clippy::cast_possible_truncation, reason = "16 well-mixed bits are wanted")]
            let ssid = draw as u16;
            // When nearly all are taken one is shared: its replies find their datagrams by sequence number and time.
            let is_taken = self.routes.contains_key(&(to, ssid)) && tries < SESSION_TRIES;
            if ssid != 0 && !found.contains(&ssid) && !is_taken {
                found.push(ssid);
            }
        }
        found
    }

    pub(super) fn remove(&mut self, id: PathId) {
        let Some(index) = self.places.get(&id).copied() else { return };
        if let Some(Seat { actor: Actor::Echo(echo), .. }) = &mut self.actors[index] {
            echo.prober.stop();
            echo.prober.withdraw();
        }
        self.step(index);
        self.unseat(index);
    }

    /// Unseats the responder and closes its sockets.
    pub(super) fn fall_silent(&mut self) {
        let is_responder =
            |seat: &Option<Seat>| seat.as_ref().is_some_and(|s| matches!(s.actor, Actor::Responder(_)));
        let Some(index) = self.actors.iter().position(is_responder) else { return };
        let group = self.actors[index].as_ref().map(|seat| seat.group);
        self.unseat(index);
        if let Some(group) = group {
            self.groups[group].sockets.clear();
            self.watch = None;
        }
    }

    /// Closes the sockets of paths that are gone.
    pub(super) fn close_idle_groups(&mut self, now: Timestamp) {
        for seat in self.actors.iter().flatten() {
            self.groups[seat.group].used = now;
        }
        for group in &mut self.groups {
            let is_idle = group.owner.is_none() && now.since(group.used) > IDLE_GROUP_KEPT;
            if is_idle && !group.sockets.is_empty() {
                group.sockets.clear();
                self.watch = None;
            }
        }
    }

    pub(super) fn step(&mut self, index: usize) {
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
                Asked::Tell { id, from, to } => self.tell(Event::PathMtu { id, from, to }),
                Asked::Finished => {
                    self.unseat(index);
                    return;
                }
            }
        }
    }

    pub(super) fn unseat(&mut self, index: usize) {
        let Some(seat) = self.actors.get_mut(index).and_then(Option::take) else { return };
        for route in &seat.routes {
            self.routes.remove(route);
            if let Some(seats) = self.by_source.get_mut(&route.0) {
                seats.retain(|known| *known != index);
                if seats.is_empty() {
                    self.by_source.remove(&route.0);
                }
            }
        }
        self.free.push(index);
        if let Actor::Echo(echo) = seat.actor {
            if !echo.is_conserved(Clock::now()) {
                self.series.accounting_errors.inc();
            }
            self.places.remove(&echo.id);
            self.search(echo.id, None);
            self.tell(Event::Finished(echo.id));
        }
    }

    /// Steps what is due, once, at most [`RINGS`] of it: what is left, and what asks for the past again, gets its turn after
    /// the next read.
    pub(super) fn ring(&mut self, now: Timestamp) {
        let mut due = std::mem::take(&mut self.due);
        self.is_behind = false;
        while let Some(Reverse((at, index))) = self.alarms.peek().copied() {
            if at > now {
                break;
            }
            if due.len() == RINGS {
                self.is_behind = true;
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
}
