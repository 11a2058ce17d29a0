//! What an echo path measures, and how.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::profile::Quirks;
use crate::dscp::Dscp;
use crate::key::Keys;

/// What to measure.
#[derive(Debug, Clone)]
pub struct EchoSpec {
    /// The responder; hosts that answer ICMP have no port.
    pub to: SocketAddr,
    /// How its datagrams are written.
    pub wire: WireFormat,
    /// Time between datagrams, over all flows.
    pub interval: Duration,
    /// The session identifier of each flow, 1..=16 of them.
    pub ssids: Vec<u16>,
    /// Bytes of UDP payload, or of the ICMP message with its header; `None`: what it takes at least.
    pub size: Option<u16>,
    /// Class of service.
    pub dscp: Dscp,
    /// A longer round trip is late.
    pub late_after: Duration,
    /// Without a reply by then a datagram is lost.
    pub lost_after: Duration,
    /// Whether the driver will deliver the kernel's transmit stamps.
    pub tx_timestamps: bool,
    /// Slots after which to stop; `None`: never.
    pub count: Option<u64>,
    /// Decides phase, jitter and session numbers.
    pub seed: u64,
}

/// A format of datagrams, and what only that one has.
#[derive(Debug, Clone)]
pub enum WireFormat {
    /// STAMP over UDP, with our extensions: agents and reflectors answer.
    Stamp {
        /// Authenticated mode with these keys; `None`: open mode.
        keys: Option<Arc<Keys>>,
        /// What is known of the reflector beforehand.
        quirks: Quirks,
    },
    /// ICMP echo: hosts answer. They say nothing of what they received, so no loss has a direction, and nothing of their
    /// own times, so the round trip is with what they took.
    Icmp,
}
