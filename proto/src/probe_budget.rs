//! Limits for probes whose TTL expires at a router, so that no router is asked faster than it answers.
//!
//! Routers limit the ICMP errors that they send: Linux sends six to a destination in a burst and then one per
//! second. Faster probes are not answered, which looks like loss at that hop. All flows of an agent therefore
//! share one [`ProbeBudget`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::time::Timestamp;
use crate::token_bucket::TokenBucket;
pub use crate::token_bucket::TokenRate;

/// The limits of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeLimits {
    /// Probes that one IPv4 router answers.
    pub router_v4: TokenRate,
    /// Probes that one IPv6 router answers.
    pub router_v6: TokenRate,
    /// All probes of the agent.
    pub agent: TokenRate,
    /// All replies whose TTL is limited for the traces of other agents.
    pub others: TokenRate,
}

impl ProbeLimits {
    fn router(self, is_v4: bool) -> TokenRate {
        if is_v4 { self.router_v4 } else { self.router_v6 }
    }
}

impl Default for ProbeLimits {
    /// Four fifths of what Linux routers answer by default: 1/s over IPv4 (`net.ipv4.icmp_ratelimit`), 10/s
    /// over IPv6 (`net.ipv6.icmp.ratelimit`), after a burst of six. The limit of the agent is chosen: 50
    /// probes per second complete four traces of twelve hops per second.
    fn default() -> Self {
        Self {
            router_v4: TokenRate { spacing: Duration::from_millis(1_250), burst: 5 },
            router_v6: TokenRate { spacing: Duration::from_millis(125), burst: 5 },
            agent: TokenRate { spacing: Duration::from_millis(20), burst: 50 },
            others: TokenRate { spacing: Duration::from_millis(40), burst: 25 },
        }
    }
}

/// Which router a probe is expected to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Expected {
    /// A router that answered at this position before.
    Router(IpAddr),
    /// Not known yet. It may be the one that answered the last probe with this TTL, as at the first hops.
    Unknown {
        /// The TTL of the probe.
        ttl: u8,
        /// Whether the probe is an IPv4 packet.
        is_v4: bool,
    },
}

impl Expected {
    fn is_v4(self) -> bool {
        match self {
            Self::Router(address) => address.is_ipv4(),
            Self::Unknown { is_v4, .. } => is_v4,
        }
    }
}

/// Why a probe must wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Deferral {
    /// The router would not answer yet.
    Router,
    /// The agent as a whole sends too fast.
    Agent,
}

impl Deferral {
    /// All variants, in the order of their declaration.
    pub const ALL: [Self; 2] = [Self::Router, Self::Agent];
}

/// The token buckets of an agent's probes: one for each router and one for all.
#[derive(Debug)]
pub struct ProbeBudget {
    limits: ProbeLimits,
    agent: TokenBucket,
    others: TokenBucket,
    routers: BTreeMap<Expected, TokenBucket>,
    generation: u64,
    /// The router that answered last, by TTL and by whether the probe was an IPv4 packet.
    latest: BTreeMap<(u8, bool), IpAddr>,
}

impl ProbeBudget {
    /// Number of routers whose bucket is kept. At the limit the full buckets are discarded, which loses
    /// nothing; if none is full, further routers are only limited by the rate of the agent.
    pub const ROUTERS: usize = 16_384;

    /// How long other agents may have to wait for a router. Chosen: 25 s, what a reply can tell them.
    pub const HORIZON: Duration = Duration::from_secs(25);

    /// Full buckets.
    #[must_use]
    pub fn new(limits: ProbeLimits) -> Self {
        Self {
            limits,
            agent: TokenBucket::default(),
            others: TokenBucket::default(),
            routers: BTreeMap::new(),
            generation: 0,
            latest: BTreeMap::new(),
        }
    }

    /// Replaces the limits. If they differ, no [reserved](Self::reserve) time is valid any more, because it
    /// follows from another rate: probes that wait must reserve again.
    pub fn set_limits(&mut self, limits: ProbeLimits, now: Timestamp) {
        if limits == self.limits {
            return;
        }
        self.limits = limits;
        self.generation += 1;
        self.agent.cancel(limits.agent, now);
        self.others.cancel(limits.others, now);
        for (router, bucket) in &mut self.routers {
            bucket.cancel(limits.router(router.is_v4()), now);
        }
    }

