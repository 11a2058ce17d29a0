//! Which requests the responder answers: allowed sources and rate limits.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv6Addr};

use crate::prefix::Prefix;
use crate::time::Timestamp;
use crate::token_bucket::{TokenBucket, TokenRate};

/// Why a request gets no reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// The source is not a configured peer, is not in an allowed network, and did not prove a key.
    Unlisted,
    /// The request is not authenticated although it must be, or its key is not valid.
    Unauthentic,
    /// The source exceeds the rate limit per source.
    SourceRate,
    /// All sources together exceed the total rate limit.
    TotalRate,
    /// The request cannot be decoded.
    Malformed,
    /// The request comes from a port on which reflectors listen, or is itself a reply: answering it could
    /// start an endless loop.
    Reflection,
    /// The request repeats a datagram of another source.
    Replay,
}

impl Refusal {
    /// All variants, in the order of their declaration.
    pub const ALL: [Self; 7] = [
        Self::Unlisted,
        Self::Unauthentic,
        Self::SourceRate,
        Self::TotalRate,
        Self::Malformed,
        Self::Reflection,
        Self::Replay,
    ];
}

/// Which sources are answered, and at what rates. Replaced on reload and when names resolve to new addresses.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// Whether all sources are answered.
    pub open: bool,
    /// Addresses of the configured peers.
    pub peers: HashSet<IpAddr>,
    /// Allowed networks.
    pub prefixes: Vec<Prefix>,
    /// Source ports on which reflectors listen; requests from them are refused.
    pub reflector_ports: HashSet<u16>,
    /// Maximum requests per second from all sources; 0: none is answered.
    pub rate: u64,
    /// Maximum requests per second from each source; 0: none is answered.
    pub rate_per_source: u64,
}

impl Policy {
    /// Whether `source` is answered without proof of a key.
    #[must_use]
    pub fn lists(&self, source: IpAddr) -> bool {
        let source = source.to_canonical();
        self.open
            || self.peers.contains(&source)
            || self.prefixes.iter().any(|prefix| prefix.contains(source))
    }
}

/// Rates up to which requests are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimits {
    /// Of each source.
    pub per_source: TokenRate,
    /// Of all sources together.
    pub total: TokenRate,
}

/// The token buckets of the rate limits: one for each source and one for all.
#[derive(Debug)]
pub struct Rates {
    total: TokenBucket,
    young: HashMap<IpAddr, TokenBucket>,
    old: HashMap<IpAddr, TokenBucket>,
}

impl Rates {
    /// Number of sources whose bucket is kept, in each of two generations. When the younger generation is
    /// full, the older one is discarded. A flood from spoofed addresses can therefore evict the bucket of a
    /// source but never the total.
    pub const SOURCES: usize = 32_768;

    /// Rate limits with full buckets.
    #[must_use]
    pub fn new() -> Self {
        Self { total: TokenBucket::default(), young: HashMap::new(), old: HashMap::new() }
    }

    /// Takes a token for a request of `source` from both buckets.
    ///
    /// # Errors
    /// [`Refusal::SourceRate`] or [`Refusal::TotalRate`] if a bucket is empty.
    pub fn take(&mut self, policy: &Policy, source: IpAddr, now: Timestamp) -> Result<(), Refusal> {
        let per_source = TokenRate::per_second(policy.rate_per_source).ok_or(Refusal::SourceRate)?;
        let total = TokenRate::per_second(policy.rate).ok_or(Refusal::TotalRate)?;
        self.take_within(RateLimits { per_source, total }, source, now)
    }

    /// Takes a token for a request of `source` from both buckets, with these limits instead of a policy's.
    ///
    /// # Errors
    /// [`Refusal::SourceRate`] or [`Refusal::TotalRate`] if a bucket is empty. No token is taken then.
    pub fn take_within(
        &mut self,
        RateLimits { per_source, total }: RateLimits,
        source: IpAddr,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        let key = rate_limit_key(source);
        if !self.young.contains_key(&key) {
            if self.young.len() >= Self::SOURCES {
                self.old = std::mem::take(&mut self.young);
            }
            let bucket = self.old.remove(&key).unwrap_or_default();
            self.young.insert(key, bucket);
        }
        let bucket = self.young.get_mut(&key).expect("it was inserted above");
        if bucket.available_at(per_source, now) > now {
            return Err(Refusal::SourceRate);
        }
        if self.total.available_at(total, now) > now {
            return Err(Refusal::TotalRate);
        }
        bucket.reserve(per_source, now);
        self.total.reserve(total, now);
        Ok(())
    }
}

impl Default for Rates {
    fn default() -> Self {
        Self::new()
    }
}

