//! Tells peers that this agent is leaving.

use std::net::UdpSocket;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::time::{WallTime, nanos};
use pathmeter_proto::wire::Goodbye;

use super::Daemon;

impl Daemon {
    /// Sends each goodbye three times, because it is not acknowledged.
    pub(super) async fn send_goodbyes(&self) {
        let Some(keys) = self.settings.keys.mesh.as_deref() else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = self.settings.config.agent.name.clone();
        let goodbye = Goodbye { name, boot_id: self.boot_id, at: WallTime::from_nanos(nanos(now)) };
        let datagram = goodbye.encode(&keys.derive(Goodbye::PURPOSE));
        let socket = |any: &str| UdpSocket::bind(any).and_then(|s| s.set_nonblocking(true).map(|()| s)).ok();
        let (v4, v6) = (socket("0.0.0.0:0"), socket("[::]:0"));
        for _ in 0..3 {
            // The first pause gives the responder time to stop, the others spread the copies.
            tokio::time::sleep(Duration::from_millis(20)).await;
            for peer in self.membership.roster.peers.values() {
                let Some(Ok(addresses)) = self.membership.addresses.get(&peer.name) else { continue };
                for address in addresses {
                    let socket = if address.is_ipv4() { &v4 } else { &v6 };
                    if let Some(socket) = socket {
                        // A peer that does not get it counts losses; there is no other harm.
                        let _ = socket.send_to(&datagram, (*address, peer.agent_port));
                    }
                }
            }
        }
    }
}
