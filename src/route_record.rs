//! The routes of flows between two agents. Both show the same records: the agent that measures a flow, and
//! the peer, which requests them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pathmeter_proto::schedule::mix;
use pathmeter_proto::trace::{HopRouter, Route};
use serde::{Deserialize, Serialize};

/// Maximum flows between two agents whose routes are reported to the peer; further ones are left out. Chosen:
/// two probes of sixteen flows over both address families.
pub const ROUTES_MAX: usize = 64;

/// Maximum bytes of the records that are reported to a peer, as JSON; further ones are left out. Chosen: 4
/// KiB for each record, four times what two routes of thirty hops take.
pub const ROUTES_BYTES_MAX: usize = 256 * 1024;

/// Maximum hops of a route, and routers of a hop, from a peer. Records with more are left out. As many as a
/// trace has at most.
const HOPS_MAX: usize = 64;

/// Maximum bytes of the name of a probe in a record from a peer. Records with longer ones are left out. As
/// long as a name may be.
const TEXT_MAX: usize = 64;

/// Maximum flows of a path.
const FLOWS_MAX: u8 = 16;

/// Hexadecimal digits of the id of a route.
const ID_DIGITS: usize = 12;

/// The routes of one flow in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteRecord {
    /// Identifies the flow: 12 hexadecimal digits, the same at both agents as long as the flow has the same
    /// ports.
    pub id: String,
    /// The agent that measures the flow.
    pub from: String,
    /// The peer or target.
    pub to: String,
    /// The name of the probe.
    pub probe: String,
    /// The address family, `ipv4` or `ipv6`.
    pub family: String,
    /// The protocol of the probes, [`ProbeProtocol::as_str`](pathmeter_proto::trace::ProbeProtocol::as_str).
    pub protocol: String,
    /// The index of the flow within its path.
    pub flow: u8,
    /// The source port; `None` if it is not known, and for ICMP.
    pub source_port: Option<u16>,
    /// The destination address and port. The port has no meaning for ICMP.
    pub destination: SocketAddr,
    /// The route to the peer; `None` if it is not known.
    pub forward: Option<RecordedRoute>,
    /// The route back; `None` if it is not known.
    pub reverse: Option<RecordedRoute>,
    /// [`asymmetric_hops`] of the two routes.
    pub asymmetric_hops: Option<u8>,
}

/// A route, as the API and events show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedRoute {
    /// [`RouteId`](pathmeter_proto::trace::RouteId), as 12 hexadecimal digits.
    pub id: String,
    /// Number of routers; `None` if the destination does not answer.
    pub routers: Option<u8>,
    /// The hop with TTL `n` is at index `n − 1`.
    pub hops: Vec<RecordedHop>,
}

/// The router at a hop: an address, a list of addresses between which packets alternate, or null.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RecordedHop {
    /// No router has answered.
    Unknown,
    /// One router.
    Single(IpAddr),
    /// Several routers.
    Balanced(BTreeSet<IpAddr>),
}

/// How many more routers one direction of a flow has than the other, from the numbers of routers; `None` if
/// one is not known. Routes of equal length may also differ: a router answers from another address in each
/// direction, so addresses do not show whether both pass the same routers.
#[must_use]
pub fn asymmetric_hops(forward: Option<u8>, reverse: Option<u8>) -> Option<u8> {
    Some(forward?.abs_diff(reverse?))
}

impl From<&Route> for RecordedRoute {
    fn from(route: &Route) -> Self {
        let hops = route.hops.iter().map(|hop| match hop {
            HopRouter::Unknown => RecordedHop::Unknown,
            HopRouter::Single(router) => RecordedHop::Single(*router),
            HopRouter::Balanced(routers) => RecordedHop::Balanced(routers.clone()),
        });
        Self { id: route.id.to_string(), routers: route.routers, hops: hops.collect() }
    }
}

impl RecordedRoute {
    /// Whether a route from a peer is within limits.
    fn is_valid(&self) -> bool {
        let routers = |hop: &RecordedHop| match hop {
            RecordedHop::Unknown => 0,
            RecordedHop::Single(_) => 1,
            RecordedHop::Balanced(routers) => routers.len(),
        };
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        self.id.len() == ID_DIGITS
            && self.id.bytes().all(is_digit)
            && self.hops.len() <= HOPS_MAX
            && self.hops.iter().all(|hop| routers(hop) <= HOPS_MAX)
    }
}

