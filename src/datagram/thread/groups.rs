//! Groups of sockets and their sessions.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use pathmeter_proto::machine::HostDrops;
use pathmeter_proto::schedule::mix;
use pathmeter_proto::time::Timestamp;

use super::super::demux::{Demux, SessionIndex};
use super::super::socket::{Binding, Socket, SocketError};
use super::super::{DatagramProtocol, Service, ServiceTasks, SourceChoice};
use super::{DatagramLoop, IDLE_GROUP_TIMEOUT};
use crate::clock::Clock;

/// Sockets that share a source address, options and a demultiplexer: one per flow, or those of a service.
pub(super) struct SocketGroup {
    pub(super) demux: Demux,
    pub(super) sockets: Vec<Socket>,
    pub(super) drops: HostDrops,
    /// When the drop counters of the sockets were last read.
    pub(super) drops_read: Timestamp,
    /// When a task last used the group.
    last_used: Timestamp,
    answers_probes: bool,
}

/// The properties that paths must share to share sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SocketGroupKey {
    pub(super) source: SourceChoice,
    pub(super) protocol: DatagramProtocol,
    pub(super) is_v4: bool,
}

/// Identifiers to draw before one that is in use is accepted. Chosen: above the number of identifiers,
/// 65,535, which are drawn uniformly.
const SESSION_ID_DRAWS_MAX: u32 = 100_000;

impl DatagramLoop {
    pub(super) fn add_service(&mut self, service: Service, now: Timestamp) {
        let Service { sockets, tasks, answers_probes } = service;
        let group = self.groups.len();
        let mut add = |task| self.insert(task, None, group, None, Duration::MAX);
        let demux = match tasks {
            ServiceTasks::One(task) => Demux::Single(add(task)),
            ServiceTasks::AgentPort { tasks, rejected } => {
                let tasks: BTreeMap<_, _> = tasks.into_iter().map(|(kind, task)| (kind, add(task))).collect();
                Demux::AgentPort { tasks, rejected }
            }
        };
        self.groups.push(SocketGroup {
            demux,
            sockets,
            drops: HostDrops::default(),
            drops_read: now,
            last_used: now,
            answers_probes,
        });
    }

    /// Returns the group of `key`, after opening sockets until it has at least `flows`.
    pub(super) fn group(&mut self, key: SocketGroupKey, flows: u8) -> Result<usize, SocketError> {
        let SocketGroupKey { source, protocol, .. } = key;
        let now = Clock::now();
        let index = *self.group_of.entry(key).or_insert_with(|| {
            self.groups.push(SocketGroup {
                demux: Demux::Sessions(SessionIndex::new(protocol)),
                sockets: Vec::new(),
                drops: HostDrops::default(),
                drops_read: now,
                last_used: now,
                answers_probes: false,
            });
            self.groups.len() - 1
        });
        while self.groups[index].sockets.len() < usize::from(flows) {
            let flow = u16::try_from(self.groups[index].sockets.len()).unwrap_or(u16::MAX);
            let port = if source.port == 0 { 0 } else { source.port.saturating_add(flow) };
            let address = SocketAddr::new(source.address, port);
            let dont_fragment = source.dont_fragment;
            let binding = Binding { address, dont_fragment, errors: true, destinations: false };
            let is_taken = |identifier: u16| {
                let sockets = self.groups.iter().flat_map(|group| &group.sockets);
                sockets.into_iter().any(|socket| socket.address().port() == identifier)
            };
            let socket = match protocol {
                DatagramProtocol::Udp => Socket::bind(&binding, self.timestamps)?,
                DatagramProtocol::Icmp => Socket::open_echo(&binding, self.timestamps, is_taken)?,
            };
            self.groups[index].sockets.push(socket);
            self.poll_set = None;
        }
        Ok(index)
    }

    /// Returns session identifiers that no other path to the same responder uses.
    pub(super) fn session_ids(&self, to: SocketAddr, count: usize, seed: u64) -> Vec<u16> {
        let is_known = |ssid| {
            let sessions = self.groups.iter().filter_map(|group| group.demux.sessions());
            sessions.into_iter().any(|sessions| sessions.contains(to, ssid))
        };
        let mut found = Vec::with_capacity(count);
        let mut draw = seed;
        for tries in 0_u32.. {
            if found.len() == count {
                break;
            }
            draw = mix(draw);
            #[expect(clippy::cast_possible_truncation, reason = "16 well-mixed bits are wanted")]
            let ssid = draw as u16;
            // If nearly all identifiers are in use, one is shared: its replies are matched by sequence number
            // and timestamp.
            let is_taken = tries < SESSION_ID_DRAWS_MAX && is_known(ssid);
            if ssid != 0 && !found.contains(&ssid) && !is_taken {
                found.push(ssid);
            }
        }
        found
    }

    /// Stops the services that answer probes, and closes their sockets.
    pub(super) fn stop_answering(&mut self) {
        for group in 0..self.groups.len() {
            if !self.groups[group].answers_probes {
                continue;
            }
            let is_in_group =
                |slot: &Option<super::TaskEntry>| slot.as_ref().is_some_and(|slot| slot.group == group);
            let tasks: Vec<usize> =
                (0..self.slots.len()).filter(|index| is_in_group(&self.slots[*index])).collect();
            for index in tasks {
                self.release(index);
            }
            self.groups[group].sockets.clear();
            self.poll_set = None;
        }
    }

    /// Closes sockets that no path has used for [`IDLE_GROUP_TIMEOUT`].
    pub(super) fn close_idle_groups(&mut self, now: Timestamp) {
        for slot in self.slots.iter().flatten() {
            self.groups[slot.group].last_used = now;
        }
        for group in &mut self.groups {
            let is_idle = group.demux.sessions().is_some() && now.since(group.last_used) > IDLE_GROUP_TIMEOUT;
            if is_idle && !group.sockets.is_empty() {
                group.sockets.clear();
                self.poll_set = None;
            }
        }
    }
}
