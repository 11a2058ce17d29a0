//! One end of a run: it sends or receives on the data connections, and exchanges messages with the other end.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use nix::sys::socket::{getsockopt, sockopt::TcpCongestion};
use pathmeter_proto::bandwidth::StopReason;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::wire::bandwidth::{RunMessage, RunResult, SenderStatistics};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::control::{Control, ControlError};
use super::transfer::{self, ByteCount};
use crate::clock::Clock;
use crate::stream::{delivered_bytes, read_tcp_info};

/// What one end of a run does.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndpointPlan {
    /// Whether this end has begun the run. Only that end watches for harm.
    pub(super) is_prober: bool,
    /// Whether this end sends. The other end receives.
    pub(super) is_sender: bool,
    /// Bytes of payload after which the sender ends.
    pub(super) bytes_max: u64,
    /// Bytes of payload per second that the sender may send; `None`: no limit.
    pub(super) rate_max: Option<u64>,
    /// Time after which the sender ends.
    pub(super) duration: Duration,
}

/// What one end of a run learnt. The times of `samples` count from the start of the run.
#[derive(Debug, Clone)]
pub(super) struct EndpointOutcome {
    pub(super) local: RunResult,
    /// The result of the other end; `None` if it was not received.
    pub(super) remote: Option<RunResult>,
    /// What had arrived at the receiver, in order or not, as the sender knows it by its own clock.
    pub(super) samples: Vec<Progress>,
    /// Bytes that this end has passed to its kernel, or received from it.
    pub(super) bytes: u64,
}

/// Interval at which a run is supervised and the receiver counts. It bounds how long a run goes on after the
/// loss of its lease.
const TICK: Duration = Duration::from_millis(10);

/// Ticks between two messages about the progress, in the first second and later. They also show that
/// the other end is alive. Chosen: a run that is stopped soon needs more of them, and 10/s use 10 kbit/s.
const TICKS_PER_MESSAGE: u32 = 2;
const TICKS_PER_MESSAGE_LATER: u32 = 10;
const LATER: u32 = 100;

/// An end that has sent nothing for this long is taken for dead. Chosen: TCP has repeated a lost message
/// twice by then, behind a queue of a second.
const SILENT_MAX: Duration = Duration::from_secs(4);

/// How long the receiver waits for what is on the way when the time of the run is over.
const DRAIN_AFTER_TIME: Duration = Duration::from_millis(300);

/// How much longer than its time a run may take to deliver what was sent. The lease lasts a second longer.
const DRAIN_AFTER_BYTES: Duration = Duration::from_secs(4);

/// How long an end waits for the result of the other one when it has ended itself.
const RESULT_WAIT: Duration = Duration::from_secs(1);

/// Maximum messages that an end may send in a tick; one that sends more is not a peer. Chosen: those of a
/// pause of several seconds.
const MESSAGES_PER_TICK_MAX: u32 = 300;

/// Maximum samples; later ones replace the last one. Chosen: one each 10 ms for a minute and a half.
const SAMPLES_MAX: usize = 9_000;

/// Runs one end, from the start message to the results. `supervise` is called each 10 ms with what this end
/// has sent or received, until the last byte has arrived, and returns why the run must stop, if it must.
pub(super) async fn run(
    mut control: Control,
    data: Vec<TcpStream>,
    plan: EndpointPlan,
    supervise: impl FnMut(Progress) -> Option<StopReason>,
) -> EndpointOutcome {
    let mut end = Endpoint::new(data, plan);
    let ending = end.transfer(&mut control, supervise).await;
    end.finish(control, ending).await
}

#[derive(Debug)]
struct Endpoint {
    plan: EndpointPlan,
    start: Timestamp,
    data: Vec<Arc<TcpStream>>,
    bytes: Arc<ByteCount>,
    transfers: JoinSet<io::Result<()>>,
    /// Bytes that had been delivered before the payload: the messages of the data connections.
    delivered_before: u64,
    samples: Vec<Progress>,
    /// What had arrived when the time of the sender was over. What arrives later is not part of the rate.
    at_end_of_time: Option<Progress>,
    remote: Option<RunResult>,
}

