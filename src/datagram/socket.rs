//! Sockets with timestamps and all other per-datagram metadata enabled, read and written in batches.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use socket2::{Domain, Protocol, Socket as Socket2, Type};

use pathmeter_proto::machine::SENT_TTL;

use super::cmsg::{self, CONTROL_BYTES, ControlBuffer, DatagramMetadata, SendOptions};
use super::socket_drops::ChecksumErrors;

/// An unconnected socket of one address family.
#[derive(Debug)]
pub struct Socket {
    socket: Socket2,
    kind: SocketKind,
    address: SocketAddr,
    fragments: FragmentPolicy,
    drops: u32,
    /// Counts checksum errors; `Some` if the socket's drop counter includes damaged datagrams.
    checksum_errors: Option<ChecksumErrors>,
}

/// The protocol of a socket and its socket type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SocketKind {
    /// UDP.
    Udp,
    /// ICMP echo over a ping socket.
    Ping,
    /// ICMP echo over a raw socket.
    Raw,
}

/// The address and options of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Binding {
    /// Local address; the kernel chooses the port if it is 0.
    pub address: SocketAddr,
    /// Whether to forbid fragmentation.
    pub dont_fragment: bool,
    /// Whether to receive ICMP errors: about requests, and about replies whose TTL ends at a router.
    pub errors: bool,
    /// Whether to receive the destination address of datagrams, from which replies are sent. It costs time
    /// per datagram, and only responders need it.
    pub destinations: bool,
}

/// An error in opening a socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel refused an operation.
    #[error("{operation} {address}: {cause}{remedy}", remedy = remedy(cause, *address))]
    Refused {
        /// The operation.
        operation: &'static str,
        /// The address of the socket.
        address: SocketAddr,
        /// The error of the kernel.
        cause: io::Error,
    },
    /// Neither ping sockets nor raw sockets are permitted.
    #[error(
        "group {group} may not open ICMP sockets (net.ipv4.ping_group_range is \"{range}\"): run sysctl -w \
         net.ipv4.ping_group_range='0 2147483647' or grant CAP_NET_RAW"
    )]
    IcmpNotPermitted {
        /// The effective group of the process.
        group: u32,
        /// The range of groups that may open ping sockets; empty if the first is above the second.
        range: String,
    },
}

impl SocketError {
    /// Whether this host does not support the address family.
    #[must_use]
    pub fn is_unsupported_family(&self) -> bool {
        match self {
            Self::Refused { address, cause, .. } => {
                cause.raw_os_error() == Some(libc::EAFNOSUPPORT)
                    || (address.is_ipv6() && cause.raw_os_error() == Some(libc::EADDRNOTAVAIL))
            }
            Self::IcmpNotPermitted { .. } => false,
        }
    }
}

fn remedy(source: &io::Error, address: SocketAddr) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EACCES) if address.port() < 1024 => " (ports below 1024 need CAP_NET_BIND_SERVICE)",
        Some(libc::EADDRINUSE) => " (is another pathmeter running?)",
        Some(libc::EADDRNOTAVAIL) => " (no interface has this address)",
        Some(_) | None => "",
    }
}

/// Requested size of socket buffers in bytes; the kernel grants at most net.core.rmem_max and wmem_max.
const BUFFER_BYTES: usize = 4 << 20;

/// Options that report where extensions begin in an ICMP error (Linux 5.9; not yet in `libc`).
const IP_RECVERR_RFC4884: libc::c_int = 26;
const IPV6_RECVERR_RFC4884: libc::c_int = 31;

/// `SO_MEMINFO` and the index of its drop counter (linux/sock_diag.h).
const SO_MEMINFO: libc::c_int = 55;
const SK_MEMINFO_DROPS: usize = 8;

