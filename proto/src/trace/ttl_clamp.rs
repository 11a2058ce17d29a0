//! Whether a device on the way rewrites TTLs.
//!
//! Behind such a device no router can be measured: all probes end where its TTL ends, or nowhere before the
//! destination.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use super::DESTINATION;
use crate::time::Timestamp;

/// How TTLs are rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TtlRewriting {
    /// A limited TTL is raised: the probe reaches the destination although it should not.
    Raised,
    /// A full TTL is lowered.
    Lowered {
        /// The router at which all probes end; `None` if they reach the destination.
        router: Option<IpAddr>,
    },
}

impl TtlRewriting {
    /// The change as events and JSON show it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raised => "raised",
            Self::Lowered { .. } => "lowered",
        }
    }

    /// The router at which all probes end; `None` if they reach the destination.
    #[must_use]
    pub const fn router(self) -> Option<IpAddr> {
        match self {
            Self::Raised => None,
            Self::Lowered { router } => router,
        }
    }
}

/// Looks for rewritten TTLs in the traces of one flow to an agent, which says with which TTL a probe arrived.
#[derive(Debug, Default)]
pub(super) struct TtlClamp {
    /// Until when no limited probes are sent; `None`: no rewriting was found.
    until: Option<Timestamp>,
    is_reported: bool,
    /// Hops that an unlimited probe of this trace passed, by its TTL on arrival.
    passed: Option<u8>,
    /// Limited probes of this trace in a row whose TTL on arrival contradicts that of the unlimited one.
    inconsistent: u8,
    /// The routers at which the TTL of an unlimited probe of this trace ended.
    ended_at: BTreeSet<IpAddr>,
    /// Whether that was so in the latest trace, and no unlimited probe has arrived since.
    is_ended: bool,
}

/// How long no limited probes are sent on a flow whose TTLs are rewritten: they may disturb it, because a
/// device that rewrites their TTL lets probes that should end pass on. Chosen: a day, so that one trace a day
/// shows whether the device is gone.
pub const CLAMPED_FOR: Duration = Duration::from_secs(86_400);

/// Contradicting TTLs in a row within a trace that show a rewriting. Chosen: 2, because a TTL may have been
/// corrupted once.
const INCONSISTENT: u8 = 2;

/// Numbers of routers that differ by up to this do not contradict each other. Chosen: 32, far more than two
/// routes differ by, between which a flow changes within a trace or packet by packet. A rewriting changes the
/// number of an unlimited probe by 255 − X, where X is the TTL it sets, mostly 64 or 128, or smaller.
const DIFFERENCE_MAX: u8 = 32;

impl TtlClamp {
    /// Whether TTLs are rewritten, so that limited probes must not be sent.
    pub(super) fn is_found(&self) -> bool {
        self.until.is_some()
    }

    /// Ends the time without limited probes.
    pub(super) fn expire(&mut self, now: Timestamp) {
        self.until = self.until.filter(|until| *until > now);
    }

    /// Records that a rewriting was found. Returns whether it is to be reported: it was not found in the
    /// last complete trace with limited probes.
    pub(super) fn found(&mut self, now: Timestamp) -> bool {
        self.until = Some(now + CLAMPED_FOR);
        !std::mem::replace(&mut self.is_reported, true)
    }

    /// Whether unlimited probes end before the destination, so that its distance is not the known one.
    pub(super) fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// A trace begins.
    pub(super) fn trace_began(&mut self) {
        (self.passed, self.inconsistent) = (None, 0);
        self.ended_at.clear();
    }

    /// The destination answered a probe that was sent with one TTL and arrived with another.
    pub(super) fn reached(&mut self, sent: u8, arrived: u8) -> Option<TtlRewriting> {
        let Some(passed) = sent.checked_sub(arrived) else {
            return (!self.is_found()).then_some(TtlRewriting::Raised);
        };
        if sent == DESTINATION {
            self.passed = Some(passed);
            self.is_ended = false;
            return None;
        }
        let known = self.passed.filter(|_| !self.is_found())?;
        let is_consistent = known.abs_diff(passed) <= DIFFERENCE_MAX;
        self.inconsistent = if is_consistent { 0 } else { self.inconsistent.saturating_add(1) };
        (self.inconsistent >= INCONSISTENT).then_some(TtlRewriting::Lowered { router: None })
    }

    /// The TTL of an unlimited probe ended at a router.
    pub(super) fn ended(&mut self, router: IpAddr) {
        // Two are enough to see that there are several.
        if self.ended_at.len() < 2 {
            self.ended_at.insert(router);
        }
    }