/// How the transfer has ended.
#[derive(Debug, Clone, Copy)]
struct Ending {
    reason: StopReason,
    /// Whether the other end must be told.
    is_stopped_here: bool,
}

/// What the sender has sent is still on the way.
#[derive(Debug, Clone, Copy)]
struct Draining {
    reason: StopReason,
    /// When it is no longer waited for, from the start.
    until: Duration,
}

impl Endpoint {
    /// Begins to send or to receive.
    fn new(data: Vec<TcpStream>, plan: EndpointPlan) -> Self {
        let data: Vec<_> = data.into_iter().map(Arc::new).collect();
        // A receiver reads somewhat faster than the sender may send, so that it limits only one that sends
        // more.
        let rate_max = plan.rate_max.map(|rate| if plan.is_sender { rate } else { rate / 4 * 5 });
        let bytes = Arc::new(ByteCount::new(plan.bytes_max, rate_max));
        let delivered_before = data.iter().filter_map(|stream| delivered_bytes(&**stream)).sum();
        let mut transfers = JoinSet::new();
        for stream in &data {
            let (stream, bytes) = (Arc::clone(stream), Arc::clone(&bytes));
            transfers.spawn(async move {
                match plan.is_sender {
                    true => transfer::send(&stream, &bytes).await,
                    false => transfer::receive(&stream, &bytes).await,
                }
            });
        }
        let (start, samples) = (Clock::now(), vec![Progress::default()]);
        Self {
            plan,
            start,
            data,
            bytes,
            transfers,
            delivered_before,
            samples,
            at_end_of_time: None,
            remote: None,
        }
    }

