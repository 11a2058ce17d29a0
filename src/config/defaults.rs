//! Defaults that more than one part of the program needs. Each is defined here and nowhere else.

use std::time::Duration;

/// HTTP over TCP. Chosen: above 1024, so that no privilege is needed.
pub const HTTP_PORT: u16 = 9862;

/// STAMP over UDP.
pub const STAMP_PORT: u16 = 9862;

/// Messages between agents, over UDP and TCP.
pub const AGENT_PORT: u16 = 9863;

/// The port of STAMP and TWAMP-Light reflectors (RFC 8762 section 4.1).
pub const REFLECTOR_PORT: u16 = pathmeter_proto::wire::stamp::PORT;

/// Time between two probes of a path.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// The label that tells a zone, unless another is named.
pub const ZONE_LABEL: &str = "zone";

/// What an agent answers HTTP echoes at.
pub const PING_PATH: &str = "/api/v1/ping";

/// Where an agent sends WebSocket messages back.
pub const WEBSOCKET_PATH: &str = "/ws";
