//! Scenarios: what a network does and what must come of it, one file each.
//!
//! ```yaml
//! about: Random loss each way.
//! topology: pair                      # or: chain 8, diamond 4, mesh 3
//! probe: {interval: 2ms, flows: 4}    # keys of a probe as in the configuration
//! phases:
//!   - datagrams: 5000
//!     wires: {a-b: {forward: {delay: 5ms, loss: 2%}, reverse: {delay: 5ms}}}
//! expect: {lost_forward: 50..}        # of the truth: that the scenario does what it says
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::sim::{Corruption, Jitter, Link, Loss, Queue, Rewrite};
use serde::Deserialize;

use crate::net::{Cable, MESH_MAX, Plan};
use crate::truth::TrueCounts;

/// A scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, in a sentence.
    pub about: String,
    /// How it is played.
    #[serde(default)]
    pub procedure: Procedure,
    /// The network.
    pub topology: Topology,
    /// Keys of the probe, as the configuration has them.
    #[serde(default)]
    pub probe: serde_yaml::Mapping,
    /// How many probes measure at once.
    #[serde(default = "default_paths")]
    pub paths: u16,
    /// Whether the agents have a key.
    #[serde(default)]
    pub authenticated: bool,
    /// Which address family is measured.
    #[serde(default)]
    pub ipv6: bool,
    /// What can be known of the direction of losses.
    #[serde(default)]
    pub evidence: Evidence,
    /// Whether it takes too long for every push.
    #[serde(default)]
    pub long: bool,
    /// One after the other. In front of them and behind them the links only delay and write over what the first does.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// Ranges of the truth's counts.
    #[serde(default)]
    pub expect: BTreeMap<CountName, CountRange>,
}

/// How a scenario is played. All but the first are code of the trials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Procedure {
    /// The phases, one after the other.
    #[default]
    Phases,
    /// The same with two busy loops for each core.
    Busy,
    /// The prober's process is stopped for a while between two plays of the phases.
    StopProber,
    /// The responder's is.
    StopResponder,
    /// The prober's process is stopped until its socket overflows.
    OverflowProber,
    /// The responder's is.
    OverflowResponder,
    /// The wall clock of either agent is stepped and slewed.
    WrongClocks,
    /// The host of either agent sleeps.
    Suspend,
    /// What was exported is changed afterwards, and that must be noticed.
    Planted,
    /// Of several equal ways one is bad: as in the phases, on a way that takes some of the flows.
    OneBadWay,
    /// In a mesh one uplink is bad.
    OneBadUplink,
    /// The MTU of the path is clamped in silence.
    MtuBlackHole,
    /// A router in the middle has a smaller MTU.
    MtuRouter,
}

fn default_paths() -> u16 {
    1
}

/// What can be known of the direction of losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// Every loss has its direction.
    #[default]
    Full,
    /// Some have none, but none has the wrong one.
    Partial,
    /// None has one.
    None,
}

/// A part of a scenario.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// It ends when so many more datagrams have entered the wires.
    pub datagrams: usize,
    /// What the wires do.
    #[serde(default)]
    pub wires: BTreeMap<CableName, LinkPair>,
}

/// The two directions of a wire.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkPair {
    /// From the end that is named first.
    pub forward: LinkConfig,
    /// To it.
    pub reverse: LinkConfig,
}

/// A link as it is written down.
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
    /// The link.
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
            let noticed_by = if *noticed { Corruption::Noticed } else { Corruption::Unnoticed };
            link.corruption = (share.0, noticed_by);
        }
        link.queue = self.queue.as_ref().map(|queue| Queue {
            rate: queue.rate.0,
            burst: queue.burst,
            room: queue.room,
        });
        link
    }

    /// The same link with nothing but its delay, its MTU and what it writes over: no echo is harmed.
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
    /// [`Plan::pair`].
    Pair,
    /// [`Plan::chain`].
    Chain(usize),
    /// [`Plan::diamond`].
    Diamond(usize),
    /// [`Plan::mesh`].
    Mesh(usize),
}

impl Topology {
    /// The plan of such a network.
    #[must_use]
    pub fn plan(self) -> Plan {
        match self {
            Self::Pair => Plan::pair(),
            Self::Chain(routers) => Plan::chain(routers),
            Self::Diamond(ways) => Plan::diamond(ways),
            Self::Mesh(hosts) => Plan::mesh(hosts),
        }
    }
}

impl TryFrom<String> for Topology {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let words: Vec<&str> = text.split(' ').collect();
        let number = |word: &str| word.parse().map_err(|_| format!("{word} is no number of nodes"));
        match words[..] {
            ["pair"] => Ok(Self::Pair),
            ["chain", count] => Ok(Self::Chain(number(count)?)),
            ["diamond", count] => Ok(Self::Diamond(number(count)?)),
            ["mesh", count] if number(count)? > MESH_MAX => Err(format!("{text}: at most {MESH_MAX} hosts")),
            ["mesh", count] => Ok(Self::Mesh(number(count)?)),
            _ => Err(format!("{text} is no topology (pair, chain N, diamond N, mesh N)")),
        }
    }
}

/// A number below a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u8")]
struct Below<const BOUND: u8>(u8);

impl<const BOUND: u8> TryFrom<u8> for Below<BOUND> {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        (number < BOUND).then_some(Self(number)).ok_or_else(|| format!("{number} is not below {BOUND}"))
    }
}

/// The name of a count of the truth.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct CountName(pub String);

impl TryFrom<String> for CountName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_known = TrueCounts::default().by_name(&text).is_some();
        is_known.then(|| Self(text.clone())).ok_or_else(|| format!("the truth has no count {text}"))
    }
}

/// A cable's name: `a-b`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct CableName(pub Cable);

impl TryFrom<String> for CableName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let ends = text.split_once('-').ok_or_else(|| format!("{text} is no cable (a-b)"))?;
        Ok(Self(Cable::between(ends.0, ends.1)))
    }
}

/// A span of time: `250us`, `5ms`, `1.5s`.
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
            .ok_or_else(|| format!("{text} is no span of time (us, ms, s)"))?;
        Duration::try_from_secs_f64(number * unit).map(Self).map_err(|error| format!("{text}: {error}"))
    }
}

/// A share: `2%`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Share(pub f64);

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
        let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
        Ok(Self(percent.ok_or_else(|| format!("{text} is no share (2%)"))? / 100.0))
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
        found.map(Self).ok_or_else(|| format!("{text} is no rate (kbit, Mbit, each per second)"))
    }
}

/// Whole numbers: `7`, `10..20`, both included, or `10..`.
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
        ends.map(|(from, to)| Self(from..=to)).ok_or_else(|| format!("{value:?} is no range (10..20, 10..)"))
    }
}

/// Why a scenario cannot be played.
#[derive(Debug)]
pub struct ScenarioError(serde_yaml::Error);

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Scenario {
    /// Reads a scenario.
    ///
    /// # Errors
    /// [`ScenarioError`] says where and why.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        serde_yaml::from_str(text).map_err(ScenarioError)
    }
}
