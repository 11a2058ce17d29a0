//! Rules and configurations for a time that runs faster.
//!
//! A rule looks back for minutes, and an alert waits for minutes. Where all of these are shorter by a factor, and datagrams
//! come faster by the same, everything is as it was and takes less time: as many datagrams in a window, and as many
//! evaluations of a rule until it fires.

use std::fmt::Write as _;

/// Seconds that expressions multiply rates with: the lengths of their windows.
const WINDOWS: [&str; 3] = ["180", "300", "900"];

/// The text with every duration shorter by a factor, and with every window's length in seconds.
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

/// What begins with a digit: how long it is, and what it becomes.
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

/// A duration as Prometheus writes it.
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

/// The times of rules, dashboards and configurations, and what only looks like one.
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
