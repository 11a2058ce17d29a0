//! The handshake of a load over UDP: it shows that the prober receives what is sent to its address and port,
//! and it opens the way through its firewall and address translation.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::key::Key;
use pathmeter_proto::machine::{Arrival, HostDrops, NotSent, Now, SENT_TTL, Send, SendId, TimestampSource};
use pathmeter_proto::time::Timestamp;
use pathmeter_proto::wire::bandwidth::RunEnd;
use pathmeter_proto::wire::load::{Cookie, HANDSHAKE_BYTES, Handshake, LoadKey, LoadKind};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::load::is_handshake;
use super::responder::BulkResponder;
use crate::datagram::{Access, Task, TaskStep, Traffic};

/// Interval at which a request without a reply is repeated.
const REPEAT_AFTER: Duration = Duration::from_millis(150);

/// How long a handshake may take. Chosen: 20 requests.
pub(super) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(3);

/// Asks the responder to use the address and port of a connected socket.
///
/// # Errors
/// The kernel refused to send or to receive.
pub(super) async fn prove(socket: &UdpSocket, lease: LeaseId, secret: &[u8; 16]) -> io::Result<()> {
    let (own, peer) = (LoadKey::new(secret, RunEnd::Prober), LoadKey::new(secret, RunEnd::Responder));
    let mut cookie = None;
    let mut buffer = [0; HANDSHAKE_BYTES + 1];
    loop {
        let request = Handshake::Request { cookie }.encode(lease, &own);
        // What is refused now may pass when it is repeated.
        let _ = socket.send(&request).await;
        let Ok(received) = timeout(REPEAT_AFTER, socket.recv(&mut buffer)).await else { continue };
        let datagram = match received {
            Ok(length) => &buffer[..length],
            // An ICMP error; the agent may be about to listen.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                tokio::time::sleep(REPEAT_AFTER).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        match Handshake::decode(datagram, &peer) {
            Ok(Handshake::Cookie(given)) => cookie = Some(given),
            Ok(Handshake::Accepted) => return Ok(()),
            Ok(Handshake::Request { .. }) | Err(_) => {}
        }
    }
}

/// Accepts the handshake on the socket of a run, also when it is repeated because the reply was lost. Never
/// returns.
pub(super) async fn accept(socket: &UdpSocket, lease: LeaseId, secret: &[u8; 16]) {
    let accepted = Handshake::Accepted.encode(lease, &LoadKey::new(secret, RunEnd::Responder));
    let mut buffer = [0; HANDSHAKE_BYTES + 1];
    loop {
        let _ = socket.send(&accepted).await;
        loop {
            match socket.recv(&mut buffer).await {
                Ok(length) if is_handshake(&buffer[..length]) => break,
                Ok(_) => {}
                Err(_) => tokio::time::sleep(REPEAT_AFTER).await,
            }
        }
    }
}

/// Makes and recognises cookies. They need no memory.
#[derive(Debug)]
pub(super) struct Cookies {
    key: Key,
}

impl Cookies {
    /// Cookies of a random key.
    ///
    /// # Errors
    /// The kernel provides no random bytes.
    pub(super) fn new() -> io::Result<Self> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(io::Error::other)?;
        Ok(Self { key: Key::new(&secret) })
    }

    /// The cookie of a prober's address and port.
    pub(super) fn cookie(&self, lease: LeaseId, prober: SocketAddr) -> Cookie {
        let (address, port) = (octets(prober.ip()), prober.port().to_be_bytes());
        self.key.mac_128(&[&lease.0.to_be_bytes(), &address, &port])
    }

    /// Whether a cookie is that of a prober's address and port.
    pub(super) fn is_valid(&self, cookie: &Cookie, lease: LeaseId, prober: SocketAddr) -> bool {
        let (address, port) = (octets(prober.ip()), prober.port().to_be_bytes());
        self.key.verify(&[&lease.0.to_be_bytes(), &address, &port], cookie)
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Maximum replies that wait to be sent; further requests are not answered. A loop sends them at once.
const REPLIES_MAX: usize = 64;

/// Answers requests on the agent port.
#[derive(Debug)]
pub(super) struct HandshakeTask {
    responder: Arc<BulkResponder>,
    replies: VecDeque<Reply>,
    sent: u64,
    is_stopping: bool,
}

#[derive(Debug)]
struct Reply {
    datagram: [u8; HANDSHAKE_BYTES],
    flow: u8,
    from: Option<IpAddr>,
    to: SocketAddr,
}

impl HandshakeTask {
    pub(super) fn new(responder: Arc<BulkResponder>) -> Self {
        Self { responder, replies: VecDeque::new(), sent: 0, is_stopping: false }
    }
}

impl Task for HandshakeTask {
    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        let Ok(LoadKind::Handshake(lease)) = LoadKind::read(datagram) else { return };
        let Arrival { from, to, flow, icmp: None, .. } = *arrival else { return };
        if self.replies.len() >= REPLIES_MAX {
            return;
        }
        if let Some(datagram) = self.responder.on_request(lease, datagram, from, to) {
            self.replies.push_back(Reply { datagram, flow, from: to, to: from });
        }
    }

    fn before_send(&mut self, _: SendId, _: &mut [u8], _: Now) {}

    fn sent(&mut self, _: SendId, _: Timestamp, _: TimestampSource) {}

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn step(&mut self, _: Now, _: &mut HostDrops, arena: &mut Vec<u8>, _: &mut Traffic) -> TaskStep {
        let Some(Reply { datagram, flow, from, to }) = self.replies.pop_front() else {
            return if self.is_stopping { TaskStep::Finished } else { TaskStep::Wait(Timestamp::NEVER) };
        };
        arena.extend_from_slice(&datagram);
        self.sent += 1;
        TaskStep::Send(Send {
            id: SendId(self.sent),
            flow,
            from,
            to,
            tos: 0,
            ttl: SENT_TTL,
            dont_fragment: false,
            segment: None,
            timestamp: false,
        })
    }

    fn stop(&mut self) {
        self.is_stopping = true;
    }

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn set_access(&mut self, _: &Access) {}

    fn delays_stop(&self) -> bool {
        false
    }

    fn is_balanced(&self, _: Timestamp) -> bool {
        true
    }

    fn claims(&self, _: &[u8], _: &Arrival) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_is_that_of_one_lease_address_and_port() {
        let (cookies, others) = (Cookies::new().unwrap(), Cookies::new().unwrap());
        let prober: SocketAddr = "192.0.2.1:5000".parse().unwrap();
        let cookie = cookies.cookie(LeaseId(1), prober);
        assert!(cookies.is_valid(&cookie, LeaseId(1), prober));
        assert!(!others.is_valid(&cookie, LeaseId(1), prober));
        assert!(!cookies.is_valid(&cookie, LeaseId(2), prober));
        for other in ["192.0.2.2:5000", "192.0.2.1:5001", "[2001:db8::1]:5000"] {
            assert!(!cookies.is_valid(&cookie, LeaseId(1), other.parse().unwrap()), "{other}");
        }
    }
}
