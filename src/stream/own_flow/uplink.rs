//! Over which interface the kernel sends the packets of a connection.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr as NetlinkAddress};

use crate::datagram::set_socket_option;

/// Protocol number of TCP.
const TCP: u8 = 6;

/// Bytes of the kernel's answer that are read. Chosen: more than a route has.
const ANSWER_BYTES: usize = 4_096;

/// Lets what a raw socket sends leave over the interface of a connection. This host may have several uplinks
/// of equal cost, and choose among them by port; for raw sockets it chooses without the ports. What is
/// received stays the same.
///
/// # Errors
/// If the kernel cannot be asked, names no interface, or refuses it.
pub(super) fn choose(socket: &impl AsRawFd, local: SocketAddr, peer: SocketAddr) -> io::Result<()> {
    let index = interface(local, peer)?;
    let (level, name) = match peer {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_UNICAST_IF),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF),
    };
    set_socket_option(socket, level, name, libc::c_int::from_ne_bytes(index.get().to_be_bytes()))
}

/// The interface over which the packets of a connection leave.
fn interface(local: SocketAddr, peer: SocketAddr) -> io::Result<NonZeroU32> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.set_non_blocking(true)?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    socket.send(&request(local, peer), 0)?;
    let mut answer = Vec::with_capacity(ANSWER_BYTES);
    // The kernel answers before the request returns.
    socket.recv(&mut answer, 0)?;
    found(&answer).ok_or_else(|| io::Error::other("the kernel names no interface"))
}

fn request(local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    let (address_family, length) = match peer.ip() {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let mut route = RouteMessage::default();
    route.header.address_family = address_family;
    route.header.destination_prefix_length = length;
    route.header.source_prefix_length = length;
    route.attributes = vec![
        RouteAttribute::Destination(peer.ip().into()),
        RouteAttribute::Source(local.ip().into()),
        RouteAttribute::IpProto(TCP),
        RouteAttribute::Sport(local.port()),
        RouteAttribute::Dport(peer.port()),
    ];
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, RouteNetlinkMessage::GetRoute(route).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The interface of the route in an answer; `None` if it is an error, or names none.
fn found(answer: &[u8]) -> Option<NonZeroU32> {
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer).ok()?;
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) = message.payload else {
        return None;
    };
    route.attributes.iter().find_map(|attribute| {
        let RouteAttribute::Oif(index) = attribute else { return None };
        NonZeroU32::new(*index)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_to_this_host_leave_over_the_loopback_interface() {
        for (local, peer) in [("127.0.0.1:1000", "127.0.0.2:2000"), ("[::1]:1000", "[::1]:2000")] {
            let index = interface(local.parse().unwrap(), peer.parse().unwrap()).unwrap();
            let loopback = nix::net::if_::if_nametoindex("lo").unwrap();
            assert_eq!(index.get(), loopback);
        }
    }

    #[test]
    fn destination_without_a_route_has_no_interface() {
        let (local, peer) = ("127.0.0.1:1000".parse().unwrap(), "[100::1]:2000".parse().unwrap());
        assert!(interface(local, peer).is_err());
    }
}
