//! The route of a flow: which routers it passes, and when that has changed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::schedule::mix;
use crate::time::Timestamp;

/// A route: the routers of a flow in the order of their TTL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Identifies the route. It stays the same when hops become known that were unknown.
    pub id: RouteId,
    /// The hop with TTL `n` is at index `n − 1`.
    pub hops: Vec<HopRouter>,
    /// Number of routers up to the destination; `None` if the destination does not answer.
    pub routers: Option<u8>,
}

/// Identifies a route: 48 bits, so that a floating-point number holds it exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteId(u64);

impl RouteId {
    /// The number, below 2⁴⁸.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RouteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}", self.0)
    }
}

/// The router at a hop of a route.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum HopRouter {
    /// No router has answered. Any router fits.
    #[default]
    Unknown,
    /// One router.
    Single(IpAddr),
    /// Several routers, between which packets of one flow alternate. They do not identify the route.
    Balanced(BTreeSet<IpAddr>),
}

impl HopRouter {
    /// Whether both may be the same hop.
    fn fits(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Single(one), Self::Single(other)) => one == other,
            (Self::Balanced(set), Self::Single(one)) | (Self::Single(one), Self::Balanced(set)) => {
                set.contains(one)
            }
            (Self::Unknown, _) | (_, Self::Unknown) | (Self::Balanced(_), Self::Balanced(_)) => true,
        }
    }
}

/// What an observation says about the route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteUpdate {
    /// The flow takes another route, which it has not taken before.
    Changed {
        /// The earlier route.
        from: Route,
        /// The current route.
        to: Route,
    },
    /// The flow takes a route again that it has taken before.
    Restored {
        /// The earlier route.
        from: Route,
        /// The current route.
        to: Route,
    },
    /// Packets of the flow alternate between routers.
    LoadBalanced {
        /// The hop.
        ttl: u8,
        /// The routers so far.
        routers: BTreeSet<IpAddr>,
    },
}

/// Decides from the observations of one flow whether its route has changed.
///
/// A missing answer is never a change. A different router, or a different number of routers, is a candidate
/// for a change, and is confirmed by [`CONFIRMATIONS`] observations that all differ from the known route in
/// the same way. A single observation of the known route instead shows that packets of the flow alternate
/// between routers: the hop is then balanced and no longer takes part in the comparison. Two routers that
/// share the packets of a flow equally look like a change with probability 2⁻¹⁶.
#[derive(Debug)]
pub(super) struct RouteTracker {
    current: Option<Route>,
    /// The route of packets with earlier ports, which is shown until the current one is known.
    of_earlier_ports: Option<Route>,
    candidate: Option<Candidate>,
    /// Whether the number of routers varies from packet to packet.
    is_length_balanced: bool,
    /// Earlier routes, the latest last.
    earlier: VecDeque<Route>,
    /// When the latest change was first observed.
    changed_since: Timestamp,
}

/// Observations that differ from the current route.
#[derive(Debug)]
struct Candidate {
    since: Timestamp,
    /// All answers since then, by TTL.
    hops: BTreeMap<u8, BTreeSet<IpAddr>>,
    /// Number of answers of other routers, by TTL.
    differing: BTreeMap<u8, u32>,
    /// Another number of routers, and how often it was observed.
    routers: Option<(u8, u32)>,
}

/// Observations that confirm a change of a route. Chosen: 16, so that the alternation of a flow
/// between two routers is mistaken for a change once in 65,536 times.
pub const CONFIRMATIONS: u32 = 16;

/// A candidate that is not confirmed after this time is discarded. Chosen: enough for the confirmations of a
/// router that answers a quarter of what Linux answers by default.
const CANDIDATE_AGE_MAX: Duration = Duration::from_secs(80);

/// Number of earlier routes that are recognized. At the limit the oldest is forgotten; if the flow takes it
/// again, it is a new route.
const EARLIER_MAX: usize = 16;

/// Number of routers of a balanced hop that are kept; further ones are ignored (the limit of equal-cost paths
/// in common routers is 16 to 64).
const BALANCED_MAX: usize = 64;

impl RouteTracker {
    pub(super) fn new() -> Self {
        Self {
            current: None,
            of_earlier_ports: None,
            candidate: None,
            is_length_balanced: false,
            earlier: VecDeque::new(),
            changed_since: Timestamp::from_nanos(0),
        }
    }

