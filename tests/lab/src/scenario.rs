//! Scenarios: what a network does and what the true counts must be, one file each.
//!
//! ```yaml
//! about: Random loss each way.
//! topology: pair                      # or: chain 8, diamond 4, mesh 3
//! probe: {interval: 2ms, flows: 4}    # keys of a probe as in the configuration
//! phases:
//!   - datagrams: 5000
//!     wires: {a-b: {forward: {delay: 5ms, loss: 2%}, reverse: {delay: 5ms}}}
//! expect: {lost_forward: 50..}        # true counts: the scenario must have an effect
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::sim::{Corruption, Jitter, Link, Loss, Queue, Rewrite};
use serde::Deserialize;

use crate::net::{Cable, MESH_MAX, NetPlan};
use crate::truth::TrueCounts;

/// A scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What the scenario shows, in one sentence.
    pub about: String,
    /// How the scenario runs.
    #[serde(default)]
    pub procedure: Procedure,
    /// Shape of the network.
    pub topology: Topology,
    /// Keys of the probe, as in the configuration.
    #[serde(default)]
    pub probe: serde_yaml::Mapping,
    /// Number of probes that measure at the same time.
    #[serde(default = "default_paths")]
    pub paths: u16,
    /// Whether the agents have a key.
    #[serde(default)]
    pub authenticated: bool,
    /// Whether to measure over IPv6 instead of IPv4.
    #[serde(default)]
    pub ipv6: bool,
    /// How much is known about the direction of losses.
    #[serde(default)]
    pub evidence: Evidence,
    /// Whether it takes too long for every push, and runs only with `PATHMETER_LAB_LONG=1`.
    #[serde(default)]
    pub long: bool,
    /// Run one after the other. Before and after them the links only delay and rewrite as in the first phase.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// Allowed ranges of true counts.
    #[serde(default)]
    pub expect: BTreeMap<CountName, CountRange>,
}

/// How a scenario runs. All but `phases` are implemented in `tests/lab/cases`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Procedure {
    /// The phases, one after the other.
    #[default]
    Phases,
    /// The phases, with two busy loops per core.
    Busy,
    /// The prober's process is stopped for a while between two runs of the phases.
    StopProber,
    /// The same for the responder's process.
    StopResponder,
    /// The prober's process is stopped until its socket overflows.
    OverflowProber,
    /// The same for the responder's process.
    OverflowResponder,
    /// The wall clock of either agent is stepped and slewed.
    WrongClocks,
    /// The host of either agent is suspended.
    Suspend,
    /// Exported values are changed afterwards, and each change must be detected.
    Planted,
    /// One of several equal-cost paths is impaired as in the phases: one that carries some of the flows.
    OneBadPath,
    /// One uplink in a mesh is impaired.
    OneBadUplink,
    /// The path MTU is reduced without ICMP errors.
    MtuBlackHole,
    /// A router in the middle has a smaller MTU and sends ICMP errors.
    MtuRouter,
}

fn default_paths() -> u16 {
    1
}

/// How much is known about the direction of losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// Every loss has the true direction.
    #[default]
    Full,
    /// A loss may have no direction, but never the wrong one.
    Partial,
    /// No loss has a direction.
    None,
}

/// A phase of a scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// The phase ends when this many more datagrams have entered the wires.
    pub datagrams: usize,
    /// Links of the wires, by name.
    #[serde(default)]
    pub wires: BTreeMap<CableName, LinkPair>,
}

/// The two directions of a wire.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkPair {
    /// From the first end to the second.
    pub forward: LinkConfig,
    /// From the second end to the first.
    pub reverse: LinkConfig,
}

