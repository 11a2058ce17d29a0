//! Child processes.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{self, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

use crate::eventually;

/// A running program. Killed when dropped, and when the thread that started it ends.
#[derive(Debug)]
pub struct Program {
    child: Child,
    path: std::path::PathBuf,
}

impl Program {
    /// Starts a command. Standard output and error go to the file `output`.
    ///
    /// # Panics
    /// When the command cannot be started.
    #[must_use]
    pub fn start(command: &mut Command, output: &Path) -> Self {
        let file = File::create(output).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child, path: output.to_owned() }
    }

    /// Wraps a process that was started elsewhere and writes to the file `output`.
    #[must_use]
    pub fn from_child(child: Child, output: &Path) -> Self {
        Self { child, path: output.to_owned() }
    }

    /// The process ID.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        fs::read_to_string(&self.path).unwrap_or_default()
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        signal::kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// The exit status, or `None` while the process runs.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the process exits.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("a program exits", || self.try_wait())
    }

    /// Waits until the process exits. Returns the user and system CPU time that it used.
    pub fn wait_with_cpu(&mut self) -> (ExitStatus, Duration) {
        let id = Pid::from_raw(self.child.id().try_into().unwrap());
        // The clock of a process that has ended exists until its exit status is taken.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        eventually("a program exits", || {
            (waitid(Id::Pid(id), flags).unwrap() != WaitStatus::StillAlive).then_some(())
        });
        let cpu = self.cpu();
        (self.wait(), cpu)
    }

    /// User and system CPU time used so far, from the kernel's clock of the process.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        let clock = clock_getcpuclockid(Pid::from_raw(self.child.id().try_into().unwrap()));
        clock.and_then(ClockId::now).map(Duration::from).unwrap_or_default()
    }

    /// Resident memory in bytes.
    #[must_use]
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kilobytes.unwrap_or_default() * 1_024
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Busy threads that keep the processors occupied. They end when this is dropped.
#[derive(Debug)]
pub struct CpuLoad {
    is_over: Arc<AtomicBool>,
}

impl CpuLoad {
    /// Starts `count` busy loops per core.
    #[must_use]
    pub fn per_core(count: usize) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores * count {
            let is_over = Arc::clone(&is_over);
            thread::spawn(move || {
                while !is_over.load(Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self { is_over }
    }
}

impl Drop for CpuLoad {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
    }
}
