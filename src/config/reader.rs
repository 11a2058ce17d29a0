//! Reads the values of a tree by key and collects all problems on the way.
//!
//! A reader returns `None` after it reported a problem, so a configuration exists exactly if there is no
//! problem. Readers of sections read *every* key before they return with `?`: so that all problems are found
//! at once, and because a key that was not read is reported as unknown.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;

use super::diagnostic::{nearest, quoted};
use super::file::Node;
use super::value_path::ValuePath;

/// The problems and warnings of a file.
#[derive(Debug, Default)]
pub(super) struct Diagnostics<'a> {
    problems: RefCell<Vec<Diagnostic<'a>>>,
    problems_dropped: Cell<usize>,
    warnings: RefCell<Vec<Diagnostic<'a>>>,
}

/// Maximum problems that are kept, in the order in which they are found; further ones are only counted.
/// Chosen: ten times [`Problems::LISTED_MAX`](super::Problems::LISTED_MAX), so that the first ones in the
/// file are rarely missing after sorting, and a file full of problems still fits in memory.
const PROBLEMS_MAX: usize = 1000;

/// A problem or a warning about a value.
#[derive(Debug)]
pub(super) struct Diagnostic<'a> {
    pub(super) path: ValuePath<'a>,
    pub(super) what: String,
    pub(super) remedy: String,
}

impl<'a> Diagnostics<'a> {
    /// The problems in the order of the file, and the number of further ones.
    pub(super) fn problems(&mut self) -> (Vec<Diagnostic<'a>>, usize) {
        (sorted(&mut self.problems), self.problems_dropped.take())
    }

    /// Warnings in the order of the file.
    pub(super) fn warnings(&mut self) -> Vec<Diagnostic<'a>> {
        sorted(&mut self.warnings)
    }
}

fn sorted<'a>(diagnostics: &mut RefCell<Vec<Diagnostic<'a>>>) -> Vec<Diagnostic<'a>> {
    let mut diagnostics = std::mem::take(diagnostics.get_mut());
    diagnostics.sort_by_cached_key(|diagnostic| diagnostic.path.indices().map(|(indices, _)| indices));
    diagnostics
}

/// A value and its path.
#[derive(Debug, Clone)]
pub(super) struct ValueReader<'a, 'n> {
    node: &'a Node,
    path: ValuePath<'a>,
    diagnostics: &'n Diagnostics<'a>,
}

impl<'a, 'n> ValueReader<'a, 'n> {
    /// The whole file.
    pub(super) fn top(node: &'a Node, diagnostics: &'n Diagnostics<'a>) -> Self {
        Self { node, path: ValuePath::top(), diagnostics }
    }

