//! Expected results of Prometheus queries, and how they differ.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use super::prometheus::{Sample, Server};

/// Everything that is expected during the faults.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Expected {
    /// Recorded series, by query. Together the queries name every recording rule.
    pub(super) recorded: BTreeMap<String, ExpectedValues>,
    /// Dashboard queries, by dashboard, panel and query letter.
    pub(super) dashboards: BTreeMap<String, BTreeMap<String, BTreeMap<String, ExpectedValues>>>,
    pub(super) alerts: Alerts,
    /// Series on other servers, by query.
    pub(super) downstream: BTreeMap<Server, BTreeMap<String, ExpectedValues>>,
    pub(super) events: ExpectedEvents,
}

/// Short-lived series after a change: dashboard queries.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExpectedEvents {
    /// After `d` is started again and `b` has its configuration back, without traces.
    pub(super) repaired: BTreeMap<String, ExpectedValues>,
    /// After `d` has sent its goodbye.
    pub(super) leaving: BTreeMap<String, ExpectedValues>,
    /// The alert for the goodbye.
    pub(super) goodbye: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Alerts {
    /// Alerts that fire and are notified.
    pub(super) notified: Vec<String>,
    /// Alerts that fire and are inhibited by others.
    pub(super) inhibited: Vec<String>,
    /// Names of alerts that may fire as well.
    pub(super) possible: Vec<String>,
}

/// The expected result of a query.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ExpectedValues {
    /// No series.
    NoSeries,
    /// At least one series, each in the range.
    AllIn(ValueRange),
    /// These series, each in its range. Their keys are the values of the labels in which they differ, in the
    /// order of the label names; `_` stands for all others.
    EachIn(BTreeMap<String, ValueRange>),
}

/// A range of values, both ends included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ValueRange {
    from: f64,
    to: f64,
    /// Whether the value grows with the speed of time.
    is_rate: bool,
}

impl ExpectedValues {
    /// Whether a result is as expected at this speed.
    pub(super) fn matches(&self, answer: &[Sample], speedup: u32) -> bool {
        match self {
            Self::NoSeries => answer.is_empty(),
            Self::AllIn(range) => {
                !answer.is_empty() && answer.iter().all(|sample| range.contains(sample.value, speedup))
            }
            Self::EachIn(ranges) => {
                let found = by_name(answer);
                let are_there = ranges.keys().all(|name| name == ALL_OTHERS || found.contains_key(name));
                let is_expected = |(name, value): (&String, &f64)| {
                    ranges
                        .get(name)
                        .or_else(|| ranges.get(ALL_OTHERS))
                        .is_some_and(|range| range.contains(*value, speedup))
                };
                are_there && found.iter().all(is_expected)
            }
        }
    }
}

/// Key for all series that are not listed.
const ALL_OTHERS: &str = "_";

/// The series of a result, keyed by the label values that differ.
pub(super) fn by_name(answer: &[Sample]) -> BTreeMap<String, f64> {
    let differs = |name: &String| {
        let first = answer.first().and_then(|first| first.labels.get(name));
        answer.iter().any(|other| other.labels.get(name) != first)
    };
    let name = |sample: &Sample| {
        let names = sample.labels.iter().filter(|(name, _)| answer.len() == 1 || differs(name));
        let names: Vec<&str> = names.map(|(_, text)| text.as_str()).collect();
        names.join(",")
    };
    answer.iter().map(|sample| (name(sample), sample.value)).collect()
}

impl ValueRange {
    fn exactly(value: f64) -> Self {
        Self { from: value, to: value, is_rate: false }
    }

    fn contains(self, value: f64, speedup: u32) -> bool {
        let factor = if self.is_rate { f64::from(speedup) } else { 1.0 };
        let lowest = if self.is_rate { self.from * factor * RATE_SHARE_MIN } else { self.from };
        // Floating-point sums are not exact.
        let slack = value.abs() * 1e-9;
        (lowest - slack..=self.to * factor + slack).contains(&value)
    }
}

