//! The folder in which the agent keeps what survives a restart.

mod entry_file;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;

pub use entry_file::{EntryFile, FoundEntries};

/// A folder that this process has locked.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Released when it is dropped, and when the process ends.
    _lock: Flock<File>,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It cannot be created or written.
    #[error(
        "{path}: {source}; the user of the agent must be able to create and write it, or change state_dir",
        path = path.display()
    )]
    Unusable {
        /// The folder, or the file in it.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another process uses it.
    #[error("{path} is used by another agent; give each its own state_dir", path = .0.display())]
    InUse(PathBuf),
}

impl StateDir {
    /// Locks the folder, and creates it first if it does not exist.
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let unusable = |source| StateDirError::Unusable { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(unusable)?;
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let lock = options.open(path.join("lock")).map_err(unusable)?;
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(StateDirError::InUse(path.to_owned())),
            Err((_, error)) => Err(unusable(error.into())),
        }
    }

    /// Opens an [`EntryFile`] whose two files have at most `bytes_max` each, and returns its entries, oldest
    /// first.
    ///
    /// # Errors
    /// [`StateDirError::Unusable`].
    pub fn entry_file<T: DeserializeOwned>(
        &self,
        name: &str,
        bytes_max: u64,
    ) -> Result<(EntryFile, FoundEntries<T>), StateDirError> {
        EntryFile::open(&self.path, name, bytes_max).map_err(|source| StateDirError::Unusable {
            path: self.path.join(format!("{name}.jsonl")),
            source,
        })
    }

    /// The path of the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}
