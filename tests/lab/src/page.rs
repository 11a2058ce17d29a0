//! A parsed metrics page.

use std::collections::BTreeMap;
use std::fmt;

/// A metrics page in the Prometheus text format.
#[derive(Debug, Clone)]
pub struct MetricsPage {
    text: String,
    /// Value, as written, by name and labels.
    series: BTreeMap<String, String>,
}

impl MetricsPage {
    /// Parses the text format.
    ///
    /// # Panics
    /// When a series occurs twice.
    pub fn parse(text: &str) -> Self {
        let mut series = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let earlier = series.insert(name.to_owned(), value.to_owned());
            assert!(earlier.is_none(), "{name} occurs twice");
        }
        Self { text: text.to_owned(), series }
    }

    /// The unparsed text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Values of the series that have this name and all these labels, each label written as `name="value"`.
    fn find<'a>(&'a self, name: &'a str, labels: &'a [&str]) -> impl Iterator<Item = &'a str> {
        self.series
            .iter()
            .filter(|(series, _)| matches_series(series, name, labels))
            .map(|(_, value)| value.as_str())
    }

    /// Whether a series with this name and these labels exists.
    pub fn has(&self, name: &str, labels: &[&str]) -> bool {
        self.find(name, labels).next().is_some()
    }

    /// The number of series whose name and labels fulfil the predicate.
    pub fn count_series(&self, predicate: impl Fn(&str) -> bool) -> usize {
        self.series.keys().filter(|series| predicate(series)).count()
    }

    /// The sum of the matching series. At least one must exist, and all must be whole numbers.
    pub fn count(&self, name: &str, labels: &[&str]) -> u64 {
        assert!(self.has(name, labels), "no series {name} with {labels:?}");
        self.find(name, labels).map(|value| value.parse::<u64>().unwrap()).sum()
    }

    /// The sum of the matching series as a number of seconds. At least one must exist.
    pub fn seconds(&self, name: &str, labels: &[&str]) -> f64 {
        assert!(self.has(name, labels), "no series {name} with {labels:?}");
        self.find(name, labels).map(|value| value.parse::<f64>().unwrap()).sum()
    }

    /// Adds `by` to the value of the first matching series.
    ///
    /// # Panics
    /// When no series matches.
    pub fn change(&mut self, name: &str, labels: &[&str], by: f64) {
        let found = self.series.iter_mut().find(|(series, _)| matches_series(series, name, labels));
        let (_, value) = found.unwrap_or_else(|| panic!("no series {name} with {labels:?}"));
        *value = (value.parse::<f64>().unwrap() + by).to_string();
    }

    /// Metric families and their types, in page order, from the TYPE lines.
    pub fn families(&self) -> Vec<(&str, &str)> {
        let types = self.text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        types.map(|family| family.split_once(' ').unwrap()).collect()
    }
}

/// Whether a series has this name and all these labels.
fn matches_series(series: &str, name: &str, labels: &[&str]) -> bool {
    let (found, given) = series.split_once('{').unwrap_or((series, ""));
    found == name && labels.iter().all(|label| given.contains(label))
}

impl fmt::Display for MetricsPage {
    /// Shows the series that are not zero, without histogram buckets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.series.iter().filter(|(name, value)| *value != "0" && !name.contains("_bucket"));
        shown.into_iter().try_for_each(|(name, value)| writeln!(f, "{name} {value}"))
    }
}
