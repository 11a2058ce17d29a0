//! Switching interface offloads off.

use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Commands of SIOCETHTOOL (linux/ethtool.h): transmit checksums, scatter and gather, and segmentation of any
/// kind.
const COMMANDS: [u32; 5] = [0x17, 0x19, 0x1f, 0x22, 0x24];

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    value: u32,
}

/// Switches off the offloads of an interface in the current namespace. With offloads a veth delivers
/// datagrams whose checksum is not yet computed, and a packet socket would forward them like that.
///
/// # Panics
/// When the interface does not exist.
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
        // This kind of interface lacks some of the offloads.
        let is_absent = error.raw_os_error() == Some(libc::EOPNOTSUPP);
        assert!(outcome == 0 || is_absent, "switching offload {command:#x} of {interface} off: {error}");
    }
}
