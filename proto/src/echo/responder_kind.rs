//! Detection of the responder's kind, which decides the extensions it is sent.

use std::time::Duration;

use super::flow::Purpose;
use super::reply_extensions::ReplyExtensions;
use super::request::RequestExtensions;
use crate::time::Timestamp;

/// State of the detection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResponderDetection {
    kind: ResponderKind,
    /// Losses since the last reply.
    unanswered: u32,
    /// When a third-party responder is next tested for support of the session record.
    detect_at: Timestamp,
    /// Detection datagrams that are still to be sent.
    detections_left: u8,
}

/// Kinds of responder, as their replies show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ResponderKind {
    /// No reply yet.
    Unknown,
    /// A pathmeter agent.
    Agent,
    /// A STAMP reflector that supports standard extensions but not the session record.
    Stamp,
    /// A reflector without extensions: base STAMP, or TWAMP-Light.
    Plain,
}

impl ResponderDetection {
    /// No reply yet.
    pub(super) const fn none() -> Self {
        Self { kind: ResponderKind::Unknown, unanswered: 0, detect_at: Timestamp::NEVER, detections_left: 0 }
    }

    /// Chooses the extensions and the purpose of the next datagram.
    pub(super) fn next_request(&mut self, sequence: u64, now: Timestamp) -> (RequestExtensions, Purpose) {
        if self.detect_at <= now {
            self.detect_at = now + DETECTION_INTERVAL;
            self.detections_left = DETECTION_DATAGRAMS;
        }
        let is_plain = self.is_doubtful() && sequence % 2 == 1;
        match self.kind {
            ResponderKind::Unknown | ResponderKind::Agent | ResponderKind::Stamp if is_plain => {
                (RequestExtensions::None, Purpose::Measure)
            }
            ResponderKind::Agent => (RequestExtensions::All, Purpose::Measure),
            ResponderKind::Unknown => (RequestExtensions::All, Purpose::Measure),
            ResponderKind::Stamp | ResponderKind::Plain if self.detections_left > 0 => {
                self.detections_left -= 1;
                (RequestExtensions::All, Purpose::Detect)
            }
            ResponderKind::Stamp => (RequestExtensions::ClassOfService, Purpose::Measure),
            ResponderKind::Plain => (RequestExtensions::None, Purpose::Measure),
        }
    }

    /// Records a loss.
    pub(super) fn lost(&mut self) {
        self.unanswered = self.unanswered.saturating_add(1);
    }

    /// Whether so many datagrams were lost in a row that another kind of responder may have taken the place
    /// of the known one.
    fn is_doubtful(&self) -> bool {
        match self.kind {
            ResponderKind::Unknown => self.unanswered >= LOSSES_MAX_UNKNOWN,
            ResponderKind::Agent | ResponderKind::Stamp | ResponderKind::Plain => {
                self.unanswered >= LOSSES_MAX_KNOWN
            }
        }
    }

    /// Updates the kind from the extensions of a reply; returns whether the responder is an agent.
    pub(super) fn update(&mut self, extensions: &ReplyExtensions, at: Timestamp) -> bool {
        let kind = match extensions {
            ReplyExtensions { session: Some(_), .. } => ResponderKind::Agent,
            // Extensions that were changed in transit say nothing about the responder.
            ReplyExtensions { is_damaged: true, .. } => return self.kind == ResponderKind::Agent,
            // The session record was not sent or did not fit: the kind stays. Only a first reply, or one
            // after a long silence, counts as it is.
            ReplyExtensions { has_session_extension: false, .. }
                if self.kind != ResponderKind::Unknown && !self.is_doubtful() =>
            {
                self.kind
            }
            ReplyExtensions { class: Some(_), .. } => ResponderKind::Stamp,
            ReplyExtensions { .. } => ResponderKind::Plain,
        };
        if kind != self.kind {
            self.kind = kind;
            self.detections_left = 0;
            // A first reply to a datagram without the session record does not show whether the responder
            // supports it.
            self.detect_at = if extensions.has_session_extension { at + DETECTION_INTERVAL } else { at };
        }
        self.unanswered = 0;
        kind == ResponderKind::Agent
    }

    /// Name of the kind for display; `None` before the first reply.
    pub(super) const fn name(&self) -> Option<&'static str> {
        match self.kind {
            ResponderKind::Unknown => None,
            ResponderKind::Agent => Some("pathmeter"),
            ResponderKind::Stamp => Some("stamp"),
            ResponderKind::Plain => Some("twamp-light"),
        }
    }
}

/// Before the first reply: after this many losses, every second datagram is base STAMP, because some
/// reflectors drop requests with unknown extensions.
const LOSSES_MAX_UNKNOWN: u32 = 4;

/// After the first reply: after this many losses, the responder may have been replaced. Chosen: twice the
/// number of datagrams that its record covers, so that no outage is cut short from which evidence could
/// survive.
const LOSSES_MAX_KNOWN: u32 = 256;

/// Interval at which a third-party responder is tested again.
const DETECTION_INTERVAL: Duration = Duration::from_secs(600);

