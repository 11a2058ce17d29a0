//! The probes of one hop, and what they showed.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::paths::{Completeness, EnumeratedHop, EnumeratedRouter, HopProbes, Reached};

/// The probes with one TTL.
#[derive(Debug)]
pub(super) struct HopCells {
    /// Index: flow.
    pub(super) cells: Vec<Cell>,
    pub(super) routers: BTreeSet<IpAddr>,
    /// Whether a flow was answered by several routers.
    pub(super) is_per_packet: bool,
    /// Whether it has more than [`ROUTERS_MAX`](super::Enumeration::ROUTERS_MAX) routers.
    pub(super) has_more_routers: bool,
    /// The position of flows that were not probed; `None` if they can have different ones.
    pub(super) presumed: Option<Position>,
    /// `None`: not settled yet.
    pub(super) completeness: Option<Completeness>,
    pub(super) probes: HopProbes,
}

/// Where the packets of a flow are at a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Position {
    /// On this host, before the first hop.
    Source,
    /// At this router.
    Router(IpAddr),
    /// At a router that does not answer, or at one of several between which packets alternate.
    Unknown,
    /// At the destination, or in a loop.
    Ended,
}

/// The probes of one flow with one TTL.
#[derive(Debug, Clone, Default)]
pub(super) struct Cell {
    /// Who answered; several if packets of the flow alternate. A router beyond the limit is not among them.
    pub(super) reached: Vec<Reached>,
    pub(super) is_beyond_limit: bool,
    pub(super) is_outstanding: bool,
    /// Probes that left the host, until the first answer.
    pub(super) attempts: u8,
    pub(super) repeats_answered: u32,
    pub(super) repeats_failed: u32,
}

impl Cell {
    pub(super) fn is_answered(&self) -> bool {
        !self.reached.is_empty() || self.is_beyond_limit
    }

    /// Whether it is not probed again, because it was unanswered so often.
    pub(super) fn is_unanswered(&self) -> bool {
        !self.is_answered() && self.attempts >= ATTEMPTS_MAX
    }

    pub(super) fn is_retry_due(&self) -> bool {
        !self.is_answered() && !self.is_outstanding && (1..ATTEMPTS_MAX).contains(&self.attempts)
    }
}

/// Probes of a flow with one TTL until it is taken for unanswered. Chosen: 4, which a path that loses 5 % of
/// the probes and answers loses in one of 10,000 cases.
const ATTEMPTS_MAX: u8 = 4;

impl HopCells {
    pub(super) fn new(flows: u8) -> Self {
        Self {
            cells: vec![Cell::default(); flows.into()],
            routers: BTreeSet::new(),
            is_per_packet: false,
            has_more_routers: false,
            presumed: None,
            completeness: None,
            probes: HopProbes::default(),
        }
    }

    pub(super) fn record(&self, ttl: u8, unsettled: Completeness) -> EnumeratedHop {
        let flows = |is_included: &dyn Fn(&Cell) -> bool| {
            let cells = (0..).zip(&self.cells).filter(|(_, cell)| is_included(cell));
            cells.map(|(flow, _)| flow).collect::<Vec<u8>>()
        };
        let routers = self.routers.iter().map(|address| EnumeratedRouter {
            address: *address,
            flows: flows(&|cell| cell.reached.contains(&Reached::Router(*address))),
        });
        EnumeratedHop {
            ttl,
            routers: routers.collect(),
            destination_flows: flows(&|cell| cell.reached.contains(&Reached::Destination)),
            unanswered_flows: flows(&Cell::is_unanswered),
            completeness: self.completeness.unwrap_or(unsettled),
            probes: self.probes,
        }
    }
}
