//! The interface to the service manager and to the log: readiness, watchdog, log level.

use tracing::error;

use crate::logging;
use crate::metrics::Exporter;
use crate::settings::Settings;
use crate::systemd::Notifier;

/// Notifies the service manager, and sets the log level.
#[derive(Debug)]
pub(super) struct Supervision {
    pub(super) notifier: Notifier,
    log: Option<logging::LogHandle>,
    /// The progress counters of the loops and, last, of the answering thread, at the last tick.
    progress: Vec<u64>,
}

impl Supervision {
    pub(super) fn new(notifier: Notifier, log: Option<logging::LogHandle>) -> Self {
        Self { notifier, log, progress: Vec::new() }
    }

    /// Triggers the watchdog if all loops and the answering thread made progress since the last tick.
    /// `heartbeats` is the counter of the answering thread.
    pub(super) fn trigger_watchdog(&mut self, exporter: &Exporter, heartbeats: u64) {
        let loops = exporter.loops().iter().map(|series| series.progress.get());
        let progress: Vec<u64> = loops.chain([heartbeats]).collect();
        // A loop without progress measures or answers nothing, so the service manager must restart the agent.
        let is_alive = progress.iter().zip(&self.progress).all(|(now, before)| now != before);
        if is_alive && self.notifier.watchdog_interval().is_some() {
            self.notifier.watchdog();
        }
        self.progress = progress;
    }

    /// Applies the log level of the new settings if it differs from the old one.
    pub(super) fn set_log_level(&self, old: &Settings, new: &Settings) {
        let level = &new.config.log.level;
        let log = self.log.as_ref().filter(|_| *level != old.config.log.level);
        if let Some(Err(error)) = log.map(|log| log.set_level(level)) {
            error!(%error, "cannot change the log level");
        }
    }
}
