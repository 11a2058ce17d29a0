//! The thread on which other hosts are answered over connections: HTTP with `/ws` and pings, and the agent port over TCP.
//!
//! Peers measure how fast these answers come, so nothing else runs here: pages, JSON and reloads belong to other threads.

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

/// The daemon's end of the thread. If it is dropped, the thread stops as after [`AnsweringHandle::stop`].
#[derive(Debug)]
pub struct AnsweringHandle {
    stop: watch::Sender<bool>,
    ended: oneshot::Receiver<()>,
    heartbeats: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// How often the thread shows that it is not stuck. The watchdog looks once a second at most.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// Tasks that run before sockets are looked at again. Each may write a piece of a page, which takes 50 µs, and a ping that has
/// come is behind all of them. Chosen: a look takes 1 µs.
const TASKS_BETWEEN_POLLS: u32 = 8;

impl AnsweringHandle {
    /// Starts the thread. `serve` is called at once, with the thread's runtime entered so that sockets belong to it; what it
    /// returns runs there until the stop that it is given, and the thread ends with it.
    ///
    /// # Errors
    /// Those of `serve`, and when the operating system gives no thread or no event descriptors.
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
            // A password that is still being checked does not delay the stop.
            drop(runtime);
            // Nobody waits if the daemon is gone.
            let _ = sender.send(());
        })?;
        Ok(Self { stop, ended, heartbeats, thread })
    }

    /// How often the thread has shown that it is not stuck.
    #[must_use]
    pub fn heartbeats(&self) -> u64 {
        self.heartbeats.load(Ordering::Relaxed)
    }

    /// Stops serving, and returns when the thread has ended.
    pub async fn stop(self) {
        // Its receivers are gone if the thread has ended by itself.
        let _ = self.stop.send(true);
        let _ = self.ended.await;
        if self.thread.join().is_err() {
            tracing::error!("the thread that answers over connections panicked");
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

/// Hands listeners to the runtime that is entered.
///
/// # Errors
/// When the runtime has no room for one.
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
