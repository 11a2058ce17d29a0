//! One end of a run: it sends or receives on the data connections, and exchanges messages with the other end.

use std::time::Duration;

use futures_util::FutureExt as _;
use pathmeter_proto::bandwidth::StopReason;
use pathmeter_proto::bandwidth::throughput::Progress;
use pathmeter_proto::time::{Timestamp, nanos};
use pathmeter_proto::wire::bandwidth::{RunMessage, RunResult, SenderStatistics};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::control::{Control, ControlError};
use super::load::ReceivedLoad;
use super::payload::Payload;
use super::plan::EndpointPlan;
use crate::clock::Clock;

/// What one end of a run learnt. The times of `samples` count from the start of the run.
#[derive(Debug, Clone)]
pub(super) struct EndpointOutcome {
    pub(super) local: RunResult,
    /// The result of the other end; `None` if it was not received.
    pub(super) remote: Option<RunResult>,
    /// What had arrived at the receiver: over TCP in order or not, as the sender knows it by its own clock;
    /// over UDP as the receiver counts it.
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

/// A load over UDP has arrived when its receiver has reported nothing new for this long. Chosen: the longest
/// round trip, and a report.
const LOAD_DRAIN: Duration = Duration::from_secs(1);

/// A load of which nothing new arrives for this long while it is sent has lost its receiver.
const LOAD_UNHEARD_MAX: Duration = Duration::from_secs(2);

/// How much longer than its time a run may take to deliver what was sent. The lease lasts a second longer.
const DRAIN_AFTER_BYTES: Duration = Duration::from_secs(4);

/// How long an end waits for the result of the other one when it has ended itself.
const RESULT_WAIT: Duration = Duration::from_secs(2);

/// Maximum messages that an end may send in a tick; one that sends more is not a peer. Chosen: those of a
/// pause of several seconds.
const MESSAGES_PER_TICK_MAX: u32 = 300;

/// Maximum samples; later ones replace the last one. Chosen: one each 10 ms for a minute and a half.
const SAMPLES_MAX: usize = 9_000;

/// Runs one end, from the start message to the results. `supervise` is called each 10 ms with what this end
/// has sent or received, until the last byte has arrived, and returns why the run must stop, if it must.
pub(super) async fn run(
    mut control: Control,
    payload: Payload,
    plan: EndpointPlan,
    supervise: impl FnMut(Progress) -> Option<StopReason>,
) -> EndpointOutcome {
    let mut end = Endpoint::new(payload, plan);
    let ending = end.transfer(&mut control, supervise).await;
    end.finish(control, ending).await
}

#[derive(Debug)]
struct Endpoint {
    plan: EndpointPlan,
    start: Timestamp,
    payload: Payload,
    samples: Vec<Progress>,
    /// When the last sample had more bytes than the one before.
    grown_at: Timestamp,
    /// The progress when the sender had ended. What arrives later over TCP is not part of the rate.
    at_end_of_sending: Option<Progress>,
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
    fn new(payload: Payload, plan: EndpointPlan) -> Self {
        let start = Clock::now();
        Self {
            plan,
            start,
            payload,
            samples: vec![Progress::default()],
            grown_at: start,
            at_end_of_sending: None,
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
                    let message = self.at_end_of_sending.unwrap_or_else(|| self.progress_to_report(progress));
                    if self.counts_arrivals() {
                        self.add_sample(message);
                    }
                    let used = Progress { bytes: self.payload.used(), ..progress };
                    if let Some(reason) = supervise(used).or_else(|| self.payload.harm()) {
                        return Ending { reason, is_stopped_here: true };
                    }
                    match draining {
                        Some(Draining { reason, until }) if elapsed >= until || self.has_arrived() => {
                            return ended(reason);
                        }
                        // The sender of a load ends by itself.
                        None if elapsed >= self.plan.duration
                            && self.plan.is_sender
                            && self.payload.is_stream() =>
                        {
                            self.at_end_of_sending = Some(message);
                            self.payload.end_sending().await;
                            let until = self.plan.duration + DRAIN_AFTER_TIME;
                            draining = Some(Draining { reason: StopReason::Time, until });
                        }
                        None if elapsed >= self.plan.duration + DRAIN_AFTER_BYTES => {
                            return ended(StopReason::Time);
                        }
                        Some(_) | None => {}
                    }
                    messages = 0;
                    if draining.is_none() && self.is_unheard() {
                        return Ending { reason: StopReason::Peer, is_stopped_here: true };
                    }
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
                result = self.payload.ended() => match result {
                    Ok(reason) if self.plan.is_sender => {
                        let until = self.plan.duration + DRAIN_AFTER_BYTES;
                        draining = Some(Draining { reason, until });
                        if !self.payload.is_stream() {
                            self.at_end_of_sending = Some(self.progress());
                            self.grown_at = Clock::now();
                        }
                    }
                    Ok(reason) => return ended(reason),
                    Err(_) => return ended(StopReason::Peer),
                },
            }
        }
    }

