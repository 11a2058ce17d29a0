//! The threads that own the sockets of probes: UDP, and ICMP.
//!
//! Each is the same loop (`thread`) with its own sockets and machines. A machine stays on the loop it was started on.
//! The loop writes a path's series itself, so what a full queue drops are events, never counts.

mod actor;
mod cmsg;
mod outbox;
mod overruns;
mod ping;
mod socket;
mod stamps;
mod thread;
mod watch;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use pathmeter_proto::admission::Policy;
use pathmeter_proto::echo::{Report, Spec};
use pathmeter_proto::key::Keys;
use pathmeter_proto::mtu;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Goodbye;

use crate::metrics::agent::{LoopSeries, ResponderSeries};
use crate::metrics::echo::EchoSeries;
use crate::metrics::path_mtu::PathMtuSeries;

pub(crate) use outbox::refusal;
pub use socket::{Binding, Socket, SocketError, StampNames, both_families};
pub use thread::RECEIVE_TICK_MAX;

/// What a path is called between the daemon and a loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(pub u64);

/// A path to measure.
#[derive(Debug)]
pub struct NewPath {
    /// Its name here.
    pub id: PathId,
    /// What to measure. The session identifiers are chosen by the loop; only their number counts. Its wire format decides
    /// which sockets it gets; towards hosts that answer ICMP the port does not count.
    pub spec: Spec,
    /// Where to send from.
    pub from: SourceChoice,
    /// Where to count.
    pub series: Arc<EchoSeries>,
    /// Whether its MTU is looked for, too; not where ICMP is spoken.
    pub path_mtu: Option<NewSearch>,
    /// When the peer said goodbye, if it may still be away.
    pub absent_since: Option<Timestamp>,
    /// Gets a copy of every report; for measurements that somebody watches.
    pub tap: Option<mpsc::Sender<Report>>,
}

/// A path's MTU to be found.
#[derive(Debug)]
pub struct NewSearch {
    /// How. The session identifier is chosen by the loop.
    pub spec: mtu::Spec,
    /// Where to count.
    pub series: Arc<PathMtuSeries>,
}

/// Where a path sends from. Paths with the same choice and wire format share sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceChoice {
    /// Local address; unspecified is the kernel's choice.
    pub address: IpAddr,
    /// Port, with ICMP the identifier, of the first flow, the next flow has the next; 0 is the kernel's choice, kept while we
    /// run.
    pub port: u16,
    /// Whether routers may not fragment.
    pub dont_fragment: bool,
}

/// What a loop tells the daemon.
#[derive(Debug)]
pub enum Event {
    /// A path sends from these addresses: it was started, or has a connection again.
    Started {
        /// Which path.
        id: PathId,
        /// One for each flow.
        sources: Vec<SocketAddr>,
    },
    /// A path has no connection any more, or could not make one. It goes on trying.
    Broken {
        /// Which path.
        id: PathId,
        /// Why.
        reason: String,
    },
    /// A path could not be started.
    Failed {
        /// Which path.
        id: PathId,
        /// Why.
        error: SocketError,
    },
    /// A path has sent all it was asked for, and decided it.
    Finished(PathId),
    /// A path's MTU was found, or is another one.
    PathMtu {
        /// Which path.
        id: PathId,
        /// What it was, if that was known.
        from: Option<u16>,
        /// What it is.
        to: u16,
    },
    /// A peer is leaving.
    Goodbye(Goodbye),
    /// The wall clock was stepped by this many nanoseconds.
    ClockStepped(i64),
    /// The host was suspended.
    Suspended(Duration),
}

/// Events that may wait for the daemon; at the limit they are dropped and counted. Chosen: more than there can be paths, each
/// of which says when it starts; the room is taken only while they wait.
pub const EVENTS: usize = 131_072;

/// The daemon's end of a loop.
#[derive(Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    bell: Arc<EventFd>,
    stats: Arc<LoopSeries>,
    thread: JoinHandle<()>,
}

enum Command {
    Add(Box<NewPath>),
    Remove(PathId),
    Search(PathId, Option<Box<NewSearch>>),
    Goodbye { ids: Vec<PathId>, at: Timestamp },
    Answer { policy: Box<Policy>, keys: Option<Arc<Keys>> },
    FallSilent,
    Stop { grace: Duration },
}

/// What a loop does besides measuring.
#[derive(Debug, Default)]
pub struct Duties {
    /// Sockets on which STAMP requests are answered.
    pub answer: Option<Answering>,
    /// Sockets on which goodbyes are heard.
    pub listen: Vec<Socket>,
}

/// How STAMP requests are answered.
#[derive(Debug)]
pub struct Answering {
    /// Where.
    pub sockets: Vec<Socket>,
    /// To whom.
    pub policy: Policy,
    /// Authenticated with these keys.
    pub keys: Option<Arc<Keys>>,
    /// Sessions that are remembered.
    pub sessions: usize,
    /// Where to count.
    pub series: Arc<ResponderSeries>,
}

impl Handle {
    /// Starts a loop. `name` is the thread's name and the loop's label.
    ///
    /// # Errors
    /// When the operating system gives no thread or no event descriptor.
    pub fn spawn(
        name: &'static str,
        duties: Duties,
        stamps: StampNames,
        events: tokio::sync::mpsc::Sender<Event>,
    ) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let bell = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let stats = Arc::new(LoopSeries::new(name));
        let (rings, series) = (Arc::clone(&bell), Arc::clone(&stats));
        let thread = std::thread::Builder::new()
            .name(format!("pm-{name}"))
            .spawn(move || thread::Thread::new(duties, stamps, rings, events, series).run(&inbox))?;
        Ok(Self { commands, bell, stats, thread })
    }

    /// Starts to measure a path.
    pub fn add(&self, path: NewPath) {
        self.tell(Command::Add(Box::new(path)));
    }

    /// Stops a path at once; what is in flight is withdrawn.
    pub fn remove(&self, id: PathId) {
        self.tell(Command::Remove(id));
    }

    /// Looks for the MTU of a path from now on in this way, or not at all. The path itself is not touched.
    pub fn search(&self, id: PathId, search: Option<NewSearch>) {
        self.tell(Command::Search(id, search.map(Box::new)));
    }

    /// The peer of these paths said at `at` that it is leaving.
    pub fn goodbye(&self, ids: Vec<PathId>, at: Timestamp) {
        self.tell(Command::Goodbye { ids, at });
    }

    /// Changes whom the loop answers.
    pub fn answer(&self, policy: Policy, keys: Option<Arc<Keys>>) {
        self.tell(Command::Answer { policy: Box::new(policy), keys });
    }

    /// Answers nobody any more, and goes on listening for goodbyes.
    pub fn fall_silent(&self) {
        self.tell(Command::FallSilent);
    }

    /// Stops sending, waits at most `grace` for what is in flight, and ends the thread.
    pub fn stop(&self, grace: Duration) {
        self.tell(Command::Stop { grace });
    }

    /// Whether the thread has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// What the loop says about itself.
    #[must_use]
    pub fn stats(&self) -> &Arc<LoopSeries> {
        &self.stats
    }

    fn tell(&self, command: Command) {
        // A loop that has ended has nothing left to be told.
        let _ = self.commands.send(command);
        let _ = self.bell.write(1);
    }
}

#[cfg(test)]
mod tests;
