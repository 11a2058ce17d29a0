//! The threads that own the sockets of probes and responders: UDP and ICMP.
//!
//! Each is the same loop (`thread`) with its own sockets and tasks. A task stays on the loop it was started on. Tasks write
//! the metrics of their paths themselves, so what a full queue drops are events, never counts.

mod cmsg;
mod demux;
mod outbox;
mod ping;
mod poller;
mod socket;
mod socket_drops;
pub mod task;
mod thread;
mod tx_timestamps;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::AgentKind;

use crate::loops::{self, LoopEvent};
use crate::metrics::text::Cell;
use crate::paths::PathId;

pub(crate) use outbox::not_sent_reason;
pub use socket::{Binding, Socket, SocketError, TimestampMatching, both_families};
pub use task::{Access, MachineTask, Notice, Recorder, Task, TaskStep, Traffic};
pub use thread::RECEIVE_TICK_MAX;

/// The daemon's end of a datagram loop.
pub type DatagramHandle = loops::LoopHandle<NewTask, Control>;

/// A task to start, and the sockets that it needs.
pub struct NewTask {
    /// What its sockets carry.
    pub protocol: DatagramProtocol,
    /// The responder. Hosts that answer ICMP have no port.
    pub to: SocketAddr,
    /// Where to send from.
    pub source: SourceChoice,
    /// Sockets, each with a session of its own; at least 1.
    pub flows: u8,
    /// The shortest time between two datagrams; [`Duration::MAX`] for a task that sends rarely.
    pub interval: Duration,
    /// Decides the session identifiers, with those that are taken.
    pub seed: u64,
    /// Makes the task, given a session identifier for each flow and the time.
    pub build: Box<dyn FnOnce(Vec<u16>, Timestamp) -> Box<dyn Task> + Send>,
    /// A second task on the first flow's socket.
    pub companion: Option<Companion>,
}

/// A task that shares the first socket of a path, and so its 5-tuple and route, under a session of its own. It ends with
/// the path.
pub struct Companion {
    /// Decides the session identifier, with those that are taken.
    pub seed: u64,
    /// Makes the task, given the session identifier and the time.
    pub build: Box<dyn FnOnce(u16, Timestamp) -> Box<dyn Task> + Send>,
}

/// What sockets carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DatagramProtocol {
    /// UDP.
    Udp,
    /// ICMP echoes.
    Icmp,
}

/// Where a path sends from. Paths with the same choice and protocol share sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceChoice {
    /// Local address; unspecified is the kernel's choice.
    pub address: IpAddr,
    /// Port, with ICMP the identifier, of the first flow, the next flow has the next; 0 is the kernel's choice, kept while
    /// the agent runs.
    pub port: u16,
    /// Whether routers may not fragment.
    pub dont_fragment: bool,
}

/// What only a datagram loop can do.
pub enum Control {
    /// Replace the companion of a path, or remove it. The path itself is not touched.
    SetCompanion(PathId, Option<Companion>),
    /// Change whom the services answer.
    SetAccess(Box<Access>),
    /// End the services that answer probes and close their sockets; the others stay.
    StopAnswering,
}

/// A task that serves whoever sends to its sockets, from the start of a loop to its end.
pub struct Service {
    /// Its sockets.
    pub sockets: Vec<Socket>,
    /// Which of its tasks receives a datagram.
    pub tasks: ServiceTasks,
    /// Whether it answers probes: [`Control::StopAnswering`] ends it.
    pub answers_probes: bool,
}

/// The tasks of a service.
pub enum ServiceTasks {
    /// One task receives everything.
    One(Box<dyn Task>),
    /// The agent port: by the kind of a datagram.
    AgentPort {
        /// One task for each kind.
        tasks: Vec<(AgentKind, Box<dyn Task>)>,
        /// Counts datagrams of another magic number, version or kind.
        rejected: Arc<Cell>,
    },
}

/// Starts a loop. `name` is the loop's label and, behind `pm-`, the thread's name.
///
/// # Errors
/// When the operating system gives no thread or no event descriptor.
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
        // It can only fail when the counter is full, and then the loop is awake.
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
            Self::SetCompanion(..) => "SetCompanion",
            Self::SetAccess(_) => "SetAccess",
            Self::StopAnswering => "StopAnswering",
        })
    }
}