    /// The current route; `None` before the first complete trace with the current ports.
    pub(super) fn current(&self) -> Option<&Route> {
        self.current.as_ref()
    }

    /// When the latest change was first observed.
    pub(super) fn changed_since(&self) -> Timestamp {
        self.changed_since
    }

    /// The router at a hop of the current route.
    pub(super) fn router(&self, ttl: u8) -> &HopRouter {
        let hop = self.current.as_ref().and_then(|route| route.hops.get(usize::from(ttl).checked_sub(1)?));
        hop.unwrap_or(&HopRouter::Unknown)
    }

    /// The packets of the flow have other ports from now on.
    pub(super) fn replaced(&mut self) {
        let of_earlier_ports = self.current.take().or_else(|| self.of_earlier_ports.take());
        *self = Self { of_earlier_ports, ..Self::new() };
    }

    /// The current route, or else that of packets with earlier ports; `None` before the first complete trace.
    pub(super) fn shown(&self) -> Option<&Route> {
        self.current.as_ref().or(self.of_earlier_ports.as_ref())
    }

    /// Sets the first route of the current ports, after a complete trace. Has no effect once it is known.
    pub(super) fn establish(&mut self, hops: Vec<HopRouter>, routers: Option<u8>) {
        self.current.get_or_insert_with(|| Route { id: route_id(&hops, routers), hops, routers });
    }

