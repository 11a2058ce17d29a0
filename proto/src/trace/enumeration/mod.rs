//! Enumeration of the equal-cost paths to a destination, with the multipath detection algorithm (MDA).
//!
//! Routers choose among equal-cost links by a hash of the addresses and ports, so probes of different flows
//! show different paths. The enumeration goes hop by hop. For each router that it has found it sends as many
//! flows through that router as the stopping rule requires before it takes the successors that they showed
//! for all.
//!
//! This is the MDA with node control (Augustin, Friedman, Teixeira 2007; Veitch, Augustin, Friedman, Teixeira
//! 2009), not MDA-Lite (Vermeulen, Strowes, Fourmaux, Friedman 2018), which counts the flows of a hop and not
//! those of each router. The rule of a whole hop is used only where flows for node control are missing, and
//! the hop is then marked [`CompleteIfUniform`](Completeness::CompleteIfUniform). Assumed is that a router
//! hashes flows independently of each other and spreads them evenly over its successors. Then one router's
//! successors are incomplete in about 5 % of cases, and those of any of several routers in at most as many as
//! the sum.

mod groups;
mod hop;
mod paths;
mod stopping_rule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use groups::{Group, Need, UNANSWERED_MAX, are_uniform};
use hop::{Cell, HopCells, Position};
pub use paths::{
    Completeness, EnumeratedHop, EnumeratedRouter, EnumerationEnd, EnumerationLimit, EqualCostPaths,
    HopProbes, Link, Reached,
};
use stopping_rule::probes_required;

/// Decides which flow to probe with which TTL, until the equal-cost paths are known.
///
/// The caller sends what [`step`](Self::step) returns, in any order, and reports one outcome for each probe:
/// [`answered`](Self::answered), [`unanswered`](Self::unanswered), [`not_sent`](Self::not_sent) or
/// [`withdrawn`](Self::withdrawn). At most one probe of a flow and TTL is outstanding.
#[derive(Debug)]
pub struct Enumeration {
    flows: u8,
    hops_max: u8,
    /// Index: TTL − 1.
    hops: Vec<HopCells>,
    /// The lowest TTL whose hop is not settled. A settled hop is settled anew after another answer.
    unsettled: u8,
    probes: u32,
    outstanding: u32,
    not_sent: u32,
}

/// What an enumeration does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnumerationStep {
    /// Send this probe.
    Probe(PathProbe),
    /// Wait for the outcome of a probe.
    Wait,
    /// The enumeration has ended with this result.
    Finished(Box<EqualCostPaths>),
}

/// A probe of an enumeration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PathProbe {
    /// The flow.
    pub flow: u8,
    /// The TTL.
    pub ttl: u8,
}

/// A router that answers a flow at so many TTLs is in a loop. Two occur without one: some routers forward
/// packets whose TTL has ended.
const LOOP_TTLS: usize = 3;

/// What a hop needs.
enum HopNeed {
    Probe(PathProbe, Purpose),
    Answers,
    Settled(Completeness),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Enumerating,
    Steering,
    Repeat,
    Retry,
}

impl Enumeration {
    /// Largest number of flows: as many as the stopping rule requires for 16 successors. At the limit the hop
    /// is marked, and the next one is enumerated with the flows that there are.
    pub const FLOWS_MAX: u8 = 96;

    /// Largest number of routers at a hop, which is what the stopping rule covers. At the limit further
    /// routers are not recorded and the hop is marked.
    pub const ROUTERS_MAX: usize = 16;

    /// Largest number of probes. At the limit the enumeration ends. Chosen: 3,000, as scamper's.
    pub const PROBES_MAX: u32 = 3_000;

    /// An enumeration ends after so many hops in a row without an answer. Chosen: 5, so that it ends at a
    /// firewall, and passes a provider's network that does not answer.
    pub const SILENT_HOPS_MAX: usize = 5;

    /// An enumeration ends after so many probes that this host refused to send.
    pub const NOT_SENT_MAX: u32 = 32;

