//! Hours of the day in which no run begins.

use std::time::Duration;

use crate::time::WallTime;

/// A part of each day, in UTC. It may go over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuietHours {
    /// Minute of the day at which it begins, below 1,440.
    begin: u16,
    /// Minute of the day at which it ends; equal to the beginning: the whole day.
    end: u16,
}

/// Minutes of a day.
const DAY: u16 = 24 * 60;

impl QuietHours {
    /// Parses text such as `08:00-18:00`. `24:00` ends a day. `None`: it is something else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (begin, end) = text.split_once('-')?;
        let (begin, end) = (minute(begin).filter(|minute| *minute < DAY)?, minute(end)?);
        Some(Self { begin, end: end % DAY })
    }

    /// How long the hours last from now on; `None`: they do not contain this time.
    #[must_use]
    pub fn remaining(&self, now: WallTime) -> Option<Duration> {
        const SECONDS: u64 = 24 * 3_600;
        let second = now.as_nanos() / 1_000_000_000 % SECONDS;
        let [begin, end] = [self.begin, self.end].map(|minute| u64::from(minute) * 60);
        // From the beginning of the hours, over midnight if need be.
        let since = (second + SECONDS - begin) % SECONDS;
        let length = if end == begin { SECONDS } else { (end + SECONDS - begin) % SECONDS };
        (since < length).then(|| Duration::from_secs(length - since))
    }
}

/// The minute of the day of `HH:MM`, at most 24:00.
fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| {
        let is_number = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse::<u16>().ok())?
    };
    let (hours, minutes) = (number(hours)?, number(minutes).filter(|minutes| *minutes < 60)?);
    Some(hours * 60 + minutes).filter(|minute| *minute <= DAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hours: u64, minutes: u64) -> WallTime {
        WallTime::from_nanos((20_000 * 24 * 60 + hours * 60 + minutes) * 60_000_000_000)
    }

    fn minutes_left(text: &str, hours: u64, minutes: u64) -> Option<u64> {
        Some(QuietHours::parse(text).unwrap().remaining(at(hours, minutes))?.as_secs() / 60)
    }

    #[test]
    fn hours_begin_and_end_at_their_minutes() {
        assert_eq!(minutes_left("08:00-18:30", 7, 59), None);
        assert_eq!(minutes_left("08:00-18:30", 8, 0), Some(630));
        assert_eq!(minutes_left("08:00-18:30", 18, 29), Some(1));
        assert_eq!(minutes_left("08:00-18:30", 18, 30), None);
    }

    #[test]
    fn hours_may_go_over_midnight_or_last_all_day() {
        assert_eq!(minutes_left("22:00-06:00", 21, 59), None);
        assert_eq!(minutes_left("22:00-06:00", 23, 0), Some(420));
        assert_eq!(minutes_left("22:00-06:00", 5, 59), Some(1));
        assert_eq!(minutes_left("22:00-06:00", 6, 0), None);
        assert_eq!(minutes_left("18:00-24:00", 23, 59), Some(1));
        assert_eq!(minutes_left("18:00-24:00", 0, 0), None);
        for hour in 0..24 {
            assert!(
                minutes_left("00:00-24:00", hour, 7).is_some()
                    && minutes_left("08:00-08:00", hour, 7).is_some()
            );
        }
    }

    #[test]
    fn other_text_is_no_hours() {
        for text in
            ["", "8:00-18:00", "08:00", "08:00-", "08:60-09:00", "24:00-01:00", "08:00-24:01", "08-18"]
        {
            assert_eq!(QuietHours::parse(text), None, "{text}");
        }
    }
}