/// A link in a scenario file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    delay: TimeSpan,
    jitter: Option<JitterConfig>,
    keeps_order: bool,
    held: Option<Held>,
    loss: Option<LossConfig>,
    duplicates: Share,
    corruption: Option<CorruptionConfig>,
    queue: Option<QueueConfig>,
    mtu: Option<usize>,
    dscp: Option<Below<64>>,
    ecn: Option<Below<4>>,
    ttl: Option<u8>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum JitterConfig {
    Uniform { uniform: TimeSpan },
    Normal { normal: TimeSpan },
    Pareto { pareto: Pareto },
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pareto {
    scale: TimeSpan,
    shape: f64,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    share: Share,
    by: TimeSpan,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum LossConfig {
    Random(Share),
    Every {
        every: u32,
    },
    Bursts {
        enter: Share,
        leave: Share,
        #[serde(default)]
        good: Share,
        #[serde(default = "full_share")]
        bad: Share,
    },
}

fn full_share() -> Share {
    Share(1.0)
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct CorruptionConfig {
    share: Share,
    noticed: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueConfig {
    rate: BitRate,
    #[serde(default)]
    burst: u64,
    room: u64,
}

impl LinkConfig {
    /// The simulated link.
    #[must_use]
    pub fn link(&self) -> Link {
        let mut link = self.without_impairments();
        link.jitter = match &self.jitter {
            None => Jitter::None,
            Some(JitterConfig::Uniform { uniform }) => Jitter::Uniform(uniform.nanos()),
            Some(JitterConfig::Normal { normal }) => Jitter::Normal { deviation: normal.nanos() },
            Some(JitterConfig::Pareto { pareto: Pareto { scale, shape } }) => {
                Jitter::Pareto { scale: scale.nanos(), shape: *shape }
            }
        };
        link.keeps_order = self.keeps_order;
        link.held = self.held.as_ref().map_or((0.0, 0), |held| (held.share.0, held.by.nanos()));
        link.loss = match &self.loss {
            None => Loss::Random(0.0),
            Some(LossConfig::Random(share)) => Loss::Random(share.0),
            Some(LossConfig::Every { every }) => Loss::Every(*every),
            Some(LossConfig::Bursts { enter, leave, good, bad }) => {
                Loss::Bursts { enter: enter.0, leave: leave.0, good: good.0, bad: bad.0 }
            }
        };
        link.duplicates = self.duplicates.0;
        if let Some(CorruptionConfig { share, noticed }) = &self.corruption {
            let noticed_by = if *noticed { Corruption::Detected } else { Corruption::Undetected };
            link.corruption = (share.0, noticed_by);
        }
        link.queue = self.queue.as_ref().map(|queue| Queue {
            rate: queue.rate.0,
            burst: queue.burst,
            room: queue.room,
        });
        link
    }

    /// The link with only its delay, its MTU and its rewrites: no echo is lost, duplicated or reordered.
    #[must_use]
    pub fn without_impairments(&self) -> Link {
        let mut link = Link::perfect(self.delay.nanos());
        link.mtu = self.mtu;
        let [dscp, ecn] = [self.dscp.map(|dscp| dscp.0), self.ecn.map(|ecn| ecn.0)];
        link.rewrite = Rewrite { dscp, ecn, ttl: self.ttl };
        link
    }
}

/// Shapes of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Topology {
    /// [`NetPlan::pair`].
    Pair,
    /// [`NetPlan::chain`].
    Chain(usize),
    /// [`NetPlan::diamond`].
    Diamond(usize),
    /// [`NetPlan::mesh`].
    Mesh(usize),
}

impl Topology {
    /// The plan of this topology.
    #[must_use]
    pub fn plan(self) -> NetPlan {
        match self {
            Self::Pair => NetPlan::pair(),
            Self::Chain(routers) => NetPlan::chain(routers),
            Self::Diamond(ways) => NetPlan::diamond(ways),
            Self::Mesh(hosts) => NetPlan::mesh(hosts),
        }
    }
}

impl TryFrom<String> for Topology {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let words: Vec<&str> = text.split(' ').collect();
        let number = |word: &str| word.parse().map_err(|_| format!("{word} is not a number of nodes"));
        match words[..] {
            ["pair"] => Ok(Self::Pair),
            ["chain", count] => Ok(Self::Chain(number(count)?)),
            ["diamond", count] => Ok(Self::Diamond(number(count)?)),
            ["mesh", count] if number(count)? > MESH_MAX => Err(format!("{text}: at most {MESH_MAX} hosts")),
            ["mesh", count] => Ok(Self::Mesh(number(count)?)),
            _ => Err(format!("{text} is not a topology (pair, chain N, diamond N, mesh N)")),
        }
    }
}

/// A number below `BOUND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u8")]
struct Below<const BOUND: u8>(u8);

impl<const BOUND: u8> TryFrom<u8> for Below<BOUND> {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        (number < BOUND).then_some(Self(number)).ok_or_else(|| format!("{number} is not below {BOUND}"))
    }
}

/// The name of a true count.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct CountName(pub String);

impl TryFrom<String> for CountName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_known = TrueCounts::default().by_name(&text).is_some();
        is_known.then(|| Self(text.clone())).ok_or_else(|| format!("{text} is not the name of a count"))
    }
}

