//! The handshake of a load over UDP: it shows that the prober receives what is sent to its address and port,
//! and it opens the way through its firewall and address translation.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pathmeter_proto::bandwidth::RunEnd;
use pathmeter_proto::bandwidth::lease::LeaseId;
use pathmeter_proto::key::Key;
use pathmeter_proto::wire::load::{Cookie, HANDSHAKE_BYTES, Handshake, Load, LoadKey};
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

/// Interval at which a request without a reply is repeated.
const REPEAT_AFTER: Duration = Duration::from_millis(150);

/// How long a handshake may take. Chosen: 20 requests.
pub(super) const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(3);

/// Asks the responder to use the address and port of a connected socket, until it accepts. The caller limits
/// the time.
pub(super) async fn prove(socket: &UdpSocket, lease: LeaseId, secret: &[u8; 16]) {
    let (own, peer) = (LoadKey::new(secret, RunEnd::Prober), LoadKey::new(secret, RunEnd::Responder));
    let mut cookie = None;
    let mut buffer = [0; HANDSHAKE_BYTES + 1];
    loop {
        let request = Handshake::Request { cookie }.encode(lease, &own);
        // What is refused now may pass when it is repeated.
        let _ = socket.send(&request).await;
        let Ok(received) = timeout(REPEAT_AFTER, socket.recv(&mut buffer)).await else { continue };
        let Ok(length) = received else {
            // An ICMP error, which anybody may have sent.
            sleep(REPEAT_AFTER).await;
            continue;
        };
        match Handshake::decode(&buffer[..length], &peer) {
            Ok(Handshake::Cookie(given)) => cookie = Some(given),
            Ok(Handshake::Accepted) => return,
            Ok(Handshake::Request { .. }) | Err(_) => {}
        }
    }
}

/// Accepts the handshake on the socket of a run, also when it is repeated because the reply was lost. Leaves
/// the load in the socket. Never ends by itself.
pub(super) async fn accept(socket: &UdpSocket, lease: LeaseId, secret: &[u8; 16]) -> Infallible {
    let peer = LoadKey::new(secret, RunEnd::Prober);
    let accepted = Handshake::Accepted.encode(lease, &LoadKey::new(secret, RunEnd::Responder));
    let mut buffer = [0; HANDSHAKE_BYTES + 1];
    let _ = socket.send(&accepted).await;
    loop {
        let Ok(length) = socket.peek(&mut buffer).await else {
            sleep(REPEAT_AFTER).await;
            continue;
        };
        if Load::read(&buffer[..length], lease).is_ok() {
            return std::future::pending().await;
        }
        let is_request = matches!(Handshake::decode(&buffer[..length], &peer), Ok(Handshake::Request { .. }));
        // The first one in the socket.
        let _ = socket.recv(&mut buffer).await;
        if is_request {
            let _ = socket.send(&accepted).await;
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
