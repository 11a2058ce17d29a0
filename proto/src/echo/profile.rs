//! What a foreign reflector is known to do otherwise than it should.

/// How a reflector is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quirks {
    /// What is sent to it.
    pub profile: Profile,
    /// How its times are read.
    pub times: ReflectorTimes,
}

/// What is sent to a reflector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// Everything that it is found to understand; asked again now and then.
    #[default]
    Detect,
    /// STAMP with standard extensions (RFC 8972), never with ours: for reflectors that drop types they do not know.
    Stamp,
    /// STAMP without any extension (RFC 8762): for reflectors that drop what is longer than the base packet.
    Plain,
    /// TWAMP-Light (RFC 5357 appendix I): no extension, and no session identifier where padding is expected.
    TwampLight,
}

/// How a reflector's times are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReflectorTimes {
    /// As the Z bit of its error estimate says (RFC 8762 section 4.2.1).
    #[default]
    Marked,
    /// As NTP timestamps, whatever the Z bit says: some reflectors only copy it.
    Ntp,
    /// As truncated PTP timestamps, whatever the Z bit says.
    Ptp,
    /// Not at all: its turnaround stays in the round trip.
    Ignored,
}
