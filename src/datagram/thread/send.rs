//! Sending.

use pathmeter_proto::machine::{Now, SENT_TTL, Send, TimestampSource};
use pathmeter_proto::time::Timestamp;

use super::super::cmsg::SendOptions;
use super::super::outbox::{Outgoing, not_sent_reason};
use super::super::socket::SendBatch;
use super::DatagramLoop;
use crate::clock::Clock;

impl DatagramLoop {
    /// Sends all datagrams in the outbox.
    pub(super) fn flush(&mut self) {
        while !self.outbox.is_empty() {
            let mut outbox = std::mem::take(&mut self.outbox);
            // Datagrams that must not be fragmented are sent last: the timing of the others is measured.
            let together = |outgoing: &Outgoing| {
                let Send { flow, dont_fragment, .. } = outgoing.send;
                (dont_fragment, outgoing.group, flow)
            };
            outbox.queued.sort_by_key(together);
            for run in outbox.queued.chunk_by(|a, b| together(a) == together(b)) {
                self.send_run(run, &mut outbox.arena);
            }
            outbox.clear();
            if self.outbox.is_empty() {
                self.outbox = outbox;
            }
        }
    }

    /// Sends datagrams of one socket with the same fragmentation policy.
    fn send_run(&mut self, run: &[Outgoing], arena: &mut [u8]) {
        let now = Clock::now();
        let mut batch = std::mem::replace(&mut self.batch, SendBatch::new(0));
        batch.clear();
        let (group, socket) = (run[0].group, usize::from(run[0].send.flow));
        let from = &self.groups[group].sockets[socket];
        for outgoing in run {
            let Outgoing { slot: index, generation, send, offset, length, .. } = *outgoing;
            let datagram = &mut arena[offset..offset + length];
            let slot = self.slots.get_mut(index).and_then(Option::as_mut);
            if let Some(slot) = slot.filter(|slot| slot.generation == generation) {
                let departure = Now { at: Clock::now(), drained: self.drained, wall: self.clock.offset() };
                slot.task.before_send(send.id, datagram, departure);
            }
            from.complete(datagram);
            let payload = from.payload(datagram);
            let timestamp_id =
                send.timestamp.then(|| self.pending_timestamps.add(index, generation, send.id, now, payload));
            let options = SendOptions {
                to: send.to,
                from: send.from,
                tos: send.tos,
                ttl: (send.ttl != SENT_TTL).then_some(send.ttl),
                timestamp: send.timestamp,
                timestamp_id: timestamp_id.filter(|_| self.pending_timestamps.uses_ids()),
                segment: send.segment,
            };
            batch.push(&options, offset, length);
        }
        let is_whole = run[0].send.dont_fragment;
        let (mut first, mut retries) = (0, 0);
        while first < batch.len() {
            let socket = &self.groups[group].sockets[socket];
            let mut send = || batch.send(socket, arena, first);
            match if is_whole { socket.send_unfragmented(send) } else { send() } {
                Ok(sent) => {
                    for outgoing in &run[first..first + sent] {
                        self.sent(outgoing, now);
                    }
                    (first, retries) = (first + sent, 0);
                }
                // The kernel reports the error of an earlier datagram on the next send, which clears it.
                Err(error) if retries < RETRIES_MAX && !concerns_this_datagram(&error) => retries += 1,
                Err(error) => {
                    let outgoing = &run[first];
                    let slot = self.slots.get_mut(outgoing.slot).and_then(Option::as_mut);
                    if let Some(slot) = slot.filter(|slot| slot.generation == outgoing.generation) {
                        slot.task.not_sent(outgoing.send.id, not_sent_reason(&error));
                        self.step(outgoing.slot);
                    }
                    (first, retries) = (first + 1, 0);
                }
            }
        }
        self.batch = batch;
    }

    fn sent(&mut self, outgoing: &Outgoing, at: Timestamp) {
        let slot = self.slots.get_mut(outgoing.slot).and_then(Option::as_mut);
        if let Some(slot) = slot.filter(|slot| slot.generation == outgoing.generation) {
            slot.task.sent(outgoing.send.id, at, TimestampSource::User);
            self.step(outgoing.slot);
        }
    }
}

/// Retries of a refused send. Chosen: 2; each retry clears the error of one earlier datagram, and more errors
/// would have to arrive between two system calls.
const RETRIES_MAX: u32 = 2;

/// Whether an error concerns this datagram and not an earlier one. EACCES may be either: a route of this host
/// that prohibits it, or a router that has rejected an earlier one (ICMPv6 type 1 code 1).
fn concerns_this_datagram(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EAGAIN | libc::ENOBUFS))
}
