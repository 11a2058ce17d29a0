//! One direction of an impaired link.
//!
//! The model decides what happens to each datagram but moves none: the simulator does that in virtual time,
//! and the network lab with real frames.

use std::f64::consts::TAU;

use super::random::Random;

/// Impairments of a link. Times in nanoseconds, shares between 0 and 1.
///
/// The impairments apply in this order: MTU, loss, queue, delay. Lost datagrams take no room in the queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    /// Delay; the minimum, except with [`Jitter::Normal`].
    pub delay: u64,
    /// Random delay added to each datagram; more than the gap between two datagrams reorders them.
    pub jitter: Jitter,
    /// Whether jitter does not reorder: a datagram then waits for the one before it, as in a queue.
    pub keeps_order: bool,
    /// Share of datagrams that are delayed further, and by how much: reordering without jitter.
    pub held: (f64, u64),
    /// Loss model.
    pub loss: Loss,
    /// Share of datagrams that arrive twice, each copy with its own delay.
    pub duplicates: f64,
    /// Share of datagrams with one changed bit, and whether a checksum detects it.
    pub corruption: (f64, Corruption),
    /// Bottleneck: rate and queue; `None`: unlimited.
    pub queue: Option<Queue>,
    /// Length of the longest datagram that passes, including headers; longer ones are dropped silently.
    /// `None`: unlimited.
    pub mtu: Option<usize>,
    /// Header fields that the link overwrites.
    pub rewrite: Rewrite,
    state: LinkState,
}

/// Random delay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Jitter {
    /// None.
    None,
    /// Uniform from 0 to this.
    Uniform(u64),
    /// Normal around 0; the whole delay is never negative.
    Normal {
        /// Standard deviation.
        deviation: u64,
    },
    /// Pareto distribution of the second kind (Lomax), which begins at 0: most delays are short, a few very
    /// long. At most [`Jitter::PARETO_MAX`].
    Pareto {
        /// The median is `scale · (2^(1/shape) − 1)`.
        scale: u64,
        /// Smaller values have a heavier tail; the mean is finite above 1.
        shape: f64,
    },
}

/// Loss model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Loss {
    /// Each datagram with this probability.
    Random(f64),
    /// A good and a bad state, each with its own loss (Gilbert 1960, Elliott 1963).
    Bursts {
        /// Probability to enter the bad state, per datagram.
        enter: f64,
        /// Probability to leave it, per datagram.
        leave: f64,
        /// Loss in the good state.
        good: f64,
        /// Loss in the bad state.
        bad: f64,
    },
    /// Every n-th datagram; 1: all.
    Every(u32),
    /// All datagrams between two times.
    Blackout {
        /// Begin.
        from: u64,
        /// End, exclusive.
        to: u64,
    },
}

/// Whether a changed bit is detected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Corruption {
    /// By the checksum in the receiving kernel, which drops the datagram.
    Detected,
    /// Not detected: the application gets the datagram.
    Undetected,
}

/// A bottleneck: a token bucket with a drop-tail queue.
///
/// Without room it is a policer; without a burst it is a plain queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Rate in bits per second.
    pub rate: u64,
    /// Bytes that may pass at once after a pause.
    pub burst: u64,
    /// Bytes that the queue holds; further datagrams are dropped.
    pub room: u64,
}

/// Fields of the IP header that a link overwrites; `None`: unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rewrite {
    /// The upper six bits of the type of service.
    pub dscp: Option<u8>,
    /// The lower two bits.
    pub ecn: Option<u8>,
    /// Time to live or hop limit.
    pub ttl: Option<u8>,
}

/// A datagram as a link sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Length in bytes, including the IP header.
    pub bytes: usize,
    /// Type of service or traffic class.
    pub tos: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
}

/// A copy of a datagram that arrives at the other end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Delivery {
    /// Time of arrival.
    pub at: u64,
    /// Position of the changed bit, as a share of the payload's length, and whether it is detected; `None`:
    /// undamaged.
    pub damage: Option<(f64, Corruption)>,
    /// Type of service on arrival.
    pub tos: u8,
    /// Time to live on arrival.
    pub ttl: u8,
}

/// Why a datagram does not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dropped {
    /// By [`Link::loss`].
    Lost,
    /// [`Link::queue`] was full.
    QueueFull,
    /// [`Link::mtu`] was exceeded.
    TooLong,
}

/// State of a link between datagrams. It is kept when the parameters change during a run.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct LinkState {
    /// Whether [`Loss::Bursts`] is in its bad state.
    is_bad: bool,
    /// Counter of [`Loss::Every`].
    passed: u32,
    /// Time at which the bottleneck would have sent everything if there were no burst.
    busy_until: u64,
    /// Latest delivery, for [`Link::keeps_order`].
    last: u64,
}

