//! The threads that measure, as the daemon sees them.
//!
//! Every such thread takes the same commands through a [`LoopHandle`] and reports the same [`LoopEvent`]s. What it needs to run a
//! path is its own: `T` of [`NewPath`].

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Goodbye;
use tokio::sync::mpsc::{self, UnboundedSender};

use crate::event_log::EventLog;
use crate::metrics::agent::LoopSeries;
use crate::paths::{PathId, PathKey};

/// A path to start on a loop.
#[derive(Debug)]
pub struct NewPath<T> {
    /// Its name between the daemon and the loop.
    pub id: PathId,
    /// What the loop runs.
    pub task: T,
    /// When the peer announced that it is leaving, if it may still be away.
    pub peer_left_at: Option<Timestamp>,
}

/// What a loop is asked to do. `C` is what only this kind of loop can do.
#[derive(Debug)]
pub enum LoopCommand<T, C> {
    /// Start a path.
    Start(Box<NewPath<T>>),
    /// Stop a path at once; what is in flight is withdrawn.
    Remove(PathId),
    /// The peer of these paths announced that it is leaving.
    PeerLeaving {
        /// Paths towards it; a loop ignores those of others.
        ids: Vec<PathId>,
        /// When it did.
        at: Timestamp,
    },
    /// Send nothing more, and end within this time.
    Stop {
        /// How long undecided datagrams are waited for.
        grace: Duration,
    },
    /// Something that only this kind of loop can do.
    Control(C),
}

/// What a loop reports to the daemon.
#[derive(Debug)]
pub enum LoopEvent {
    /// A path sends from these addresses: it was started, or has a connection again.
    Started {
        /// Which path.
        id: PathId,
        /// One for each flow.
        sources: Vec<SocketAddr>,
    },
    /// A path could not be started.
    NotStarted {
        /// Which path.
        id: PathId,
        /// Why, and what to do.
        reason: String,
    },
    /// A path has no connection any more, or could not make one. It keeps trying.
    Disconnected {
        /// Which path.
        id: PathId,
        /// Why.
        reason: String,
    },
    /// A path has sent all it was asked for, and every datagram is decided; or it was removed.
    Finished(PathId),
    /// Something that only this kind of probe can report.
    OfPath {
        /// Which path.
        id: PathId,
        /// What.
        event: Box<dyn PathEvent>,
    },
    /// A peer announced that it is leaving.
    PeerLeaving(Goodbye),
    /// The wall clock was stepped by this many nanoseconds.
    ClockStepped(i64),
    /// The host was suspended.
    Suspended(Duration),
}

/// An event that a kind of probe brings with it.
pub trait PathEvent: fmt::Debug + Send {
    /// Logs it, and adds it to the event log.
    fn report(&self, path: &PathKey, log: &EventLog);
}

/// Events that may wait for the daemon; at the limit further ones are dropped and counted. Chosen: more than there can be
/// paths, each of which reports its start; memory is taken only while they wait.
pub const EVENTS_PENDING_MAX: usize = 131_072;

/// The daemon's end of a loop.
pub struct LoopHandle<T, C> {
    commands: UnboundedSender<LoopCommand<T, C>>,
    wake: Box<dyn Fn() + Send + Sync>,
    series: Arc<LoopSeries>,
    thread: JoinHandle<()>,
}

/// A loop's end: where its commands arrive.
pub type CommandReceiver<T, C> = mpsc::UnboundedReceiver<LoopCommand<T, C>>;

impl<T, C> LoopHandle<T, C> {
    /// Starts a thread called `pm-NAME` that runs `body`. `wake` makes a loop that sleeps look at its commands.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn spawn(
        name: &'static str,
        wake: impl Fn() + Send + Sync + 'static,
        body: impl FnOnce(CommandReceiver<T, C>, Arc<LoopSeries>) + Send + 'static,
    ) -> std::io::Result<Self>
    where
        T: Send + 'static,
        C: Send + 'static,
    {
        let (commands, receiver) = mpsc::unbounded_channel();
        let series = Arc::new(LoopSeries::new(name));
        let own = Arc::clone(&series);
        let builder = std::thread::Builder::new().name(format!("pm-{name}"));
        let thread = builder.spawn(move || body(receiver, own))?;
        Ok(Self { commands, wake: Box::new(wake), series, thread })
    }

    /// Starts a path.
    pub fn start(&self, path: NewPath<T>) {
        self.send(LoopCommand::Start(Box::new(path)));
    }

    /// Stops a path at once; what is in flight is withdrawn.
    pub fn remove(&self, id: PathId) {
        self.send(LoopCommand::Remove(id));
    }

    /// The peer of these paths announced at `at` that it is leaving. Paths of other loops are ignored.
    pub fn peer_leaving(&self, ids: Vec<PathId>, at: Timestamp) {
        self.send(LoopCommand::PeerLeaving { ids, at });
    }

    /// Sends nothing more, waits at most `grace` for undecided datagrams, and ends the thread.
    pub fn stop(&self, grace: Duration) {
        self.send(LoopCommand::Stop { grace });
    }

    /// Asks for something that only this kind of loop can do.
    pub fn control(&self, control: C) {
        self.send(LoopCommand::Control(control));
    }

    /// Whether the thread has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// The loop's own metrics.
    #[must_use]
    pub fn series(&self) -> &Arc<LoopSeries> {
        &self.series
    }

    fn send(&self, command: LoopCommand<T, C>) {
        // A loop that has ended has nothing left to do.
        let _ = self.commands.send(command);
        (self.wake)();
    }
}

impl<T, C> fmt::Debug for LoopHandle<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("thread", &self.thread.thread().name()).finish_non_exhaustive()
    }
}
