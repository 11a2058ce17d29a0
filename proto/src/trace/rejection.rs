//! Probes that a router, or the destination's host, rejected instead of forwarding or answering them.

use std::net::IpAddr;
use std::time::Duration;

use super::DESTINATION;
use super::burst::BurstProbe;
use crate::machine::{IcmpError, IcmpKind};
use crate::time::Timestamp;

/// An ICMP error that says that a probe was rejected. The packets of the flow get no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// TTL of the hop at which the rejecting host is; `None` if it is not known: only probes were rejected
    /// whose TTL is not limited and the host has answered at no hop, or TTLs are rewritten.
    pub ttl: Option<u8>,
    /// Address of the router or host that sent the error.
    pub address: IpAddr,
    /// Why.
    pub reason: RejectionReason,
    /// Time from the probe to the error.
    pub rtt: Duration,
}

/// Why a probe was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RejectionReason {
    /// There is no route to the network.
    NetworkUnreachable,
    /// There is no route to the host, or it does not answer on its link.
    HostUnreachable,
    /// The host does not support the protocol.
    ProtocolUnreachable,
    /// Nothing listens on the port.
    PortUnreachable,
    /// A firewall rejects packets to the network.
    NetworkProhibited,
    /// A firewall rejects packets to the host.
    HostProhibited,
    /// A firewall, or a rule of a router, rejects the packet.
    Prohibited,
    /// The source address is not valid there, or out of scope.
    SourceRejected,
    /// The packet is larger than the next link allows.
    TooBig,
    /// Unreachable for another reason.
    Unreachable,
}

impl RejectionReason {
    /// All reasons.
    pub const ALL: [Self; 10] = [
        Self::NetworkUnreachable,
        Self::HostUnreachable,
        Self::ProtocolUnreachable,
        Self::PortUnreachable,
        Self::NetworkProhibited,
        Self::HostProhibited,
        Self::Prohibited,
        Self::SourceRejected,
        Self::TooBig,
        Self::Unreachable,
    ];

    /// The reason as JSON shows it; with spaces, as text shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NetworkUnreachable => "network_unreachable",
            Self::HostUnreachable => "host_unreachable",
            Self::ProtocolUnreachable => "protocol_unreachable",
            Self::PortUnreachable => "port_unreachable",
            Self::NetworkProhibited => "network_prohibited",
            Self::HostProhibited => "host_prohibited",
            Self::Prohibited => "prohibited",
            Self::SourceRejected => "source_rejected",
            Self::TooBig => "too_big",
            Self::Unreachable => "unreachable",
        }
    }

    /// The reason that an ICMP error gives; `None` if it does not say that a packet was rejected.
    #[must_use]
    pub const fn of(error: &IcmpError) -> Option<Self> {
        Some(match (error.kind, error.router.is_ipv4(), error.code) {
            (IcmpKind::TtlExceeded | IcmpKind::Other, ..) => return None,
            (IcmpKind::PortUnreachable, ..) => Self::PortUnreachable,
            (IcmpKind::TooBig, ..) => Self::TooBig,
            // RFC 792 and RFC 1812 section 5.2.7.1.
            (IcmpKind::Unreachable, true, 0 | 6 | 11) => Self::NetworkUnreachable,
            (IcmpKind::Unreachable, true, 1 | 7 | 8 | 12) => Self::HostUnreachable,
            (IcmpKind::Unreachable, true, 2) => Self::ProtocolUnreachable,
            (IcmpKind::Prohibited, true, 9) => Self::NetworkProhibited,
            (IcmpKind::Prohibited, true, 10) => Self::HostProhibited,
            // RFC 4443 section 3.1.
            (IcmpKind::Unreachable, false, 0) => Self::NetworkUnreachable,
            (IcmpKind::Unreachable, false, 3) => Self::HostUnreachable,
            (IcmpKind::Unreachable, false, 2) | (IcmpKind::Prohibited, false, 5) => Self::SourceRejected,
            (IcmpKind::Prohibited, ..) => Self::Prohibited,
            (IcmpKind::Unreachable, ..) => Self::Unreachable,
        })
    }
}

