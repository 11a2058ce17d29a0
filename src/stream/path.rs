//! One path: its prober, its connection, and what comes of them.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Poll};
use std::time::Duration;

use pathmeter_proto::echo::{EchoReport, StreamProber, StreamStep};
use pathmeter_proto::machine::Now;
use pathmeter_proto::time::Timestamp;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::coop::has_budget_remaining;
use tokio::task::yield_now;
use tokio::time::sleep;

use super::StreamEcho;
use super::connect_error::ConnectError;
use super::dial::{ConnectTimings, Dial};
use super::link::Link;
use super::link_event::LinkEvent;
use crate::clock::{Clock, ClockEvent};
use crate::loops::LoopEvent;
use crate::metrics::agent::LoopSeries;
use crate::metrics::echo::EchoSeries;
use crate::metrics::stream::{ConnectErrorKind, StreamSeries, TcpInfo};
use crate::paths::PathId;

/// What a path is asked to do. When the sender is gone it ends, and what is undecided is withdrawn.
#[derive(Debug, Clone, Copy)]
pub(super) enum PathCommand {
    /// The peer announced at that time that it is leaving.
    PeerLeaving(Timestamp),
    /// Send nothing more, and end when everything is decided.
    Stop,
}

/// TCP is asked how a connection fares this often at most. Chosen: scrapes are rarer.
const TCP_INFO_INTERVAL: Duration = Duration::from_secs(1);

/// Whoever wakes this much later than it wanted to has been stopped. Chosen: ten times what a busy host does to a thread.
const PAUSE_MIN: Duration = Duration::from_millis(500);

/// What is taken before anything is decided and other paths get their turn. Chosen: more than is under way on a healthy path.
const EVENTS_PER_TURN_MAX: usize = 256;

/// A connection on which so much came that answers nothing, and not one answer in between, is given up. Chosen: a server that
/// greets or pings now and then is borne, one that talks without end is not.
const MISMATCHES_MAX: u32 = 1_000;

/// One on which so much came in one go that answers nothing, pings and duplicates too, is given up as well. Chosen: more than
/// waits for us after the longest pause, from who is in his right mind.
const UNMATCHED_MAX: u32 = 10_000;

/// A path that is measured.
pub(super) struct StreamPath {
    id: PathId,
    prober: StreamProber,
    dial: Arc<Dial>,
    link: Option<Link>,
    attempt: Option<Attempt>,
    commands: UnboundedReceiver<PathCommand>,
    clock: Clock,
    /// Everything that had arrived by then was taken.
    drained: Timestamp,
    tcp_info_read_at: Timestamp,
    tcp: TcpInfo,
    /// Whether the last turn began because it was time for something.
    is_awake_by_timer: bool,
    /// What came on this connection since the last answer and was none.
    mismatches: u32,
    /// What came since everything was heard that had come, and answers nothing.
    unmatched: u32,
    series: Arc<EchoSeries>,
    stream: Arc<StreamSeries>,
    agent: Arc<LoopSeries>,
    reports: Option<mpsc::Sender<EchoReport>>,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
}

/// A connection that is being made.
type Attempt = Pin<Box<dyn Future<Output = Result<(Link, ConnectTimings), ConnectError>> + Send>>;

