//! Whether peers and targets are up.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Fleet;
use crate::metrics::PeerState;

/// The maximum time that one reply counts as evidence that a peer is up, unless all probes of the peer have
/// longer intervals. Without it, a peer with one probe per hour would count as up for two hours after it
/// stopped. Chosen: two polls of the identity of a peer and their timeouts.
const EVIDENCE_AGE_MAX: Duration = Duration::from_secs(150);

/// Evidence from one path on whether a peer is up.
struct LivenessEvidence {
    /// Time since the last reply; `None`: there was none.
    age: Option<Duration>,
    /// The maximum time between two replies of a peer that is up.
    reply_interval_max: Duration,
    is_draining: bool,
}

impl Fleet {
    /// The state of each peer and target that is measured. `now` is in nanoseconds since 1970. `identified`
    /// has the time of the last identity of each peer in the same unit, which counts for peers whose probes
    /// all have long intervals.
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
            let Some(reply_interval_max) = running.path.reply_interval_max() else { continue };
            let measured = running.path.measured();
            evidence.entry(&key.peer).or_default().push(LivenessEvidence {
                age: age(measured.last_reply()),
                reply_interval_max,
                is_draining: measured.is_draining(),
            });
        }
        for (peer, evidence) in evidence {
            let state = state(&evidence, identified.get(peer).and_then(|at| age(*at)));
            // One working path is enough for the peer to be up.
            let known = states.entry(peer).or_insert(state);
            *known = (*known).min(state);
        }
        states
    }
}

/// The state of one peer. `identified` is the time since its last identity.
fn state(paths: &[LivenessEvidence], identified: Option<Duration>) -> PeerState {
    let shortest = paths.iter().map(|path| path.reply_interval_max).min().unwrap_or_default();
    let has_only_rare_probes = shortest > EVIDENCE_AGE_MAX;
    let longest = if has_only_rare_probes && identified.is_none() { shortest } else { EVIDENCE_AGE_MAX };
    let states = paths.iter().map(|path| {
        let is_fresh = path.age.is_some_and(|age| age <= path.reply_interval_max.min(longest));
        match (path.is_draining, is_fresh) {
            (true, _) => PeerState::Draining,
            (false, true) => PeerState::Up,
            (false, false) => PeerState::Down,
        }
    });
    match states.min() {
        Some(PeerState::Down)
            if has_only_rare_probes && identified.is_some_and(|age| age <= EVIDENCE_AGE_MAX) =>
        {
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

    fn answered(age: u64, reply_interval_max: u64) -> LivenessEvidence {
        LivenessEvidence {
            age: Some(seconds(age)),
            reply_interval_max: seconds(reply_interval_max),
            is_draining: false,
        }
    }

    /// The patience of a path with one probe per hour.
    const HOURLY: u64 = 7_203;

    #[test]
    fn peer_with_one_rare_probe_is_not_up_for_longer() {
        let after = |age| state(&[answered(age, 5), answered(age, HOURLY)], None);
        assert_eq!(state(&[answered(4, 5), answered(3_000, HOURLY)], None), PeerState::Up);
        assert_eq!((after(140), after(151), after(3_000)), (PeerState::Up, PeerState::Down, PeerState::Down));
    }

    #[test]
    fn peer_with_only_rare_probes_is_up_while_its_identity_can_be_read() {
        let hourly = [answered(3_000, HOURLY)];
        assert_eq!(state(&hourly, Some(seconds(61))), PeerState::Up);
        assert_eq!(state(&hourly, Some(seconds(151))), PeerState::Down);
        // A target has no identity, so only its probes count.
        assert_eq!(state(&hourly, None), PeerState::Up);
    }

    #[test]
    fn peer_that_is_leaving_is_draining() {
        let leaving =
            |reply_interval_max| LivenessEvidence { is_draining: true, ..answered(1, reply_interval_max) };
        assert_eq!(state(&[leaving(5)], None), PeerState::Draining);
        assert_eq!(state(&[leaving(HOURLY)], Some(seconds(1))), PeerState::Draining);
    }

    #[test]
    fn peer_that_never_answered_is_down() {
        let never = LivenessEvidence { age: None, ..answered(0, 5) };
        assert_eq!(state(&[never], Some(seconds(1))), PeerState::Down);
    }
}
