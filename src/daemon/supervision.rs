//! The agent as its supervisor and its operator see it: readiness, the watchdog, the log.

use tracing::error;

use crate::logging;
use crate::metrics::Exporter;
use crate::settings::Settings;
use crate::systemd::Notifier;

/// Talks to the service manager, and sets the log level.
#[derive(Debug)]
pub(super) struct Supervision {
    pub(super) notifier: Notifier,
    log: Option<logging::LogHandle>,
    /// How far each loop that measures, and the answering thread at the end, had got at the last tick.
    progress: Vec<u64>,
}

impl Supervision {
    pub(super) fn new(notifier: Notifier, log: Option<logging::LogHandle>) -> Self {
        Self { notifier, log, progress: Vec::new() }
    }

    /// Triggers the watchdog, as long as all loops run, and the thread that answers over connections has had these heartbeats.
    pub(super) fn trigger_watchdog(&mut self, exporter: &Exporter, heartbeats: u64) {
        let loops = exporter.loops().iter().map(|series| series.progress.get());
        let progress: Vec<u64> = loops.chain([heartbeats]).collect();
        // A loop that stands still measures or answers nothing: let the supervisor restart us.
        let is_alive = progress.iter().zip(&self.progress).all(|(now, before)| now != before);
        if is_alive && self.notifier.watchdog_interval().is_some() {
            self.notifier.watchdog();
        }
        self.progress = progress;
    }

    /// Changes the log level where the new settings have another one.
    pub(super) fn set_log_level(&self, old: &Settings, new: &Settings) {
        let level = &new.config.log.level;
        let log = self.log.as_ref().filter(|_| *level != old.config.log.level);
        if let Some(Err(error)) = log.map(|log| log.set_level(level)) {
            error!(%error, "changing the log level");
        }
    }
}