/// The latest rejection of a flow since the destination has last answered.
///
/// A trace that does not reach the destination shows it, too: routers give few reasons, which mostly go to
/// the more frequent echoes, and those that look for the next host in vain give them after the trace.
#[derive(Debug, Default)]
pub(super) struct LatestRejection {
    /// The rejection, and when it arrived.
    latest: Option<(Rejection, Timestamp)>,
    /// When the latest probe was sent that the destination has answered; `None` if it has answered none.
    /// Rejections of earlier probes, which may come seconds later, say nothing about the time since.
    answered: Option<Timestamp>,
}

/// How long a rejection is shown if no other follows. Chosen: 5 min, in which a router that gives one reason
/// per second, and is asked by ten echoes per second, gives one to one of 60 trace probes almost certainly.
const SHOWN_FOR: Duration = Duration::from_secs(300);

impl LatestRejection {
    /// A probe was rejected; the error arrived at `at`.
    pub(super) fn add(&mut self, rejection: Rejection, at: Timestamp) {
        if self.answered.is_some_and(|answered| at - rejection.rtt <= answered) {
            return;
        }
        let nearest = self.nearest_of(rejection);
        self.latest = Some((nearest, at));
    }

    /// The destination has answered a probe that was sent at `sent`.
    pub(super) fn answered(&mut self, sent: Timestamp) {
        self.answered = self.answered.max(Some(sent));
        self.latest = None;
    }

    /// The rejection that a trace shows which did not reach the destination, and of which `found` is the
    /// nearest one.
    pub(super) fn of_trace(&self, found: Option<Rejection>, now: Timestamp) -> Option<Rejection> {
        let latest = self.latest.filter(|(_, at)| now.since(*at) < SHOWN_FOR).map(|(latest, _)| latest);
        found.map(|found| self.nearest_of(found)).or(latest)
    }

    /// The same rejection, with the smallest TTL of those by this router.
    fn nearest_of(&self, rejection: Rejection) -> Rejection {
        let known = self.latest.filter(|(known, _)| known.address == rejection.address);
        let known = known.and_then(|(known, _)| known.ttl);
        let ttl = known.into_iter().chain(rejection.ttl).min();
        Rejection { ttl, ..rejection }
    }
}

