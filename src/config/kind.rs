//! The interface between the configuration and a kind of probe.

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use pathmeter_proto::dscp::Dscp;

use super::hosts::DeclaredHost;
use super::reader::MappingReader;
use super::{Kind, Listen, Target};

/// The configuration of one kind of probe.
pub trait KindConfig {
    /// The value of the key `kind` in the file, and of the label `kind`.
    fn name(&self) -> &'static str;

    /// The value of the key `protocol` in the file, and of the label `protocol`.
    fn protocol(&self) -> &'static str;

    /// Checks that a target can be measured.
    ///
    /// # Errors
    /// What the target lacks, and the remedy.
    fn check_target(&self, target: &Target) -> Result<(), String>;

    /// The name of the probe whose flows it uses; `None`: it has flows of its own.
    fn follows(&self) -> Option<&str>;

    /// Returns itself, to be downcast to the type of its kind.
    fn as_any(&self) -> &dyn Any;
}

/// Reads the keys that are specific to a kind of probe.
pub(super) trait KindReader {
    /// The allowed intervals.
    fn interval_allowed(&self) -> RangeInclusive<Duration>;

    /// The default interval.
    fn interval_default(&self) -> Duration;

    /// The default DSCP.
    fn dscp_default(&self) -> Dscp;

    /// Checks that a target can be measured; if not, returns what is wrong and the remedy.
    fn check_target(&self, target: &DeclaredHost) -> Result<(), (String, String)>;

    /// Reads the keys; `None` if a problem was reported.
    fn read(&self, section: &mut MappingReader<'_, '_>, listen: Option<&Listen>) -> Option<Kind>;
}