impl RouteRecord {
    /// The record with the [`id`](Self::id) that results from its other fields.
    #[must_use]
    pub fn with_id(self) -> Self {
        let Self { from, to, probe, family, flow, source_port, destination, .. } = &self;
        let text = format!("{from}\0{to}\0{probe}\0{family}\0{flow}\0{source_port:?}\0{destination}");
        let hash = text.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
        Self { id: format!("{:012x}", hash & ((1 << 48) - 1)), ..self }
    }

    /// Whether a record that the peer `from` reports to the agent `to` may be shown: it is about a flow
    /// between these two, within limits, and as this program would have made it.
    #[must_use]
    pub fn is_valid_report(&self, from: &str, to: &str) -> bool {
        let Self { probe, family, protocol, flow, forward, reverse, asymmetric_hops, .. } = self;
        let routes = || [forward, reverse].into_iter().flatten();
        let [to_peer, back] = [forward, reverse].map(|route| route.as_ref()?.routers);
        self.from == from
            && self.to == to
            && probe.len() <= TEXT_MAX
            && !probe.contains(char::is_control)
            && ["ipv4", "ipv6"].contains(&&**family)
            && ["udp", "icmp", "tcp"].contains(&&**protocol)
            && *flow < FLOWS_MAX
            && self.source_port != Some(0)
            && routes().all(RecordedRoute::is_valid)
            && *asymmetric_hops == self::asymmetric_hops(to_peer, back)
            && self.id == self.clone().with_id().id
    }

    /// The ids of both routes.
    fn route_ids(&self) -> [Option<&str>; 2] {
        [&self.forward, &self.reverse].map(|route| route.as_ref().map(|route| &*route.id))
    }
}

/// What a peer reports about the routes of its flows to this agent.
#[derive(Debug, Default)]
pub struct PeerRoutes {
    /// The latest report; empty after a failed request.
    latest: Arc<[RouteRecord]>,
    /// The last known routes of each flow, by [`RouteRecord::id`]. They outlast failed requests, and times at
    /// which a route is not known.
    known: BTreeMap<String, [Option<String>; 2]>,
}

/// What a report changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportChange {
    /// Nothing.
    None,
    /// The records, but no flow has taken another route. A route that becomes known is not another one.
    Records,
    /// A flow takes another route.
    Route,
}

impl PeerRoutes {
    /// The latest report.
    #[must_use]
    pub fn latest(&self) -> Arc<[RouteRecord]> {
        Arc::clone(&self.latest)
    }

    /// The request for a report failed.
    pub fn failed(&mut self) -> ReportChange {
        self.set_latest(Vec::new())
    }

    /// Replaces the report.
    pub fn reported(&mut self, records: Vec<RouteRecord>) -> ReportChange {
        let mut known = BTreeMap::new();
        let mut has_other_route = false;
        for record in &records {
            let earlier = self.known.remove(&record.id).unwrap_or_default();
            let current = record.route_ids();
            let routes = [0, 1].map(|direction| match (current[direction], &earlier[direction]) {
                (Some(current), earlier) => {
                    has_other_route |= earlier.as_ref().is_some_and(|earlier| earlier != current);
                    Some(current.to_owned())
                }
                (None, earlier) => earlier.clone(),
            });
            known.insert(record.id.clone(), routes);
        }
        self.known = known;
        let change = self.set_latest(records);
        if has_other_route { ReportChange::Route } else { change }
    }

