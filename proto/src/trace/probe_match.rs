//! Which probe an answer belongs to. Packets carry the low half of a probe's sequence number.

use super::TraceSpec;
use crate::echo::ReplyExtensions;
use crate::wire::NtpTime;
use crate::wire::stamp::{self, Mode, Reply};

/// The sequence number on the wire: its low half.
#[expect(clippy::cast_possible_truncation, reason = "the wire carries the low half")]
pub(super) const fn wire_sequence(sequence: u64) -> u32 {
    sequence as u32
}

/// The latest sequence number before `next` with this low half.
pub(super) fn extend(low: u32, next: u64) -> Option<u64> {
    let last = next.checked_sub(1)?;
    last.checked_sub(wire_sequence(last).wrapping_sub(low).into())
}

/// The packet mode of the probes.
pub(super) fn mode(spec: &TraceSpec) -> Mode {
    if spec.keys.is_some() { Mode::Authenticated } else { Mode::Open }
}

/// The probe that a quotation begins with, of those before `next`; `timestamp` is T1 of the probe with a
/// sequence number, if there is one. Routers quote at least eight bytes after the IP header, which is only
/// the UDP header; the bytes here begin after that.
pub(super) fn quoted(
    quoted: &[u8],
    mode: Mode,
    next: u64,
    timestamp: impl FnOnce(u64) -> Option<NtpTime>,
) -> Option<u64> {
    let (low, quoted) = stamp::quoted_packet(quoted, mode)?;
    let sequence = extend(low, next)?;
    let sent = timestamp(sequence)?;
    quoted.is_none_or(|quoted| quoted == sent).then_some(sequence)
}

/// The probe that a reply answers, of those before `next`; `timestamp` as above.
pub(super) fn replied(
    datagram: &[u8],
    mode: Mode,
    next: u64,
    timestamp: impl FnOnce(u64) -> Option<NtpTime>,
) -> Option<u64> {
    let reply = Reply::decode(datagram, mode).ok()?;
    let sequence = extend(reply.sender_sequence, next)?;
    (timestamp(sequence)? == reply.sender_timestamp).then_some(sequence)
}

/// A reply whose base packet and extensions are authentic, if there are keys.
pub(super) fn authentic_reply(datagram: &[u8], spec: &TraceSpec) -> Option<Reply> {
    let mode = mode(spec);
    let mut reply = Reply::decode(datagram, mode).ok()?;
    spec.quirks.unwrap_or_default().times.apply(&mut reply);
    if let Some(keys) = &spec.keys {
        stamp::verify(datagram, keys).ok()?;
    }
    ReplyExtensions::read(datagram, mode, spec.keys.as_deref()).ok()?;
    Some(reply)
}
