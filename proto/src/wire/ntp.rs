//! Timestamp formats on the wire.

use crate::time::WallTime;

/// A 64-bit NTP timestamp (RFC 5905 section 6): seconds since 1900 modulo 2³², and a fraction of 2⁻³² s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NtpTime(pub u64);

/// Seconds from 1900 to 1970 (RFC 868).
const EPOCH_SECONDS: u64 = 2_208_988_800;
const SECOND: u64 = 1_000_000_000;

impl From<WallTime> for NtpTime {
    /// Rounds up to the next 2⁻³² s (0.23 ns), so that decoding gives the exact nanosecond.
    fn from(wall: WallTime) -> Self {
        let seconds = wall.as_nanos() / SECOND + EPOCH_SECONDS;
        let fraction = ((wall.as_nanos() % SECOND) << 32).div_ceil(SECOND);
        Self((seconds << 32) | fraction)
    }
}

/// A timestamp of a peer's clock, in nanoseconds modulo 2³² s. The only operation is the difference between
/// two timestamps of one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerTimestamp(u64);

const ERA: i128 = (1 << 32) * SECOND as i128;

impl PeerTimestamp {
    /// A peer timestamp in NTP format.
    #[must_use]
    pub fn from_ntp(bits: u64) -> Self {
        Self((bits >> 32) * SECOND + (((bits & 0xffff_ffff) * SECOND) >> 32))
    }

    /// A peer timestamp in truncated PTPv2 format: 32 bits of seconds and 32 bits of nanoseconds (RFC 8877
    /// section 4.3).
    #[must_use]
    pub fn from_ptp(bits: u64) -> Self {
        Self((bits >> 32) * SECOND + (bits & 0xffff_ffff))
    }

    /// Nanoseconds from `earlier` to `self`, negative if `earlier` is later; correct for differences below 68
    /// years.
    #[must_use]
    pub fn signed_since(self, earlier: Self) -> i64 {
        let difference = (i128::from(self.0) - i128::from(earlier.0)).rem_euclid(ERA);
        let signed = if difference >= ERA / 2 { difference - ERA } else { difference };
        i64::try_from(signed).expect("half an era is 2.1·10¹⁸ ns")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ntp_format_keeps_every_nanosecond() {
        for nanos in (0..2_000_000_000_u64).step_by(999_983).chain([SECOND - 1, SECOND]) {
            let base = WallTime::from_nanos(1_800_000_000 * SECOND);
            let later = WallTime::from_nanos(base.as_nanos() + nanos);
            let (from, to) = (NtpTime::from(base), NtpTime::from(later));
            let span = PeerTimestamp::from_ntp(to.0).signed_since(PeerTimestamp::from_ntp(from.0));
            assert_eq!(span, i64::try_from(nanos).unwrap());
        }
    }

    #[test]
    fn differences_are_correct_across_the_ntp_era_change() {
        let before = PeerTimestamp::from_ntp(u64::MAX - ((1 << 31) - 1));
        let after = PeerTimestamp::from_ntp(1 << 31);
        assert_eq!(after.signed_since(before), i64::try_from(SECOND).unwrap());
        assert_eq!(before.signed_since(after), -i64::try_from(SECOND).unwrap());
    }

    #[test]
    fn ntp_and_ptp_formats_agree() {
        let ntp = PeerTimestamp::from_ntp((7 << 32) | (1 << 31));
        let ptp = PeerTimestamp::from_ptp((7 << 32) | 500_000_000);
        assert_eq!(ntp, ptp);
    }

    #[test]
    fn ntp_fraction_is_two_to_the_minus_32_and_epoch_is_1900() {
        assert_eq!(NtpTime::from(WallTime::from_nanos(0)), NtpTime(2_208_988_800 << 32));
        let half = WallTime::from_nanos(7 * SECOND + SECOND / 2);
        assert_eq!(NtpTime::from(half), NtpTime((2_208_988_807 << 32) + (1 << 31)));
        assert_eq!(NtpTime::from(WallTime::from_nanos(1)).0, (2_208_988_800 << 32) + 5, "rounded up");
        let span = |bits| PeerTimestamp::from_ntp(bits).signed_since(PeerTimestamp::from_ntp(0));
        assert_eq!([1 << 32, 1 << 31, 4, 5].map(span), [1_000_000_000, 500_000_000, 0, 1]);
        let span = |bits| PeerTimestamp::from_ptp(bits).signed_since(PeerTimestamp::from_ptp(0));
        assert_eq!([1 << 32, 5, (1 << 32) + 5].map(span), [1_000_000_000, 5, 1_000_000_005]);
    }

    #[test]
    fn differences_are_signed_up_to_half_an_era() {
        let at = |seconds: u64| PeerTimestamp::from_ntp(seconds << 32);
        let half = 1 << 31;
        assert_eq!(at(half - 1).signed_since(at(0)), (half as i64 - 1) * SECOND as i64);
        assert_eq!(at(half).signed_since(at(0)), -(half as i64) * SECOND as i64);
        assert_eq!(at(0).signed_since(at(5)), -5 * SECOND as i64);
    }
}
