//! Start time, idle memory and size of the binary.

use std::fs;
use std::io;
use std::time::Instant;

use super::agent::{BenchAgent, NO_PATHS, binary};
use super::report::{Row, median};

const STARTS: usize = 20;

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let (mut milliseconds, mut resident) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let begin = Instant::now();
        let agent = BenchAgent::start(NO_PATHS)?;
        milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
        resident.push(agent.memory()?.resident / 1024.0);
    }
    let bytes = u32::try_from(fs::metadata(binary())?.len()).map_err(io::Error::other)?;
    Ok(vec![
        Row::new("exec to first scrape answered", median(milliseconds), "ms").budget(10.0),
        Row::new("idle agent, RSS after a scrape", median(resident), "MiB").budget(6.0),
        Row::new("binary, stripped", f64::from(bytes) / f64::from(1 << 20), "MiB").budget(8.0),
    ])
}
