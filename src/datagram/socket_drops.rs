//! Which of a socket's drops are our host's fault.

use std::fs;

/// Datagrams that this network namespace dropped because a receive buffer was full.
///
/// A socket's own drop counter also counts datagrams with a wrong checksum, which the network damaged: those are its loss.
/// The two are told apart by the namespace's counters, which do not say which socket it was; so a socket is never blamed
/// for more than either counter shows.
#[derive(Debug)]
pub(super) struct BufferOverflows {
    /// What `/proc/net` showed last; `None` where it cannot be read, and every drop is ours.
    last_total: Option<u64>,
    /// Datagrams that were dropped for want of room and that no socket of ours has been blamed for yet.
    unattributed: u64,
}

impl BufferOverflows {
    pub(super) fn new() -> Self {
        Self { last_total: read_overflows(), unattributed: 0 }
    }

    /// How many of `dropped` datagrams, dropped since the last look, were dropped for want of room.
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

    /// Forgets what nobody was blamed for: other programs' sockets overrun too. Called when all sockets of ours have been
    /// looked at, now and then.
    pub(super) fn reset(&mut self) {
        self.last_total = read_overflows();
        self.unattributed = 0;
    }
}

/// ICMPv6 messages with a wrong checksum. A raw socket for ICMPv6 is the only kind of ICMP socket that counts what the
/// network damaged among its drops, and each such socket counts each of them; so none is blamed for as many as there were since
/// it dropped anything last.
#[derive(Debug)]
pub(super) struct ChecksumErrors(u64);

impl ChecksumErrors {
    pub(super) fn new() -> Self {
        Self(icmp6_checksum_errors())
    }

    /// How many of `dropped` messages, dropped since the last look, were whole.
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
    // A host without IPv6 has no such file.
    let v6 = fs::read_to_string("/proc/net/snmp6").ok().and_then(|text| counter(&text, "Udp6RcvbufErrors"));
    Some(v4 + v6.unwrap_or(0))
}

fn icmp6_checksum_errors() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    counter(&text, "Icmp6InCsumErrors").unwrap_or(0)
}

/// From `/proc/net/snmp`: a line of names and a line of values, both beginning with `Udp:`.
fn udp_receive_buffer_errors(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let index = names.split_whitespace().position(|name| name == "RcvbufErrors")?;
    values.split_whitespace().nth(index)?.parse().ok()
}

/// From `/proc/net/snmp6`: a name and a value in each line.
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
