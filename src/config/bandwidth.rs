//! What bandwidth runs may use of this host, and the configuration of bandwidth probes.

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::bandwidth::RunDirection;
use pathmeter_proto::bandwidth::ledger::DailyBudget;
use pathmeter_proto::bandwidth::quiet_hours::QuietHours;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::load::DATAGRAM_BYTES;
use serde::{Deserialize, Serialize};

use super::hosts::DeclaredHost;
use super::kind::{KindConfig, KindReader};
use super::reader::{MappingReader, ValueReader};
use super::values::{bit_rate, duration, size};
use super::{Kind, Listen, Target};

/// What bandwidth runs may use of this host, as prober and as responder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BandwidthRules {
    /// Whether runs are allowed.
    pub enabled: bool,
    /// Hours of the day, in UTC, in which no run begins.
    pub quiet_hours: Vec<QuietHours>,
    /// Maximum runs at a time; further ones wait.
    pub runs_max: u16,
    /// Maximum bits of payload per second of a run; `None`: no limit.
    pub rate_max: Option<u64>,
    /// Maximum bytes of payload of a run.
    pub run_bytes_max: u64,
    /// Maximum time in which a run sends.
    pub run_time_max: Duration,
    /// Bytes of payload that all runs may use each day, in UTC.
    pub bytes_per_day: u64,
    /// Bytes of payload that the runs of one path, or those of one client address, may use each day.
    pub path_bytes_per_day: u64,
}

impl BandwidthRules {
    /// The budgets of the ledger.
    #[must_use]
    pub fn budget(&self) -> DailyBudget {
        DailyBudget { host: Some(self.bytes_per_day), path: Some(self.path_bytes_per_day) }
    }
}

impl Default for BandwidthRules {
    fn default() -> Self {
        Self {
            enabled: true,
            quiet_hours: Vec::new(),
            runs_max: RUNS,
            rate_max: None,
            run_bytes_max: RUN_BYTES,
            run_time_max: RUN_TIME,
            bytes_per_day: DAY_BYTES,
            path_bytes_per_day: PATH_DAY_BYTES,
        }
    }
}

/// Runs at a time. Chosen: two runs that share a link measure each other.
const RUNS: u16 = 1;
const RUNS_ALLOWED: RangeInclusive<i128> = 1..=1_000;

/// Rates of 100 ms hold at least one datagram of 1,200 bytes.
const RATE_ALLOWED: RangeInclusive<u64> = 100_000..=1_000_000_000_000;

/// Bytes of a run. Chosen: ten seconds at 1 Gbit/s, and more.
const RUN_BYTES: u64 = 2_000_000_000;
const RUN_BYTES_ALLOWED: RangeInclusive<u64> = 100_000..=1_000_000_000_000;

/// Time of a run. Chosen: three times what speed tests take.
const RUN_TIME: Duration = Duration::from_secs(30);
const RUN_TIME_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);

/// Bytes of a day. Chosen: 0.2 % of what a port of 1 Gbit/s can carry, and half of it for one path.
const DAY_BYTES: u64 = 20_000_000_000;
const PATH_DAY_BYTES: u64 = 10_000_000_000;
const DAY_BYTES_ALLOWED: RangeInclusive<u64> = 0..=1_000_000_000_000_000;

pub(super) fn bandwidth(section: &mut MappingReader<'_, '_>) -> Option<BandwidthRules> {
    let enabled = section.key("enabled", ValueReader::boolean).or(true);
    let quiet_hours = section.key("quiet_hours", quiet_hours).or(Vec::new());
    let runs_max = section.key("runs_max", |value| value.number(&RUNS_ALLOWED)).or(RUNS);
    let rate_max = section.key("rate_max", |value| bit_rate(value, &RATE_ALLOWED)).optional();
    let run_bytes_max = section.key("run_bytes_max", |value| size(value, &RUN_BYTES_ALLOWED)).or(RUN_BYTES);
    let run_time_max = section.key("run_time_max", |value| duration(value, &RUN_TIME_ALLOWED)).or(RUN_TIME);
    let bytes_per_day = section.key("bytes_per_day", |value| size(value, &DAY_BYTES_ALLOWED)).or(DAY_BYTES);
    let path_bytes_per_day =
        section.key("path_bytes_per_day", |value| size(value, &DAY_BYTES_ALLOWED)).or(PATH_DAY_BYTES);
    Some(BandwidthRules {
        enabled: enabled?,
        quiet_hours: quiet_hours?,
        runs_max: runs_max?,
        rate_max: rate_max?,
        run_bytes_max: run_bytes_max?,
        run_time_max: run_time_max?,
        bytes_per_day: bytes_per_day?,
        path_bytes_per_day: path_bytes_per_day?,
    })
}

