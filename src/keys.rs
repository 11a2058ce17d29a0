//! Key files, and the keys read from them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pathmeter_proto::key::{KeyFileError, Keys};
use sha2::{Digest as _, Sha256};

use crate::config::Config;

/// The keys in use.
#[derive(Debug, Clone, Default)]
pub struct KeyRing {
    /// The keys that all agents of the mesh share; `None`: the agent has no key.
    pub mesh: Option<Arc<Keys>>,
    /// Keys that are shared with a single target, by the name of the target.
    pub targets: BTreeMap<String, Arc<Keys>>,
    /// A hash of the contents of all key files. It changes if one of the files changes.
    pub generation: u64,
}

impl KeyRing {
    /// Reads the key files of a configuration.
    ///
    /// # Errors
    /// [`KeyError`] for the first file that cannot be used.
    pub fn read(config: &Config) -> Result<Self, KeyError> {
        let mut contents = Sha256::new();
        let mut load = |path: &Path| -> Result<Arc<Keys>, KeyError> {
            let (keys, text) = read(path)?;
            contents.update(text);
            Ok(Arc::new(keys))
        };
        let mesh = config.key_file.as_deref().map(&mut load).transpose()?;
        let mut targets = BTreeMap::new();
        for target in &config.targets {
            if let Some(path) = &target.key_file {
                targets.insert(target.name.clone(), load(path)?);
            }
        }
        Ok(Self { mesh, targets, generation: first_bytes(contents) })
    }

    /// The [`generation`](Self::generation) of the key files as they are on disk; `None` if one cannot be
    /// read.
    #[must_use]
    pub fn generation_on_disk(config: &Config) -> Option<u64> {
        let target_files = config.targets.iter().filter_map(|target| target.key_file.as_deref());
        let mut contents = Sha256::new();
        for path in config.key_file.as_deref().into_iter().chain(target_files) {
            contents.update(fs::read(path).ok()?);
        }
        Some(first_bytes(contents))
    }
}

/// The first eight bytes of the hash.
fn first_bytes(contents: Sha256) -> u64 {
    contents.finalize().iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("reading key file {path}: {source}", path = path.display())]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file does not contain a usable key.
    #[error("key file {path} {source}", path = path.display())]
    Parse {
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        source: KeyFileError,
    },
}

/// Reads a key file. Returns its keys, and its text, from which [`KeyRing::generation`] is computed.
///
/// # Errors
/// [`KeyError`] with the path of the file.
pub fn read(path: &Path) -> Result<(Keys, String), KeyError> {
    let text = fs::read_to_string(path).map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
    match Keys::parse(&text) {
        Ok(keys) => Ok((keys, text)),
        Err(source) => Err(KeyError::Parse { path: path.to_owned(), source }),
    }
}

/// Which keys authenticate a path, with the generation of the key files. Equal choices denote the same keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyChoice {
    /// No keys: open mode.
    None,
    /// The keys of the mesh.
    Mesh {
        /// See [`KeyRing::generation`].
        generation: u64,
    },
    /// The keys that are shared with the target of the path.
    Target {
        /// See [`KeyRing::generation`].
        generation: u64,
    },
}

impl KeyRing {
    /// [`Mesh`](KeyChoice::Mesh) if the mesh has keys.
    #[must_use]
    pub fn mesh_choice(&self) -> KeyChoice {
        match self.mesh {
            Some(_) => KeyChoice::Mesh { generation: self.generation },
            None => KeyChoice::None,
        }
    }

    /// [`Target`](KeyChoice::Target) if the target has keys.
    #[must_use]
    pub fn target_choice(&self, name: &str) -> KeyChoice {
        match self.targets.contains_key(name) {
            true => KeyChoice::Target { generation: self.generation },
            false => KeyChoice::None,
        }
    }

    /// The keys of a choice, for a path to `peer`.
    #[must_use]
    pub fn get(&self, choice: KeyChoice, peer: &str) -> Option<Arc<Keys>> {
        match choice {
            KeyChoice::None => None,
            KeyChoice::Mesh { .. } => self.mesh.clone(),
            KeyChoice::Target { .. } => self.targets.get(peer).cloned(),
        }
    }
}
