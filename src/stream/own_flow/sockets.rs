//! The raw sockets of a trace on a connection.

use std::io::{self, IoSliceMut};
use std::iter;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};
use pathmeter_proto::time::{Timestamp, WallTime};
use pathmeter_proto::trace::{ANSWER_AGE_MAX, FlowPosition};
use pathmeter_proto::wire::tcp::ReceivedSegment;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::super::kernel::{self, CONTROL_BYTES};
use super::uplink;
use crate::clock::Clock;
use crate::datagram::{FilterField, FilterStart, accept_only};

/// A raw TCP socket, which sends segments and receives those of the peer, and a raw ICMP socket, which
/// receives the answers of routers. Both receive only what belongs to the connection.
#[derive(Debug)]
pub(in crate::stream) struct TraceSockets {
    segments: UdpSocket,
    messages: UdpSocket,
    local: SocketAddr,
    peer: SocketAddr,
    clock: Clock,
    /// When the interface was chosen over which segments leave; `None`: it was not.
    uplink_chosen_at: Option<Timestamp>,
}

/// A received ICMP message about a segment.
#[derive(Debug)]
pub(in crate::stream) struct IcmpMessage {
    /// From its ICMP header on.
    pub(in crate::stream) bytes: Vec<u8>,
    pub(in crate::stream) from: IpAddr,
    pub(in crate::stream) at: Timestamp,
}

/// What the sockets receive.
#[derive(Debug)]
pub(in crate::stream) enum Received {
    /// A segment of the peer.
    Segment { segment: ReceivedSegment, arrived_ttl: u8, at: Timestamp },
    /// A message of a router about a segment.
    Message(IcmpMessage),
}

/// Why the raw sockets of a trace could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {error}")]
pub struct RawSocketError {
    operation: &'static str,
    error: io::Error,
}

impl RawSocketError {
    pub(super) fn of(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self { operation, error }
    }
}

/// Type numbers of ICMP messages that a TTL has ended (RFC 792, RFC 4443).
const TIME_EXCEEDED_V4: u8 = 11;
const TIME_EXCEEDED_V6: u8 = 3;

/// Protocol number of TCP.
const TCP: u8 = 6;

/// Received segments that are read to find the latest one; further ones are left. Chosen: more than the
/// kernel keeps for the socket, so that a client that sends without pause does not delay others.
pub(super) const SEGMENTS_MAX: usize = 1_024;

/// Bytes that are read of a packet. Answers of routers are shorter (RFC 1812, RFC 4443); of segments the
/// rest is only counted.
const PACKET_BYTES: usize = 1_500;

/// Time after which the interface is chosen again, because routes change. Chosen: 1 s, the shortest time
/// between two probes of a round, with a few microseconds of CPU each time.
const UPLINK_AGE_MAX: Duration = Duration::from_secs(1);

/// Length of an IPv4 header without options.
const IPV4_BYTES: u32 = 20;

/// Length of an IPv6 header.
const IPV6_BYTES: u32 = 40;

/// Length of an ICMP header.
const ICMP_BYTES: u32 = 8;

/// Whether this process may open raw sockets, for which it needs CAP_NET_RAW.
#[must_use]
pub fn is_permitted() -> bool {
    Socket::new(Domain::IPV4, Type::RAW.cloexec(), Some(Protocol::TCP)).is_ok()
}

