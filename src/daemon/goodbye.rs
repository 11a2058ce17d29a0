//! Sends goodbyes to peers, and receives those of peers.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pathmeter_proto::goodbye::{GoodbyeListener, GoodbyeReport};
use pathmeter_proto::key::Keys;
use pathmeter_proto::machine::Arrival;
use pathmeter_proto::time::{Timestamp, WallTime, nanos};
use pathmeter_proto::wire::Goodbye;

use super::Daemon;
use crate::datagram::{Access, MachineTask, Notice, Recorder, Task, Traffic};
use crate::metrics::agent::ResponderSeries;

/// Number of copies of a goodbye, which is not acknowledged. Chosen: at 1 % loss one in a million is missed.
const COPIES: u32 = 3;

/// Time before each copy. Chosen: longer than a burst of loss at a full queue, and short beside a shutdown.
const COPY_INTERVAL: Duration = Duration::from_millis(20);

impl Daemon {
    /// Sends the goodbye to each address of each peer three times, because it is not acknowledged.
    pub(super) async fn send_goodbyes(&self) {
        let Some(keys) = self.settings.keys.mesh.as_deref() else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = self.settings.config.agent.name.clone();
        let goodbye = Goodbye { name, boot_id: self.boot_id, at: WallTime::from_nanos(nanos(now)) };
        let datagram = goodbye.encode(&keys.derive(Goodbye::PURPOSE));
        let socket = |any: &str| UdpSocket::bind(any).and_then(|s| s.set_nonblocking(true).map(|()| s)).ok();
        let (v4, v6) = (socket("0.0.0.0:0"), socket("[::]:0"));
        for _ in 0..COPIES {
            // The first pause gives the responder time to stop; the others spread the copies.
            tokio::time::sleep(COPY_INTERVAL).await;
            for peer in self.membership.roster.peers.values() {
                let Some(Ok(addresses)) = self.membership.addresses.get(&peer.name) else { continue };
                for address in addresses {
                    let socket = if address.is_ipv4() { &v4 } else { &v6 };
                    if let Some(socket) = socket {
                        // A peer that does not receive it counts losses; there is no other harm.
                        let _ = socket.send_to(&datagram, (*address, peer.agent_port));
                    }
                }
            }
        }
    }
}

/// The task that receives goodbyes which are authenticated by one of the mesh keys.
pub(super) fn listener(mesh: Option<&Keys>, series: Arc<ResponderSeries>) -> Box<dyn Task> {
    Box::new(MachineTask { machine: GoodbyeListener::new(mesh), recorder: GoodbyeRecorder { series } })
}

#[derive(Debug)]
struct GoodbyeRecorder {
    series: Arc<ResponderSeries>,
}

impl Recorder<GoodbyeListener> for GoodbyeRecorder {
    fn record(&mut self, report: GoodbyeReport, _: &mut Traffic) -> Option<Notice> {
        match report {
            GoodbyeReport::Received(goodbye) => Some(Notice::PeerLeaving(goodbye)),
            GoodbyeReport::Rejected => {
                self.series.agent_port_rejected.inc();
                None
            }
        }
    }

    fn stepping(&mut self, _: &mut GoodbyeListener, _: Timestamp) {}

    fn waiting(&mut self, _: &GoodbyeListener, _: Timestamp) {}

    fn received(&mut self, _: &Arrival) {}

    fn not_sent(&mut self) {}

    fn set_access(&mut self, listener: &mut GoodbyeListener, access: &Access) {
        listener.set_keys(access.keys.as_deref());
    }

    fn delays_stop(&self) -> bool {
        false
    }

    fn is_balanced(&self, _: &GoodbyeListener, _: Timestamp) -> bool {
        true
    }

    fn claims(&self, _: &GoodbyeListener, _: &[u8], _: &Arrival) -> bool {
        false
    }
}
