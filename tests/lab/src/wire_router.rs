//! Routers inside a wire, which answer datagrams whose TTL ends there. Unlike those of the kernel, they
//! attach what a trial wants to their ICMP errors, correctly or not.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::frame::{Datagram, ETHERNET, ICMP, ICMP_V6, IPV6, internet_checksum};

/// A router inside a wire.
#[derive(Debug, Clone)]
pub struct WireRouter {
    /// The address from which it answers over IPv4.
    pub v4: Ipv4Addr,
    /// The address from which it answers over IPv6.
    pub v6: Ipv6Addr,
    /// How many bytes after the UDP header it quotes.
    pub quoted_payload_bytes: usize,
    /// Length to which it pads the quotation with zeros; 0: it does not.
    pub padded_bytes: usize,
    /// Whether its errors have the length of the quotation (RFC 4884 section 4).
    pub has_length: bool,
    /// What follows the quotation.
    pub extensions: Vec<u8>,
}

/// Initial TTL of the errors.
const TTL: u8 = 255;

impl WireRouter {
    /// A router with one address per family that quotes everything and attaches nothing.
    #[must_use]
    pub fn plain(number: u8) -> Self {
        Self {
            v4: Ipv4Addr::new(10, 78, 0, number),
            v6: Ipv6Addr::new(0xfd78, 0, 0, 0, 0, 0, 0, number.into()),
            quoted_payload_bytes: usize::MAX,
            padded_bytes: 0,
            has_length: false,
            extensions: Vec::new(),
        }
    }

    /// A router that attaches extensions as RFC 4884 says.
    #[must_use]
    pub fn extended(number: u8, extensions: Vec<u8>) -> Self {
        Self { padded_bytes: 128, has_length: true, extensions, ..Self::plain(number) }
    }

    /// The address from which it answers.
    #[must_use]
    pub fn address(&self, is_v4: bool) -> IpAddr {
        if is_v4 { self.v4.into() } else { self.v6.into() }
    }

    /// The frame with a "time exceeded" error about the datagram of a frame.
    pub(crate) fn time_exceeded(&self, frame: &[u8], datagram: &Datagram) -> Vec<u8> {
        let is_v6 = frame[12..14] == IPV6;
        let headers = datagram.bytes - datagram.payload_bytes();
        let quoted = headers + self.quoted_payload_bytes.min(datagram.payload_bytes());
        let mut quotation = frame[ETHERNET..ETHERNET + quoted].to_vec();
        quotation.resize(quoted.max(self.padded_bytes), 0);
        // The length counts words of 32 bits, in ICMPv6 of 64.
        let word = if is_v6 { 8 } else { 4 };
        let mut length = 0;
        if self.has_length {
            quotation.resize(quotation.len().next_multiple_of(word), 0);
            length = u8::try_from(quotation.len() / word).expect("datagrams of probes are short");
        }
        let head = if is_v6 { [3, 0, 0, 0, length, 0, 0, 0] } else { [11, 0, 0, 0, 0, length, 0, 0] };
        let mut message = [&head[..], &quotation, &self.extensions].concat();
        // To the sender's interface, from the one that it sent to.
        let ethernet = [&frame[6..12], &frame[..6], &frame[12..14]].concat();
        let bytes = u16::try_from(message.len()).expect("an error is short");
        let mut header = Vec::new();
        let covered = if is_v6 {
            let sender = &frame[ETHERNET + 8..ETHERNET + 24];
            let addresses = [&self.v6.octets(), sender].concat();
            header.extend([0x60, 0, 0, 0]);
            header.extend(bytes.to_be_bytes());
            header.extend([ICMP_V6, TTL]);
            header.extend(&addresses);
            [&addresses[..], &u32::from(bytes).to_be_bytes(), &[0, 0, 0, ICMP_V6], &message].concat()
        } else {
            header.extend([0x45, 0]);
            header.extend((20 + bytes).to_be_bytes());
            header.extend([0, 0, 0, 0, TTL, ICMP, 0, 0]);
            header.extend(self.v4.octets());
            header.extend(&frame[ETHERNET + 12..ETHERNET + 16]);
            let checksum = internet_checksum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            message.clone()
        };
        message[2..4].copy_from_slice(&internet_checksum(&covered).to_be_bytes());
        [ethernet, header, message].concat()
    }
}
