//! The machines of a loop, each with where it counts.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use pathmeter_proto::echo::{Prober, Report, Responder, ResponderReport};
use pathmeter_proto::key::Keys;
use pathmeter_proto::machine::{Arrival, HostDrops, Machine, NotSent, Now, Send, SendId, StampedBy, Step};
use pathmeter_proto::mtu::{self, Search};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::Goodbye;

use super::PathId;
use crate::metrics::agent::ResponderSeries;
use crate::metrics::echo::EchoSeries;
use crate::metrics::path_mtu::PathMtuSeries;

/// A machine and where it counts. All are boxed: a loop with 10,000 paths holds as many of these.
#[derive(Debug)]
pub(super) enum Actor {
    /// Measures a path.
    Echo(Box<Echo>),
    /// Looks for a path's MTU.
    PathMtu(Box<PathMtu>),
    /// Answers.
    Responder(Box<Answerer>),
    /// Hears goodbyes.
    Listener(Box<Listener>),
}

/// What an actor asks of the loop; its reports have been counted.
pub(super) enum Asked {
    Send(Send),
    Wait(Timestamp),
    Finished,
    Heard(Goodbye),
    /// To tell that a path's MTU is another one.
    Tell {
        id: PathId,
        from: Option<u16>,
        to: u16,
    },
}

#[derive(Debug)]
pub(super) struct Echo {
    pub(super) id: PathId,
    pub(super) prober: Prober,
    pub(super) series: Arc<EchoSeries>,
    pub(super) tap: Option<mpsc::Sender<Report>>,
    /// Since when this machine counts here. Another one may have counted before, on another thread.
    pub(super) since: Timestamp,
}

#[derive(Debug)]
pub(super) struct PathMtu {
    pub(super) id: PathId,
    pub(super) search: Search,
    pub(super) series: Arc<PathMtuSeries>,
}

#[derive(Debug)]
pub(super) struct Answerer {
    pub(super) responder: Responder,
    pub(super) series: Arc<ResponderSeries>,
}

#[derive(Debug)]
pub(super) struct Listener {
    pub(super) keys: Option<Keys>,
    pub(super) heard: Option<Goodbye>,
    pub(super) series: Arc<ResponderSeries>,
}

/// What the loop keeps count of across its actors.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    /// Datagrams that left and have no verdict.
    pub(super) outstanding: u64,
    /// Datagrams that left, ever.
    pub(super) sent: u64,
}

