//! What is known about each hop of a flow, and what a hop without answers means.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::{Answer, AnswerExtensions};
use crate::time::Timestamp;

/// What a hop's answers, or their absence, mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HopState {
    /// A router answers.
    Answered,
    /// No answer yet, and too few probes to tell why.
    Unanswered,
    /// The router does not answer probes. The hops behind it do.
    Silent,
    /// The router answers only some probes, although packets pass it: it limits its answers.
    RateLimited,
    /// Several routers answer, between which packets of one flow alternate.
    Balanced,
    /// Not probed this time, because its router was probed too recently; the last known answer is shown.
    Inherited,
    /// Not probed yet, because its router, or the agent as a whole, was probed too recently.
    NotProbed,
    /// Probes are lost at this hop or before it, and so are those to all hops behind it and to the
    /// destination.
    Lossy,
}

impl HopState {
    /// The state as labels and JSON show it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Unanswered => "unanswered",
            Self::Silent => "silent",
            Self::RateLimited => "rate_limited",
            Self::Balanced => "balanced",
            Self::Inherited => "inherited",
            Self::NotProbed => "not_probed",
            Self::Lossy => "lossy",
        }
    }
}

/// Outcomes of the latest probes of one hop.
#[derive(Debug, Clone, Default)]
pub(super) struct HopHistory {
    /// Bit 0: the latest decided probe. Set: answered.
    outcomes: u32,
    /// Number of valid bits.
    decided: u8,
    responders: Vec<Responder>,
}

/// A router, or the destination, that answered at a hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Responder {
    /// Its address.
    pub address: IpAddr,
    /// Number of its answers.
    pub answers: u32,
    /// The shortest RTT.
    pub rtt_min: Duration,
    /// The latest RTT.
    pub rtt_last: Duration,
    /// Time of its latest answer.
    pub answered_at: Timestamp,
    /// What it attached to its latest answer. Other labels are no other route.
    pub extensions: Option<Arc<AnswerExtensions>>,
}

impl Responder {
    /// Adds an answer, and returns it. Equal extensions become the same value: stored traces share it.
    fn add(&mut self, answer: Answer, at: Timestamp) -> Answer {
        let Answer { router, rtt, extensions } = answer;
        self.answers = self.answers.saturating_add(1);
        self.rtt_min = self.rtt_min.min(rtt);
        (self.rtt_last, self.answered_at) = (rtt, at);
        if self.extensions != extensions {
            self.extensions = extensions;
        }
        Answer { router, rtt, extensions: self.extensions.clone() }
    }
}

/// Number of outcomes that are kept for each hop.
const OUTCOMES_MAX: u8 = 20;

/// A hop that answered none of so many probes is silent.
const SILENT_AFTER: u8 = 5;

/// Number of responders that are kept for each hop. At the limit the one that has been silent longest is
/// forgotten.
const RESPONDERS_MAX: usize = 16;

/// A hop loses probes if more than this share of [`OUTCOMES_MAX`] is unanswered. Chosen: a quarter, so that a
/// path that loses 5 % at random is taken for a lossy one in 3 of 10,000 windows.
const LOSS_MIN: f64 = 0.25;

/// A hop or destination loses no probes if at most this share is unanswered.
const LOSS_MAX_CLEAN: f64 = 0.05;

impl HopHistory {
    /// Adds an answer, and returns it.
    pub(super) fn answered(&mut self, answer: Answer, at: Timestamp) -> Answer {
        self.decide(true);
        let Answer { router: address, rtt, .. } = answer;
        if let Some(known) = self.responders.iter_mut().find(|responder| responder.address == address) {
            return known.add(answer, at);
        }
        if self.responders.len() == RESPONDERS_MAX {
            let oldest = (0..RESPONDERS_MAX).min_by_key(|index| self.responders[*index].answered_at);
            self.responders.swap_remove(oldest.expect("there are responders"));
        }
        let extensions = answer.extensions.clone();
        let known =
            Responder { address, answers: 1, rtt_min: rtt, rtt_last: rtt, answered_at: at, extensions };
        self.responders.push(known);
        answer
    }

    pub(super) fn unanswered(&mut self) {
        self.decide(false);
    }

    fn decide(&mut self, is_answered: bool) {
        self.outcomes = self.outcomes << 1 | u32::from(is_answered);
        self.decided = (self.decided + 1).min(OUTCOMES_MAX);
    }

    /// The router that answered last.
    pub(super) fn last_responder(&self) -> Option<&Responder> {
        self.responders.iter().max_by_key(|responder| responder.answered_at)
    }

