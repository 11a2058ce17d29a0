//! The probes of a trace on the connection of the echoes that it follows.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::machine::{Arrival, IcmpError, IcmpKind, Send, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{
    ConnectionEnd, ConnectionProbes, Delivered, FlowChange, ProbeAnswer, ProbeStep,
};
use tokio::sync::watch;

use super::super::kernel::Delivery;
use super::super::own_flow::{RawSocketError, Received, TraceSockets};
use super::super::shared_connection::{Connections, NumberedAddresses, Refusal, SharedConnection};
use crate::clock::Clock;
use crate::loops::PathEvent;

/// The connection on which a trace over TCP sends its probes.
pub struct OwnFlow {
    /// The connection of the echo path.
    pub connection: Arc<SharedConnection>,
    /// Largest TTL of limited segments.
    pub hops_max: u8,
    /// Called with each change. Returns an event about it, if there is one.
    pub changed: Box<dyn Fn(FlowChange) -> Option<Box<dyn PathEvent>> + std::marker::Send>,
}

impl fmt::Debug for OwnFlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnFlow").field("connection", &self.connection).finish_non_exhaustive()
    }
}

/// The probes of one path, and the sockets of the current connection.
#[derive(Debug)]
pub(super) struct OwnFlowProbes {
    own: OwnFlow,
    watcher: watch::Receiver<Connections>,
    to: SocketAddr,
    /// The DSCP of the segments, and the ECN field.
    tos: u8,
    probes: ConnectionProbes,
    /// The connection to which the probes and the sockets belong; `None`: there is none.
    addresses: Option<NumberedAddresses>,
    sockets: Result<TraceSockets, SocketsClosed>,
    /// The connection whose local address was reported as the source of probes.
    reported: Option<NumberedAddresses>,
}

/// Why there are no sockets.
#[derive(Debug)]
enum SocketsClosed {
    /// They are not needed.
    Unused,
    /// The kernel has refused one, or an operation. They are opened again at this time.
    Failed { error: String, retry_at: Timestamp },
}

/// What a look at the connection has shown.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Whether the source port of the probes has changed.
    pub(super) is_replaced: bool,
    /// The new source of the probes, if it is that of a connection.
    pub(super) source: Option<SocketAddr>,
    pub(super) events: Vec<Box<dyn PathEvent>>,
}

/// Time until sockets are opened again after an error.
const RETRY_AFTER: Duration = Duration::from_secs(10);

impl OwnFlowProbes {
    pub(super) fn new(own: OwnFlow, to: SocketAddr, now: Timestamp) -> Self {
        Self {
            watcher: own.connection.watch(),
            to,
            tos: 0,
            probes: ConnectionProbes::new(own.hops_max, now),
            addresses: None,
            sockets: Err(SocketsClosed::Unused),
            reported: None,
            own,
        }
    }

    /// Follows the connection.
    pub(super) fn look(&mut self, now: Timestamp) -> Look {
        self.follow(now);
        if let Some(delivery) = self.own.connection.delivery() {
            self.probes.delivered(delivered(delivery), now);
        }
        if let Some((ttl, segment)) = self.probes.test(now)
            && let Some(at) = self.send_segment(ttl, &segment)
        {
            self.probes.tested(ttl, at);
        }
        let mut look = Look::default();
        while let Some(change) = self.probes.change(now) {
            look.is_replaced |= change == FlowChange::Replaced;
            look.events.extend((self.own.changed)(change));
        }
        let used = self.addresses.filter(|_| self.probes.is_on_connection());
        if used != self.reported {
            self.reported = used;
            look.source = used.map(|addresses| addresses.local);
        }
        self.own.connection.set_status(self.probes.is_on_connection(), self.refusal(now));
        look
    }

