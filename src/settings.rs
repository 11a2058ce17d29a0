//! A configuration with its keys and certificates, which are read together and applied together.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::{self, Config, LoadContext, Problems, Provider, Trust};
use crate::http::client::TlsClient;
use crate::http::web_config::LoadedWebConfig;
use crate::keys::{KeyError, KeyRing};
use crate::tls::{Connector, FileError, Reloadable};
use sha2::{Digest, Sha256};

/// A configuration with its keys and certificates.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The configuration.
    pub config: Config,
    /// The keys.
    pub keys: KeyRing,
    /// TLS, passwords and headers of the HTTP port.
    pub web_config: Reloadable<LoadedWebConfig>,
    /// TLS connectors for outgoing connections, by their CA and client certificate.
    pub connectors: BTreeMap<Trust, Reloadable<Connector>>,
    /// The first 16 hexadecimal digits of the SHA-256 hash of the file.
    pub hash: String,
    /// Warnings about valid settings that are probably a mistake.
    pub warnings: Vec<String>,
}

/// Why a configuration cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("reading {path}: {source}", path = path.display())]
    Read {
        /// The path of the file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is invalid.
    #[error("{}", problems.display(file))]
    Problems {
        /// The path of the file.
        file: String,
        /// The problems.
        problems: Problems,
    },
    /// A key file cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A TLS file cannot be used.
    #[error(transparent)]
    Tls(#[from] FileError),
    /// A setting changed that can only be applied by a restart.
    #[error("{what} changed from {from} to {to}, which requires a restart; nothing was applied")]
    Restart {
        /// The key.
        what: &'static str,
        /// The current value.
        from: String,
        /// The value in the file.
        to: String,
    },
}

impl Settings {
    /// Reads a configuration file, and the key and certificate files that it names.
    ///
    /// # Errors
    /// [`SettingsError`]; it has all problems of the configuration.
    pub fn read(path: &Path, host: &LoadContext) -> Result<Self, SettingsError> {
        let text = fs::read(path).map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
        let file = path.display().to_string();
        let loaded = config::load(&text, host)
            .map_err(|problems| SettingsError::Problems { file: file.clone(), problems })?;
        let mut settings = Self::complete(loaded.config, &text)?;
        let warnings = loaded.warnings.iter().map(|warning| format!("{file}: {warning}"));
        settings.warnings.splice(..0, warnings);
        Ok(settings)
    }

    /// Reads the keys and certificates that a configuration names. `text` is the text of the configuration
    /// file.
    ///
    /// # Errors
    /// [`SettingsError::Key`], [`SettingsError::Tls`].
    pub fn complete(config: Config, text: &[u8]) -> Result<Self, SettingsError> {
        let keys = KeyRing::read(&config)?;
        let hash = Self::hash_of(text);
        let web_config = Reloadable::new(|files| match &config.tls.web_config_file {
            Some(path) => LoadedWebConfig::read(path, files),
            None => Ok(LoadedWebConfig::default()),
        })?;
        let connectors = connectors(&config)?;
        let warnings = web_config.value.warnings.clone();
        Ok(Self { config, keys, web_config, connectors, hash, warnings })
    }

    /// The [`hash`](Self::hash) of the text of a file.
    #[must_use]
    pub fn hash_of(text: &[u8]) -> String {
        Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The TLS client for the TLS parameters of a host.
    #[must_use]
    pub fn secure(&self, https: &config::Https) -> TlsClient {
        let connector = self
            .connectors
            .get(&https.trust)
            .expect("there is a connector for each trust of the configuration");
        TlsClient { connector: connector.value.clone(), server_name: https.server_name.clone() }
    }

    /// Whether the TLS files in use are the latest on disk; `None`: none are in use.
    #[must_use]
    pub fn has_latest_files(&self) -> Option<bool> {
        let is_used = self.config.tls.web_config_file.is_some() || !self.connectors.is_empty();
        let all = || self.web_config.is_latest() && self.connectors.values().all(Reloadable::is_latest);
        is_used.then(all)
    }

    /// Takes over the connectors of the old settings and updates their contents, so that existing clones of
    /// them connect with the certificates of these settings.
    pub fn inherit_connectors(&mut self, old: &Self) {
        for (trust, connector) in &mut self.connectors {
            if let Some(old) = old.connectors.get(trust) {
                old.value.follow(&connector.value);
                connector.value = old.value.clone();
            }
        }
    }

    /// Checks that these settings can replace the old ones without a restart.
    ///
    /// # Errors
    /// [`SettingsError::Restart`] for the first key that requires a restart.
    pub fn can_replace(&self, old: &Self) -> Result<(), SettingsError> {
        let (new, old) = (&self.config, &old.config);
        let path = |path: &Option<PathBuf>| {
            path.as_ref().map_or_else(|| "none".to_owned(), |path| path.display().to_string())
        };
        let fixed = [
            ("agent.name", old.agent.name.clone(), new.agent.name.clone()),
            ("listen.http", old.listen.http.to_string(), new.listen.http.to_string()),
            ("listen.stamp", old.listen.stamp.to_string(), new.listen.stamp.to_string()),
            ("listen.agent", old.listen.agent.to_string(), new.listen.agent.to_string()),
            ("state_dir", path(&old.state_dir), path(&new.state_dir)),
            ("responder.sessions", old.responder.sessions.to_string(), new.responder.sessions.to_string()),
            ("log.format", old.log.format.name().to_owned(), new.log.format.name().to_owned()),
        ];
        match fixed.into_iter().find(|(_, from, to)| from != to) {
            Some((what, from, to)) => Err(SettingsError::Restart { what, from, to }),
            None => Ok(()),
        }
    }
}

/// A connector for each [`Trust`] of the configuration.
fn connectors(config: &Config) -> Result<BTreeMap<Trust, Reloadable<Connector>>, FileError> {
    let peers = config.peers.iter().map(|peer| &peer.https);
    let targets = config.targets.iter().map(|target| &target.https);
    let of_providers = config.providers.iter().flat_map(Provider::trusts);
    let in_use = peers.chain(targets).flatten().map(|https| &https.trust).chain(of_providers);
    // The default is read even if no connection uses it, so that a mistake in it is reported.
    let client = Some(&config.tls.client).filter(|trust| **trust != Trust::default());
    let mut connectors = BTreeMap::new();
    for trust in in_use.chain(client) {
        if !connectors.contains_key(trust) {
            connectors.insert(trust.clone(), Reloadable::new(|files| Connector::read(trust, files))?);
        }
    }
    Ok(connectors)
}
