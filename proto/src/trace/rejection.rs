//! Probes that a router, or the destination's host, rejected instead of forwarding or answering them.

use std::net::IpAddr;
use std::time::Duration;

use super::DESTINATION;
use super::burst::BurstProbe;
use crate::machine::{IcmpError, IcmpKind};

/// An ICMP error that says that a probe was rejected. The packets of the flow get no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// TTL of the hop at which the rejecting host is; `None` if only probes were rejected whose TTL is not
    /// limited.
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

/// The nearest rejection of a trace with these probes, or else a late one of a trace before. `hop_of` is the
/// hop, up to a TTL, at which a router has answered before: a router that checks its rules only after the TTL
/// rejects probes of the next hop.
pub(super) fn nearest(
    probes: &[BurstProbe],
    late: Option<Rejection>,
    hop_of: impl FnOnce(IpAddr, u8) -> Option<u8>,
) -> Option<Rejection> {
    let rejections = probes.iter().filter_map(|probe| probe.rejection);
    let nearest = rejections.min_by_key(|rejection| rejection.ttl.unwrap_or(DESTINATION)).or(late)?;
    let ttl = hop_of(nearest.address, nearest.ttl.unwrap_or(DESTINATION)).or(nearest.ttl);
    Some(Rejection { ttl, ..nearest })
}

#[cfg(test)]
mod tests {
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
}