/// The configuration of a bandwidth probe, which measures how fast paths are and what a load does to their
/// latency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bandwidth {
    /// How a run measures. `tcp`: payload over TCP connections. `train`: short trains of datagrams, whose
    /// dispersion tells the rate of the narrowest link. `check`: datagrams at `rate`, which the path may or
    /// may not carry.
    pub method: Method,
    /// The directions that are loaded, one after the other: `forward` is to the peer.
    pub direction: Directions,
    /// Number of connections that share the load of `tcp`.
    pub streams: u16,
    /// Bytes of payload after which a run ends. The default is that of `tcp`; of `train` it is 300kB, and of
    /// `check` what `rate` sends in `time`.
    pub bytes: u64,
    /// Time of sending after which a run ends. The default of `check` is 1s.
    pub time: Duration,
    /// Maximum bits of payload per second; `None`: no limit of its own. `check` requires it: it is what the
    /// path is asked to carry.
    pub rate: Option<u64>,
    /// A run ends when five of ten replies to echo requests are this much later than on the idle path, or
    /// three in a row are missing. `None` (`off`): it does not.
    pub added_delay_max: Option<Duration>,
}

/// How a run measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Payload over TCP connections.
    Tcp,
    /// Short trains of datagrams, whose dispersion tells the rate of the narrowest link.
    Train,
    /// Datagrams at a rate that the path may or may not carry.
    Check,
}

impl Method {
    /// Whether it sends datagrams.
    #[must_use]
    pub const fn is_udp(self) -> bool {
        match self {
            Self::Tcp => false,
            Self::Train | Self::Check => true,
        }
    }

    /// The value of the key and of the JSON field `method`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Train => "train",
            Self::Check => "check",
        }
    }
}

/// The directions that a probe loads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Directions {
    /// To the peer.
    Forward,
    /// From the peer.
    Reverse,
    /// Both, one after the other.
    Both,
}

impl Directions {
    /// The directions, in their order.
    #[must_use]
    pub const fn list(self) -> &'static [RunDirection] {
        match self {
            Self::Forward => &[RunDirection::Forward],
            Self::Reverse => &[RunDirection::Reverse],
            Self::Both => &[RunDirection::Forward, RunDirection::Reverse],
        }
    }
}

const METHODS: [(&str, Method); 3] =
    [("tcp", Method::Tcp), ("train", Method::Train), ("check", Method::Check)];

const DIRECTIONS: [(&str, Directions); 3] =
    [("forward", Directions::Forward), ("reverse", Directions::Reverse), ("both", Directions::Both)];

/// Chosen: a run takes a few seconds, and loads a path for a small part of the time.
const INTERVAL_ALLOWED: RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(7 * 24 * 3600);
const INTERVAL: Duration = Duration::from_secs(6 * 3600);

const STREAMS_ALLOWED: RangeInclusive<i128> = 1..=16;

/// Bytes of a run of a probe over TCP. Chosen: one second at 800 Mbit/s; four runs a day in both directions
/// use 0.8 GB.
const PROBE_BYTES: u64 = 100_000_000;

/// Bytes of the trains of a run: five short ones and a long one.
pub const TRAIN_BYTES: u64 = 300_000;

/// Chosen: TCP has filled a path of 100 ms by then, and trains have left a link of 1 Mbit/s.
const PROBE_TIME: Duration = Duration::from_secs(5);

/// Time of a check. Chosen: a queue grows by 15 ms if the path carries 2 % less.
pub const CHECK_TIME: Duration = Duration::from_secs(1);

/// Chosen: a call or a game notices a little more.
const ADDED_DELAY: Duration = Duration::from_millis(10);
const ADDED_DELAY_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(10);

