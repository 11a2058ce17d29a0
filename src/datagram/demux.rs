//! Assigns received datagrams to tasks.
//!
//! Each group of sockets has one demultiplexer for the one packet format that its sockets carry.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use pathmeter_proto::machine::Arrival;
use pathmeter_proto::wire::{AgentKind, icmp, stamp};

use super::DatagramProtocol;
use crate::metrics::text::Cell;

/// The demultiplexer of a group of sockets. Tasks are identified by their slots.
#[derive(Debug)]
pub(super) enum Demux {
    /// One task receives everything.
    Single(usize),
    /// By the kind in the header of the agent port.
    AgentPort {
        tasks: BTreeMap<AgentKind, usize>,
        /// Counts datagrams that match no task.
        rejected: Arc<Cell>,
    },
    /// Replies, by their session identifier.
    Sessions(SessionIndex),
}

/// The sessions of probes that share sockets.
#[derive(Debug)]
pub(super) struct SessionIndex {
    protocol: DatagramProtocol,
    by_session: HashMap<(SocketAddr, u16), usize>,
    /// For datagrams that carry no session identifier.
    by_source: HashMap<SocketAddr, TasksOfSource>,
    /// The last sessions that were removed. Their late replies belong to no task.
    ended: VecDeque<(SocketAddr, u16)>,
}

/// Sessions that are remembered after their removal; late replies of earlier ones are counted as mismatched.
/// Chosen: those of a reload that replaces many paths.
const ENDED_MAX: usize = 1_024;

/// The tasks that measure one responder, in the order in which they were added.
#[derive(Debug, Default)]
struct TasksOfSource {
    /// The first of them counts what no task claims.
    measuring: Vec<usize>,
    /// Those that follow another task's measurement.
    following: Vec<usize>,
}

impl TasksOfSource {
    fn all(&self) -> impl Iterator<Item = usize> + '_ {
        self.measuring.iter().chain(&self.following).copied()
    }
}

/// The result of demultiplexing a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The datagram belongs to this task.
    Task(usize),
    /// It belongs to no task and has been counted.
    Rejected,
    /// It belongs to no task.
    None,
}

impl Demux {
    /// Returns the owner of a datagram. `claims` returns whether a reply without a session identifier answers
    /// a request of the given task.
    pub(super) fn owner(&self, datagram: &[u8], arrival: &Arrival, claims: impl Fn(usize) -> bool) -> Owner {
        match self {
            Self::Single(task) => Owner::Task(*task),
            Self::AgentPort { tasks, rejected } => {
                let kind = AgentKind::read(datagram).ok();
                match kind.and_then(|kind| tasks.get(&kind)) {
                    Some(task) => Owner::Task(*task),
                    None => {
                        rejected.inc();
                        Owner::Rejected
                    }
                }
            }
            Self::Sessions(sessions) => {
                sessions.owner(datagram, arrival, claims).map_or(Owner::None, Owner::Task)
            }
        }
    }

    /// The sessions; `None` if the group has no sessions.
    pub(super) fn sessions(&self) -> Option<&SessionIndex> {
        match self {
            Self::Sessions(sessions) => Some(sessions),
            Self::Single(_) | Self::AgentPort { .. } => None,
        }
    }

    /// [`Self::sessions`], mutable.
    pub(super) fn sessions_mut(&mut self) -> Option<&mut SessionIndex> {
        match self {
            Self::Sessions(sessions) => Some(sessions),
            Self::Single(_) | Self::AgentPort { .. } => None,
        }
    }
}

impl SessionIndex {
    pub(super) fn new(protocol: DatagramProtocol) -> Self {
        Self { protocol, by_session: HashMap::new(), by_source: HashMap::new(), ended: VecDeque::new() }
    }

    /// Whether the session identifier is in use with this responder.
    pub(super) fn contains(&self, to: SocketAddr, ssid: u16) -> bool {
        self.by_session.contains_key(&(to, ssid))
    }

    /// Adds a task. `is_following`: see [`NewTask::is_following`](super::NewTask::is_following).
    pub(super) fn add(&mut self, task: usize, to: SocketAddr, ssids: &[u16], is_following: bool) {
        self.by_session.extend(ssids.iter().map(|ssid| ((to, *ssid), task)));
        let tasks = self.by_source.entry(to).or_default();
        if is_following { &mut tasks.following } else { &mut tasks.measuring }.push(task);
    }

    pub(super) fn remove(&mut self, task: usize, to: SocketAddr, ssids: &[u16]) {
        for ssid in ssids {
            if self.by_session.get(&(to, *ssid)) == Some(&task) {
                self.by_session.remove(&(to, *ssid));
                if self.ended.len() == ENDED_MAX {
                    self.ended.pop_front();
                }
                self.ended.push_back((to, *ssid));
            }
        }
        if let Some(tasks) = self.by_source.get_mut(&to) {
            tasks.measuring.retain(|known| *known != task);
            tasks.following.retain(|known| *known != task);
            if tasks.all().next().is_none() {
                self.by_source.remove(&to);
            }
        }
    }

