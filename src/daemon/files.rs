//! Certificates, keys and the web config file: in force, and looked at for changes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::Daemon;
use crate::http::front::Front;
use crate::tls::Connector;

/// How often the files are read again. Chosen: what renews a certificate does so days before its end.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(10);

impl Daemon {
    /// Serves the HTTP port as the settings say; open connections stay as they are.
    pub(super) fn serve(&self) {
        self.site.front.store(Arc::new(self.settings.front.value.clone()));
        self.exporter.process.set_tls_files(self.settings.has_latest_files());
    }

    /// Takes files that have changed, each for itself; where they cannot be used the old ones stay in force.
    pub(super) fn look_at_files(&mut self) {
        if let Some(file) = self.settings.config.tls.web_config_file.clone() {
            self.look_at_front(&file);
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

    fn look_at_front(&mut self, file: &Path) {
        let made = &mut self.settings.front;
        let shown = file.display();
        match made.renewed(|shelf| Front::read(file, shelf)) {
            None => {}
            Some(Ok(front)) => {
                info!(file = %shown, "files of the HTTP port have changed and are in force");
                for warning in &front.warnings {
                    warn!("{warning}");
                }
                made.value = front;
                self.serve();
            }
            Some(Err(error)) => {
                warn!(file = %shown, %error, "files of the HTTP port have changed and cannot be used; the old ones stay in force");
            }
        }
    }
}