/// Datagrams per test: one of them may be lost. A third-party responder may drop them because of their
/// length, so an unanswered one is withdrawn, not lost.
const DETECTION_DATAGRAMS: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::tlv::{ClassOfService, SessionRecord};

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_nanos(seconds * 1_000_000_000)
    }

    const PLAIN: ReplyExtensions = ReplyExtensions {
        has_session_extension: false,
        is_damaged: false,
        session: None,
        class: None,
        follow_up: None,
    };

    fn extensions(kind: ResponderKind) -> ReplyExtensions {
        let with_session = ReplyExtensions { has_session_extension: true, ..PLAIN };
        match kind {
            ResponderKind::Unknown => PLAIN,
            ResponderKind::Agent => {
                ReplyExtensions { session: Some(SessionRecord::default()), ..with_session }
            }
            ResponderKind::Stamp => {
                ReplyExtensions { class: Some(ClassOfService::default()), ..with_session }
            }
            ResponderKind::Plain => with_session,
        }
    }

    /// The state after a reply at 1 s from a responder of that kind to a request with the session record.
    fn after_reply(kind: ResponderKind) -> ResponderDetection {
        let mut detection = ResponderDetection::none();
        if kind != ResponderKind::Unknown {
            assert_eq!(detection.update(&extensions(kind), at(1)), kind == ResponderKind::Agent);
        }
        detection
    }

    /// What datagrams 0 and 1 carry.
    fn carried(detection: &mut ResponderDetection, now: Timestamp) -> [(RequestExtensions, Purpose); 2] {
        [0, 1].map(|sequence| detection.next_request(sequence, now))
    }

    const ALL: (RequestExtensions, Purpose) = (RequestExtensions::All, Purpose::Measure);
    const CLASS: (RequestExtensions, Purpose) = (RequestExtensions::ClassOfService, Purpose::Measure);
    const NONE: (RequestExtensions, Purpose) = (RequestExtensions::None, Purpose::Measure);
    const DETECT: (RequestExtensions, Purpose) = (RequestExtensions::All, Purpose::Detect);

    #[test]
    fn responder_is_sent_the_extensions_it_supports() {
        for (kind, carries, name) in [
            (ResponderKind::Unknown, ALL, None),
            (ResponderKind::Agent, ALL, Some("pathmeter")),
            (ResponderKind::Stamp, CLASS, Some("stamp")),
            (ResponderKind::Plain, NONE, Some("twamp-light")),
        ] {
            let mut detection = after_reply(kind);
            assert_eq!(carried(&mut detection, at(2)), [carries; 2], "{kind:?}");
            assert_eq!(detection.name(), name);
        }
    }

    #[test]
    fn every_second_datagram_is_plain_after_many_losses() {
        for (kind, limit, carries) in [
            (ResponderKind::Unknown, 4, [ALL, NONE]),
            (ResponderKind::Agent, 256, [ALL, NONE]),
            (ResponderKind::Stamp, 256, [CLASS, NONE]),
            (ResponderKind::Plain, 256, [NONE, NONE]),
        ] {
            let mut detection = after_reply(kind);
            let before = carried(&mut detection, at(2));
            for _ in 1..limit {
                detection.lost();
            }
            assert_eq!(carried(&mut detection, at(2)), before, "{kind:?}");
            detection.lost();
            assert_eq!(carried(&mut detection, at(2)), carries, "{kind:?}");
            detection.update(&extensions(kind), at(3));
            assert!(!detection.is_doubtful(), "{kind:?}");
        }
    }

    #[test]
    fn third_party_responder_is_tested_with_three_datagrams_every_ten_minutes() {
        for (kind, usual) in [(ResponderKind::Stamp, CLASS), (ResponderKind::Plain, NONE)] {
            let mut detection = after_reply(kind);
            for time in [601, 1_201] {
                let before = Timestamp::from_nanos(at(time).as_nanos() - 1);
                assert_eq!(detection.next_request(0, before), usual, "{kind:?}");
                let requests = [(); 4].map(|()| detection.next_request(0, at(time)));
                assert_eq!(requests, [DETECT, DETECT, DETECT, usual], "{kind:?}");
            }
        }
    }

    #[test]
    fn responder_first_seen_without_the_session_extension_is_tested_at_once() {
        let mut detection = ResponderDetection::none();
        detection.update(&PLAIN, at(1));
        assert_eq!(carried(&mut detection, at(1)), [DETECT; 2]);
        detection.update(&extensions(ResponderKind::Agent), at(2));
        assert_eq!((carried(&mut detection, at(2)), detection.name()), ([ALL; 2], Some("pathmeter")));
    }

    #[test]
    fn reply_without_the_session_extension_changes_only_a_doubtful_kind() {
        for kind in [ResponderKind::Agent, ResponderKind::Stamp] {
            let mut detection = after_reply(kind);
            assert_eq!(detection.update(&PLAIN, at(2)), kind == ResponderKind::Agent);
            assert_eq!(detection.kind, kind);
            for _ in 0..LOSSES_MAX_KNOWN {
                detection.lost();
            }
            detection.update(&PLAIN, at(3));
            assert_eq!(detection.kind, ResponderKind::Plain);
        }
    }

    #[test]
    fn damaged_reply_does_not_change_the_kind() {
        for kind in [ResponderKind::Unknown, ResponderKind::Agent, ResponderKind::Stamp, ResponderKind::Plain]
        {
            let mut detection = after_reply(kind);
            let damaged = ReplyExtensions { is_damaged: true, ..extensions(ResponderKind::Plain) };
            assert_eq!(detection.update(&damaged, at(2)), kind == ResponderKind::Agent);
            assert_eq!(detection.kind, kind);
        }
    }
}
