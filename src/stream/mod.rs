//! Echo over connections: TCP, WebSocket and HTTP.
//!
//! One thread with a runtime of its own holds all paths that this host measures, so that no scrape and no visitor of ours
//! delays them. Each path is a task that drives a [`pathmeter_proto::echo::StreamProber`]. What others measure is answered
//! by [`responder`], in the daemon's runtime.

mod arrivals;
mod dial;
mod fresh;
mod gauge;
mod http;
mod kernel;
mod link;
mod path;
pub mod responder;
mod tcp;
#[cfg(test)]
mod tests;
mod trouble;
mod websocket;

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use pathmeter_proto::echo::{Report, StreamSpec};
use pathmeter_proto::time::Timestamp;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

pub use dial::{Dial, Over, Place};
pub use http::Expected;

use crate::datagram::{Event, PathId};
use crate::metrics::agent::LoopSeries;
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::StreamSeries;
use path::{Order, Path};

/// A path to measure over connections.
#[derive(Debug)]
pub struct NewStream {
    /// Its name here.
    pub id: PathId,
    /// What to measure.
    pub spec: StreamSpec,
    /// How to connect.
    pub dial: Dial,
    /// How often a fresh connection is made to measure that; `None`: never.
    pub fresh: Option<Duration>,
    /// Where to count messages.
    pub series: Arc<EchoSeries>,
    /// Where to count connections.
    pub stream: Arc<StreamSeries>,
    /// When the peer said goodbye, if it may still be away.
    pub absent_since: Option<Timestamp>,
    /// Gets a copy of every report; for measurements that somebody watches.
    pub tap: Option<mpsc::Sender<Report>>,
}

/// The daemon's end of the thread.
#[derive(Debug)]
pub struct Handle {
    commands: UnboundedSender<Command>,
    stats: Arc<LoopSeries>,
    thread: JoinHandle<()>,
}

enum Command {
    Add(Box<NewStream>),
    Remove(PathId),
    Goodbye { ids: Vec<PathId>, at: Timestamp },
    Stop { grace: Duration },
}

/// How often the thread shows that it lives.
const HEARTBEAT: Duration = Duration::from_millis(250);

impl Handle {
    /// Starts the thread, which is called `streams`.
    ///
    /// # Errors
    /// When the operating system gives no thread or no event descriptors.
    pub fn spawn(events: tokio::sync::mpsc::Sender<Event>) -> io::Result<Self> {
        let (commands, inbox) = unbounded_channel();
        let stats = Arc::new(LoopSeries::new("streams"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let house =
            House { stats: Arc::clone(&stats), events, paths: BTreeMap::new(), tasks: JoinSet::new() };
        let thread = std::thread::Builder::new().name("pm-streams".to_owned()).spawn(move || {
            runtime.block_on(house.run(inbox));
            // A name that is still being looked up keeps nobody from leaving.
            runtime.shutdown_background();
        })?;
        Ok(Self { commands, stats, thread })
    }

    /// Starts to measure a path.
    pub fn add(&self, path: NewStream) {
        self.tell(Command::Add(Box::new(path)));
    }

    /// Stops a path at once; what is undecided is withdrawn.
    pub fn remove(&self, id: PathId) {
        self.tell(Command::Remove(id));
    }

    /// The peer of these paths said at `at` that it is leaving.
    pub fn goodbye(&self, ids: Vec<PathId>, at: Timestamp) {
        self.tell(Command::Goodbye { ids, at });
    }

    /// Stops sending, waits at most `grace` for what is undecided, and ends the thread.
    pub fn stop(&self, grace: Duration) {
        self.tell(Command::Stop { grace });
    }

    /// Whether the thread has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// What the thread says about itself.
    #[must_use]
    pub fn stats(&self) -> &Arc<LoopSeries> {
        &self.stats
    }

    fn tell(&self, command: Command) {
        // A thread that has ended has nothing left to be told.
        let _ = self.commands.send(command);
    }
}

/// All paths, and their tasks.
struct House {
    stats: Arc<LoopSeries>,
    events: tokio::sync::mpsc::Sender<Event>,
    paths: BTreeMap<PathId, Resident>,
    tasks: JoinSet<()>,
}

/// A path's tasks, as the house knows them.
struct Resident {
    orders: UnboundedSender<Order>,
    fresh: Option<AbortHandle>,
}

impl Drop for Resident {
    fn drop(&mut self) {
        if let Some(fresh) = &self.fresh {
            fresh.abort();
        }
    }
}

impl House {
    async fn run(mut self, mut inbox: UnboundedReceiver<Command>) {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let grace = loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(Command::Add(path)) => self.add(*path),
                    Some(Command::Remove(id)) => drop(self.paths.remove(&id)),
                    Some(Command::Goodbye { ids, at }) => self.order(ids.iter(), Order::Goodbye(at)),
                    Some(Command::Stop { grace }) => break grace,
                    None => break Duration::ZERO,
                },
                _ = heartbeat.tick() => self.stats.progress.inc(),
                Some(_) = self.tasks.join_next() => {}
            }
        };
        self.stop(grace, heartbeat, inbox).await;
    }

    fn add(&mut self, path: NewStream) {
        let id = path.id;
        let (orders, inbox) = unbounded_channel();
        let fresh = path.fresh.map(|every| {
            let dial = Arc::new(path.dial.clone());
            let (patience, seed) = (path.spec.lost_after, !path.spec.seed);
            let (echo, series) = (Arc::clone(&path.series), Arc::clone(&path.stream));
            self.tasks.spawn(fresh::measure(dial, every, patience, seed, echo, series))
        });
        let path = Path::new(path, inbox, Arc::clone(&self.stats), self.events.clone());
        self.tasks.spawn(path.run());
        self.paths.insert(id, Resident { orders, fresh });
    }

    fn order<'a>(&self, ids: impl Iterator<Item = &'a PathId>, order: Order) {
        for resident in ids.filter_map(|id| self.paths.get(id)) {
            // One that has ended by itself needs no orders.
            let _ = resident.orders.send(order);
        }
    }

    async fn stop(
        mut self,
        grace: Duration,
        mut heartbeat: tokio::time::Interval,
        mut inbox: UnboundedReceiver<Command>,
    ) {
        let mut deadline = pin!(sleep(grace));
        for resident in self.paths.values_mut() {
            if let Some(fresh) = resident.fresh.take() {
                fresh.abort();
            }
            let _ = resident.orders.send(Order::Stop);
        }
        loop {
            tokio::select! {
                ended = self.tasks.join_next() => {
                    if ended.is_none() {
                        return;
                    }
                }
                Some(command) = inbox.recv() => match command {
                    // Peers leave together; and who stops us twice has no patience left.
                    Command::Goodbye { ids, at } => self.order(ids.iter(), Order::Goodbye(at)),
                    Command::Stop { grace } => {
                        let sooner = Instant::now() + grace;
                        if sooner < deadline.deadline() {
                            deadline.as_mut().reset(sooner);
                        }
                    }
                    Command::Remove(id) => drop(self.paths.remove(&id)),
                    Command::Add(_) => {}
                },
                _ = heartbeat.tick() => self.stats.progress.inc(),
                () = &mut deadline => break,
            }
        }
        // Their orders end, and so do they.
        self.paths.clear();
        while self.tasks.join_next().await.is_some() {}
    }
}