    /// Hops that must be probed to confirm or refute a change.
    pub(super) fn unconfirmed_hops(&self) -> impl Iterator<Item = u8> + '_ {
        self.candidate.iter().flat_map(|candidate| candidate.differing.keys().copied())
    }

    /// Whether the number of routers must be observed to confirm or refute a change.
    pub(super) fn has_unconfirmed_length(&self) -> bool {
        self.candidate.as_ref().is_some_and(|candidate| candidate.routers.is_some())
    }

    /// The destination was reached behind fewer routers than the route has, all of whose other hops have
    /// never answered: they do not exist, and the probe that searched for the destination there was lost.
    /// Returns false if the route has them.
    pub(super) fn shorten(&mut self, routers: u8) -> bool {
        let Some(route) = &mut self.current else { return false };
        let kept = usize::from(routers);
        let is_too_long = route.routers.is_some_and(|known| routers < known);
        let has_answered = route.hops.iter().skip(kept).any(|hop| *hop != HopRouter::Unknown);
        if !is_too_long || has_answered {
            return false;
        }
        route.hops.truncate(kept);
        route.routers = Some(routers);
        self.candidate = None;
        true
    }

    /// The number of routers that is not confirmed yet.
    pub(super) fn unconfirmed_length(&self) -> Option<u8> {
        self.candidate.as_ref()?.routers.map(|(routers, _)| routers)
    }

    /// Forgets the number of routers, hops behind the last known router, and observations that differ from
    /// the current route.
    pub(super) fn forget_length(&mut self) {
        self.candidate = None;
        if let Some(route) = &mut self.current {
            route.routers = None;
            let known = route.hops.iter().rposition(|hop| *hop != HopRouter::Unknown);
            route.hops.truncate(known.map_or(0, |index| index + 1));
        }
    }

    /// Discards a candidate that could not be confirmed in time.
    pub(super) fn expire(&mut self, now: Timestamp) {
        if self.candidate.as_ref().is_some_and(|candidate| now.since(candidate.since) > CANDIDATE_AGE_MAX) {
            self.candidate = None;
        }
    }

    /// A router answered a probe with this TTL.
    pub(super) fn answered(&mut self, ttl: u8, router: IpAddr, at: Timestamp) -> Option<RouteUpdate> {
        let route = self.current.as_mut()?;
        let index = usize::from(ttl).checked_sub(1)?;
        if let Some(candidate) = &mut self.candidate {
            candidate.hops.entry(ttl).or_default().insert(router);
        }
        // The route ends before this hop: another one is longer, and not confirmed yet.
        if route.routers.is_some_and(|routers| ttl > routers) {
            return None;
        }
        if route.hops.len() <= index {
            route.hops.resize(index + 1, HopRouter::Unknown);
        }
        match &mut route.hops[index] {
            hop @ HopRouter::Unknown => {
                *hop = HopRouter::Single(router);
                None
            }
            HopRouter::Balanced(routers) => {
                if routers.len() < BALANCED_MAX {
                    routers.insert(router);
                }
                None
            }
            HopRouter::Single(known) if *known == router => self.refute_hop(ttl),
            HopRouter::Single(_) => {
                let candidate = self.candidate.get_or_insert_with(|| Candidate::new(at));
                candidate.hops.entry(ttl).or_default().insert(router);
                *candidate.differing.entry(ttl).or_default() += 1;
                self.conclude()
            }
        }
    }

    /// The destination answered, which is behind this number of routers.
    pub(super) fn reached(&mut self, routers: u8, at: Timestamp) -> Option<RouteUpdate> {
        let route = self.current.as_mut()?;
        if self.is_length_balanced {
            return None;
        }
        match route.routers {
            None => {
                route.routers = Some(routers);
                None
            }
            Some(known) if known == routers => {
                let candidate = self.candidate.as_mut()?;
                self.is_length_balanced = candidate.routers.take().is_some();
                self.discard_empty_candidate();
                None
            }
            Some(_) => {
                let candidate = self.candidate.get_or_insert_with(|| Candidate::new(at));
                candidate.routers = match candidate.routers {
                    Some((other, count)) if other == routers => Some((routers, count + 1)),
                    // A third length in a row is no confirmation.
                    Some(_) | None => Some((routers, 1)),
                };
                self.conclude()
            }
        }
    }

    /// The known router answered at a hop where another one did: packets alternate between them.
    fn refute_hop(&mut self, ttl: u8) -> Option<RouteUpdate> {
        let candidate = self.candidate.as_mut()?;
        candidate.differing.remove(&ttl)?;
        let routers = candidate.hops.get(&ttl).cloned().unwrap_or_default();
        self.discard_empty_candidate();
        Some(self.balance(ttl, routers))
    }

    fn balance(&mut self, ttl: u8, mut routers: BTreeSet<IpAddr>) -> RouteUpdate {
        let route = self.current.as_mut().expect("only a known route has balanced hops");
        let hop = &mut route.hops[usize::from(ttl) - 1];
        if let HopRouter::Single(known) = hop {
            routers.insert(*known);
        }
        *hop = HopRouter::Balanced(routers.clone());
        RouteUpdate::LoadBalanced { ttl, routers }
    }

    fn discard_empty_candidate(&mut self) {
        if self
            .candidate
            .as_ref()
            .is_some_and(|candidate| candidate.differing.is_empty() && candidate.routers.is_none())
        {
            self.candidate = None;
        }
    }

    /// Ends the candidate if there are enough observations.
    fn conclude(&mut self) -> Option<RouteUpdate> {
        let candidate = self.candidate.as_mut()?;
        // Of several new routers at one hop the known one may be another, which did not answer by chance.
        let scattered = candidate.differing.iter().find(|(ttl, count)| {
            **count >= CONFIRMATIONS && candidate.hops.get(ttl).is_some_and(|routers| routers.len() > 1)
        });
        if let Some((ttl, _)) = scattered {
            let ttl = *ttl;
            candidate.differing.remove(&ttl);
            let routers = candidate.hops.get(&ttl).cloned().unwrap_or_default();
            self.discard_empty_candidate();
            return Some(self.balance(ttl, routers));
        }
        let is_one = |ttl: &u8| candidate.hops.get(ttl).is_some_and(|routers| routers.len() == 1);
        let by_hop: u32 =
            candidate.differing.iter().filter(|(ttl, _)| is_one(ttl)).map(|(_, count)| *count).sum();
        if by_hop + candidate.routers.map_or(0, |(_, count)| count) < CONFIRMATIONS {
            return None;
        }
        let candidate = self.candidate.take()?;
        self.changed_since = candidate.since;
        Some(self.change(candidate))
    }

    fn change(&mut self, candidate: Candidate) -> RouteUpdate {
        let from = self.current.take().expect("only a known route can change");
        let routers = candidate.routers.map(|(routers, _)| routers).or(from.routers);
        let first = candidate.differing.keys().next().copied();
        let mut hops = from.hops.clone();
        // What lies behind a changed router, or on a route of another length, is known only if it answered
        // since.
        let kept = match (first, candidate.routers) {
            (Some(first), _) => usize::from(first) - 1,
            (None, Some(_)) => 0,
            (None, None) => hops.len(),
        };
        hops.iter_mut().skip(kept).for_each(|hop| *hop = HopRouter::Unknown);
        for (ttl, found) in candidate.hops {
            let index = usize::from(ttl) - 1;
            if index >= kept {
                hops.resize(hops.len().max(index + 1), HopRouter::Unknown);
                hops[index] = match (found.len(), found.first()) {
                    (1, Some(router)) => HopRouter::Single(*router),
                    _ => HopRouter::Balanced(found),
                };
            }
        }
        if let Some(routers) = routers {
            hops.resize(usize::from(routers), HopRouter::Unknown);
        }
        let known = self.earlier.iter().position(|route| {
            route.routers == routers && route.hops.iter().zip(&hops).all(|(one, other)| one.fits(other))
        });
        let to = match known.and_then(|index| self.earlier.remove(index)) {
            Some(mut route) => {
                for (hop, found) in route.hops.iter_mut().zip(hops) {
                    if *hop == HopRouter::Unknown {
                        *hop = found;
                    }
                }
                route
            }
            None => Route { id: route_id(&hops, routers), hops, routers },
        };
        self.current = Some(to.clone());
        if self.earlier.len() == EARLIER_MAX {
            self.earlier.pop_front();
        }
        self.earlier.push_back(from.clone());
        match known {
            Some(_) => RouteUpdate::Restored { from, to },
            None => RouteUpdate::Changed { from, to },
        }
    }
}