impl TraceSockets {
    /// Opens the sockets for a connection.
    ///
    /// # Errors
    /// If one of them cannot be opened or configured.
    pub(in crate::stream) fn open(local: SocketAddr, peer: SocketAddr) -> Result<Self, RawSocketError> {
        let is_v4 = peer.is_ipv4();
        let (start, icmp, time_exceeded, protocol_at, header_bytes) = match is_v4 {
            true => (FilterStart::AfterIpv4Header, Protocol::ICMPV4, TIME_EXCEEDED_V4, 9, IPV4_BYTES),
            false => (FilterStart::FirstByte, Protocol::ICMPV6, TIME_EXCEEDED_V6, 6, IPV6_BYTES),
        };
        let segments = open(local, Protocol::TCP).map_err(RawSocketError::of("opening a raw TCP socket"))?;
        let ports = [FilterField::Half(0, peer.port()), FilterField::Half(2, local.port())];
        accept_only(&segments, start, &ports).map_err(RawSocketError::of("filtering segments"))?;
        if !is_v4 {
            let received = segments.set_recv_hoplimit_v6(true);
            received.map_err(RawSocketError::of("receiving hop limits"))?;
            kernel::disable_flow_label(&segments)
                .map_err(RawSocketError::of("setting the flow label of segments"))?;
        }
        // It is not connected: an ICMP error about any packet to the peer would become its error.
        let messages = open(local, icmp).map_err(RawSocketError::of("opening a raw ICMP socket"))?;
        let ports_at = ICMP_BYTES + header_bytes;
        let fields = [
            FilterField::Byte(0, time_exceeded),
            FilterField::Byte(ICMP_BYTES + protocol_at, TCP),
            FilterField::Half(ports_at, local.port()),
            FilterField::Half(ports_at + 2, peer.port()),
        ];
        accept_only(&messages, start, &fields).map_err(RawSocketError::of("filtering ICMP messages"))?;
        // Without kernel timestamps this process reads the clock.
        let _ = kernel::request_rx_timestamps(&segments);
        let _ = kernel::request_rx_timestamps(&messages);
        let segments = registered(segments)?;
        let messages = registered(messages)?;
        Ok(Self { segments, messages, local, peer, clock: Clock::new(), uplink_chosen_at: None })
    }

    /// Sends a segment with a TTL and a TOS. Returns when.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub(in crate::stream) fn send(
        &mut self,
        (ttl, tos): (u8, u8),
        segment: &[u8],
    ) -> Result<Timestamp, RawSocketError> {
        self.choose_uplink();
        let socket = SockRef::from(&self.segments);
        let limited = match self.peer.is_ipv4() {
            true => socket.set_ttl_v4(ttl.into()),
            false => socket.set_unicast_hops_v6(ttl.into()),
        };
        limited.map_err(RawSocketError::of("setting the TTL of a segment"))?;
        let classified = match self.peer.is_ipv4() {
            true => socket.set_tos_v4(tos.into()),
            false => socket.set_tclass_v6(tos.into()),
        };
        classified.map_err(RawSocketError::of("setting the DSCP of a segment"))?;
        let at = Clock::now();
        let sent = socket.send_to(segment, &without_port(self.peer).into());
        sent.map_err(RawSocketError::of("sending a segment"))?;
        Ok(at)
    }

    /// Lets segments leave where the connection does. Best effort: where this host has one uplink, or chooses
    /// by addresses, they do anyway.
    fn choose_uplink(&mut self) {
        let now = Clock::now();
        if self.uplink_chosen_at.is_none_or(|at| now.since(at) >= UPLINK_AGE_MAX) {
            self.uplink_chosen_at = Some(now);
            let _ = uplink::choose(&self.segments, self.local, self.peer);
        }
    }

    /// Discards the segments that have arrived.
    pub(super) fn discard_segments(&self) {
        let _ = self.latest_position();
    }

    /// Where the connection stands, as the latest segment shows that has arrived; `None`: none has.
    pub(super) fn latest_position(&self) -> Option<FlowPosition> {
        let packets = iter::from_fn(|| Packet::receive(&self.segments).ok()).take(SEGMENTS_MAX);
        let found = packets.filter_map(|packet| self.segment(&packet)).last();
        found.map(|(segment, arrived_ttl)| FlowPosition::of(segment, arrived_ttl, Clock::now()))
    }

    /// A segment of the connection, and the TTL with which it has arrived.
    fn segment(&self, packet: &Packet) -> Option<(ReceivedSegment, u8)> {
        let header_bytes = self.header_bytes(&packet.bytes)?;
        let segment = ReceivedSegment::decode(packet.bytes.get(header_bytes..)?).ok()?;
        // Packets may have arrived before the filter was attached.
        let ports = (segment.source_port, segment.destination_port);
        if packet.from != Some(self.peer.ip()) || ports != (self.peer.port(), self.local.port()) {
            return None;
        }
        // An IPv6 packet may also have arrived before its hop limit was asked for.
        let arrived_ttl = if self.peer.is_ipv4() { packet.bytes.get(8).copied() } else { packet.hop_limit };
        Some((segment, arrived_ttl?))
    }

    /// Waits for the next segment of the peer, or the next answer of a router.
    ///
    /// # Errors
    /// If a socket cannot be read.
    pub(in crate::stream) async fn next(&mut self) -> Result<Received, RawSocketError> {
        loop {
            let (segments, messages) = (&self.segments, &self.messages);
            let (is_segment, received) = tokio::select! {
                received = messages.async_io(Interest::READABLE, || Packet::receive(messages)) => (false, received),
                received = segments.async_io(Interest::READABLE, || Packet::receive(segments)) => (true, received),
            };
            let packet = received.map_err(RawSocketError::of("receiving packets of a connection"))?;
            if !is_segment {
                if let Some(message) = self.message(packet) {
                    return Ok(Received::Message(message));
                }
            } else if let Some((segment, arrived_ttl)) = self.segment(&packet) {
                let at = self.time(&packet);
                return Ok(Received::Segment { segment, arrived_ttl, at });
            }
        }
    }

    /// Waits for the next answer of a router.
    ///
    /// # Errors
    /// If the socket cannot be read.
    pub(super) async fn next_message(&mut self) -> Result<IcmpMessage, RawSocketError> {
        loop {
            let socket = &self.messages;
            let received = socket.async_io(Interest::READABLE, || Packet::receive(socket)).await;
            let packet = received.map_err(RawSocketError::of("receiving ICMP messages"))?;
            if let Some(message) = self.message(packet) {
                return Ok(message);
            }
        }
    }

    /// The next answer of a router that has arrived; `None`: none has.
    pub(super) fn received_message(&mut self) -> Option<IcmpMessage> {
        let packet = Packet::receive(&self.messages).ok()?;
        self.message(packet)
    }

    fn message(&mut self, packet: Packet) -> Option<IcmpMessage> {
        let header_bytes = self.header_bytes(&packet.bytes)?;
        let at = self.time(&packet);
        let bytes = packet.bytes.get(header_bytes..)?.to_vec();
        Some(IcmpMessage { bytes, from: packet.from?, at })
    }

    /// When a packet has arrived.
    fn time(&mut self, packet: &Packet) -> Timestamp {
        let now = Clock::now();
        let earliest = now - ANSWER_AGE_MAX;
        packet.timestamp.map_or(now, |timestamp| self.clock.monotonic_of(timestamp, earliest, now))
    }

    /// Length of the IP header in a received packet.
    fn header_bytes(&self, bytes: &[u8]) -> Option<usize> {
        match self.peer.is_ipv4() {
            true => bytes.first().map(|first| usize::from(first & 15) * 4),
            false => Some(0),
        }
    }
}