    /// An enumeration with `flows` flows, from 1 to [`Self::FLOWS_MAX`], and TTLs up to `hops_max`, at least
    /// 1.
    #[must_use]
    pub fn new(flows: u8, hops_max: u8) -> Self {
        Self {
            flows: flows.clamp(1, Self::FLOWS_MAX),
            // One TTL is left for the hop behind the last one.
            hops_max: hops_max.clamp(1, u8::MAX - 1),
            hops: Vec::new(),
            unsettled: 1,
            probes: 0,
            outstanding: 0,
            not_sent: 0,
        }
    }

    /// The probe to send next, if any. Must be called until it returns no probe.
    pub fn step(&mut self) -> EnumerationStep {
        let end = loop {
            if self.not_sent >= Self::NOT_SENT_MAX {
                break EnumerationEnd::Limited(EnumerationLimit::NotSent);
            }
            let ttl = self.unsettled;
            if let Some(end) = self.end_before(ttl) {
                break end;
            }
            if self.hops.len() < usize::from(ttl) {
                self.hops.push(HopCells::new(self.flows));
            }
            match self.hop_need(ttl) {
                HopNeed::Probe(..) if self.probes >= Self::PROBES_MAX => {
                    break EnumerationEnd::Limited(EnumerationLimit::Probes);
                }
                HopNeed::Probe(probe, purpose) => {
                    self.send(probe, purpose);
                    return EnumerationStep::Probe(probe);
                }
                HopNeed::Answers => return EnumerationStep::Wait,
                HopNeed::Settled(completeness) => {
                    let presumed = self.presumed(ttl, completeness);
                    if let Some(hop) = self.hop_mut(ttl) {
                        (hop.completeness, hop.presumed) = (Some(completeness), presumed);
                    }
                    self.unsettled = ttl + 1;
                }
            }
        };
        // Outstanding answers may still show another router.
        match self.outstanding {
            0 => EnumerationStep::Finished(Box::new(self.paths(end))),
            _ => EnumerationStep::Wait,
        }
    }

    /// A probe was answered. An answer that comes after the probe was taken for unanswered counts, too.
    pub fn answered(&mut self, probe: PathProbe, by: Reached) {
        let is_first_outcome = self.decide(probe);
        let Some(hop) = self.hop_mut(probe.ttl) else { return };
        let Some(cell) = hop.cells.get_mut(usize::from(probe.flow)) else { return };
        if cell.is_answered() && is_first_outcome {
            cell.repeats_answered += 1;
        }
        let has_room = hop.routers.len() < Self::ROUTERS_MAX;
        match by {
            Reached::Router(router) if !has_room && !hop.routers.contains(&router) => {
                cell.is_beyond_limit = true;
                hop.has_more_routers = true;
            }
            Reached::Router(_) | Reached::Destination => {
                if let Reached::Router(router) = by {
                    hop.routers.insert(router);
                }
                if !cell.reached.contains(&by) {
                    cell.reached.push(by);
                }
            }
        }
        hop.is_per_packet |= cell.reached.len() + usize::from(cell.is_beyond_limit) > 1;
        self.unsettle(probe.ttl);
    }

    /// A probe was not answered in time.
    pub fn unanswered(&mut self, probe: PathProbe) {
        if !self.decide(probe) {
            return;
        }
        let Some(cell) = self.cell_mut(probe) else { return };
        if cell.is_answered() {
            cell.repeats_failed += 1;
        } else {
            cell.attempts = cell.attempts.saturating_add(1);
        }
        self.unsettle(probe.ttl);
    }

    /// This host refused to send a probe, which says nothing about the network.
    pub fn not_sent(&mut self, probe: PathProbe) {
        if self.decide(probe) {
            self.not_sent += 1;
            self.unsettle(probe.ttl);
        }
    }

    /// What became of a probe cannot be known.
    pub fn withdrawn(&mut self, probe: PathProbe) {
        if self.decide(probe) {
            self.unsettle(probe.ttl);
        }
    }

    /// The only router that a probe can reach as far as is known; `None` if that is not known.
    #[must_use]
    pub fn expected(&self, probe: PathProbe) -> Option<IpAddr> {
        let hop = self.hop(probe.ttl)?;
        let cell = hop.cells.get(usize::from(probe.flow))?;
        let known = cell.reached.iter().find_map(|reached| match reached {
            Reached::Router(router) => Some(*router),
            Reached::Destination => None,
        });
        known.or_else(|| hop.routers.first().copied().filter(|_| hop.routers.len() == 1))
    }

