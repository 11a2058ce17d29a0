//! A path: its prober and its connection.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use pathmeter_proto::echo::{EchoReport, StreamProber, StreamStep};
use pathmeter_proto::machine::Now;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::ConnectionEnd;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::coop::has_budget_remaining;
use tokio::task::yield_now;
use tokio::time::sleep;

use super::connect_error::ConnectError;
use super::dial::{ConnectTimings, Dial};
use super::link::StreamLink;
use super::link_event::LinkEvent;
use super::shared_connection::SharedConnection;
use super::{Observer, StreamEcho};
use crate::clock::{Clock, ClockEvent};
use crate::loops::LoopEvent;
use crate::metrics::agent::LoopSeries;
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::{ConnectErrorKind, StreamSeries, TcpInfo};
use crate::paths::PathId;

/// A command to a path. When the sender is dropped, the path ends and messages in flight are withdrawn.
#[derive(Debug, Clone, Copy)]
pub(super) enum PathCommand {
    /// The peer sent a goodbye at this time.
    PeerLeaving(Timestamp),
    /// Stop sending, and end when every message has a verdict.
    Stop,
}

/// Minimum interval of reading TCP_INFO. Chosen: scrapes are less frequent.
const TCP_INFO_INTERVAL: Duration = Duration::from_secs(1);

/// A wakeup that is this late means that the process was paused. Chosen: ten times the scheduling delay of a
/// thread on a busy host.
const PAUSE_MIN: Duration = Duration::from_millis(500);

/// Maximum number of events per turn; then other paths run. Chosen: more than is in flight on a healthy path.
const EVENTS_PER_TURN_MAX: usize = 256;

/// A connection is closed after this many mismatches without a valid reply. Chosen: tolerates servers that
/// send greetings or occasional pings, but not a flood.
const MISMATCHES_MAX: u32 = 1_000;

/// A connection is closed after this many messages in a row that answer no request, including pings and
/// duplicates. Chosen: more than a correct server sends during the longest pause of this process.
const UNMATCHED_MAX: u32 = 10_000;

/// A path that is being measured.
pub(super) struct StreamPath {
    id: PathId,
    prober: StreamProber,
    dial: Arc<Dial>,
    link: Option<StreamLink>,
    attempt: Option<Attempt>,
    commands: UnboundedReceiver<PathCommand>,
    clock: Clock,
    /// All events that arrived before this time have been handled.
    drained: Timestamp,
    tcp_info_read_at: Timestamp,
    tcp: TcpInfo,
    /// Whether the last wakeup was by timer.
    was_woken_by_timer: bool,
    /// Mismatches on this connection since the last valid reply.
    mismatches: u32,
    /// Messages that answer no request, since the connection was last drained.
    unmatched: u32,
    series: Arc<EchoSeries>,
    stream: Arc<StreamSeries>,
    agent: Arc<LoopSeries>,
    observer: Observer,
    shared: Arc<SharedConnection>,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
}

/// A connection attempt.
type Attempt = Pin<Box<dyn Future<Output = Result<(StreamLink, ConnectTimings), ConnectError>> + Send>>;

/// What wakes a path.
enum Wakeup {
    Command(Option<PathCommand>),
    Attempt(Result<(StreamLink, ConnectTimings), ConnectError>),
    Link(LinkEvent),
}

impl StreamPath {
    pub(super) fn new(
        id: PathId,
        new: StreamEcho,
        peer_left_at: Option<Timestamp>,
        commands: UnboundedReceiver<PathCommand>,
        agent: Arc<LoopSeries>,
        events: tokio::sync::mpsc::Sender<LoopEvent>,
    ) -> Self {
        let now = Clock::now();
        let mut prober = StreamProber::new(new.spec, now);
        new.stream.continue_with();
        if let Some(at) = peer_left_at {
            prober.peer_leaving(at);
        }
        Self {
            id,
            prober,
            dial: Arc::new(new.dial),
            link: None,
            attempt: None,
            commands,
            clock: Clock::new(),
            drained: now,
            tcp_info_read_at: now,
            tcp: TcpInfo::default(),
            was_woken_by_timer: false,
            mismatches: 0,
            unmatched: 0,
            series: new.series,
            stream: new.stream,
            agent,
            observer: new.observer,
            shared: new.shared,
            events,
        }
    }

    /// Runs until a command ends the path, or until it has sent its last message and every message has a
    /// verdict.
    pub(super) async fn run(mut self) {
        loop {
            if !self.handle_pending().await {
                self.withdraw_all();
                break;
            }
            let Some(until) = self.drive() else {
                self.emit(LoopEvent::Finished(self.id));
                break;
            };
            let span = until.since(Clock::now());
            let wakeup = tokio::select! {
                biased;
                wakeup = poll_fn(|context| self.poll(context)) => Some(wakeup),
                () = sleep(span) => None,
            };
            self.on_wakeup(until, wakeup.is_none());
            if let Some(wakeup) = wakeup
                && !self.handle(wakeup)
            {
                self.withdraw_all();
                break;
            }
            self.agent.wakeups.inc();
        }
        self.close_link(ConnectionEnd::Closed);
        self.stream.close();
    }

