//! What an agent says about itself at `/api/v1/agent`, and what it would answer to whoever asks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// An agent's own description. Fields are added, never changed: agents of two versions understand each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its version.
    pub version: String,
    /// Which of its lives this is: 16 hexadecimal digits.
    pub boot_id: String,
    /// Where it listens.
    pub ports: Ports,
    /// What it can do.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// What it thinks of the caller.
    pub you: You,
}

/// An agent's ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// HTTP, over TCP.
    pub http: u16,
    /// STAMP, over UDP.
    pub stamp: u16,
    /// Messages between agents, over UDP.
    pub agent: u16,
}

/// What an agent thinks of the caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct You {
    /// From which address it asks.
    pub address: String,
    /// Whether its STAMP requests would be answered.
    pub stamp: Answers,
}

/// Whether requests would be answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// Whether they would.
    pub answers: bool,
    /// Why not, and what to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What this build can do, as peers see it.
pub const CAPABILITIES: [&str; 3] = ["echo/udp", "stamp/authenticated", "goodbye"];