    /// Supervises the transfers until everything has arrived or the run must end.
    async fn transfer(
        &mut self,
        control: &mut Control,
        mut supervise: impl FnMut(Progress) -> Option<StopReason>,
    ) -> Ending {
        let ended = |reason| Ending { reason, is_stopped_here: false };
        let mut ticker = interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut ticks, mut messages, mut received_at) = (0_u32, 0_u32, Clock::now());
        let mut draining: Option<Draining> = None;
        loop {
            tokio::select! {
                message = control.receive() => {
                    received_at = Clock::now();
                    messages += 1;
                    if let Some(reason) = self.on_message(message) {
                        return ended(draining.map_or(reason, |draining| draining.ended(reason)));
                    }
                    if messages > MESSAGES_PER_TICK_MAX {
                        return ended(StopReason::Peer);
                    }
                    // An end that sends without a pause does not keep the thread from its timers.
                    tokio::task::yield_now().await;
                }
                _ = ticker.tick() => {
                    let progress = self.progress();
                    let elapsed = progress.at.since(Timestamp::default());
                    let mut message = progress;
                    if self.plan.is_sender {
                        let now = || Progress { bytes: self.delivered(), ..progress };
                        message = self.at_end_of_time.unwrap_or_else(now);
                        self.add_sample(message);
                    }
                    if let Some(reason) = supervise(progress) {
                        return Ending { reason, is_stopped_here: true };
                    }
                    match draining {
                        Some(Draining { reason, until }) if elapsed >= until => return ended(reason),
                        None if elapsed >= self.plan.duration && self.plan.is_sender => {
                            self.at_end_of_time = Some(message);
                            self.end_sending().await;
                            let until = self.plan.duration + DRAIN_AFTER_TIME;
                            draining = Some(Draining { reason: StopReason::Time, until });
                        }
                        None if elapsed >= self.plan.duration + DRAIN_AFTER_BYTES => {
                            return ended(StopReason::Time);
                        }
                        Some(_) | None => {}
                    }
                    messages = 0;
                    let mut is_silent = Clock::now().since(received_at) > SILENT_MAX;
                    // After a pause of this process the messages of the time wait to be read.
                    if is_silent && let Some(message) = control.receive().now_or_never() {
                        (is_silent, received_at) = (false, Clock::now());
                        if let Some(reason) = self.on_message(message) {
                            return ended(reason);
                        }
                    }
                    let every = if ticks < LATER { TICKS_PER_MESSAGE } else { TICKS_PER_MESSAGE_LATER };
                    let is_due = ticks.is_multiple_of(every);
                    if is_silent || is_due && !send_progress(control, message).await {
                        return ended(StopReason::Peer);
                    }
                    ticks += 1;
                }
                Some(joined) = self.transfers.join_next() => match joined {
                    Ok(Ok(())) if !self.transfers.is_empty() => {}
                    Ok(Ok(())) if self.plan.is_sender => {
                        let until = self.plan.duration + DRAIN_AFTER_BYTES;
                        draining = Some(Draining { reason: StopReason::Bytes, until });
                    }
                    Ok(Ok(())) => return ended(StopReason::Bytes),
                    Ok(Err(_)) | Err(_) => return ended(StopReason::Peer),
                },
            }
        }
    }

    /// Handles a message during the transfer. Returns why the run ends, if it does.
    fn on_message(&mut self, message: Result<RunMessage, ControlError>) -> Option<StopReason> {
        match message {
            Ok(RunMessage::Progress { bytes, nanos }) => {
                if !self.plan.is_sender {
                    self.add_sample(Progress { at: Timestamp::from_nanos(nanos), bytes });
                }
                None
            }
            Ok(RunMessage::Stop(reason)) => Some(self.believed_reason(reason)),
            Ok(RunMessage::Result(mut result)) => {
                result.reason = self.believed_reason(result.reason);
                // The sender of a run that ends with its bytes waits until they have arrived.
                let has_ended = self.plan.is_sender || result.reason != StopReason::Bytes;
                let reason = has_ended.then_some(result.reason);
                self.remote = Some(result);
                reason
            }
            Ok(RunMessage::Activate { .. } | RunMessage::Activated { .. } | RunMessage::Start) | Err(_) => {
                Some(StopReason::Peer)
            }
        }
    }

    /// A reason that the other end gives. A responder does not know whether a run does harm, or what the
    /// operator of the prober wants.
    fn believed_reason(&self, reason: StopReason) -> StopReason {
        match reason {
            StopReason::Delay | StopReason::Loss | StopReason::Operator if self.plan.is_prober => {
                StopReason::Peer
            }
            StopReason::Bytes
            | StopReason::Time
            | StopReason::Delay
            | StopReason::Loss
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => reason,
        }
    }

    /// Ends the connections and exchanges the results.
    async fn finish(mut self, mut control: Control, ending: Ending) -> EndpointOutcome {
        let Ending { reason, is_stopped_here } = ending;
        let ended = self.progress();
        let (end, sender) = match self.plan.is_sender {
            true => {
                let now = Progress { bytes: self.delivered(), ..ended };
                (self.at_end_of_time.unwrap_or(now), self.sender_statistics())
            }
            false => (ended, SenderStatistics::default()),
        };
        let local = RunResult { reason, bytes: end.bytes, nanos: end.at.as_nanos(), sender };
        match reason {
            // Everything has arrived, or the sender has ended its connections.
            StopReason::Bytes | StopReason::Time => {}
            StopReason::Delay
            | StopReason::Loss
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => self.reset().await,
        }
        let stopped = match is_stopped_here {
            true => control.send(&RunMessage::Stop(reason)).await,
            false => Ok(()),
        };
        if stopped.is_ok() && control.send(&RunMessage::Result(local.clone())).await.is_ok() {
            let result = async {
                while self.remote.is_none() {
                    let message = control.receive().await;
                    let has_ended = message.is_err();
                    // Only its result matters now.
                    let _ = self.on_message(message);
                    if has_ended {
                        break;
                    }
                }
            };
            // Without it, the outcome has only what this end knows.
            let _ = timeout(RESULT_WAIT, result).await;
        }
        self.reset().await;
        if let Some(sent) = if self.plan.is_sender { Some(&local) } else { self.remote.as_ref() } {
            let last = Progress { at: Timestamp::from_nanos(sent.nanos), bytes: sent.bytes };
            self.add_sample(last);
        }
        let bytes = self.bytes.done();
        EndpointOutcome { local, remote: self.remote, samples: self.samples, bytes }
    }

    /// Sends no more, and ends the connections when the kernel has sent what it has.
    async fn end_sending(&mut self) {
        self.transfers.shutdown().await;
        for stream in &self.data {
            // It may have ended already.
            let _ = SockRef::from(&**stream).shutdown(std::net::Shutdown::Write);
        }
    }

    /// Closes the data connections. The kernel discards what it has not sent yet.
    async fn reset(&mut self) {
        self.transfers.shutdown().await;
        for stream in self.data.drain(..) {
            // Without the option the kernel sends the rest.
            let _ = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
        }
    }

    fn progress(&self) -> Progress {
        let at = Timestamp::from_nanos(nanos(Clock::now().since(self.start)));
        Progress { at, bytes: self.bytes.done() }
    }

    /// Bytes that have arrived at the other end, over all connections.
    fn delivered(&self) -> u64 {
        let all: u64 = self.data.iter().filter_map(|stream| delivered_bytes(&**stream)).sum();
        all.saturating_sub(self.delivered_before)
    }

    fn add_sample(&mut self, sample: Progress) {
        if self.samples.last().is_some_and(|last| sample.at < last.at || sample.bytes < last.bytes) {
            return;
        }
        if self.samples.len() >= SAMPLES_MAX {
            self.samples.pop();
        }
        self.samples.push(sample);
    }

    /// The statistics of the kernel, over all connections.
    fn sender_statistics(&self) -> SenderStatistics {
        let mut sum = SenderStatistics::default();
        let (mut busy, mut window, mut buffer) = (0, 0, 0);
        for stream in &self.data {
            if sum.congestion_control.is_empty()
                && let Ok(name) = getsockopt(&stream.as_fd(), TcpCongestion)
            {
                sum.congestion_control = name.to_string_lossy().into_owned();
            }
            let Some(info) = read_tcp_info(&**stream) else { continue };
            let retransmits = u32::try_from(info.retransmits).unwrap_or(u32::MAX);
            sum.retransmits = sum.retransmits.saturating_add(retransmits);
            sum.bytes_retransmitted += info.bytes_retransmitted;
            busy += info.busy;
            window += info.window_limited;
            buffer += info.buffer_limited;
        }
        let mean_ms = |micros: u64| {
            let connections = u64::try_from(self.data.len()).unwrap_or(u64::MAX).max(1);
            u32::try_from(micros / connections / 1_000).unwrap_or(u32::MAX)
        };
        (sum.busy_ms, sum.window_limited_ms, sum.buffer_limited_ms) =
            (mean_ms(busy), mean_ms(window), mean_ms(buffer));
        sum
    }
}

impl Draining {
    /// Why a run has ended whose receiver says `reason`.
    fn ended(self, reason: StopReason) -> StopReason {
        match reason {
            StopReason::Bytes | StopReason::Time => self.reason,
            StopReason::Delay
            | StopReason::Loss
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => reason,
        }
    }
}

/// Sends the progress. Returns whether the connection still exists.
async fn send_progress(control: &mut Control, progress: Progress) -> bool {
    let message = RunMessage::Progress { bytes: progress.bytes, nanos: progress.at.as_nanos() };
    control.send(&message).await.is_ok()
}
