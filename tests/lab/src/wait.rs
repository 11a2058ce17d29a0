//! Waiting for a condition.

use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for any condition. Chosen: what takes milliseconds on an idle machine takes seconds on a busy
/// one.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Evaluates `condition` every 10 ms until it returns a value, and returns that value.
///
/// # Panics
/// After [`DEADLINE`], naming `what`.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "timed out waiting for: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
