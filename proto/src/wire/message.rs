//! The echo message of stream transports, independent of its encoding.

use super::NtpTime;

/// Identifies a message among all messages of its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Sequence number from 0, over all connections.
    pub sequence: u64,
    /// Time at which the message was due, on the wall clock.
    pub timestamp: NtpTime,
}
