//! Everything that goes out.

use pathmeter_proto::machine::{Now, Send, TimestampSource};
use pathmeter_proto::time::Timestamp;

use super::super::cmsg::SendOptions;
use super::super::outbox::{Outgoing, refusal};
use super::super::socket::{SendBatch, TTL};
use super::Thread;
use crate::clock::Clock;

impl Thread {
    /// Hands everything in the outbox to the kernel.
    pub(super) fn flush(&mut self) {
        while !self.outbox.is_empty() {
            let mut outbox = std::mem::take(&mut self.outbox);
            // What may not be fragmented goes last: the others are measured.
            let together = |outgoing: &Outgoing| {
                let Send { flow, dont_fragment, .. } = outgoing.send;
                (dont_fragment, outgoing.group, flow)
            };
            outbox.waiting.sort_by_key(together);
            for run in outbox.waiting.chunk_by(|a, b| together(a) == together(b)) {
                self.hand_over(run, &mut outbox.arena);
            }
            outbox.clear();
            if self.outbox.is_empty() {
                self.outbox = outbox;
            }
        }
    }

    /// Sends datagrams of one socket, all of which may be fragmented, or none.
    fn hand_over(&mut self, run: &[Outgoing], arena: &mut [u8]) {
        let now = Clock::now();
        let mut batch = std::mem::replace(&mut self.batch, SendBatch::new(0));
        batch.clear();
        let (group, socket) = (run[0].group, usize::from(run[0].send.flow));
        let from = &self.groups[group].sockets[socket];
        for outgoing in run {
            let Outgoing { slot: index, life, send, at, length, .. } = *outgoing;
            let datagram = &mut arena[at..at + length];
            let slot = self.slots.get_mut(index).and_then(Option::as_mut);
            if let Some(slot) = slot.filter(|slot| slot.life == life) {
                let leaves = Now { at: Clock::now(), drained: self.drained, wall: self.clock.offset() };
                slot.task.before_send(send.id, datagram, leaves);
            }
            from.complete(datagram);
            let payload = from.payload(datagram);
            let name = send.timestamp.then(|| self.awaited.expect(index, life, send.id, now, payload));
            let told = SendOptions {
                to: send.to,
                from: send.from,
                tos: send.tos,
                ttl: (send.ttl != TTL).then_some(send.ttl),
                timestamp: send.timestamp,
                name: name.filter(|_| self.awaited.by_name()),
                segment: send.segment,
            };
            batch.push(&told, at, length);
        }
        let is_whole = run[0].send.dont_fragment;
        let (mut first, mut tries) = (0, 0);
        while first < batch.len() {
            let socket = &self.groups[group].sockets[socket];
            let mut send = || batch.send(socket, arena, first);
            match if is_whole { socket.in_one_piece(send) } else { send() } {
                Ok(sent) => {
                    for outgoing in &run[first..first + sent] {
                        self.sent(outgoing, now);
                    }
                    (first, tries) = (first + sent, 0);
                }
                // An earlier datagram's refusal is told to the next send; that clears it.
                Err(error) if tries < TRIES && !is_lasting(&error) => tries += 1,
                Err(error) => {
                    let outgoing = &run[first];
                    let slot = self.slots.get_mut(outgoing.slot).and_then(Option::as_mut);
                    if let Some(slot) = slot.filter(|slot| slot.life == outgoing.life) {
                        slot.task.not_sent(outgoing.send.id, refusal(&error));
                        self.step(outgoing.slot);
                    }
                    (first, tries) = (first + 1, 0);
                }
            }
        }
        self.batch = batch;
    }

    fn sent(&mut self, outgoing: &Outgoing, at: Timestamp) {
        let slot = self.slots.get_mut(outgoing.slot).and_then(Option::as_mut);
        if let Some(slot) = slot.filter(|slot| slot.life == outgoing.life) {
            slot.task.sent(outgoing.send.id, at, TimestampSource::User);
            self.step(outgoing.slot);
        }
    }
}

/// How often a send that is refused is repeated. Chosen: 2; each repetition takes the refusal of one earlier datagram, and
/// further ones would have to arrive between two system calls.
const TRIES: u32 = 2;

/// Whether a refusal is about this datagram and not about an earlier one.
fn is_lasting(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::EAGAIN | libc::ENOBUFS))
}
