//! Configuration of the kind `sample`, which exists in tests only: an example of what a new kind adds.

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;

use super::hosts::DeclaredHost;
use super::kind::{KindConfig, KindReader};
use super::reader::MappingReader;
use super::values::size;
use super::{Kind, Listen, Target};

/// The configuration of a sample probe, which counts replies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Bytes of UDP payload.
    pub size: u64,
}

const SIZE_ALLOWED: RangeInclusive<u64> = 44..=1000;

impl KindConfig for Sample {
    fn name(&self) -> &'static str {
        "sample"
    }

    fn protocol(&self) -> &'static str {
        "udp"
    }

    fn check_target(&self, _: &Target) -> Result<(), String> {
        Ok(())
    }

    fn follows(&self) -> Option<&str> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub(super) struct SampleReader;

impl KindReader for SampleReader {
    fn interval_allowed(&self) -> RangeInclusive<Duration> {
        Duration::from_millis(1)..=Duration::from_secs(1)
    }

    fn interval_default(&self) -> Duration {
        Duration::from_millis(10)
    }

    fn dscp_default(&self) -> Dscp {
        Dscp::DEFAULT
    }

    fn check_target(&self, _: &DeclaredHost) -> Result<(), (String, String)> {
        Ok(())
    }

    fn read(&self, section: &mut MappingReader<'_, '_>, _: Option<&Listen>) -> Option<Kind> {
        let size = section.key("size", |value| size(value, &SIZE_ALLOWED)).or(*SIZE_ALLOWED.start());
        Some(Kind::Sample(Sample { size: size? }))
    }
}
