//! The keys of echo probes.

pub mod transport;

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use self::transport::{PROTOCOLS, Protocol, Transport, transport};
use super::defaults::INTERVAL;
use super::hosts::DeclaredHost;
use super::kind::{KindConfig, KindReader};
use super::reader::MappingReader;
use super::units::display;
use super::values::duration;
use super::{Kind, Listen, Target};

/// Loss, RTT and jitter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echo {
    /// What carries it.
    pub transport: Transport,
    /// A reply with a longer round trip is late.
    pub late_after: Duration,
    /// What has no reply by then is lost.
    pub lost_after: Duration,
}

const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Over connections a millisecond is the runtime's grain; what is asked more often than this would go unsent.
const INTERVAL_MIN_STREAM: Duration = Duration::from_millis(10);

const INTERVAL_MAX: Duration = Duration::from_secs(3600);

const LATE_AFTER: Duration = Duration::from_secs(1);
const LOST_AFTER: Duration = Duration::from_secs(3);
/// Over a connection: by then TCP has sent a lost segment again six times.
const LOST_AFTER_STREAM: Duration = Duration::from_secs(15);
const LOST_AFTER_MAX: Duration = Duration::from_secs(60);
const DEADLINE_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(1)..=LOST_AFTER_MAX;

/// Datagrams of a path that wait for their verdict. The limits of `interval` and `lost_after` keep it.
const PENDING_MAX: u128 = 65_536;
const _: () = assert!(LOST_AFTER_MAX.as_nanos() / INTERVAL_MIN.as_nanos() <= PENDING_MAX);

impl KindConfig for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn protocol(&self) -> &'static str {
        self.transport.name()
    }

    fn check_target(&self, target: &Target) -> Result<(), String> {
        self.transport.check_target(target)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Reads the keys of an echo probe, given its protocol.
pub(super) fn reader(section: &mut MappingReader<'_, '_>) -> Option<Box<dyn KindReader>> {
    let protocol = section.key("protocol", |value| value.one_of(&PROTOCOLS)).or(Protocol::Udp)?;
    Some(Box::new(protocol))
}

impl KindReader for Protocol {
    fn intervals(&self) -> RangeInclusive<Duration> {
        let least = if self.is_stream() { INTERVAL_MIN_STREAM } else { INTERVAL_MIN };
        least..=INTERVAL_MAX
    }

    fn interval(&self) -> Duration {
        INTERVAL
    }

    fn check_target(&self, target: &DeclaredHost) -> Result<(), (String, String)> {
        Self::check_target(*self, target)
    }

    fn read(&self, section: &mut MappingReader<'_, '_>, listen: Option<&Listen>) -> Option<Kind> {
        let lost_after = if self.is_stream() { LOST_AFTER_STREAM } else { LOST_AFTER };
        let late_after = section.key("late_after", |value| duration(value, &DEADLINE_ALLOWED)).or(LATE_AFTER);
        let lost_after = section.key("lost_after", |value| duration(value, &DEADLINE_ALLOWED)).or(lost_after);
        let transport = transport(section, *self, listen);
        check_deadlines(section, late_after, lost_after);
        Some(Kind::Echo(Echo { transport: transport?, late_after: late_after?, lost_after: lost_after? }))
    }
}

fn check_deadlines(
    section: &MappingReader<'_, '_>,
    late_after: Option<Duration>,
    lost_after: Option<Duration>,
) {
    if let (Some(late), Some(lost)) = (late_after, lost_after)
        && lost < late
    {
        let late = display(late);
        let what = format!("{} is shorter than late_after, {late}", display(lost));
        let remedy =
            format!("a reply must be able to be late before its datagram is lost; use at least {late}");
        section.reject::<()>("lost_after", what, remedy);
    }
}
