//! Interfaces that finish each datagram before they hand it over.

use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Commands of SIOCETHTOOL (linux/ethtool.h): transmit checksums, scatter and gather, and segmentation of any kind.
const COMMANDS: [u32; 5] = [0x17, 0x19, 0x1f, 0x22, 0x24];

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// Switches offloads of an interface of the current namespace off. With them a veth hands over datagrams whose checksum is
/// still to be computed, which a packet socket would pass on as they are.
///
/// # Panics
/// When there is no such interface.
#[expect(unsafe_code, reason = "SIOCETHTOOL has no safe wrapper")]
pub(crate) fn disable(interface: &str) {
    let socket_fd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
    for command in COMMANDS {
        let mut setting = EthtoolValue { command, value: 0 };
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_data = (&raw mut setting).cast();
        // SAFETY: the request is a filled ifreq whose data points at a live ethtool_value.
        let outcome = unsafe { libc::ioctl(socket_fd.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        let error = std::io::Error::last_os_error();
        // Some of them this kind of interface does not have.
        let is_absent = error.raw_os_error() == Some(libc::EOPNOTSUPP);
        assert!(outcome == 0 || is_absent, "switching offload {command:#x} of {interface} off: {error}");
    }
}
