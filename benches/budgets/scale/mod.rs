//! How far one agent goes: more paths, and more requests a second, until something gives.

mod offer;
pub(crate) mod paths;
pub(crate) mod rates;
mod table;
mod totals;

use std::io;
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
    stood: Vec<Duration>,
}

impl Meter {
    fn begin(used: Vec<Duration>) -> Self {
        Self { begun: Instant::now(), stood: used }
    }

    /// The share of a core that each has used since it was last asked.
    fn shares(&mut self, used: Vec<Duration>) -> Vec<f64> {
        let span = self.begun.elapsed().as_secs_f64();
        let shares = used.iter().zip(&self.stood).map(|(now, then)| (*now - *then).as_secs_f64() / span);
        let shares = shares.collect();
        *self = Self::begin(used);
        shares
    }
}

/// Who else takes the cores.
#[derive(Debug)]
struct Strangers {
    ours: Vec<u32>,
    meter: Meter,
}

impl Strangers {
    /// `ours` are the agents that are measured; this process is ours, too.
    fn begin(mut ours: Vec<u32>) -> io::Result<Self> {
        ours.push(std::process::id());
        let used = Self::used(&ours)?;
        Ok(Self { ours, meter: Meter::begin(used) })
    }

    /// Cores that other programs have used since, and that the hypervisor has.
    fn shares(&mut self) -> io::Result<[f64; 2]> {
        let shares = self.meter.shares(Self::used(&self.ours)?);
        Ok([(shares[1] - shares[2..].iter().sum::<f64>()).max(0.0), shares[0]])
    }

    fn used(ours: &[u32]) -> io::Result<Vec<Duration>> {
        let (programs, stolen) = process::cpu_of_all()?;
        let mut used = vec![stolen, programs];
        for pid in ours {
            used.push(process::cpu_of(*pid)?);
        }
        Ok(used)
    }

    fn show(shares: [f64; 2], column: &mut Column) {
        column.add("all other programs", shares[0] * 100.0, "%");
        column.add("the hypervisor", shares[1] * 100.0, "%");
    }
}
