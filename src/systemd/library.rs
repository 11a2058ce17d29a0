//! The notify protocol of libsystemd.

use std::io;
use std::time::Duration;

use systemd::daemon;

/// Sends through libsystemd, which reads the environment on every message.
#[derive(Debug)]
pub(super) struct Library;

impl Library {
    pub(super) fn from_environment() -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty()).map(|_| Self)
    }

    /// Sends fields. Values must not contain NUL or line feed.
    pub(super) fn send(&self, fields: &[(&str, &str)]) -> io::Result<()> {
        daemon::notify(fields.iter())?;
        Ok(())
    }

    pub(super) fn watchdog_timeout(&self) -> Option<Duration> {
        match daemon::watchdog_enabled() {
            Ok(0) => None,
            Ok(timeout_us) => Some(Duration::from_micros(timeout_us)),
            Err(error) => {
                tracing::warn!(%error, "invalid WATCHDOG_USEC or WATCHDOG_PID: watchdog disabled");
                None
            }
        }
    }
}
