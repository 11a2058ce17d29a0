//! Replies in each wire format.

use super::flow::Flow;
use super::outcome::Mismatch;
use super::profile::ReflectorTimes;
use super::reply_extensions::ReplyExtensions;
use super::request::mode;
use super::spec::{EchoSpec, WireFormat};
use crate::wire::icmp::{IcmpEcho, IcmpVersion};
use crate::wire::stamp::{self, Reply};
use crate::wire::{DecodeError, NtpTime};

/// A decoded reply, authenticated if there are keys.
#[derive(Debug, Clone, Copy)]
pub(super) enum ReceivedReply {
    /// From a STAMP reflector, with its extensions.
    Stamp(Reply, ReplyExtensions),
    /// From a host that answers ICMP.
    Icmp(IcmpEcho),
}

/// The request that a reply claims to answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClaimedRequest {
    pub(super) sequence: u32,
    /// T1 as the request carried it.
    pub(super) timestamp: NtpTime,
}

impl ClaimedRequest {
    /// Reads the claim without authentication; `None` if the datagram is not a reply.
    pub(super) fn read_unverified(datagram: &[u8], spec: &EchoSpec) -> Option<Self> {
        match &spec.wire {
            WireFormat::Stamp { keys, .. } => {
                Reply::decode(datagram, mode(keys.as_ref())).ok().map(Self::from)
            }
            WireFormat::Icmp => {
                IcmpEcho::decode_reply(datagram, IcmpVersion::of(spec.to.ip())).ok().map(Self::from)
            }
        }
    }
}

impl From<Reply> for ClaimedRequest {
    fn from(reply: Reply) -> Self {
        Self { sequence: reply.sender_sequence, timestamp: reply.sender_timestamp }
    }
}

impl From<IcmpEcho> for ClaimedRequest {
    fn from(echo: IcmpEcho) -> Self {
        Self { sequence: echo.sequence, timestamp: echo.timestamp }
    }
}

impl ReceivedReply {
    /// Reads a reply.
    ///
    /// # Errors
    /// [`Mismatch`]: why the reply is rejected.
    pub(super) fn read(datagram: &[u8], spec: &EchoSpec) -> Result<Self, Mismatch> {
        match &spec.wire {
            WireFormat::Stamp { keys, quirks } => {
                let mode = mode(keys.as_ref());
                let base = Reply::decode(datagram, mode).map_err(|_| Mismatch::Malformed)?;
                if let Some(keys) = keys {
                    stamp::verify(datagram, keys).map_err(|_| Mismatch::Unauthentic)?;
                }
                let extensions = ReplyExtensions::read(datagram, mode, keys.as_deref())?;
                Ok(Self::Stamp(base, extensions).with_times(quirks.times))
            }
            WireFormat::Icmp => match IcmpEcho::decode_reply(datagram, IcmpVersion::of(spec.to.ip())) {
                Ok(echo) => Ok(Self::Icmp(echo)),
                Err(DecodeError::Unrecognized { .. }) => Err(Mismatch::Unsolicited),
                Err(
                    DecodeError::Truncated { .. }
                    | DecodeError::Unauthentic { .. }
                    | DecodeError::Version { .. },
                ) => Err(Mismatch::Malformed),
            },
        }
    }

    /// Applies the configured timestamp format.
    fn with_times(mut self, times: ReflectorTimes) -> Self {
        if let Self::Stamp(base, extensions) = &mut self {
            times.apply(base);
            if times == ReflectorTimes::Ignored {
                extensions.follow_up = None;
            }
        }
        self
    }

    /// Whether the reply carries the session of `flow`.
    pub(super) fn belongs_to(&self, flow: &Flow) -> bool {
        match self {
            Self::Stamp(base, _) => base.ssid == flow.ssid || base.ssid == 0,
            Self::Icmp(echo) => (echo.ssid, echo.session) == (flow.ssid, flow.session),
        }
    }

    pub(super) fn request(&self) -> ClaimedRequest {
        match self {
            Self::Stamp(base, _) => (*base).into(),
            Self::Icmp(echo) => (*echo).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::stamp::PTP_FORMAT;
    use crate::wire::tlv::FollowUp;

    #[test]
    fn configured_timestamp_format_overrides_the_marked_one() {
        const OTHER_BITS: u16 = 0x2001;
        let read = |marked: u16, times| {
            let base = Reply {
                sequence: 0,
                timestamp: NtpTime(2),
                error: marked | OTHER_BITS,
                ssid: 0,
                received: NtpTime(1),
                sender_sequence: 0,
                sender_timestamp: NtpTime(0),
                sender_error: 0,
                sender_ttl: 0,
            };
            let extensions = ReplyExtensions {
                has_session_extension: false,
                is_damaged: false,
                session: None,
                class: None,
                follow_up: Some(FollowUp::default()),
            };
            match ReceivedReply::Stamp(base, extensions).with_times(times) {
                ReceivedReply::Stamp(base, extensions) => (base, extensions.follow_up.is_some()),
                ReceivedReply::Icmp(_) => panic!("it is a STAMP reply"),
            }
        };
        for marked in [0, PTP_FORMAT] {
            for (times, expected) in [
                (ReflectorTimes::Marked, marked),
                (ReflectorTimes::Ntp, 0),
                (ReflectorTimes::Ptp, PTP_FORMAT),
            ] {
                let (base, has_follow_up) = read(marked, times);
                assert_eq!((base.error, has_follow_up), (expected | OTHER_BITS, true), "{times:?}");
                assert_eq!(base.timestamp, NtpTime(2), "{times:?}");
            }
            let (base, has_follow_up) = read(marked, ReflectorTimes::Ignored);
            assert_eq!((base.timestamp, has_follow_up), (base.received, false));
        }
    }
}
