//! Separates drops caused by this host from drops caused by damaged datagrams.

use std::fs;

/// Datagrams that this network namespace dropped because a receive buffer was full.
///
/// A socket's own drop counter also counts datagrams with a wrong checksum: the network damaged those, so
/// they are network loss. The counters of the namespace separate the two but do not name the socket, so no
/// more drops are attributed to a socket than either counter shows.
#[derive(Debug)]
pub(super) struct BufferOverflows {
    /// The last total of `/proc/net`; `None` if it cannot be read, and then every drop counts as an overflow.
    last_total: Option<u64>,
    /// Overflows that have not been attributed to a socket yet.
    unattributed: u64,
}

impl BufferOverflows {
    pub(super) fn new() -> Self {
        Self { last_total: read_overflows(), unattributed: 0 }
    }

    /// Returns how many of the `dropped` datagrams, counted since the last call, were dropped because of a
    /// full buffer.
    pub(super) fn attribute(&mut self, dropped: u32) -> u32 {
        if dropped == 0 {
            return 0;
        }
        let now = read_overflows();
        let (Some(before), Some(total)) = (std::mem::replace(&mut self.last_total, now), now) else {
            return dropped;
        };
        self.unattributed += total.saturating_sub(before);
        let attributed = dropped.min(u32::try_from(self.unattributed).unwrap_or(u32::MAX));
        self.unattributed -= u64::from(attributed);
        attributed
    }

    /// Discards unattributed overflows, which belong to sockets of other programs. Called periodically, after
    /// all sockets have been read.
    pub(super) fn reset(&mut self) {
        self.last_total = read_overflows();
        self.unattributed = 0;
    }
}

/// ICMPv6 messages with a wrong checksum. Of all ICMP sockets, only a raw ICMPv6 socket includes damaged
/// messages in its drop counter, and each such socket counts every damaged message. Their number since the
/// socket's last drop is therefore subtracted from its drops.
#[derive(Debug)]
pub(super) struct ChecksumErrors(u64);

impl ChecksumErrors {
    pub(super) fn new() -> Self {
        Self(icmp6_checksum_errors())
    }

    /// Returns how many of the `dropped` messages, counted since the last call, were not damaged.
    pub(super) fn undamaged(&mut self, dropped: u32) -> u32 {
        if dropped == 0 {
            return 0;
        }
        let now = icmp6_checksum_errors();
        let checksum_errors = now.saturating_sub(std::mem::replace(&mut self.0, now));
        dropped.saturating_sub(u32::try_from(checksum_errors).unwrap_or(u32::MAX))
    }
}

fn read_overflows() -> Option<u64> {
    let v4 = udp_receive_buffer_errors(&fs::read_to_string("/proc/net/snmp").ok()?)?;
    // The file does not exist on hosts without IPv6.
    let v6 = fs::read_to_string("/proc/net/snmp6").ok().and_then(|text| counter(&text, "Udp6RcvbufErrors"));
    Some(v4 + v6.unwrap_or(0))
}

fn icmp6_checksum_errors() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    counter(&text, "Icmp6InCsumErrors").unwrap_or(0)
}

/// Parses `/proc/net/snmp`: a line of names and a line of values, both starting with `Udp:`.
fn udp_receive_buffer_errors(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let index = names.split_whitespace().position(|name| name == "RcvbufErrors")?;
    values.split_whitespace().nth(index)?.parse().ok()
}

/// Parses `/proc/net/snmp6`: a name and a value per line.
fn counter(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let snmp = "Tcp: A B\nTcp: 1 2\nUdp: InDatagrams InErrors RcvbufErrors SndbufErrors\nUdp: 10 7 5 0\n";
        assert_eq!(udp_receive_buffer_errors(snmp), Some(5));
        assert_eq!(udp_receive_buffer_errors("Udp: InDatagrams\nUdp: 1\n"), None);
        let snmp6 = "Udp6InErrors                    \t9\nUdp6RcvbufErrors                \t3\n";
        assert_eq!(counter(snmp6, "Udp6RcvbufErrors"), Some(3));
    }

    #[test]
    fn no_more_drops_are_attributed_than_either_counter_shows() {
        let mut overflows = BufferOverflows { last_total: None, unattributed: 0 };
        assert_eq!(overflows.attribute(3), 3, "without counters every drop is ours");
        let mut overflows = BufferOverflows::new();
        assert_eq!(overflows.attribute(0), 0);
    }
}
