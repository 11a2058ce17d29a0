//! What the service manager is told: ready, reloading, stopping, alive. See sd_notify(3). And the sockets that it passes.
//!
//! With the feature `systemd` libsystemd says it; static builds have a sender of their own, which also serves other
//! managers that speak the protocol (podman, s6). A manager that cannot be reached never stops a measurement.

#[cfg(feature = "systemd")]
mod library;
mod passed;
// Always tested, even where libsystemd is used instead.
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

/// Tells the service manager, if there is one, how we are.
///
/// Nothing here fails: what cannot be said is logged, once until it can be said again.
#[derive(Debug)]
pub struct Notifier {
    channel: Option<Channel>,
    watchdog_interval: Option<Duration>,
    is_failing: AtomicBool,
}

impl Notifier {
    /// The manager that started us, by `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    #[must_use]
    pub fn from_environment() -> Self {
        let channel = Channel::from_environment();
        let watchdog_interval =
            channel.as_ref().and_then(Channel::watchdog_timeout).map(|timeout| timeout / 2);
        Self { channel, watchdog_interval, is_failing: AtomicBool::new(false) }
    }

    /// Tells nobody: for an agent that runs inside another program.
    #[must_use]
    pub fn silent() -> Self {
        Self { channel: None, watchdog_interval: None, is_failing: AtomicBool::new(false) }
    }

    /// How often [`Notifier::watchdog`] is due: half of the time after which we would be killed. `None`: never.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog_interval
    }

    /// Started, or done with a reload.
    pub fn ready(&self) {
        self.send_fields(&[("READY", "1")]);
    }

    /// A reload begins; [`Notifier::ready`] ends it. `monotonic_usec` is CLOCK_MONOTONIC in µs, by which
    /// `Type=notify-reload` tells this reload from an earlier one.
    pub fn reloading(&self, monotonic_usec: u64) {
        self.send_fields(&[("RELOADING", "1"), ("MONOTONIC_USEC", &monotonic_usec.to_string())]);
    }

    /// A stop begins.
    pub fn stopping(&self) {
        self.send_fields(&[("STOPPING", "1")]);
    }

    /// One line for `systemctl status`, without its control characters and cut at [`STATUS_BYTES_MAX`].
    pub fn status(&self, line: &str) {
        self.send_fields(&[("STATUS", &one_line(line))]);
    }

    /// Alive. To be called by who knows that measuring goes on, every [`Notifier::watchdog_interval`].
    pub fn watchdog(&self) {
        self.send_fields(&[("WATCHDOG", "1")]);
    }

    fn send_fields(&self, fields: &[(&str, &str)]) {
        let Some(channel) = &self.channel else { return };
        match channel.send(fields) {
            Ok(()) => {
                if self.is_failing.swap(false, Relaxed) {
                    debug!("the service manager can be told again");
                }
            }
            Err(error) => {
                if !self.is_failing.swap(true, Relaxed) {
                    warn!(%error, "telling the service manager");
                }
            }
        }
    }
}

/// The most bytes of a status line. Chosen: more than a terminal shows.
pub const STATUS_BYTES_MAX: usize = 512;

/// A line feed would begin a field of its own (`READY=1` for instance), and libsystemd's binding panics at a NUL.
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
