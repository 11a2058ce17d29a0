//! The routes of all flows, as far as they are known.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::anyhow;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use pathmeter_proto::machine::NotSent;
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::trace::{
    Answer, DESTINATION, DirectedReport, Direction, Rejection, RejectionReason, Trace, TraceReport,
};

use super::TraceArguments;
use crate::clock::Clock;

/// The first trace of each flow in each direction.
pub(in crate::cli) struct Routes<'a> {
    pub(super) arguments: &'a TraceArguments,
    /// The port is 0 over ICMP.
    pub(super) to: SocketAddr,
    flows: BTreeMap<DirectedFlow, FlowRoute>,
    has_sent: bool,
    /// Probes that this host could not send.
    pub(super) not_sent: BTreeMap<NotSent, u64>,
}

/// A flow in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::cli) struct DirectedFlow {
    pub(super) direction: Direction,
    /// From 0.
    pub(super) number: u8,
}

impl DirectedFlow {
    /// The first flow of a direction.
    pub(in crate::cli) const fn first(direction: Direction) -> Self {
        Self { direction, number: 0 }
    }
}

/// What is known about the route of a flow in one direction.
#[derive(Debug, Default)]
pub(super) struct FlowRoute {
    /// The first answer of each hop, until the trace is complete.
    pub(super) answers: BTreeMap<u8, Answer>,
    pub(super) trace: Option<Trace>,
    /// When it was reported.
    pub(super) traced_at: Option<Timestamp>,
    /// The nearest rejection since the trace is complete.
    late_rejection: Option<Rejection>,
}

impl<'a> Routes<'a> {
    pub(super) fn new(arguments: &'a TraceArguments, to: SocketAddr) -> Self {
        Self { arguments, to, flows: BTreeMap::new(), has_sent: false, not_sent: BTreeMap::new() }
    }

