//! Echo over connections: TCP, WebSocket and HTTP.
//!
//! One thread with its own runtime runs all paths that this host measures, so that neither scrapes nor
//! clients of this agent delay them. Each path is a task that drives a
//! [`pathmeter_proto::echo::StreamProber`]. The [`responder`] answers other hosts on another thread.

mod arrivals;
pub mod bulk;
mod connect_error;
mod connect_probe;
mod dial;
mod http;
mod http_target;
mod kernel;
mod link;
mod link_event;
pub mod own_flow;
mod path;
pub mod responder;
mod shared_connection;
mod tcp;
mod tcp_info;
mod tcp_trace;
#[cfg(test)]
mod tests;
mod websocket;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::echo::{EchoReport, StreamSpec};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

pub use dial::{Dial, StreamProtocol};
pub use http::ExpectedResponse;
pub use http_target::HttpTarget;
pub(crate) use kernel::{delivered_bytes, tcp_info as read_tcp_info};
pub use shared_connection::{OwnFlowStatus, Refusal, SharedConnection};
pub use tcp_trace::OwnFlow;

use crate::datagram::NewTask;
use crate::loops::{self, CommandReceiver, LoopCommand, LoopEvent, NewPath};
use crate::metrics::agent::LoopSeries;
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::StreamSeries;
use crate::paths::PathId;
use path::{PathCommand, StreamPath};
use tcp_trace::TcpTracePath;

/// An echo path over connections.
#[derive(Debug)]
pub struct StreamEcho {
    /// What to measure.
    pub spec: StreamSpec,
    /// How to connect.
    pub dial: Dial,
    /// Interval of connection probes; `None`: none.
    pub connect_interval: Option<Duration>,
    /// The series that count messages.
    pub series: Arc<EchoSeries>,
    /// The series that count connections.
    pub stream: Arc<StreamSeries>,
    /// Called with every report.
    pub observer: Observer,
    /// Shows the connection to a path that traces it.
    pub shared: Arc<SharedConnection>,
}

/// Takes reports. Must not wait.
pub struct Observer(pub Box<dyn Fn(&EchoReport) + Send>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// What a path of the stream loop does.
#[derive(Debug)]
pub enum StreamTask {
    /// Echo over connections.
    Echo(Box<StreamEcho>),
    /// A trace over TCP.
    Trace(TcpTrace),
}

/// A trace over TCP.
#[derive(Debug)]
pub struct TcpTrace {
    /// Its task, with one flow.
    pub task: NewTask,
    /// The connection on which the probes are sent, which needs CAP_NET_RAW; `None`: they are attempts to
    /// connect. Dropped if [`OWN_FLOW_PATHS_MAX`] paths have one already.
    pub own_flow: Option<OwnFlow>,
}

/// Paths whose probes are sent on connections of echoes; those of further ones have ports of their own.
/// Chosen: each has two raw sockets, and the kernel offers each received segment and ICMP message to all of
/// them.
pub const OWN_FLOW_PATHS_MAX: usize = 64;

/// A handle to the stream loop.
pub type StreamHandle = loops::LoopHandle<StreamTask, Infallible>;

/// Interval of the heartbeats that show that the thread is not stuck.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// Starts the stream loop on the thread `pm-streams`.
///
/// # Errors
/// When the operating system cannot create the thread or the event descriptors.
pub fn spawn(events: tokio::sync::mpsc::Sender<LoopEvent>) -> io::Result<StreamHandle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // The channel itself wakes the runtime.
    let wake = || {};
    StreamHandle::spawn("streams", wake, move |commands, series| {
        let stream_loop = StreamLoop { series, events, paths: BTreeMap::new(), tasks: JoinSet::new() };
        runtime.block_on(stream_loop.run(commands));
        // A lookup in progress does not delay the stop.
        runtime.shutdown_background();
    })
}

/// The stream loop: all paths and their tasks.
struct StreamLoop {
    series: Arc<LoopSeries>,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
    paths: BTreeMap<PathId, PathHandle>,
    tasks: JoinSet<()>,
}

/// The loop's handle to the tasks of a path.
struct PathHandle {
    commands: UnboundedSender<PathCommand>,
    connect_probe: Option<AbortHandle>,
    /// Whether it may send probes on the connection of an echo path.
    has_own_flow: bool,
}

