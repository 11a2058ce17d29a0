//! A host that answers ICMP echo requests.

use std::collections::VecDeque;
use std::net::SocketAddr;

use crate::echo::ResponderReport;
use crate::machine::{Arrival, HostDrops, Machine, NotSent, Now, Send, SendId, Step, TimestampSource};
use crate::time::Timestamp;
use crate::wire::icmp::{self, IcmpVersion};

/// Answers every echo request with its own bytes, as kernels do (RFC 1122 section 3.2.2.6). For a
/// [`World`](super::World) whose responder's host has [`kernel_replies`](super::Host::kernel_replies).
#[derive(Debug, Default)]
pub struct EchoHost {
    replies: VecDeque<(SocketAddr, Vec<u8>)>,
    answered: u64,
    sent: u64,
}

impl Machine for EchoHost {
    type Report = ResponderReport;

    fn received(&mut self, datagram: &[u8], arrival: &Arrival) {
        let version = [IcmpVersion::V4, IcmpVersion::V6].into_iter();
        let mut version_of = version.filter(|version| datagram.starts_with(&[version.request(), 0]));
        let Some(version) = version_of.next() else { return };
        if version == IcmpVersion::V4 && !icmp::is_intact(datagram) {
            return;
        }
        let mut reply = datagram.to_vec();
        reply[0] = version.reply();
        // The type is the upper half of a word: the checksum grows by what the type loses (RFC 1624). The
        // kernel computes the checksum of ICMPv6.
        let checksum = u16::from_be_bytes([reply[2], reply[3]]);
        let lost = u16::from(version.request().wrapping_sub(version.reply())) << 8;
        let (grown, is_over) = checksum.overflowing_add(lost);
        reply[2..4].copy_from_slice(&(grown + u16::from(is_over)).to_be_bytes());
        self.replies.push_back((arrival.from, reply));
    }

    fn sent(&mut self, _: SendId, _: Timestamp, _: TimestampSource) {}

    fn not_sent(&mut self, _: SendId, _: NotSent) {}

    fn stop(&mut self) {}

    fn withdraw(&mut self) {}

    fn peer_leaving(&mut self, _: Timestamp) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn step(&mut self, _: Now, _: &mut HostDrops, arena: &mut Vec<u8>) -> Step<ResponderReport> {
        if let Some((to, reply)) = self.replies.pop_front() {
            arena.extend_from_slice(&reply);
            self.sent += 1;
            let id = SendId(self.sent);
            return Step::Send(Send {
                id,
                flow: 0,
                from: None,
                to,
                tos: 0,
                ttl: 64,
                dont_fragment: false,
                segment: None,
                timestamp: false,
            });
        }
        if self.answered < self.sent {
            self.answered += 1;
            return Step::Report(ResponderReport::Answered);
        }
        Step::Wait(Timestamp::NEVER)
    }
}
