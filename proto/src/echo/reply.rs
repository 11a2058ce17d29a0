//! Replies, in the format of their path.

use super::flow::Flow;
use super::outcome::Mismatch;
use super::profile::ReflectorTimes;
use super::reply_extensions::ReplyExtensions;
use super::request::mode;
use super::spec::{EchoSpec, WireFormat};
use crate::wire::icmp::{IcmpEcho, IcmpVersion};
use crate::wire::stamp::{self, Reply};
use crate::wire::{DecodeError, NtpTime};

/// A reply that could be read, and is proven where there is a key.
#[derive(Debug, Clone, Copy)]
pub(super) enum ReceivedReply {
    /// From a reflector, with what it tells.
    Stamp(Reply, ReplyExtensions),
    /// From a host, which only sends back what it got.
    Icmp(IcmpEcho),
}

/// Which datagram a reply says it answers.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClaimedRequest {
    pub(super) sequence: u32,
    /// T1 as it was written.
    pub(super) timestamp: NtpTime,
}

impl ClaimedRequest {
    /// What a reply says that it answers, proven or not; `None` where it says nothing.
    pub(super) fn claimed(datagram: &[u8], spec: &EchoSpec) -> Option<Self> {
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
    /// [`Mismatch`]: why it is not believed.
    pub(super) fn read(datagram: &[u8], spec: &EchoSpec) -> Result<Self, Mismatch> {
        match &spec.wire {
            WireFormat::Stamp { keys, quirks } => {
                let mode = mode(keys.as_ref());
                let base = Reply::decode(datagram, mode).map_err(|_| Mismatch::Malformed)?;
                if let Some(keys) = keys {
                    stamp::verify(datagram, keys).map_err(|_| Mismatch::Unauthentic)?;
                }
                let told = ReplyExtensions::read(datagram, mode, keys.as_deref())?;
                Ok(Self::Stamp(base, told).by(quirks.times))
            }
            WireFormat::Icmp => match IcmpEcho::decode_reply(datagram, IcmpVersion::of(spec.to.ip())) {
                Ok(echo) => Ok(Self::Icmp(echo)),
                Err(DecodeError::Foreign { .. }) => Err(Mismatch::Unsolicited),
                Err(
                    DecodeError::Truncated { .. }
                    | DecodeError::Unauthentic { .. }
                    | DecodeError::Version { .. },
                ) => Err(Mismatch::Malformed),
            },
        }
    }

    /// With times as they are meant.
    fn by(mut self, times: ReflectorTimes) -> Self {
        if let Self::Stamp(base, told) = &mut self {
            match times {
                ReflectorTimes::Marked => {}
                ReflectorTimes::Ntp => base.error &= !stamp::PTP_FORMAT,
                ReflectorTimes::Ptp => base.error |= stamp::PTP_FORMAT,
                ReflectorTimes::Ignored => {
                    base.timestamp = base.received;
                    told.follow_up = None;
                }
            }
        }
        self
    }

    /// Whether it carries the flow's session.
    pub(super) fn is_of(&self, flow: &Flow) -> bool {
        match self {
            Self::Stamp(base, _) => base.ssid == flow.ssid || base.ssid == 0,
            Self::Icmp(echo) => (echo.ssid, echo.session) == (flow.ssid, flow.session),
        }
    }

    pub(super) fn answered(&self) -> ClaimedRequest {
        match self {
            Self::Stamp(base, _) => (*base).into(),
            Self::Icmp(echo) => (*echo).into(),
        }
    }
}
