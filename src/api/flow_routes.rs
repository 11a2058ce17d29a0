//! `/api/v1/routes`: the routes of flows between agents, in both directions.

use serde::Serialize;

use super::status::Status;
use crate::fleet::PathStatus;
use crate::probe::FlowRoutes;
use crate::route_record::{ROUTES_BYTES_MAX, ROUTES_MAX, RecordedRoute, RouteRecord, asymmetric_hops};

/// The response of `/api/v1/routes`.
#[derive(Debug, Serialize)]
pub(super) struct Routes {
    /// Of the flows that this agent measures.
    own: Vec<RouteRecord>,
    /// Of the flows that peers measure to this agent, as they reported them last.
    reported: Vec<RouteRecord>,
}

impl Routes {
    /// The routes of all flows.
    pub(super) fn of(status: &Status) -> Self {
        let reported = status.reported_routes.iter().flat_map(|routes| routes.iter().cloned());
        Self { own: own(status, &|_| true).collect(), reported: reported.collect() }
    }
}

/// The routes of this agent's flows to a peer, which the peer requests; within the limits of a report.
pub(super) fn to_peer(status: &Status, peer: &str) -> Vec<RouteRecord> {
    let mut bytes = 0;
    let mut fits = |record: &RouteRecord| {
        bytes += serde_json::to_vec(record).map_or(ROUTES_BYTES_MAX, |json| json.len());
        bytes <= ROUTES_BYTES_MAX
    };
    let selected = |path: &PathStatus| *path.key.peer == *peer;
    own(status, &selected).take(ROUTES_MAX).take_while(|record| fits(record)).collect()
}

/// The routes of this agent's flows on the paths that are `selected`.
fn own<'a>(
    status: &'a Status,
    selected: &'a dyn Fn(&PathStatus) -> bool,
) -> impl Iterator<Item = RouteRecord> + 'a {
    status.paths.iter().filter(|path| selected(path)).flat_map(|path| records(&status.name, path))
}

fn records(own_name: &str, path: &PathStatus) -> Vec<RouteRecord> {
    let (Some(measured), Some(destination)) = (&path.measured, path.to) else { return Vec::new() };
    let record = |(flow, routes): (u8, FlowRoutes)| {
        let routers = [&routes.forward, &routes.reverse].map(|route| route.as_ref()?.routers);
        let source = path.sources.get(usize::from(flow));
        RouteRecord {
            id: String::new(),
            from: own_name.to_owned(),
            to: path.key.peer.to_string(),
            probe: path.key.probe.to_string(),
            family: path.key.family.to_owned(),
            protocol: routes.protocol.as_str().to_owned(),
            flow,
            source_port: source.map(|source| source.port()).filter(|port| *port != 0),
            destination,
            forward: routes.forward.as_ref().map(RecordedRoute::from),
            reverse: routes.reverse.as_ref().map(RecordedRoute::from),
            asymmetric_hops: asymmetric_hops(routers[0], routers[1]),
        }
        .with_id()
    };
    (0..).zip(measured.routes()).map(record).collect()
}
