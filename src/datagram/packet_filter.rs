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
/// for a field is not received. At most 100 fields.
///
/// # Errors
/// If the kernel refuses the filter.
pub(crate) fn accept_only(socket: &Socket, start: FilterStart, fields: &[FilterField]) -> io::Result<()> {
    let mut program = vec![match start {
        FilterStart::AfterIpv4Header => SockFilter::new(LOAD_HEADER_LENGTH, 0, 0, 0),
        FilterStart::FirstByte => SockFilter::new(LOAD_INDEX, 0, 0, 0),
    }];
    for (index, field) in fields.iter().enumerate() {
        let (load, at, value) = match *field {
            FilterField::Byte(at, value) => (LOAD_BYTE_AT_INDEX, at, value.into()),
            FilterField::Half(at, value) => (LOAD_HALF_AT_INDEX, at, value.into()),
        };
        // Over the two instructions of each field that follows, and the acceptance.
        let to_rejection = u8::try_from(2 * (fields.len() - 1 - index) + 1).expect("few fields");
        program.push(SockFilter::new(load, 0, 0, at));
        program.push(SockFilter::new(IS_EQUAL, 0, to_rejection, value));
    }
    program.push(SockFilter::new(RETURN, 0, 0, u32::MAX));
    program.push(SockFilter::new(RETURN, 0, 0, 0));
    socket.attach_filter(&program)
}