    /// Handles a message during the transfer. Returns why the run ends, if it does.
    fn on_message(&mut self, message: Result<RunMessage, ControlError>) -> Option<StopReason> {
        match message {
            Ok(RunMessage::Progress { bytes, nanos }) => {
                if !self.counts_arrivals() {
                    self.add_sample(Progress { at: Timestamp::from_nanos(nanos), bytes });
                }
                None
            }
            Ok(RunMessage::Stop(reason)) => Some(self.believed_reason(reason)),
            Ok(RunMessage::Result(mut result)) => {
                result.reason = self.believed_reason(result.reason);
                // The sender of a connection that ends with its bytes waits until they have arrived.
                let is_drained = self.plan.is_sender || !self.payload.is_stream();
                let has_ended = is_drained || result.reason != StopReason::Bytes;
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
            | StopReason::Congestion
            | StopReason::Host
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => reason,
        }
    }

    /// Ends the connections and exchanges the results.
    async fn finish(mut self, mut control: Control, ending: Ending) -> EndpointOutcome {
        let Ending { reason, is_stopped_here } = ending;
        // The kernel knows what it knows of connections until they are closed.
        let of_streams = self.payload.is_stream().then(|| self.result(reason));
        match reason {
            // Everything has arrived, or the sender has ended its connections.
            StopReason::Bytes | StopReason::Time if self.payload.is_stream() => {}
            StopReason::Bytes
            | StopReason::Time
            | StopReason::Delay
            | StopReason::Loss
            | StopReason::Congestion
            | StopReason::Host
            | StopReason::Lease
            | StopReason::Peer
            | StopReason::Operator => self.payload.stop().await,
        }
        let local = of_streams.unwrap_or_else(|| self.result(reason));
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
        self.payload.stop().await;
        if self.payload.is_stream()
            && let Some(sent) = if self.plan.is_sender { Some(&local) } else { self.remote.as_ref() }
        {
            let last = Progress { at: Timestamp::from_nanos(sent.nanos), bytes: sent.bytes };
            self.add_sample(last);
        }
        let bytes = self.payload.used();
        EndpointOutcome { local, remote: self.remote, samples: self.samples, bytes }
    }

    /// What this end knows when the transfer has ended.
    fn result(&self, reason: StopReason) -> RunResult {
        let now = self.progress();
        let end = self.at_end_of_sending.unwrap_or_else(|| self.progress_to_report(now));
        let nanos = end.at.as_nanos();
        match self.payload.received() {
            Some(ReceivedLoad { result, span }) => {
                let (bytes, nanos) = (now.bytes, pathmeter_proto::time::nanos(span));
                RunResult { reason, bytes, nanos, sender: SenderStatistics::default(), load: Some(result) }
            }
            None => {
                let sender = self.payload.sender_statistics(self.plan.is_sender);
                RunResult { reason, bytes: end.bytes, nanos, sender, load: None }
            }
        }
    }

    fn progress(&self) -> Progress {
        let at = Timestamp::from_nanos(nanos(Clock::now().since(self.start)));
        Progress { at, bytes: self.payload.done() }
    }

    /// What this end tells the other one: the sender of a connection what has arrived, as far as it knows.
    fn progress_to_report(&self, progress: Progress) -> Progress {
        match self.payload.delivered().filter(|_| self.plan.is_sender) {
            Some(bytes) => Progress { bytes, ..progress },
            None => progress,
        }
    }

    /// Whether this end counts what has arrived: the sender of a connection, and the receiver of a load.
    fn counts_arrivals(&self) -> bool {
        self.payload.is_stream() == self.plan.is_sender
    }

    /// Whether all of a load has arrived, or nothing more of it does.
    fn has_arrived(&self) -> bool {
        let arrived = self.samples.last().map_or(0, |last| last.bytes);
        let is_all = arrived >= self.payload.done();
        !self.payload.is_stream() && (is_all || Clock::now().since(self.grown_at) > LOAD_DRAIN)
    }

    /// Whether this end sends a load of which nothing arrives.
    fn is_unheard(&self) -> bool {
        let is_load = self.plan.is_sender && !self.payload.is_stream();
        is_load && Clock::now().since(self.grown_at) > LOAD_UNHEARD_MAX
    }

    fn add_sample(&mut self, sample: Progress) {
        if self.samples.last().is_some_and(|last| sample.at < last.at || sample.bytes < last.bytes) {
            return;
        }
        if self.samples.last().is_none_or(|last| sample.bytes > last.bytes) {
            self.grown_at = Clock::now();
        }
        if self.samples.len() >= SAMPLES_MAX {
            self.samples.pop();
        }
        self.samples.push(sample);
    }
}

impl Draining {
    /// Why a run has ended whose receiver says `reason`.
    fn ended(self, reason: StopReason) -> StopReason {
        match reason {
            StopReason::Bytes | StopReason::Time => self.reason,
            StopReason::Delay
            | StopReason::Loss
            | StopReason::Congestion
            | StopReason::Host
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
