//! Configuration of echo probes.

pub mod transport;

use std::any::Any;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;

use self::transport::{PROTOCOLS, Protocol, Transport, transport};
use super::defaults::INTERVAL;
use super::hosts::DeclaredHost;
use super::kind::{KindConfig, KindReader};
use super::reader::MappingReader;
use super::units::display;
use super::values::duration;
use super::{Kind, Listen, Target};

/// The configuration of an echo probe, which measures loss, RTT and jitter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echo {
    /// The protocol and its parameters.
    pub transport: Transport,
    /// A reply with a longer RTT is late.
    pub late_after: Duration,
    /// A datagram, message or request without a reply after this time is lost.
    pub lost_after: Duration,
}

const INTERVAL_MIN: Duration = Duration::from_millis(1);

/// Over connections. The timers of the runtime have a resolution of a millisecond, so sends at shorter
/// intervals would be missed.
const INTERVAL_MIN_STREAM: Duration = Duration::from_millis(10);

const INTERVAL_MAX: Duration = Duration::from_secs(3600);

const LATE_AFTER: Duration = Duration::from_secs(1);
const LOST_AFTER: Duration = Duration::from_secs(3);
/// Over a connection: TCP retransmits a lost segment six times in this time.
const LOST_AFTER_STREAM: Duration = Duration::from_secs(15);
const LOST_AFTER_MAX: Duration = Duration::from_secs(60);
const DEADLINE_ALLOWED: RangeInclusive<Duration> = Duration::from_millis(1)..=LOST_AFTER_MAX;

/// Maximum datagrams of a path without a verdict, ensured by the limits of `interval` and `lost_after`.
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

    fn follows(&self) -> Option<&str> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Reads the protocol of an echo probe; returns the reader for the keys of that protocol.
pub(super) fn reader(section: &mut MappingReader<'_, '_>) -> Option<Box<dyn KindReader>> {
    let protocol = section.key("protocol", |value| value.one_of(&PROTOCOLS)).or(Protocol::Udp)?;
    Some(Box::new(protocol))
}

impl KindReader for Protocol {
    fn interval_allowed(&self) -> RangeInclusive<Duration> {
        let least = if self.is_stream() { INTERVAL_MIN_STREAM } else { INTERVAL_MIN };
        least..=INTERVAL_MAX
    }

    fn interval_default(&self) -> Duration {
        INTERVAL
    }

    fn dscp_default(&self) -> Dscp {
        Dscp::DEFAULT
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
        let echo = Echo { transport: transport?, late_after: late_after?, lost_after: lost_after? };
        Some(Kind::Echo(Arc::new(echo)))
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
        let what = format!("{} is shorter than late_after ({late})", display(lost));
        let remedy = format!("use at least {late}, so that a reply can be late before it counts as lost");
        section.reject::<()>("lost_after", what, remedy);
    }
}
