//! Events of traced paths.

use std::collections::BTreeSet;
use std::net::IpAddr;

use pathmeter_proto::trace::{Direction, EchoSummary, Route, RouteUpdate, Trigger};
use serde::Serialize;
use serde_json::Value;
use tracing::{info, warn};

use super::json::{echoes_json, route_json};
use crate::event_log::{EventLog, EventType};
use crate::loops::PathEvent;
use crate::paths::PathKey;

/// The route of a flow has changed, or is balanced.
#[derive(Debug)]
pub(super) struct RouteUpdated {
    pub(super) direction: Direction,
    pub(super) flow: u8,
    pub(super) update: RouteUpdate,
    pub(super) trigger: Trigger,
    /// The echoes of the flow in the last minutes before the change.
    pub(super) before: EchoSummary,
    /// The echoes since the change was first observed.
    pub(super) after: EchoSummary,
}

/// A flow loses much more than the other flows of its path.
#[derive(Debug)]
pub(super) struct LossyFlow {
    pub(super) flow: u8,
    pub(super) echoes: EchoSummary,
    pub(super) forward_hop: Option<u8>,
    pub(super) reverse_hop: Option<u8>,
}

/// A flow takes another route, which it has not taken before.
#[derive(Serialize)]
struct RouteChanged<'a>(RouteFields<'a>);

/// A flow takes a route again that it has taken before.
#[derive(Serialize)]
struct RouteRestored<'a>(RouteFields<'a>);

#[derive(Serialize)]
struct RouteFields<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    direction: &'static str,
    flow: u8,
    trigger: &'static str,
    from: Value,
    to: Value,
    before: Value,
    after: Value,
}

/// A flow loses much more than the other flows of its path.
#[derive(Serialize)]
struct FlowLossy<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    flow: u8,
    echoes: Value,
    forward_hop: Option<u8>,
    reverse_hop: Option<u8>,
}

/// Packets of a flow alternate between routers.
#[derive(Serialize)]
struct RouteLoadBalanced<'a> {
    probe: &'a str,
    peer: &'a str,
    family: &'static str,
    direction: &'static str,
    flow: u8,
    ttl: u8,
    routers: &'a BTreeSet<IpAddr>,
}

impl EventType for RouteChanged<'_> {
    const NAME: &'static str = "route_changed";
}

impl EventType for RouteRestored<'_> {
    const NAME: &'static str = "route_restored";
}

impl EventType for FlowLossy<'_> {
    const NAME: &'static str = "flow_lossy";
}

impl EventType for RouteLoadBalanced<'_> {
    const NAME: &'static str = "route_load_balanced";
}

impl PathEvent for RouteUpdated {
    fn report(&self, path: &PathKey, log: &EventLog) {
        let PathKey { probe, peer, family } = path;
        let (flow, trigger) = (self.flow, self.trigger.as_str());
        let direction = self.direction.as_str();
        let fields = |from: &Route, to: &Route| RouteFields {
            probe,
            peer,
            family,
            direction,
            flow,
            trigger,
            from: route_json(from),
            to: route_json(to),
            before: echoes_json(&self.before),
            after: echoes_json(&self.after),
        };
        match &self.update {
            RouteUpdate::Changed { from, to } => {
                warn!(%probe, %peer, family, direction, flow, trigger, from = %from.id, to = %to.id, "route changed");
                log.add(&RouteChanged(fields(from, to)));
            }
            RouteUpdate::Restored { from, to } => {
                info!(%probe, %peer, family, direction, flow, trigger, from = %from.id, to = %to.id, "route restored");
                log.add(&RouteRestored(fields(from, to)));
            }
            RouteUpdate::LoadBalanced { ttl, routers } => {
                info!(%probe, %peer, family, direction, flow, ttl, routers = routers.len(), "route is load-balanced");
                log.add(&RouteLoadBalanced { probe, peer, family, direction, flow, ttl: *ttl, routers });
            }
        }
    }
}

impl PathEvent for LossyFlow {
    fn report(&self, path: &PathKey, log: &EventLog) {
        let PathKey { probe, peer, family } = path;
        let Self { flow, echoes, forward_hop, reverse_hop } = *self;
        let EchoSummary { lost, decided, .. } = echoes;
        warn!(%probe, %peer, family, flow, lost, decided, ?forward_hop, ?reverse_hop, "flow is lossy");
        let echoes = echoes_json(&echoes);
        log.add(&FlowLossy { probe, peer, family, flow, echoes, forward_hop, reverse_hop });
    }
}
