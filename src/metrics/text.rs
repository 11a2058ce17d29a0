//! The text formats of Prometheus, written without allocating.
//!
//! Lines are the same in both; bounds of buckets are written as floats, as OpenMetrics wants them and Prometheus 3 makes them, so that
//! which format is scraped changes no series.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter or gauge that one thread writes and a scrape reads.
#[derive(Debug, Default)]
pub struct Cell(AtomicU64);

impl Cell {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a family is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyType {
    /// Only goes up.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, a sum and a count.
    Histogram,
    /// A sum and a count.
    Summary,
}

impl FamilyType {
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
        }
    }
}

/// How a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpositionFormat {
    /// The text format 0.0.4.
    Classic,
    /// OpenMetrics 1.0.0: families of counters are called without `_total`, and the page says where it ends.
    OpenMetrics,
}

impl ExpositionFormat {
    /// What a family is called that has these samples.
    pub(super) fn family(self, kind: FamilyType, name: &str) -> &str {
        match (self, kind) {
            (Self::OpenMetrics, FamilyType::Counter) => name.strip_suffix("_total").unwrap_or(name),
            (Self::Classic, _)
            | (Self::OpenMetrics, FamilyType::Gauge | FamilyType::Histogram | FamilyType::Summary) => name,
        }
    }

    /// The end of a page.
    pub(super) const fn end(self) -> &'static [u8] {
        match self {
            Self::Classic => b"",
            Self::OpenMetrics => b"# EOF\n",
        }
    }
}

/// One family of lines, written for each `S` there is.
pub struct Family<S> {
    pub(super) name: &'static str,
    kind: FamilyType,
    help: &'static str,
    lines: Lines<S>,
}

/// Writes the lines of one `S` under a name.
pub(super) type Lines<S> = fn(&mut Writer<'_>, &'static str, &S);

pub(super) const fn counter<S>(name: &'static str, help: &'static str, lines: Lines<S>) -> Family<S> {
    Family { name, kind: FamilyType::Counter, help, lines }
}

pub(super) const fn gauge<S>(name: &'static str, help: &'static str, lines: Lines<S>) -> Family<S> {
    Family { name, kind: FamilyType::Gauge, help, lines }
}

pub(super) const fn histogram<S>(name: &'static str, help: &'static str, lines: Lines<S>) -> Family<S> {
    Family { name, kind: FamilyType::Histogram, help, lines }
}

pub(super) const fn summary<S>(name: &'static str, help: &'static str, lines: Lines<S>) -> Family<S> {
    Family { name, kind: FamilyType::Summary, help, lines }
}

impl<S> std::fmt::Debug for Family<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Family").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<S> Family<S> {
    /// Begins the family.
    pub(super) fn begin(&self, page: &mut Vec<u8>, format: ExpositionFormat) {
        Writer::new(page).family(self.name, self.kind, self.help, format);
    }

    /// Writes the lines of some.
    pub(super) fn write<'a>(&self, page: &mut Vec<u8>, all: impl Iterator<Item = &'a S>)
    where
        S: 'a,
    {
        let mut writer = Writer::new(page);
        for one in all {
            (self.lines)(&mut writer, self.name, one);
        }
    }
}

/// Appends to a page.
#[derive(Debug)]
pub struct Writer<'a> {
    page: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Appends to `page`.
    pub fn new(page: &'a mut Vec<u8>) -> Self {
        Self { page }
    }

    /// Begins a family.
    pub fn family(&mut self, name: &str, kind: FamilyType, help: &str, format: ExpositionFormat) {
        let name = format.family(kind, name);
        for part in ["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind.name(), "\n"] {
            self.text(part);
        }
    }

    /// One line: `name` with a suffix, the rendered `labels`, and `rest`: rendered further labels, each with a leading
    /// comma, up to and with the closing brace and space.
    pub fn count(&mut self, name: &str, suffix: Suffix, labels: &str, rest: &str, value: u64) {
        self.begin(name, suffix, labels, rest);
        self.integer(value);
        self.page.push(b'\n');
    }

    /// One line without labels.
    pub fn plain(&mut self, name: &str, value: u64) {
        self.text(name);
        self.text(" ");
        self.integer(value);
        self.text("\n");
    }

    /// As [`Writer::count`], with nanoseconds shown as seconds.
    pub fn seconds(&mut self, name: &str, suffix: Suffix, labels: &str, rest: &str, nanos: u64) {
        self.begin(name, suffix, labels, rest);
        self.nanos_as_seconds(nanos);
        self.page.push(b'\n');
    }

    fn begin(&mut self, name: &str, suffix: Suffix, labels: &str, rest: &str) {
        let opening = suffix.opening();
        // One look at the room for the whole line, a number and a line's end included.
        self.page.reserve(name.len() + opening.len() + labels.len() + rest.len() + 32);
        self.text(name);
        self.text(opening);
        self.text(labels);
        self.text(rest);
    }

    fn text(&mut self, text: &str) {
        self.page.extend_from_slice(text.as_bytes());
    }

    fn integer(&mut self, value: u64) {
        self.text(itoa::Buffer::new().format(value));
    }

    fn nanos_as_seconds(&mut self, nanos: u64) {
        const SECOND: u64 = 1_000_000_000;
        self.integer(nanos / SECOND);
        let mut fraction = nanos % SECOND;
        if fraction == 0 {
            return;
        }
        let mut digits = *b".000000000";
        for digit in digits[1..].iter_mut().rev() {
            *digit = b'0' + u8::try_from(fraction % 10).expect("a digit");
            fraction /= 10;
        }
        let end = digits.iter().rposition(|digit| *digit != b'0').map_or(0, |last| last + 1);
        self.page.extend_from_slice(&digits[..end]);
    }
}

/// What stands between a family's name and its labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suffix {
    /// Nothing.
    None,
    /// The sum of a summary or histogram.
    Sum,
    /// The count of a summary or histogram.
    Count,
    /// A bucket of a histogram.
    Bucket,
}

impl Suffix {
    const fn opening(self) -> &'static str {
        match self {
            Self::None => "{",
            Self::Sum => "_sum{",
            Self::Count => "_count{",
            Self::Bucket => "_bucket{",
        }
    }
}

/// The rest of a line without further labels.
pub const CLOSE: &str = "} ";

/// The last bucket of every histogram.
pub const INFINITY: &str = ",le=\"+Inf\"} ";

/// A label as it stands in a line: `name="value"`, with the value escaped.
#[must_use]
pub fn label(name: &str, value: &str) -> String {
    let mut out = String::with_capacity(name.len() + value.len() + 3);
    out.push_str(name);
    out.push_str("=\"");
    for letter in value.chars() {
        match letter {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_are_shown_as_seconds_without_rounding() {
        let shown = |nanos| {
            let mut page = Vec::new();
            Writer::new(&mut page).nanos_as_seconds(nanos);
            String::from_utf8(page).unwrap()
        };
        assert_eq!(shown(0), "0");
        assert_eq!(shown(1), "0.000000001");
        assert_eq!(shown(20_500_000), "0.0205");
        assert_eq!(shown(12_000_000_000), "12");
        assert_eq!(shown(u64::MAX), "18446744073.709551615");
    }

    #[test]
    fn a_labels_value_is_escaped() {
        assert_eq!(label("peer", "a\"b\\c\nd"), r#"peer="a\"b\\c\nd""#);
    }
}
