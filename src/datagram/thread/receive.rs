//! Everything that comes in: datagrams, stamps, complaints, and what the kernel dropped.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pathmeter_proto::machine::{Arrival, TimestampSource};
use pathmeter_proto::time::Timestamp;

use super::super::cmsg::ErrorQueueEntry;
use super::super::demux::Owner;
use super::super::socket::{RECEIVE_BATCH, ReceiveBatch, SocketKind};
use super::Thread;
use super::groups::SocketGroup;
use crate::clock::Clock;

/// Batches that are read from a socket before anything else gets its turn.
const ROUNDS: usize = 64;

/// Answers that leave together. T3 is read before an answer waits for the others of its batch and for their way through
/// the kernel: what it waits is in the round trip. Measured 2026-11-20 at 10,000 paths: batches of 32 answers make the mean
/// round trip 67 µs, of 8 19 µs, of 4 9 µs, of 2 6 µs; below 4 an answer costs more.
const ANSWERS: usize = 4;

/// How often sockets are asked what they dropped. Chosen: 10 ms, well below the time after which anything is given up.
const DROPS_EVERY: Duration = Duration::from_millis(10);

/// A drop excuses datagrams for this long: longer than anything waits for its verdict.
const DROPS_KEPT: Duration = Duration::from_secs(120);

impl Thread {
    /// Reads the sockets that are ready; true if everything that had arrived by `now` was read.
    pub(super) fn read(&mut self, inbox: &mut ReceiveBatch, now: Timestamp) -> bool {
        if !std::mem::take(&mut self.has_looked) {
            self.watch().look();
        }
        let (mut is_drained, mut index) = (true, 0);
        for group in 0..self.groups.len() {
            for socket in 0..self.groups[group].sockets.len() {
                let ready = self.watch().ready(index);
                if ready.errors {
                    self.read_errors(inbox, group, socket, now);
                }
                if ready.anything {
                    is_drained &= self.read_datagrams(inbox, group, socket, now);
                }
                index += 1;
            }
        }
        if now.since(self.drops_read) >= DROPS_EVERY {
            self.read_all_drops(now);
        }
        is_drained
    }

    /// Asks all sockets what they dropped.
    pub(super) fn read_all_drops(&mut self, now: Timestamp) {
        self.drops_read = now;
        for group in 0..self.groups.len() {
            self.read_drops(group, now);
        }
    }

    /// Asks the sockets of a group what they dropped since they were last asked.
    fn read_drops(&mut self, group: usize, now: Timestamp) {
        let SocketGroup { sockets, drops, drops_read, .. } = &mut self.groups[group];
        drops.forget(*drops_read - DROPS_KEPT);
        for (flow, socket) in sockets.iter_mut().enumerate() {
            let dropped = match socket.kind() {
                SocketKind::Udp => self.overruns.among(socket.new_drops()),
                SocketKind::Ping | SocketKind::Raw => socket.new_drops(),
            };
            drops.add(u8::try_from(flow).unwrap_or(u8::MAX), *drops_read, now, dropped);
            self.series.rx_dropped.add(dropped.into());
        }
        *drops_read = now;
    }

    fn read_errors(&mut self, inbox: &mut ReceiveBatch, group: usize, socket: usize, now: Timestamp) {
        let flow = u8::try_from(socket).unwrap_or(u8::MAX);
        for _ in 0..ROUNDS {
            let Ok(count) = inbox.receive(&self.groups[group].sockets[socket], true) else { return };
            for index in 0..count {
                let found = inbox.at(index);
                match (found.said.about, found.said.timestamp) {
                    (Some(ErrorQueueEntry::Stamp { name }), Some(timestamp)) => {
                        let Some(entry) = self.awaited.find(name, found.bytes) else { continue };
                        let at = self.clock.place(timestamp, entry.handed, Clock::now());
                        let slot = self.slots.get_mut(entry.slot).and_then(Option::as_mut);
                        if let Some(slot) = slot.filter(|slot| slot.life == entry.life) {
                            slot.task.sent(entry.id, at, TimestampSource::Kernel);
                            self.step(entry.slot);
                        }
                    }
                    (Some(ErrorQueueEntry::Icmp(icmp)), _) => {
                        let Some(to) = found.from else { continue };
                        if !self.groups[group].sockets[socket].has_sent(found.bytes) {
                            continue;
                        }
                        let arrival = Arrival {
                            at: now,
                            by: TimestampSource::User,
                            from: to,
                            to: None,
                            flow,
                            ttl: None,
                            tos: None,
                            icmp: Some(icmp),
                        };
                        self.deliver(group, found.bytes, &arrival);
                    }
                    (Some(ErrorQueueEntry::Stamp { .. } | ErrorQueueEntry::Local { .. }) | None, _) => {}
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
                let Some(bytes) = self.groups[group].sockets[socket].carried(found.bytes) else { continue };
                let (at, by) = match found.said.timestamp {
                    Some(timestamp) => (
                        self.clock.place(timestamp, self.drained, now.max(Clock::now())),
                        TimestampSource::Kernel,
                    ),
                    None => (Clock::now(), TimestampSource::User),
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
                self.deliver(group, bytes, &arrival);
                if self.is_serving && self.outbox.waiting.len() >= ANSWERS {
                    self.flush();
                }
            }
            if self.is_serving {
                self.flush();
            }
            if count < RECEIVE_BATCH {
                return true;
            }
        }
        false
    }

    fn deliver(&mut self, group: usize, datagram: &[u8], arrival: &Arrival) {
        let claims = |index: usize| {
            let slot = self.slots.get(index).and_then(Option::as_ref);
            slot.is_some_and(|slot| slot.task.claims(datagram, arrival.flow))
        };
        match self.groups[group].demux.owner(datagram, arrival, claims) {
            Owner::Task(index) => {
                if let Some(Some(slot)) = self.slots.get_mut(index) {
                    slot.task.received(datagram, arrival);
                    self.step(index);
                }
            }
            Owner::Rejected => {}
            Owner::None => self.series.unrouted.inc(),
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => (ip, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}
