//! The echo message that travels over connections, whatever carries it.

use super::NtpTime;

/// What tells a message apart from all others of its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Counts from 0, over all connections.
    pub sequence: u64,
    /// When it was meant to leave, by the wall clock.
    pub timestamp: NtpTime,
}