    fn set_latest(&mut self, records: Vec<RouteRecord>) -> ReportChange {
        if *self.latest == *records {
            return ReportChange::None;
        }
        self.latest = records.into();
        ReportChange::Records
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record() -> RouteRecord {
        let hops = vec![
            RecordedHop::Single([192, 0, 2, 1].into()),
            RecordedHop::Unknown,
            RecordedHop::Balanced([[192, 0, 2, 3].into(), [192, 0, 2, 4].into()].into()),
        ];
        RouteRecord {
            id: String::new(),
            from: "fra-1".into(),
            to: "ams-1".into(),
            probe: "routes".into(),
            family: "ipv4".into(),
            protocol: "udp".into(),
            flow: 1,
            source_port: Some(40_000),
            destination: "192.0.2.9:9862".parse().unwrap(),
            forward: Some(RecordedRoute { id: "0000000000a1".into(), routers: Some(3), hops }),
            reverse: None,
            asymmetric_hops: None,
        }
        .with_id()
    }

    #[test]
    fn record_is_the_same_after_it_was_sent() {
        let sent = serde_json::to_value(record()).unwrap();
        assert_eq!(sent["forward"]["hops"], json!(["192.0.2.1", null, ["192.0.2.3", "192.0.2.4"]]));
        assert_eq!(serde_json::from_value::<RouteRecord>(sent).unwrap(), record());
    }

    #[test]
    fn id_depends_on_the_flow_and_not_on_its_routes() {
        let other_routes = RouteRecord { forward: None, ..record() }.with_id();
        assert_eq!(other_routes.id, record().id);
        let other_flow = RouteRecord { flow: 2, ..record() }.with_id();
        let other_port = RouteRecord { source_port: None, ..record() }.with_id();
        assert!(![other_flow.id, other_port.id].contains(&record().id));
    }

    #[test]
    fn reports_about_others_or_beyond_limits_are_invalid() {
        assert!(record().is_valid_report("fra-1", "ams-1"));
        assert!(!record().is_valid_report("lon-1", "ams-1"), "another agent reports it");
        assert!(!record().is_valid_report("fra-1", "lon-1"), "about another peer");
        let long = "x".repeat(TEXT_MAX + 1);
        let route = |id: &str, hops| Some(RecordedRoute { id: id.into(), routers: None, hops });
        let too_many = vec![RecordedHop::Unknown; HOPS_MAX + 1];
        let invalid = [
            RouteRecord { probe: "a\u{1b}[2J".into(), ..record() },
            RouteRecord { probe: long.clone(), ..record() },
            RouteRecord { family: "ipv5".into(), ..record() },
            RouteRecord { protocol: "sctp".into(), ..record() },
            RouteRecord { flow: FLOWS_MAX, ..record() },
            RouteRecord { source_port: Some(0), ..record() },
            RouteRecord { reverse: route(&long, vec![]), ..record() },
            RouteRecord { reverse: route("00000000000A", vec![]), ..record() },
            RouteRecord { reverse: route("00000000000a", too_many), ..record() },
            RouteRecord { asymmetric_hops: Some(1), ..record() },
        ]
        .map(RouteRecord::with_id);
        let wrong_id = RouteRecord { id: "000000000000".into(), ..record() };
        for record in invalid.into_iter().chain([wrong_id]) {
            assert!(!record.is_valid_report("fra-1", "ams-1"), "{record:?}");
        }
    }

    #[test]
    fn only_another_route_of_the_same_flow_is_another_route() {
        let with = |forward: Option<&str>, reverse: Option<&str>| {
            let route = |id: Option<&str>| {
                id.map(|id| RecordedRoute { id: id.into(), routers: None, hops: Vec::new() })
            };
            vec![RouteRecord { forward: route(forward), reverse: route(reverse), ..record() }]
        };
        let mut routes = PeerRoutes::default();
        assert_eq!(routes.reported(with(Some("a"), None)), ReportChange::Records, "a flow began");
        assert_eq!(routes.reported(with(Some("a"), Some("b"))), ReportChange::Records, "it became known");
        assert_eq!(routes.reported(with(Some("a"), Some("b"))), ReportChange::None);
        assert_eq!(routes.reported(with(Some("c"), Some("b"))), ReportChange::Route);
        assert_eq!(routes.reported(with(None, Some("b"))), ReportChange::Records, "it is not known");
        assert_eq!(
            routes.reported(with(Some("c"), Some("b"))),
            ReportChange::Records,
            "it is the same again"
        );
        assert_eq!(routes.failed(), ReportChange::Records);
        assert!(routes.latest().is_empty());
        assert_eq!(
            routes.reported(with(Some("c"), Some("d"))),
            ReportChange::Route,
            "after a failed request"
        );
        assert_eq!(routes.reported(Vec::new()), ReportChange::Records, "the flow has ended");
        assert_eq!(routes.reported(with(Some("e"), Some("f"))), ReportChange::Records);
    }

    #[test]
    fn asymmetry_needs_both_numbers_of_routers() {
        assert_eq!(asymmetric_hops(Some(3), Some(5)), Some(2));
        assert_eq!(asymmetric_hops(Some(5), Some(3)), Some(2));
        assert_eq!([asymmetric_hops(None, Some(3)), asymmetric_hops(Some(3), None)], [None, None]);
    }
}