    /// A trace is complete: the TTLs of its limited probes that routers answered, with these. `is_reached`:
    /// whether the destination answered.
    ///
    /// A clamp ends all probes at the same router: it answers two TTLs in a row, no other router answers a
    /// larger one, and unlimited probes end there too. In a routing loop at least two routers alternate, so
    /// that another one answers between two answers of the first, or none does.
    pub(super) fn trace_ended(
        &mut self,
        answers: impl Iterator<Item = (u8, IpAddr)>,
        is_reached: bool,
    ) -> Option<TtlRewriting> {
        let mut by_ttl: BTreeMap<u8, BTreeSet<IpAddr>> = BTreeMap::new();
        for (ttl, router) in answers {
            by_ttl.entry(ttl).or_default().insert(router);
        }
        if !self.is_found() && is_reached && !by_ttl.is_empty() {
            self.is_reported = false;
        }
        self.is_ended = !self.ended_at.is_empty();
        // Two routers end unlimited probes only in a loop.
        let [router] = self.ended_at.iter().copied().collect::<Vec<IpAddr>>()[..] else { return None };
        let first = by_ttl.iter().find(|(_, routers)| routers.contains(&router)).map(|(ttl, _)| *ttl)?;
        let is_alone = by_ttl.range(first..).all(|(_, routers)| routers.iter().all(|found| *found == router));
        let is_followed = by_ttl.contains_key(&(first + 1));
        let is_clamp = !self.is_found() && is_alone && is_followed;
        is_clamp.then_some(TtlRewriting::Lowered { router: Some(router) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn router(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// What a trace shows in which unlimited probes end at a router and these routers answer, from TTL 1 on.
    fn found(ends_at: &[u8], answers: &[Option<u8>]) -> Option<TtlRewriting> {
        let mut clamp = TtlClamp::default();
        clamp.trace_began();
        ends_at.iter().for_each(|last| clamp.ended(router(*last)));
        let answers = (1..).zip(answers).filter_map(|(ttl, last)| Some((ttl, router((*last)?))));
        let found = clamp.trace_ended(answers, false);
        assert_eq!(clamp.is_ended(), !ends_at.is_empty());
        found
    }

    #[test]
    fn probe_that_arrives_with_a_larger_ttl_was_raised() {
        let mut clamp = TtlClamp::default();
        assert_eq!(clamp.reached(DESTINATION, 62), None);
        assert_eq!(clamp.reached(5, 5), None, "one contradiction");
        assert_eq!(clamp.reached(5, 62), Some(TtlRewriting::Raised));
    }

    #[test]
    fn two_limited_probes_in_a_row_contradict_the_unlimited_one_if_its_ttl_was_lowered() {
        let lowered = Some(TtlRewriting::Lowered { router: None });
        let mut clamp = TtlClamp::default();
        // Set to 4 by the first of three routers.
        assert_eq!(clamp.reached(DESTINATION, 2), None);
        assert_eq!(clamp.reached(9, 2), None);
        assert_eq!(clamp.reached(4, 2), lowered);
        clamp.trace_began();
        assert_eq!([clamp.reached(9, 2), clamp.reached(4, 2)], [None, None], "no unlimited one to compare");
    }

    #[test]
    fn routes_of_other_lengths_contradict_nothing() {
        let mut clamp = TtlClamp::default();
        assert_eq!(clamp.reached(DESTINATION, DESTINATION - 30), None);
        for (sent, arrived) in [(4, 1), (5, 2), (30, 27)] {
            assert_eq!(clamp.reached(sent, arrived), None, "3 routers instead of 30");
        }
    }

    #[test]
    fn all_probes_end_at_one_router_if_their_ttl_is_lowered() {
        let lowered = Some(TtlRewriting::Lowered { router: Some(router(4)) });
        assert_eq!(found(&[4], &[Some(1), Some(4), Some(4), Some(4)]), lowered);
        assert_eq!(found(&[4], &[None, Some(4), Some(4), None]), lowered);
    }

    #[test]
    fn single_answer_is_too_few_to_show_a_clamp() {
        assert_eq!(found(&[4], &[Some(1), Some(4)]), None);
        assert_eq!(found(&[], &[Some(1), Some(4), Some(4)]), None, "unlimited probes do not end");
    }

    #[test]
    fn routing_loop_is_no_clamp() {
        let (a, b) = (Some(2), Some(3));
        assert_eq!(found(&[2], &[Some(1), a, b, a, b, a]), None);
        assert_eq!(found(&[2, 3], &[Some(1), a, a]), None, "two routers end unlimited probes");
        assert_eq!(found(&[2], &[Some(1), a, None, a, None, a]), None, "one of them is silent");
        assert_eq!(found(&[2], &[Some(1), a, None, None, a]), None, "two of them are silent");
    }

    #[test]
    fn rewriting_is_reported_again_only_after_a_trace_without_it() {
        let mut clamp = TtlClamp::default();
        let at = Timestamp::from_nanos(1_000_000_000_000);
        assert!(clamp.found(at) && clamp.is_found());
        clamp.expire(at + CLAMPED_FOR - Duration::from_nanos(1));
        assert!(clamp.is_found());
        clamp.expire(at + CLAMPED_FOR);
        assert!(!clamp.is_found());
        assert!(!clamp.found(at + CLAMPED_FOR), "it is still there");
        for (index, (answers, is_reached, is_gone)) in
            (1..).zip([(1, false, false), (0, true, false), (1, true, true)])
        {
            clamp.expire(at + CLAMPED_FOR * (index + 1));
            clamp.trace_ended((1..=answers).map(|ttl| (ttl, router(ttl))), is_reached);
            assert_eq!(clamp.found(at + CLAMPED_FOR * (index + 1)), is_gone, "{answers} {is_reached}");
        }
    }

    #[test]
    fn rewriting_is_named_and_has_the_router_at_which_probes_end() {
        let lowered = |router| TtlRewriting::Lowered { router };
        for (rewriting, name, at) in [
            (TtlRewriting::Raised, "raised", None),
            (lowered(None), "lowered", None),
            (lowered(Some(router(4))), "lowered", Some(router(4))),
        ] {
            assert_eq!((rewriting.as_str(), rewriting.router()), (name, at));
        }
    }
}
