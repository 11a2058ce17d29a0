//! Polls many sources periodically in the background.
//!
//! Everything that the agent polls over the network is polled by a [`KeyedPoller`]: host names, providers,
//! identities of peers, and agents whose names are not known. They share one policy:
//!
//! - **After a success** the next poll is one [interval](Backoff::interval) later, or earlier where the
//!   result has a lifetime, such as the TTL of a DNS record.
//! - **After a failure** it is [`retry`](Backoff::retry) later. The pause doubles after each further failure
//!   in a row, up to the interval. So the end of a short failure is noticed soon, and a long outage causes no
//!   more polls than normal operation: a server that fails under load does not get more load.
//! - **Jitter**: each pause is up to 10 % shorter or longer, so that agents that were started together do not
//!   poll at the same time.
//! - **Spread**: where many hosts poll each other, the first polls are spread over a period.
//! - **Concurrency**: where a poll is expensive for this host, the number of concurrent polls is limited.
//!
//! Polling never delays a measurement. Results are sent to a bounded channel. If it is full, the poll task
//! waits, which delays its next poll.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};

/// Capacity of the channel of results. Chosen: the daemon receives them within milliseconds. If the channel
/// is full, poll tasks wait.
const RESULTS_MAX: usize = 64;

/// The maximum jitter is a pause divided by this.
const JITTER_DIVISOR: u32 = 10;

/// The intervals between polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// From a success to the next poll; also the maximum after failures.
    pub interval: Duration,
    /// From the first failure to the next poll.
    pub retry: Duration,
}

/// When to poll again after a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextPoll {
    /// The poll succeeded: poll again after the interval.
    Interval,
    /// The poll succeeded, and the result is valid for this duration: poll again after it.
    After(Duration),
    /// The poll failed: poll again as [`Backoff`] defines.
    Retry,
    /// The poll succeeded, and the result is final: do not poll again.
    Never,
}

impl NextPoll {
    /// [`Interval`](Self::Interval) after a success, [`Retry`](Self::Retry) after a failure.
    pub fn of<V, E>(result: &Result<V, E>) -> Self {
        match result {
            Ok(_) => Self::Interval,
            Err(_) => Self::Retry,
        }
    }
}

impl Backoff {
    /// The pause after a poll, before jitter; `None`: do not poll again. `failures` is the number of
    /// consecutive failures before this poll.
    fn pause(self, next: NextPoll, failures: u32) -> Option<Duration> {
        match next {
            NextPoll::Interval => Some(self.interval),
            NextPoll::After(pause) => Some(pause),
            NextPoll::Retry => {
                let factor = 1_u32.checked_shl(failures).unwrap_or(u32::MAX);
                Some(self.retry.saturating_mul(factor).min(self.interval))
            }
            NextPoll::Never => None,
        }
    }
}

/// Polls one source for each key `K`, described by `T`, and sends the results as `(K, R)`.
///
/// Dropping the poller ends all its tasks.
#[derive(Debug)]
pub struct KeyedPoller<K, T, R> {
    backoff: fn(&T) -> Backoff,
    spread: Duration,
    permits: Arc<Semaphore>,
    results: mpsc::Sender<(K, R)>,
    polled: BTreeMap<K, (T, AbortHandle)>,
    tasks: JoinSet<()>,
}

impl<K, T, R> KeyedPoller<K, T, R>
where
    K: Ord + Clone + Send + Sync + 'static,
    T: PartialEq + Clone + Send + Sync + 'static,
    R: Send + 'static,
{
    /// A poller without sources, and the receiver of its results.
    #[must_use]
    pub fn new(backoff: fn(&T) -> Backoff) -> (Self, mpsc::Receiver<(K, R)>) {
        let (results, receiver) = mpsc::channel(RESULTS_MAX);
        let poller = Self {
            backoff,
            spread: Duration::ZERO,
            permits: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
            results,
            polled: BTreeMap::new(),
            tasks: JoinSet::new(),
        };
        (poller, receiver)
    }

    /// Spreads the first polls over a period.
    #[must_use]
    pub fn spread_over(self, spread: Duration) -> Self {
        Self { spread, ..self }
    }

    /// Limits the number of concurrent polls.
    #[must_use]
    pub fn with_concurrency(self, polls: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(polls)), ..self }
    }

    /// Polls exactly the sources `wanted`, each with `poll`. A source whose description is unchanged is not
    /// restarted and keeps the `poll` that it was started with; to replace that, call [`renew`](Self::renew)
    /// first.
    pub fn follow<P, F>(&mut self, wanted: BTreeMap<K, T>, poll: P)
    where
        P: Fn(&K, &T) -> F + Clone + Send + 'static,
        F: Future<Output = (R, NextPoll)> + Send + 'static,
    {
        while self.tasks.try_join_next().is_some() {}
        self.polled.retain(|key, (source, task)| {
            let stays = wanted.get(key) == Some(source);
            if !stays {
                task.abort();
            }
            stays
        });
        for (key, source) in wanted {
            if !self.polled.contains_key(&key) {
                let task = PollLoop {
                    key: key.clone(),
                    source: source.clone(),
                    backoff: (self.backoff)(&source),
                    start_after: random_part(self.spread),
                    permits: Arc::clone(&self.permits),
                    results: self.results.clone(),
                };
                let task = self.tasks.spawn(task.run(poll.clone()));
                self.polled.insert(key, (source, task));
            }
        }
    }

    /// Ends all tasks, so that the next [`follow`](Self::follow) starts each source again.
    pub fn renew(&mut self) {
        self.tasks.abort_all();
        self.polled.clear();
    }
}

