//! The threads that own the UDP and ICMP sockets of probes and responders.
//!
//! All run the same loop (`thread`) with their own sockets and tasks. A task stays on the loop that started
//! it. Tasks update the metrics of their paths themselves, so a full event queue drops events but never
//! counts.

mod cmsg;
mod demux;
mod outbox;
mod packet_filter;
mod ping;
mod poller;
mod socket;
mod socket_drops;
pub mod task;
mod thread;
mod tx_timestamps;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::AgentKind;

use crate::loops::{self, LoopEvent};
use crate::metrics::text::Cell;
use crate::paths::PathId;

pub(crate) use cmsg::icmp_error;
pub(crate) use outbox::not_sent_reason;
pub(crate) use packet_filter::{FilterField, FilterStart, accept_only};
pub use ping::{opens_icmp_sockets, opens_ping_sockets};
pub(crate) use poller::sleep_precisely;
pub use socket::{Binding, Socket, SocketError, TimestampMatching, both_families};
pub(crate) use socket::{drop_counter, set as set_socket_option, set_icmp_extensions};
pub use task::{Access, MachineTask, Notice, Recorder, Task, TaskStep, Traffic};
pub use thread::RECEIVE_TICK_MAX;

/// A handle to a datagram loop.
pub type DatagramHandle = loops::LoopHandle<NewTask, Control>;

/// A task to start, and its sockets.
pub struct NewTask {
    /// The protocol of its sockets.
    pub protocol: DatagramProtocol,
    /// Address of the responder. The port is 0 for ICMP.
    pub to: SocketAddr,
    /// The source address and port.
    pub source: SourceChoice,
    /// Number of sockets, each with its own session; at least 1.
    pub flows: u8,
    /// Shortest time between two datagrams; [`Duration::MAX`] for a task that sends rarely.
    pub interval: Duration,
    /// Seed of the session identifiers. Identifiers that are in use are skipped.
    pub seed: u64,
    /// Creates the task from one session identifier per flow and the current time.
    pub build: Box<dyn FnOnce(Vec<u16>, Timestamp) -> Box<dyn Task> + Send>,
    /// A second task on the first flow's socket.
    pub companion: Option<Companion>,
    /// Whether it only accompanies the measurement of another path on the same sockets. Datagrams that no
    /// task claims are counted by a task that does not.
    pub is_following: bool,
}

/// A task that shares the first socket of a path, and therefore its 5-tuple and route, with its own session.
/// It ends with the path.
pub struct Companion {
    /// Seed of the session identifier. Identifiers that are in use are skipped.
    pub seed: u64,
    /// Creates the task from the session identifier and the current time.
    pub build: Box<dyn FnOnce(u16, Timestamp) -> Box<dyn Task> + Send>,
}

/// The protocol of sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DatagramProtocol {
    /// UDP.
    Udp,
    /// ICMP echo.
    Icmp,
}

/// The source of a path. Paths with the same choice and protocol share sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceChoice {
    /// Local address; the kernel chooses it if it is unspecified.
    pub address: IpAddr,
    /// Port (for ICMP the identifier) of the first flow; each further flow has the next one. 0: the kernel
    /// chooses, and the choice is kept while the agent runs.
    pub port: u16,
    /// Whether to set the don't-fragment bit.
    pub dont_fragment: bool,
}

impl SourceChoice {
    /// The source that a probe with these settings has toward an address; `None` leaves it to the kernel.
    #[must_use]
    pub fn toward(to: IpAddr, address: Option<IpAddr>, port: Option<u16>, dont_fragment: bool) -> Self {
        let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        Self { address: address.unwrap_or(any), port: port.unwrap_or(0), dont_fragment }
    }
}

/// The commands of a datagram loop.
pub enum Control {
    /// Replace or remove the companion of a path. The path itself does not change.
    SetCompanion(PathId, Option<Companion>),
    /// Step the task of a path: it has something to do.
    Wake(PathId),
    /// Change which sources the services answer.
    SetAccess(Box<Access>),
    /// Stop the services that answer probes and close their sockets; other services continue.
    StopAnswering,
}

/// A task that serves all datagrams to its sockets, from the start of a loop to its end.
pub struct Service {
    /// Its sockets.
    pub sockets: Vec<Socket>,
    /// Its tasks, and how datagrams are assigned to them.
    pub tasks: ServiceTasks,
    /// Whether it answers probes, so that [`Control::StopAnswering`] ends it.
    pub answers_probes: bool,
}

/// The tasks of a service.
pub enum ServiceTasks {
    /// One task receives everything.
    One(Box<dyn Task>),
    /// The agent port: one task per kind of datagram.
    AgentPort {
        /// The kinds and their tasks.
        tasks: Vec<(AgentKind, Box<dyn Task>)>,
        /// Counts datagrams with an unknown magic number, version or kind.
        rejected: Arc<Cell>,
    },
}

/// Starts a loop. `name` is the loop's label; the thread is called `pm-NAME`.
///
/// # Errors
/// When the operating system cannot create the thread or the event descriptor.
pub fn spawn(
    name: &'static str,
    services: Vec<Service>,
    timestamps: TimestampMatching,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
) -> io::Result<DatagramHandle> {
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    let wakeup = Arc::new(EventFd::from_value_and_flags(0, flags)?);
    let loop_wakeup = Arc::clone(&wakeup);
    let wake = move || {
        // A write fails only if the counter is full, and then the wakeup is already pending.
        let _ = wakeup.write(1);
    };
    DatagramHandle::spawn(name, wake, move |commands, series| {
        thread::DatagramLoop::new(services, timestamps, loop_wakeup, events, series).run(commands);
    })
}

impl fmt::Debug for NewTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewTask")
            .field("protocol", &self.protocol)
            .field("to", &self.to)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wake(_) => "Wake",
            Self::SetCompanion(..) => "SetCompanion",
            Self::SetAccess(_) => "SetAccess",
            Self::StopAnswering => "StopAnswering",
        })
    }
}