impl Delivery {
    /// Changes the damaged bit of the payload, if any, and returns the index of its byte.
    pub fn damage(&self, payload: &mut [u8]) -> Option<usize> {
        let (position, _) = self.damage?;
        #[expect(clippy::cast_precision_loss, reason = "a datagram has below 2⁵³ bits")]
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of the length")]
        let bit = (position * (payload.len() * 8) as f64) as usize;
        *payload.get_mut(bit / 8)? ^= 1 << (bit % 8);
        Some(bit / 8)
    }
}

impl Jitter {
    /// Maximum delay of [`Jitter::Pareto`].
    pub const PARETO_MAX: u64 = 10_000_000_000;

    /// Adds a random delay.
    fn add_to(self, delay: u64, random: &mut Random) -> u64 {
        match self {
            Self::None => delay,
            Self::Uniform(most) => delay + random.below(most + 1),
            Self::Normal { deviation } => delay.saturating_add_signed(spread(deviation, normal(random))),
            Self::Pareto { scale, shape } => {
                let excess = (1.0 - random.fraction()).powf(-1.0 / shape) - 1.0;
                delay + spread(scale, excess).unsigned_abs().min(Self::PARETO_MAX)
            }
        }
    }
}

/// `factor` times `unit`, in whole nanoseconds.
fn spread(unit: u64, factor: f64) -> i64 {
    #[expect(clippy::cast_precision_loss, reason = "delays are below 2⁵³ ns, 104 days")]
    #[expect(clippy::cast_possible_truncation, reason = "saturates")]
    let product = (unit as f64 * factor) as i64;
    product
}

/// Standard normal (Box and Muller 1958).
fn normal(random: &mut Random) -> f64 {
    let radius = (-2.0 * (1.0 - random.fraction()).ln()).sqrt();
    radius * (TAU * random.fraction()).cos()
}

impl Loss {
    /// The Gilbert model: no loss in the good state, and total loss in the bad state.
    #[must_use]
    pub const fn gilbert(enter: f64, leave: f64) -> Self {
        Self::Bursts { enter, leave, good: 0.0, bad: 1.0 }
    }
}

impl Link {
    /// A link with a constant delay and no other impairment.
    #[must_use]
    pub const fn perfect(delay: u64) -> Self {
        Self {
            delay,
            jitter: Jitter::None,
            keeps_order: false,
            held: (0.0, 0),
            loss: Loss::Random(0.0),
            duplicates: 0.0,
            corruption: (0.0, Corruption::Detected),
            queue: None,
            mtu: None,
            rewrite: Rewrite { dscp: None, ecn: None, ttl: None },
            state: LinkState { is_bad: false, passed: 0, busy_until: 0, last: 0 },
        }
    }

    /// Replaces the parameters and keeps the state: datagrams in the queue still wait.
    pub fn replace_with(&mut self, other: &Self) {
        *self = Self { state: self.state, ..other.clone() };
    }

    /// Passes a datagram that enters at `now` and returns its one or two copies.
    ///
    /// # Errors
    /// [`Dropped`] if no copy arrives.
    pub fn pass(
        &mut self,
        random: &mut Random,
        now: u64,
        packet: Packet,
    ) -> Result<[Option<Delivery>; 2], Dropped> {
        if self.mtu.is_some_and(|mtu| packet.bytes > mtu) {
            return Err(Dropped::TooLong);
        }
        if self.loses(random, now) {
            return Err(Dropped::Lost);
        }
        let waits = self.wait(now, packet.bytes as u64).ok_or(Dropped::QueueFull)?;
        let is_twice = random.chance(self.duplicates);
        let first = self.deliver(random, now + waits, packet);
        let second = is_twice.then(|| self.deliver(random, now + waits, packet));
        Ok([Some(first), second])
    }

    fn loses(&mut self, random: &mut Random, now: u64) -> bool {
        match self.loss {
            Loss::Random(share) => random.chance(share),
            Loss::Bursts { enter, leave, good, bad } => {
                let state = &mut self.state;
                state.is_bad = if state.is_bad { !random.chance(leave) } else { random.chance(enter) };
                random.chance(if state.is_bad { bad } else { good })
            }
            Loss::Every(nth) => {
                self.state.passed = (self.state.passed + 1) % nth.max(1);
                self.state.passed == 0
            }
            Loss::Blackout { from, to } => (from..to).contains(&now),
        }
    }

