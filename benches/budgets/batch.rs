//! Receiving and sending many datagrams per system call, with no other work.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;

/// Length of the longest datagram in the benchmarks.
const BYTES: usize = 512;
const CONTROL_BYTES: usize = 256;
/// Receive buffer that loses nothing while a loop sleeps; the kernel grants at most net.core.rmem_max.
const RECEIVE_BUFFER: libc::c_uint = 4 << 20;

/// Datagrams with their peer addresses.
pub(crate) struct Batch {
    slots: Vec<Slot>,
    parts: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Slot {
    control: [u8; CONTROL_BYTES],
    name: libc::sockaddr_in,
    bytes: [u8; BYTES],
    length: usize,
}

/// Ancillary data of a datagram.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct KernelInfo {
    /// Timestamp of arrival or departure, in nanoseconds since 1970.
    pub(crate) timestamp: Option<u64>,
    /// On the error queue: the number of datagrams sent before it.
    pub(crate) number: Option<u32>,
}

impl Batch {
    #[expect(unsafe_code, reason = "the kernel's structures are plain data; all zeros is their empty value")]
    pub(crate) fn new(room: usize) -> Self {
        // SAFETY: all of them are integers, arrays of integers and pointers, for which all zeros is valid.
        unsafe {
            Self {
                slots: vec![std::mem::zeroed(); room],
                parts: vec![std::mem::zeroed(); room],
                headers: vec![std::mem::zeroed(); room],
            }
        }
    }

    /// The datagram in a slot.
    pub(crate) fn bytes(&self, index: usize) -> &[u8] {
        &self.slots[index].bytes[..self.slots[index].length]
    }

    /// The datagram in a slot, mutable.
    pub(crate) fn bytes_mut(&mut self, index: usize) -> &mut [u8] {
        let Slot { bytes, length, .. } = &mut self.slots[index];
        &mut bytes[..*length]
    }

    /// Puts a datagram into a slot.
    pub(crate) fn put(&mut self, index: usize, to: SocketAddrV4, datagram: &[u8]) {
        let slot = &mut self.slots[index];
        slot.name.sin_family = libc::sa_family_t::try_from(libc::AF_INET).expect("2");
        slot.name.sin_port = to.port().to_be();
        slot.name.sin_addr.s_addr = to.ip().to_bits().to_be();
        slot.bytes[..datagram.len()].copy_from_slice(datagram);
        slot.length = datagram.len();
    }

    /// Receives pending datagrams without waiting; returns their number.
    pub(crate) fn receive(&mut self, socket: &UdpSocket, flags: libc::c_int) -> usize {
        for index in 0..self.slots.len() {
            self.point(index, BYTES, CONTROL_BYTES);
        }
        let count = self.call(socket, self.slots.len(), flags, Call::In);
        for index in 0..count {
            self.slots[index].length = self.headers[index].msg_len as usize;
        }
        count
    }

    /// Sends the first `count` datagrams; returns how many were sent.
    pub(crate) fn send(&mut self, socket: &UdpSocket, count: usize) -> usize {
        for index in 0..count {
            self.point(index, self.slots[index].length, 0);
        }
        self.call(socket, count, 0, Call::Out)
    }

    fn point(&mut self, index: usize, length: usize, control: usize) {
        let slot = &mut self.slots[index];
        self.parts[index] = libc::iovec { iov_base: slot.bytes.as_mut_ptr().cast(), iov_len: length };
        let header = &mut self.headers[index].msg_hdr;
        header.msg_name = (&raw mut slot.name).cast();
        header.msg_namelen = libc::socklen_t::try_from(size_of::<libc::sockaddr_in>()).expect("16");
        header.msg_iov = &raw mut self.parts[index];
        header.msg_iovlen = 1;
        header.msg_control = slot.control.as_mut_ptr().cast();
        header.msg_controllen = control;
    }

