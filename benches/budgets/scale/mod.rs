//! Scaling limits of one agent: increasing numbers of paths and of requests per second.

mod offer;
pub(crate) mod paths;
pub(crate) mod rates;
mod table;
pub(crate) mod totals;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use table::Column;

use super::process;

/// CPU time is read once per window, and the median is shown.
const WINDOW: Duration = Duration::from_secs(10);

/// Duration of the documented loads, and of the steps that search for the limit.
const LONG: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_secs(30);

/// CPU time over a window.
#[derive(Debug)]
struct Meter {
    begun: Instant,
    /// Previous readings.
    previous: Vec<Duration>,
}

impl Meter {
    fn begin(used: Vec<Duration>) -> Self {
        Self { begun: Instant::now(), previous: used }
    }

    /// The share of a core that each has used since the last call.
    fn shares(&mut self, used: Vec<Duration>) -> Vec<f64> {
        let span = self.begun.elapsed().as_secs_f64();
        let shares = used.iter().zip(&self.previous).map(|(now, then)| (*now - *then).as_secs_f64() / span);
        let shares = shares.collect();
        *self = Self::begin(used);
        shares
    }
}

/// CPU use of other programs.
#[derive(Debug)]
struct OtherLoad {
    ours: Vec<u32>,
    meter: Meter,
    pauses: PauseMonitor,
}

/// CPU use of other programs during a measurement.
#[derive(Debug)]
struct Interference {
    /// Cores used by other programs, and by the hypervisor.
    shares: [f64; 2],
    longest_pause: Duration,
}

impl OtherLoad {
    /// `ours` are the measured agents; this process is added.
    fn begin(mut ours: Vec<u32>) -> io::Result<Self> {
        ours.push(std::process::id());
        let used = Self::used(&ours)?;
        Ok(Self { ours, meter: Meter::begin(used), pauses: PauseMonitor::begin() })
    }

    /// CPU use since the start.
    fn finish(mut self) -> io::Result<Interference> {
        let shares = self.meter.shares(Self::used(&self.ours)?);
        let other_load = shares[1] - shares[2..].iter().sum::<f64>();
        Ok(Interference { shares: [other_load.max(0.0), shares[0]], longest_pause: self.pauses.finish() })
    }

    fn used(ours: &[u32]) -> io::Result<Vec<Duration>> {
        let (programs, stolen) = process::cpu_of_all()?;
        let mut used = vec![stolen, programs];
        for pid in ours {
            used.push(process::cpu_of(*pid)?);
        }
        Ok(used)
    }
}

impl Interference {
    fn show(&self, column: &mut Column) {
        column.add("all other programs", self.shares[0] * 100.0, "%");
        column.add("the hypervisor", self.shares[1] * 100.0, "%");
        column.add("longest pause of an idle thread", self.longest_pause.as_secs_f64() * 1e3, "ms");
    }
}

/// An idle thread that records by how much it wakes up late: what delayed it may have delayed every process.
#[derive(Debug)]
struct PauseMonitor {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl PauseMonitor {
    const EVERY: Duration = Duration::from_millis(2);

    fn begin() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Relaxed) {
                let asleep = Instant::now();
                std::thread::sleep(Self::EVERY);
                longest = longest.max(asleep.elapsed().saturating_sub(Self::EVERY));
            }
            longest
        });
        Self { stop, thread }
    }

    fn finish(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread does not panic")
    }
}
