//! Known deviations of third-party reflectors.

use crate::wire::stamp::{self, Reply};

/// How to treat a reflector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quirks {
    /// Extensions to send.
    pub profile: Profile,
    /// Format of its timestamps.
    pub times: ReflectorTimes,
}

/// Which extensions a reflector is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// Whatever it is found to support; support is tested again every ten minutes.
    #[default]
    Detect,
    /// STAMP with standard extensions (RFC 8972) but without pathmeter's: for reflectors that drop packets
    /// with unknown extension types.
    Stamp,
    /// STAMP without extensions (RFC 8762): for reflectors that drop packets longer than the base packet.
    Plain,
    /// TWAMP-Light (RFC 5357 appendix I): no extensions, and session identifier 0, where TWAMP-Light expects
    /// padding.
    TwampLight,
}

/// How to read a reflector's timestamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReflectorTimes {
    /// In the format that the Z bit of its error estimate names (RFC 8762 section 4.2.1).
    #[default]
    Marked,
    /// As NTP timestamps, whatever the Z bit says: some reflectors only copy the bit.
    Ntp,
    /// As truncated PTP timestamps, whatever the Z bit says.
    Ptp,
    /// Not used: the round trip includes its turnaround.
    Ignored,
}

impl ReflectorTimes {
    /// Makes a reply name the format in which its timestamps are to be read, or have no turnaround.
    pub(crate) fn apply(self, reply: &mut Reply) {
        match self {
            Self::Marked => {}
            Self::Ntp => reply.error &= !stamp::PTP_FORMAT,
            Self::Ptp => reply.error |= stamp::PTP_FORMAT,
            Self::Ignored => reply.timestamp = reply.received,
        }
    }
}

/// The responder's turnaround, if it is plausible. `None` if it is negative, or longer than `elapsed` by more
/// than the skew of two clocks explains (500 ppm each, the bound of clock discipline in Linux and RFC 5905).
pub(crate) fn credible_turnaround(stated: i64, elapsed: u64) -> Option<u64> {
    let turnaround = u64::try_from(stated).ok()?;
    let tolerance = elapsed / 1_000 + 1_000;
    if turnaround > elapsed.saturating_add(tolerance) {
        return None;
    }
    Some(turnaround)
}
