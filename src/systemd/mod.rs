//! Notifications to the service manager (sd_notify(3)): ready, reloading, stopping, watchdog. And socket
//! activation.
//!
//! With the feature `systemd`, libsystemd sends them. Static builds have their own sender, which also works
//! with other managers that support the protocol (podman, s6). An unreachable manager never stops a
//! measurement.

#[cfg(feature = "systemd")]
mod library;
mod passed;
// Always compiled for tests, even if libsystemd is used instead.
#[cfg(any(test, not(feature = "systemd")))]
mod sender;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tracing::{debug, warn};

pub use passed::{PassedError, passed_listeners};

#[cfg(feature = "systemd")]
use library::Library as Channel;
#[cfg(not(feature = "systemd"))]
use sender::Sender as Channel;

/// Notifies the service manager, if there is one, of the agent's state.
///
/// Its methods do not fail: an error is logged once, until a notification succeeds again.
#[derive(Debug)]
pub struct Notifier {
    channel: Option<Channel>,
    watchdog_interval: Option<Duration>,
    is_failing: AtomicBool,
}

impl Notifier {
    /// A notifier for the manager in `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    #[must_use]
    pub fn from_environment() -> Self {
        let channel = Channel::from_environment();
        let watchdog_interval =
            channel.as_ref().and_then(Channel::watchdog_timeout).map(|timeout| timeout / 2);
        Self { channel, watchdog_interval, is_failing: AtomicBool::new(false) }
    }

    /// A notifier that sends nothing, for an agent inside another program.
    #[must_use]
    pub fn silent() -> Self {
        Self { channel: None, watchdog_interval: None, is_failing: AtomicBool::new(false) }
    }

    /// How often to call [`Notifier::watchdog`]: half of the watchdog timeout. `None`: no watchdog.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog_interval
    }

    /// Notifies that the start or a reload has finished (`READY=1`).
    pub fn ready(&self) {
        self.send_fields(&[("READY", "1")]);
    }

    /// Notifies that a reload begins; [`Notifier::ready`] ends it. `monotonic_usec` is CLOCK_MONOTONIC in µs,
    /// by which `Type=notify-reload` distinguishes this reload from an earlier one.
    pub fn reloading(&self, monotonic_usec: u64) {
        self.send_fields(&[("RELOADING", "1"), ("MONOTONIC_USEC", &monotonic_usec.to_string())]);
    }

    /// Notifies that a stop begins (`STOPPING=1`).
    pub fn stopping(&self) {
        self.send_fields(&[("STOPPING", "1")]);
    }

    /// Sends a line for `systemctl status`. Control characters are removed, and the line is cut at
    /// [`STATUS_BYTES_MAX`].
    pub fn status(&self, line: &str) {
        self.send_fields(&[("STATUS", &one_line(line))]);
    }

    /// Resets the watchdog (`WATCHDOG=1`). Call this every [`Notifier::watchdog_interval`] while measurements
    /// make progress.
    pub fn watchdog(&self) {
        self.send_fields(&[("WATCHDOG", "1")]);
    }

    fn send_fields(&self, fields: &[(&str, &str)]) {
        let Some(channel) = &self.channel else { return };
        match channel.send(fields) {
            Ok(()) => {
                if self.is_failing.swap(false, Relaxed) {
                    debug!("service manager notified again");
                }
            }
            Err(error) => {
                if !self.is_failing.swap(true, Relaxed) {
                    warn!(%error, "service manager not notified");
                }
            }
        }
    }
}

/// Maximum length of a status line in bytes. Chosen: more than a terminal shows.
pub const STATUS_BYTES_MAX: usize = 512;

/// Removes control characters: a line feed would start another field (for example `READY=1`), and the
/// libsystemd binding panics on NUL.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for character in text.chars().filter(|character| !character.is_control()) {
        if line.len() + character.len_utf8() > STATUS_BYTES_MAX {
            break;
        }
        line.push(character);
    }
    line
}
