//! The raw sockets that receive the ICMP errors of all routers.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use pathmeter_proto::wire::icmp::IcmpVersion;
use pathmeter_proto::wire::quoted_header::QuotedHeader;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

use super::QuotedHeaders;
use crate::datagram::{FilterField, FilterStart, accept_only};

/// Reads quoted headers from a raw ICMP and a raw ICMPv6 socket.
#[derive(Debug)]
pub struct QuotationReader {
    v4: UdpSocket,
    /// `None` if this host has no IPv6.
    v6: Option<UdpSocket>,
}

/// Type numbers of time exceeded and destination unreachable (RFC 792, RFC 4443).
const REPORTS_V4: [u8; 2] = [11, 3];
const REPORTS_V6: [u8; 2] = [3, 1];

/// Bytes that are read of a message. Those of routers are shorter (RFC 1812, RFC 4443); of a longer one the
/// rest is cut off, and its checksum does not fit.
const MESSAGE_BYTES: usize = 2_048;

/// Messages that are read of a socket before other work of the thread. Chosen: those of two long bursts.
const MESSAGES_PER_TURN_MAX: usize = 64;

impl QuotationReader {
    /// Opens the sockets, which needs CAP_NET_RAW. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the socket for IPv4 cannot be opened.
    pub fn open() -> io::Result<Self> {
        let v4 = open(Domain::IPV4, Protocol::ICMPV4, FilterStart::AfterIpv4Header, REPORTS_V4)?;
        let v6 = open(Domain::IPV6, Protocol::ICMPV6, FilterStart::FirstByte, REPORTS_V6).ok();
        Ok(Self { v4, v6 })
    }

    /// Waits for messages, and adds what they quote to `headers`.
    ///
    /// # Errors
    /// If a socket cannot be read.
    pub async fn receive(&self, headers: &QuotedHeaders) -> io::Result<()> {
        let readable_v6 = async {
            match &self.v6 {
                Some(socket) => socket.readable().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            readable = self.v4.readable() => readable?,
            readable = readable_v6 => readable?,
        }
        let sockets = [(Some(&self.v4), IcmpVersion::V4), (self.v6.as_ref(), IcmpVersion::V6)];
        for (socket, version) in sockets {
            if let Some(socket) = socket {
                read(socket, version, headers)?;
            }
        }
        Ok(())
    }
}

/// Opens a raw socket that receives only messages of two types.
fn open(domain: Domain, protocol: Protocol, start: FilterStart, types: [u8; 2]) -> io::Result<UdpSocket> {
    let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(protocol))?;
    accept_only(&socket, start, &[FilterField::EitherByte(0, types)])?;
    let any = match domain {
        Domain::IPV4 => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        _ => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    socket.bind(&any.into())?;
    // A type for another kind of socket serves the runtime as well.
    UdpSocket::from_std(socket.into())
}

/// Reads the messages that have arrived.
fn read(socket: &UdpSocket, version: IcmpVersion, headers: &QuotedHeaders) -> io::Result<()> {
    let mut bytes = [0; MESSAGE_BYTES];
    for _ in 0..MESSAGES_PER_TURN_MAX {
        let (length, from) = match socket.try_recv_from(&mut bytes) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        };
        let packet = &bytes[..length];
        let header_bytes = match version {
            IcmpVersion::V4 => packet.first().map_or(0, |first| usize::from(first & 15) * 4),
            IcmpVersion::V6 => 0,
        };
        // Messages may have arrived before the filter was attached.
        let message = packet.get(header_bytes..).unwrap_or_default();
        if let Ok(header) = QuotedHeader::decode(message, version) {
            headers.add(from.ip(), header);
        }
    }
    Ok(())
}
