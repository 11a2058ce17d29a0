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
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Whoever wakes this much later than it wanted to has been stopped. Chosen: ten times what a busy host does to a thread.
const OWN_PAUSE: Duration = Duration::from_millis(500);

/// What is taken before anything is decided and other paths get their turn. Chosen: more than is under way on a healthy path.
const TURN: usize = 256;

/// A connection on which so much came that answers nothing, and not one answer in between, is given up. Chosen: a server that
/// greets or pings now and then is borne, one that talks without end is not.
const MISMATCHES_MAX: u32 = 1_000;

/// One on which so much came in one go that answers nothing, pings and duplicates too, is given up as well. Chosen: more than
/// waits for us after the longest pause, from who is in his right mind.
const CHATTER_MAX: u32 = 10_000;

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
    looked: Timestamp,
    tcp: TcpInfo,
    /// Whether the last turn began because it was time for something.
    is_awake_by_timer: bool,
    /// What came on this connection since the last answer and was none.
    mismatches: u32,
    /// What came since everything was heard that had come, and answers nothing.
    chatter: u32,
    series: Arc<EchoSeries>,
    stream: Arc<StreamSeries>,
    agent: Arc<LoopSeries>,
    tap: Option<mpsc::Sender<EchoReport>>,
    events: tokio::sync::mpsc::Sender<LoopEvent>,
}

/// A connection that is being made.
type Attempt = Pin<Box<dyn Future<Output = Result<(Link, ConnectTimings), ConnectError>> + Send>>;

