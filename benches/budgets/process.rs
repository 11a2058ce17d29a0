//! CPU time, memory and socket drops of processes and threads.

use std::fs;
use std::io;
use std::time::Duration;

/// CPU time of a process, user and system, all threads, to the nanosecond.
#[expect(unsafe_code, reason = "no safe wrapper for another process' CPU clock")]
pub(crate) fn cpu_of(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).expect("process numbers are below 2²²");
    let mut clock = 0;
    // SAFETY: the pointer is valid for one clock identifier.
    let outcome = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if outcome != 0 {
        return Err(io::Error::from_raw_os_error(outcome));
    }
    read(clock)
}

/// Scheduler statistics of the threads of a process with one name.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ThreadTimes {
    pub(crate) ran: Duration,
    /// Time runnable but waiting for a core.
    pub(crate) waited: Duration,
}

impl ThreadTimes {
    pub(crate) fn of(pid: u32, thread: &str) -> io::Result<Self> {
        let mut sum = Self::default();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            if fs::read_to_string(task.join("comm"))?.trim_end() == thread {
                let kernel_info = fs::read_to_string(task.join("schedstat"))?;
                let mut nanos = kernel_info.split(' ').filter_map(|nanos| nanos.parse().ok());
                let mut next = || nanos.next().ok_or_else(|| io::Error::other("schedstat cannot be read"));
                sum.ran += Duration::from_nanos(next()?);
                sum.waited += Duration::from_nanos(next()?);
            }
        }
        Ok(sum)
    }
}

/// CPU time of all programs on all cores, and the time that the hypervisor took.
pub(crate) fn cpu_of_all() -> io::Result<(Duration, Duration)> {
    const TICKS_A_SECOND: f64 = 100.0;
    let text = fs::read_to_string("/proc/stat")?;
    let ticks: Vec<f64> =
        text.lines().next().unwrap_or("").split(' ').filter_map(|n| n.parse().ok()).collect();
    let sum = |places: &[usize]| places.iter().filter_map(|place| ticks.get(*place)).fold(0.0, |a, b| a + b);
    // user, nice, system, idle, iowait, irq, softirq, steal.
    let [programs, stolen] = [&[0, 1, 2, 5, 6][..], &[7]].map(|places| sum(places) / TICKS_A_SECOND);
    Ok((Duration::from_secs_f64(programs), Duration::from_secs_f64(stolen)))
}

/// Datagrams that the kernel dropped at the IPv4 sockets of a process, from /proc/net/udp.
pub(crate) fn socket_drops(pid: u32) -> io::Result<f64> {
    let mut inodes = Vec::new();
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // A descriptor may be closed meanwhile.
        let Ok(target) = fs::read_link(descriptor?.path()) else { continue };
        let inode = target.to_str().and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']'));
        inodes.extend(inode.map(str::to_owned));
    }
    let sockets = fs::read_to_string("/proc/net/udp")?;
    let fields = sockets.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let drops = fields.filter_map(|fields| {
        let (inode, drops) = (*fields.get(9)?, *fields.last()?);
        inodes.iter().any(|known| known == inode).then(|| drops.parse::<f64>().ok())?
    });
    // The sum of an empty iterator would be −0.
    Ok(drops.fold(0.0, |sum, drops| sum + drops))
}

/// Datagrams that this network namespace dropped because a receive buffer was full, for any socket.
pub(crate) fn receive_buffer_errors() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let place = names.split(' ').position(|name| name == "RcvbufErrors");
    let value = place.and_then(|place| values.split(' ').nth(place)?.parse().ok());
    value.ok_or_else(|| io::Error::other("/proc/net/snmp has no RcvbufErrors"))
}

/// CPU time of the calling thread.
pub(crate) fn cpu_of_this_thread() -> Duration {
    read(libc::CLOCK_THREAD_CPUTIME_ID).expect("every thread has this clock")
}

/// The clock of kernel timestamps, in nanoseconds since 1970.
pub(crate) fn wall() -> u64 {
    let since = read(libc::CLOCK_REALTIME).expect("every system has this clock");
    u64::try_from(since.as_nanos()).expect("before the year 2554")
}

#[expect(unsafe_code, reason = "clock_gettime")]
fn read(clock: libc::clockid_t) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for one timespec.
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

    /// Resets the maximum.
    pub(crate) fn reset_max(pid: u32) -> io::Result<()> {
        fs::write(format!("/proc/{pid}/clear_refs"), "5")
    }
}