    fn owner(&self, datagram: &[u8], arrival: &Arrival, claims: impl Fn(usize) -> bool) -> Option<usize> {
        let from = arrival.from;
        match self.protocol {
            DatagramProtocol::Udp => {
                let ssids = stamp::ssids(datagram);
                let by_session = ssids.iter().find_map(|ssid| self.by_session.get(&(from, *ssid)));
                by_session.copied().or_else(|| {
                    let tasks = self.by_source.get(&from)?;
                    if ssids.iter().any(|ssid| self.ended.contains(&(from, *ssid))) {
                        return None;
                    }
                    // Unclaimed replies go to the first task, which counts them as mismatched.
                    tasks.all().find(|task| claims(*task)).or_else(|| tasks.all().next())
                })
            }
            DatagramProtocol::Icmp => {
                let ssid = icmp::ssid(datagram);
                let by_session = ssid.and_then(|ssid| self.by_session.get(&(from, ssid)));
                by_session.copied().or_else(|| {
                    // Routers may quote only the beginning, and zeros in place of the session identifier. The
                    // first task counts what no task claims.
                    arrival.icmp?;
                    let tasks = self.by_source.get(&from)?;
                    tasks.all().find(|task| claims(*task)).or_else(|| tasks.all().next())
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::key::Keys;
    use pathmeter_proto::machine::{IcmpError, IcmpKind, TimestampSource};
    use pathmeter_proto::time::{Timestamp, WallTime};
    use pathmeter_proto::wire::icmp::{IcmpEcho, IcmpVersion};
    use pathmeter_proto::wire::{Goodbye, NtpTime};

    use super::*;

    fn arrival(from: SocketAddr) -> Arrival {
        Arrival {
            at: Timestamp::from_nanos(1),
            by: TimestampSource::User,
            from,
            to: None,
            flow: 0,
            ttl: None,
            tos: None,
            icmp: None,
        }
    }

    #[test]
    fn agent_port_routes_by_kind_and_counts_other_datagrams() {
        let rejected = Arc::new(Cell::default());
        let tasks = BTreeMap::from([(AgentKind::Goodbye, 7)]);
        let demux = Demux::AgentPort { tasks, rejected: Arc::clone(&rejected) };
        let from = arrival("192.0.2.1:9".parse().unwrap());
        let keys = Keys::parse("0123456789abcdef").unwrap().derive(Goodbye::PURPOSE);
        let goodbye = Goodbye { name: "ams-1".into(), boot_id: 1, at: WallTime::from_nanos(1) };
        let datagram = goodbye.encode(&keys);
        assert_eq!(demux.owner(&datagram, &from, |_| false), Owner::Task(7));
        for unknown in [&datagram[..3], b"pmag\x02\x01", b"pmag\x01\xff", b"anything"] {
            assert_eq!(demux.owner(unknown, &from, |_| true), Owner::Rejected);
        }
        assert_eq!(rejected.get(), 4);
    }

    #[test]
    fn reply_without_a_session_goes_to_the_claiming_task_or_the_first() {
        let to: SocketAddr = "192.0.2.1:862".parse().unwrap();
        let mut sessions = SessionIndex::new(DatagramProtocol::Udp);
        sessions.add(1, to, &[10, 11], false);
        sessions.add(2, to, &[12], true);
        let (from, elsewhere) = (arrival(to), arrival("192.0.2.2:862".parse().unwrap()));
        let with_ssid = |ssid: u16| {
            let mut reply = vec![0; 44];
            reply[14..16].copy_from_slice(&ssid.to_be_bytes());
            reply
        };
        assert_eq!(sessions.owner(&with_ssid(12), &from, |_| false), Some(2));
        assert_eq!(sessions.owner(&with_ssid(12), &elsewhere, |_| true), None);
        assert_eq!(sessions.owner(&with_ssid(0), &from, |task| task == 2), Some(2));
        assert_eq!(sessions.owner(&with_ssid(0), &from, |_| false), Some(1));
        sessions.remove(1, to, &[10, 11]);
        assert!(!sessions.contains(to, 10) && sessions.contains(to, 12));
        assert_eq!(sessions.owner(&with_ssid(0), &from, |_| false), Some(2));
        assert_eq!(sessions.owner(&with_ssid(10), &from, |_| true), None, "a late reply");
        assert_eq!(sessions.owner(&with_ssid(13), &from, |_| false), Some(2), "never a session");
        sessions.add(3, to, &[10], false);
        assert_eq!(sessions.owner(&with_ssid(10), &from, |_| false), Some(3), "in use again");
    }

    #[test]
    fn quotation_without_a_session_goes_to_the_claiming_task_or_the_first() {
        let to: SocketAddr = "192.0.2.1:0".parse().unwrap();
        let mut sessions = SessionIndex::new(DatagramProtocol::Icmp);
        sessions.add(1, to, &[10], false);
        sessions.add(2, to, &[11], true);
        let icmp = IcmpError {
            router: "198.51.100.1".parse().unwrap(),
            kind: IcmpKind::TtlExceeded,
            code: 0,
            mtu: None,
            extensions_at: None,
        };
        let error = Arrival { icmp: Some(icmp), ..arrival(to) };
        assert_eq!(sessions.owner(&[8; 8], &error, |task| task == 2), Some(2));
        assert_eq!(sessions.owner(&[8; 8], &error, |_| false), Some(1));
        assert_eq!(sessions.owner(&[8; 8], &arrival(to), |_| true), None, "a message of another program");
        let (session, timestamp, sequence) = (7, NtpTime(9), 3);
        let mut quoted = Vec::new();
        IcmpEcho { session, timestamp, sequence, ssid: 11 }.encode(IcmpVersion::V4, 32, &mut quoted);
        assert_eq!(sessions.owner(&quoted, &error, |_| false), Some(2));
        quoted.truncate(24);
        quoted.resize(128, 0);
        assert_eq!(sessions.owner(&quoted, &error, |task| task == 2), Some(2), "filled up with zeros");
        assert_eq!(sessions.owner(&quoted, &arrival(to), |_| true), None, "a reply");
    }
}