    #[expect(unsafe_code, reason = "recvmmsg and sendmmsg")]
    fn call(&mut self, socket: &UdpSocket, count: usize, flags: libc::c_int, direction: Call) -> usize {
        let (socket, flags) = (socket.as_raw_fd(), flags | libc::MSG_DONTWAIT);
        let count = libc::c_uint::try_from(count).expect("batches are small");
        let headers = self.headers.as_mut_ptr();
        // SAFETY: the first `count` headers point at slots of this batch, which are alive and as long as
        // stated.
        let done = unsafe {
            match direction {
                Call::In => libc::recvmmsg(socket, headers, count, flags, std::ptr::null_mut()),
                Call::Out => libc::sendmmsg(socket, headers, count, flags),
            }
        };
        usize::try_from(done).unwrap_or(0)
    }

    /// Ancillary data of a received datagram.
    #[expect(unsafe_code, reason = "the kernel's own layout")]
    pub(crate) fn kernel_info(&self, index: usize) -> KernelInfo {
        let header = &raw const self.headers[index].msg_hdr;
        let mut kernel_info = KernelInfo::default();
        // SAFETY: recvmmsg filled the header; its control buffer is alive, and the macros stay within the
        // stated length.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(header);
            while !message.is_null() {
                let data = libc::CMSG_DATA(message);
                match ((*message).cmsg_level, (*message).cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_TIMESTAMPING) => {
                        let time = data.cast::<libc::timespec>().read_unaligned();
                        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
                        kernel_info.timestamp =
                            Some(seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0));
                    }
                    (libc::IPPROTO_IP, libc::IP_RECVERR) => {
                        let error = data.cast::<libc::sock_extended_err>().read_unaligned();
                        kernel_info.number = Some(error.ee_data);
                    }
                    _ => {}
                }
                message = libc::CMSG_NXTHDR(header, message);
            }
        }
        kernel_info
    }
}

#[derive(Clone, Copy)]
enum Call {
    In,
    Out,
}

/// Which datagrams of a socket get kernel timestamps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timestamps {
    None,
    Received,
    Both,
}

/// A socket on 127.0.0.1.
pub(crate) fn socket(timestamps: Timestamps) -> io::Result<UdpSocket> {
    socket_at(Ipv4Addr::LOCALHOST, timestamps)
}

/// A socket on an address, on a port chosen by the kernel.
pub(crate) fn socket_at(address: Ipv4Addr, timestamps: Timestamps) -> io::Result<UdpSocket> {
    prepared(UdpSocket::bind((address, 0))?, timestamps)
}

/// Sets timestamping and buffer size of an open socket.
pub(crate) fn prepared(socket: UdpSocket, timestamps: Timestamps) -> io::Result<UdpSocket> {
    let either = libc::SOF_TIMESTAMPING_SOFTWARE | libc::SOF_TIMESTAMPING_RX_SOFTWARE;
    let flags = match timestamps {
        Timestamps::None => 0,
        Timestamps::Received => either,
        Timestamps::Both => {
            either
                | libc::SOF_TIMESTAMPING_TX_SOFTWARE
                | libc::SOF_TIMESTAMPING_OPT_ID
                | libc::SOF_TIMESTAMPING_OPT_TSONLY
        }
    };
    set(&socket, libc::SO_TIMESTAMPING, flags)?;
    set(&socket, libc::SO_RCVBUF, RECEIVE_BUFFER)?;
    Ok(socket)
}

#[expect(unsafe_code, reason = "std lacks these options")]
fn set(socket: &UdpSocket, name: libc::c_int, value: libc::c_uint) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).expect("four");
    // SAFETY: the descriptor is open, and the value is an int of the stated length.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, (&raw const value).cast(), length)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The local IPv4 address of a socket.
pub(crate) fn address(socket: &UdpSocket) -> io::Result<SocketAddrV4> {
    match socket.local_addr()? {
        SocketAddr::V4(address) => Ok(address),
        SocketAddr::V6(address) => Err(io::Error::other(format!("{address} is not IPv4"))),
    }
}

/// Waits until a socket is readable or has an error, at most `at_most`.
#[expect(unsafe_code, reason = "ppoll of one socket")]
pub(crate) fn wait(socket: &UdpSocket, at_most: std::time::Duration) {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(at_most.as_secs()).expect("waits are short"),
        tv_nsec: at_most.subsec_nanos().into(),
    };
    // SAFETY: one pollfd, alive; no signal mask.
    unsafe {
        libc::ppoll(&raw mut polled, 1, &raw const time, std::ptr::null());
    }
}
