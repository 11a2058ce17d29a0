//! The thread that answers other hosts over connections: HTTP (including `/ws` and pings) and TCP on the
//! agent port.
//!
//! Peers measure the latency of these replies, so nothing else runs on this thread: metrics pages, JSON and
//! reloads run on other threads.

use std::io;
use std::net::TcpListener as StdListener;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::runtime::DetachedRuntime;

/// A handle to the answering thread. Dropping it stops the thread as [`AnsweringHandle::stop`] does.
#[derive(Debug)]
pub struct AnsweringHandle {
    stop: watch::Sender<bool>,
    ended: oneshot::Receiver<()>,
    heartbeats: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// Interval of the heartbeats that show that the thread is not stuck. The watchdog checks them at most once a
/// second.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// Tasks that run before the sockets are polled again. Each may write a part of a page, which takes 50 µs,
/// while a received ping waits for all of them. Chosen: 8, because a poll takes 1 µs.
const TASKS_BETWEEN_POLLS: u32 = 8;

impl AnsweringHandle {
    /// Starts the thread. Calls `serve` at once, inside the thread's runtime so that its sockets are
    /// registered there. The future that `serve` returns runs on the thread until the stop signal that
    /// `serve` receives; the thread ends when the future does.
    ///
    /// # Errors
    /// The error of `serve`, or an error of the operating system when it creates the thread or the event
    /// descriptors.
    pub fn spawn<F>(serve: impl FnOnce(watch::Receiver<bool>) -> io::Result<F>) -> io::Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = DetachedRuntime::build(
            Builder::new_current_thread().enable_all().event_interval(TASKS_BETWEEN_POLLS),
        )?;
        let (stop, stopped) = watch::channel(false);
        let serving = {
            let _runtime = runtime.enter();
            serve(stopped)?
        };
        let (sender, ended) = oneshot::channel();
        let heartbeats = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&heartbeats);
        let thread = std::thread::Builder::new().name("pm-answering".to_owned()).spawn(move || {
            runtime.block_on(run(serving, &counted));
            // A password check in progress does not delay the stop.
            drop(runtime);
            // The receiver is gone if the daemon has ended.
            let _ = sender.send(());
        })?;
        Ok(Self { stop, ended, heartbeats, thread })
    }

    /// Number of heartbeats since the start. It does not increase while the thread is stuck.
    #[must_use]
    pub fn heartbeats(&self) -> u64 {
        self.heartbeats.load(Ordering::Relaxed)
    }

    /// Stops serving and waits for the end of the thread.
    pub async fn stop(self) {
        // The receivers are gone if the thread has already ended.
        let _ = self.stop.send(true);
        let _ = self.ended.await;
        if self.thread.join().is_err() {
            tracing::error!("the answering thread panicked");
        }
    }
}

async fn run(serving: impl Future<Output = ()>, heartbeats: &AtomicU64) {
    let mut serving = pin!(serving);
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = &mut serving => return,
            _ = heartbeat.tick() => {
                heartbeats.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Registers listeners with the current runtime.
///
/// # Errors
/// When the runtime cannot register a listener.
pub fn register(listeners: Vec<StdListener>) -> io::Result<Vec<TcpListener>> {
    listeners.into_iter().map(TcpListener::from_std).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use std::thread::current;

    #[tokio::test]
    async fn serves_on_its_own_thread_until_the_stop() {
        let (name, named) = oneshot::channel();
        let serve = |mut stopped: watch::Receiver<bool>| {
            Ok(async move {
                name.send(current().name().map(str::to_owned)).unwrap();
                stopped.wait_for(|stopped| *stopped).await.unwrap();
            })
        };
        let handle = AnsweringHandle::spawn(serve).unwrap();
        assert_eq!(named.await.unwrap().as_deref(), Some("pm-answering"));
        handle.stop().await;
    }

    #[tokio::test]
    async fn heartbeats_stop_while_the_thread_is_stuck() {
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let (stuck, is_stuck) = oneshot::channel();
        let serve = |_| {
            Ok(async move {
                tokio::time::sleep(2 * HEARTBEAT).await;
                stuck.send(()).unwrap();
                blocked.recv().unwrap();
                pending().await
            })
        };
        let handle = AnsweringHandle::spawn(serve).unwrap();
        is_stuck.await.unwrap();
        let beats = handle.heartbeats();
        assert!(beats >= 1);
        tokio::time::sleep(2 * HEARTBEAT).await;
        assert_eq!(handle.heartbeats(), beats);
        release.send(()).unwrap();
        while handle.heartbeats() == beats {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn serve_error_starts_no_thread() {
        let serve = |_| Err::<std::future::Ready<()>, _>(io::ErrorKind::OutOfMemory.into());
        assert_eq!(AnsweringHandle::spawn(serve).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }
}
