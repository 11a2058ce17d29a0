//! The IP headers of trace probes as routers quote them in ICMP errors, for `trace.quoted_headers`.

mod reader;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pathmeter_proto::wire::quoted_header::{QuotedHeader, QuotedProtocol};

pub use reader::QuotationReader;

/// The latest quoted header of each flow from each router.
#[derive(Debug, Default)]
pub struct QuotedHeaders {
    known: Mutex<KnownHeaders>,
}

#[derive(Debug, Default)]
struct KnownHeaders {
    latest: BTreeMap<QuotationKey, QuotedHeader>,
    /// The keys in the order in which they were added.
    order: VecDeque<QuotationKey>,
}

/// What a header belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct QuotationKey {
    router: IpAddr,
    flow: QuotedFlow,
}

/// A flow as a quotation shows it. The source address is left out: the kernel chooses it for each packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct QuotedFlow {
    /// The protocol.
    pub protocol: QuotedProtocol,
    /// The destination; its port is 0 for ICMP.
    pub destination: (IpAddr, u16),
    /// The source port; for ICMP the identifier.
    pub source_port: u16,
}

/// Headers that are kept; at the limit the one whose router and flow were added first is dropped. Chosen:
/// 5,000 flows over thirteen routers, in about ten megabytes.
pub const HEADERS_MAX: usize = 65_536;

impl QuotedFlow {
    /// The flow from a source port, or identifier, to a destination.
    #[must_use]
    pub fn new(protocol: QuotedProtocol, source_port: u16, destination: SocketAddr) -> Self {
        let port = match protocol {
            QuotedProtocol::Udp | QuotedProtocol::Tcp => destination.port(),
            QuotedProtocol::Icmp => 0,
        };
        Self { protocol, destination: (destination.ip(), port), source_port }
    }
}

impl QuotedHeaders {
    /// Keeps a header that a router has quoted.
    pub fn add(&self, router: IpAddr, header: QuotedHeader) {
        let flow = QuotedFlow::new(header.protocol, header.source.port(), header.destination);
        let key = QuotationKey { router, flow };
        let mut known = self.lock();
        if known.latest.insert(key, header).is_some() {
            return;
        }
        known.order.push_back(key);
        if known.order.len() > HEADERS_MAX
            && let Some(first) = known.order.pop_front()
        {
            known.latest.remove(&first);
        }
    }

    /// The latest header of a flow that a router has quoted; `None` if none is known.
    #[must_use]
    pub fn find(&self, router: IpAddr, flow: QuotedFlow) -> Option<QuotedHeader> {
        self.lock().latest.get(&QuotationKey { router, flow }).copied()
    }

    /// Forgets all headers.
    pub fn clear(&self) {
        let forgotten = std::mem::take(&mut *self.lock());
        // Not while the loops wait.
        drop(forgotten);
    }

    fn lock(&self) -> MutexGuard<'_, KnownHeaders> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::dscp::Dscp;
    use pathmeter_proto::wire::quoted_header::QuotedChecksum;

    use super::*;

    fn header(source_port: u16, dscp: u8) -> QuotedHeader {
        QuotedHeader {
            protocol: QuotedProtocol::Udp,
            source: SocketAddr::new([192, 0, 2, 1].into(), source_port),
            destination: SocketAddr::new([198, 51, 100, 7].into(), 862),
            dscp: Dscp::new(dscp).unwrap(),
            ecn: 0,
            checksum: QuotedChecksum::Right,
        }
    }

    fn flow(source_port: u16) -> QuotedFlow {
        QuotedFlow::new(QuotedProtocol::Udp, source_port, "198.51.100.7:862".parse().unwrap())
    }

    #[test]
    fn latest_header_of_a_router_and_flow_is_found() {
        let headers = QuotedHeaders::default();
        let [first, second] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(IpAddr::from);
        headers.add(first, header(40_000, 0));
        headers.add(second, header(40_000, 46));
        headers.add(second, header(40_000, 8));
        headers.add(second, header(40_001, 10));
        let dscp = |router, port| headers.find(router, flow(port)).map(|found| found.dscp.value());
        let found = [dscp(first, 40_000), dscp(second, 40_000), dscp(second, 40_001), dscp(first, 40_001)];
        assert_eq!(found, [Some(0), Some(8), Some(10), None]);
        let tcp = QuotedFlow { protocol: QuotedProtocol::Tcp, ..flow(40_000) };
        assert_eq!(headers.find(first, tcp), None);
        headers.clear();
        assert_eq!(dscp(first, 40_000), None);
    }

    #[test]
    fn destination_port_of_icmp_is_not_compared() {
        let flow =
            |port| QuotedFlow::new(QuotedProtocol::Icmp, 7, SocketAddr::new([198, 51, 100, 7].into(), port));
        assert_eq!(flow(0), flow(9_862));
    }

    #[test]
    fn at_the_limit_the_header_that_was_added_first_is_dropped() {
        let headers = QuotedHeaders::default();
        let router = |number: usize| IpAddr::from(u32::try_from(number).unwrap().to_be_bytes());
        for number in 0..=HEADERS_MAX {
            headers.add(router(number), header(40_000, 0));
            headers.add(router(number), header(40_000, 8));
        }
        let is_known = |number| headers.find(router(number), flow(40_000)).is_some();
        assert_eq!([0, 1, HEADERS_MAX].map(is_known), [false, true, true]);
        assert_eq!(headers.lock().latest.len(), HEADERS_MAX);
    }
}