/// The task that polls one source.
struct PollLoop<K, T, R> {
    key: K,
    source: T,
    backoff: Backoff,
    start_after: Duration,
    permits: Arc<Semaphore>,
    results: mpsc::Sender<(K, R)>,
}

impl<K: Clone, T, R> PollLoop<K, T, R> {
    async fn run<F: Future<Output = (R, NextPoll)>>(self, poll: impl Fn(&K, &T) -> F) {
        if !self.start_after.is_zero() {
            tokio::time::sleep(self.start_after).await;
        }
        let mut failures = 0;
        loop {
            let (result, next) = {
                let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
                poll(&self.key, &self.source).await
            };
            if self.results.send((self.key.clone(), result)).await.is_err() {
                return;
            }
            let Some(pause) = self.backoff.pause(next, failures) else { return };
            failures = if next == NextPoll::Retry { failures.saturating_add(1) } else { 0 };
            tokio::time::sleep(with_jitter(pause)).await;
        }
    }
}

/// Makes a pause up to 10 % shorter or longer, at random.
fn with_jitter(pause: Duration) -> Duration {
    let part = pause / JITTER_DIVISOR;
    pause - part + random_part(2 * part)
}

/// A random duration below `time`. Zero if random bytes are not available: then agents may poll at the same
/// time, which does no other harm.
fn random_part(time: Duration) -> Duration {
    let mut bytes = [0; 2];
    let _ = getrandom::fill(&mut bytes);
    time * u32::from(u16::from_be_bytes(bytes)) / 65_536
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::RangeInclusive;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::time::Instant;

    const BACKOFF: Backoff = Backoff { interval: Duration::from_secs(60), retry: Duration::from_secs(10) };

    type Poller = KeyedPoller<&'static str, u32, u32>;
    type Results = mpsc::Receiver<(&'static str, u32)>;

    fn poller() -> (Poller, Results) {
        KeyedPoller::new(|_| BACKOFF)
    }

    fn all(wanted: &[(&'static str, u32)]) -> BTreeMap<&'static str, u32> {
        wanted.iter().copied().collect()
    }

    /// A poll that returns the description, and `next`.
    fn poll_with(
        next: NextPoll,
    ) -> impl Fn(&&'static str, &u32) -> std::future::Ready<(u32, NextPoll)> + Clone {
        move |_, source| std::future::ready((*source, next))
    }

    /// Asserts that `passed` is the planned time, within the jitter and the millisecond resolution of the
    /// timer.
    #[track_caller]
    fn assert_about(passed: Duration, seconds: f64) {
        let (passed, range) = (passed.as_secs_f64(), seconds * 0.9 - 0.002..=seconds * 1.1 + 0.002);
        assert!(range.contains(&passed), "{passed} s is not within {range:?}");
    }

    async fn seconds_to_next(results: &mut Results) -> Duration {
        let before = Instant::now();
        results.recv().await.expect("the poller is not dropped");
        before.elapsed()
    }

    /// Whether no result is sent for a long time.
    async fn is_silent(results: &mut Results) -> bool {
        tokio::time::timeout(100 * BACKOFF.interval, results.recv()).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn success_is_polled_again_after_the_interval() {
        let (mut poller, mut results) = poller();
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Interval));
        assert_eq!(seconds_to_next(&mut results).await, Duration::ZERO);
        for _ in 0..20 {
            assert_about(seconds_to_next(&mut results).await, 60.0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn result_with_a_lifetime_is_polled_again_after_it() {
        let (mut poller, mut results) = poller();
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::After(Duration::from_secs(5))));
        seconds_to_next(&mut results).await;
        assert_about(seconds_to_next(&mut results).await, 5.0);
    }

    #[tokio::test(start_paused = true)]
    async fn retry_pause_doubles_up_to_the_interval_and_a_success_resets_it() {
        let (mut poller, mut results) = poller();
        let polls = Arc::new(AtomicUsize::new(0));
        poller.follow(all(&[("a", 1)]), move |_, _| {
            let poll = polls.fetch_add(1, Ordering::Relaxed);
            std::future::ready((0, if poll == 5 { NextPoll::Interval } else { NextPoll::Retry }))
        });
        seconds_to_next(&mut results).await;
        for pause in [10.0, 20.0, 40.0, 60.0, 60.0, 60.0, 10.0, 20.0] {
            assert_about(seconds_to_next(&mut results).await, pause);
        }
    }

    #[test]
    fn pauses_do_not_overflow() {
        for failures in [0, 31, 32, 33, u32::MAX] {
            let pause = BACKOFF.pause(NextPoll::Retry, failures).unwrap();
            assert!((BACKOFF.retry..=BACKOFF.interval).contains(&pause), "{failures}: {pause:?}");
        }
        let longest = Backoff { interval: Duration::MAX, retry: Duration::MAX };
        assert_eq!(longest.pause(NextPoll::Retry, 40), Some(Duration::MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn source_with_a_final_result_is_polled_again_only_after_renew() {
        let (mut poller, mut results) = poller();
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Never));
        assert_eq!(results.recv().await, Some(("a", 1)));
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Never));
        assert!(is_silent(&mut results).await);
        poller.renew();
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Never));
        assert_eq!(results.recv().await, Some(("a", 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn unchanged_source_is_not_restarted_and_removed_source_ends() {
        let (mut poller, mut results) = poller();
        poller.follow(all(&[("changed", 1), ("gone", 2), ("same", 3)]), poll_with(NextPoll::Interval));
        for _ in 0..3 {
            results.recv().await;
        }
        tokio::time::advance(BACKOFF.interval / 2).await;
        poller.follow(all(&[("changed", 4), ("new", 5), ("same", 3)]), poll_with(NextPoll::Interval));
        assert_eq!(results.recv().await, Some(("changed", 4)));
        assert_eq!(results.recv().await, Some(("new", 5)));
        let before = Instant::now();
        assert_eq!(results.recv().await, Some(("same", 3)), "it is polled on time");
        let passed = before.elapsed();
        assert!((Duration::from_secs(24)..=Duration::from_secs(37)).contains(&passed), "{passed:?}");
        poller.follow(all(&[]), poll_with(NextPoll::Interval));
        assert!(is_silent(&mut results).await);
    }

    #[tokio::test(start_paused = true)]
    async fn renewed_tasks_use_the_new_poll_immediately() {
        let (mut poller, mut results) = poller();
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Interval));
        results.recv().await;
        let new_poll =
            |_: &&'static str, source: &u32| std::future::ready((source + 100, NextPoll::Interval));
        poller.follow(all(&[("a", 1)]), new_poll);
        assert_eq!(results.recv().await, Some(("a", 1)), "it was not renewed");
        poller.renew();
        poller.follow(all(&[("a", 1)]), new_poll);
        assert_eq!(seconds_to_next(&mut results).await, Duration::ZERO);
        assert_eq!(results.recv().await, Some(("a", 101)));
    }

    #[tokio::test(start_paused = true)]
    async fn polls_of_many_keys_are_spread() {
        const KEYS: usize = 200;
        let (poller, mut results) = KeyedPoller::<usize, (), ()>::new(|()| BACKOFF);
        let mut poller = poller.spread_over(Duration::from_secs(2));
        let begin = Instant::now();
        poller.follow((0..KEYS).map(|key| (key, ())).collect(), |_, ()| {
            std::future::ready(((), NextPoll::Interval))
        });
        let mut times = Vec::new();
        for _ in 0..2 * KEYS {
            results.recv().await;
            times.push(begin.elapsed().as_secs_f64());
        }
        let spread = |times: &[f64], range: RangeInclusive<f64>, least: f64| {
            let (first, last) = (times[0], times[times.len() - 1]);
            assert!(range.contains(&first) && range.contains(&last), "{first} to {last}");
            assert!(last - first >= least, "{first} to {last}");
        };
        // 200 random numbers all lie in one half of a range once in 2^199 runs.
        spread(&times[..KEYS], 0.0..=2.002, 1.0);
        spread(&times[KEYS..], 54.0..=68.004, 6.0);
    }

    #[tokio::test(start_paused = true)]
    async fn concurrency_is_limited_and_all_polls_run() {
        const KEYS: usize = 50;
        let (poller, mut results) = KeyedPoller::<usize, (), usize>::new(|()| BACKOFF);
        let mut poller = poller.with_concurrency(8);
        let running = Arc::new(AtomicUsize::new(0));
        poller.follow((0..KEYS).map(|key| (key, ())).collect(), move |_, ()| {
            let running = Arc::clone(&running);
            async move {
                let now = running.fetch_add(1, Ordering::Relaxed) + 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
                running.fetch_sub(1, Ordering::Relaxed);
                (now, NextPoll::Never)
            }
        });
        let mut most = 0;
        for _ in 0..KEYS {
            let (_, running) = results.recv().await.unwrap();
            most = most.max(running);
        }
        assert_eq!(most, 8);
    }

    #[tokio::test(start_paused = true)]
    async fn task_ends_when_the_receiver_or_the_poller_is_dropped() {
        let (mut poller, results) = poller();
        drop(results);
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Interval));
        assert!(poller.tasks.join_next().await.is_some_and(|ended| ended.is_ok()));

        let (mut poller, mut results) = self::poller();
        poller.follow(all(&[("a", 1)]), poll_with(NextPoll::Interval));
        results.recv().await;
        drop(poller);
        assert_eq!(results.recv().await, None);
    }
}
