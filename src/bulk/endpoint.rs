//! One end of a run: it sends or receives on the data connections, and exchanges messages with the other end.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

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
    pub(super) own: RunResult,
    /// The result of the other end; `None` if it was not received.
    pub(super) other: Option<RunResult>,
    /// What had arrived at the receiver, in order or not, as the sender knows it by its own clock.
    pub(super) samples: Vec<Progress>,
}

/// Interval at which a run is supervised and the receiver counts. It bounds how long a run goes on after the
/// loss of its lease.
const TICK: Duration = Duration::from_millis(10);

/// Ticks between two messages about the progress, in the first second and later. They also show that
/// the other end is alive. Chosen: a run that is stopped soon needs more of them, and 10/s use 10 kbit/s.
const TICKS_PER_MESSAGE: u32 = 2;
const TICKS_PER_MESSAGE_LATER: u32 = 10;
const LATER: u32 = 100;

/// An end that has sent nothing for this long is taken for dead. Chosen: longer than the queue of a slow link
/// delays a message.
const SILENT_MAX: Duration = Duration::from_secs(2);

/// How long the receiver waits for what is on the way when the time of the run is over.
const DRAIN_AFTER_TIME: Duration = Duration::from_millis(300);

/// How long the sender waits for the result of the receiver when it has sent all its bytes.
const DRAIN_AFTER_BYTES: Duration = Duration::from_secs(4);

/// How long an end waits for the result of the other one in all other cases.
const RESULT_WAIT: Duration = Duration::from_secs(1);

/// Maximum samples; later ones replace the last one. Chosen: one each 10 ms for a minute and a half.
const SAMPLES_MAX: usize = 9_000;

/// Runs one end, from the start message to the results. `supervise` is called each 10 ms with what this end
/// has sent or received, and returns why the run must stop, if it must.
pub(super) async fn run(
    mut control: Control,
    data: Vec<TcpStream>,
    plan: EndpointPlan,
    supervise: impl FnMut(Progress) -> Option<StopReason>,
) -> EndpointOutcome {
    let mut end = Endpoint::new(data, plan);
    let reason = end.transfer(&mut control, supervise).await;
    end.finish(control, reason).await
}

#[derive(Debug)]
struct Endpoint {
    plan: EndpointPlan,
    start: Timestamp,
    data: Vec<Arc<TcpStream>>,
    bytes: Arc<ByteCount>,
    transfers: JoinSet<io::Result<()>>,
    samples: Vec<Progress>,
    other: Option<RunResult>,
}

impl Endpoint {
    /// Begins to send or to receive.
    fn new(data: Vec<TcpStream>, plan: EndpointPlan) -> Self {
        let data: Vec<_> = data.into_iter().map(Arc::new).collect();
        let bytes = Arc::new(ByteCount::new(plan.bytes_max, plan.rate_max));
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
        let start = Clock::now();
        let samples = vec![Progress::default()];
        Self { plan, start, data, bytes, transfers, samples, other: None }
    }

    /// Supervises the transfers until they have ended or must end. Returns why.
    async fn transfer(
        &mut self,
        control: &mut Control,
        mut supervise: impl FnMut(Progress) -> Option<StopReason>,
    ) -> StopReason {
        let drain = if self.plan.is_sender { Duration::ZERO } else { DRAIN_AFTER_TIME };
        let time_max = self.plan.duration + drain;
        let mut ticker = interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut ticks, mut received_at) = (0_u32, Clock::now());
        loop {
            tokio::select! {
                _ = ticker.tick() => {
                    let progress = self.progress();
                    let mut message = progress;
                    if self.plan.is_sender {
                        message.bytes = self.delivered();
                        self.add_sample(message);
                    }
                    if let Some(reason) = supervise(progress) {
                        // If it is not received, the other end sees the end of the connections.
                        let _ = control.send(&RunMessage::Stop(reason)).await;
                        return reason;
                    }
                    if progress.at.since(Timestamp::default()) >= time_max {
                        return StopReason::Time;
                    }
                    let every = if ticks < LATER { TICKS_PER_MESSAGE } else { TICKS_PER_MESSAGE_LATER };
                    let is_silent = Clock::now().since(received_at) > SILENT_MAX;
                    if is_silent || ticks.is_multiple_of(every) && !send_progress(control, message).await {
                        return StopReason::Peer;
                    }
                    ticks += 1;
                }
                message = control.receive() => {
                    received_at = Clock::now();
                    if let Some(reason) = self.on_message(message) {
                        return reason;
                    }
                }
                Some(ended) = self.transfers.join_next() => match ended {
                    Ok(Ok(())) if self.transfers.is_empty() => return StopReason::Bytes,
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return StopReason::Peer,
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
            Ok(RunMessage::Stop(reason)) => Some(reason),
            Ok(RunMessage::Result(result)) => {
                // The receiver has ended; or the sender, and what it has sent is still on the way.
                let reason = self.plan.is_sender.then_some(result.reason);
                self.other = Some(result);
                reason
            }
            Ok(RunMessage::Activate { .. } | RunMessage::Activated { .. } | RunMessage::Start) | Err(_) => {
                Some(StopReason::Peer)
            }
        }
    }

    /// Ends the connections and exchanges the results.
    async fn finish(mut self, mut control: Control, reason: StopReason) -> EndpointOutcome {
        let ended = self.progress();
        let (bytes, sender) = match self.plan.is_sender {
            true => (self.delivered(), self.sender_statistics()),
            false => (ended.bytes, SenderStatistics::default()),
        };
        let own = RunResult { reason, bytes, nanos: ended.at.as_nanos(), sender };
        let wait = match reason {
            StopReason::Bytes if self.plan.is_sender => DRAIN_AFTER_BYTES,
            StopReason::Bytes => RESULT_WAIT,
            StopReason::Time => DRAIN_AFTER_TIME + RESULT_WAIT,
            StopReason::Delay
            | StopReason::Loss
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => RESULT_WAIT,
        };
        match reason {
            StopReason::Bytes => {}
            StopReason::Time => {
                self.transfers.shutdown().await;
                for stream in &self.data {
                    // It may have ended already.
                    let _ = SockRef::from(&**stream).shutdown(std::net::Shutdown::Write);
                }
            }
            StopReason::Delay
            | StopReason::Loss
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => self.reset().await,
        }
        if control.send(&RunMessage::Result(own.clone())).await.is_ok() {
            let result = async {
                while self.other.is_none() {
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
            let _ = timeout(wait, result).await;
        }
        self.reset().await;
        if let Some(sent) = if self.plan.is_sender { Some(&own) } else { self.other.as_ref() } {
            let last = Progress { at: Timestamp::from_nanos(sent.nanos), bytes: sent.bytes };
            self.add_sample(last);
        }
        EndpointOutcome { own, other: self.other, samples: self.samples }
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
        self.data.iter().filter_map(|stream| delivered_bytes(&**stream)).sum()
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

/// Sends the progress. Returns whether the connection still exists.
async fn send_progress(control: &mut Control, progress: Progress) -> bool {
    let message = RunMessage::Progress { bytes: progress.bytes, nanos: progress.at.as_nanos() };
    control.send(&message).await.is_ok()
}
