//! Waiting for something to become so.

use std::thread;
use std::time::{Duration, Instant};

/// The longest that anything waits. Chosen: what takes milliseconds on an idle machine takes seconds on a busy one.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Looks again and again until there is something to see.
///
/// # Panics
/// After [`DEADLINE`], with `what` was waited for.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