    /// Returns an error if this host itself has rejected the probes, because it does not find the next one.
    pub(super) fn fail_if_rejected_here(&self, flow: DirectedFlow) -> anyhow::Result<()> {
        match self.rejection(flow) {
            Some(Rejection { address, reason: RejectionReason::HostUnreachable, .. })
                if address != self.to.ip() && is_own(address) =>
            {
                let to = self.to.ip();
                Err(anyhow!("sending to {to}: host unreachable: the next host does not answer on its link"))
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn route(&self, flow: DirectedFlow) -> Option<&FlowRoute> {
        self.flows.get(&flow)
    }

    /// The trace of a flow, if it is complete.
    pub(super) fn trace(&self, flow: DirectedFlow) -> Option<&Trace> {
        self.route(flow)?.trace.as_ref()
    }

    /// Takes what a report adds to the routes.
    pub(super) fn add(&mut self, DirectedReport { direction, report }: DirectedReport) {
        match report {
            TraceReport::Sent { .. } => self.has_sent = true,
            TraceReport::Answered { flow: number, ttl, answer, is_destination: false } => {
                let route = self.flows.entry(DirectedFlow { direction, number }).or_default();
                route.answers.entry(ttl).or_insert(answer);
            }
            TraceReport::Rejected { flow: number, rejection } => {
                let route = self.flows.entry(DirectedFlow { direction, number }).or_default();
                let nearest = |rejection: &Rejection| rejection.ttl.unwrap_or(DESTINATION);
                let known = route.late_rejection.as_ref().map_or(u8::MAX, nearest);
                if route.trace.is_some() && (route.late_rejection.is_none() || nearest(&rejection) < known) {
                    route.late_rejection = Some(rejection);
                }
            }
            TraceReport::Traced(trace) => {
                let route = self.flows.entry(DirectedFlow { direction, number: trace.flow }).or_default();
                route.traced_at.get_or_insert_with(Clock::now);
                route.trace.get_or_insert(*trace);
            }
            TraceReport::SendError(reason) => *self.not_sent.entry(reason).or_default() += 1,
            TraceReport::Answered { is_destination: true, .. }
            | TraceReport::Unanswered { .. }
            | TraceReport::Withdrawn
            | TraceReport::Deferred(_)
            | TraceReport::Unmatched
            | TraceReport::LossyFlow { .. }
            | TraceReport::Route { .. }
            | TraceReport::Reachability(_)
            | TraceReport::TtlClamped { .. } => {}
        }
    }

    /// The rejection of a flow's probes, at the hop at which the router has answered, if it has.
    pub(super) fn rejection(&self, flow: DirectedFlow) -> Option<Rejection> {
        let route = self.route(flow)?;
        let trace = route.trace.as_ref()?;
        let late = route.late_rejection.filter(|_| trace.rtt.is_none());
        trace.rejection.or_else(|| {
            let late = late?;
            let is_it = |answer: &Answer| answer.router == late.address;
            let hop = trace.hops.iter().find(|hop| hop.answers.iter().any(is_it));
            Some(Rejection { ttl: hop.map(|hop| hop.ttl).or(late.ttl), ..late })
        })
    }

    /// The routers in the order in which they are shown, each once.
    pub(super) fn routers(&self) -> Vec<IpAddr> {
        let mut routers = Vec::new();
        for (flow, FlowRoute { answers, trace, .. }) in &self.flows {
            let shown: Vec<&Answer> = match trace {
                Some(trace) => trace.hops.iter().filter_map(|hop| hop.answers.first()).collect(),
                None => answers.values().collect(),
            };
            let rejecting = self.rejection(*flow).map(|rejection| rejection.address);
            for router in shown.into_iter().map(|answer| answer.router).chain(rejecting) {
                if !routers.contains(&router) {
                    routers.push(router);
                }
            }
        }
        routers
    }

    /// Whether a trace is complete.
    pub(in crate::cli) fn has_trace(&self) -> bool {
        self.flows.values().any(|route| route.trace.is_some())
    }

    /// Whether the target has answered the traces of a flow.
    pub(in crate::cli) fn is_reached(&self) -> bool {
        let forward = self.flows.iter().filter(|(flow, _)| flow.direction == Direction::Forward);
        let mut traces = forward.filter_map(|(_, route)| route.trace.as_ref());
        traces.any(|trace| trace.rtt.is_some())
    }

    /// Returns an error if this host could not send a single probe.
    pub(super) fn fail_if_nothing_was_sent(&self) -> anyhow::Result<()> {
        let most = self.not_sent.iter().max_by_key(|(_, count)| **count);
        match most.filter(|_| !self.has_sent) {
            Some((reason, _)) => Err(anyhow!("sending to {}: {}", self.to.ip(), reason.as_text())),
            None => Ok(()),
        }
    }
}

/// Whether an interface of this host has the address; false if they cannot be listed.
fn is_own(address: IpAddr) -> bool {
    let addresses = getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    addresses.filter_map(|own| ip_of(&own)).any(|own| own == address)
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::fixture::{FORWARD, MS, add, arguments, router, routes, trace};
    use super::*;

    #[test]
    fn late_rejection_is_at_the_hop_of_its_router() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        add(&mut routes, TraceReport::Traced(Box::new(trace(&[true, true], None, None))));
        let reason = RejectionReason::HostUnreachable;
        for (ttl, rtt) in [(None, 3_000), (Some(5), 2_900), (Some(4), 2_950)] {
            let (address, rtt) = ([10, 0, 0, 2].into(), Duration::from_millis(rtt));
            add(
                &mut routes,
                TraceReport::Rejected { flow: 0, rejection: Rejection { ttl, address, reason, rtt } },
            );
        }
        let rejection = routes.rejection(FORWARD).unwrap();
        assert_eq!((rejection.ttl, rejection.rtt), (Some(2), 2_950 * MS));
        assert_eq!(routes.routers(), [1, 2].map(|ttl| router(ttl).router), "each once");
    }

    #[test]
    fn only_an_unreachable_next_host_is_an_error_of_this_host() {
        let address = [127, 0, 0, 1].into();
        for (reason, is_error) in
            [(RejectionReason::HostUnreachable, true), (RejectionReason::Prohibited, false)]
        {
            let arguments = arguments(&[]);
            let mut routes = routes(&arguments);
            let rejection = Some(Rejection { ttl: None, address, reason, rtt: MS });
            let trace = Trace { rejection, ..trace(&[], None, None) };
            add(&mut routes, TraceReport::Traced(Box::new(trace)));
            assert_eq!(routes.fail_if_rejected_here(FORWARD).is_err(), is_error, "{reason:?}");
        }
    }

    #[test]
    fn host_that_can_send_nothing_is_an_error() {
        let arguments = arguments(&[]);
        let mut routes = routes(&arguments);
        (0..2).for_each(|_| add(&mut routes, TraceReport::SendError(NotSent::Unreachable)));
        let error = routes.fail_if_nothing_was_sent().unwrap_err();
        assert_eq!(error.to_string(), "sending to 192.0.2.9: no route from this host");
        add(&mut routes, TraceReport::Sent { ttl: 1 });
        assert!(routes.fail_if_nothing_was_sent().is_ok());
    }
}