impl KindConfig for Bandwidth {
    fn name(&self) -> &'static str {
        "bandwidth"
    }

    fn protocol(&self) -> &'static str {
        self.method.as_str()
    }

    fn check_target(&self, target: &Target) -> Result<(), String> {
        Err(format!("{} is not an agent; bandwidth is measured between agents", target.name))
    }

    fn follows(&self) -> Option<&str> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Reads the keys of a bandwidth probe.
pub(super) struct BandwidthReader;

impl KindReader for BandwidthReader {
    fn interval_allowed(&self) -> RangeInclusive<Duration> {
        INTERVAL_ALLOWED
    }

    fn interval_default(&self) -> Duration {
        INTERVAL
    }

    fn dscp_default(&self) -> Dscp {
        Dscp::LOWER_EFFORT
    }

    fn check_target(&self, _: &DeclaredHost) -> Result<(), (String, String)> {
        let what = "bandwidth is measured between agents".to_owned();
        Err((what, "remove targets from this probe".to_owned()))
    }

    fn read(&self, section: &mut MappingReader<'_, '_>, _: Option<&Listen>) -> Option<Kind> {
        let method = section.key("method", |value| value.one_of(&METHODS)).or(Method::Tcp);
        let direction = section.key("direction", |value| value.one_of(&DIRECTIONS)).or(Directions::Both);
        let streams = section.key("streams", |value| value.number(&STREAMS_ALLOWED)).or(1);
        let default_time = if method == Some(Method::Check) { CHECK_TIME } else { PROBE_TIME };
        let time = section.key("time", |value| duration(value, &RUN_TIME_ALLOWED)).or(default_time);
        let rate = section.key("rate", |value| bit_rate(value, &RATE_ALLOWED)).optional();
        let default_bytes = match (method, rate, time) {
            (Some(Method::Train), ..) => TRAIN_BYTES,
            (Some(Method::Check), Some(Some(rate)), Some(time)) => check_bytes(rate, time),
            (Some(Method::Tcp | Method::Check) | None, ..) => PROBE_BYTES,
        };
        let bytes = section.key("bytes", |value| size(value, &RUN_BYTES_ALLOWED)).or(default_bytes);
        let added_delay_max = section.key("added_delay_max", added_delay).or(Some(ADDED_DELAY));
        let (method, streams, rate) = (method?, streams?, rate?);
        if method.is_udp() && streams != 1 {
            let what = format!("{streams} connections, but method: {} has none", method.as_str());
            return section.reject("streams", what, "remove this key, or write method: tcp");
        }
        if method == Method::Check && rate.is_none() {
            let remedy = "write the rate that the path must carry, such as 50Mbit/s";
            return section.reject("rate", "missing: method: check asks whether a path carries it", remedy);
        }
        Some(Kind::Bandwidth(Bandwidth {
            method,
            direction: direction?,
            streams,
            bytes: bytes?,
            time: time?,
            rate,
            added_delay_max: added_delay_max?,
        }))
    }
}

/// Bytes of payload of a check, at a rate in bits per second.
#[must_use]
pub fn check_bytes(rate: u64, time: Duration) -> u64 {
    let bytes = u128::from(rate) * time.as_nanos() / 8_000_000_000;
    // Whole datagrams, one more than fit.
    u64::try_from(bytes).unwrap_or(u64::MAX).saturating_add(DATAGRAM_BYTES as u64)
}

/// A list of parts of the day.
fn quiet_hours(value: ValueReader<'_, '_>) -> Option<Vec<QuietHours>> {
    const EXPECTED: &str = "a list of hours in UTC such as [\"08:00-18:00\"]";
    value.list(EXPECTED, |item| {
        let text = item.text("hours in UTC such as \"08:00-18:00\"")?;
        match QuietHours::parse(text) {
            Some(hours) => Some(hours),
            None => item.reject(format!("\"{text}\""), "write hours in UTC such as \"08:00-18:00\""),
        }
    })
}

/// A duration, or `off`.
fn added_delay(value: ValueReader<'_, '_>) -> Option<Option<Duration>> {
    match value.clone().text("a duration such as 10ms, or off")? {
        "off" => Some(None),
        _ => duration(value, &ADDED_DELAY_ALLOWED).map(Some),
    }
}