impl Candidate {
    fn new(since: Timestamp) -> Self {
        Self { since, hops: BTreeMap::new(), differing: BTreeMap::new(), routers: None }
    }
}

impl Route {
    /// The first TTL at which this route has another router than all `others`; `None` if there is none, or if
    /// no router is known there.
    #[must_use]
    pub fn leaves_at(&self, others: &[&Self]) -> Option<u8> {
        let single = |route: &Self, index: usize| match route.hops.get(index)? {
            HopRouter::Single(router) => Some(*router),
            HopRouter::Unknown | HopRouter::Balanced(_) => None,
        };
        let (_, ttl) = (0..self.hops.len()).zip(1..).find(|(index, _)| {
            let mut known = others.iter().filter_map(|other| single(other, *index)).peekable();
            let own = single(self, *index);
            own.is_some() && known.peek().is_some() && known.all(|other| Some(other) != own)
        })?;
        Some(ttl)
    }
}

fn route_id(hops: &[HopRouter], routers: Option<u8>) -> RouteId {
    let mut hash = mix(routers.map_or(0, |routers| u64::from(routers) + 1));
    for (ttl, hop) in (1_u64..).zip(hops) {
        if let HopRouter::Single(router) = hop {
            let bits = match router {
                IpAddr::V4(address) => u128::from(address.to_bits()),
                IpAddr::V6(address) => address.to_bits(),
            };
            #[expect(clippy::cast_possible_truncation, reason = "both halves are hashed")]
            let [high, low] = [(bits >> 64) as u64, bits as u64];
            hash = mix(mix(mix(hash ^ ttl) ^ high) ^ low);
        }
    }
    RouteId(hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + seconds * 1_000_000_000)
    }

    fn router(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    /// A tracker that knows the route 1, 2, 3 to a destination behind three routers.
    fn tracker() -> RouteTracker {
        let mut tracker = RouteTracker::new();
        let hops = [1, 2, 3].map(|last| HopRouter::Single(router(last)));
        tracker.establish(hops.to_vec(), Some(3));
        tracker
    }

    #[test]
    fn hops_that_never_answered_are_removed_if_the_destination_is_nearer() {
        let mut tracker = RouteTracker::new();
        let hop = |last: u8| HopRouter::Single([10, 0, 0, last].into());
        tracker.establish(vec![hop(1), hop(2), HopRouter::Unknown, HopRouter::Unknown], Some(4));
        assert!(!tracker.shorten(1) && !tracker.shorten(4) && !tracker.shorten(5));
        assert!(tracker.shorten(3));
        assert_eq!(tracker.current().map(|route| (route.routers, route.hops.len())), Some((Some(3), 3)));
    }

    #[test]
    fn route_leaves_the_others_where_it_shares_no_router_with_any_of_them() {
        let route = |routers: &[u8]| {
            let hop = |last: &u8| match last {
                0 => HopRouter::Unknown,
                99 => HopRouter::Balanced(BTreeSet::from([router(7), router(8)])),
                last => HopRouter::Single(router(*last)),
            };
            let hops: Vec<HopRouter> = routers.iter().map(hop).collect();
            Route { id: route_id(&hops, None), hops, routers: None }
        };
        let flow = route(&[1, 2, 3, 4]);
        let leaves_at = |others: &[&[u8]]| {
            let others: Vec<Route> = others.iter().map(|hops| route(hops)).collect();
            flow.leaves_at(&others.iter().collect::<Vec<_>>())
        };
        assert_eq!(leaves_at(&[&[1, 2, 9, 4], &[1, 2, 8, 4]]), Some(3));
        assert_eq!(leaves_at(&[&[1, 2, 9, 4], &[1, 2, 3, 4]]), None, "one other flow takes the same route");
        assert_eq!(leaves_at(&[&[1, 9, 3, 4], &[1, 2, 8, 9]]), None, "never alone");
        assert_eq!(leaves_at(&[&[1, 0, 99, 9], &[1]]), Some(4), "unknown and balanced hops are not compared");
        assert_eq!(leaves_at(&[]), None);
    }

    #[test]
    fn change_needs_sixteen_answers_of_one_other_router() {
        let mut tracker = tracker();
        let known = tracker.current().unwrap().clone();
        for _ in 1..CONFIRMATIONS {
            assert_eq!(tracker.answered(2, router(9), at(0)), None);
            assert_eq!(tracker.unconfirmed_hops().collect::<Vec<_>>(), [2]);
        }
        let Some(RouteUpdate::Changed { from, to }) = tracker.answered(2, router(9), at(0)) else {
            panic!("the route has changed")
        };
        assert_eq!(from, known);
        assert_ne!(to.id, from.id);
        let hops = [HopRouter::Single(router(1)), HopRouter::Single(router(9)), HopRouter::Unknown];
        assert_eq!((to.hops.as_slice(), to.routers), (hops.as_slice(), Some(3)));
        assert_eq!(tracker.unconfirmed_hops().count(), 0);
    }

    #[test]
    fn change_dates_from_the_first_answer_that_differed_since_the_last_known_one() {
        let mut tracker = tracker();
        assert_eq!(tracker.answered(2, router(9), at(1)), None);
        let balanced = tracker.answered(2, router(2), at(2));
        assert!(matches!(balanced, Some(RouteUpdate::LoadBalanced { ttl: 2, .. })), "{balanced:?}");
        for second in 3..18 {
            assert_eq!(tracker.answered(3, router(8), at(second)), None);
        }
        let changed = tracker.answered(3, router(8), at(18));
        assert!(matches!(changed, Some(RouteUpdate::Changed { .. })), "{changed:?}");
        assert_eq!(tracker.changed_since(), at(3));
    }

    #[test]
    fn forgotten_length_leaves_the_hops_up_to_the_last_known_router() {
        let hop = |last: u8| HopRouter::Single(router(last));
        for (hops, kept) in [
            (vec![hop(1), HopRouter::Unknown, hop(3), HopRouter::Unknown, HopRouter::Unknown], 3),
            (vec![hop(1), hop(2)], 2),
            (vec![HopRouter::Unknown; 3], 0),
        ] {
            let mut tracker = RouteTracker::new();
            let known = hops[..kept].to_vec();
            tracker.establish(hops, Some(5));
            assert_eq!(tracker.reached(7, at(0)), None);
            tracker.forget_length();
            let route = tracker.current().unwrap();
            assert_eq!((&route.hops, route.routers), (&known, None));
            assert!(!tracker.has_unconfirmed_length());
        }
    }

    #[test]
    fn answers_at_several_hops_and_of_the_destination_confirm_together() {
        let mut tracker = tracker();
        for _ in 0..6 {
            assert_eq!(tracker.answered(2, router(8), at(0)), None);
        }
        for _ in 0..6 {
            assert_eq!(tracker.answered(3, router(9), at(0)), None);
        }
        for _ in 0..3 {
            assert_eq!(tracker.reached(4, at(0)), None);
            assert!(tracker.has_unconfirmed_length());
        }
        let Some(RouteUpdate::Changed { to, .. }) = tracker.reached(4, at(0)) else { panic!("confirmed") };
        let [single, unknown] = [|last| HopRouter::Single(router(last)), |_| HopRouter::Unknown];
        assert_eq!(to.hops, [single(1), single(8), single(9), unknown(0)]);
        assert_eq!(to.routers, Some(4));
    }

    #[test]
    fn router_behind_the_end_of_the_route_is_a_hop_of_the_longer_one_only() {
        let mut tracker = tracker();
        assert_eq!(tracker.reached(4, at(0)), None);
        assert_eq!(tracker.answered(4, router(4), at(0)), None);
        assert_eq!(tracker.current().unwrap().hops.len(), 3);
        let Some(RouteUpdate::Changed { from, to }) =
            (1..CONFIRMATIONS).find_map(|_| tracker.reached(4, at(0)))
        else {
            panic!("confirmed")
        };
        assert_eq!((from.routers, from.hops.len()), (Some(3), 3));
        assert_eq!((to.routers, to.hops.len()), (Some(4), 4));
        assert_eq!(to.hops[3], HopRouter::Single(router(4)));
    }

    #[test]
    fn answer_of_the_known_router_shows_a_balanced_hop_and_no_change() {
        let mut tracker = tracker();
        let id = tracker.current().unwrap().id;
        for _ in 1..CONFIRMATIONS {
            assert_eq!(tracker.answered(2, router(9), at(0)), None);
        }
        let routers = BTreeSet::from([router(2), router(9)]);
        assert_eq!(
            tracker.answered(2, router(2), at(0)),
            Some(RouteUpdate::LoadBalanced { ttl: 2, routers })
        );
        for last in [2, 9, 9, 7].repeat(20) {
            assert_eq!(tracker.answered(2, router(last), at(1)), None);
        }
        assert_eq!(tracker.current().unwrap().id, id);
        let all = BTreeSet::from([router(2), router(7), router(9)]);
        assert_eq!(tracker.router(2), &HopRouter::Balanced(all));
    }

    #[test]
    fn many_other_routers_at_one_hop_are_a_balanced_hop() {
        let mut tracker = tracker();
        for last in 10..10 + 15 {
            assert_eq!(tracker.answered(2, router(last), at(0)), None);
        }
        let update = tracker.answered(2, router(30), at(0));
        assert!(matches!(update, Some(RouteUpdate::LoadBalanced { ttl: 2, .. })), "{update:?}");
        assert_eq!(tracker.unconfirmed_hops().count(), 0);
    }

    #[test]
    fn varying_number_of_routers_is_no_change() {
        let mut tracker = tracker();
        for _ in 1..CONFIRMATIONS {
            assert_eq!(tracker.reached(4, at(0)), None);
        }
        assert_eq!(tracker.reached(3, at(0)), None);
        assert!(!tracker.has_unconfirmed_length());
        for _ in 0..100 {
            assert_eq!(tracker.reached(4, at(0)), None);
        }
    }

    #[test]
    fn route_that_was_taken_before_keeps_its_id() {
        let mut tracker = tracker();
        let first = tracker.current().unwrap().id;
        let change = |tracker: &mut RouteTracker, last| {
            (0..CONFIRMATIONS).filter_map(|_| tracker.answered(2, router(last), at(0))).next().unwrap()
        };
        let RouteUpdate::Changed { to: second, .. } = change(&mut tracker, 9) else { panic!("a new route") };
        assert_eq!(tracker.answered(3, router(3), at(0)), None);
        let RouteUpdate::Restored { to, .. } = change(&mut tracker, 2) else { panic!("a known route") };
        assert_eq!(to.id, first);
        assert_eq!(to.hops, [1, 2, 3].map(|last| HopRouter::Single(router(last))), "nothing is forgotten");
        let RouteUpdate::Restored { from, to } = change(&mut tracker, 9) else { panic!("a known route") };
        assert_eq!((from.id, to.id), (first, second.id), "the hop that became known does not change it");
    }

    #[test]
    fn missing_answers_and_unknown_hops_are_no_change() {
        let mut tracker = RouteTracker::new();
        assert_eq!(tracker.answered(1, router(1), at(0)), None, "not established");
        tracker.establish(vec![HopRouter::Single(router(1)), HopRouter::Unknown], None);
        let id = tracker.current().unwrap().id;
        assert_eq!(tracker.answered(2, router(2), at(0)), None);
        assert_eq!(tracker.reached(2, at(0)), None);
        let route = tracker.current().unwrap();
        assert_eq!((route.id, route.routers), (id, Some(2)));
        assert_eq!(route.hops[1], HopRouter::Single(router(2)));
    }

    #[test]
    fn unconfirmed_candidate_expires() {
        let mut tracker = tracker();
        for _ in 1..CONFIRMATIONS {
            assert_eq!(tracker.answered(2, router(9), at(0)), None);
        }
        tracker.expire(at(80));
        assert_eq!(tracker.unconfirmed_hops().count(), 1);
        tracker.expire(at(81));
        assert_eq!(tracker.unconfirmed_hops().count(), 0);
        assert_eq!(tracker.answered(2, router(9), at(81)), None, "it begins again");
    }

    #[test]
    fn id_depends_on_every_router_its_place_and_the_number_of_routers() {
        let hops = |routers: &[&str]| -> Vec<HopRouter> {
            routers.iter().map(|router| HopRouter::Single(router.parse().unwrap())).collect()
        };
        let ids = [
            route_id(&[], None),
            route_id(&[], Some(0)),
            route_id(&hops(&["192.0.2.1", "192.0.2.2"]), Some(2)),
            route_id(&hops(&["192.0.2.9", "192.0.2.2"]), Some(2)),
            route_id(&hops(&["192.0.2.2", "192.0.2.1"]), Some(2)),
            route_id(&hops(&["192.0.2.1", "192.0.2.2"]), Some(3)),
            route_id(&hops(&["2001:db8:1::1"]), Some(1)),
            route_id(&hops(&["2001:db8:2::1"]), Some(1)),
            route_id(&[&[HopRouter::Unknown][..], &hops(&["192.0.2.1"])].concat(), Some(2)),
            route_id(&hops(&["192.0.2.1"]), Some(2)),
        ];
        let numbers: BTreeSet<u64> = ids.iter().map(|id| id.get()).collect();
        assert_eq!(numbers.len(), ids.len());
        assert!(numbers.iter().all(|number| *number < 1 << 48));
        assert_eq!(RouteId(0xabc).to_string(), "000000000abc");
    }

    #[test]
    fn ids_of_similar_routes_differ() {
        let addresses = |index: u16| -> [IpAddr; 3] {
            let last = u8::try_from(index).unwrap();
            [
                router(last),
                [0x2001, 0xdb8, 0, index, 0, 0, 0, 1].into(),
                [0x2001, 0xdb8, 0, 0, 0, 0, 0, index].into(),
            ]
        };
        let (mut count, mut ids) = (0, BTreeSet::new());
        for address in (1..=16).flat_map(addresses) {
            for ttl in 1..=16 {
                for routers in ttl..=16 {
                    let mut hops = vec![HopRouter::Unknown; routers];
                    hops[ttl - 1] = HopRouter::Single(address);
                    ids.insert(route_id(&hops, u8::try_from(routers).ok()));
                    count += 1;
                }
            }
        }
        assert_eq!(ids.len(), count);
    }

    #[test]
    fn lengths_that_change_with_every_reply_are_no_change() {
        let mut tracker = tracker();
        for routers in [4, 5].repeat(20) {
            assert_eq!(tracker.reached(routers, at(0)), None);
        }
    }

    #[test]
    fn balanced_hop_keeps_64_routers() {
        let mut tracker = tracker();
        tracker.answered(2, router(9), at(0));
        tracker.answered(2, router(2), at(0));
        (10..110).for_each(|last| assert_eq!(tracker.answered(2, router(last), at(0)), None));
        let HopRouter::Balanced(routers) = tracker.router(2) else { panic!("it is balanced") };
        assert_eq!(routers.len(), 64);
    }

    #[test]
    fn sixteen_earlier_routes_are_recognised() {
        for (others, is_known) in [(16, true), (17, false)] {
            let mut tracker = tracker();
            let mut change = |last| {
                (0..CONFIRMATIONS).filter_map(|_| tracker.answered(2, router(last), at(0))).next().unwrap()
            };
            (0..others).for_each(|other| assert!(matches!(change(100 + other), RouteUpdate::Changed { .. })));
            assert_eq!(matches!(change(2), RouteUpdate::Restored { .. }), is_known, "{others} others");
        }
    }
}
