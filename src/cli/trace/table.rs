//! The lines of the table of hops.

use std::fmt::Write as _;
use std::time::Duration;

use pathmeter_proto::trace::{AnswerExtensions, Interface, RejectionReason};
use pathmeter_proto::wire::icmp_extensions::MplsLabel;

/// A line of the table; `ttl` is empty where it is not known.
pub(super) fn line(ttl: Option<u8>, measured: &str, host: &str) -> String {
    let ttl = ttl.map_or_else(String::new, |ttl| ttl.to_string());
    format!("{ttl:>4}  {measured:>12}  {host}\n")
}

/// What a host that rejects probes says.
pub(super) fn rejection_text(reason: RejectionReason) -> String {
    format!("rejects the probes: {}", reason.as_str().replace('_', " "))
}

/// What a router attached to its answer: labels as traceroute -e shows them, then interfaces.
pub(super) fn attached_text(extensions: &AnswerExtensions) -> String {
    let AnswerExtensions { labels, interfaces } = extensions;
    let mut text = String::new();
    if !labels.is_empty() {
        let labels = labels.iter().map(|MplsLabel { label, traffic_class, is_bottom, ttl }| {
            format!("L={label} E={traffic_class} S={} T={ttl}", u8::from(*is_bottom))
        });
        let _ = write!(text, " [MPLS: {}]", labels.collect::<Vec<String>>().join(" / "));
    }
    for Interface { role, index, address, name, mtu } in interfaces {
        let _ = write!(text, " [{}:", role.as_str().replace('_', "-"));
        for (key, value) in [
            ("", name.clone()),
            ("", address.map(|address| address.to_string())),
            ("index=", index.map(|index| index.to_string())),
            ("mtu=", mtu.map(|mtu| mtu.to_string())),
        ] {
            if let Some(value) = value {
                let _ = write!(text, " {key}{value}");
            }
        }
        text.push(']');
    }
    text
}

pub(super) fn milliseconds(rtt: Duration) -> String {
    format!("{:.3} ms", rtt.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use pathmeter_proto::wire::icmp_extensions::InterfaceRole;

    use super::*;

    #[test]
    fn labels_and_interfaces_follow_the_address() {
        let label = |label, is_bottom| MplsLabel { label, traffic_class: 5, is_bottom, ttl: 1 };
        let interface = Interface {
            role: InterfaceRole::IncomingSubIp,
            index: Some(513),
            address: Some([192, 0, 2, 1].into()),
            name: Some("ge-0/0/1".into()),
            mtu: Some(1_500),
        };
        let one = AnswerExtensions { labels: vec![label(16_004, true)], interfaces: Vec::new() };
        assert_eq!(attached_text(&one), " [MPLS: L=16004 E=5 S=1 T=1]");
        let both = AnswerExtensions {
            labels: vec![label(16_004, false), label(24_015, true)],
            interfaces: vec![interface.clone(), Interface { address: None, name: None, ..interface }],
        };
        assert_eq!(
            attached_text(&both),
            " [MPLS: L=16004 E=5 S=0 T=1 / L=24015 E=5 S=1 T=1] \
             [incoming-sub-ip: ge-0/0/1 192.0.2.1 index=513 mtu=1500] [incoming-sub-ip: index=513 mtu=1500]"
        );
    }
}