    pub(super) fn node(&self) -> &'a Node {
        self.node
    }

    pub(super) fn path(&self) -> &ValuePath<'a> {
        &self.path
    }

    /// Reports a problem. Always returns `None`, so that a reader can return the result.
    pub(super) fn reject<T>(&self, what: impl Into<String>, remedy: impl Into<String>) -> Option<T> {
        reject(self.diagnostics, self.path.clone(), what, remedy)
    }

    /// Reports a problem with the value's key.
    pub(super) fn reject_key<T>(&self, what: impl Into<String>, remedy: impl Into<String>) -> Option<T> {
        reject(self.diagnostics, self.path.clone().at_key(), what, remedy)
    }

    /// Reports that the value does not have the type that `expected` describes.
    pub(super) fn reject_type<T>(&self, expected: &str) -> Option<T> {
        match self.node {
            Node::Null => self.reject("no value", format!("write {expected}, or remove the key")),
            Node::Bool(_)
            | Node::Int(_)
            | Node::Float(_)
            | Node::Text(_)
            | Node::List(_)
            | Node::Mapping(_) => self.reject(Described(self.node).to_string(), format!("write {expected}")),
        }
    }

    /// A string. Numbers and booleans are not converted: `1.10` would become `1.1`.
    pub(super) fn text(&self, expected: &str) -> Option<&'a str> {
        match self.node {
            Node::Text(text) => Some(text),
            Node::Bool(_) | Node::Int(_) | Node::Float(_) => {
                self.reject(Described(self.node).to_string(), format!("write {expected} in quotes"))
            }
            Node::Null | Node::List(_) | Node::Mapping(_) => self.reject_type(expected),
        }
    }

    pub(super) fn boolean(self) -> Option<bool> {
        match self.node {
            Node::Bool(value) => Some(*value),
            Node::Null | Node::Int(_) | Node::Float(_) | Node::Text(_) | Node::List(_) | Node::Mapping(_) => {
                self.reject_type("true or false")
            }
        }
    }

    /// A whole number.
    pub(super) fn number<N: TryFrom<i128>>(self, allowed: &RangeInclusive<i128>) -> Option<N> {
        let expected = format!("a whole number from {} to {}", allowed.start(), allowed.end());
        match self.node {
            Node::Int(number) if allowed.contains(number) => match N::try_from(*number) {
                Ok(number) => Some(number),
                Err(_) => self.reject(format!("{number} is too large"), format!("write {expected}")),
            },
            Node::Int(number) => {
                self.reject(format!("{number} is out of range"), format!("write {expected}"))
            }
            Node::Null
            | Node::Bool(_)
            | Node::Float(_)
            | Node::Text(_)
            | Node::List(_)
            | Node::Mapping(_) => self.reject_type(&expected),
        }
    }

    /// One of a set of words.
    pub(super) fn one_of<T: Copy>(self, choices: &[(&'static str, T)]) -> Option<T> {
        let words = || choices.iter().map(|(word, _)| *word);
        let expected = words().collect::<Vec<_>>().join(" or ");
        let text = self.text(&expected)?;
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, choice)) => Some(*choice),
            None => self.reject(format!("{} is not supported", quoted(text)), suggestion(text, words())),
        }
    }

    /// A list; every item is read.
    pub(super) fn list<T>(self, expected: &str, mut read: impl FnMut(Self) -> Option<T>) -> Option<Vec<T>> {
        let Node::List(items) = self.node else {
            return self.reject_type(expected);
        };
        let path = |index| self.path.item(index);
        let read: Vec<Option<T>> = items
            .iter()
            .enumerate()
            .map(|(index, node)| read(ValueReader { node, path: path(index), diagnostics: self.diagnostics }))
            .collect();
        read.into_iter().collect()
    }

    /// A mapping with arbitrary keys; every entry is read.
    pub(super) fn entries<T>(
        self,
        expected: &str,
        mut read: impl FnMut(&'a str, Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Node::Mapping(entries) = self.node else {
            return self.reject_type(expected);
        };
        let mut seen = BTreeSet::new();
        let read: Vec<Option<T>> = entries
            .iter()
            .enumerate()
            .map(|(index, (key, node))| {
                if !seen.insert(key) {
                    return reject_duplicate(self.diagnostics, self.path.entry(index, key).at_key());
                }
                read(
                    key,
                    ValueReader { node, path: self.path.entry(index, key), diagnostics: self.diagnostics },
                )
            })
            .collect();
        read.into_iter().collect()
    }

    /// A mapping with known keys. Keys that `read` does not read are reported as unknown.
    pub(super) fn section<T>(self, read: impl FnOnce(&mut MappingReader<'a, 'n>) -> Option<T>) -> Option<T> {
        let entries: &[_] = match self.node {
            Node::Mapping(entries) => entries,
            Node::Null => &[],
            Node::Bool(_) | Node::Int(_) | Node::Float(_) | Node::Text(_) | Node::List(_) => {
                return self.reject_type("a mapping of keys to values");
            }
        };
        let mut section =
            MappingReader { entries, path: self.path, diagnostics: self.diagnostics, known: Vec::new() };
        let read = read(&mut section);
        section.reject_unknown_keys();
        read
    }
}

/// A mapping that is being read.
#[derive(Debug)]
pub(super) struct MappingReader<'a, 'n> {
    entries: &'a [(String, Node)],
    path: ValuePath<'a>,
    diagnostics: &'n Diagnostics<'a>,
    known: Vec<&'static str>,
}

