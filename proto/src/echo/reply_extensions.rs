//! What a reply's extensions say.

use super::outcome::Mismatch;
use crate::key::Keys;
use crate::wire::stamp::Mode;
use crate::wire::tlv::{self, ClassOfService, FollowUp, SessionRecord};

/// What a reply's extensions say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReplyExtensions {
    /// Whether our extension came back at all, understood or not.
    pub(crate) asked_session: bool,
    /// Whether the responder found that the extensions had been changed on the way.
    pub(crate) is_damaged: bool,
    pub(crate) session: Option<SessionRecord>,
    pub(crate) class: Option<ClassOfService>,
    pub(crate) follow_up: Option<FollowUp>,
}

impl ReplyExtensions {
    /// Reads them; with `keys`, only if they are proven.
    pub(crate) fn read(datagram: &[u8], mode: Mode, keys: Option<&Keys>) -> Result<Self, Mismatch> {
        let base = mode.base_bytes();
        let mut told =
            Self { asked_session: false, is_damaged: false, session: None, class: None, follow_up: None };
        let mut is_hmac_flagged = false;
        for found in tlv::walk(datagram, base) {
            told.asked_session |= found.kind == tlv::SESSION;
            told.is_damaged |= found.flags & tlv::INTEGRITY != 0;
            // Its own flags are all that no HMAC covers.
            is_hmac_flagged |= found.kind == tlv::HMAC && found.flags != 0;
            if !found.is_understood() {
                continue;
            }
            let value = found.value(datagram);
            match found.kind {
                tlv::SESSION => {
                    told.session = SessionRecord::read(value).ok().filter(|session| session.is_reply);
                }
                tlv::CLASS_OF_SERVICE => told.class = ClassOfService::read(value),
                tlv::FOLLOW_UP => told.follow_up = FollowUp::read(value),
                _ => {}
            }
        }
        if keys.is_some_and(|keys| is_hmac_flagged || !tlv::are_proven(datagram, base, keys)) {
            return Err(Mismatch::Unauthentic);
        }
        Ok(told)
    }
}
