//! A page of metrics.

use std::collections::BTreeMap;
use std::fmt;

/// What a scrape said.
#[derive(Debug, Clone)]
pub struct Page {
    text: String,
    /// Name and labels, and the value as it was written.
    series: BTreeMap<String, String>,
}

impl Page {
    /// Reads the text format.
    ///
    /// # Panics
    /// When a series comes twice.
    pub fn parse(text: &str) -> Self {
        let mut series = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let earlier = series.insert(name.to_owned(), value.to_owned());
            assert!(earlier.is_none(), "{name} comes twice");
        }
        Self { text: text.to_owned(), series }
    }

    /// The text as it came.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Series of this name that have all these labels, each written as `name="value"`.
    fn find<'a>(&'a self, name: &'a str, labels: &'a [&str]) -> impl Iterator<Item = &'a str> {
        self.series
            .iter()
            .filter(|(series, _)| matches_series(series, name, labels))
            .map(|(_, value)| value.as_str())
    }

    /// Whether there is such a series.
    pub fn has(&self, name: &str, labels: &[&str]) -> bool {
        self.find(name, labels).next().is_some()
    }

    /// How many such series there are.
    pub fn count_series(&self, predicate: impl Fn(&str) -> bool) -> usize {
        self.series.keys().filter(|series| predicate(series)).count()
    }

    /// The sum of such series, which must exist and be whole numbers.
    pub fn count(&self, name: &str, labels: &[&str]) -> u64 {
        assert!(self.has(name, labels), "there is no {name} with {labels:?}");
        self.find(name, labels).map(|value| value.parse::<u64>().unwrap()).sum()
    }

    /// The sum of such series in seconds.
    pub fn seconds(&self, name: &str, labels: &[&str]) -> f64 {
        assert!(self.has(name, labels), "there is no {name} with {labels:?}");
        self.find(name, labels).map(|value| value.parse::<f64>().unwrap()).sum()
    }

    /// Changes the value of one such series.
    ///
    /// # Panics
    /// When there is no such series.
    pub fn change(&mut self, name: &str, labels: &[&str], by: f64) {
        let found = self.series.iter_mut().find(|(series, _)| matches_series(series, name, labels));
        let (_, value) = found.unwrap_or_else(|| panic!("there is no {name} with {labels:?}"));
        *value = (value.parse::<f64>().unwrap() + by).to_string();
    }

    /// Families in the order of the page, as its TYPE lines name them, with their types.
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

impl fmt::Display for Page {
    /// What is not zero, for the person who reads why a test failed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = self.series.iter().filter(|(name, value)| *value != "0" && !name.contains("_bucket"));
        told.into_iter().try_for_each(|(name, value)| writeln!(f, "{name} {value}"))
    }
}
