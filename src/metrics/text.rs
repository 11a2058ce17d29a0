//! Writers for the Prometheus text formats. They write lines without allocating.
//!
//! Samples are the same in both formats. Bucket bounds are written as floats, as OpenMetrics requires and
//! Prometheus 3 normalises them, so that the negotiated format does not change any series.

use std::sync::atomic::{AtomicU64, Ordering};

/// Value of a counter or gauge, written by one thread and read by scrapes.
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

    /// Sets the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Returns the value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Type of a metric family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyType {
    /// A value that only increases.
    Counter,
    /// A value that increases and decreases.
    Gauge,
    /// Buckets, a sum and a count.
    Histogram,
    /// A sum and a count, without quantiles.
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

/// Text format of a metrics page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpositionFormat {
    /// Prometheus text format 0.0.4.
    Classic,
    /// OpenMetrics 1.0.0: names of counter families lack `_total`, and the page ends with `# EOF`.
    OpenMetrics,
}

impl ExpositionFormat {
    /// Returns the name of the family whose samples are called `name`.
    pub(super) fn family(self, kind: FamilyType, name: &str) -> &str {
        match (self, kind) {
            (Self::OpenMetrics, FamilyType::Counter) => name.strip_suffix("_total").unwrap_or(name),
            (Self::Classic, _)
            | (Self::OpenMetrics, FamilyType::Gauge | FamilyType::Histogram | FamilyType::Summary) => name,
        }
    }

    /// Returns the end of a page.
    pub(super) const fn end(self) -> &'static [u8] {
        match self {
            Self::Classic => b"",
            Self::OpenMetrics => b"# EOF\n",
        }
    }
}

/// A metric family, whose lines are written for each `S`.
pub struct Family<S> {
    pub(super) name: &'static str,
    kind: FamilyType,
    help: &'static str,
    lines: Lines<S>,
}

/// Writes the lines of one `S` under the family's name.
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
    /// Writes the header lines of the family.
    pub(super) fn begin(&self, page: &mut Vec<u8>, format: ExpositionFormat) {
        Writer::new(page).family(self.name, self.kind, self.help, format);
    }

    /// Writes the lines of some members.
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

/// Appends lines to a page.
#[derive(Debug)]
pub struct Writer<'a> {
    page: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Returns a writer that appends to `page`.
    pub fn new(page: &'a mut Vec<u8>) -> Self {
        Self { page }
    }

    /// Writes the `HELP` and `TYPE` lines of a family.
    pub fn family(&mut self, name: &str, kind: FamilyType, help: &str, format: ExpositionFormat) {
        let name = format.family(kind, name);
        for part in ["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind.name(), "\n"] {
            self.text(part);
        }
    }

    /// Writes one line: `name` with a suffix, the rendered `labels`, and `rest`: further rendered labels,
    /// each with a leading comma, up to and including the closing brace and space.
    pub fn count(&mut self, name: &str, suffix: Suffix, labels: &str, rest: &str, value: u64) {
        self.begin(name, suffix, labels, rest);
        self.integer(value);
        self.page.push(b'\n');
    }

    /// Writes one line without labels.
    pub fn plain(&mut self, name: &str, value: u64) {
        self.text(name);
        self.text(" ");
        self.integer(value);
        self.text("\n");
    }

    /// Like [`Writer::count`], but shows nanoseconds as seconds.
    pub fn seconds(&mut self, name: &str, suffix: Suffix, labels: &str, rest: &str, nanos: u64) {
        self.begin(name, suffix, labels, rest);
        self.nanos_as_seconds(nanos);
        self.page.push(b'\n');
    }

    fn begin(&mut self, name: &str, suffix: Suffix, labels: &str, rest: &str) {
        let opening = suffix.opening();
        // Reserves space once for the whole line, including the number and the line feed.
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

/// What follows a family's name in a sample's name.
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

/// End of the label set of a line without further labels.
pub const CLOSE: &str = "} ";

/// End of the label set of a histogram's last bucket.
pub const INFINITY: &str = ",le=\"+Inf\"} ";

/// Returns a rendered label, `name="value"`, with the value escaped.
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
    fn nanoseconds_are_written_as_seconds_without_rounding() {
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
    fn label_values_are_escaped() {
        assert_eq!(label("peer", "a\"b\\c\nd"), r#"peer="a\"b\\c\nd""#);
    }
}