/// The share of a rate that a busy machine still reaches: agents skip sends for which they did not run in
/// time, at these speeds hundreds per second. Upper bounds are not affected.
const RATE_SHARE_MIN: f64 = 0.5;

impl<'de> Deserialize<'de> for ExpectedValues {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let value = serde_yaml::Value::deserialize(input)?;
        let wrong = || D::Error::custom(format!("{value:?} is not a number, a range from..to or `nothing`"));
        if value.as_str() == Some("nothing") {
            return Ok(Self::NoSeries);
        }
        let Some(entries) = value.as_mapping() else {
            return range(&value).map(Self::AllIn).ok_or_else(wrong);
        };
        let entry = |(name, value)| Some((text(name)?, range(value)?));
        entries.iter().map(entry).collect::<Option<_>>().map(Self::EachIn).ok_or_else(wrong)
    }
}

/// A key as text; it may look like a number.
fn text(key: &serde_yaml::Value) -> Option<String> {
    let number = || key.as_f64().map(|number| number.to_string());
    key.as_str().map(str::to_owned).or_else(number)
}

fn range(value: &serde_yaml::Value) -> Option<ValueRange> {
    if let Some(exact) = value.as_f64() {
        return Some(ValueRange::exactly(exact));
    }
    let text = value.as_str()?;
    let (bounds, is_rate) = text.strip_suffix("/s").map_or((text, false), |bounds| (bounds, true));
    let (from, to) = bounds.split_once("..")?;
    let to = if to.is_empty() { f64::INFINITY } else { to.parse().ok()? };
    Some(ValueRange { from: from.parse().ok()?, to, is_rate })
}

impl Expected {
    /// The expected result of each dashboard query, by `dashboard / panel / letter`.
    pub(super) fn dashboards(&self) -> BTreeMap<String, ExpectedValues> {
        let panels = self.dashboards.iter().flat_map(|(dashboard, panels)| {
            panels.iter().map(move |(panel, queries)| (dashboard, panel, queries))
        });
        let queries = panels.flat_map(|(dashboard, panel, queries)| {
            queries
                .iter()
                .map(move |(letter, values)| (format!("{dashboard} / {panel} / {letter}"), values.clone()))
        });
        queries.collect()
    }
}

/// Selects alerts by name and some labels: `Name{label="text"}`.
#[derive(Debug)]
pub(super) struct AlertSelector(BTreeMap<String, String>);

impl AlertSelector {
    /// The query that returns the alert while it fires.
    pub(super) fn firing(&self) -> String {
        let labels: Vec<String> = self.0.iter().map(|(name, text)| format!("{name}=\"{text}\"")).collect();
        format!("ALERTS{{alertstate=\"firing\",{}}}", labels.join(","))
    }

    /// Whether an alert has these labels.
    pub(super) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|(name, text)| labels.get(name) == Some(text))
    }
}

impl FromStr for AlertSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not of the form Name{{label=\"text\"}}");
        let (name, labels) =
            text.strip_suffix('}').and_then(|text| text.split_once('{')).ok_or_else(wrong)?;
        let label = |label: &str| {
            let (name, text) = label.split_once("=\"")?;
            Some((name.to_owned(), text.strip_suffix('"')?.to_owned()))
        };
        let labels: Option<BTreeMap<_, _>> = labels.split(',').map(label).collect();
        let mut labels = labels.ok_or_else(wrong)?;
        labels.insert("alertname".to_owned(), name.to_owned());
        Ok(Self(labels))
    }
}

impl fmt::Display for AlertSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A dashboard query, from `scripts/check-dashboards.py --list`.
#[derive(Debug, Deserialize)]
pub(super) struct DashboardQuery {
    pub(super) dashboard: String,
    pub(super) panel: String,
    #[serde(rename = "refId")]
    pub(super) letter: String,
    pub(super) expr: String,
}

impl fmt::Display for DashboardQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} / {} / {}", self.dashboard, self.panel, self.letter)
    }
}
