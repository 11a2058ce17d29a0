//! Receives the goodbye messages of peers that are about to stop.

use crate::key::Keys;
use crate::machine::{Arrival, HostDrops, Machine, NotSent, Now, SendId, Step, TimestampSource};
use crate::time::Timestamp;
use crate::wire::Goodbye;

/// Receives and authenticates goodbye messages. It sends nothing.
#[derive(Debug, Default)]
pub struct GoodbyeListener {
    keys: Option<Keys>,
    report: Option<GoodbyeReport>,
    is_stopping: bool,
}

/// What a listener reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GoodbyeReport {
    /// A peer is about to stop. The same goodbye may be reported several times because senders repeat it.
    Received(Goodbye),
    /// A datagram that is not an authentic goodbye.
    Rejected,
}

impl GoodbyeListener {
    /// A listener that accepts senders with one of these mesh keys; `None`: it accepts no sender.
    #[must_use]
    pub fn new(mesh: Option<&Keys>) -> Self {
        let mut listener = Self::default();
        listener.set_keys(mesh);
        listener
    }

    /// Replaces the mesh keys.
    pub fn set_keys(&mut self, mesh: Option<&Keys>) {
        self.keys = mesh.map(|keys| keys.derive(Goodbye::PURPOSE));
    }
}

impl Machine for GoodbyeListener {
    type Report = GoodbyeReport;

    fn received(&mut self, datagram: &[u8], _: &Arrival) {
        let goodbye = self.keys.as_ref().and_then(|keys| Goodbye::decode(datagram, keys).ok());
        self.report = Some(goodbye.map_or(GoodbyeReport::Rejected, GoodbyeReport::Received));
    }

    fn sent(&mut self, _: SendId, _: Timestamp, _: TimestampSource) {}

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn step(&mut self, _: Now, _: &mut HostDrops, _: &mut Vec<u8>) -> Step<GoodbyeReport> {
        match (self.report.take(), self.is_stopping) {
            (Some(report), _) => Step::Report(report),
            (None, true) => Step::Finished,
            (None, false) => Step::Wait(Timestamp::NEVER),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::{WallOffset, WallTime};

    #[test]
    fn only_goodbyes_signed_with_a_mesh_key_are_accepted() {
        let mesh = Keys::parse("0123456789abcdef").unwrap();
        let goodbye = Goodbye { name: "ams-1".into(), boot_id: 7, at: WallTime::from_nanos(9) };
        let datagram = goodbye.encode(&mesh.derive(Goodbye::PURPOSE));
        let at = Timestamp::from_nanos(1);
        let arrival = Arrival {
            at,
            by: TimestampSource::User,
            from: "192.0.2.1:9863".parse().unwrap(),
            to: None,
            flow: 0,
            ttl: None,
            tos: None,
            icmp: None,
        };
        let mut listener = GoodbyeListener::new(None);
        let report = |listener: &mut GoodbyeListener, datagram: &[u8]| {
            listener.received(datagram, &arrival);
            let now = Now { at, drained: at, wall: WallOffset::between(at, WallTime::from_nanos(1)) };
            listener.step(now, &mut HostDrops::default(), &mut Vec::new())
        };
        assert_eq!(report(&mut listener, &datagram), Step::Report(GoodbyeReport::Rejected));
        listener.set_keys(Some(&mesh));
        assert_eq!(report(&mut listener, &datagram[1..]), Step::Report(GoodbyeReport::Rejected));
        assert_eq!(report(&mut listener, &datagram), Step::Report(GoodbyeReport::Received(goodbye)));
    }
}
