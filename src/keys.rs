//! Key files.

use std::fs;
use std::path::{Path, PathBuf};

use pathmeter_proto::key::{KeyFileError, Keys};

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("reading the key file {path}: {source}", path = path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It holds no usable key.
    #[error("the key file {path} {source}", path = path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: KeyFileError,
    },
}

/// Reads a key file: its keys, and its text, by which a change is noticed.
///
/// # Errors
/// [`KeyError`] names the file.
pub fn read(path: &Path) -> Result<(Keys, String), KeyError> {
    let text = fs::read_to_string(path).map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
    match Keys::parse(&text) {
        Ok(keys) => Ok((keys, text)),
        Err(source) => Err(KeyError::Parse { path: path.to_owned(), source }),
    }
}