    fn paths(&self, end: EnumerationEnd) -> EqualCostPaths {
        let is_used = |flow: &u8| {
            let cells = self.hops.iter().filter_map(|hop| hop.cells.get(usize::from(*flow)));
            cells.into_iter().any(|cell| cell.is_answered() || cell.attempts > 0)
        };
        // Only a limit ends it before all hops are settled.
        let unsettled = match end {
            EnumerationEnd::Limited(limit) => limit,
            EnumerationEnd::Destination
            | EnumerationEnd::Loop
            | EnumerationEnd::Silent
            | EnumerationEnd::HopsMax => EnumerationLimit::Probes,
        };
        let hops = (1..).zip(&self.hops).map(|(ttl, hop)| hop.record(ttl, Completeness::Limited(unsettled)));
        EqualCostPaths {
            hops: hops.collect(),
            links: self.links(),
            end,
            flows: u8::try_from((0..self.flows).filter(is_used).count()).unwrap_or(u8::MAX),
            probes: self.probes,
        }
    }

    fn links(&self) -> Vec<Link> {
        let mut links = BTreeSet::new();
        for ((ttl, hop), next) in (1..).zip(&self.hops).zip(self.hops.iter().skip(1)) {
            if hop.is_per_packet || next.is_per_packet {
                continue;
            }
            for (cell, next) in hop.cells.iter().zip(&next.cells) {
                let from = match (&cell.reached[..], &hop.presumed) {
                    ([Reached::Router(router)], _) | ([], Some(Position::Router(router))) => Some(*router),
                    _ => None,
                };
                if let (Some(from), [to]) = (from, &next.reached[..]) {
                    links.insert(Link { ttl, from, to: *to });
                }
            }
        }
        links.into_iter().collect()
    }

    fn hop(&self, ttl: u8) -> Option<&HopCells> {
        self.hops.get(usize::from(ttl).checked_sub(1)?)
    }

    fn hop_mut(&mut self, ttl: u8) -> Option<&mut HopCells> {
        self.hops.get_mut(usize::from(ttl).checked_sub(1)?)
    }

    fn cell_mut(&mut self, probe: PathProbe) -> Option<&mut Cell> {
        self.hop_mut(probe.ttl)?.cells.get_mut(usize::from(probe.flow))
    }

    fn send(&mut self, probe: PathProbe, purpose: Purpose) {
        self.probes += 1;
        self.outstanding += 1;
        let Some(hop) = self.hop_mut(probe.ttl) else { return };
        let count = match purpose {
            Purpose::Enumerating => &mut hop.probes.enumerating,
            Purpose::Steering => &mut hop.probes.steering,
            Purpose::Repeat => &mut hop.probes.repeats,
            Purpose::Retry => &mut hop.probes.retries,
        };
        *count += 1;
        if let Some(cell) = hop.cells.get_mut(usize::from(probe.flow)) {
            cell.is_outstanding = true;
        }
    }

    /// The outcome of a probe is known. Returns false if it was known before.
    fn decide(&mut self, probe: PathProbe) -> bool {
        let Some(cell) = self.cell_mut(probe) else { return false };
        let was_outstanding = std::mem::replace(&mut cell.is_outstanding, false);
        self.outstanding -= u32::from(was_outstanding);
        was_outstanding
    }

    fn unsettle(&mut self, ttl: u8) {
        self.unsettled = self.unsettled.min(ttl);
        for hop in self.hops.iter_mut().skip(usize::from(ttl) - 1) {
            (hop.completeness, hop.presumed) = (None, None);
        }
    }

