//! One run, watched for harm.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pathmeter_proto::bandwidth::StopReason;
use pathmeter_proto::bandwidth::throughput::Progress;

use super::latency::{CHECK_INTERVAL, LatencyWatch};
use crate::bulk::{BulkThreads, Run, RunError, RunOutcome};

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The run did not begin.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The thread for bulk connections could not be started, or has ended.
    #[error("running on the thread for bulk connections: {0}")]
    Thread(#[from] std::io::Error),
}

/// A run in progress, seen by the thread that runs it and by the one that watches it.
#[derive(Debug, Default)]
struct LiveRun {
    /// `None` until the load begins.
    progress: Option<Progress>,
    stop: Option<StopReason>,
}

/// Runs on the thread for bulk connections, and watches the latency meanwhile.
///
/// `supervise` is called there each 10 ms, and returns why the run must stop, if it must. `on_progress` is
/// called here as often. `stop` ends the run when it completes.
///
/// # Errors
/// [`MeasureError`] if the run did not begin.
pub async fn measure(
    run: Run,
    threads: &Arc<BulkThreads>,
    watch: &mut LatencyWatch,
    mut supervise: impl FnMut(Progress) -> Option<StopReason> + Send + 'static,
    mut on_progress: impl FnMut(Progress, Option<Duration>),
    stop: impl Future<Output = StopReason>,
) -> Result<RunOutcome, MeasureError> {
    let live = Arc::new(Mutex::new(LiveRun::default()));
    let seen = Arc::clone(&live);
    let supervised = move |progress| {
        let mut live = seen.lock().unwrap_or_else(PoisonError::into_inner);
        live.progress = Some(progress);
        let own = supervise(progress);
        live.stop.or(own)
    };
    let mut running = threads.runtime()?.spawn(run.run(Arc::clone(threads), supervised));
    // The run ends with this future.
    let _abort = AbortOnDrop(running.abort_handle());
    let mut ticker = tokio::time::interval(CHECK_INTERVAL);
    let (mut stop, mut is_stopped, mut is_loaded) = (pin!(stop), false, false);
    loop {
        tokio::select! {
            ended = &mut running => {
                watch.load_ends().await;
                let outcome = ended.map_err(std::io::Error::other)??;
                return Ok(outcome.with_latency(watch.result()));
            }
            _ = ticker.tick() => {
                let harm = watch.check().map(StopReason::from);
                let progress = {
                    let mut live = live.lock().unwrap_or_else(PoisonError::into_inner);
                    live.stop = live.stop.or(harm);
                    live.progress
                };
                if progress.is_some() && !is_loaded {
                    is_loaded = true;
                    watch.load_begins();
                }
                on_progress(progress.unwrap_or_default(), watch.last_rtt());
            }
            reason = &mut stop, if !is_stopped => {
                is_stopped = true;
                live.lock().unwrap_or_else(PoisonError::into_inner).stop = Some(reason);
            }
        }
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
