//! Events of a traced flow besides those of its route.

use std::net::IpAddr;
use std::time::Duration;

use pathmeter_proto::trace::{
    CLAMPED_FOR, Direction, EchoSummary, ReachabilityChange, Trigger, TtlRewriting,
};
use serde::Serialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::json::{echoes_json, route_json};
use crate::event_log::{EventLog, EventType};
use crate::loops::PathEvent;
use crate::paths::PathKey;
use crate::trace_log::RejectionRecord;

/// The peer no longer answers the traces of a flow, or answers again.
#[derive(Debug)]
pub(super) struct ReachabilityChanged {
    pub(super) direction: Direction,
    pub(super) change: ReachabilityChange,
    /// The echoes of the flow in the last minutes before the peer was first missed.
    pub(super) before: EchoSummary,
    /// The echoes since then.
    pub(super) after: EchoSummary,
}

/// A device on the way of a flow rewrites TTLs.
#[derive(Debug)]
pub(super) struct TtlClamped {
    pub(super) direction: Direction,
    pub(super) flow: u8,
    pub(super) rewriting: TtlRewriting,
    pub(super) trigger: Trigger,
}

/// Connections of a path have stalled after probes that were sent on them.
#[derive(Debug)]
pub(super) struct TracedConnectionStalled;

#[derive(Serialize)]
struct TracedConnectionStalledFields<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
}

/// A flow whose peer has answered before does not reach it.
#[derive(Serialize)]
struct RouteUnreachable<'a>(ReachabilityFields<'a>);

/// A flow reaches its peer again.
#[derive(Serialize)]
struct RouteReachable<'a> {
    #[serde(flatten)]
    fields: ReachabilityFields<'a>,
    seconds: f64,
}

#[derive(Serialize)]
struct ReachabilityFields<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    direction: &'static str,
    flow: u8,
    trigger: &'static str,
    route: Option<Value>,
    last_hop: Option<Value>,
    rejected: Option<RejectionRecord>,
    before: Value,
    after: Value,
}

/// A device on the way of a flow rewrites TTLs.
#[derive(Serialize)]
struct RouteTtlClamped<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    direction: &'static str,
    flow: u8,
    trigger: &'static str,
    rewriting: &'static str,
    router: Option<IpAddr>,
}

impl EventType for RouteUnreachable<'_> {
    const NAME: &'static str = "route_unreachable";
}

impl EventType for RouteReachable<'_> {
    const NAME: &'static str = "route_reachable";
}

impl EventType for RouteTtlClamped<'_> {
    const NAME: &'static str = "route_ttl_clamped";
}

impl EventType for TracedConnectionStalledFields<'_> {
    const NAME: &'static str = "traced_connection_stalled";
}

impl PathEvent for TracedConnectionStalled {
    fn report(&self, path: &PathKey, log: &EventLog) {
        let PathKey { probe, peer, family } = path;
        let hours = CLAMPED_FOR.as_secs() / 3_600;
        warn!(%probe, %peer, family, hours, "two connections stalled after trace probes: tracing with SYN segments");
        log.add(&TracedConnectionStalledFields { probe, peer, family });
    }
}

impl PathEvent for ReachabilityChanged {
    fn report(&self, path: &PathKey, log: &EventLog) {
        let PathKey { probe, peer, family } = path;
        let ReachabilityChange { flow, route, last_hop, rejection, trigger, lasted, .. } = &self.change;
        let (flow, trigger, direction) = (*flow, trigger.as_str(), self.direction.as_str());
        let fields = ReachabilityFields {
            probe,
            peer,
            family,
            direction,
            flow,
            trigger,
            route: route.as_ref().map(route_json),
            last_hop: last_hop.map(|(ttl, router)| json!({"ttl": ttl, "router": router})),
            rejected: rejection.as_ref().map(RejectionRecord::from),
            before: echoes_json(&self.before),
            after: echoes_json(&self.after),
        };
        let rejected = rejection.map(|rejection| rejection.reason.as_str());
        match lasted.as_ref().map(Duration::as_secs_f64) {
            None => {
                warn!(%probe, %peer, family, direction, flow, trigger, ?last_hop, rejected, "route does not reach the peer");
                log.add(&RouteUnreachable(fields));
            }
            Some(seconds) => {
                info!(%probe, %peer, family, direction, flow, trigger, seconds, "route reaches the peer again");
                log.add(&RouteReachable { fields, seconds });
            }
        }
    }
}

impl PathEvent for TtlClamped {
    fn report(&self, path: &PathKey, log: &EventLog) {
        let PathKey { probe, peer, family } = path;
        let (flow, trigger, direction) = (self.flow, self.trigger.as_str(), self.direction.as_str());
        let (rewriting, router) = (self.rewriting.as_str(), self.rewriting.router());
        warn!(%probe, %peer, family, direction, flow, trigger, rewriting, ?router, "TTLs are rewritten on the route");
        log.add(&RouteTtlClamped { probe, peer, family, direction, flow, trigger, rewriting, router });
    }
}
