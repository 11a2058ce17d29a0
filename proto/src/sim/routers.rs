//! A simulated network of routers, for traces.

use std::net::IpAddr;

use super::random::Random;
use crate::machine::IcmpKind;
use crate::schedule::mix;

/// Routers in a row between two hosts. Packets of one direction pass one router of each segment.
#[derive(Debug, Clone)]
pub struct RouterNetwork {
    /// The segments in the order in which packets pass them.
    pub segments: Vec<Segment>,
    /// Delay of the link from the last router to the destination, in nanoseconds.
    pub last_delay: u64,
    /// Whether the destination can be reached.
    pub is_reachable: bool,
}

/// The routers of which a packet passes one.
#[derive(Debug, Clone)]
pub struct Segment {
    /// The routers; at least one.
    pub routers: Vec<SimRouter>,
    /// How packets are distributed to them.
    pub balance: Balance,
    /// Delay of the link to these routers, in nanoseconds.
    pub delay: u64,
}

/// How packets are distributed to the routers of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// All packets of a flow pass the same router.
    PerFlow,
    /// Every packet passes a random router.
    PerPacket,
}

/// A simulated router.
#[derive(Debug, Clone)]
pub struct SimRouter {
    /// The address from which it sends errors.
    pub address: IpAddr,
    /// Which expired packets it answers.
    pub answers: Answers,
    /// Share of the packets that it drops instead of forwarding them.
    pub loss: f64,
    /// Bytes that it quotes after the UDP header.
    pub quoted_bytes: usize,
    /// What it attaches to its answers, as an extension structure (RFC 4884); empty: nothing.
    pub extensions: Vec<u8>,
    /// The TTL that packets leave it with, instead of one less than they came with.
    pub sets_ttl: Option<u8>,
    /// How it rejects all packets; `None`: it forwards them.
    pub rejects: Option<Rejects>,
    tokens: f64,
    refilled_at: u64,
}

/// How a router rejects packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejects {
    /// The kind of its error.
    pub kind: IcmpKind,
    /// The code of its error.
    pub code: u8,
    /// Time until it sends the error, in nanoseconds: routers look for the next host for seconds.
    pub after: u64,
    /// Whether it does so before it looks at the TTL: Linux rejects by its routes before, and by its firewall
    /// after that.
    pub is_before_ttl: bool,
}

/// Which expired packets a router answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Answers {
    /// All.
    All,
    /// None.
    None,
    /// A random share.
    Share(f64),
    /// As many as a token bucket allows, as Linux does.
    Limited {
        /// Tokens per second.
        per_second: f64,
        /// Size of the bucket.
        burst: f64,
    },
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transit {
    /// It arrives.
    Delivered {
        /// Time of arrival.
        at: u64,
        /// Its TTL on arrival.
        ttl: u8,
    },
    /// Its TTL ended at a router, whose answer arrives.
    Expired {
        /// The router.
        router: IpAddr,
        /// Bytes that it quotes after the UDP header.
        quoted_bytes: usize,
        /// What it attaches; empty: nothing.
        extensions: Vec<u8>,
        /// When the answer arrives at the sender.
        at: u64,
    },
    /// A router rejected it, and its error arrives.
    Rejected {
        /// The router.
        router: IpAddr,
        /// Bytes that it quotes after the UDP header.
        quoted_bytes: usize,
        /// The kind of the error.
        kind: IcmpKind,
        /// The code of the error.
        code: u8,
        /// When the error arrives at the sender.
        at: u64,
    },
    /// Nothing arrives anywhere.
    Lost,
}

impl SimRouter {
    /// A router that answers everything and loses nothing.
    #[must_use]
    pub fn new(address: IpAddr) -> Self {
        Self {
            address,
            answers: Answers::All,
            loss: 0.0,
            quoted_bytes: 520,
            extensions: Vec::new(),
            sets_ttl: None,
            rejects: None,
            tokens: 0.0,
            refilled_at: 0,
        }
    }

    /// Rejects a packet that arrives with this TTL, if it does so.
    fn reject(&mut self, ttl: u8, at: u64, sent: u64, random: &mut Random) -> Option<Transit> {
        let Rejects { kind, code, after, is_before_ttl } = self.rejects?;
        if ttl <= 1 && !is_before_ttl {
            return None;
        }
        let (router, quoted_bytes) = (self.address, self.quoted_bytes);
        let rejected = Transit::Rejected { router, quoted_bytes, kind, code, at: 2 * at - sent + after };
        Some(if self.answers(at, random) { rejected } else { Transit::Lost })
    }

    fn answers(&mut self, at: u64, random: &mut Random) -> bool {
        match self.answers {
            Answers::All => true,
            Answers::None => false,
            Answers::Share(share) => random.chance(share),
            Answers::Limited { per_second, burst } => {
                #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
                let refill = (at - self.refilled_at) as f64 * 1e-9 * per_second;
                // The bucket is full at the beginning.
                let tokens = if self.refilled_at == 0 { burst } else { (self.tokens + refill).min(burst) };
                let is_answered = tokens >= 1.0;
                self.tokens = if is_answered { tokens - 1.0 } else { tokens };
                self.refilled_at = at.max(1);
                is_answered
            }
        }
    }
}

impl RouterNetwork {
    /// `routers` routers with addresses from 10.0.1.0 on, and links of `delay` nanoseconds.
    #[must_use]
    pub fn chain(routers: u8, delay: u64) -> Self {
        let segment = |index| Segment {
            routers: vec![SimRouter::new([10, 0, 1, index].into())],
            balance: Balance::PerFlow,
            delay,
        };
        Self { segments: (0..routers).map(segment).collect(), last_delay: delay, is_reachable: true }
    }

    /// Sends a packet of `flow` through the network. Answers take as long as the packet took.
    pub fn send(&mut self, flow: u64, ttl: u8, sent: u64, random: &mut Random) -> Transit {
        let (mut at, mut ttl) = (sent, ttl);
        for (index, segment) in self.segments.iter_mut().enumerate() {
            at += segment.delay;
            let choice = match segment.balance {
                Balance::PerFlow => mix(flow ^ mix(index as u64)),
                Balance::PerPacket => random.draw(),
            };
            let count = segment.routers.len() as u64;
            let router = &mut segment.routers[usize::try_from(choice % count).expect("below a length")];
            if let Some(rejected) = router.reject(ttl, at, sent, random) {
                return rejected;
            }
            ttl -= 1;
            if ttl == 0 {
                return match router.answers(at, random) {
                    true => Transit::Expired {
                        router: router.address,
                        quoted_bytes: router.quoted_bytes,
                        extensions: router.extensions.clone(),
                        at: 2 * at - sent,
                    },
                    false => Transit::Lost,
                };
            }
            if random.chance(router.loss) {
                return Transit::Lost;
            }
            ttl = router.sets_ttl.unwrap_or(ttl);
        }
        match self.is_reachable {
            true => Transit::Delivered { at: at + self.last_delay, ttl },
            false => Transit::Lost,
        }
    }

    /// The routers that a flow passes; `None` where its packets pass several.
    #[must_use]
    pub fn route(&self, flow: u64) -> Vec<Option<IpAddr>> {
        let routers = self.segments.iter().enumerate().map(|(index, segment)| {
            let count = segment.routers.len() as u64;
            match segment.balance {
                Balance::PerPacket if count > 1 => None,
                Balance::PerPacket | Balance::PerFlow => {
                    let choice = mix(flow ^ mix(index as u64)) % count;
                    Some(segment.routers[usize::try_from(choice).expect("below a length")].address)
                }
            }
        });
        routers.collect()
    }
}
