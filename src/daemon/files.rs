//! Certificates, keys and the web config file: in force, and looked at for changes.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::{Daemon, Source};
use crate::http::web_config::LoadedWebConfig;
use crate::settings::Settings;
use crate::tls::Connector;

/// How often the files are read again. Chosen: what renews a certificate does so days before its end.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);

/// What a configuration is read from; `None`: it cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Contents {
    configuration: Option<String>,
    keys: Option<u64>,
}

impl Contents {
    /// Of what is in force.
    pub(super) fn of(settings: &Settings) -> Self {
        Self { configuration: Some(settings.hash.clone()), keys: Some(settings.keys.generation) }
    }

    fn is_whole(&self) -> bool {
        self.configuration.is_some() && self.keys.is_some()
    }
}

impl Daemon {
    /// Serves the HTTP port as the settings say; open connections stay as they are.
    pub(super) fn serve(&self) {
        self.site.web_config.store(Arc::new(self.settings.web_config.value.clone()));
        self.exporter.process.set_tls_files(self.settings.has_latest_files());
    }

    /// Takes files that have changed, each for itself; where they cannot be used the old ones stay in force.
    pub(super) fn look_at_files(&mut self) {
        self.look_at_configuration();
        if let Some(file) = self.settings.config.tls.web_config_file.clone() {
            self.look_at_web_config(&file);
        }
        for (trust, made) in &mut self.settings.connectors {
            match made.renewed(|shelf| Connector::read(trust, shelf)) {
                None => {}
                Some(Ok(connector)) => {
                    info!("files for asking with TLS have changed and are in force");
                    made.value.follow(&connector);
                }
                Some(Err(error)) => {
                    warn!(%error, "files for asking with TLS have changed and cannot be used; the old ones stay in force");
                }
            }
        }
        self.exporter.process.set_tls_files(self.settings.has_latest_files());
    }

    /// Reads the configuration again if its file or a key file has another content than when they were looked at last. One
    /// that cannot be read is being replaced, but not for longer than until the next look: then it is told, by a reload that
    /// fails.
    fn look_at_configuration(&mut self) {
        let Source::File { path, is_watched: true, .. } = &self.source else { return };
        let configuration = fs::read(path).ok().map(|text| Settings::hash_of(&text));
        let found = Contents { configuration, keys: self.settings.generation_of_files() };
        let was_whole = std::mem::replace(&mut self.was_whole, found.is_whole());
        if was_whole && !found.is_whole() {
            return;
        }
        if std::mem::replace(&mut self.seen, found.clone()) != found {
            info!(file = %path.display(), "the configuration or a key has changed: reading them again");
            // What came of it is logged and exported.
            let _ = self.reload();
        }
    }

    fn look_at_web_config(&mut self, file: &Path) {
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
                self.serve();
            }
            Some(Err(error)) => {
                warn!(file = %shown, %error, "files of the HTTP port have changed and cannot be used; the old ones stay in force");
            }
        }
    }
}