/// A cable's name: `a-b`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct CableName(pub Cable);

impl TryFrom<String> for CableName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let ends = text.split_once('-').ok_or_else(|| format!("{text} is not a cable (write a-b)"))?;
        Ok(Self(Cable::between(ends.0, ends.1)))
    }
}

/// A duration: `250us`, `5ms`, `1.5s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct TimeSpan(pub Duration);

impl TimeSpan {
    fn nanos(self) -> u64 {
        pathmeter_proto::time::nanos(self.0)
    }
}

impl TryFrom<String> for TimeSpan {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
        let (number, unit) = units
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?.parse::<f64>().ok()?, unit)))
            .ok_or_else(|| format!("{text} is not a duration (use us, ms or s)"))?;
        Duration::try_from_secs_f64(number * unit).map(Self).map_err(|error| format!("{text}: {error}"))
    }
}

/// A share in percent: `2%`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Share(pub f64);

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
        let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
        Ok(Self(percent.ok_or_else(|| format!("{text} is not a percentage (write 2%)"))? / 100.0))
    }
}

/// Bits per second: `10Mbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct BitRate(u64);

impl TryFrom<String> for BitRate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let units = [("kbit", 1_000), ("Mbit", 1_000_000)];
        let found =
            units.iter().find_map(|(name, unit)| Some(text.strip_suffix(name)?.parse::<u64>().ok()? * unit));
        found.map(Self).ok_or_else(|| format!("{text} is not a bit rate (use kbit or Mbit)"))
    }
}

/// A range of whole numbers, both ends included: `7`, `10..20` or `10..`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "serde_yaml::Value")]
pub struct CountRange(pub RangeInclusive<u64>);

impl TryFrom<serde_yaml::Value> for CountRange {
    type Error = String;

    fn try_from(value: serde_yaml::Value) -> Result<Self, String> {
        if let Some(number) = value.as_u64() {
            return Ok(Self(number..=number));
        }
        let ends = value.as_str().and_then(|text| text.split_once(".."));
        let end = |to: &str| if to.is_empty() { Some(u64::MAX) } else { to.parse().ok() };
        let ends = ends.and_then(|(from, to)| Some((from.parse().ok()?, end(to)?)));
        ends.map(|(from, to)| Self(from..=to))
            .ok_or_else(|| format!("{value:?} is not a range (write 10..20 or 10..)"))
    }
}

/// Why a scenario cannot be read.
#[derive(Debug)]
pub struct ScenarioError(serde_yaml::Error);

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Scenario {
    /// Parses a scenario.
    ///
    /// # Errors
    /// [`ScenarioError`], with line and reason.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        serde_yaml::from_str(text).map_err(ScenarioError)
    }
}
