//! Changes of this host's routes, which the kernel reports over rtnetlink(7).

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use pathmeter_proto::prefix::Prefix;

/// Receives the changes.
pub struct LocalRoutes {
    socket: TokioSocket,
    /// The destinations of routes that have changed and were not taken yet.
    changed: Vec<Prefix>,
}

/// Destinations that are kept until they are taken; more of them are taken for all destinations.
const CHANGED_MAX: usize = 256;

/// Multicast groups of rtnetlink (linux/rtnetlink.h): routes of both families.
const RTMGRP_IPV4_ROUTE: u32 = 0x40;
const RTMGRP_IPV6_ROUTE: u32 = 0x400;

impl LocalRoutes {
    /// Opens the socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The kernel, or a sandbox, does not allow it.
    pub fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind(&SocketAddr::new(0, RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE))?;
        Ok(Self { socket, changed: Vec::new() })
    }

    /// Waits for the next report of the kernel.
    ///
    /// # Errors
    /// The socket cannot be read any more.
    pub async fn receive(&mut self) -> io::Result<()> {
        match self.socket.recv_from_full().await {
            Ok((datagram, _)) => self.changed.extend(destinations(&datagram)),
            // The kernel had to drop some reports.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => self.changed = everything(),
            Err(error) => return Err(error),
        }
        if self.changed.len() > CHANGED_MAX {
            self.changed = everything();
        }
        Ok(())
    }

    /// Takes the destinations of the routes that have changed.
    pub fn take(&mut self) -> Vec<Prefix> {
        std::mem::take(&mut self.changed)
    }
}

impl fmt::Debug for LocalRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalRoutes").field("changed", &self.changed).finish_non_exhaustive()
    }
}

/// The destinations of the routes in the messages of a datagram. Messages that cannot be read are left out.
fn destinations(mut datagram: &[u8]) -> Vec<Prefix> {
    let mut found = Vec::new();
    while let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) {
        if let NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
        ) = &message.payload
        {
            found.extend(destination(route));
        }
        // Each message begins at a multiple of four bytes.
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).next_multiple_of(4);
        datagram = match datagram.get(length..) {
            Some(rest) if length > 0 => rest,
            Some(_) | None => break,
        };
    }
    found
}

/// The destination of a route; `None` if it is not one of the main table.
fn destination(route: &RouteMessage) -> Option<Prefix> {
    let RouteHeader { address_family, destination_prefix_length, table, .. } = route.header;
    if table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let given = route.attributes.iter().find_map(|attribute| {
        if let RouteAttribute::Destination(RouteAddress::Inet(address)) = attribute {
            Some(IpAddr::V4(*address))
        } else if let RouteAttribute::Destination(RouteAddress::Inet6(address)) = attribute {
            Some(IpAddr::V6(*address))
        } else {
            None
        }
    });
    let any = if address_family == AddressFamily::Inet {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else if address_family == AddressFamily::Inet6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        return None;
    };
    Prefix::new(given.unwrap_or(any), destination_prefix_length).ok()
}

fn everything() -> Vec<Prefix> {
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    any.into_iter().filter_map(|address| Prefix::new(address, 0).ok()).collect()
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkHeader;

    use super::*;

    fn message(table: u8, destination: Option<&str>, len: u8, is_new: bool) -> Vec<u8> {
        let mut route = RouteMessage::default();
        let address: Option<IpAddr> = destination.map(|text| text.parse().unwrap());
        let is_v6 = address.is_some_and(|address| address.is_ipv6());
        route.header.address_family = if is_v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        (route.header.table, route.header.destination_prefix_length) = (table, len);
        route.attributes.extend(address.map(|address| RouteAttribute::Destination(address.into())));
        let payload = match is_new {
            true => RouteNetlinkMessage::NewRoute(route),
            false => RouteNetlinkMessage::DelRoute(route),
        };
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn destinations_of_new_and_removed_routes_of_the_main_table_are_found() {
        let datagram = [
            message(254, Some("10.1.0.0"), 16, true),
            message(255, Some("10.2.0.0"), 16, true),
            message(254, Some("2001:db8::"), 32, false),
            message(254, None, 0, true),
        ]
        .concat();
        let found: Vec<String> = destinations(&datagram).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.1.0.0/16", "2001:db8::/32", "0.0.0.0/0"]);
    }

    #[test]
    fn arbitrary_bytes_are_no_routes() {
        let datagram = message(254, Some("10.1.0.0"), 16, true);
        for length in 0..datagram.len() {
            assert!(destinations(&datagram[..length]).len() <= 1);
        }
        for at in 0..datagram.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = datagram.clone();
                damaged[at] = value;
                assert!(destinations(&damaged).len() <= 1);
            }
        }
        assert_eq!(destinations(&[0; 64]).len(), 0);
    }
}
