//! The identity of an agent, as it reports it at `/api/v1/agent`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The identity that an agent reports. Fields are only ever added, so that agents of different versions are
/// compatible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The name of the agent.
    pub name: String,
    /// The labels of the agent.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The version of the program.
    pub version: String,
    /// A random number that is chosen at each start, as 16 hexadecimal digits.
    pub boot_id: String,
    /// The ports that the agent listens on.
    pub ports: Ports,
    /// The features that the agent supports; see [`CAPABILITIES`].
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// Whether the agent answers the measurements of the caller.
    pub you: CallerAccess,
}

impl Identity {
    /// Returns the identity without what could corrupt metrics and logs: invalid labels, control characters,
    /// and the end of long texts.
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

/// Formats a boot id as 16 hexadecimal digits.
#[must_use]
pub fn format_boot_id(boot_id: u64) -> String {
    format!("{boot_id:016x}")
}

/// Maximum bytes of a text from a peer; the rest is removed.
const TEXT_MAX: usize = 128;

/// Maximum labels of a peer; further ones are removed.
const LABELS_MAX: usize = 32;

/// The ports of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// HTTP, over TCP.
    pub http: u16,
    /// STAMP, over UDP.
    pub stamp: u16,
    /// Messages between agents, over UDP and TCP.
    pub agent: u16,
}

/// Whether an agent answers the measurements of the caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerAccess {
    /// The source address of the caller, as the agent sees it.
    pub address: String,
    /// Whether the agent answers STAMP requests from it.
    pub stamp: WouldAnswer,
    /// Whether the agent echoes WebSocket messages from it; `None` from an agent of an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub websocket: Option<WouldAnswer>,
}

/// Whether requests of the caller are answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WouldAnswer {
    /// Whether they are answered.
    pub answers: bool,
    /// Why not, and the remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The features that this build supports.
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
