//! Whether traces may send segments on the connections of echoes.

use std::sync::OnceLock;

use tracing::warn;

use crate::stream::own_flow::is_permitted;

/// Whether this process may send segments on connections, for which it needs CAP_NET_RAW.
#[derive(Debug, Default)]
pub struct OwnFlowPermission(OnceLock<bool>);

impl OwnFlowPermission {
    /// Whether it may. Checked on first use; a missing capability is logged once.
    pub fn is_granted(&self) -> bool {
        *self.0.get_or_init(|| {
            let is_granted = is_permitted();
            if !is_granted {
                warn!(
                    capability = "CAP_NET_RAW",
                    "connections of probes cannot be traced with own_flow: tracing with SYN segments"
                );
            }
            is_granted
        })
    }
}
