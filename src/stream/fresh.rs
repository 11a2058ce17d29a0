//! Fresh connections, made on a schedule of their own to measure what making one takes.

use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::grid::Grid;
use tokio::time::{sleep, timeout};

use super::dial::{Dial, Took};
use super::trouble::Trouble;
use crate::clock::Clock;
use crate::metrics::stream::{Broken, StreamSeries};

/// Makes a connection every `every`, times it, and closes it. One that takes longer than `patience` has failed.
pub(super) async fn measure(
    dial: Arc<Dial>,
    every: Duration,
    patience: Duration,
    seed: u64,
    series: Arc<StreamSeries>,
) {
    let mut grid = Grid::new(Clock::now(), every, seed);
    loop {
        sleep(grid.next().since(Clock::now())).await;
        if grid.take(Clock::now()).slot.is_none() {
            continue;
        }
        let mut took = Took::default();
        let outcome = match timeout(patience, once(&dial, &mut took)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Trouble::new(Broken::Timeout, String::new())),
        };
        if let Some(span) = took.connect {
            series.connects_took(span);
        }
        for (stage, span) in took.stages {
            series.stage_took(stage, span);
        }
        if let Err(trouble) = outcome {
            series.connect_failed(trouble.why);
        }
    }
}

async fn once(dial: &Dial, took: &mut Took) -> Result<(), Trouble> {
    dial.resolve(took).await?;
    dial.connect(took).await?;
    Ok(())
}
