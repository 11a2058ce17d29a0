//! Reloads files that have changed: the configuration, keys, certificates and the web config file.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tracing::{info, warn};

use super::{ConfigSource, Daemon};
use crate::http::web_config::LoadedWebConfig;
use crate::keys::KeyRing;
use crate::settings::Settings;
use crate::tls::Connector;

/// Interval between two checks of the files. Chosen: certificates are renewed days before they expire.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Hashes of the files that the settings were read from; `None` for files that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents {
    configuration: Option<String>,
    keys: Option<u64>,
}

impl Contents {
    pub(super) fn of(settings: &Settings) -> Self {
        Self { configuration: Some(settings.hash.clone()), keys: Some(settings.keys.generation) }
    }

    fn is_complete(&self) -> bool {
        self.configuration.is_some() && self.keys.is_some()
    }
}

/// Detects changes of the configuration file and the key files.
#[derive(Debug)]
pub(super) struct ConfigWatch {
    pub(super) source: ConfigSource,
    /// The contents of the files at the last check.
    seen: Contents,
    /// Whether all files could be read at the last check.
    was_complete: bool,
}

impl ConfigWatch {
    pub(super) fn new(source: ConfigSource, settings: &Settings) -> Self {
        Self { source, seen: Contents::of(settings), was_complete: true }
    }

    /// Records the contents of the files that are in use.
    pub(super) fn set_seen(&mut self, settings: &Settings) {
        self.seen = Contents::of(settings);
    }

    /// The path of the configuration file, if it is watched and the contents of it or of a key file have
    /// changed since the last check. A file that cannot be read may be about to be replaced; if it still
    /// cannot be read at the next check, that is a change.
    fn changed(&mut self, settings: &Settings) -> Option<&Path> {
        let ConfigSource::File { path, is_watched: true, .. } = &self.source else { return None };
        let configuration = fs::read(path).ok().map(|text| Settings::hash_of(&text));
        let contents = Contents { configuration, keys: KeyRing::generation_on_disk(&settings.config) };
        let was_complete = std::mem::replace(&mut self.was_complete, contents.is_complete());
        if was_complete && !contents.is_complete() {
            return None;
        }
        let has_changed = std::mem::replace(&mut self.seen, contents.clone()) != contents;
        has_changed.then_some(path)
    }
}

impl Daemon {
    /// Applies files that have changed, each independently. If a file cannot be used, the previous one stays
    /// in use.
    pub(super) fn check_files(&mut self) {
        self.check_configuration();
        if let Some(file) = self.settings.config.tls.web_config_file.clone() {
            self.check_web_config(&file);
        }
        for (trust, connector) in &mut self.settings.connectors {
            match connector.reload_if_changed(|files| Connector::read(trust, files)) {
                None => {}
                Some(Ok(reload_if_changed)) => {
                    info!("TLS files for outgoing connections changed and are now in use");
                    connector.value.follow(&reload_if_changed);
                }
                Some(Err(error)) => {
                    warn!(
                        %error,
                        "TLS files for outgoing connections changed but cannot be used; \
                         the previous ones stay in use"
                    );
                }
            }
        }
        self.export_tls_files();
    }

    /// Exports whether the TLS files in use are the latest on disk.
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
        let web_config = &mut self.settings.web_config;
        let path = file.display();
        match web_config.reload_if_changed(|files| LoadedWebConfig::read(file, files)) {
            None => {}
            Some(Ok(reload_if_changed)) => {
                info!(file = %path, "files of the HTTP port changed and are now in use");
                for warning in &reload_if_changed.warnings {
                    warn!("{warning}");
                }
                web_config.value = reload_if_changed;
                self.servers.apply_web_config(&self.settings);
            }
            Some(Err(error)) => {
                warn!(
                    file = %path,
                    %error,
                    "files of the HTTP port changed but cannot be used; the previous ones stay in use"
                );
            }
        }
    }
}