/// What a path can wake up for.
enum Wakeup {
    Command(Option<PathCommand>),
    Connected(Result<(Link, ConnectTimings), ConnectError>),
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
        new.stream.begin_again();
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
            is_awake_by_timer: false,
            mismatches: 0,
            unmatched: 0,
            series: new.series,
            stream: new.stream,
            agent,
            reports: new.reports,
            events,
        }
    }

    /// Measures until it is told to end, or has sent everything it should and decided that.
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
        self.close_link();
        self.stream.put_away();
    }

    /// After a pause of our own, what came meanwhile over a link that we time ourselves is withdrawn: how long it took cannot be
    /// told any more.
    fn on_wakeup(&mut self, until: Timestamp, is_by_timer: bool) {
        self.is_awake_by_timer = is_by_timer;
        let late = Clock::now().since(until);
        if is_by_timer {
            self.agent.lag.observe(late);
        }
        if late >= PAUSE_MIN && self.link.as_ref().is_some_and(|link| !link.has_kernel_timestamps()) {
            self.prober.withdraw();
        }
    }

    /// Decides everything, and sends nothing more: what is due at this moment would have no verdict.
    fn withdraw_all(&mut self) {
        self.prober.stop();
        self.prober.withdraw();
        self.drive();
    }

    /// Takes what is there without waiting; false when it is told to end.
    async fn handle_pending(&mut self) -> bool {
        let read_at = Clock::now();
        if self.is_awake_by_timer {
            // The runtime looks at the sockets once more: after a pause of ours its word on them is old.
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
                    if self.is_awake_by_timer {
                        self.drained = read_at;
                    }
                    return true;
                }
                None => break,
            }
        }
        // There may be more; the other paths come first.
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
            return Poll::Ready(Wakeup::Connected(outcome));
        }
        match &mut self.link {
            Some(link) => link.poll_event(context).map(Wakeup::Link),
            None => Poll::Pending,
        }
    }

    /// Takes note of what happened; false when it is told to end.
    fn handle(&mut self, wakeup: Wakeup) -> bool {
        match wakeup {
            Wakeup::Command(Some(PathCommand::PeerLeaving(at))) => self.prober.peer_leaving(at),
            Wakeup::Command(Some(PathCommand::Stop)) => self.prober.stop(),
            Wakeup::Command(None) => return false,
            Wakeup::Connected(Ok((link, timings))) => {
                self.stream.connected();
                if let Some(at) = timings.certificate_expiry {
                    self.stream.certificate_expires(at);
                }
                let sources = link.source().into_iter().collect();
                self.emit(LoopEvent::Started { id: self.id, sources });
                self.link = Some(link);
                self.prober.connected(Clock::now());
            }
            Wakeup::Connected(Err(error)) => self.disconnect(&error),
            Wakeup::Link(LinkEvent::Reply(answer)) => {
                if self.prober.answered(&answer) {
                    (self.mismatches, self.unmatched) = (0, 0);
                } else {
                    self.on_unmatched();
                }
            }
            Wakeup::Link(LinkEvent::Response(answer, unexpected)) => {
                let _ = self.prober.answered(&answer);
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
                self.close_link();
                self.prober.returned(message);
                self.prober.disconnected(Clock::now(), None);
                // Counted, and no news: nothing is lost by it.
                self.stream.disconnected(error.kind);
            }
        }
        true
    }

    /// Something came that answers nothing. Who never stops would keep us from ever having heard everything.
    fn on_unmatched(&mut self) {
        self.unmatched += 1;
        if self.mismatches >= MISMATCHES_MAX || self.unmatched >= UNMATCHED_MAX {
            let text = format!("{} talks without end and answers nothing", self.dial.to);
            self.disconnect(&ConnectError::new(ConnectErrorKind::Protocol, text));
        }
    }

    fn disconnect(&mut self, error: &ConnectError) {
        self.close_link();
        self.attempt = None;
        if self.prober.disconnected(Clock::now(), error.not_sent) {
            self.stream.disconnected(error.kind);
            self.emit(LoopEvent::Disconnected { id: self.id, reason: error.text.clone() });
        }
    }

    /// Drops the connection, with a last look at it.
    fn close_link(&mut self) {
        self.read_tcp_info();
        if let Some(mut link) = self.link.take() {
            link.close();
        }
        (self.mismatches, self.unmatched) = (0, 0);
        self.tcp = TcpInfo::default();
    }

    /// Does what the prober asks for; until when there is nothing more to do, or `None` at its end.
    fn drive(&mut self) -> Option<Timestamp> {
        let at = Clock::now();
        let now = Now { at, drained: self.drained, wall: self.clock.offset() };
        loop {
            match self.prober.step(now) {
                StreamStep::Connect => {
                    let dial = Arc::clone(&self.dial);
                    self.attempt = Some(Box::pin(async move {
                        let mut timings = ConnectTimings::default();
                        let link = dial.connect(&mut timings).await?;
                        Ok((link, timings))
                    }));
                    // It has not been polled yet: a look at once makes it begin.
                    return Some(at);
                }
                StreamStep::Disconnect => {
                    let what =
                        if self.link.is_some() { "nothing came back from" } else { "no connection to" };
                    let text = format!("{what} {} for too long", self.dial.to);
                    self.disconnect(&ConnectError::new(ConnectErrorKind::Timeout, text));
                }
                StreamStep::Send(message) => {
                    let link = self.link.as_mut().expect("the prober was told that it stands");
                    match link.send(message) {
                        Ok(outcome) => {
                            self.prober.handed(message, at, outcome.sent_at);
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
        if let Some(reports) = &self.reports {
            // Whoever watched may have gone.
            let _ = reports.send(*report);
        }
    }

    /// Asks TCP how the connection fares.
    fn read_tcp_info(&mut self) {
        let Some(info) = self.link.as_ref().and_then(Link::tcp_info) else { return };
        self.stream.tcp(&self.tcp, &info);
        self.tcp = info;
    }

    /// Whether what was counted agrees with what the prober still holds.
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
