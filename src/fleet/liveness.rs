//! Whether peers and targets are up.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Fleet;
use crate::metrics::PeerState;

/// The longest that one answer counts as a sign of life, unless every probe of a peer waits longer. Without it a peer with a
/// probe an hour would count as up for two hours after its end. Chosen: two polls of a peer's identity and their timeouts.
const SIGN_OF_LIFE_MAX: Duration = Duration::from_secs(150);

/// One way in which a peer shows that it is up.
struct LivenessEvidence {
    /// Since the last answer; `None`: there was none.
    age: Option<Duration>,
    /// An answer comes at least this often.
    patience: Duration,
    is_draining: bool,
}

impl Fleet {
    /// The state of every peer and target that is measured. `now`: nanoseconds since 1970; `identified`: when peers last
    /// answered who they are, likewise. That counts for peers whose probes are all rarer.
    #[must_use]
    pub fn states<'a>(
        &'a self,
        now: u64,
        identified: &BTreeMap<String, u64>,
    ) -> BTreeMap<&'a str, PeerState> {
        let mut states: BTreeMap<&str, PeerState> = BTreeMap::new();
        for (key, _) in &self.unmeasured {
            states.insert(&key.peer, PeerState::Unresolved);
        }
        let age = |at: u64| (at > 0).then(|| Duration::from_nanos(now.saturating_sub(at)));
        let mut evidence: BTreeMap<&str, Vec<LivenessEvidence>> = BTreeMap::new();
        for (key, running) in &self.running {
            let measured = running.path.measured();
            evidence.entry(&key.peer).or_default().push(LivenessEvidence {
                age: age(measured.last_reply()),
                patience: running.path.patience(),
                is_draining: measured.is_draining(),
            });
        }
        for (peer, evidence) in evidence {
            let state = state(&evidence, identified.get(peer).and_then(|at| age(*at)));
            // One path that works shows that the peer is there.
            let known = states.entry(peer).or_insert(state);
            *known = (*known).min(state);
        }
        states
    }
}

/// The state of one peer. `identified`: how long ago it answered who it is.
fn state(paths: &[LivenessEvidence], identified: Option<Duration>) -> PeerState {
    let quickest = paths.iter().map(|path| path.patience).min().unwrap_or_default();
    let all_are_rare = quickest > SIGN_OF_LIFE_MAX;
    let longest = if all_are_rare && identified.is_none() { quickest } else { SIGN_OF_LIFE_MAX };
    let states = paths.iter().map(|path| {
        let is_fresh = path.age.is_some_and(|age| age <= path.patience.min(longest));
        match (path.is_draining, is_fresh) {
            (true, _) => PeerState::Draining,
            (false, true) => PeerState::Up,
            (false, false) => PeerState::Down,
        }
    });
    match states.min() {
        Some(PeerState::Down) if all_are_rare && identified.is_some_and(|age| age <= SIGN_OF_LIFE_MAX) => {
            PeerState::Up
        }
        Some(state) => state,
        None => PeerState::Down,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn answered(age: u64, patience: u64) -> LivenessEvidence {
        LivenessEvidence { age: Some(seconds(age)), patience: seconds(patience), is_draining: false }
    }

    /// The patience of a probe an hour.
    const HOURLY: u64 = 7_203;

    #[test]
    fn a_peer_is_not_up_for_longer_because_one_of_its_probes_is_rare() {
        let after = |age| state(&[answered(age, 5), answered(age, HOURLY)], None);
        assert_eq!(state(&[answered(4, 5), answered(3_000, HOURLY)], None), PeerState::Up);
        assert_eq!((after(140), after(151), after(3_000)), (PeerState::Up, PeerState::Down, PeerState::Down));
    }

    #[test]
    fn a_peer_with_rare_probes_only_is_up_while_its_identity_can_be_read() {
        let hourly = [answered(3_000, HOURLY)];
        assert_eq!(state(&hourly, Some(seconds(61))), PeerState::Up);
        assert_eq!(state(&hourly, Some(seconds(151))), PeerState::Down);
        // A target has none: only its probes tell.
        assert_eq!(state(&hourly, None), PeerState::Up);
    }

    #[test]
    fn a_peer_that_is_leaving_is_neither_up_nor_down() {
        let leaving = |patience| LivenessEvidence { is_draining: true, ..answered(1, patience) };
        assert_eq!(state(&[leaving(5)], None), PeerState::Draining);
        assert_eq!(state(&[leaving(HOURLY)], Some(seconds(1))), PeerState::Draining);
    }

    #[test]
    fn a_peer_that_never_answered_is_down() {
        let never = LivenessEvidence { age: None, ..answered(0, 5) };
        assert_eq!(state(&[never], Some(seconds(1))), PeerState::Down);
    }
}
