//! Defaults that several parts of the program use.

use std::time::Duration;

/// The HTTP port (TCP). Chosen: above 1024, so that no privilege is needed.
pub const HTTP_PORT: u16 = 9862;

/// The STAMP port (UDP).
pub const STAMP_PORT: u16 = 9862;

/// The agent port (UDP and TCP): messages between agents.
pub const AGENT_PORT: u16 = 9863;

/// The port of STAMP and TWAMP-Light reflectors (RFC 8762 section 4.1).
pub const REFLECTOR_PORT: u16 = pathmeter_proto::wire::stamp::PORT;

/// The interval of a probe.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// The label that denotes the zone of an agent.
pub const ZONE_LABEL: &str = "zone";

/// The path at which an agent answers HTTP echo requests.
pub const PING_PATH: &str = "/api/v1/ping";

/// The path at which an agent echoes WebSocket messages.
pub const WEBSOCKET_PATH: &str = "/ws";
