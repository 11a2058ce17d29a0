//! What processes and threads have used.

use std::fs;
use std::io;
use std::time::Duration;

/// CPU time of a process, user and system, all threads, to the nanosecond.
#[expect(unsafe_code, reason = "no safe wrapper for another process' CPU clock")]
pub(crate) fn cpu_of(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).expect("process numbers are below 2²²");
    let mut clock = 0;
    // SAFETY: writes one clock identifier to where it is told.
    let outcome = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if outcome != 0 {
        return Err(io::Error::from_raw_os_error(outcome));
    }
    read(clock)
}

/// CPU time of the calling thread.
pub(crate) fn cpu_of_this_thread() -> Duration {
    read(libc::CLOCK_THREAD_CPUTIME_ID).expect("every thread has this clock")
}

/// The clock with which the kernel stamps datagrams, in nanoseconds since 1970.
pub(crate) fn wall() -> u64 {
    let since = read(libc::CLOCK_REALTIME).expect("every system has this clock");
    u64::try_from(since.as_nanos()).expect("before the year 2554")
}

#[expect(unsafe_code, reason = "clock_gettime")]
fn read(clock: libc::clockid_t) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec to where it is told.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Ok(Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0)))
}

/// Memory of a process in KiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) resident: f64,
    pub(crate) resident_max: f64,
}

impl Memory {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(f64::NAN)
        };
        Ok(Self { resident: field("VmRSS:"), resident_max: field("VmHWM:") })
    }

    /// Lets the maximum begin anew.
    pub(crate) fn forget_max(pid: u32) -> io::Result<()> {
        fs::write(format!("/proc/{pid}/clear_refs"), "5")
    }
}