    fn follow(&mut self, now: Timestamp) {
        let addresses = self.own.connection.addresses();
        if addresses != self.addresses {
            if let Some(NumberedAddresses { number, .. }) = self.addresses.take() {
                let ended = self.own.connection.ended(number);
                if let Some(delivery) = ended.and_then(|ended| ended.delivery) {
                    self.probes.delivered(delivered(delivery), now);
                }
                self.probes.ended(ended.map_or(ConnectionEnd::Closed, |ended| ended.end), now);
            }
            self.sockets = Err(SocketsClosed::Unused);
        }
        let Some(NumberedAddresses { number, local, peer }) = addresses else { return };
        let is_due = match &self.sockets {
            Ok(_) => false,
            Err(SocketsClosed::Unused) => true,
            Err(SocketsClosed::Failed { retry_at, .. }) => *retry_at <= now,
        };
        if is_due {
            match TraceSockets::open(local, peer) {
                Ok(sockets) => {
                    (self.sockets, self.addresses) = (Ok(sockets), addresses);
                    self.probes.opened(number, local, peer, now);
                }
                Err(error) => self.failed(&error, now),
            }
        }
    }

    /// The sockets cannot be used, so neither can the connection.
    fn failed(&mut self, error: &RawSocketError, now: Timestamp) {
        self.probes.ended(ConnectionEnd::Closed, now);
        self.addresses = None;
        self.sockets = Err(SocketsClosed::Failed { error: error.to_string(), retry_at: now + RETRY_AFTER });
    }

    fn refusal(&self, now: Timestamp) -> Option<Refusal> {
        match &self.sockets {
            Err(SocketsClosed::Failed { error, .. }) => Some(Refusal::RawSocket(error.clone())),
            Ok(_) | Err(SocketsClosed::Unused) => self.probes.refusal(now).map(Refusal::Connection),
        }
    }

    /// Whether the connection must be looked at soon.
    pub(super) fn has_unverified_segments(&self) -> bool {
        self.probes.has_unverified_segments()
    }

    /// How a probe is sent.
    pub(super) fn step(&mut self, send: &Send, now: Timestamp) -> ProbeStep {
        self.tos = send.tos;
        self.probes.step(send.ttl, now)
    }

    /// Sends the segment of a probe. Returns when; `None` if the kernel refuses it.
    pub(super) fn send(&mut self, ttl: u8, segment: &[u8], identifier: Vec<u8>) -> Option<Timestamp> {
        let at = self.send_segment(ttl, segment)?;
        self.probes.sent(ttl, identifier, at);
        Some(at)
    }

    fn send_segment(&mut self, ttl: u8, segment: &[u8]) -> Option<Timestamp> {
        match self.sockets.as_mut().ok()?.send((ttl, self.tos), segment) {
            Ok(at) => Some(at),
            Err(error) => {
                self.failed(&error, Clock::now());
                None
            }
        }
    }

    /// Waits for the next answer to a segment, with what the task takes for it; `None`: something else has
    /// happened.
    pub(super) async fn next(&mut self) -> Option<(Vec<u8>, Arrival)> {
        let Ok(sockets) = &mut self.sockets else {
            // The sender is part of `self`.
            let _ = self.watcher.changed().await;
            return None;
        };
        let received = tokio::select! {
            biased;
            _ = self.watcher.changed() => return None,
            received = sockets.next() => received,
        };
        match received {
            Ok(Received::Segment { segment, arrived_ttl, at }) => {
                let answer = self.probes.received(segment, arrived_ttl, at)?;
                Some(self.answer(answer, at))
            }
            Ok(Received::Message(message)) => {
                let answer = self.probes.message_received(&message.bytes, message.from)?;
                Some(self.answer(answer, message.at))
            }
            Err(error) => {
                self.failed(&error, Clock::now());
                None
            }
        }
    }

    fn answer(&self, answer: ProbeAnswer, at: Timestamp) -> (Vec<u8>, Arrival) {
        let ProbeAnswer { mut identifier, router, extensions } = answer;
        let extensions_at = u16::try_from(identifier.len()).ok().filter(|_| !extensions.is_empty());
        identifier.extend(extensions);
        let kind = IcmpKind::TtlExceeded;
        let icmp = router.map(|router| IcmpError { router, kind, code: 0, mtu: None, extensions_at });
        // As far as the kernel provides timestamps.
        let by = TimestampSource::Kernel;
        (identifier, Arrival { at, by, from: self.to, to: None, flow: 0, ttl: None, tos: None, icmp })
    }
}

impl Drop for OwnFlowProbes {
    fn drop(&mut self) {
        self.own.connection.set_status(false, None);
    }
}

fn delivered(delivery: Delivery) -> Delivered {
    let Delivery { sent, acknowledged, is_recovering, .. } = delivery;
    Delivered { sent, acknowledged, is_recovering }
}