/// What a path can wake up for.
enum Wakeup {
    Ordered(Option<PathCommand>),
    Attempted(Result<(Link, ConnectTimings), ConnectError>),
    Heard(LinkEvent),
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
            looked: now,
            tcp: TcpInfo::default(),
            is_awake_by_timer: false,
            mismatches: 0,
            chatter: 0,
            series: new.series,
            stream: new.stream,
            agent,
            tap: new.tap,
            events,
        }
    }

    /// Measures until it is told to end, or has sent everything it should and decided that.
    pub(super) async fn run(mut self) {
        loop {
            if !self.take_what_is_there().await {
                self.end();
                break;
            }
            let Some(until) = self.act() else {
                self.tell(LoopEvent::Finished(self.id));
                break;
            };
            let span = until.since(Clock::now());
            let happened = tokio::select! {
                biased;
                happened = poll_fn(|context| self.poll(context)) => Some(happened),
                () = sleep(span) => None,
            };
            self.woke(until, happened.is_none());
            if let Some(happened) = happened
                && !self.take(happened)
            {
                self.end();
                break;
            }
            self.agent.wakeups.inc();
        }
        self.put_down();
        self.stream.put_away();
    }

    /// After a pause of our own, what came meanwhile over a link that we time ourselves is withdrawn: how long it took cannot be
    /// told any more.
    fn woke(&mut self, until: Timestamp, is_by_timer: bool) {
        self.is_awake_by_timer = is_by_timer;
        let late = Clock::now().since(until);
        if is_by_timer {
            self.agent.lag.observe(late);
        }
        if late >= OWN_PAUSE && self.link.as_ref().is_some_and(|link| !link.has_kernel_timestamps()) {
            self.prober.withdraw();
        }
    }

    /// Decides everything, and sends nothing more: what is due at this moment would have no verdict.
    fn end(&mut self) {
        self.prober.stop();
        self.prober.withdraw();
        self.act();
    }

    /// Takes what is there without waiting; false when it is told to end.
    async fn take_what_is_there(&mut self) -> bool {
        let before = Clock::now();
        if self.is_awake_by_timer {
            // The runtime looks at the sockets once more: after a pause of ours its word on them is old.
            yield_now().await;
        }
        let (_, upset) = self.clock.look();
        if let Some(ClockEvent::Suspend(_)) = upset {
            self.prober.withdraw();
        }
        for _ in 0..TURN {
            let happened = poll_fn(|context| match self.poll(context) {
                Poll::Ready(happened) => Poll::Ready(Some(happened)),
                Poll::Pending => Poll::Ready(None),
            });
            match happened.await {
                Some(happened) => {
                    if !self.take(happened) {
                        return false;
                    }
                }
                None if has_budget_remaining() => {
                    self.chatter = 0;
                    if self.is_awake_by_timer {
                        self.drained = before;
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
        if let Poll::Ready(order) = self.commands.poll_recv(context) {
            return Poll::Ready(Wakeup::Ordered(order));
        }
        if let Some(attempt) = &mut self.attempt
            && let Poll::Ready(outcome) = attempt.as_mut().poll(context)
        {
            self.attempt = None;
            return Poll::Ready(Wakeup::Attempted(outcome));
        }
        match &mut self.link {
            Some(link) => link.poll_hear(context).map(Wakeup::Heard),
            None => Poll::Pending,
        }
    }

    /// Takes note of what happened; false when it is told to end.
    fn take(&mut self, happened: Wakeup) -> bool {
        match happened {
            Wakeup::Ordered(Some(PathCommand::PeerLeaving(at))) => self.prober.peer_leaving(at),
            Wakeup::Ordered(Some(PathCommand::Stop)) => self.prober.stop(),
            Wakeup::Ordered(None) => return false,
            Wakeup::Attempted(Ok((link, took))) => {
                self.stream.connected();
                if let Some(at) = took.certificate_expiry {
                    self.stream.certificate_expires(at);
                }
                let sources = link.source().into_iter().collect();
                self.tell(LoopEvent::Started { id: self.id, sources });
                self.link = Some(link);
                self.prober.connected(Clock::now());
            }
            Wakeup::Attempted(Err(trouble)) => self.broken(&trouble),
            Wakeup::Heard(LinkEvent::Reply(answer)) => {
                if self.prober.received(&answer) {
                    (self.mismatches, self.chatter) = (0, 0);
                } else {
                    self.chatters();
                }
            }
            Wakeup::Heard(LinkEvent::Page(answer, unexpected)) => {
                let _ = self.prober.received(&answer);
                if let Some(unexpected) = unexpected {
                    self.stream.unexpected(unexpected);
                }
            }
            Wakeup::Heard(LinkEvent::Mismatch(mismatch)) => {
                self.prober.mismatched(mismatch);
                self.mismatches += 1;
                self.chatters();
            }
            Wakeup::Heard(LinkEvent::Room) => self.prober.writable(),
            Wakeup::Heard(LinkEvent::Nothing) => self.chatters(),
            Wakeup::Heard(LinkEvent::End(trouble)) => self.broken(&trouble),
            Wakeup::Heard(LinkEvent::Stale(message, trouble)) => {
                self.put_down();
                self.prober.undelivered(message);
                self.prober.disconnected(Clock::now(), None);
                // Counted, and no news: nothing is lost by it.
                self.stream.disconnected(trouble.why);
            }
        }
        true
    }

    /// Something came that answers nothing. Who never stops would keep us from ever having heard everything.
    fn chatters(&mut self) {
        self.chatter += 1;
        if self.mismatches >= MISMATCHES_MAX || self.chatter >= CHATTER_MAX {
            let text = format!("{} talks without end and answers nothing", self.dial.to);
            self.broken(&ConnectError::new(ConnectErrorKind::Protocol, text));
        }
    }

    fn broken(&mut self, trouble: &ConnectError) {
        self.put_down();
        self.attempt = None;
        if self.prober.disconnected(Clock::now(), trouble.ours) {
            self.stream.disconnected(trouble.why);
            self.tell(LoopEvent::Disconnected { id: self.id, reason: trouble.text.clone() });
        }
    }

    /// Drops the connection, with a last look at it.
    fn put_down(&mut self) {
        self.look();
        if let Some(mut link) = self.link.take() {
            link.close();
        }
        (self.mismatches, self.chatter) = (0, 0);
        self.tcp = TcpInfo::default();
    }

    /// Does what the prober asks for; until when there is nothing more to do, or `None` at its end.
    fn act(&mut self) -> Option<Timestamp> {
        let at = Clock::now();
        let now = Now { at, drained: self.drained, wall: self.clock.offset() };
        loop {
            match self.prober.step(now) {
                StreamStep::Connect => {
                    let dial = Arc::clone(&self.dial);
                    self.attempt = Some(Box::pin(async move {
                        let mut took = ConnectTimings::default();
                        let link = dial.connect(&mut took).await?;
                        Ok((link, took))
                    }));
                    // It has not been polled yet: a look at once makes it begin.
                    return Some(at);
                }
                StreamStep::Disconnect => {
                    let what =
                        if self.link.is_some() { "nothing came back from" } else { "no connection to" };
                    let text = format!("{what} {} for too long", self.dial.to);
                    self.broken(&ConnectError::new(ConnectErrorKind::Timeout, text));
                }
                StreamStep::Send(message) => {
                    let link = self.link.as_mut().expect("the prober was told that it stands");
                    match link.send(message) {
                        Ok(handed) => {
                            self.prober.sent(message, at, handed.left);
                            if !handed.has_room {
                                self.prober.blocked();
                            }
                        }
                        Err(trouble) => self.broken(&trouble),
                    }
                }
                StreamStep::Report(report) => self.record(&report),
                StreamStep::Wait(until) => {
                    self.series.set_draining(self.prober.is_draining(at));
                    if at.since(self.looked) >= LOOK_EVERY {
                        self.looked = at;
                        self.look();
                        self.check();
                    }
                    return Some(until);
                }
                StreamStep::Finished => return None,
            }
        }
    }

    fn record(&self, report: &EchoReport) {
        self.series.record(report);
        if let Some(tap) = &self.tap {
            // Whoever watched may have gone.
            let _ = tap.send(*report);
        }
    }

    /// Asks TCP how the connection fares.
    fn look(&mut self) {
        let Some(info) = self.link.as_ref().and_then(Link::tcp_info) else { return };
        self.stream.tcp(&self.tcp, &info);
        self.tcp = info;
    }

    /// Whether what was counted agrees with what the prober still holds.
    fn check(&self) {
        let in_flight = u64::try_from(self.prober.in_flight()).unwrap_or(u64::MAX);
        if self.series.sent.get().checked_sub(self.series.decided()) != Some(in_flight) {
            self.agent.accounting_errors.inc();
        }
    }

    fn tell(&self, event: LoopEvent) {
        if self.events.try_send(event).is_err() {
            self.agent.events_dropped.inc();
        }
    }
}
