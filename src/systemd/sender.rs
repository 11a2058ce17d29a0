//! The notify protocol without libsystemd: one datagram per message, one `NAME=value` per line.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Sends to the notify socket of a service manager.
#[derive(Debug)]
pub(super) struct Sender {
    address: OsString,
    watchdog_timeout: Option<Duration>,
}

impl Sender {
    #[cfg_attr(feature = "systemd", expect(dead_code, reason = "tests give the address themselves"))]
    pub(super) fn from_environment() -> Option<Self> {
        let variable = |name| std::env::var(name).ok();
        let address = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        let watchdog_timeout =
            watchdog_timeout(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"), std::process::id());
        Some(Self::new(address, watchdog_timeout))
    }

    /// `address` is a path, or `@` followed by an abstract name.
    pub(super) fn new(address: OsString, watchdog_timeout: Option<Duration>) -> Self {
        Self { address, watchdog_timeout }
    }

    /// Sends fields. Values must not contain NUL or line feed.
    pub(super) fn send(&self, fields: &[(&str, &str)]) -> io::Result<()> {
        let lines: Vec<_> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(WRITE_TIMEOUT))?;
        socket.send_to_addr(lines.join("\n").as_bytes(), &socket_address(&self.address)?)?;
        Ok(())
    }

    pub(super) fn watchdog_timeout(&self) -> Option<Duration> {
        self.watchdog_timeout
    }
}

/// How long a manager that does not read may block the caller.
const WRITE_TIMEOUT: Duration = Duration::from_millis(100);

fn socket_address(address: &OsStr) -> io::Result<SocketAddr> {
    match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(address),
    }
}

/// The watchdog timeout if it applies to this process, as in sd_watchdog_enabled(3).
pub(super) fn watchdog_timeout(usec: Option<String>, pid: Option<String>, own_pid: u32) -> Option<Duration> {
    let usec: u64 = usec?.parse().ok().filter(|&usec| usec > 0)?;
    match pid {
        Some(pid) if pid.parse() != Ok(own_pid) => None,
        Some(_) | None => Some(Duration::from_micros(usec)),
    }
}
