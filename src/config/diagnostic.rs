//! What is wrong with a configuration, for the person who wrote it.

use std::fmt;

/// Everything that is wrong with a configuration, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    listed: Vec<Problem>,
    more: usize,
}

impl Problems {
    /// Problems that are listed; the others are only counted. Chosen: more than anyone reads at once.
    pub const LISTED_MAX: usize = 100;

    /// `more` counts what is wrong besides the listed ones.
    pub(super) fn new(listed: Vec<Problem>, more: usize) -> Self {
        debug_assert!(!listed.is_empty() && listed.len() <= Self::LISTED_MAX, "a refusal has its reasons");
        Self { listed, more }
    }

    /// The listed problems; each is one line when displayed.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.listed.iter()
    }

    /// How many problems there are besides the listed ones.
    #[must_use]
    pub fn more(&self) -> usize {
        self.more
    }

    /// All of them as a text of several lines, under the file's name.
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

/// One thing that is wrong, or in a warning, odd. Shows a value of its own key at most, never a line of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where; `None`: nowhere in the file, or in a file that is too large to look again ([`path`](Self::path) tells).
    pub location: Option<Location>,
    /// Which value, such as `probes[3].lost_after`; empty: the file as a whole.
    pub path: String,
    /// What was found.
    pub what: String,
    /// What is allowed, and what to do.
    pub remedy: Option<String>,
}

impl Problem {
    /// Where and what, without the remedy.
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
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_found(f)?;
        self.remedy.iter().try_for_each(|remedy| write!(f, "; {remedy}"))
    }
}

/// A place in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
}

impl Location {
    /// The place behind `before`.
    pub(super) fn after(before: &str) -> Self {
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.bytes().filter(|byte| *byte == b'\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

/// A text from the file, fit to be visible in one line: escaped, and cut when long.
pub(super) fn quoted(text: &str) -> String {
    let visible: String = text.chars().take(SHOWN_CHARS_MAX).flat_map(char::escape_debug).collect();
    let cut = if text.chars().nth(SHOWN_CHARS_MAX).is_some() { "…" } else { "" };
    format!("`{visible}{cut}`")
}

/// The candidate that `word` is probably a misspelling of.
///
/// Gives up above [`CANDIDATES_MAX`] candidates: a suggestion is not worth the time.
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

/// Insertions, deletions and substitutions between two words (Levenshtein, one row at a time).
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

/// Characters of a value that are visible. Chosen: enough to recognise it.
const SHOWN_CHARS_MAX: usize = 64;

/// Mistakes within which a word is taken for another. Chosen: with more, suggestions begin to look random.
const DISTANCE_MAX: usize = 3;

/// Words that are compared for a suggestion.
const CANDIDATES_MAX: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested_and_a_far_one_is_not() {
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
    fn a_shown_value_stays_in_its_line() {
        assert_eq!(quoted("a\nb\u{1b}[31m`"), "`a\\nb\\u{1b}[31m``");
        assert_eq!(quoted(&"x".repeat(65)), format!("`{}…`", "x".repeat(64)));
    }

    #[test]
    fn a_location_counts_lines_and_characters_from_1() {
        assert_eq!(Location::after(""), Location { line: 1, column: 1 });
        assert_eq!(Location::after("a\nµµ"), Location { line: 2, column: 3 });
        assert_eq!(Location::after("a\n"), Location { line: 2, column: 1 });
    }
}
