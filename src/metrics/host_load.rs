//! Which hosts are loaded by bandwidth runs of this agent.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a host counts as loaded after a run. Chosen: the longest usual interval between two scrapes, so
/// that each scrape sees each run.
const LOADED_FOR: Duration = Duration::from_secs(60);

/// Hosts with which this agent has bandwidth runs, as prober or as responder.
#[derive(Debug, Default)]
pub struct HostLoads {
    hosts: Mutex<HashMap<IpAddr, Arc<HostLoad>>>,
}

/// Whether bandwidth runs load the paths to a host.
#[derive(Debug, Default)]
pub struct HostLoad {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    runs: u32,
    ended: Option<Instant>,
}

/// A run that loads the paths to a host. Dropping it ends the load.
#[derive(Debug)]
pub struct Loading(Arc<HostLoad>);

impl HostLoads {
    /// The load of a host.
    #[must_use]
    pub fn of(&self, host: IpAddr) -> Arc<HostLoad> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        // Of hosts that nothing asks for any more, only those that are loaded are kept.
        hosts.retain(|_, load| Arc::strong_count(load) > 1 || load.is_loaded());
        Arc::clone(hosts.entry(host.to_canonical()).or_default())
    }
}

impl HostLoad {
    /// A run begins.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> Loading {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).runs += 1;
        Loading(Arc::clone(self))
    }

    /// Whether a run loads the paths to the host, or did within the last minute.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.runs > 0 || state.ended.is_some_and(|ended| ended.elapsed() < LOADED_FOR)
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.runs -= 1;
        state.ended = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_is_loaded_during_its_runs_and_for_a_minute() {
        let loads = HostLoads::default();
        let (host, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let (load, idle) = (loads.of(host), loads.of(other));
        assert!(!load.is_loaded());
        let runs = [load.begin(), loads.of("::ffff:192.0.2.1".parse().unwrap()).begin()];
        assert!(load.is_loaded() && !idle.is_loaded());
        drop(runs);
        assert!(load.is_loaded(), "for a minute");
        load.state.lock().unwrap().ended = Instant::now().checked_sub(LOADED_FOR);
        assert!(!load.is_loaded());
        drop((load, idle));
        let _ = loads.of(IpAddr::from([192, 0, 2, 3]));
        assert_eq!(loads.hosts.lock().unwrap().len(), 1, "hosts that nothing asks for are forgotten");
    }
}
