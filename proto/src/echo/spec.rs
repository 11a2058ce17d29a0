//! Parameters of an echo measurement over datagrams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::profile::Quirks;
use crate::dscp::Dscp;
use crate::key::Keys;

/// Parameters of a [`Prober`](super::Prober).
#[derive(Debug, Clone)]
pub struct EchoSpec {
    /// Address of the responder; the port is not used for ICMP.
    pub to: SocketAddr,
    /// Format of the datagrams.
    pub wire: WireFormat,
    /// Time between datagrams, over all flows together.
    pub interval: Duration,
    /// Session identifier of each flow, 1 to 16 of them.
    pub ssids: Vec<u16>,
    /// Length of the UDP payload, or of the ICMP message with its header, in bytes; `None`: as short as
    /// possible.
    pub size: Option<u16>,
    /// Class of service.
    pub dscp: Dscp,
    /// Round trips longer than this are late.
    pub late_after: Duration,
    /// A datagram without a reply after this time is lost.
    pub lost_after: Duration,
    /// Whether the driver delivers the kernel's transmit timestamps.
    pub tx_timestamps: bool,
    /// Number of slots; `None`: unlimited.
    pub count: Option<u64>,
    /// Determines the phase, the jitter and the session numbers.
    pub seed: u64,
}

/// Format of datagrams, with the parameters of that format.
#[derive(Debug, Clone)]
pub enum WireFormat {
    /// STAMP over UDP with pathmeter's extensions; answered by agents and by other reflectors.
    Stamp {
        /// Keys of authenticated mode; `None`: open mode.
        keys: Option<Arc<Keys>>,
        /// Known deviations of the reflector.
        quirks: Quirks,
    },
    /// ICMP echo, answered by any host. Hosts do not report what they received, so no loss has a direction,
    /// and not their timestamps, so the round trip includes their turnaround.
    Icmp,
}
