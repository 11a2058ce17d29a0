//! Files that are watched for changes, and values that are reloaded from them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::error::FileError;

/// Files from which a value was loaded, with the digests of their contents.
///
/// Compares contents, not modification times: a replaced symlink, as in Kubernetes, can point to an older
/// file.
#[derive(Debug, Clone, Default)]
pub struct WatchedFiles {
    /// SHA-256 of each file; `None` if it could not be read.
    seen: BTreeMap<PathBuf, Option<[u8; 32]>>,
}

/// Maximum size of a file in bytes. Chosen: a hundred times the size of a system's CA bundle.
const FILE_BYTES_MAX: u64 = 16 << 20;

impl WatchedFiles {
    /// Reads a file and records its digest, even if reading fails.
    ///
    /// # Errors
    /// [`FileError::Read`], or [`FileError::TooLarge`] beyond 16 MiB.
    pub fn read(&mut self, path: &Path) -> Result<Vec<u8>, FileError> {
        let read = read(path);
        self.seen.insert(path.to_owned(), read.as_ref().ok().map(digest));
        read
    }

    /// Returns whether no file has changed since it was read.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.seen.iter().all(|(path, seen)| read(path).ok().as_ref().map(digest) == *seen)
    }
}

/// A value loaded from files, and those files.
#[derive(Debug, Clone)]
pub struct Reloadable<T> {
    /// The value from the last successful load.
    pub value: T,
    files: WatchedFiles,
    is_latest: bool,
}

impl<T> Reloadable<T> {
    /// Loads the value for the first time.
    ///
    /// # Errors
    /// The error of `load`.
    pub fn new(load: impl FnOnce(&mut WatchedFiles) -> Result<T, FileError>) -> Result<Self, FileError> {
        let mut files = WatchedFiles::default();
        Ok(Self { value: load(&mut files)?, files, is_latest: true })
    }

    /// Loads a new value if a file has changed; the caller stores it in `value`. Returns `None` if nothing
    /// has changed. An error is returned once for each change.
    pub fn reload_if_changed(
        &mut self,
        load: impl FnOnce(&mut WatchedFiles) -> Result<T, FileError>,
    ) -> Option<Result<T, FileError>> {
        if self.files.is_current() {
            return None;
        }
        let mut files = WatchedFiles::default();
        let loaded = load(&mut files);
        self.is_latest = loaded.is_ok();
        self.files = files;
        Some(loaded)
    }

    /// Returns whether the current contents of the files were loaded successfully.
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
    fn change_is_detected_by_contents() {
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
        let mut files = WatchedFiles::default();
        assert_eq!(files.read(&at("link")).unwrap(), b"one");
        assert!(files.is_current());
        point("same");
        assert!(files.is_current());
        point("new");
        assert!(!files.is_current());
        fs::remove_file(at("new")).unwrap();
        assert!(!files.is_current());
    }

    #[test]
    fn missing_file_is_detected_when_it_appears() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("later");
        let mut files = WatchedFiles::default();
        let error = files.read(&path).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("reading {}: No such file or directory (os error 2)", path.display())
        );
        assert!(files.is_current());
        fs::write(&path, "").unwrap();
        assert!(!files.is_current());
    }

    #[test]
    fn invalid_change_is_reported_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("number");
        let number = |files: &mut WatchedFiles| {
            let text = String::from_utf8(files.read(&path)?).unwrap();
            let unusable =
                |_| FileError::Unusable { what: "it".to_owned(), problem: "is not a number".to_owned() };
            text.parse::<u32>().map_err(unusable)
        };
        fs::write(&path, "1").unwrap();
        let mut loaded = Reloadable::new(number).unwrap();
        assert!(loaded.reload_if_changed(number).is_none());
        fs::write(&path, "one").unwrap();
        assert_eq!(loaded.reload_if_changed(number).unwrap().unwrap_err().to_string(), "it is not a number");
        assert!(loaded.reload_if_changed(number).is_none());
        assert_eq!((loaded.value, loaded.is_latest()), (1, false));
        fs::write(&path, "2").unwrap();
        assert_eq!(loaded.reload_if_changed(number).unwrap().unwrap(), 2);
        assert!(loaded.is_latest());
    }
}
