//! Flows grouped by the router that they pass at one hop.

use std::collections::{BTreeMap, BTreeSet};

use super::hop::{Cell, Position};
use super::paths::Reached;
use super::stopping_rule::probes_required;

/// The flows of one position, and what their probes to the next hop showed.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) reached: BTreeSet<Reached>,
    /// Number of flows that were answered.
    pub(super) answered: usize,
    outstanding: usize,
    unanswered: usize,
    /// The first flow that was not probed at the next hop.
    unprobed: Option<u8>,
    repeats_answered: u32,
    repeats_outstanding: u32,
    repeats_failed: u32,
    /// The answered flow to repeat next: the one that was repeated least.
    repeatable: Option<(u32, u8)>,
}

/// What a group needs at the next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: the stopping rule is satisfied.
    Nothing,
    /// Nothing: it has more successors than the stopping rule covers, or too many flows are not answered.
    GaveUp,
    /// The first probe of this flow.
    Probe(u8),
    /// Another probe of this answered flow.
    Repeat(u8),
    /// The answers to outstanding probes.
    Answers,
    /// So many further flows of this position.
    Flows(usize),
}

/// Second probes of answered flows of a group with several successors. Where packets alternate between two
/// routers, five repeats are all answered by the same router as before in 3 % of cases, as often as six flows
/// of a router with two successors show only one.
const REPEATS: u32 = 5;

/// Repeats of a group that may stay unanswered.
const REPEATS_FAILED_MAX: u32 = 5;

/// A group whose flows were unanswered so many times is not enumerated further. Chosen: as many flows as rule
/// out a second successor.
pub(super) const UNANSWERED_MAX: usize = 6;

impl Group {
    /// Adds a flow and its probes to the next hop.
    pub(super) fn add(&mut self, flow: u8, cell: &Cell) {
        self.reached.extend(cell.reached.iter());
        if cell.is_answered() {
            self.answered += 1;
            let repeats = cell.repeats_answered + cell.repeats_failed;
            if !cell.is_outstanding {
                let least = self.repeatable.filter(|(least, _)| *least <= repeats);
                self.repeatable = least.or(Some((repeats, flow)));
            }
            self.repeats_outstanding += u32::from(cell.is_outstanding);
        } else if cell.is_outstanding {
            self.outstanding += 1;
        } else if cell.is_unanswered() {
            self.unanswered += 1;
        } else if cell.attempts == 0 {
            self.unprobed = self.unprobed.or(Some(flow));
        }
        self.repeats_answered += cell.repeats_answered;
        self.repeats_failed += cell.repeats_failed;
    }

    pub(super) fn need(&self) -> Need {
        if self.unanswered >= UNANSWERED_MAX {
            return Need::GaveUp;
        }
        if self.reached.len() > 1 && self.repeats_answered < REPEATS {
            if self.repeats_failed >= REPEATS_FAILED_MAX {
                return Need::GaveUp;
            }
            let is_missing = self.repeats_answered + self.repeats_outstanding < REPEATS;
            let repeatable = self.repeatable.filter(|_| is_missing);
            return repeatable.map_or(Need::Answers, |(_, flow)| Need::Repeat(flow));
        }
        let Some(required) = probes_required(self.reached.len()) else { return Need::GaveUp };
        if self.answered >= required {
            return Need::Nothing;
        }
        // As many flows as a router with one successor needs show that none answers.
        let silent = if self.answered == 0 { self.unanswered } else { 0 };
        match required.saturating_sub(self.answered + self.outstanding + silent) {
            0 => Need::Answers,
            missing => self.unprobed.map_or(Need::Flows(missing), Need::Probe),
        }
    }

    /// Whether answers of repeats are missing, so that alternating packets cannot be ruled out.
    pub(super) fn has_unanswered_repeats(&self) -> bool {
        self.reached.len() > 1 && self.repeats_answered < REPEATS
    }
}

/// Whether nothing contradicts that each responder of a hop gets the same share of the flows: it is the only
/// one, or all groups have the same number of successors and share none.
pub(super) fn are_uniform(groups: &BTreeMap<Position, Group>) -> bool {
    let sets = || groups.values().map(|group| &group.reached).filter(|reached| !reached.is_empty());
    let all: BTreeSet<&Reached> = sets().flatten().collect();
    let mut sizes = sets().map(BTreeSet::len);
    let first = sizes.next().unwrap_or(0);
    let is_even = sizes.all(|size| size == first);
    all.len() <= 1 || (is_even && sets().map(BTreeSet::len).sum::<usize>() == all.len())
}
