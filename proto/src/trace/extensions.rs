//! What routers attach to their answers.

use std::net::IpAddr;

use crate::wire::icmp_extensions::{IcmpExtension, IcmpExtensions, InterfaceInfo, InterfaceRole, MplsLabel};

/// What a router attached to its answer (RFC 4884).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerExtensions {
    /// The label stack with which the probe arrived at the router, the top first. Empty if there was none, or
    /// if the router does not tell.
    pub labels: Vec<MplsLabel>,
    /// Interfaces of the router, in its order.
    pub interfaces: Vec<Interface>,
}

/// An interface of a router; what is `None` was not told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// What the probe had to do with it.
    pub role: InterfaceRole,
    /// Index (SNMP `ifIndex`).
    pub index: Option<u32>,
    /// Address.
    pub address: Option<IpAddr>,
    /// Name, with U+FFFD in the place of characters that would not be visible.
    pub name: Option<String>,
    /// MTU in bytes.
    pub mtu: Option<u32>,
}

/// Labels that are kept of one answer; further ones are left out. Chosen: 8, more than routers impose.
const LABELS_MAX: usize = 8;

/// Interfaces that are kept of one answer; further ones are left out. Chosen: one for each role.
const INTERFACES_MAX: usize = 4;

impl AnswerExtensions {
    /// Reads an extension structure; `None` if it is invalid or has nothing that is kept.
    pub(super) fn read(structure: &[u8]) -> Option<Self> {
        let mut found = Self::default();
        for extension in IcmpExtensions::decode(structure).ok()? {
            match extension {
                IcmpExtension::Label(label) if found.labels.len() < LABELS_MAX => found.labels.push(label),
                IcmpExtension::Interface(interface) if found.interfaces.len() < INTERFACES_MAX => {
                    found.interfaces.push(interface.into());
                }
                IcmpExtension::Label(_) | IcmpExtension::Interface(_) => {}
            }
        }
        (found != Self::default()).then_some(found)
    }
}

impl From<InterfaceInfo<'_>> for Interface {
    fn from(info: InterfaceInfo<'_>) -> Self {
        let InterfaceInfo { role, index, address, name, mtu } = info;
        Self { role, index, address, name: name.map(visible), mtu }
    }
}

/// The text without characters that control a terminal or change the order of others.
fn visible(text: &str) -> String {
    let is_invisible = |c: char| {
        // The line separators and the directional formatting characters of Unicode.
        let is_formatting = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
        c.is_control() || is_formatting || c == '\u{feff}'
    };
    text.chars().map(|c| if is_invisible(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_labels_and_four_interfaces_are_kept() {
        let label = |label| MplsLabel { label, traffic_class: 0, is_bottom: false, ttl: 1 };
        let stack: Vec<u8> = (100..112).flat_map(|number| label(number).to_bytes()).collect();
        let index = |index: u8| [0, 0, 0, index];
        let indexes: Vec<[u8; 4]> = (1..=6).map(index).collect();
        let interfaces = indexes.iter().map(|index| (2, 8, &index[..]));
        let objects: Vec<_> = interfaces.chain([(1, 1, &stack[..])]).collect();
        let found = AnswerExtensions::read(&IcmpExtensions::encode(&objects)).unwrap();
        assert_eq!(found.labels, (100..108).map(label).collect::<Vec<_>>());
        let indexes: Vec<_> = found.interfaces.iter().filter_map(|interface| interface.index).collect();
        assert_eq!(indexes, [1, 2, 3, 4]);
    }

    #[test]
    fn invalid_and_empty_structures_are_nothing() {
        let mut invalid = IcmpExtensions::encode(&[(1, 1, &[3, 0xe8, 0x41, 1])]);
        assert!(AnswerExtensions::read(&invalid).is_some());
        invalid[9] ^= 1;
        assert_eq!(AnswerExtensions::read(&invalid), None);
        assert_eq!(AnswerExtensions::read(&IcmpExtensions::encode(&[(9, 1, &[0; 4])])), None);
        assert_eq!(AnswerExtensions::read(&[]), None);
    }

    #[test]
    fn name_cannot_control_a_terminal() {
        assert_eq!(visible("ge-0/0/1.100 ü"), "ge-0/0/1.100 ü");
        assert_eq!(
            visible("\u{1b}[31m\n\u{202e}\u{feff}\u{9b}x"),
            "\u{fffd}[31m\u{fffd}\u{fffd}\u{fffd}\u{fffd}x"
        );
    }
}