impl Socket {
    /// Binds a UDP socket.
    ///
    /// # Errors
    /// [`SocketError`] with the operation and the address.
    pub fn bind(binding: &Binding, timestamps: TimestampMatching) -> Result<Self, SocketError> {
        let address = binding.address;
        let failed = |operation| move |cause| SocketError::Refused { operation, address, cause };
        let domain = Domain::for_address(address);
        let socket = Socket2::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))
            .map_err(failed("opening a socket for"))?;
        if address.is_ipv6() {
            socket.set_only_v6(true).map_err(failed("setting IPV6_V6ONLY for"))?;
        }
        Self::prepare(socket, SocketKind::Udp, binding, timestamps)
    }

    /// Sets the options of an open socket, and binds it.
    pub(super) fn prepare(
        socket: Socket2,
        kind: SocketKind,
        binding: &Binding,
        timestamps: TimestampMatching,
    ) -> Result<Self, SocketError> {
        let address = binding.address;
        let failed = |operation| move |cause| SocketError::Refused { operation, address, cause };
        // Best effort: the kernel grants at most its configured limit.
        let _ = socket.set_recv_buffer_size(BUFFER_BYTES);
        let _ = socket.set_send_buffer_size(BUFFER_BYTES);
        enable(&socket, binding, timestamps).map_err(failed("setting options of"))?;
        socket.bind(&address.into()).map_err(failed("binding"))?;
        let bound = socket.local_addr().map_err(failed("reading the local address of"))?;
        let address = bound.as_socket().unwrap_or(address);
        Ok(Self {
            socket,
            kind,
            address,
            fragments: FragmentPolicy::of(binding),
            drops: 0,
            checksum_errors: None,
        })
    }

    pub(super) fn kind(&self) -> SocketKind {
        self.kind
    }

    /// Sets the identifier of a raw socket's echo requests.
    pub(super) fn set_identifier(&mut self, identifier: u16) {
        self.address.set_port(identifier);
        self.checksum_errors = self.address.is_ipv6().then(ChecksumErrors::new);
    }

    /// The bound address. The port of an ICMP socket is its identifier.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Datagrams that the kernel dropped at this socket since the last call; for UDP this includes damaged
    /// datagrams.
    pub fn new_drops(&mut self) -> u32 {
        let Some(drops) = drop_counter(&self.socket) else { return 0 };
        let dropped = drops.wrapping_sub(std::mem::replace(&mut self.drops, drops));
        self.checksum_errors.as_mut().map_or(dropped, |checksum_errors| checksum_errors.undamaged(dropped))
    }

    /// Sends with fragmentation forbidden, and restores the socket's own policy afterwards.
    ///
    /// # Errors
    /// The errors of `send`, and of changing the policy; in the latter case nothing was sent.
    pub(super) fn send_unfragmented<T>(&self, send: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.fragments == FragmentPolicy::Never {
            return send();
        }
        let is_v4 = self.address.is_ipv4();
        FragmentPolicy::Never.apply(&self.socket, is_v4)?;
        let sent = send();
        // Cannot fail: the kernel accepted this setting when the socket was bound.
        let _ = self.fragments.apply(&self.socket, is_v4);
        sent
    }

    /// The descriptor, for `poll`.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How a socket treats datagrams that are larger than the MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FragmentPolicy {
    /// They are fragmented, by this host and by routers.
    Allowed,
    /// They are fragmented, and ICMP errors about datagrams that were sent unfragmented are still received.
    AllowedWithErrors,
    /// They are not sent, or a router drops them.
    Never,
}

impl FragmentPolicy {
    fn of(binding: &Binding) -> Self {
        match (binding.dont_fragment, binding.errors) {
            (true, _) => Self::Never,
            (false, true) => Self::AllowedWithErrors,
            (false, false) => Self::Allowed,
        }
    }

    fn apply(self, socket: &Socket2, is_v4: bool) -> io::Result<()> {
        let set_v4 = |value| set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value);
        let set_v6 = |value| set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, value);
        match (self, is_v4) {
            (Self::Allowed, true) => set_v4(libc::IP_PMTUDISC_DONT),
            // An IPv4 socket with DONT does not receive "fragmentation needed" errors (Linux 6.18,
            // __udp4_lib_err), and when the error arrives the socket has its own policy again. OMIT fragments
            // too, and considers only the interface's MTU.
            (Self::AllowedWithErrors, true) => {
                set_v4(libc::IP_PMTUDISC_OMIT).or_else(|_| set_v4(libc::IP_PMTUDISC_DONT))
            }
            (Self::Never, true) => set_v4(libc::IP_PMTUDISC_PROBE),
            // In IPv6 it is the reverse: sockets with DONT receive the error, those with OMIT do not.
            (Self::Allowed | Self::AllowedWithErrors, false) => set_v6(libc::IPV6_PMTUDISC_DONT),
            (Self::Never, false) => set_v6(libc::IPV6_PMTUDISC_PROBE),
        }
    }
}

/// How a transmit timestamp is matched to its datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampMatching {
    /// By an identifier that each datagram gets and its timestamp carries (Linux 6.13).
    ById,
    /// By the datagram's bytes, which the kernel returns with the timestamp.
    ByPayload,
}

