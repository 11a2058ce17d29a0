//! Rules and configurations for accelerated time.
//!
//! Rules look back for minutes, and alerts wait for minutes. If all durations are divided by one factor, and
//! datagrams are sent faster by the same factor, the number of datagrams in a window and the number of rule
//! evaluations before an alert fires stay the same, and the test takes less time.

use std::fmt::Write as _;

/// Window lengths in seconds, by which expressions multiply rates.
const WINDOWS: [&str; 3] = ["180", "300", "900"];

/// Divides every duration in the text, and every window length in seconds, by `speedup`.
pub(super) fn scaled(text: &str, speedup: u32) -> String {
    let mut out = String::new();
    let mut rest = text;
    let mut before = ' ';
    while let Some(first) = rest.chars().next() {
        let is_inside = before.is_ascii_alphanumeric() || "_:.*-".contains(before);
        let (taken, replaced) = match () {
            () if is_inside || !first.is_ascii_digit() => (first.len_utf8(), None),
            () => number(rest, speedup),
        };
        match replaced {
            Some(text) => out.push_str(&text),
            None => out.push_str(&rest[..taken]),
        }
        before = rest[..taken].chars().next_back().unwrap();
        rest = &rest[taken..];
    }
    out
}

/// A word that begins with a digit: its length and its replacement.
fn number(text: &str, speedup: u32) -> (usize, Option<String>) {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(text.len());
    let word = &text[..end];
    let is_window = WINDOWS.contains(&word) && text[end..].starts_with(" *");
    match milliseconds(word) {
        Some(duration) => {
            let mut shorter = String::new();
            write!(shorter, "{}ms", duration / u64::from(speedup)).unwrap();
            (end, Some(shorter))
        }
        None if is_window => (end, Some((word.parse::<f64>().unwrap() / f64::from(speedup)).to_string())),
        None => (end, None),
    }
}

/// Parses a duration in Prometheus notation.
fn milliseconds(word: &str) -> Option<u64> {
    let mut rest = word;
    let mut sum = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let factor = match &rest[..unit] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        sum += number * factor;
        rest = &rest[unit..];
    }
    (!word.is_empty()).then_some(sum)
}

/// Durations in rules, dashboards and configurations are scaled, and similar text is not.
pub(crate) fn scaled_durations() {
    for (text, shorter) in [
        ("for: 5m", "for: 20000ms"),
        ("x[1h] offset 23h30m", "x[240000ms] offset 5640000ms"),
        ("300 * a:rate5m >= 270", "20 * a:rate5m >= 270"),
        ("a:p99_15m > 14 * 86400", "a:p99_15m > 14 * 86400"),
        ("a / 300", "a / 300"),
        ("regex: a:.*5m|up", "regex: a:.*5m|up"),
        ("interval: 30s # 30 s, for 1.5m", "interval: 2000ms # 30 s, for 1.5m"),
    ] {
        assert_eq!(scaled(text, 15), shorter);
    }
}