impl Drop for PathHandle {
    fn drop(&mut self) {
        if let Some(connect_probe) = &self.connect_probe {
            connect_probe.abort();
        }
    }
}

impl StreamLoop {
    async fn run(mut self, mut commands: CommandReceiver<StreamTask, Infallible>) {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let grace = loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(LoopCommand::Start(path)) => self.start(*path),
                    Some(LoopCommand::Remove(id)) => drop(self.paths.remove(&id)),
                    Some(LoopCommand::PeerLeaving { ids, at }) => {
                        self.send(ids.iter(), PathCommand::PeerLeaving(at));
                    }
                    Some(LoopCommand::Stop { grace }) => break grace,
                    Some(LoopCommand::Control(never)) => match never {},
                    None => break Duration::ZERO,
                },
                _ = heartbeat.tick() => self.series.progress.inc(),
                Some(_) = self.tasks.join_next() => {}
            }
        };
        self.stop(grace, heartbeat, commands).await;
    }

    fn start(&mut self, path: NewPath<StreamTask>) {
        let NewPath { id, task, peer_left_at } = path;
        let (commands, receiver) = unbounded_channel();
        let task = match task {
            StreamTask::Echo(echo) => *echo,
            StreamTask::Trace(mut trace) => {
                let (series, events) = (Arc::clone(&self.series), self.events.clone());
                let own_flows = self.paths.values().filter(|path| path.has_own_flow).count();
                if let Some(refused) = trace.own_flow.take_if(|_| own_flows >= OWN_FLOW_PATHS_MAX) {
                    refused.connection.refuse(Refusal::TooMany);
                }
                let has_own_flow = trace.own_flow.is_some();
                self.tasks.spawn(TcpTracePath::new(id, trace, receiver, series, events).run());
                self.paths.insert(id, PathHandle { commands, connect_probe: None, has_own_flow });
                return;
            }
        };
        let connect_probe = task.connect_interval.map(|connect_interval| {
            let dial = Arc::new(task.dial.clone());
            let (connect_timeout, seed) = (task.spec.lost_after, !task.spec.seed);
            let (echo, series) = (Arc::clone(&task.series), Arc::clone(&task.stream));
            self.tasks.spawn(connect_probe::measure(
                dial,
                connect_interval,
                connect_timeout,
                seed,
                echo,
                series,
            ))
        });
        let path =
            StreamPath::new(id, task, peer_left_at, receiver, Arc::clone(&self.series), self.events.clone());
        self.tasks.spawn(path.run());
        self.paths.insert(id, PathHandle { commands, connect_probe, has_own_flow: false });
    }

    fn send<'a>(&self, ids: impl Iterator<Item = &'a PathId>, command: PathCommand) {
        for path in ids.filter_map(|id| self.paths.get(id)) {
            // The receiver is gone if the path has finished.
            let _ = path.commands.send(command);
        }
    }

    async fn stop(
        mut self,
        grace: Duration,
        mut heartbeat: tokio::time::Interval,
        mut commands: CommandReceiver<StreamTask, Infallible>,
    ) {
        let mut deadline = pin!(sleep(grace));
        for path in self.paths.values_mut() {
            if let Some(connect_probe) = path.connect_probe.take() {
                connect_probe.abort();
            }
            let _ = path.commands.send(PathCommand::Stop);
        }
        loop {
            tokio::select! {
                ended = self.tasks.join_next() => {
                    if ended.is_none() {
                        return;
                    }
                }
                Some(command) = commands.recv() => match command {
                    // Peers may stop at the same time, and send goodbyes.
                    LoopCommand::PeerLeaving { ids, at } => {
                        self.send(ids.iter(), PathCommand::PeerLeaving(at));
                    }
                    // A second stop may shorten the first.
                    LoopCommand::Stop { grace } => {
                        let sooner = Instant::now() + grace;
                        if sooner < deadline.deadline() {
                            deadline.as_mut().reset(sooner);
                        }
                    }
                    LoopCommand::Remove(id) => drop(self.paths.remove(&id)),
                    LoopCommand::Start(_) => {}
                    LoopCommand::Control(never) => match never {},
                },
                _ = heartbeat.tick() => self.series.progress.inc(),
                () = &mut deadline => break,
            }
        }
        // The paths end when their command channels close.
        self.paths.clear();
        while self.tasks.join_next().await.is_some() {}
    }
}
