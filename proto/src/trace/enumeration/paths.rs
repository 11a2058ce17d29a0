//! The record of an enumeration.

use std::net::IpAddr;

/// Who answered a probe with a limited TTL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reached {
    /// A router, at which the TTL ended.
    Router(IpAddr),
    /// The destination.
    Destination,
}

/// The equal-cost paths that were found between this host and a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EqualCostPaths {
    /// The hops in the order of their TTL, from TTL 1 on without a gap. The hop at which the destination
    /// answers is the last one.
    pub hops: Vec<EnumeratedHop>,
    /// The links between successive hops in ascending order, each once.
    pub links: Vec<Link>,
    /// Why no further hops were probed.
    pub end: EnumerationEnd,
    /// Number of flows that were used.
    pub flows: u8,
    /// Number of probes, with those that could not be sent or were withdrawn.
    pub probes: u32,
}

/// All that was found at one TTL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnumeratedHop {
    /// The TTL.
    pub ttl: u8,
    /// The routers in ascending order of their addresses, at most
    /// [`ROUTERS_MAX`](super::Enumeration::ROUTERS_MAX).
    pub routers: Vec<EnumeratedRouter>,
    /// The flows that reach the destination with this TTL.
    pub destination_flows: Vec<u8>,
    /// The flows whose probes no one answered, although they were repeated.
    pub unanswered_flows: Vec<u8>,
    /// Whether all routers were found.
    pub completeness: Completeness,
    /// The probes with this TTL.
    pub probes: HopProbes,
}

/// A router of a hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnumeratedRouter {
    /// Its address.
    pub address: IpAddr,
    /// The flows that it answered, in ascending order. Where packets of one flow alternate, a flow occurs at
    /// several routers.
    pub flows: Vec<u8>,
}

/// Two successive responders of at least one flow. A flow that was not probed at the TTL of the first one is
/// taken to pass it if it is the only router of a complete hop. There are no links at hops where packets of
/// one flow alternate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// The TTL of the first one.
    pub ttl: u8,
    /// The first one.
    pub from: IpAddr,
    /// The second one, whose TTL is one larger.
    pub to: Reached,
}

/// Whether all routers of a hop were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Completeness {
    /// For each router that was found at the hop before, the stopping rule has ruled out further successors.
    Complete,
    /// The stopping rule was satisfied for the hop as a whole only, because the router at the hop before is
    /// not known for enough flows. That bounds the probability of a missed router only if each router of this
    /// hop gets the same share of the flows, which nothing that was seen contradicts.
    CompleteIfUniform,
    /// Some flows were never answered: a router among several does not answer, or limits its answers.
    PartlySilent,
    /// No flow was answered.
    Silent,
    /// Packets of one flow alternate between routers, so flows tell nothing about paths.
    PerPacket,
    /// A limit was reached before the stopping rule was satisfied.
    Limited(EnumerationLimit),
}

/// The limits of an enumeration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EnumerationLimit {
    /// The number of flows.
    Flows,
    /// [`ROUTERS_MAX`](super::Enumeration::ROUTERS_MAX).
    Routers,
    /// [`PROBES_MAX`](super::Enumeration::PROBES_MAX).
    Probes,
    /// [`NOT_SENT_MAX`](super::Enumeration::NOT_SENT_MAX).
    NotSent,
}

/// Why an enumeration probed no further hops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EnumerationEnd {
    /// All flows reach the destination.
    Destination,
    /// A flow passes the same router again and again.
    Loop,
    /// [`SILENT_HOPS_MAX`](super::Enumeration::SILENT_HOPS_MAX) hops in a row did not answer.
    Silent,
    /// The largest TTL was reached.
    HopsMax,
    /// A limit was reached.
    Limited(EnumerationLimit),
}

/// Number of probes of one hop by their purpose, with those that could not be sent or were withdrawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HopProbes {
    /// First probes of flows, as many as the stopping rule requires for this hop.
    pub enumerating: u32,
    /// First probes of flows, to learn which router they pass here: the hop behind it needs flows of a
    /// certain router.
    pub steering: u32,
    /// Second probes of answered flows, to detect packets of one flow that alternate.
    pub repeats: u32,
    /// Further probes of unanswered flows.
    pub retries: u32,
}
