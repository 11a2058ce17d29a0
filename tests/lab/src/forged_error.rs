//! ICMP errors that no router has sent, from any address and with any quotation.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

use crate::frame::{Datagram, ICMP, UDP, internet_checksum};
use crate::namespace::Namespace;

/// An ICMP "time exceeded" error over IPv4 about a UDP datagram.
#[derive(Debug, Clone)]
pub struct ForgedError {
    /// The address from which it seems to come.
    pub router: Ipv4Addr,
    /// The datagram that it quotes. The error goes to the source.
    pub datagram: Datagram,
    /// What it quotes after the UDP header.
    pub payload: Vec<u8>,
}

impl ForgedError {
    /// Sends it from a node.
    ///
    /// # Panics
    /// When the datagram is not UDP over IPv4.
    pub fn send(&self, node: &Namespace) {
        let SocketAddr::V4(source) = self.datagram.source else { panic!("IPv4 only") };
        let packet = self.packet();
        node.within(|| {
            let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
                .unwrap();
            let to = SockaddrIn::from(SocketAddrV4::new(*source.ip(), 0));
            sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty()).unwrap();
        });
    }

    fn packet(&self) -> Vec<u8> {
        let Datagram { source, destination, bytes, protocol, .. } = self.datagram;
        let (IpAddr::V4(from), IpAddr::V4(to)) = (source.ip(), destination.ip()) else { panic!("IPv4 only") };
        assert_eq!(protocol, UDP);
        // The TTL of a datagram for which there is a "time exceeded" has ended.
        let mut quotation = header(from, to, UDP, 1, bytes);
        let length = u16::try_from(bytes - quotation.len()).expect("a datagram is shorter");
        for field in [source.port(), destination.port(), length, 0] {
            quotation.extend(field.to_be_bytes());
        }
        quotation.extend(&self.payload);
        let mut message = [&[11, 0, 0, 0, 0, 0, 0, 0][..], &quotation].concat();
        let checksum = internet_checksum(&message);
        message[2..4].copy_from_slice(&checksum.to_be_bytes());
        [header(self.router, from, ICMP, 64, 20 + message.len()), message].concat()
    }
}

/// An IPv4 header without options.
fn header(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, ttl: u8, bytes: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(u16::try_from(bytes).expect("a datagram is shorter").to_be_bytes());
    header.extend([0, 0, 0, 0, ttl, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let checksum = internet_checksum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}