/// Opens a raw socket at the local address of a connection.
fn open(local: SocketAddr, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::RAW.nonblocking().cloexec(), Some(protocol))?;
    socket.bind(&without_port(local).into())?;
    Ok(socket)
}

/// Lets the runtime wait for the socket, which a type for another kind of socket serves as well.
fn registered(socket: Socket) -> Result<UdpSocket, RawSocketError> {
    UdpSocket::from_std(socket.into()).map_err(RawSocketError::of("waiting for a raw socket"))
}

/// Raw sockets have no port.
fn without_port(mut address: SocketAddr) -> SocketAddr {
    address.set_port(0);
    address
}

/// A received packet.
#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    from: Option<IpAddr>,
    timestamp: Option<WallTime>,
    /// `None` for IPv4, whose header has it.
    hop_limit: Option<u8>,
}

impl Packet {
    fn receive(socket: &UdpSocket) -> io::Result<Self> {
        let (mut bytes, mut control) = (vec![0; PACKET_BYTES], [0; CONTROL_BYTES]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        // The length of a packet of which only a part is read.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let received = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let (mut timestamp, mut hop_limit) = (None, None);
        for message in received.cmsgs().into_iter().flatten() {
            timestamp = timestamp.or_else(|| kernel::timestamp_of(&message));
            if let ControlMessageOwned::Ipv6HopLimit(found) = message {
                hop_limit = u8::try_from(found).ok();
            }
        }
        let from = received.address.as_ref().and_then(address_of);
        let length = received.bytes;
        // Of a long segment only the length of its data matters.
        bytes.resize(length, 0);
        Ok(Self { bytes, from, timestamp, hop_limit })
    }
}

fn address_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}
