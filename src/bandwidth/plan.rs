//! The plan of a bandwidth path.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::bandwidth::RunDirection;
use pathmeter_proto::dscp::Dscp;

use crate::config::Https;
use crate::config::bandwidth::Bandwidth;
use crate::echo::EchoPlan;
use crate::metrics::bandwidth::BandwidthSeries;

/// The plan of a bandwidth path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BandwidthPlan {
    /// The agent port of the peer.
    pub(super) to: SocketAddr,
    /// Its HTTP port.
    pub(super) http: SocketAddr,
    /// The value of the `Host` header.
    pub(super) host: String,
    pub(super) https: Option<Https>,
    pub(super) source: Option<IpAddr>,
    pub(super) dscp: Dscp,
    pub(super) interval: Duration,
    pub(super) bandwidth: Bandwidth,
    /// The echoes that watch the path. They change with the key.
    pub(super) echo: EchoPlan,
}

/// The series of the directions of a path.
pub(super) type DirectionSeries = Vec<(RunDirection, Arc<BandwidthSeries>)>;
