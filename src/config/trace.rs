//! Configuration of trace probes.

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::echo::Echo;
use super::echo::transport::{Transport, Udp};
use super::hosts::DeclaredHost;
use super::kind::{KindConfig, KindReader};
use super::reader::{MappingReader, ValueReader};
use super::{Kind, Listen, Probe, Target};

/// The configuration of a trace probe, which finds the routes of another probe's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The name of the echo probe whose flows are traced.
    pub follows: String,
    /// The parameters of that probe's flows.
    pub flows: Udp,
    /// Largest TTL.
    pub hops_max: u8,
    /// Whether every hop has series of its own.
    pub hop_metrics: bool,
}

/// A shorter interval would exceed what routers answer by default on every route.
const INTERVAL_ALLOWED: RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(3600);

const INTERVAL: Duration = Duration::from_secs(30);

const HOPS_ALLOWED: RangeInclusive<i128> = 1..=64;

/// The default of traceroute.
const HOPS: u8 = 30;

impl KindConfig for Trace {
    fn name(&self) -> &'static str {
        "trace"
    }

    fn protocol(&self) -> &'static str {
        "udp"
    }

    fn check_target(&self, _: &Target) -> Result<(), String> {
        Ok(())
    }

    fn follows(&self) -> Option<&str> {
        Some(&self.follows)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Reads the probe that a trace probe follows. Reports a problem if it cannot be followed.
pub(super) fn followed(
    section: &mut MappingReader<'_, '_>,
    probes: &[Probe],
) -> Option<(Box<dyn KindReader>, Probe)> {
    section.required("follows", |value: ValueReader<'_, '_>| {
        let name = value.text("the name of an echo probe")?;
        let Some(probe) = probes.iter().find(|probe| probe.name == name) else {
            let what = format!("no probe before this one is named {name}");
            return value.reject(what, "name an echo probe over udp, and list it first");
        };
        match probe.kind.downcast::<Echo>().map(|echo| &echo.transport) {
            Some(Transport::Udp(udp)) => {
                let reader = TraceReader { follows: name.to_owned(), flows: udp.clone() };
                Some((Box::new(reader) as Box<dyn KindReader>, probe.clone()))
            }
            Some(Transport::Icmp(_) | Transport::Tcp(_) | Transport::WebSocket(_) | Transport::Http(_))
            | None => value
                .reject(format!("{name} sends no UDP datagrams of its own"), "name an echo probe over udp"),
        }
    })
}

struct TraceReader {
    follows: String,
    flows: Udp,
}

impl KindReader for TraceReader {
    fn interval_allowed(&self) -> RangeInclusive<Duration> {
        INTERVAL_ALLOWED
    }

    fn interval_default(&self) -> Duration {
        INTERVAL
    }

    fn check_target(&self, _: &DeclaredHost) -> Result<(), (String, String)> {
        Ok(())
    }

    fn read(&self, section: &mut MappingReader<'_, '_>, _: Option<&Listen>) -> Option<Kind> {
        let hops_max = section.key("hops_max", |value| value.number(&HOPS_ALLOWED)).or(HOPS);
        let hop_metrics = section.key("hop_metrics", ValueReader::boolean).or(false);
        let (follows, flows) = (self.follows.clone(), self.flows.clone());
        Some(Kind::Trace(Trace { follows, flows, hops_max: hops_max?, hop_metrics: hop_metrics? }))
    }
}
