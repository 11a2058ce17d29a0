//! What routers have quoted of the probes of a traced path.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use pathmeter_proto::trace::ProbeProtocol;
use pathmeter_proto::wire::quoted_header::QuotedProtocol;

use crate::quoted_headers::{QuotedFlow, QuotedHeaders};
use crate::trace_log::QuotedRecord;

/// The flows of a path to its destination, and the headers that routers have quoted of them.
#[derive(Debug)]
pub(super) struct QuotedFlows {
    protocol: QuotedProtocol,
    to: SocketAddr,
    /// The source ports, or identifiers, of the flows; empty until the path has started.
    source_ports: ArcSwap<Vec<u16>>,
    headers: Arc<QuotedHeaders>,
}

impl QuotedFlows {
    pub(super) fn new(protocol: ProbeProtocol, to: SocketAddr, headers: Arc<QuotedHeaders>) -> Self {
        let protocol = match protocol {
            ProbeProtocol::Udp | ProbeProtocol::ClosedPort => QuotedProtocol::Udp,
            ProbeProtocol::Icmp => QuotedProtocol::Icmp,
            ProbeProtocol::Tcp => QuotedProtocol::Tcp,
        };
        Self { protocol, to, source_ports: ArcSwap::default(), headers }
    }

    /// Sets the local addresses, one per flow.
    pub(super) fn set_sources(&self, sources: &[SocketAddr]) {
        self.source_ports.store(Arc::new(sources.iter().map(SocketAddr::port).collect()));
    }

    /// What a router has last quoted of a flow.
    pub(super) fn find(&self, flow: u8, router: IpAddr) -> Option<QuotedRecord> {
        let source_port = *self.source_ports.load().get(usize::from(flow))?;
        let header = self.headers.find(router, QuotedFlow::new(self.protocol, source_port, self.to))?;
        Some(QuotedRecord::from(&header))
    }
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::dscp::Dscp;
    use pathmeter_proto::wire::quoted_header::{QuotedChecksum, QuotedHeader};

    use super::*;

    #[test]
    fn each_flow_has_the_headers_of_its_source_port() {
        let headers = Arc::<QuotedHeaders>::default();
        let to: SocketAddr = "[2001:db8:1::7]:862".parse().unwrap();
        let [local, router] = ["2001:db8::1", "2001:db8::2"].map(|text| text.parse::<IpAddr>().unwrap());
        let add = |source_port, dscp, checksum| {
            let (source, dscp) = (SocketAddr::new(local, source_port), Dscp::new(dscp).unwrap());
            let protocol = QuotedProtocol::Udp;
            headers.add(router, QuotedHeader { protocol, source, destination: to, dscp, ecn: 1, checksum });
        };
        add(40_000, 46, QuotedChecksum::Wrong);
        add(40_001, 8, QuotedChecksum::Right);
        let flows = QuotedFlows::new(ProbeProtocol::Udp, to, Arc::clone(&headers));
        assert_eq!(flows.find(0, router), None, "before the start");
        flows.set_sources(&[40_000, 40_001].map(|port| SocketAddr::new(local, port)));
        let record = |dscp, is_translated| Some(QuotedRecord { dscp, ecn: 1, is_translated });
        // Many devices that translate restore the checksum: a right one proves nothing.
        assert_eq!([0, 1].map(|flow| flows.find(flow, router)), [record(46, Some(true)), record(8, None)]);
        assert_eq!([flows.find(2, router), flows.find(0, local)], [None, None]);
    }
}
