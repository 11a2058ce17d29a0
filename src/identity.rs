//! The description of an agent at `/api/v1/agent`, and whether it would answer the caller.

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
    /// Drawn at each start: 16 hexadecimal digits.
    pub boot_id: String,
    /// Where it listens.
    pub ports: Ports,
    /// What it supports; see [`CAPABILITIES`].
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// Whether it would answer the caller.
    pub you: CallerAccess,
}

impl Identity {
    /// The same without what could corrupt metrics and logs: invalid labels, control characters, and what is
    /// too long.
    #[must_use]
    pub fn sanitized(mut self) -> Self {
        let is_name = |name: &str| {
            name.len() <= TEXT_MAX
                && name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
                && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
        };
        let is_value = |value: &str| value.len() <= TEXT_MAX && !value.contains(char::is_control);
        self.labels.retain(|name, value| is_name(name) && is_value(value));
        while self.labels.len() > LABELS_MAX {
            self.labels.pop_last();
        }
        for text in [&mut self.name, &mut self.version, &mut self.boot_id] {
            text.retain(|letter| !letter.is_control());
            while text.len() > TEXT_MAX {
                text.pop();
            }
        }
        self
    }
}

/// A `boot_id` in text.
#[must_use]
pub fn shown(boot_id: u64) -> String {
    format!("{boot_id:016x}")
}

/// Bytes of a text from a peer that are kept.
const TEXT_MAX: usize = 128;

/// Labels of a peer that are kept.
const LABELS_MAX: usize = 32;

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

/// Whether an agent would answer the caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerAccess {
    /// The address that the caller has to the agent.
    pub address: String,
    /// Whether its STAMP requests would be answered.
    pub stamp: WouldAnswer,
    /// Whether its WebSocket messages would be; `None` from an agent that is too old to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket: Option<WouldAnswer>,
}

/// Whether requests would be answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WouldAnswer {
    /// Whether they would.
    pub answers: bool,
    /// Why not, and what to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What this build supports.
pub const CAPABILITIES: [&str; 6] =
    ["echo/udp", "echo/tcp", "echo/websocket", "echo/http", "stamp/authenticated", "goodbye"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_without_websocket_is_read() {
        let you: CallerAccess =
            serde_json::from_str(r#"{"address": "::1", "stamp": {"answers": true}}"#).unwrap();
        assert_eq!(you.websocket, None);
        assert_eq!(serde_json::to_string(&you).unwrap(), r#"{"address":"::1","stamp":{"answers":true}}"#);
    }

    #[test]
    fn labels_of_a_peer_cannot_inject_series() {
        let labels =
            [("site", "fra"), ("a\"} 1\nevil_metric{x", "1"), ("9", "x"), ("long", "a\nb"), ("", "x")];
        let identity = Identity {
            name: "ams-1\u{1b}[2J".into(),
            labels: labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            version: "é".repeat(500),
            boot_id: "00".into(),
            ports: Ports { http: 1, stamp: 2, agent: 3 },
            capabilities: Vec::new(),
            you: CallerAccess {
                address: "192.0.2.1".into(),
                stamp: WouldAnswer { answers: true, reason: None },
                websocket: None,
            },
        };
        let sanitized = identity.sanitized();
        assert_eq!(sanitized.labels, BTreeMap::from([("site".to_owned(), "fra".to_owned())]));
        assert_eq!(sanitized.name, "ams-1[2J");
        assert_eq!(sanitized.version.len(), 128);
    }
}
