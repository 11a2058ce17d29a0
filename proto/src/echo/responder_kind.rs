//! What the responder is found to be, and what it is therefore sent.

use std::time::Duration;

use super::flow::Purpose;
use super::reply_extensions::ReplyExtensions;
use super::request::RequestExtensions;
use crate::time::Timestamp;

/// What the responder is found to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResponderDetection {
    kind: ResponderKind,
    /// Datagrams that were given up since the last reply.
    unanswered: u32,
    /// When a foreign responder is next asked whether it became one of ours.
    ask_again: Timestamp,
    /// Datagrams that still ask.
    questions: u8,
}

/// The kinds of responder, by what their replies show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResponderKind {
    /// Nothing came back yet.
    Unknown,
    /// One of ours.
    Agent,
    /// A STAMP reflector that knows extensions, not ours.
    Stamp,
    /// A reflector without extensions: plain STAMP, or TWAMP-Light.
    Plain,
}

impl ResponderDetection {
    /// Nothing came back yet.
    pub(super) const fn none() -> Self {
        Self { kind: ResponderKind::Unknown, unanswered: 0, ask_again: Timestamp::NEVER, questions: 0 }
    }

    /// What the next datagram carries, and why it is sent.
    pub(super) fn address(&mut self, sequence: u64, now: Timestamp) -> (RequestExtensions, Purpose) {
        if self.ask_again <= now {
            self.ask_again = now + ASK_AGAIN_AFTER;
            self.questions = QUESTIONS;
        }
        let is_doubtful = self.is_doubted() && sequence % 2 == 1;
        match self.kind {
            ResponderKind::Unknown | ResponderKind::Agent | ResponderKind::Stamp if is_doubtful => {
                (RequestExtensions::None, Purpose::Measure)
            }
            ResponderKind::Agent => (RequestExtensions::All, Purpose::Measure),
            ResponderKind::Unknown => (RequestExtensions::All, Purpose::Measure),
            ResponderKind::Stamp | ResponderKind::Plain if self.questions > 0 => {
                self.questions -= 1;
                (RequestExtensions::All, Purpose::Detect)
            }
            ResponderKind::Stamp => (RequestExtensions::ClassOfService, Purpose::Measure),
            ResponderKind::Plain => (RequestExtensions::None, Purpose::Measure),
        }
    }

    /// A datagram was lost.
    pub(super) fn gave_up(&mut self) {
        self.unanswered = self.unanswered.saturating_add(1);
    }

    /// Whether it has been silent for so long that it may be another one than was thought.
    fn is_doubted(&self) -> bool {
        match self.kind {
            ResponderKind::Unknown => self.unanswered >= UNANSWERED_MAX,
            ResponderKind::Agent | ResponderKind::Stamp | ResponderKind::Plain => {
                self.unanswered >= REPLACED_AFTER
            }
        }
    }

    /// Takes note of what the responder is; true if it is one of ours.
    pub(super) fn recognise(&mut self, told: &ReplyExtensions, at: Timestamp) -> bool {
        let kind = match told {
            ReplyExtensions { session: Some(_), .. } => ResponderKind::Agent,
            // What was changed on the way says nothing about who answered it.
            ReplyExtensions { is_damaged: true, .. } => return self.kind == ResponderKind::Agent,
            // Our extension was not sent, or did not fit: the kind stays, a first reply says as much as it shows.
            ReplyExtensions { asked_session: false, .. }
                if self.kind != ResponderKind::Unknown && !self.is_doubted() =>
            {
                self.kind
            }
            ReplyExtensions { class: Some(_), .. } => ResponderKind::Stamp,
            ReplyExtensions { .. } => ResponderKind::Plain,
        };
        if kind != self.kind {
            self.kind = kind;
            self.questions = 0;
            // A first reply to a datagram without our extension leaves open whether that would be understood.
            self.ask_again = if told.asked_session { at + ASK_AGAIN_AFTER } else { at };
        }
        self.unanswered = 0;
        kind == ResponderKind::Agent
    }

    /// A word for people; `None` while nothing came back.
    pub(super) const fn word(&self) -> Option<&'static str> {
        match self.kind {
            ResponderKind::Unknown => None,
            ResponderKind::Agent => Some("pathmeter"),
            ResponderKind::Stamp => Some("stamp"),
            ResponderKind::Plain => Some("twamp-light"),
        }
    }
}

/// While nothing is known, every second datagram after this many that were given up is plain STAMP: some reflectors drop
/// what they do not expect.
const UNANSWERED_MAX: u32 = 4;

/// A responder that was known is thought to be another one after this many. Chosen: twice the reach of its record, so that
/// no outage from which evidence could survive is cut short.
const REPLACED_AFTER: u32 = 256;

/// A foreign responder is asked this often whether it became one of ours.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(600);