    /// Where a flow is at a hop; `None` if it must be probed to know.
    fn position(&self, ttl: u8, flow: u8) -> Option<Position> {
        if ttl == 0 {
            return Some(Position::Source);
        }
        let hop = self.hop(ttl)?;
        let cell = hop.cells.get(usize::from(flow))?;
        match &cell.reached[..] {
            [Reached::Destination] => Some(Position::Ended),
            [Reached::Router(router)] if self.is_loop(ttl, flow, *router) => Some(Position::Ended),
            _ if hop.is_per_packet && cell.is_answered() => Some(Position::Unknown),
            [Reached::Router(router)] => Some(Position::Router(*router)),
            _ if cell.is_answered() || cell.is_unanswered() => Some(Position::Unknown),
            _ => hop.presumed,
        }
    }

    /// Whether the router has answered the flow at so many TTLs that there must be a loop.
    fn is_loop(&self, ttl: u8, flow: u8, router: IpAddr) -> bool {
        let cells =
            self.hops.iter().take(usize::from(ttl)).filter_map(|hop| hop.cells.get(usize::from(flow)));
        let answered = cells.filter(|cell| cell.reached.contains(&Reached::Router(router)));
        answered.count() >= LOOP_TTLS
    }

    /// The positions of the flows that were probed at a hop.
    fn positions(&self, ttl: u8) -> BTreeSet<Position> {
        let Some(hop) = self.hop(ttl) else { return BTreeSet::from([Position::Source]) };
        let known = (0..).zip(&hop.cells).filter(|(_, cell)| cell.is_answered() || cell.is_unanswered());
        known.filter_map(|(flow, _)| self.position(ttl, flow)).collect()
    }

    /// Where the flows are that were not probed at a settled hop; `None` if they can be at different places.
    fn presumed(&self, ttl: u8, completeness: Completeness) -> Option<Position> {
        let positions = self.positions(ttl);
        let only = positions.first().copied().filter(|_| positions.len() == 1);
        only.filter(|only| *only == Position::Unknown || completeness == Completeness::Complete)
    }

    /// Why the hop after the settled ones is not probed.
    fn end_before(&self, ttl: u8) -> Option<EnumerationEnd> {
        let settled = self.hops.iter().rev().skip_while(|hop| hop.completeness.is_none());
        let silent = settled.take_while(|hop| hop.completeness == Some(Completeness::Silent));
        if silent.count() >= Self::SILENT_HOPS_MAX {
            return Some(EnumerationEnd::Silent);
        }
        if self.positions(ttl - 1).iter().all(|position| *position == Position::Ended) {
            let has_loop = self.hop(ttl - 1).is_some_and(|hop| !hop.routers.is_empty());
            return Some(if has_loop { EnumerationEnd::Loop } else { EnumerationEnd::Destination });
        }
        (ttl > self.hops_max).then_some(EnumerationEnd::HopsMax)
    }

    /// What is needed to settle a hop. The hop before it is settled.
    fn hop_need(&self, ttl: u8) -> HopNeed {
        let Some(hop) = self.hop(ttl) else { return HopNeed::Answers };
        let probe = |flow, ttl| PathProbe { flow, ttl };
        let mut groups: BTreeMap<Position, Group> = BTreeMap::new();
        for (flow, cell) in (0..).zip(&hop.cells) {
            match self.position(ttl - 1, flow) {
                Some(Position::Ended) | None => {}
                Some(position) => groups.entry(position).or_default().add(flow, cell),
            }
        }
        let unanswered = hop.cells.iter().filter(|cell| cell.is_unanswered()).count();
        let is_silent = unanswered >= UNANSWERED_MAX && !hop.cells.iter().any(Cell::is_answered);
        if is_silent || hop.is_per_packet || hop.has_more_routers {
            return HopNeed::Settled(self.completeness(hop, &groups, &[]));
        }
        let retry = (0..).zip(&hop.cells).find(|(_, cell)| cell.is_retry_due());
        if let Some((flow, _)) = retry {
            return HopNeed::Probe(probe(flow, ttl), Purpose::Retry);
        }
        if let Some((flow, purpose)) = self.parent_to_probe(ttl) {
            return match purpose {
                Some(purpose) => HopNeed::Probe(probe(flow, ttl - 1), purpose),
                None => HopNeed::Answers,
            };
        }
        let (mut is_waiting, mut incomplete, mut missing) = (false, Vec::new(), 0);
        for (position, group) in &groups {
            match group.need() {
                Need::Nothing => {}
                Need::GaveUp => incomplete.push(*position),
                Need::Probe(flow) => return HopNeed::Probe(probe(flow, ttl), Purpose::Enumerating),
                Need::Repeat(flow) => return HopNeed::Probe(probe(flow, ttl), Purpose::Repeat),
                Need::Answers => is_waiting = true,
                Need::Flows(flows) => {
                    incomplete.push(*position);
                    // Flows of an unknown position cannot be looked for.
                    if matches!(position, Position::Router(_)) {
                        missing += flows;
                    }
                }
            }
        }
        match self.steer(ttl - 1, missing) {
            Some(HopNeed::Probe(probe, purpose)) => HopNeed::Probe(probe, purpose),
            Some(_) => HopNeed::Answers,
            None if is_waiting => HopNeed::Answers,
            None => HopNeed::Settled(self.completeness(hop, &groups, &incomplete)),
        }
    }

