//! What was heard from the responder about one flow, and what that proves.

use std::time::Duration;

use super::flow::{Carries, Flow, Rules};
use crate::machine::HostDrops;
use crate::time::Timestamp;
use crate::wire::PeerTimestamp;
use crate::wire::tlv::{FollowUp, Session};

/// What was heard from the responder about one flow.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct View {
    /// Ours: the first sequence number of its record, and when that was sent, or later.
    record: Option<(u32, Timestamp)>,
    /// Foreign: the last reply in order, as sequence number and the reflector's own.
    last: Option<(u64, u32)>,
    /// Foreign: whether its sequence numbers are its own.
    is_stateful: bool,
    /// Foreign: until when its count is doubted, because a request was seen to arrive twice or behind a later one.
    doubted: Option<Timestamp>,
    /// T3 of recent replies, by the reflector's sequence number.
    left: [Option<(u32, PeerTimestamp)>; LEFT],
    /// The last follow-up that was used.
    followed: Option<u32>,
}

/// Replies whose T3 is remembered for a follow-up. Chosen: a follow-up normally comes with the next reply.
const LEFT: usize = 2;

/// The datagram whose reply is looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) sequence: u64,
    pub(super) sent: Timestamp,
    /// When its reply came.
    pub(super) heard: Timestamp,
}

/// A path that was seen to duplicate or to reorder requests is expected to do so again for this long. Chosen: 10 minutes.
const DOUBT_LASTS: Duration = Duration::from_secs(600);

/// What the responder's host dropped, as its reports on any flow of the path tell: one count, for all its sockets and all
/// who ask it.
#[derive(Debug, Default)]
pub(super) struct ResponderDrops {
    pub(super) ledger: HostDrops,
    /// When the last report was asked for, and the count it told.
    last: Option<(Timestamp, u32)>,
}

impl ResponderDrops {
    /// Takes the count from a reply that came at `heard` to a datagram that was sent at `asked`.
    pub(super) fn learn(&mut self, asked: Timestamp, heard: Timestamp, count: u32, rules: &Rules) {
        if self.last.is_some_and(|(last, _)| asked <= last) {
            return;
        }
        if let Some((last, known)) = self.last.replace((asked, count)) {
            let dropped = count.wrapping_sub(known);
            // A count that seems to have fallen is that of a responder that began again.
            if dropped < 1 << 31 {
                self.ledger.forget(last - rules.lost_after);
                self.ledger.add(0, last, heard, dropped);
            }
        }
    }
}

impl View {
    /// One of ours tells what it has received.
    pub(super) fn learn_from_ours(
        &mut self,
        flow: &mut Flow,
        asked: &Asked,
        session: &Session,
        rules: &Rules,
    ) {
        let Asked { sent: asked, .. } = *asked;
        if session.session != flow.session {
            return;
        }
        let (Some(highest), Some(first)) =
            (flow.extend(session.highest), flow.extend(session.count_or_first))
        else {
            return;
        };
        let began = match self.record {
            Some((known, began)) if known == session.count_or_first => began,
            // Long gone or never sent: this report was asked for no earlier.
            _ => flow.sent_at(first).unwrap_or(asked),
        };
        self.record = Some((session.count_or_first, began));
        let bitmap = session.bitmap;
        flow.learn(
            highest.saturating_sub(127)..=highest,
            Carries::Session,
            asked,
            rules,
            |sequence, sent| {
                let is_set = bitmap >> (highest - sequence) & 1 == 1;
                // A responder that forgot us began its record anew, perhaps with a datagram that others had overtaken: what
                // was sent soon after that one may have arrived before.
                (is_set || sequence > first && sent >= began + rules.horizon).then_some(is_set)
            },
        );
    }

    /// A stateful reflector numbers its replies: between two of them it received as many requests as its numbers
    /// advanced. All or none of those between gives each a direction; some of them does not. That it was all of them
    /// holds only while no request arrives twice, or behind a later one, for its number is then counted in the wrong
    /// place: where that was seen, it is not believed. The first time, if its reply is lost as well, is not seen.
    pub(super) fn learn_from_foreign(&mut self, flow: &mut Flow, asked: &Asked, number: u32, rules: &Rules) {
        let Asked { sequence, sent: asked, heard } = *asked;
        #[expect(clippy::cast_possible_truncation, reason = "the wire carried the low half")]
        let is_copy = number == sequence as u32;
        self.is_stateful |= !is_copy;
        if let Some((last, last_number)) = self.last
            && sequence < last
        {
            if number.wrapping_sub(last_number) < 1 << 31 {
                self.doubted = Some(heard + DOUBT_LASTS);
            }
            return;
        }
        let is_doubted = self.doubted.is_some_and(|until| heard < until);
        if let Some((last, last_number)) = self.last
            && self.is_stateful
        {
            let (asked_since, answered_since) = (sequence - last, number.wrapping_sub(last_number));
            let arrived = match u64::from(answered_since) {
                1 => Some(false),
                answered if answered == asked_since && !is_doubted => Some(true),
                _ => None,
            };
            flow.learn(last + 1..=sequence.saturating_sub(1), Carries::Less, asked, rules, |_, _| arrived);
        }
        self.last = Some((sequence, number));
    }

    /// The reply numbered `number` came again. A copy of a reply has its number; the reply to a copy of a request has its
    /// own.
    pub(super) fn heard_again(&mut self, number: u32, at: Timestamp) {
        if !self.left.iter().flatten().any(|(known, _)| *known == number) {
            self.doubted = Some(at + DOUBT_LASTS);
        }
    }

    /// Takes note of when the reply numbered `number` says it left, and returns how much later an earlier one really did.
    pub(super) fn follow_up(
        &mut self,
        number: u32,
        left: PeerTimestamp,
        follow_up: Option<FollowUp>,
    ) -> Option<Duration> {
        self.left.rotate_right(1);
        self.left[0] = Some((number, left));
        let FollowUp { sequence, timestamp } =
            follow_up.filter(|told| self.followed != Some(told.sequence))?;
        let (_, written) = self.left.iter().flatten().find(|(number, _)| *number == sequence)?;
        self.followed = Some(sequence);
        let lag = PeerTimestamp::from_ntp(timestamp.0).signed_since(*written);
        u64::try_from(lag).ok().map(Duration::from_nanos)
    }
}