    /// Another number after each change of the limits.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes a token for a probe. Returns when it may be sent: `now`, or later if others come first, and then
    /// why. Probes of all flows wait in one queue for each router, so each gets its turn.
    pub fn reserve(&mut self, expected: Expected, now: Timestamp) -> (Timestamp, Option<Deferral>) {
        let by_agent = self.agent.reserve(self.limits.agent, now);
        let by_router = self.router(expected, now).map_or(now, |(bucket, rate)| bucket.reserve(rate, now));
        let reason = if by_router >= by_agent { Deferral::Router } else { Deferral::Agent };
        let at = by_router.max(by_agent);
        (at, (at > now).then_some(reason))
    }

    /// Takes a token for a probe that is sent now or never.
    ///
    /// # Errors
    /// If it would have to wait, why. No token is taken then, so that the queues do not grow by such probes.
    pub fn take(&mut self, expected: Expected, now: Timestamp) -> Result<(), Deferral> {
        if self.agent.available_at(self.limits.agent, now) > now {
            return Err(Deferral::Agent);
        }
        if let Some((bucket, rate)) = self.router(expected, now) {
            if bucket.available_at(rate, now) > now {
                return Err(Deferral::Router);
            }
            bucket.reserve(rate, now);
        }
        self.agent.reserve(self.limits.agent, now);
        Ok(())
    }

    /// Takes a token for a reply whose TTL is limited for another agent, in the same queues of the routers.
    /// Returns when it may be sent.
    ///
    /// # Errors
    /// If that is later than [`Self::HORIZON`], the time. No token is taken then, so that other agents cannot
    /// fill the queues.
    pub fn reserve_for_other(&mut self, expected: Expected, now: Timestamp) -> Result<Timestamp, Timestamp> {
        let by_others = self.others.available_at(self.limits.others, now);
        let by_router =
            self.router(expected, now).map_or(now, |(bucket, rate)| bucket.available_at(rate, now));
        let at = by_router.max(by_others);
        if at.since(now) > Self::HORIZON {
            return Err(at);
        }
        self.others.reserve(self.limits.others, now);
        if let Some((bucket, rate)) = self.router(expected, now) {
            bucket.reserve(rate, now);
        }
        Ok(at)
    }

    /// Whether this router has answered a probe.
    #[must_use]
    pub fn knows(&self, router: IpAddr) -> bool {
        self.routers.contains_key(&Expected::Router(router))
    }

    /// The bucket of a router; `None` if it is not limited.
    fn router(&mut self, expected: Expected, now: Timestamp) -> Option<(&mut TokenBucket, TokenRate)> {
        let is_v4 = expected.is_v4();
        let expected = match expected {
            Expected::Router(_) => expected,
            Expected::Unknown { ttl, .. } => {
                let latest = self.latest.get(&(ttl, is_v4));
                latest.map_or(expected, |router| Expected::Router(*router))
            }
        };
        let rate = self.limits.router(is_v4);
        let is_known = self.routers.contains_key(&expected);
        if !is_known && self.routers.len() >= Self::ROUTERS {
            self.routers.retain(|_, bucket| !bucket.is_full(now));
        }
        let has_room = is_known || self.routers.len() < Self::ROUTERS;
        (rate.spacing > Duration::ZERO && has_room).then(|| (self.routers.entry(expected).or_default(), rate))
    }

    /// Records that a router answered a probe with this TTL. Probes whose router is not known yet then count
    /// against this one.
    pub fn answered(&mut self, ttl: u8, router: IpAddr) {
        let is_v4 = router.is_ipv4();
        let is_first = self.latest.insert((ttl, is_v4), router).is_none();
        let spent = self.routers.remove(&Expected::Unknown { ttl, is_v4 }).filter(|_| is_first);
        if self.routers.len() < Self::ROUTERS {
            let bucket = self.routers.entry(Expected::Router(router)).or_default();
            bucket.inherit(spent.unwrap_or_default());
        }
    }
}

impl Default for ProbeBudget {
    fn default() -> Self {
        Self::new(ProbeLimits::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 9));

    fn at(milliseconds: u64) -> Timestamp {
        Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
    }