/// The nearest rejection of these probes.
pub(super) fn nearest(probes: &[BurstProbe]) -> Option<Rejection> {
    let rejections = probes.iter().filter_map(|probe| probe.rejection);
    rejections.min_by_key(|rejection| rejection.ttl.unwrap_or(DESTINATION))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn reason_is_that_of_the_icmp_code() {
        use RejectionReason as Reason;
        let [v4, v6]: [IpAddr; 2] = ["192.0.2.1", "2001:db8::1"].map(|text| text.parse().unwrap());
        let reason = |router, kind, code| {
            RejectionReason::of(&IcmpError { router, kind, code, mtu: None, extensions_at: None })
        };
        for (router, kind, code, expected) in [
            (v4, IcmpKind::Unreachable, 0, Reason::NetworkUnreachable),
            (v4, IcmpKind::Unreachable, 1, Reason::HostUnreachable),
            (v4, IcmpKind::Unreachable, 2, Reason::ProtocolUnreachable),
            (v4, IcmpKind::PortUnreachable, 3, Reason::PortUnreachable),
            (v4, IcmpKind::TooBig, 4, Reason::TooBig),
            (v4, IcmpKind::Unreachable, 5, Reason::Unreachable),
            (v4, IcmpKind::Prohibited, 9, Reason::NetworkProhibited),
            (v4, IcmpKind::Prohibited, 10, Reason::HostProhibited),
            (v4, IcmpKind::Prohibited, 13, Reason::Prohibited),
            (v6, IcmpKind::Unreachable, 0, Reason::NetworkUnreachable),
            (v6, IcmpKind::Prohibited, 1, Reason::Prohibited),
            (v6, IcmpKind::Unreachable, 2, Reason::SourceRejected),
            (v6, IcmpKind::Unreachable, 3, Reason::HostUnreachable),
            (v6, IcmpKind::PortUnreachable, 4, Reason::PortUnreachable),
            (v6, IcmpKind::Prohibited, 5, Reason::SourceRejected),
            (v6, IcmpKind::Prohibited, 6, Reason::Prohibited),
        ] {
            assert_eq!(reason(router, kind, code), Some(expected), "{router} {kind:?} {code}");
        }
        for kind in [IcmpKind::TtlExceeded, IcmpKind::Other] {
            assert_eq!(reason(v4, kind, 0), None);
        }
    }

    #[test]
    fn each_reason_has_a_name_of_its_own_which_is_words_of_letters() {
        let names: BTreeSet<&str> = RejectionReason::ALL.into_iter().map(RejectionReason::as_str).collect();
        assert_eq!(names.len(), RejectionReason::ALL.len());
        let is_word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase());
        assert!(names.iter().all(|name| name.split('_').all(is_word)), "{names:?}");
    }

    #[test]
    fn nearest_rejection_is_the_one_with_the_smallest_ttl() {
        let rejected = |ttl: Option<u8>| {
            let probe = BurstProbe::new(1, ttl.unwrap_or(DESTINATION), Timestamp::from_nanos(0));
            BurstProbe { rejection: Some(rejection(3, ttl)), ..probe }
        };
        let passed = BurstProbe::new(2, 1, Timestamp::from_nanos(0));
        assert_eq!(nearest(&[]), None);
        assert_eq!(nearest(std::slice::from_ref(&passed)), None);
        let probes = [rejected(None), passed, rejected(Some(7)), rejected(Some(5)), rejected(Some(6))];
        assert_eq!(nearest(&probes), Some(rejection(3, Some(5))));
        assert_eq!(nearest(&probes[..2]), Some(rejection(3, None)));
    }

    fn rejection(last: u8, ttl: Option<u8>) -> Rejection {
        let (address, reason) = ([10, 0, 0, last].into(), RejectionReason::HostUnreachable);
        Rejection { ttl, address, reason, rtt: Duration::from_millis(1) }
    }

    #[test]
    fn latest_rejection_is_shown_for_five_minutes_unless_the_destination_answers() {
        let at = |seconds: u64| Timestamp::from_nanos((1_000 + seconds) * 1_000_000_000);
        let mut latest = LatestRejection::default();
        assert_eq!(latest.of_trace(None, at(0)), None);
        latest.add(rejection(3, Some(5)), at(0));
        assert_eq!(latest.of_trace(None, at(299)), Some(rejection(3, Some(5))));
        assert_eq!(latest.of_trace(None, at(300)), None);
        latest.answered(at(10));
        assert_eq!(latest.of_trace(None, at(11)), None);
        latest.add(Rejection { rtt: Duration::from_secs(3), ..rejection(3, Some(5)) }, at(13));
        assert_eq!(latest.of_trace(None, at(13)), None, "of a probe that was sent before");
        latest.add(rejection(3, Some(5)), at(13));
        assert_eq!(latest.of_trace(None, at(13)), Some(rejection(3, Some(5))));
    }

    #[test]
    fn rejections_by_one_router_have_the_smallest_ttl_and_those_by_another_one_their_own() {
        let at = Timestamp::from_nanos(1_000_000_000);
        let mut latest = LatestRejection::default();
        for (ttl, expected) in [(None, None), (Some(5), Some(5)), (None, Some(5)), (Some(3), Some(3))] {
            latest.add(rejection(3, ttl), at);
            assert_eq!(latest.of_trace(None, at), Some(rejection(3, expected)));
        }
        assert_eq!(latest.of_trace(Some(rejection(3, Some(9))), at), Some(rejection(3, Some(3))));
        assert_eq!(latest.of_trace(Some(rejection(4, Some(9))), at), Some(rejection(4, Some(9))));
        latest.add(rejection(4, None), at);
        assert_eq!(latest.of_trace(None, at), Some(rejection(4, None)));
    }
}
