//! Filters in the kernel that select what a raw socket receives.

use std::io;

use socket2::{SockFilter, Socket};

/// Where the offsets of fields count from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FilterStart {
    /// After the IPv4 header, which raw IPv4 sockets receive, and whose length is in its first byte.
    AfterIpv4Header,
    /// The first byte: raw IPv6 sockets receive no IP header.
    FirstByte,
}

/// A field of a packet, at an offset, with the value that it must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FilterField {
    /// One byte.
    Byte(u32, u8),
    /// One byte that has either value.
    EitherByte(u32, [u8; 2]),
    /// Two bytes in network order.
    Half(u32, u16),
}

// linux/bpf_common.h: BPF_LDX|BPF_B|BPF_MSH, BPF_LD|BPF_B|BPF_IND, BPF_LD|BPF_H|BPF_IND, BPF_LDX|BPF_IMM,
// BPF_JMP|BPF_JEQ, BPF_RET.
const LOAD_HEADER_LENGTH: u16 = 0xb1;
const LOAD_BYTE_AT_INDEX: u16 = 0x50;
const LOAD_HALF_AT_INDEX: u16 = 0x48;
const LOAD_INDEX: u16 = 0x01;
const IS_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Makes the socket receive only packets in which all fields have their values. A packet that is too short
/// for a field is not received. At most 80 fields.
///
/// # Errors
/// If the kernel refuses the filter.
pub(crate) fn accept_only(socket: &Socket, start: FilterStart, fields: &[FilterField]) -> io::Result<()> {
    let mut program = vec![match start {
        FilterStart::AfterIpv4Header => SockFilter::new(LOAD_HEADER_LENGTH, 0, 0, 0),
        FilterStart::FirstByte => SockFilter::new(LOAD_INDEX, 0, 0, 0),
    }];
    let tests: Vec<(u16, u32, Vec<u32>)> = fields
        .iter()
        .map(|field| match *field {
            FilterField::Byte(at, value) => (LOAD_BYTE_AT_INDEX, at, vec![value.into()]),
            FilterField::EitherByte(at, values) => (LOAD_BYTE_AT_INDEX, at, values.map(u32::from).into()),
            FilterField::Half(at, value) => (LOAD_HALF_AT_INDEX, at, vec![value.into()]),
        })
        .collect();
    let mut to_rejection: usize = 1 + tests.iter().map(|(_, _, values)| 1 + values.len()).sum::<usize>();
    for (load, at, values) in tests {
        program.push(SockFilter::new(load, 0, 0, at));
        to_rejection -= 1 + values.len();
        for (value, others) in values.iter().zip((0..values.len()).rev()) {
            let jump = |instructions: usize| u8::try_from(instructions).expect("few fields");
            // Over the other values if it is this one; if it is none, over all that follows.
            let if_not = if others == 0 { to_rejection } else { 0 };
            program.push(SockFilter::new(IS_EQUAL, jump(others), jump(if_not), *value));
        }
    }
    program.push(SockFilter::new(RETURN, 0, 0, u32::MAX));
    program.push(SockFilter::new(RETURN, 0, 0, 0));
    socket.attach_filter(&program)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use socket2::{Domain, Type};

    use super::*;

    #[test]
    fn packets_in_which_all_fields_have_their_values_are_received() {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        // The filter of a UDP socket sees its header of eight bytes.
        let fields =
            [FilterField::Byte(8, 7), FilterField::EitherByte(9, [1, 2]), FilterField::Half(10, 0x0304)];
        accept_only(&socket, FilterStart::FirstByte, &fields).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let socket = UdpSocket::from(OwnedFd::from(socket));
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let packets: [&[u8]; 8] = [
            &[7, 1, 3, 4, 1],
            &[8, 1, 3, 4, 2],
            &[7, 3, 3, 4, 3],
            &[7, 1, 3, 5, 4],
            &[7, 2, 4, 4, 5],
            &[7, 2, 3],
            &[],
            &[7, 2, 3, 4, 8],
        ];
        for packet in packets {
            sender.send_to(packet, socket.local_addr().unwrap()).unwrap();
        }
        let mut bytes = [0; 5];
        for expected in [packets[0], packets[7]] {
            let length = socket.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..length], expected);
        }
    }
}