    /// Handles a wakeup. After a pause of this process, messages on links without kernel timestamps are
    /// withdrawn: their RTT is unknown.
    fn on_wakeup(&mut self, until: Timestamp, is_by_timer: bool) {
        self.was_woken_by_timer = is_by_timer;
        let late = Clock::now().since(until);
        if is_by_timer {
            self.agent.lag.observe(late);
        }
        if late >= PAUSE_MIN && self.link.as_ref().is_some_and(|link| !link.has_kernel_timestamps()) {
            self.prober.withdraw();
        }
    }

    /// Stops sending and withdraws all messages in flight. Without the stop, a message that is due now would
    /// be sent and never get a verdict.
    fn withdraw_all(&mut self) {
        self.prober.stop();
        self.prober.withdraw();
        self.drive();
    }

    /// Handles pending events without waiting. Returns false if the path must end.
    async fn handle_pending(&mut self) -> bool {
        let start = Clock::now();
        if self.was_woken_by_timer {
            // Lets the runtime poll the sockets again: after a pause its readiness data is stale.
            yield_now().await;
        }
        let (_, event) = self.clock.read();
        if let Some(ClockEvent::Suspend(_)) = event {
            self.prober.withdraw();
        }
        for _ in 0..EVENTS_PER_TURN_MAX {
            let wakeup = poll_fn(|context| match self.poll(context) {
                Poll::Ready(wakeup) => Poll::Ready(Some(wakeup)),
                Poll::Pending => Poll::Ready(None),
            });
            match wakeup.await {
                Some(wakeup) => {
                    if !self.handle(wakeup) {
                        return false;
                    }
                }
                None if has_budget_remaining() => {
                    self.unmatched = 0;
                    if self.was_woken_by_timer {
                        self.drained = start;
                    }
                    return true;
                }
                None => break,
            }
        }
        // More events may be pending; other paths run first.
        yield_now().await;
        true
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Wakeup> {
        if let Poll::Ready(command) = self.commands.poll_recv(context) {
            return Poll::Ready(Wakeup::Command(command));
        }
        if let Some(attempt) = &mut self.attempt
            && let Poll::Ready(outcome) = attempt.as_mut().poll(context)
        {
            self.attempt = None;
            return Poll::Ready(Wakeup::Attempt(outcome));
        }
        match &mut self.link {
            Some(link) => link.poll_event(context).map(Wakeup::Link),
            None => Poll::Pending,
        }
    }

    /// Handles a wakeup event. Returns false if the path must end.
    fn handle(&mut self, wakeup: Wakeup) -> bool {
        match wakeup {
            Wakeup::Command(Some(PathCommand::PeerLeaving(at))) => self.prober.peer_leaving(at),
            Wakeup::Command(Some(PathCommand::Stop)) => self.prober.stop(),
            Wakeup::Command(None) => return false,
            Wakeup::Attempt(Ok((link, timings))) => {
                self.stream.connected();
                if let Some(at) = timings.certificate_expiry {
                    self.stream.certificate_expires(at);
                }
                let sources = link.source().into_iter().collect();
                self.emit(LoopEvent::Started { id: self.id, sources });
                self.link = Some(link);
                self.share();
                self.prober.connected(Clock::now());
            }
            Wakeup::Attempt(Err(error)) => self.disconnect(&error),
            Wakeup::Link(LinkEvent::Reply(answer)) => {
                if self.prober.received(&answer) {
                    (self.mismatches, self.unmatched) = (0, 0);
                } else {
                    self.on_unmatched();
                }
            }
            Wakeup::Link(LinkEvent::Response(answer, unexpected)) => {
                let _ = self.prober.received(&answer);
                if let Some(unexpected) = unexpected {
                    self.stream.unexpected(unexpected);
                }
            }
            Wakeup::Link(LinkEvent::Mismatch(mismatch)) => {
                self.prober.mismatched(mismatch);
                self.mismatches += 1;
                self.on_unmatched();
            }
            Wakeup::Link(LinkEvent::Writable) => self.prober.writable(),
            Wakeup::Link(LinkEvent::Ignored) => self.on_unmatched(),
            Wakeup::Link(LinkEvent::Closed(error)) => self.disconnect(&error),
            Wakeup::Link(LinkEvent::ClosedUnsent(message, error)) => {
                self.close_link(connection_end(error.kind));
                self.prober.undelivered(message);
                self.prober.disconnected(Clock::now(), None);
                // Counted but not reported: no message is lost.
                self.stream.disconnected(error.kind);
            }
        }
        true
    }

    /// Counts a message that answers no request. A server that sends them without pause would prevent this
    /// path from ever draining the connection.
    fn on_unmatched(&mut self) {
        self.unmatched += 1;
        if self.mismatches >= MISMATCHES_MAX || self.unmatched >= UNMATCHED_MAX {
            let text = format!("{} sends too many messages that answer no request", self.dial.to);
            self.disconnect(&ConnectError::new(ConnectErrorKind::Protocol, text));
        }
    }

    fn disconnect(&mut self, error: &ConnectError) {
        self.close_link(connection_end(error.kind));
        self.attempt = None;
        if self.prober.disconnected(Clock::now(), error.not_sent) {
            self.stream.disconnected(error.kind);
            self.emit(LoopEvent::Disconnected { id: self.id, reason: error.text.clone() });
        }
    }

    /// Shows the connection to a path that traces it.
    fn share(&self) {
        if let Some(link) = &self.link {
            self.shared.offer(|| link.duplicate(), self.dial.to);
        }
    }

    /// Reads TCP_INFO once more and closes the connection.
    fn close_link(&mut self, end: ConnectionEnd) {
        self.read_tcp_info();
        self.shared.close(end);
        if let Some(mut link) = self.link.take() {
            link.close();
        }
        (self.mismatches, self.unmatched) = (0, 0);
        self.tcp = TcpInfo::default();
    }

    /// Executes the prober's steps. Returns the time of the next step, or `None` when the prober has
    /// finished.
    fn drive(&mut self) -> Option<Timestamp> {
        let at = Clock::now();
        let now = Now { at, drained: self.drained, wall: self.clock.offset() };
        loop {
            match self.prober.step(now) {
                StreamStep::Connect => {
                    let dial = Arc::clone(&self.dial);
                    let is_traced = self.shared.is_watched();
                    self.attempt = Some(Box::pin(async move {
                        let mut timings = ConnectTimings::default();
                        let link = dial.connect(&mut timings, is_traced).await?;
                        Ok((link, timings))
                    }));
                    // The attempt starts when it is polled, so wake at once.
                    return Some(at);
                }
                StreamStep::Disconnect => {
                    let to = self.dial.to;
                    let text = match self.link {
                        Some(_) => format!("no reply from {to} before the timeout"),
                        None => format!("connecting to {to}: timed out"),
                    };
                    self.disconnect(&ConnectError::new(ConnectErrorKind::Timeout, text));
                }
                StreamStep::Send(message) => {
                    let link = self.link.as_mut().expect("the prober sends only while connected");
                    match link.send(message) {
                        Ok(outcome) => {
                            self.prober.sent(message, at, outcome.sent_at);
                            if !outcome.has_room {
                                self.prober.blocked();
                            }
                        }
                        Err(error) => self.disconnect(&error),
                    }
                }
                StreamStep::Report(report) => self.record(&report),
                StreamStep::Wait(until) => {
                    self.series.set_draining(self.prober.is_draining(at));
                    if at.since(self.tcp_info_read_at) >= TCP_INFO_INTERVAL {
                        self.tcp_info_read_at = at;
                        self.read_tcp_info();
                        self.share();
                        self.check_balance();
                    }
                    return Some(until);
                }
                StreamStep::Finished => return None,
            }
        }
    }

    fn record(&self, report: &EchoReport) {
        self.series.record(report);
        (self.observer.0)(report);
    }

    /// Reads TCP_INFO into the series.
    fn read_tcp_info(&mut self) {
        let Some(info) = self.link.as_ref().and_then(StreamLink::tcp_info) else { return };
        self.stream.tcp(&self.tcp, &info);
        self.tcp = info;
    }

    /// Checks that the counters agree with the prober: sent = decided + in flight.
    fn check_balance(&self) {
        let in_flight = u64::try_from(self.prober.in_flight()).unwrap_or(u64::MAX);
        if self.series.sent.get().checked_sub(self.series.decided()) != Some(in_flight) {
            self.agent.accounting_errors.inc();
        }
    }

    fn emit(&self, event: LoopEvent) {
        if self.events.try_send(event).is_err() {
            self.agent.events_dropped.inc();
        }
    }
}

/// How a connection ends with such an error, for the path that traces it.
const fn connection_end(error: ConnectErrorKind) -> ConnectionEnd {
    match error {
        ConnectErrorKind::Timeout => ConnectionEnd::TimedOut,
        ConnectErrorKind::Reset => ConnectionEnd::Reset,
        ConnectErrorKind::Refused
        | ConnectErrorKind::Unreachable
        | ConnectErrorKind::Closed
        | ConnectErrorKind::Denied
        | ConnectErrorKind::Tls
        | ConnectErrorKind::Protocol
        | ConnectErrorKind::Unresolved
        | ConnectErrorKind::Local => ConnectionEnd::Closed,
    }
}