impl TimestampMatching {
    /// Detects what this kernel supports, by sending a datagram from a loopback socket to itself.
    #[must_use]
    pub fn detect() -> Self {
        let sends_with_id = || -> Option<()> {
            let binding = Binding {
                address: ([127, 0, 0, 1], 0).into(),
                dont_fragment: false,
                errors: false,
                destinations: false,
            };
            let socket = Socket::bind(&binding, Self::ById).ok()?;
            let options = SendOptions {
                to: socket.address(),
                from: None,
                tos: 0,
                ttl: None,
                timestamp: true,
                timestamp_id: Some(1),
                segment: None,
            };
            let mut batch = SendBatch::new(1);
            batch.push(&options, 0, 4);
            batch.send(&socket, &[0; 4], 0).ok().map(|_| ())
        };
        if sends_with_id().is_some() { Self::ById } else { Self::ByPayload }
    }
}

fn enable(socket: &Socket2, binding: &Binding, timestamps: TimestampMatching) -> io::Result<()> {
    use libc::{IPPROTO_IP, IPPROTO_IPV6, SOL_SOCKET};
    let reporting = libc::SOF_TIMESTAMPING_RX_SOFTWARE
        | libc::SOF_TIMESTAMPING_SOFTWARE
        | libc::SOF_TIMESTAMPING_OPT_ID
        | match timestamps {
            TimestampMatching::ById => libc::SOF_TIMESTAMPING_OPT_TSONLY,
            TimestampMatching::ByPayload => 0,
        };
    let flags = libc::c_int::try_from(reporting).expect("the flags are below 2¹⁶");
    // Without kernel timestamps this process reads the clock itself; metrics count such datagrams.
    let _ = set(socket, SOL_SOCKET, libc::SO_TIMESTAMPING, flags);
    let errors = i32::from(binding.errors);
    let pktinfo = i32::from(binding.destinations);
    if binding.address.is_ipv4() {
        set(socket, IPPROTO_IP, libc::IP_PKTINFO, pktinfo)?;
        set(socket, IPPROTO_IP, libc::IP_RECVTTL, 1)?;
        set(socket, IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        set(socket, IPPROTO_IP, libc::IP_TTL, SENT_TTL.into())?;
        set(socket, IPPROTO_IP, libc::IP_RECVERR, errors)?;
    } else {
        set(socket, IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, pktinfo)?;
        set(socket, IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1)?;
        set(socket, IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        set(socket, IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, SENT_TTL.into())?;
        set(socket, IPPROTO_IPV6, libc::IPV6_RECVERR, errors)?;
    }
    // Older kernels refuse it; extensions are not known then.
    let _ = set_icmp_extensions(socket, binding.address.is_ipv4(), binding.errors);
    FragmentPolicy::of(binding).apply(socket, binding.address.is_ipv4())
}

/// Requests that ICMP errors on the error queue say where extensions begin (RFC 4884), or ends that.
///
/// # Errors
/// The kernel does not know the option (Linux before 5.9).
pub(crate) fn set_icmp_extensions(socket: &impl AsRawFd, is_v4: bool, on: bool) -> io::Result<()> {
    match is_v4 {
        true => set(socket, libc::IPPROTO_IP, IP_RECVERR_RFC4884, on.into()),
        false => set(socket, libc::IPPROTO_IPV6, IPV6_RECVERR_RFC4884, on.into()),
    }
}

/// Sets an option whose value is an int.
#[expect(unsafe_code, reason = "socket2 lacks these options")]
pub(crate) fn set(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("four");
    // SAFETY: the descriptor is open and the value is an int of the stated length.
    let outcome =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[expect(unsafe_code, reason = "socket2 lacks SO_MEMINFO")]
pub(crate) fn drop_counter(socket: &impl AsRawFd) -> Option<u32> {
    let mut values = [0_u32; SK_MEMINFO_DROPS + 1];
    let mut length = libc::socklen_t::try_from(size_of_val(&values)).expect("36");
    // SAFETY: the descriptor is open, and `values` is as long as `length` says.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    let is_whole = outcome == 0 && length as usize == size_of_val(&values);
    is_whole.then_some(values[SK_MEMINFO_DROPS])
}

/// Datagrams per system call when reading.
pub(super) const RECEIVE_BATCH: usize = 32;

/// Largest datagram that is read whole; longer ones are truncated and marked.
const DATAGRAM_BYTES: usize = 9_216;

/// Buffers for a batch of datagrams and their metadata.
pub(super) struct ReceiveBatch {
    headers: Vec<libc::mmsghdr>,
    parts: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<ControlBuffer>,
    bytes: Vec<u8>,
}

/// A received datagram of a batch.
#[derive(Debug)]
pub(super) struct ReceivedDatagram<'a> {
    pub(super) bytes: &'a [u8],
    /// Source address; `None` if the kernel does not report it, as for timestamps.
    pub(super) from: Option<SocketAddr>,
    pub(super) is_truncated: bool,
    pub(super) metadata: DatagramMetadata,
}

impl ReceiveBatch {
    #[expect(unsafe_code, reason = "the kernel's structures are plain data; all zeros is their empty value")]
    pub(super) fn new() -> Self {
        // SAFETY: mmsghdr, iovec and sockaddr_storage are plain C data for which all zeros is valid.
        let (header, part, name) = unsafe {
            (
                std::mem::zeroed::<libc::mmsghdr>(),
                std::mem::zeroed::<libc::iovec>(),
                std::mem::zeroed::<libc::sockaddr_storage>(),
            )
        };
        Self {
            headers: vec![header; RECEIVE_BATCH],
            parts: vec![part; RECEIVE_BATCH],
            names: vec![name; RECEIVE_BATCH],
            controls: vec![ControlBuffer([0; CONTROL_BYTES]); RECEIVE_BATCH],
            bytes: vec![0; RECEIVE_BATCH * DATAGRAM_BYTES],
        }
    }

    /// Reads the available datagrams without waiting; `errors` reads the error queue instead. Returns their
    /// number; fewer than [`RECEIVE_BATCH`] means that the queue is empty.
    #[expect(unsafe_code, reason = "recvmmsg")]
    pub(super) fn receive(&mut self, socket: &Socket, errors: bool) -> io::Result<usize> {
        let name_length = libc::socklen_t::try_from(size_of::<libc::sockaddr_storage>()).expect("128");
        for index in 0..RECEIVE_BATCH {
            let bytes = &mut self.bytes[index * DATAGRAM_BYTES..(index + 1) * DATAGRAM_BYTES];
            self.parts[index] = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: DATAGRAM_BYTES };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = name_length;
            header.msg_iov = &raw mut self.parts[index];
            header.msg_iovlen = 1;
            header.msg_control = self.controls[index].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL_BYTES;
            header.msg_flags = 0;
        }
        let flags = libc::MSG_DONTWAIT | if errors { libc::MSG_ERRQUEUE } else { 0 };
        let room = libc::c_uint::try_from(RECEIVE_BATCH).expect("32");
        // SAFETY: every header points at buffers of this batch, which are valid and have the stated lengths.
        let read = unsafe {
            libc::recvmmsg(
                socket.socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                room,
                flags,
                std::ptr::null_mut(),
            )
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// The datagram at `index` of the last read.
    #[expect(unsafe_code, reason = "reads the address that the kernel wrote")]
    pub(super) fn at(&self, index: usize) -> ReceivedDatagram<'_> {
        let header = &self.headers[index];
        let length = (header.msg_len as usize).min(DATAGRAM_BYTES);
        let name_length = (header.msg_hdr.msg_namelen as usize).min(size_of::<libc::sockaddr_storage>());
        // SAFETY: the name is a sockaddr_storage of this batch, of which the kernel wrote `name_length`
        // bytes; the header was filled by recvmmsg and points at a control buffer of this batch.
        let (from, metadata) = unsafe {
            (cmsg::address((&raw const self.names[index]).cast(), name_length), cmsg::read(&header.msg_hdr))
        };
        ReceivedDatagram {
            bytes: &self.bytes[index * DATAGRAM_BYTES..][..length],
            from,
            is_truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            metadata,
        }
    }
}

/// Buffers for a batch of datagrams to send from one socket.
pub(super) struct SendBatch {
    headers: Vec<libc::mmsghdr>,
    parts: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<ControlBuffer>,
    /// Offset in the arena, length, and length of the control messages, for each datagram.
    spans: Vec<(usize, usize, usize)>,
}

impl SendBatch {
    /// Allocates room for `limit` datagrams.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            headers: Vec::with_capacity(limit),
            parts: Vec::with_capacity(limit),
            names: Vec::with_capacity(limit),
            controls: Vec::with_capacity(limit),
            spans: Vec::with_capacity(limit),
        }
    }

    pub(super) fn clear(&mut self) {
        self.names.clear();
        self.controls.clear();
        self.spans.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    /// Adds the datagram at `at..at + length` of the arena.
    pub(super) fn push(&mut self, options: &SendOptions, at: usize, length: usize) {
        let mut control = ControlBuffer([0; CONTROL_BYTES]);
        let control_length = cmsg::write(options, &mut control);
        self.controls.push(control);
        self.names.push(sockaddr(options.to));
        self.spans.push((at, length, control_length));
    }

    /// Sends the datagrams from index `first` on. Returns the number that was sent, which is at least one.
    ///
    /// # Errors
    /// The error of the first datagram; later ones were not tried.
    #[expect(unsafe_code, reason = "sendmmsg")]
    pub(super) fn send(&mut self, socket: &Socket, arena: &[u8], first: usize) -> io::Result<usize> {
        self.headers.clear();
        self.parts.clear();
        for (at, length, _) in &self.spans[first..] {
            let bytes = &arena[*at..at + length];
            self.parts.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: *length });
        }
        for (index, (_, _, control_length)) in self.spans[first..].iter().enumerate() {
            let name = &raw mut self.names[first + index];
            let name_length = match i32::from(self.names[first + index].ss_family) {
                libc::AF_INET => size_of::<libc::sockaddr_in>(),
                _ => size_of::<libc::sockaddr_in6>(),
            };
            let msg_hdr = libc::msghdr {
                msg_name: name.cast(),
                msg_namelen: libc::socklen_t::try_from(name_length).expect("at most 28"),
                msg_iov: &raw mut self.parts[index],
                msg_iovlen: 1,
                msg_control: self.controls[first + index].0.as_mut_ptr().cast(),
                msg_controllen: *control_length,
                msg_flags: 0,
            };
            self.headers.push(libc::mmsghdr { msg_hdr, msg_len: 0 });
        }
        let count = libc::c_uint::try_from(self.headers.len()).unwrap_or(libc::c_uint::MAX);
        // SAFETY: every header points at buffers of this batch and at bytes of the arena, all valid and of
        // the stated lengths; `parts` and `names` were filled before and do not move while the headers point
        // at them.
        let sent = unsafe {
            libc::sendmmsg(socket.socket.as_raw_fd(), self.headers.as_mut_ptr(), count, libc::MSG_DONTWAIT)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "address families are small numbers")]
