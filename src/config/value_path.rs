//! The path to a value in a configuration file, such as `probes[3].lost_after`.

use std::fmt;

/// The path from the root of the file to a value, or to the key of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ValuePath<'a> {
    steps: Vec<PathStep<'a>>,
    end: PathEnd,
}

/// Whether a path denotes a key or a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathEnd {
    /// The key of the last step.
    Key,
    /// The value of the last step.
    Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathStep<'a> {
    /// An entry of a mapping, by index and key; the index is `None` if the mapping does not have the key.
    Entry(Option<usize>, &'a str),
    /// An item of a list, by index.
    Item(usize),
}

impl<'a> ValuePath<'a> {
    /// The root: the whole file.
    pub(super) fn top() -> Self {
        Self { steps: Vec::new(), end: PathEnd::Value }
    }

    /// The value of an entry. Entries are counted, because two of them may have the same key.
    pub(super) fn entry(&self, index: usize, key: &'a str) -> Self {
        self.step(PathStep::Entry(Some(index), key))
    }

    /// The key that belongs to this value.
    pub(super) fn at_key(self) -> Self {
        Self { end: PathEnd::Key, ..self }
    }

    /// The value of a key that is missing in the mapping.
    pub(super) fn missing(&self, key: &'a str) -> Self {
        self.step(PathStep::Entry(None, key))
    }

    /// An item of a list.
    pub(super) fn item(&self, index: usize) -> Self {
        self.step(PathStep::Item(index))
    }

    fn step(&self, step: PathStep<'a>) -> Self {
        Self { steps: self.steps.iter().copied().chain([step]).collect(), end: PathEnd::Value }
    }

    /// The indices of the steps that exist in the file, and whether the key or the value is meant there.
    /// `None` if no step exists. Paths that are sorted by their indices are in the order of the file.
    pub(super) fn indices(&self) -> Option<(Vec<usize>, PathEnd)> {
        let index = |step: &PathStep<'_>| match *step {
            PathStep::Entry(index, _) => index,
            PathStep::Item(index) => Some(index),
        };
        let indices: Vec<usize> = self.steps.iter().map_while(index).collect();
        let end = if indices.len() == self.steps.len() { self.end } else { PathEnd::Value };
        (!indices.is_empty()).then_some((indices, end))
    }
}

impl fmt::Display for ValuePath<'_> {
    /// Formats the path as in `probes[3].lost_after`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, step) in self.steps.iter().enumerate() {
            match *step {
                PathStep::Item(index) => write!(f, "[{index}]")?,
                PathStep::Entry(_, key) => {
                    f.write_str(if depth == 0 { "" } else { "." })?;
                    if !key.is_empty() && key.len() <= PLAIN_LEN_MAX && key.bytes().all(is_plain) {
                        f.write_str(key)?;
                    } else {
                        f.write_str(&super::diagnostic::quoted(key))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Maximum bytes of a key that is shown without quotes.
const PLAIN_LEN_MAX: usize = 64;

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'<')
}
