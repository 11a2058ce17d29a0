//! The interface between the daemon and the measuring threads ("loops").
//!
//! Every loop takes the same commands through a [`LoopHandle`] and reports the same [`LoopEvent`]s. The
//! description of a path depends on the kind of loop: `T` of [`NewPath`].

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
    /// Identifies the path in commands and events.
    pub id: PathId,
    /// What the loop runs for the path.
    pub task: T,
    /// When the peer sent its goodbye, if it may still be away.
    pub peer_left_at: Option<Timestamp>,
}

/// A command to a loop. `C` is the commands of one kind of loop.
#[derive(Debug)]
pub enum LoopCommand<T, C> {
    /// Start a path.
    Start(Box<NewPath<T>>),
    /// Stop a path at once; datagrams in flight are withdrawn.
    Remove(PathId),
    /// The peer of these paths sent a goodbye.
    PeerLeaving {
        /// The paths to this peer; a loop ignores paths of other loops.
        ids: Vec<PathId>,
        /// When the peer sent it.
        at: Timestamp,
    },
    /// Stop sending, and end within the grace period.
    Stop {
        /// How long to wait for datagrams in flight.
        grace: Duration,
    },
    /// A command of this kind of loop.
    Control(C),
}

/// An event that a loop reports to the daemon.
#[derive(Debug)]
pub enum LoopEvent {
    /// A path was started or has connected again, and sends from these addresses.
    Started {
        /// The path.
        id: PathId,
        /// Local addresses, one per flow.
        sources: Vec<SocketAddr>,
    },
    /// A path could not be started.
    NotStarted {
        /// The path.
        id: PathId,
        /// The cause and the remedy.
        reason: String,
    },
    /// A path lost its connection or could not connect. It keeps trying.
    Disconnected {
        /// The path.
        id: PathId,
        /// The cause.
        reason: String,
    },
    /// A path was removed, or has sent its last datagram and every datagram has a verdict.
    Finished(PathId),
    /// An event of this kind of probe.
    OfPath {
        /// The path.
        id: PathId,
        /// The event.
        event: Box<dyn PathEvent>,
    },
    /// A peer sent a goodbye.
    PeerLeaving(Goodbye),
    /// The wall clock was stepped by this many nanoseconds.
    ClockStepped(i64),
    /// The host was suspended for this long.
    Suspended(Duration),
}

/// An event that a kind of probe defines.
pub trait PathEvent: fmt::Debug + Send {
    /// Logs the event and adds it to the event log.
    fn report(&self, path: &PathKey, log: &EventLog);
}

/// Capacity of the event channel to the daemon; when it is full, further events are dropped and counted.
/// Chosen: above the maximum number of paths, each of which reports its start; memory is allocated only for
/// waiting events.
pub const EVENTS_PENDING_MAX: usize = 131_072;

/// Sends commands to a loop. Clones send to the same loop.
pub struct LoopSender<T, C> {
    commands: UnboundedSender<LoopCommand<T, C>>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl<T, C> LoopSender<T, C> {
    /// Starts a path.
    pub fn start(&self, path: NewPath<T>) {
        self.send(LoopCommand::Start(Box::new(path)));
    }

    /// Stops a path at once; datagrams in flight are withdrawn.
    pub fn remove(&self, id: PathId) {
        self.send(LoopCommand::Remove(id));
    }

    fn send(&self, command: LoopCommand<T, C>) {
        // The receiver is gone if the loop has ended; the command is then obsolete.
        let _ = self.commands.send(command);
        (self.wake)();
    }
}

impl<T, C> Clone for LoopSender<T, C> {
    fn clone(&self) -> Self {
        Self { commands: self.commands.clone(), wake: Arc::clone(&self.wake) }
    }
}

impl<T, C> fmt::Debug for LoopSender<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoopSender")
    }
}

/// A handle to a loop, which sends it commands.
pub struct LoopHandle<T, C> {
    sender: LoopSender<T, C>,
    series: Arc<LoopSeries>,
    thread: JoinHandle<()>,
}

/// The receiver of a loop's commands.
pub type CommandReceiver<T, C> = mpsc::UnboundedReceiver<LoopCommand<T, C>>;

impl<T, C> LoopHandle<T, C> {
    /// Starts a thread called `pm-NAME` that runs `body`. `wake` wakes the loop so that it reads its
    /// commands.
    ///
    /// # Errors
    /// When the operating system cannot create the thread.
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
        let loop_series = Arc::clone(&series);
        let builder = std::thread::Builder::new().name(format!("pm-{name}"));
        let thread = builder.spawn(move || body(receiver, loop_series))?;
        Ok(Self { sender: LoopSender { commands, wake: Arc::new(wake) }, series, thread })
    }

    /// A sender of commands to the loop.
    #[must_use]
    pub fn sender(&self) -> LoopSender<T, C> {
        self.sender.clone()
    }

    /// Starts a path.
    pub fn start(&self, path: NewPath<T>) {
        self.sender.start(path);
    }

    /// Stops a path at once; datagrams in flight are withdrawn.
    pub fn remove(&self, id: PathId) {
        self.sender.remove(id);
    }

    /// Reports that the peer of these paths sent a goodbye at `at`. Paths of other loops are ignored.
    pub fn peer_leaving(&self, ids: Vec<PathId>, at: Timestamp) {
        self.sender.send(LoopCommand::PeerLeaving { ids, at });
    }

    /// Stops sending, waits at most `grace` for datagrams in flight, and ends the thread.
    pub fn stop(&self, grace: Duration) {
        self.sender.send(LoopCommand::Stop { grace });
    }

    /// Sends a command of this kind of loop.
    pub fn control(&self, control: C) {
        self.sender.send(LoopCommand::Control(control));
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
}

impl<T, C> fmt::Debug for LoopHandle<T, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoopHandle").field("thread", &self.thread.thread().name()).finish_non_exhaustive()
    }
}