const INET: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "address families are small numbers")]
const INET6: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;

#[expect(unsafe_code, reason = "an address in the kernel's layout")]
fn sockaddr(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: all zeros is a valid sockaddr_storage.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let at = &raw mut storage;
    match address {
        SocketAddr::V4(address) => {
            let name = libc::sockaddr_in {
                sin_family: INET,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: address.ip().to_bits().to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage is large enough, and aligned, for every kind of address.
            unsafe { at.cast::<libc::sockaddr_in>().write(name) };
        }
        SocketAddr::V6(address) => {
            let name = libc::sockaddr_in6 {
                sin6_family: INET6,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { at.cast::<libc::sockaddr_in6>().write(name) };
        }
    }
    storage
}

/// The addresses to listen on: for `[::]` the IPv4 and the IPv6 wildcard address, otherwise the address
/// itself.
#[must_use]
pub fn both_families(address: SocketAddr) -> Vec<SocketAddr> {
    match address.ip() {
        IpAddr::V6(ip) if ip.is_unspecified() => vec![([0, 0, 0, 0], address.port()).into(), address],
        IpAddr::V4(_) | IpAddr::V6(_) => vec![address],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest payload that fits the loopback MTU of 65,536 bytes over IPv6; over IPv4 no datagram is larger.
    const FITTING_BYTES: usize = 65_536 - 48;

    #[test]
    fn oversized_datagram_is_refused_unfragmented_and_the_socket_keeps_its_policy() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let address: SocketAddr = address.parse().unwrap();
            let binding = Binding { address, dont_fragment: false, errors: true, destinations: false };
            let Ok(socket) = Socket::bind(&binding, TimestampMatching::ByPayload) else { continue };
            let options = |to| SendOptions {
                to,
                from: None,
                tos: 0,
                ttl: None,
                timestamp: false,
                timestamp_id: None,
                segment: None,
            };
            let is_too_big = |sent: io::Result<usize>| {
                sent.is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE))
            };
            let arena = vec![0; FITTING_BYTES + 1];
            let mut batch = SendBatch::new(2);
            batch.push(&options(socket.address()), 0, FITTING_BYTES);
            assert_eq!(
                socket.send_unfragmented(|| batch.send(&socket, &arena, 0)).ok(),
                Some(1),
                "{address}"
            );
            if address.is_ipv6() {
                batch.clear();
                batch.push(&options(socket.address()), 0, arena.len());
                assert!(is_too_big(socket.send_unfragmented(|| batch.send(&socket, &arena, 0))));
                assert_eq!(batch.send(&socket, &arena, 0).ok(), Some(1), "it is sent as fragments");
            }
        }
    }
}