impl<'a, 'n> MappingReader<'a, 'n> {
    /// Reads the value of an optional key.
    pub(super) fn key<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(ValueReader<'a, 'n>) -> Option<T>,
    ) -> Setting<T> {
        self.known.push(key);
        let Some((index, node)) = self.find(key) else {
            return Setting::Absent;
        };
        let value = ValueReader { node, path: self.path.entry(index, key), diagnostics: self.diagnostics };
        read(value).map_or(Setting::Invalid, Setting::Given)
    }

    /// Whether the mapping has a key.
    pub(super) fn has(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// Reads the value of a required key.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(ValueReader<'a, 'n>) -> Option<T>,
    ) -> Option<T> {
        match self.key(key, read) {
            Setting::Given(value) => Some(value),
            Setting::Invalid => None,
            Setting::Absent => self.reject(key, "missing", "this key is required"),
        }
    }

    /// Reads a section. A missing section is read as an empty one.
    pub(super) fn section<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Self) -> Option<T>,
    ) -> Option<T> {
        self.known.push(key);
        let (node, path) = match self.find(key) {
            Some((index, node)) => (node, self.path.entry(index, key)),
            None => (&Node::Null, self.path.missing(key)),
        };
        ValueReader { node, path, diagnostics: self.diagnostics }.section(read)
    }

    /// Reads a list of sections. A missing list, and one without a value, is empty.
    pub(super) fn sections<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        self.key(key, |value| match value.node {
            Node::Null => Some(Vec::new()),
            Node::Bool(_)
            | Node::Int(_)
            | Node::Float(_)
            | Node::Text(_)
            | Node::List(_)
            | Node::Mapping(_) => {
                value.list("a list of mappings, each after `- `", |item| item.section(&mut read))
            }
        })
        .or(Vec::new())
    }

    /// Reports a problem with the value of a key, or with a missing key. Always returns `None`.
    pub(super) fn reject<T>(
        &self,
        key: &'static str,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Option<T> {
        reject(self.diagnostics, self.path_of(key), what, remedy)
    }

    /// Reports a warning about the value of a key, or about a missing key.
    pub(super) fn warn(&self, key: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        let diagnostic = Diagnostic { path: self.path_of(key), what: what.into(), remedy: remedy.into() };
        self.diagnostics.warnings.borrow_mut().push(diagnostic);
    }

    /// Ignores the remaining keys, because it cannot be decided which of them are valid. Always returns
    /// `None`.
    pub(super) fn ignore_rest<T>(&mut self) -> Option<T> {
        self.entries = &[];
        None
    }

    fn find(&self, key: &str) -> Option<(usize, &'a Node)> {
        self.entries.iter().enumerate().find(|(_, (k, _))| k == key).map(|(index, (_, node))| (index, node))
    }

    fn path_of(&self, key: &'static str) -> ValuePath<'a> {
        match self.find(key) {
            Some((index, _)) => self.path.entry(index, key),
            None => self.path.missing(key),
        }
    }

    fn reject_unknown_keys(self) {
        let mut seen = BTreeSet::new();
        for (index, (key, _)) in self.entries.iter().enumerate() {
            let path = self.path.entry(index, key).at_key();
            if key == "<<" {
                let remedy = "write the keys out; an alias can stand for a whole value (`labels: *name`)";
                reject::<()>(self.diagnostics, path, "merge keys are not supported", remedy);
            } else if !self.known.contains(&key.as_str()) {
                let remedy = suggestion(key, self.known.iter().copied());
                reject::<()>(self.diagnostics, path, "unknown key", remedy);
            } else if !seen.insert(key) {
                reject_duplicate::<()>(self.diagnostics, path);
            }
        }
    }
}

/// The value of a key in a file.
#[derive(Debug)]
pub(super) enum Setting<T> {
    /// The key is missing.
    Absent,
    /// The value is invalid; the problem was reported.
    Invalid,
    /// The value is valid.
    Given(T),
}

impl<T> Setting<T> {
    /// The value, or `default` if the key is missing; `None` if the value is invalid.
    pub(super) fn or(self, default: T) -> Option<T> {
        self.optional().map(|given| given.unwrap_or(default))
    }

    /// `Some(None)` if the key is missing; `None` if the value is invalid.
    pub(super) fn optional(self) -> Option<Option<T>> {
        match self {
            Self::Absent => Some(None),
            Self::Invalid => None,
            Self::Given(value) => Some(Some(value)),
        }
    }
}

/// Describes a value in a problem. The contents of lists and mappings are not shown.
struct Described<'a>(&'a Node);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Node::Null => f.write_str("nothing"),
            Node::Bool(value) => write!(f, "`{value}` is a boolean"),
            Node::Int(number) => write!(f, "`{number}` is a number"),
            Node::Float(number) => write!(f, "`{number}` is a number"),
            Node::Text(text) => write!(f, "{} is a string", quoted(text)),
            Node::List(_) => f.write_str("a list"),
            Node::Mapping(_) => f.write_str("a mapping"),
        }
    }
}

fn reject<'a, T>(
    diagnostics: &Diagnostics<'a>,
    path: ValuePath<'a>,
    what: impl Into<String>,
    remedy: impl Into<String>,
) -> Option<T> {
    let mut problems = diagnostics.problems.borrow_mut();
    if problems.len() < PROBLEMS_MAX {
        problems.push(Diagnostic { path, what: what.into(), remedy: remedy.into() });
    } else {
        diagnostics.problems_dropped.update(|dropped| dropped + 1);
    }
    None
}

fn reject_duplicate<'a, T>(diagnostics: &Diagnostics<'a>, path: ValuePath<'a>) -> Option<T> {
    reject(diagnostics, path, "duplicate key", "remove one of the two")
}

/// A remedy with the most likely of the allowed words, and all of them.
fn suggestion<'w>(word: &str, allowed: impl Iterator<Item = &'w str> + Clone) -> String {
    let all = allowed.clone().collect::<Vec<_>>().join(", ");
    match nearest(word, allowed) {
        Some(nearest) => format!("did you mean {nearest}? allowed: {all}"),
        None => format!("allowed: {all}"),
    }
}
