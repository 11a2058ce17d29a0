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
    /// The key that all agents of the mesh share; `None`: the agent has no key.
    pub mesh: Option<Arc<Keys>>,
    /// Keys of single targets, by the target's name.
    pub targets: BTreeMap<String, Arc<Keys>>,
    /// A hash of the contents of all key files: it differs whenever one of them has changed.
    pub generation: u64,
}

impl KeyRing {
    /// Reads the key files that a configuration names.
    ///
    /// # Errors
    /// [`KeyError`] of the first file that cannot be used.
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
        Ok(Self { mesh, targets, generation: first_word(contents) })
    }

    /// The [`generation`](Self::generation) that reading the key files again would give; `None`: one cannot
    /// be read.
    #[must_use]
    pub fn generation_on_disk(config: &Config) -> Option<u64> {
        let of_targets = config.targets.iter().filter_map(|target| target.key_file.as_deref());
        let mut contents = Sha256::new();
        for path in config.key_file.as_deref().into_iter().chain(of_targets) {
            contents.update(fs::read(path).ok()?);
        }
        Some(first_word(contents))
    }
}

fn first_word(contents: Sha256) -> u64 {
    contents.finalize().iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

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

/// Reads a key file: its keys, and its text, from which [`KeyRing::generation`] is computed.
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

/// Which keys authenticate a path, and in which state of their file: two that are equal give the same keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyChoice {
    /// None: open mode.
    None,
    /// The mesh's.
    Mesh {
        /// See [`KeyRing::generation`].
        generation: u64,
    },
    /// Those shared with the path's target.
    Target {
        /// See [`KeyRing::generation`].
        generation: u64,
    },
}

impl KeyRing {
    /// The choice of the mesh's keys, if there are any.
    #[must_use]
    pub fn of_mesh(&self) -> KeyChoice {
        match self.mesh {
            Some(_) => KeyChoice::Mesh { generation: self.generation },
            None => KeyChoice::None,
        }
    }

    /// The choice of a target's keys, if there are any.
    #[must_use]
    pub fn of_target(&self, name: &str) -> KeyChoice {
        match self.targets.contains_key(name) {
            true => KeyChoice::Target { generation: self.generation },
            false => KeyChoice::None,
        }
    }

    /// The keys of a choice, for a path towards `peer`.
    #[must_use]
    pub fn get(&self, choice: KeyChoice, peer: &str) -> Option<Arc<Keys>> {
        match choice {
            KeyChoice::None => None,
            KeyChoice::Mesh { .. } => self.mesh.clone(),
            KeyChoice::Target { .. } => self.targets.get(peer).cloned(),
        }
    }
}
