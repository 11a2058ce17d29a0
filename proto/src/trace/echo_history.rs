//! What the echoes of a flow showed during the last minutes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::time::Timestamp;

/// Verdicts and RTTs of the echoes of one flow, in slots of [`SLOT`].
#[derive(Debug, Default)]
pub(super) struct EchoHistory {
    /// Oldest first.
    slots: VecDeque<Slot>,
}

/// A sum over echoes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EchoSummary {
    /// Echoes that were answered or lost.
    pub decided: u32,
    /// Echoes that were lost.
    pub lost: u32,
    /// Mean RTT of those that were answered; `None` if there is none.
    pub rtt: Option<Duration>,
}

impl EchoSummary {
    /// The share of lost echoes; `None` if there are none.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        (self.decided > 0).then(|| f64::from(self.lost) / f64::from(self.decided))
    }
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    began: Timestamp,
    answered: u32,
    lost: u32,
    rtt: Duration,
}

/// Length of a slot.
const SLOT: Duration = Duration::from_secs(5);

/// Number of slots. At the limit the oldest is discarded. Chosen: three minutes, so that there is enough
/// before a change that is found an interval later and confirmed within 20 s.
const SLOTS_MAX: usize = 36;

impl EchoHistory {
    /// Adds an echo that was decided at `at`: with its RTT, or `None` if it was lost.
    pub(super) fn add(&mut self, rtt: Option<Duration>, at: Timestamp) {
        if self.slots.back().is_none_or(|slot| at.since(slot.began) >= SLOT) {
            if self.slots.len() == SLOTS_MAX {
                self.slots.pop_front();
            }
            self.slots.push_back(Slot { began: at, answered: 0, lost: 0, rtt: Duration::ZERO });
        }
        let slot = self.slots.back_mut().expect("one was just added if there was none");
        match rtt {
            Some(rtt) => {
                slot.answered = slot.answered.saturating_add(1);
                slot.rtt = slot.rtt.saturating_add(rtt);
            }
            None => slot.lost = slot.lost.saturating_add(1),
        }
    }

    /// The echoes of the slots that lie within a span as a whole. The latest slot ends now.
    pub(super) fn between(&self, from: Timestamp, to: Timestamp) -> EchoSummary {
        let within = self.slots.iter().filter(|slot| slot.began >= from && slot.began + SLOT <= to);
        let (mut answered, mut lost, mut rtt) = (0_u32, 0_u32, Duration::ZERO);
        for slot in within {
            answered = answered.saturating_add(slot.answered);
            lost = lost.saturating_add(slot.lost);
            rtt = rtt.saturating_add(slot.rtt);
        }
        EchoSummary { decided: answered.saturating_add(lost), lost, rtt: rtt.checked_div(answered) }
    }

    /// The echoes since `from`, including the slot that has not ended.
    pub(super) fn since(&self, from: Timestamp) -> EchoSummary {
        self.between(from, Timestamp::NEVER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos((1_000 + seconds) * 1_000_000_000)
    }

    const RTT: Duration = Duration::from_millis(10);

    #[test]
    fn echoes_are_summed_over_whole_slots() {
        let mut history = EchoHistory::default();
        for second in 0..20 {
            // From the tenth second on twice the RTT, and every second one is lost.
            let rtt = if second < 10 { RTT } else { 2 * RTT };
            history.add((second < 10 || second % 2 == 0).then_some(rtt), at(second));
        }
        let before = EchoSummary { decided: 10, lost: 0, rtt: Some(RTT) };
        let after = EchoSummary { decided: 10, lost: 5, rtt: Some(2 * RTT) };
        assert_eq!((history.between(at(0), at(10)), history.since(at(10))), (before, after));
        assert_eq!(history.between(at(0), at(14)), before, "the third slot has not ended");
        assert_eq!(history.between(at(1), at(10)).decided, 5, "the first slot began earlier");
        assert_eq!(history.since(at(16)), EchoSummary::default());
        assert_eq!((after.loss(), EchoSummary::default().loss()), (Some(0.5), None));
    }

    #[test]
    fn slots_older_than_three_minutes_are_discarded() {
        let mut history = EchoHistory::default();
        for second in 0..400 {
            history.add(Some(RTT), at(second));
        }
        assert_eq!(history.since(at(0)).decided, 180);
    }
}