    /// A flow to probe at the hop before, because a router of this hop is only known from flows whose router
    /// at the hop before is not. No purpose: such a probe is outstanding.
    fn parent_to_probe(&self, ttl: u8) -> Option<(u8, Option<Purpose>)> {
        let hop = self.hop(ttl)?;
        let before = self.hop(ttl - 1)?;
        let mut orphans: BTreeMap<Reached, u8> = BTreeMap::new();
        let mut adopted = BTreeSet::new();
        for (flow, cell) in (0..).zip(&hop.cells) {
            match self.position(ttl - 1, flow) {
                Some(_) => adopted.extend(cell.reached.iter().copied()),
                None => cell.reached.iter().for_each(|reached| {
                    orphans.entry(*reached).or_insert(flow);
                }),
            }
        }
        let (_, flow) = orphans.into_iter().find(|(reached, _)| !adopted.contains(reached))?;
        let is_outstanding = before.cells.get(usize::from(flow)).is_some_and(|cell| cell.is_outstanding);
        Some((flow, (!is_outstanding).then_some(Purpose::Steering)))
    }

    /// Looks for `missing` further flows of certain routers of a hop, which takes at least as many probes.
    fn steer(&self, ttl: u8, missing: usize) -> Option<HopNeed> {
        let hop = self.hop(ttl).filter(|_| missing > 0)?;
        let undecided = || {
            let cells = (0..).zip(&hop.cells);
            cells.filter(|(_, cell)| !cell.is_answered() && !cell.is_unanswered())
        };
        let outstanding = undecided().filter(|(_, cell)| cell.is_outstanding).count();
        let unprobed = undecided().find(|(_, cell)| !cell.is_outstanding);
        match unprobed.filter(|_| outstanding < missing) {
            Some((flow, _)) => Some(HopNeed::Probe(PathProbe { flow, ttl }, Purpose::Steering)),
            None => (outstanding > 0).then_some(HopNeed::Answers),
        }
    }

    /// How far a hop is known, from the groups of the hop before, of which some are incomplete.
    fn completeness(
        &self,
        hop: &HopCells,
        groups: &BTreeMap<Position, Group>,
        incomplete: &[Position],
    ) -> Completeness {
        let answered = hop.cells.iter().filter(|cell| cell.is_answered()).count();
        if hop.is_per_packet {
            return Completeness::PerPacket;
        }
        if hop.has_more_routers {
            return Completeness::Limited(EnumerationLimit::Routers);
        }
        if answered == 0 {
            return Completeness::Silent;
        }
        let is_partly_silent =
            hop.cells.iter().any(Cell::is_unanswered) || groups.values().any(Group::has_unanswered_repeats);
        if is_partly_silent {
            return Completeness::PartlySilent;
        }
        if incomplete.is_empty() && !groups.contains_key(&Position::Unknown) {
            return Completeness::Complete;
        }
        let found: BTreeSet<&Reached> = hop.cells.iter().flat_map(|cell| &cell.reached).collect();
        let is_satisfied = probes_required(found.len()).is_some_and(|required| answered >= required);
        match is_satisfied && are_uniform(groups) {
            true => Completeness::CompleteIfUniform,
            false => Completeness::Limited(EnumerationLimit::Flows),
        }
    }
}