/// Datagrams that ask at a time: one of them may be lost. A foreign responder may drop them for their length, so one that
/// goes unanswered is withdrawn, not lost.
const QUESTIONS: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::tlv::{ClassOfService, SessionRecord};

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(seconds * 1_000_000_000)
    }

    const PLAIN: ReplyExtensions = ReplyExtensions {
        asked_session: false,
        is_damaged: false,
        session: None,
        class: None,
        follow_up: None,
    };

    fn told(kind: ResponderKind) -> ReplyExtensions {
        let asked = ReplyExtensions { asked_session: true, ..PLAIN };
        match kind {
            ResponderKind::Unknown => PLAIN,
            ResponderKind::Agent => ReplyExtensions { session: Some(SessionRecord::default()), ..asked },
            ResponderKind::Stamp => ReplyExtensions { class: Some(ClassOfService::default()), ..asked },
            ResponderKind::Plain => asked,
        }
    }

    /// What is known after a reply of a responder of that kind to a datagram with our extension, at 1 s.
    fn of(kind: ResponderKind) -> ResponderDetection {
        let mut knowledge = ResponderDetection::none();
        if kind != ResponderKind::Unknown {
            assert_eq!(knowledge.recognise(&told(kind), at(1)), kind == ResponderKind::Agent);
        }
        knowledge
    }

    /// What the datagrams with these numbers carry.
    fn carried(knowledge: &mut ResponderDetection, now: Timestamp) -> [(RequestExtensions, Purpose); 2] {
        [0, 1].map(|sequence| knowledge.address(sequence, now))
    }

    const ALL: (RequestExtensions, Purpose) = (RequestExtensions::All, Purpose::Measure);
    const CLASS: (RequestExtensions, Purpose) = (RequestExtensions::ClassOfService, Purpose::Measure);
    const NONE: (RequestExtensions, Purpose) = (RequestExtensions::None, Purpose::Measure);
    const ASK: (RequestExtensions, Purpose) = (RequestExtensions::All, Purpose::Detect);

    #[test]
    fn responder_is_sent_what_it_understands() {
        for (kind, carries, word) in [
            (ResponderKind::Unknown, ALL, None),
            (ResponderKind::Agent, ALL, Some("pathmeter")),
            (ResponderKind::Stamp, CLASS, Some("stamp")),
            (ResponderKind::Plain, NONE, Some("twamp-light")),
        ] {
            let mut knowledge = of(kind);
            assert_eq!(carried(&mut knowledge, at(2)), [carries; 2], "{kind:?}");
            assert_eq!(knowledge.word(), word);
        }
    }

    #[test]
    fn after_a_silence_every_second_datagram_is_plain() {
        for (kind, limit, carries) in [
            (ResponderKind::Unknown, 4, [ALL, NONE]),
            (ResponderKind::Agent, 256, [ALL, NONE]),
            (ResponderKind::Stamp, 256, [CLASS, NONE]),
            (ResponderKind::Plain, 256, [NONE, NONE]),
        ] {
            let mut knowledge = of(kind);
            let before = carried(&mut knowledge, at(2));
            for _ in 1..limit {
                knowledge.gave_up();
            }
            assert_eq!(carried(&mut knowledge, at(2)), before, "{kind:?}");
            knowledge.gave_up();
            assert_eq!(carried(&mut knowledge, at(2)), carries, "{kind:?}");
            knowledge.recognise(&told(kind), at(3));
            assert!(!knowledge.is_doubted(), "{kind:?}");
        }
    }

    #[test]
    fn foreign_responder_is_asked_with_three_datagrams_every_ten_minutes() {
        for (kind, usual) in [(ResponderKind::Stamp, CLASS), (ResponderKind::Plain, NONE)] {
            let mut knowledge = of(kind);
            for time in [601, 1_201] {
                let before = Timestamp::from_nanos(at(time).as_nanos() - 1);
                assert_eq!(knowledge.address(0, before), usual, "{kind:?}");
                let asked = [(); 4].map(|()| knowledge.address(0, at(time)));
                assert_eq!(asked, [ASK, ASK, ASK, usual], "{kind:?}");
            }
        }
    }

    #[test]
    fn responder_that_was_first_heard_without_our_extension_is_asked_at_once() {
        let mut knowledge = ResponderDetection::none();
        knowledge.recognise(&PLAIN, at(1));
        assert_eq!(carried(&mut knowledge, at(1)), [ASK; 2]);
        knowledge.recognise(&told(ResponderKind::Agent), at(2));
        assert_eq!((carried(&mut knowledge, at(2)), knowledge.word()), ([ALL; 2], Some("pathmeter")));
    }

    #[test]
    fn reply_without_our_extension_changes_the_kind_only_of_one_that_is_doubted() {
        for kind in [ResponderKind::Agent, ResponderKind::Stamp] {
            let mut knowledge = of(kind);
            assert_eq!(knowledge.recognise(&PLAIN, at(2)), kind == ResponderKind::Agent);
            assert_eq!(knowledge.kind, kind);
            for _ in 0..REPLACED_AFTER {
                knowledge.gave_up();
            }
            knowledge.recognise(&PLAIN, at(3));
            assert_eq!(knowledge.kind, ResponderKind::Plain);
        }
    }

    #[test]
    fn reply_that_was_damaged_on_the_way_says_nothing_about_the_responder() {
        for kind in [ResponderKind::Unknown, ResponderKind::Agent, ResponderKind::Stamp, ResponderKind::Plain]
        {
            let mut knowledge = of(kind);
            let damaged = ReplyExtensions { is_damaged: true, ..told(ResponderKind::Plain) };
            assert_eq!(knowledge.recognise(&damaged, at(2)), kind == ResponderKind::Agent);
            assert_eq!(knowledge.kind, kind);
        }
    }
}
