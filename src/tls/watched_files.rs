//! Files, and what was in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::error::FileError;

/// The files that something was made of, by what was in them when they were read.
///
/// Contents are compared, not times: a symlink that is swapped, as Kubernetes does, may lead to an older file.
#[derive(Debug, Clone, Default)]
pub struct WatchedFiles {
    /// The SHA-256 of each; `None`: could not be read.
    seen: BTreeMap<PathBuf, Option<[u8; 32]>>,
}

/// Bytes of a file. Chosen: a hundred times what all CAs of a system take.
const FILE_BYTES_MAX: u64 = 16 << 20;

impl WatchedFiles {
    /// Reads a file, and remembers it, whatever comes of it.
    ///
    /// # Errors
    /// [`FileError::Read`], or [`FileError::TooLarge`] beyond 16 MiB.
    pub fn read(&mut self, path: &Path) -> Result<Vec<u8>, FileError> {
        let read = read(path);
        self.seen.insert(path.to_owned(), read.as_ref().ok().map(digest));
        read
    }

    /// Whether every file is as it was.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.seen.iter().all(|(path, seen)| read(path).ok().as_ref().map(digest) == *seen)
    }
}

/// Something that was made of files, and those files.
#[derive(Debug, Clone)]
pub struct Reloadable<T> {
    /// What was made when all files could last be used.
    pub value: T,
    shelf: WatchedFiles,
    is_latest: bool,
}

impl<T> Reloadable<T> {
    /// Makes it for the first time.
    ///
    /// # Errors
    /// Whatever `make` fails with.
    pub fn new(make: impl FnOnce(&mut WatchedFiles) -> Result<T, FileError>) -> Result<Self, FileError> {
        let mut shelf = WatchedFiles::default();
        Ok(Self { value: make(&mut shelf)?, shelf, is_latest: true })
    }

    /// Makes another if a file has changed, and leaves it to the caller to take it; `None`: all is as it was. Files that cannot
    /// be used are told of once.
    pub fn renewed(
        &mut self,
        make: impl FnOnce(&mut WatchedFiles) -> Result<T, FileError>,
    ) -> Option<Result<T, FileError>> {
        if self.shelf.is_current() {
            return None;
        }
        let mut shelf = WatchedFiles::default();
        let made = make(&mut shelf);
        self.is_latest = made.is_ok();
        self.shelf = shelf;
        Some(made)
    }

    /// Whether the files as they are now could be used.
    #[must_use]
    pub fn is_latest(&self) -> bool {
        self.is_latest
    }
}

fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    let count = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if count as u64 > FILE_BYTES_MAX {
        return Err(FileError::TooLarge { path: path.to_owned(), limit: FILE_BYTES_MAX });
    }
    Ok(bytes)
}

fn digest(bytes: &Vec<u8>) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_change_is_one_of_contents() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (name, text) in [("old", "one"), ("new", "two"), ("same", "one")] {
            fs::write(at(name), text).unwrap();
        }
        let point = |to: &str| {
            symlink(at(to), at("next")).unwrap();
            fs::rename(at("next"), at("link")).unwrap();
        };
        point("old");
        let mut shelf = WatchedFiles::default();
        assert_eq!(shelf.read(&at("link")).unwrap(), b"one");
        assert!(shelf.is_current());
        point("same");
        assert!(shelf.is_current());
        point("new");
        assert!(!shelf.is_current());
        fs::remove_file(at("new")).unwrap();
        assert!(!shelf.is_current());
    }

    #[test]
    fn a_file_that_is_missing_is_noticed_when_it_comes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later");
        let mut shelf = WatchedFiles::default();
        let error = shelf.read(&path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("reading {}: No such file or directory (os error 2)", path.display())
        );
        assert!(shelf.is_current());
        fs::write(&path, "").unwrap();
        assert!(!shelf.is_current());
    }

    #[test]
    fn a_change_that_cannot_be_used_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        let number = |shelf: &mut WatchedFiles| {
            let text = String::from_utf8(shelf.read(&path)?).unwrap();
            let unusable =
                |_| FileError::Unusable { what: "it".to_owned(), problem: "is no number".to_owned() };
            text.parse::<u32>().map_err(unusable)
        };
        fs::write(&path, "1").unwrap();
        let mut made = Reloadable::new(number).unwrap();
        assert!(made.renewed(number).is_none());
        fs::write(&path, "one").unwrap();
        assert_eq!(made.renewed(number).unwrap().unwrap_err().to_string(), "it is no number");
        assert!(made.renewed(number).is_none());
        assert_eq!((made.value, made.is_latest()), (1, false));
        fs::write(&path, "2").unwrap();
        assert_eq!(made.renewed(number).unwrap().unwrap(), 2);
        assert!(made.is_latest());
    }
}