    #[test]
    fn router_is_asked_five_times_at_once_and_then_four_times_in_five_seconds() {
        let mut budget = ProbeBudget::new(ProbeLimits::default());
        let reserved = (0..9).map(|_| budget.reserve(Expected::Router(ROUTER), at(0)));
        let expected = [0, 0, 0, 0, 0, 1_250, 2_500, 3_750, 5_000];
        let expected = expected.map(|time| (at(time), (time > 0).then_some(Deferral::Router)));
        assert!(reserved.eq(expected));
        let later = budget.reserve(Expected::Router(ROUTER), at(5_500));
        assert_eq!(later, (at(6_250), Some(Deferral::Router)));
        let full = (0..6).map(|_| budget.reserve(Expected::Router(ROUTER), at(60_000)).0);
        assert!(full.eq([60_000, 60_000, 60_000, 60_000, 60_000, 61_250].map(at)));
    }

    #[test]
    fn probe_that_does_not_wait_delays_others_by_one_turn_at_most() {
        let mut budget = ProbeBudget::new(ProbeLimits::default());
        let router = Expected::Router(ROUTER);
        for time in (0..600_000).step_by(10) {
            let _ = budget.take(router, at(time));
        }
        assert_eq!(budget.take(router, at(600_000)), Ok(()), "it gets the turns that are free");
        assert_eq!(budget.take(router, at(600_000)), Err(Deferral::Router));
        let turns = [1_250, 2_500, 3_750].map(|after| (at(600_000 + after), Some(Deferral::Router)));
        assert_eq!([(); 3].map(|()| budget.reserve(router, at(600_000))), turns);
        for time in (600_000..603_750).step_by(10) {
            assert_eq!(budget.take(router, at(time)), Err(Deferral::Router), "others wait for the turns");
        }
    }

    #[test]
    fn agent_is_limited_over_all_routers() {
        let agent = TokenRate { spacing: Duration::from_millis(20), burst: 3 };
        let mut budget = ProbeBudget::new(ProbeLimits { agent, ..ProbeLimits::default() });
        let expected = |last: u8| Expected::Router([192, 0, 2, last].into());
        let reserved = [1, 2, 3, 4, 5].map(|last| budget.reserve(expected(last), at(0)));
        let now = (at(0), None);
        let later = |time| (at(time), Some(Deferral::Agent));
        assert_eq!(reserved, [now, now, now, later(20), later(40)]);
    }

    #[test]
    fn unknown_routers_share_a_bucket_for_each_ttl_and_family_until_one_answers() {
        let mut budget = ProbeBudget::new(ProbeLimits::default());
        let unknown = |ttl, is_v4| Expected::Unknown { ttl, is_v4 };
        for _ in 0..4 {
            assert_eq!(budget.reserve(unknown(1, true), at(0)), (at(0), None));
        }
        assert_eq!(budget.reserve(unknown(2, true), at(0)), (at(0), None));
        assert_eq!(budget.reserve(unknown(1, false), at(0)), (at(0), None));
        budget.answered(1, ROUTER);
        assert_eq!(budget.reserve(Expected::Router(ROUTER), at(0)), (at(0), None));
        let waits = (at(1_250), Some(Deferral::Router));
        assert_eq!(budget.reserve(unknown(1, true), at(0)), waits, "it may be the same router");
    }

    #[test]
    fn ipv6_routers_are_asked_at_a_rate_of_their_own() {
        let mut budget = ProbeBudget::new(ProbeLimits::default());
        let router = Expected::Router([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9].into());
        let reserved = (0..7).map(|_| budget.reserve(router, at(0)).0);
        assert!(reserved.eq([0, 0, 0, 0, 0, 125, 250].map(at)));
    }

    #[test]
    fn other_agents_wait_in_the_same_queue_but_not_beyond_the_horizon() {
        let limits = ProbeLimits { others: TokenRate::UNLIMITED, ..ProbeLimits::default() };
        let mut budget = ProbeBudget::new(limits);
        let router = Expected::Router(ROUTER);
        // Five at once, and one per 1.25 s up to 25 s.
        for index in 0..25_u64 {
            let turn = at(index.saturating_sub(4) * 1_250);
            assert_eq!(budget.reserve_for_other(router, at(0)), Ok(turn));
        }
        let later = at(26_250);
        assert_eq!([(); 2].map(|()| budget.reserve_for_other(router, at(0))), [Err(later); 2]);
        assert_eq!(budget.reserve(router, at(0)).0, later, "the refused took no turn");
    }

