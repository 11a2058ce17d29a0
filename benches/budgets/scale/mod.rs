//! How far one agent goes: more paths, and more requests a second, until something gives.

mod offer;
pub(crate) mod paths;
pub(crate) mod rates;
mod table;
mod totals;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use table::Column;

use super::process;

/// CPU time is read once in so long, and the middle of what was found is shown.
const WINDOW: Duration = Duration::from_secs(10);

/// How long the loads are held that are asked about, and those by which the limit is searched.
const LONG: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_secs(30);

/// CPU time over a window.
#[derive(Debug)]
struct Meter {
    begun: Instant,
    /// Each thing that is measured, as it stood.
    previous: Vec<Duration>,
}

impl Meter {
    fn begin(used: Vec<Duration>) -> Self {
        Self { begun: Instant::now(), previous: used }
    }

    /// The share of a core that each has used since it was last asked.
    fn shares(&mut self, used: Vec<Duration>) -> Vec<f64> {
        let span = self.begun.elapsed().as_secs_f64();
        let shares = used.iter().zip(&self.previous).map(|(now, then)| (*now - *then).as_secs_f64() / span);
        let shares = shares.collect();
        *self = Self::begin(used);
        shares
    }
}

/// Who else takes the cores.
#[derive(Debug)]
struct OtherLoad {
    ours: Vec<u32>,
    meter: Meter,
    pauses: PauseMonitor,
}

/// What was seen of them.
#[derive(Debug)]
struct Interference {
    /// Cores that other programs used, and that the hypervisor did.
    shares: [f64; 2],
    longest_pause: Duration,
}

impl OtherLoad {
    /// `ours` are the agents that are measured; this process is ours, too.
    fn begin(mut ours: Vec<u32>) -> io::Result<Self> {
        ours.push(std::process::id());
        let used = Self::used(&ours)?;
        Ok(Self { ours, meter: Meter::begin(used), pauses: PauseMonitor::begin() })
    }

    /// What there was since.
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

/// A thread that has nothing to do, and notes how much later than it asked it woke: whatever held it up may have held up
/// everybody.
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
