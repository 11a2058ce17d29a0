//! Problems of a configuration, and how they are displayed.

use std::fmt;

/// All problems of a configuration, in the order of the file. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    listed: Vec<Problem>,
    more: usize,
}

impl Problems {
    /// Maximum problems that are listed; further ones are only counted. Chosen: more than a person reads at
    /// once.
    pub const LISTED_MAX: usize = 100;

    /// `more` is the number of problems that are not listed.
    pub(super) fn new(listed: Vec<Problem>, more: usize) -> Self {
        debug_assert!(
            !listed.is_empty() && listed.len() <= Self::LISTED_MAX,
            "there is at least one problem"
        );
        Self { listed, more }
    }

    /// The listed problems. Each is displayed as one line.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.listed.iter()
    }

    /// The number of problems that are not listed.
    #[must_use]
    pub fn more(&self) -> usize {
        self.more
    }

    /// All problems as text of several lines, headed by the name of the file.
    #[must_use]
    pub fn display<'a>(&'a self, file: &'a str) -> Display<'a> {
        Display { problems: self, file }
    }
}

/// See [`Problems::display`].
#[derive(Debug)]
pub struct Display<'a> {
    problems: &'a Problems,
    file: &'a str,
}

impl fmt::Display for Display<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problems { listed, more } = self.problems;
        let count = listed.len() + more;
        write!(f, "{}: {count} {}", self.file, if count == 1 { "problem" } else { "problems" })?;
        for problem in listed {
            f.write_str("\n  ")?;
            problem.write_found(f)?;
            if let Some(remedy) = &problem.remedy {
                write!(f, "\n    {remedy}")?;
            }
        }
        match more {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

impl<'a> IntoIterator for &'a Problems {
    type Item = &'a Problem;
    type IntoIter = std::slice::Iter<'a, Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self::new(vec![problem], 0)
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.display("configuration").fmt(f)
    }
}

impl std::error::Error for Problems {}

/// A problem or a warning. Shows at most the value of its own key, never a line of the file: other keys may
/// hold secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it is; `None`: not at a single location, or not searched for because the file is too large.
    pub location: Option<Location>,
    /// The path of the value, such as `probes[3].lost_after`; empty: the whole file.
    pub path: String,
    /// What was found, and what is wrong with it.
    pub what: String,
    /// What is allowed, and what to do.
    pub remedy: Option<String>,
}

impl Problem {
    /// Writes where the problem is and what it is, without the remedy.
    fn write_found(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Location { line, column }) = self.location {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.what)
    }
}

impl fmt::Display for Problem {
    /// Formats the problem as one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_found(f)?;
        self.remedy.iter().try_for_each(|remedy| write!(f, "; {remedy}"))
    }
}

/// A location in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// The line, counted from 1.
    pub line: usize,
    /// The column in characters, counted from 1.
    pub column: usize,
}

impl Location {
    /// The location directly after the text `before`.
    pub(super) fn after(before: &str) -> Self {
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.bytes().filter(|byte| *byte == b'\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

/// Quotes a text from the file for a message of one line: escaped, and cut if it is long.
pub(super) fn quoted(text: &str) -> String {
    let visible: String = text.chars().take(SHOWN_CHARS_MAX).flat_map(char::escape_debug).collect();
    let cut = if text.chars().nth(SHOWN_CHARS_MAX).is_some() { "…" } else { "" };
    format!("`{visible}{cut}`")
}

/// The candidate that `word` is probably a misspelling of; `None`: none is near enough.
///
/// Only the first [`CANDIDATES_MAX`] candidates are compared, to limit the time.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance_max = (word.len() / 2).clamp(1, DISTANCE_MAX);
    candidates
        .into_iter()
        .take(CANDIDATES_MAX)
        .filter(|candidate| candidate.len().abs_diff(word.len()) <= distance_max)
        .map(|candidate| (edit_distance(word.as_bytes(), candidate.as_bytes()), candidate))
        .filter(|(distance, _)| *distance <= distance_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The number of insertions, deletions and substitutions between two words (Levenshtein distance, one row at
/// a time).
fn edit_distance(left: &[u8], right: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, l) in left.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, r) in right.iter().enumerate() {
            let substituted = diagonal + usize::from(l != r);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

/// Maximum characters of a value that are shown. Chosen: enough to recognise it.
const SHOWN_CHARS_MAX: usize = 64;

/// Maximum edit distance of a suggestion. Chosen: with more, suggestions look random.
const DISTANCE_MAX: usize = 3;

/// Maximum words that are compared for a suggestion.
const CANDIDATES_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_word_is_suggested_if_it_is_near() {
        let keys = ["interval", "late_after", "lost_after", "name"];
        for (word, nearest_key) in [
            ("intervall", Some("interval")),
            ("intreval", Some("interval")),
            ("late-after", Some("late_after")),
            ("nmae", Some("name")),
            ("nam", Some("name")),
            ("timeout", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, keys), nearest_key, "{word}");
        }
    }

    #[test]
    fn quoted_value_stays_on_one_line() {
        assert_eq!(quoted("a\nb\u{1b}[31m`"), "`a\\nb\\u{1b}[31m``");
        assert_eq!(quoted(&"x".repeat(65)), format!("`{}…`", "x".repeat(64)));
    }

    #[test]
    fn location_counts_lines_and_characters_from_1() {
        assert_eq!(Location::after(""), Location { line: 1, column: 1 });
        assert_eq!(Location::after("a\nµµ"), Location { line: 2, column: 3 });
        assert_eq!(Location::after("a\n"), Location { line: 2, column: 1 });
    }
}