    #[test]
    fn other_agents_are_limited_over_all_routers() {
        let others = TokenRate { spacing: Duration::from_secs(10), burst: 2 };
        let mut budget = ProbeBudget::new(ProbeLimits { others, ..ProbeLimits::default() });
        let expected = |last: u8| Expected::Router([192, 0, 2, last].into());
        let reserved = [1, 2, 3, 4, 5].map(|last| budget.reserve_for_other(expected(last), at(0)));
        assert_eq!(reserved, [Ok(at(0)), Ok(at(0)), Ok(at(10_000)), Ok(at(20_000)), Err(at(30_000))]);
        assert_eq!(budget.reserve(expected(1), at(0)), (at(0), None), "own probes do not wait for them");
    }

    #[test]
    fn router_is_known_once_it_has_answered() {
        let none = TokenRate::UNLIMITED;
        let limits = ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none };
        let mut budget = ProbeBudget::new(limits);
        assert_eq!(budget.reserve_for_other(Expected::Router(ROUTER), at(0)), Ok(at(0)));
        assert!(!budget.knows(ROUTER));
        budget.answered(3, ROUTER);
        assert!(budget.knows(ROUTER) && !budget.knows([192, 0, 2, 10].into()));
    }

    #[test]
    fn changed_limits_apply_to_the_next_probes() {
        let mut budget = ProbeBudget::new(ProbeLimits::default());
        let reserve = |budget: &mut ProbeBudget| budget.reserve(Expected::Router(ROUTER), at(0)).0;
        assert!((0..6).map(|_| reserve(&mut budget)).eq([0, 0, 0, 0, 0, 1_250].map(at)));
        let router_v4 = TokenRate { spacing: Duration::from_millis(100), burst: 5 };
        let changed = ProbeLimits { router_v4, ..ProbeLimits::default() };
        budget.set_limits(changed, at(0));
        let first = reserve(&mut budget);
        assert!(
            (0..3)
                .map(|_| reserve(&mut budget))
                .eq([100, 200, 300].map(|later| first + Duration::from_millis(later)))
        );
    }

    #[test]
    fn turns_of_a_lower_rate_end_with_it() {
        let slow = TokenRate { spacing: Duration::from_secs(10), burst: 5 };
        let limits = ProbeLimits { router_v4: slow, agent: slow, others: slow, ..ProbeLimits::default() };
        let mut budget = ProbeBudget::new(limits);
        for _ in 0..1_000 {
            budget.reserve(Expected::Router(ROUTER), at(0));
        }
        budget.set_limits(limits, at(1));
        assert_eq!(budget.generation(), 0, "nothing has changed");
        budget.set_limits(ProbeLimits::default(), at(1));
        assert_eq!(budget.generation(), 1);
        let next = budget.reserve(Expected::Router(ROUTER), at(1)).0;
        assert!(next <= at(1_251), "{next:?}");
    }

    #[test]
    fn unlimited_rates_defer_nothing() {
        let none = TokenRate::UNLIMITED;
        let mut budget =
            ProbeBudget::new(ProbeLimits { router_v4: none, router_v6: none, agent: none, others: none });
        let router_v6 = IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]);
        for router in [ROUTER, router_v6].repeat(100) {
            assert_eq!(budget.reserve(Expected::Router(router), at(0)), (at(0), None));
        }
    }

    #[test]
    fn full_buckets_are_discarded_at_the_limit() {
        let limits = ProbeLimits { agent: TokenRate::UNLIMITED, ..ProbeLimits::default() };
        let mut budget = ProbeBudget::new(limits);
        let expected = |index: u32| Expected::Router(std::net::Ipv4Addr::from_bits(index).into());
        let count = u32::try_from(ProbeBudget::ROUTERS).unwrap();
        budget.reserve(expected(0), Timestamp::default());
        for index in 1..count {
            budget.reserve(expected(index), at(0));
        }
        assert_eq!(budget.routers.len(), ProbeBudget::ROUTERS, "the first bucket has been full for long");
        budget.reserve(expected(0), at(0));
        budget.reserve(expected(count), at(1_249));
        assert_eq!(budget.routers.len(), ProbeBudget::ROUTERS, "none is full: this one has no bucket");
        budget.answered(9, ROUTER);
        assert!(!budget.knows(ROUTER), "nor has one that has answered");
        budget.reserve(expected(count), at(1_250));
        assert_eq!(budget.routers.len(), 1);
    }
}