    /// How long a datagram waits in the queue; `None` if the queue is full.
    fn wait(&mut self, now: u64, bytes: u64) -> Option<u64> {
        let Some(Queue { rate, burst, room }) = self.queue else { return Some(0) };
        let takes = |bytes: u64| bytes * 8 * 1_000_000_000 / rate.max(1);
        let free_since = self.state.busy_until.max(now.saturating_sub(takes(burst)));
        let done = free_since + takes(bytes);
        let waits = done.saturating_sub(now);
        if waits > takes(room) {
            return None;
        }
        self.state.busy_until = done;
        Some(waits)
    }

    fn deliver(&mut self, random: &mut Random, now: u64, packet: Packet) -> Delivery {
        let (share, by) = self.held;
        let held = if random.chance(share) { by } else { 0 };
        let mut at = now + held + self.jitter.add_to(self.delay, random);
        if self.keeps_order {
            at = at.max(self.state.last);
            self.state.last = at;
        }
        let (share, who) = self.corruption;
        let damage = random.chance(share).then(|| (random.fraction(), who));
        let Rewrite { dscp, ecn, ttl } = self.rewrite;
        let tos = dscp.unwrap_or(packet.tos >> 2) << 2 | ecn.unwrap_or(packet.tos & 3);
        Delivery { at, damage, tos, ttl: ttl.unwrap_or(packet.ttl) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const SMALL: Packet = Packet { bytes: 125, tos: 0, ttl: 64 };

    /// Passes `count` datagrams, one per millisecond.
    fn stream(link: &mut Link, count: u64) -> Vec<Result<[Option<Delivery>; 2], Dropped>> {
        let mut random = Random::new(1);
        (0..count).map(|index| link.pass(&mut random, index * MS, SMALL)).collect()
    }

    fn delays(link: &mut Link, count: u64) -> Vec<u64> {
        let passed = stream(link, count).into_iter().zip(0..);
        passed.map(|(passed, index)| passed.unwrap()[0].unwrap().at - index * MS).collect()
    }

    #[test]
    fn perfect_link_only_delays() {
        let all = stream(&mut Link::perfect(5 * MS), 10);
        for (passed, index) in all.into_iter().zip(0..) {
            let expected = Delivery { at: (index + 5) * MS, damage: None, tos: 0, ttl: 64 };
            assert_eq!(passed, Ok([Some(expected), None]));
        }
    }

    #[test]
    fn every_nth_datagram_is_lost() {
        let mut link = Link { loss: Loss::Every(4), ..Link::perfect(0) };
        let lost: Vec<bool> = stream(&mut link, 8).iter().map(Result::is_err).collect();
        assert_eq!(lost, [false, false, false, true, false, false, false, true]);
    }

    #[test]
    fn shares_of_loss_duplicates_and_damage_are_as_configured() {
        let mut link = Link {
            loss: Loss::Random(0.25),
            duplicates: 0.5,
            corruption: (0.1, Corruption::Detected),
            ..Link::perfect(0)
        };
        let passed: Vec<_> = stream(&mut link, 40_000).into_iter().filter_map(Result::ok).collect();
        let twice = passed.iter().filter(|copies| copies[1].is_some()).count();
        let damaged =
            passed.iter().filter(|copies| copies[0].is_some_and(|copy| copy.damage.is_some())).count();
        // Five standard deviations around the mean.
        assert!((29_560..=30_440).contains(&passed.len()), "{}", passed.len());
        assert!((14_560..=15_440).contains(&twice), "{twice}");
        assert!((2_740..=3_260).contains(&damaged), "{damaged}");
    }

    #[test]
    fn bursts_have_the_expected_length_and_share() {
        let mut link = Link { loss: Loss::gilbert(0.02, 0.2), ..Link::perfect(0) };
        let lost: Vec<bool> = stream(&mut link, 200_000).iter().map(Result::is_err).collect();
        let total = lost.iter().filter(|lost| **lost).count();
        let bursts = lost.windows(2).filter(|pair| !pair[0] && pair[1]).count();
        // In the bad state 0.02 / (0.02 + 0.2) of the time, five datagrams at once on average.
        assert!((16_500..=19_900).contains(&total), "{total}");
        assert!((45..=55).contains(&(total * 10 / bursts)), "{total} in {bursts}");
    }

    #[test]
    fn jitter_has_the_moments_of_its_distribution() {
        let mean = |delays: &[u64]| delays.iter().sum::<u64>() / delays.len() as u64;
        let mut normal = Link { jitter: Jitter::Normal { deviation: MS }, ..Link::perfect(10 * MS) };
        let found = delays(&mut normal, 40_000);
        assert!(mean(&found).abs_diff(10 * MS) < MS / 40, "{}", mean(&found));
        let deviation = mean(&found.iter().map(|delay| delay.abs_diff(10 * MS)).collect::<Vec<u64>>());
        // The mean absolute deviation of a normal distribution is √(2/π) of its standard deviation.
        assert!(deviation.abs_diff(797_885) < MS / 40, "{deviation}");

        let mut pareto = Link { jitter: Jitter::Pareto { scale: MS, shape: 3.0 }, ..Link::perfect(10 * MS) };
        let mut found = delays(&mut pareto, 40_000);
        found.sort_unstable();
        assert!(found[0] >= 10 * MS);
        assert!(found[20_000].abs_diff(10_259_921) < MS / 50, "{}", found[20_000]);
        assert!(found[39_999] > 15 * MS, "the tail is heavy: {}", found[39_999]);
    }

    #[test]
    fn jitter_with_keeps_order_does_not_reorder() {
        let jitter = Jitter::Uniform(20 * MS);
        let arrivals = |keeps_order| {
            let mut link = Link { jitter, keeps_order, ..Link::perfect(0) };
            let all: Vec<u64> =
                stream(&mut link, 100).iter().map(|passed| passed.as_ref().unwrap()[0].unwrap().at).collect();
            all
        };
        assert!(arrivals(true).is_sorted());
        assert!(!arrivals(false).is_sorted());
    }

    #[test]
    fn held_datagrams_are_delayed_further() {
        let mut link = Link { held: (0.2, 3 * MS), ..Link::perfect(MS) };
        let found = delays(&mut link, 1_000);
        let held = found.iter().filter(|delay| **delay == 4 * MS).count();
        assert_eq!(found.len() - held, found.iter().filter(|delay| **delay == MS).count());
        assert!((137..=263).contains(&held), "{held}");
    }

    #[test]
    fn queue_delays_by_its_length_and_drops_when_full() {
        // One datagram of 125 bytes takes 2 ms at 500 kbit/s, and comes every millisecond; four fit.
        let queue = Some(Queue { rate: 500_000, burst: 0, room: 500 });
        let mut link = Link { queue, ..Link::perfect(0) };
        let passed = stream(&mut link, 9);
        let waits: Vec<Option<u64>> = passed
            .iter()
            .zip(0..)
            .map(|(passed, index)| passed.as_ref().ok().map(|copies| copies[0].unwrap().at / MS - index))
            .collect();
        let expected = [Some(2), Some(3), Some(4), Some(5), Some(6), Some(7), Some(8), None, Some(8)];
        assert_eq!(waits, expected);
    }

    #[test]
    fn policer_passes_a_burst_and_then_its_rate() {
        let queue = Some(Queue { rate: 500_000, burst: 250, room: 0 });
        let mut link = Link { queue, ..Link::perfect(0) };
        let mut random = Random::new(1);
        let mut at = |now| link.pass(&mut random, now, SMALL).is_ok();
        let start = 100 * MS;
        assert_eq!([at(start), at(start), at(start)], [true, true, false]);
        assert_eq!([at(start + 2 * MS), at(start + 3 * MS)], [true, false]);
    }

    #[test]
    fn datagrams_above_the_mtu_are_dropped_and_headers_overwritten() {
        let rewrite = Rewrite { dscp: Some(10), ecn: None, ttl: Some(7) };
        let mut link = Link { mtu: Some(1_400), rewrite, ..Link::perfect(0) };
        let mut random = Random::new(1);
        let long = Packet { bytes: 1_401, ..SMALL };
        assert_eq!(link.pass(&mut random, 0, long), Err(Dropped::TooLong));
        let fits = Packet { bytes: 1_400, tos: 46 << 2 | 1, ttl: 255 };
        let [delivery, _] = link.pass(&mut random, 0, fits).unwrap();
        assert_eq!(delivery, Some(Delivery { at: 0, damage: None, tos: 10 << 2 | 1, ttl: 7 }));
    }

    #[test]
    fn changed_link_keeps_its_queue() {
        let queue = Some(Queue { rate: 1_000_000, burst: 0, room: 10_000 });
        let mut link = Link { queue, ..Link::perfect(0) };
        let mut random = Random::new(1);
        link.pass(&mut random, 0, SMALL).unwrap();
        link.replace_with(&Link { queue, ..Link::perfect(MS) });
        let [delivery, _] = link.pass(&mut random, 0, SMALL).unwrap();
        assert_eq!(delivery.unwrap().at, 3 * MS);
    }
}