    /// Whether it answered none of the latest probes.
    pub(super) fn is_silent(&self) -> bool {
        self.decided >= SILENT_AFTER && self.outcomes & ((1 << SILENT_AFTER) - 1) == 0
    }

    /// The share of unanswered probes; `None` for few probes.
    fn loss(&self) -> Option<f64> {
        let unanswered = (!self.outcomes & ((1 << OUTCOMES_MAX) - 1)).count_ones();
        (self.decided == OUTCOMES_MAX).then(|| f64::from(unanswered) / f64::from(OUTCOMES_MAX))
    }

    fn is_lossy(&self) -> bool {
        self.loss().is_some_and(|loss| loss > LOSS_MIN)
    }

    fn is_clean(&self) -> bool {
        self.loss().is_some_and(|loss| loss <= LOSS_MAX_CLEAN)
    }
}

/// The states of the hops of a route, in the order of their TTL. `destination` is the history of the probes
/// that are not limited in TTL.
///
/// A missing answer is loss of a packet only if the loss goes on to the destination: routers limit their
/// answers, and some send none.
pub(super) fn states(hops: &[HopHistory], destination: &HopHistory) -> Vec<HopState> {
    let mut is_behind_clean = destination.is_clean();
    let mut is_behind_lossy = destination.is_lossy();
    let mut has_answer_behind = destination.outcomes != 0;
    let mut states: Vec<HopState> = hops
        .iter()
        .rev()
        .map(|hop| {
            let state = if hop.is_silent() {
                if has_answer_behind { HopState::Silent } else { HopState::Unanswered }
            } else if hop.outcomes == 0 {
                HopState::Unanswered
            } else if hop.is_lossy() && is_behind_lossy {
                HopState::Lossy
            } else if hop.is_lossy() && is_behind_clean {
                HopState::RateLimited
            } else {
                HopState::Answered
            };
            // A silent hop says nothing about loss.
            if hop.outcomes != 0 && !hop.is_silent() {
                is_behind_lossy &= hop.is_lossy();
                is_behind_clean |= hop.is_clean();
                has_answer_behind = true;
            }
            state
        })
        .collect();
    states.reverse();
    states
}

