//! Extensions of a reply.

use super::outcome::Mismatch;
use crate::key::Keys;
use crate::wire::stamp::Mode;
use crate::wire::tlv::{self, ClassOfService, FollowUp, SessionRecord};

/// Extensions of a reply.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReplyExtensions {
    /// Whether the session record came back at all, recognised by the responder or not.
    pub(crate) has_session_extension: bool,
    /// Whether the responder flagged that the extensions were changed in transit.
    pub(crate) is_damaged: bool,
    pub(crate) session: Option<SessionRecord>,
    pub(crate) class: Option<ClassOfService>,
    pub(crate) follow_up: Option<FollowUp>,
}

impl ReplyExtensions {
    /// Reads the extensions of `datagram`. With `keys`, they must be authenticated.
    pub(crate) fn read(datagram: &[u8], mode: Mode, keys: Option<&Keys>) -> Result<Self, Mismatch> {
        let base = mode.base_bytes();
        let mut extensions = Self {
            has_session_extension: false,
            is_damaged: false,
            session: None,
            class: None,
            follow_up: None,
        };
        let mut is_hmac_flagged = false;
        for found in tlv::walk(datagram, base) {
            extensions.has_session_extension |= found.kind == tlv::SESSION;
            extensions.is_damaged |= found.flags & tlv::INTEGRITY != 0;
            // The HMAC covers everything but its own flags.
            is_hmac_flagged |= found.kind == tlv::HMAC && found.flags != 0;
            if !found.is_understood() {
                continue;
            }
            let value = found.value(datagram);
            match found.kind {
                tlv::SESSION => {
                    extensions.session = SessionRecord::read(value).ok().filter(|session| session.is_reply);
                }
                tlv::CLASS_OF_SERVICE => extensions.class = ClassOfService::read(value),
                tlv::FOLLOW_UP => extensions.follow_up = FollowUp::read(value),
                _ => {}
            }
        }
        if keys.is_some_and(|keys| is_hmac_flagged || !tlv::are_authentic(datagram, base, keys)) {
            return Err(Mismatch::Unauthentic);
        }
        Ok(extensions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The extensions of a reply with these types, of which those in `damaged` have the flag I.
    fn read(kinds: &[u8], damaged: &[u8]) -> ReplyExtensions {
        let mut reply = vec![0; Mode::Open.base_bytes()];
        for kind in kinds {
            let found = tlv::append(&mut reply, *kind, 4);
            reply[found.at] = if damaged.contains(kind) { tlv::INTEGRITY } else { 0 };
        }
        ReplyExtensions::read(&reply, Mode::Open, None).unwrap()
    }

    #[test]
    fn session_extension_is_found_at_any_position() {
        for kinds in [&[tlv::SESSION, tlv::PADDING], &[tlv::PADDING, tlv::SESSION]] {
            assert!(read(kinds, &[]).has_session_extension, "{kinds:?}");
        }
        assert!(!read(&[tlv::CLASS_OF_SERVICE, tlv::PADDING], &[]).has_session_extension);
    }

    #[test]
    fn one_damaged_extension_is_enough() {
        let kinds = [tlv::SESSION, tlv::PADDING];
        for damaged in kinds {
            assert!(read(&kinds, &[damaged]).is_damaged, "{damaged}");
        }
        assert!(!read(&kinds, &[]).is_damaged);
    }
}
