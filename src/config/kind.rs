//! What the configuration must know of a kind of probe.

use std::any::Any;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::hosts::DeclaredHost;
use super::reader::MappingReader;
use super::{Kind, Listen, Target};

/// The configuration of one kind of probe.
pub trait KindConfig {
    /// The value of `kind` in the file, and of the label `kind`.
    fn name(&self) -> &'static str;

    /// The value of `protocol` in the file, and of the label `protocol`.
    fn protocol(&self) -> &'static str;

    /// Whether it can measure a host without an agent.
    ///
    /// # Errors
    /// What the host lacks, and the remedy.
    fn check_target(&self, target: &Target) -> Result<(), String>;

    /// Itself, for its own kind.
    fn as_any(&self) -> &dyn Any;
}

/// Reads the keys that only one kind of probe has.
pub(super) trait KindReader {
    /// The intervals that are allowed.
    fn intervals(&self) -> RangeInclusive<Duration>;

    /// The interval where the file gives none.
    fn interval(&self) -> Duration;

    /// Whether it can measure a host without an agent; if not, what is wrong and the remedy.
    fn check_target(&self, target: &DeclaredHost) -> Result<(), (String, String)>;

    /// Reads the keys; `None` when a problem was noted.
    fn read(&self, section: &mut MappingReader<'_, '_>, listen: Option<&Listen>) -> Option<Kind>;
}