/// The TTL from which on probes are lost at every hop that answers, and on the way to the destination; `None`
/// if the destination loses none.
pub(super) fn first_lossy_hop(states: &[HopState]) -> Option<u8> {
    let index = states.iter().position(|state| *state == HopState::Lossy)?;
    u8::try_from(index + 1).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::icmp_extensions::MplsLabel;

    /// A history in which `answered` of 20 probes were answered, evenly spread.
    fn history(answered: u32) -> HopHistory {
        let mut history = HopHistory::default();
        for index in 0..20_u32 {
            if index * answered / 20 < (index + 1) * answered / 20 {
                history.answered(
                    Answer::new([192, 0, 2, 1].into(), Duration::from_millis(1)),
                    Timestamp::from_nanos(1),
                );
            } else {
                history.unanswered();
            }
        }
        history
    }

    fn found(answered: &[u32], destination: u32) -> (Vec<HopState>, Option<u8>) {
        let hops: Vec<HopHistory> = answered.iter().map(|answered| history(*answered)).collect();
        let states = states(&hops, &history(destination));
        let first = first_lossy_hop(&states);
        (states, first)
    }

    #[test]
    fn missing_answers_are_loss_only_if_it_goes_on_to_the_destination() {
        use HopState::{Answered, Lossy, RateLimited, Silent, Unanswered};
        assert_eq!(found(&[20, 8, 20], 20), (vec![Answered, RateLimited, Answered], None));
        assert_eq!(found(&[20, 0, 20], 20), (vec![Answered, Silent, Answered], None));
        assert_eq!(found(&[20, 14, 14, 14], 14), (vec![Answered, Lossy, Lossy, Lossy], Some(2)));
        assert_eq!(found(&[20, 14, 0, 14], 14), (vec![Answered, Lossy, Silent, Lossy], Some(2)));
        assert_eq!(found(&[14, 20, 14], 14), (vec![RateLimited, Answered, Lossy], Some(3)));
        assert_eq!(found(&[20, 20, 0], 0), (vec![Answered, Answered, Unanswered], None));
        assert_eq!(found(&[20, 8], 19), (vec![Answered, RateLimited], None), "a twentieth is not loss");
        assert_eq!(found(&[20, 8], 17), (vec![Answered, Answered], None), "the destination loses some too");
        assert_eq!(found(&[], 20), (vec![], None));
    }

    #[test]
    fn states_have_the_names_of_the_documentation() {
        use HopState as State;
        for (state, name) in [
            (State::Answered, "answered"),
            (State::Unanswered, "unanswered"),
            (State::Silent, "silent"),
            (State::RateLimited, "rate_limited"),
            (State::Balanced, "balanced"),
            (State::Inherited, "inherited"),
            (State::NotProbed, "not_probed"),
            (State::Lossy, "lossy"),
        ] {
            assert_eq!(state.as_str(), name);
        }
    }

    #[test]
    fn loss_must_be_more_than_chance() {
        for (answered, is_lossy) in [(20, false), (15, false), (14, true), (0, true)] {
            assert_eq!(history(answered).is_lossy(), is_lossy, "{answered} of 20");
        }
    }

    #[test]
    fn hop_is_silent_after_five_probes_without_an_answer() {
        for (unanswered, is_silent) in [(0, false), (2, false), (4, false), (5, true), (6, true)] {
            let mut hop = history(20);
            (0..unanswered).for_each(|_| hop.unanswered());
            assert_eq!(hop.is_silent(), is_silent, "{unanswered} probes");
        }
        let mut hop = HopHistory::default();
        (0..4).for_each(|_| hop.unanswered());
        assert!(!hop.is_silent(), "too few probes");
    }

    #[test]
    fn hop_without_an_answer_so_far_says_nothing_about_the_loss_before_it() {
        let mut unknown = HopHistory::default();
        unknown.unanswered();
        let states = states(&[history(14), unknown], &history(14));
        assert_eq!(states, [HopState::Lossy, HopState::Unanswered]);
    }

    #[test]
    fn few_probes_say_nothing_about_loss() {
        let mut hop = HopHistory::default();
        hop.answered(Answer::new([192, 0, 2, 1].into(), Duration::from_millis(1)), Timestamp::from_nanos(1));
        (1..OUTCOMES_MAX - 1).for_each(|_| hop.unanswered());
        assert_eq!(hop.loss(), None);
        assert!(hop.is_silent());
        hop.unanswered();
        assert_eq!(hop.loss(), Some(0.95));
        hop.unanswered();
        assert_eq!(hop.loss(), Some(1.0), "the oldest outcome is forgotten");
    }

    #[test]
    fn responder_keeps_the_shortest_and_the_latest_rtt() {
        let mut hop = HopHistory::default();
        for (last, milliseconds, at) in [(1, 5, 1), (2, 9, 2), (1, 7, 3)] {
            let rtt = Duration::from_millis(milliseconds);
            hop.answered(Answer::new([192, 0, 2, last].into(), rtt), Timestamp::from_nanos(at));
        }
        let expected = Responder {
            address: [192, 0, 2, 1].into(),
            answers: 2,
            rtt_min: Duration::from_millis(5),
            rtt_last: Duration::from_millis(7),
            answered_at: Timestamp::from_nanos(3),
            extensions: None,
        };
        assert_eq!(hop.last_responder(), Some(&expected));
    }

    #[test]
    fn responder_has_the_extensions_of_its_latest_answer_and_shares_equal_ones() {
        let mut hop = HopHistory::default();
        let with = |labels: &[u32]| {
            let label = |label: &u32| MplsLabel { label: *label, traffic_class: 0, is_bottom: true, ttl: 1 };
            let labels = labels.iter().map(label).collect();
            let extensions = Some(Arc::new(AnswerExtensions { labels, interfaces: Vec::new() }));
            Answer { extensions, ..Answer::new([192, 0, 2, 1].into(), Duration::from_millis(1)) }
        };
        let mut answer = |answer| {
            let answer = hop.answered(answer, Timestamp::from_nanos(1));
            let known = hop.last_responder().unwrap().extensions.clone();
            assert_eq!(answer.extensions, known);
            known
        };
        let first = answer(with(&[16_004])).unwrap();
        assert!(Arc::ptr_eq(&first, &answer(with(&[16_004])).unwrap()));
        assert_eq!(answer(with(&[16_005])), with(&[16_005]).extensions);
        assert_eq!(answer(Answer { extensions: None, ..with(&[]) }), None);
    }

    #[test]
    fn responder_that_was_silent_longest_is_forgotten_at_the_limit() {
        let mut hop = HopHistory::default();
        for last in 0..=16 {
            let at = Timestamp::from_nanos(u64::from(last));
            hop.answered(Answer::new([192, 0, 2, last].into(), Duration::from_millis(1)), at);
        }
        assert_eq!(hop.responders.len(), RESPONDERS_MAX);
        assert!(hop.responders.iter().all(|responder| responder.address != IpAddr::from([192, 0, 2, 0])));
    }
}
