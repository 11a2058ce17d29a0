//! The kinds of probe that there are.

use crate::config;
use crate::probe::ProbeKind;

/// What a configured kind can do. The one place outside the configuration where kinds are listed.
pub(super) fn kind(kind: &config::Kind) -> &dyn ProbeKind {
    match kind {
        config::Kind::Echo(echo) => echo,
        #[cfg(test)]
        config::Kind::Sample(sample) => sample,
    }
}
