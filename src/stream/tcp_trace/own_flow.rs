//! The probes of a trace on the connection of the echoes that it follows.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use pathmeter_proto::machine::{Arrival, IcmpError, IcmpKind, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{ConnectionProbes, Delivered, FlowChange, ProbeAnswer, ProbeStep};

use super::super::kernel::Delivery;
use super::super::own_flow::{Received, TraceSockets};
use super::super::shared_connection::{ConnectionEnds, SharedConnection};
use crate::clock::Clock;

/// That a trace over TCP sends its probes on the connection of the echoes.
pub struct OwnFlow {
    /// The connection of the echo path.
    pub connection: Arc<SharedConnection>,
    /// Called when the ports of the probes change, or the connection does not bear them.
    pub changed: Box<dyn Fn(FlowChange) + Send>,
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
    to: SocketAddr,
    probes: ConnectionProbes,
    /// The connection for which the sockets were opened.
    ends: Option<ConnectionEnds>,
    /// `None` if there is no connection, or the kernel has refused them.
    sockets: Option<TraceSockets>,
    /// The connection whose local address was told.
    announced: Option<ConnectionEnds>,
}

impl OwnFlowProbes {
    pub(super) fn new(own: OwnFlow, to: SocketAddr, now: Timestamp) -> Self {
        own.connection.watch();
        Self { own, to, probes: ConnectionProbes::new(now), ends: None, sockets: None, announced: None }
    }

    /// Looks at the connection. Returns whether probes have other ports from now on.
    pub(super) fn refresh(&mut self, now: Timestamp) -> bool {
        let ends = self.own.connection.ends();
        if ends != self.ends {
            self.ends = ends;
            self.sockets = None;
            self.probes.closed(now);
            if let Some(ConnectionEnds { local, peer, .. }) = ends
                && let Ok(sockets) = TraceSockets::open(local, peer)
            {
                self.sockets = Some(sockets);
                self.probes.opened(local, peer, now);
            }
        }
        if let Some(delivery) = self.own.connection.delivery() {
            let Delivery { sent, acknowledged, is_recovering, rtt_min, .. } = delivery;
            self.probes.delivered(Delivered { sent, acknowledged, is_recovering, rtt_min }, now);
        }
        let mut is_replaced = false;
        while let Some(change) = self.probes.change(now) {
            is_replaced |= change == FlowChange::Replaced;
            (self.own.changed)(change);
        }
        self.own.connection.set_probed(self.probes.is_on_connection());
        is_replaced
    }

    /// The local address of the probes, if it is that of a connection and was not told yet.
    pub(super) fn take_source(&mut self) -> Option<SocketAddr> {
        let used = self.ends.filter(|_| self.probes.is_on_connection());
        if used == self.announced {
            return None;
        }
        self.announced = used;
        used.map(|ends| ends.local)
    }

    /// Whether the connection must be looked at soon.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.probes.is_in_doubt()
    }

    /// How a probe is sent.
    pub(super) fn step(&self, ttl: u8, now: Timestamp) -> ProbeStep {
        self.probes.step(ttl, now)
    }

    /// Sends the segment before the first probe. The answer of a router to it is not of use.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub(super) fn test(&mut self, ttl: u8, segment: &[u8]) -> io::Result<()> {
        let sockets = self.sockets.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        sockets.send(ttl, segment).map_err(io::Error::from)?;
        self.probes.tested(ttl);
        Ok(())
    }

    /// Sends the segment of a probe. Returns when.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub(super) fn send(&mut self, ttl: u8, segment: &[u8], identifier: Vec<u8>) -> io::Result<Timestamp> {
        let sockets = self.sockets.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let at = sockets.send(ttl, segment).map_err(io::Error::from)?;
        self.probes.sent(ttl, identifier, at);
        Ok(at)
    }

    /// Waits for the next answer to a segment, with what the task takes for it; `None`: something else has
    /// happened.
    pub(super) async fn next(&mut self) -> Option<(Vec<u8>, Arrival)> {
        let Some(sockets) = &mut self.sockets else {
            self.own.connection.changed().await;
            return None;
        };
        let received = tokio::select! {
            biased;
            () = self.own.connection.changed() => return None,
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
            Err(_) => {
                // Without sockets there are no answers, until the next connection.
                self.sockets = None;
                self.probes.closed(Clock::now());
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
        let by = TimestampSource::Kernel;
        (identifier, Arrival { at, by, from: self.to, to: None, flow: 0, ttl: None, tos: None, icmp })
    }
}

impl Drop for OwnFlowProbes {
    fn drop(&mut self) {
        self.own.connection.unwatch();
    }
}
