//! The kinds of probes.

use crate::config;
use crate::probe::ProbeKind;

/// The implementation of a configured kind. Outside the configuration, kinds are listed only here.
pub(super) fn kind(kind: &config::Kind) -> &dyn ProbeKind {
    match kind {
        config::Kind::Echo(echo) => echo,
        config::Kind::Trace(trace) => trace,
        config::Kind::Bandwidth(bandwidth) => bandwidth,
        #[cfg(test)]
        config::Kind::Sample(sample) => sample,
    }
}
