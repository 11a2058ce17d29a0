//! Reads files again when they have changed: the configuration, keys, certificates and the web config file.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tracing::{info, warn};

use super::{ConfigSource, Daemon};
use crate::http::web_config::LoadedWebConfig;
use crate::keys::KeyRing;
use crate::settings::Settings;
use crate::tls::Connector;

/// Chosen: certificates are renewed days before they expire, so this is soon enough.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Hashes of what the settings are read from; `None`: it cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents {
    configuration: Option<String>,
    keys: Option<u64>,
}

impl Contents {
    pub(super) fn of(settings: &Settings) -> Self {
        Self { configuration: Some(settings.hash.clone()), keys: Some(settings.keys.generation) }
    }

    fn is_whole(&self) -> bool {
        self.configuration.is_some() && self.keys.is_some()
    }
}

/// The configuration file and the key files, and whether they have changed.
#[derive(Debug)]
pub(super) struct ConfigWatch {
    pub(super) source: ConfigSource,
    /// What the files contained when they were last checked.
    seen: Contents,
    /// Whether all of them could be read then.
    was_whole: bool,
}

impl ConfigWatch {
    pub(super) fn new(source: ConfigSource, settings: &Settings) -> Self {
        Self { source, seen: Contents::of(settings), was_whole: true }
    }

    /// Notes which files are in force.
    pub(super) fn set_seen(&mut self, settings: &Settings) {
        self.seen = Contents::of(settings);
    }

    /// The configuration file, if it is watched and it or a key file has other contents than at the last
    /// check. A file that cannot be read may be in the middle of being replaced; if it still cannot at the
    /// next check, that is a change.
    fn changed(&mut self, settings: &Settings) -> Option<&Path> {
        let ConfigSource::File { path, is_watched: true, .. } = &self.source else { return None };
        let configuration = fs::read(path).ok().map(|text| Settings::hash_of(&text));
        let found = Contents { configuration, keys: KeyRing::generation_on_disk(&settings.config) };
        let was_whole = std::mem::replace(&mut self.was_whole, found.is_whole());
        if was_whole && !found.is_whole() {
            return None;
        }
        let has_changed = std::mem::replace(&mut self.seen, found.clone()) != found;
        has_changed.then_some(path)
    }
}

impl Daemon {
    /// Applies files that have changed, each for itself; where they cannot be used the old ones stay in
    /// force.
    pub(super) fn check_files(&mut self) {
        self.check_configuration();
        if let Some(file) = self.settings.config.tls.web_config_file.clone() {
            self.check_web_config(&file);
        }
        for (trust, made) in &mut self.settings.connectors {
            match made.renewed(|shelf| Connector::read(trust, shelf)) {
                None => {}
                Some(Ok(connector)) => {
                    info!("TLS files for outgoing connections have changed and are in force");
                    made.value.follow(&connector);
                }
                Some(Err(error)) => {
                    warn!(
                        %error,
                        "TLS files for outgoing connections have changed and cannot be used; \
                         the old ones stay in force"
                    );
                }
            }
        }
        self.export_tls_files();
    }

    /// Exports whether the files for TLS are those in force.
    pub(super) fn export_tls_files(&self) {
        self.observability.exporter.process.set_tls_files(self.settings.has_latest_files());
    }

    fn check_configuration(&mut self) {
        if let Some(path) = self.config_watch.changed(&self.settings) {
            info!(file = %path.display(), "the configuration or a key file has changed; reloading");
            // The outcome is logged and exported.
            let _ = self.reload();
        }
    }

    fn check_web_config(&mut self, file: &Path) {
        let made = &mut self.settings.web_config;
        let shown = file.display();
        match made.renewed(|shelf| LoadedWebConfig::read(file, shelf)) {
            None => {}
            Some(Ok(web_config)) => {
                info!(file = %shown, "files of the HTTP port have changed and are in force");
                for warning in &web_config.warnings {
                    warn!("{warning}");
                }
                made.value = web_config;
                self.servers.serve(&self.settings);
            }
            Some(Err(error)) => {
                warn!(
                    file = %shown,
                    %error,
                    "files of the HTTP port have changed and cannot be used; the old ones stay in force"
                );
            }
        }
    }
}