impl Actor {
    pub(super) fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        match self {
            Self::Echo(echo) => echo.prober.received(datagram, arrival),
            Self::PathMtu(mtu) => mtu.search.received(datagram, arrival),
            Self::Responder(answerer) => {
                answerer.series.requests.inc();
                answerer.responder.received(datagram, arrival);
            }
            Self::Listener(listener) => listener.received(datagram),
        }
    }

    pub(super) fn leaving(&mut self, id: SendId, datagram: &mut [u8], now: Now) {
        match self {
            Self::Responder(answerer) => answerer.responder.leaving(id, datagram, now),
            Self::Echo(_) | Self::PathMtu(_) | Self::Listener(_) => {}
        }
    }

    pub(super) fn sent(&mut self, id: SendId, at: Timestamp, by: StampedBy) {
        match self {
            Self::Echo(echo) => echo.prober.sent(id, at, by),
            Self::PathMtu(mtu) => mtu.search.sent(id, at, by),
            Self::Responder(answerer) => answerer.responder.sent(id, at, by),
            Self::Listener(_) => {}
        }
    }

    pub(super) fn not_sent(&mut self, id: SendId, why: NotSent) {
        match self {
            Self::Echo(echo) => echo.prober.not_sent(id, why),
            Self::PathMtu(mtu) => mtu.search.not_sent(id, why),
            Self::Responder(answerer) => {
                answerer.series.reply_errors.inc();
                answerer.responder.not_sent(id, why);
            }
            Self::Listener(_) => {}
        }
    }

    /// Steps until something other than a report comes out.
    pub(super) fn step(
        &mut self,
        now: Now,
        drops: &mut HostDrops,
        arena: &mut Vec<u8>,
        traffic: &mut Traffic,
    ) -> Asked {
        match self {
            Self::Echo(echo) => loop {
                match echo.prober.step(now, drops, arena) {
                    Step::Send(send) => return Asked::Send(send),
                    Step::Report(report) => echo.record(&report, traffic),
                    Step::Wait(until) => {
                        echo.series.set_draining(echo.prober.is_draining(now.at));
                        return Asked::Wait(until);
                    }
                    Step::Finished => return Asked::Finished,
                }
            },
            Self::PathMtu(mtu) => loop {
                match mtu.search.step(now, drops, arena) {
                    Step::Send(send) => return Asked::Send(send),
                    Step::Report(report) => {
                        mtu.series.record(&report);
                        if let mtu::Report::Changed { from, to } = report {
                            return Asked::Tell { id: mtu.id, from, to };
                        }
                    }
                    Step::Wait(until) => return Asked::Wait(until),
                    Step::Finished => return Asked::Finished,
                }
            },
            Self::Responder(answerer) => loop {
                match answerer.responder.step(now, drops, arena) {
                    Step::Send(send) => return Asked::Send(send),
                    Step::Report(report) => answerer.record(report),
                    Step::Wait(until) => return Asked::Wait(until),
                    Step::Finished => return Asked::Finished,
                }
            },
            Self::Listener(listener) => match listener.heard.take() {
                Some(goodbye) => Asked::Heard(goodbye),
                None => Asked::Wait(Timestamp::NEVER),
            },
        }
    }
}

impl Echo {
    fn record(&self, report: &Report, traffic: &mut Traffic) {
        match report {
            Report::Sent { .. } => {
                traffic.outstanding += 1;
                traffic.sent += 1;
            }
            Report::Decided { .. } => traffic.outstanding = traffic.outstanding.saturating_sub(1),
            Report::Unsent(_)
            | Report::SendError(_)
            | Report::Ipdv(_)
            | Report::Duplicate
            | Report::Reordered
            | Report::VeryLate
            | Report::Mismatched(_)
            | Report::BurstBegan
            | Report::BurstEnded(_)
            | Report::TransmitLag(_)
            | Report::TurnaroundInvalid
            | Report::Icmp(_)
            | Report::LossyFlows(_) => {}
        }
        self.series.record(report);
        if let Some(tap) = &self.tap {
            // Whoever watched may have gone.
            let _ = tap.send(*report);
        }
    }

    /// Whether what was counted agrees with what the machine still holds.
    pub(super) fn is_conserved(&self, now: Timestamp) -> bool {
        if now.since(self.since) < SETTLES {
            return true;
        }
        let in_flight = u64::try_from(self.prober.in_flight()).unwrap_or(u64::MAX);
        self.series.sent.get().checked_sub(self.series.decided()) == Some(in_flight)
    }
}

/// The machine that counted before has ended by then.
const SETTLES: Duration = Duration::from_secs(1);

impl Answerer {
    fn record(&self, report: ResponderReport) {
        match report {
            ResponderReport::Answered => self.series.replies.inc(),
            ResponderReport::Refused(refusal) => self.series.refused(refusal),
            ResponderReport::Sources(count) => {
                self.series.peers_seen.set(u64::try_from(count).unwrap_or(u64::MAX));
            }
        }
    }
}

impl Listener {
    fn received(&mut self, datagram: &[u8]) {
        let heard = self.keys.as_ref().map(|keys| Goodbye::decode(datagram, keys));
        match heard {
            Some(Ok(goodbye)) => self.heard = Some(goodbye),
            Some(Err(_)) | None => self.series.unheard.inc(),
        }
    }
}