/// The key of the bucket of `source`: an IPv6 host owns a /64 and can use any address in it, so the /64
/// counts as one source.
#[must_use]
pub fn rate_limit_key(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn policy(rate: u64, rate_per_source: u64) -> Policy {
        Policy { rate, rate_per_source, ..Policy::default() }
    }

    fn host(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn no_more_than_the_rate_and_one_burst_pass() {
        let policy = policy(1_000_000, 100);
        let mut rates = Rates::new();
        let mut passed = 0;
        for millisecond in 0..10_000_u64 {
            let now = Timestamp::from_nanos(millisecond * 1_000_000);
            passed += u64::from(rates.take(&policy, host(1), now).is_ok());
        }
        assert!((1_000..=1_026).contains(&passed), "{passed} in ten seconds at 100/s");
    }

    #[test]
    fn each_source_has_its_own_bucket_and_all_share_the_total() {
        let mut rates = Rates::new();
        let policy = policy(64, 32);
        let now = Timestamp::from_nanos(1);
        let mut last = [Ok(()); 3];
        for (index, source) in [host(1), host(2), host(3)].into_iter().enumerate() {
            for _ in 0..16 {
                last[index] = rates.take(&policy, source, now);
            }
        }
        assert_eq!(last, [Ok(()), Err(Refusal::TotalRate), Err(Refusal::TotalRate)]);
        assert_eq!(rates.take(&policy, host(1), now), Err(Refusal::SourceRate));
    }

    #[test]
    fn request_that_is_refused_by_the_total_rate_takes_no_token_of_its_source() {
        let mut rates = Rates::new();
        let once = |seconds| TokenRate { spacing: Duration::from_secs(seconds), burst: 1 };
        let limits = RateLimits { per_source: once(100), total: once(1) };
        let now = Timestamp::from_nanos(1_000_000_000_000);
        assert_eq!(rates.take_within(limits, host(1), now), Ok(()));
        assert_eq!(rates.take_within(limits, host(2), now), Err(Refusal::TotalRate));
        let later = now + Duration::from_secs(1);
        assert_eq!(rates.take_within(limits, host(1), later), Err(Refusal::SourceRate));
        assert_eq!(rates.take_within(limits, host(2), later), Ok(()));
    }

    #[test]
    fn flood_of_spoofed_sources_is_bounded_in_memory() {
        let mut rates = Rates::new();
        let policy = policy(u64::MAX, 10);
        for i in 0..200_000_u32 {
            let _ = rates.take(&policy, IpAddr::from(i.to_be_bytes()), Timestamp::from_nanos(u64::from(i)));
        }
        assert!(rates.young.len() + rates.old.len() <= 2 * Rates::SOURCES);
    }

    #[test]
    fn addresses_of_one_ipv6_network_share_a_bucket() {
        let a: IpAddr = "2001:db8:1:2::1".parse().unwrap();
        let b: IpAddr = "2001:db8:1:2:ffff::1".parse().unwrap();
        assert_eq!(rate_limit_key(a), rate_limit_key(b));
        assert_eq!(rate_limit_key("::ffff:192.0.2.1".parse().unwrap()), host(1));
    }

    #[test]
    fn policy_lists_peers_and_allowed_networks_and_if_open_every_source() {
        let none = Policy::default();
        assert!(!none.lists(host(1)));
        assert!(Policy { open: true, ..none.clone() }.lists(host(1)));
        let peers = Policy { peers: [host(1)].into(), ..none.clone() };
        assert!(peers.lists(host(1)) && !peers.lists(host(2)));
        assert!(peers.lists("::ffff:192.0.2.1".parse().unwrap()), "an IPv4 address on an IPv6 socket");
        let prefixes = vec!["192.0.2.0/31".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        let networks = Policy { prefixes, ..none };
        let listed = [0, 1, 2].map(|last| networks.lists(host(last)));
        assert_eq!((listed, networks.lists("2001:db8::1".parse().unwrap())), ([true, true, false], true));
    }

    #[test]
    fn each_ipv6_network_has_its_own_bucket() {
        let networks = ["2001:db8:1:2::1", "2001:db8:1:3::1", "2001:db9:1:2::1", "::1"];
        let paced: HashSet<IpAddr> = networks.map(|text| rate_limit_key(text.parse().unwrap())).into();
        assert_eq!(paced.len(), 4);
        let network: IpAddr = "2001:db8:1:2::".parse().unwrap();
        assert_eq!(rate_limit_key("2001:db8:1:2:3:4:5:6".parse().unwrap()), network);
    }

    #[test]
    fn bucket_survives_one_change_of_generation() {
        let policy = policy(u64::MAX, 16);
        let (mut rates, now) = (Rates::new(), Timestamp::from_nanos(1));
        let source = |index: u32| IpAddr::from((0x0a00_0000 + index).to_be_bytes());
        let fill = |rates: &mut Rates, from: u32, count: usize| {
            for index in (from..).take(count) {
                assert_eq!(rates.take(&policy, source(index), now), Ok(()));
            }
        };
        for _ in 0..16 {
            assert_eq!(rates.take(&policy, host(1), now), Ok(()));
        }
        fill(&mut rates, 0, Rates::SOURCES - 1);
        assert_eq!((rates.young.len(), rates.old.len()), (Rates::SOURCES, 0));
        fill(&mut rates, 100_000, 1);
        assert_eq!((rates.young.len(), rates.old.len()), (1, Rates::SOURCES));
        assert_eq!(rates.take(&policy, host(1), now), Err(Refusal::SourceRate), "its bucket is kept");
        fill(&mut rates, 200_000, 2 * Rates::SOURCES);
        assert_eq!(rates.take(&policy, host(1), now), Ok(()), "its bucket was discarded");
    }
}
