//! Which probe an answer belongs to. Packets carry the low half of a probe's sequence number.

use super::{ProbeProtocol, TraceSpec};
use crate::echo::ReplyExtensions;
use crate::wire::NtpTime;
use crate::wire::icmp::{self, IcmpEcho, IcmpVersion};
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

/// The latest sequence number before `next` with these lowest 16 bits.
fn extend_16(low: u16, next: u64) -> Option<u64> {
    let last = next.checked_sub(1)?;
    #[expect(clippy::cast_possible_truncation, reason = "ICMP headers carry 16 bits")]
    let lowest = last as u16;
    last.checked_sub(lowest.wrapping_sub(low).into())
}

/// The packet mode of STAMP probes.
pub(super) fn mode(spec: &TraceSpec) -> Mode {
    if spec.keys.is_some() { Mode::Authenticated } else { Mode::Open }
}

/// Bytes of a quotation that identify a probe: of STAMP and of datagrams to a closed port the sequence
/// number, of ICMP the header, and of TCP the identifier that the driver passes in the place of the segment.
pub(super) const fn quoted_bytes_min(protocol: ProbeProtocol) -> usize {
    match protocol {
        ProbeProtocol::Udp => 4,
        ProbeProtocol::Icmp | ProbeProtocol::ClosedPort | ProbeProtocol::Tcp => 8,
    }
}

/// The probe that a quotation begins with, of those before `next`; `sent` is T1 of the probe with a sequence
/// number, if there is one. Routers quote at least eight bytes after the IP header: of UDP only its header,
/// after which the bytes here begin.
pub(super) fn quoted(
    quoted: &[u8],
    spec: &TraceSpec,
    session: u32,
    next: u64,
    sent: impl Fn(u64) -> Option<NtpTime>,
) -> Option<u64> {
    match spec.protocol {
        ProbeProtocol::Udp => {
            let (low, timestamp) = stamp::quoted_packet(quoted, mode(spec))?;
            let sequence = extend(low, next)?;
            let sent = sent(sequence)?;
            timestamp.is_none_or(|timestamp| timestamp == sent).then_some(sequence)
        }
        ProbeProtocol::Icmp => match IcmpEcho::decode_request(quoted, IcmpVersion::of(spec.to.ip())) {
            Ok(echo) => of_echo(&echo, session, next, sent),
            Err(_) => {
                let sequence = extend_16(icmp::quoted_sequence(quoted)?, next)?;
                let (timestamp, ssid) = (sent(sequence)?, 0);
                let echo = IcmpEcho { session, timestamp, sequence: wire_sequence(sequence), ssid };
                echo.is_quoted_by(quoted).then_some(sequence)
            }
        },
        ProbeProtocol::ClosedPort => of_datagram(quoted, sent),
        ProbeProtocol::Tcp => of_segment(quoted, sent),
    }
}

/// The probe that a reply answers, of those before `next`; `sent` as above.
pub(super) fn replied(
    datagram: &[u8],
    spec: &TraceSpec,
    session: u32,
    next: u64,
    sent: impl Fn(u64) -> Option<NtpTime>,
) -> Option<u64> {
    match spec.protocol {
        ProbeProtocol::Udp => {
            let reply = Reply::decode(datagram, mode(spec)).ok()?;
            let sequence = extend(reply.sender_sequence, next)?;
            (sent(sequence)? == reply.sender_timestamp).then_some(sequence)
        }
        ProbeProtocol::Icmp => {
            let echo = IcmpEcho::decode_reply(datagram, IcmpVersion::of(spec.to.ip())).ok()?;
            of_echo(&echo, session, next, sent)
        }
        // Somebody listens there after all.
        ProbeProtocol::ClosedPort => of_datagram(datagram, sent),
        ProbeProtocol::Tcp => of_segment(datagram, sent),
    }
}

fn of_echo(echo: &IcmpEcho, session: u32, next: u64, sent: impl Fn(u64) -> Option<NtpTime>) -> Option<u64> {
    let sequence = extend(echo.sequence, next)?;
    (echo.session == session && sent(sequence)? == echo.timestamp).then_some(sequence)
}

/// The payload of a datagram to a closed port: the sequence number and T1.
pub(super) fn encode_datagram(sequence: u64, timestamp: NtpTime, out: &mut Vec<u8>) {
    out.extend_from_slice(&sequence.to_be_bytes());
    out.extend_from_slice(&timestamp.0.to_be_bytes());
}

/// The probe of such a payload, of which a router may quote the first half only.
fn of_datagram(payload: &[u8], sent: impl Fn(u64) -> Option<NtpTime>) -> Option<u64> {
    let (sequence, rest) = payload.split_first_chunk()?;
    let sequence = u64::from_be_bytes(*sequence);
    let sent = sent(sequence)?;
    let timestamp = rest.first_chunk().map(|quoted| NtpTime(u64::from_be_bytes(*quoted)));
    timestamp.is_none_or(|timestamp| timestamp == sent).then_some(sequence)
}

fn of_segment(identifier: &[u8], sent: impl Fn(u64) -> Option<NtpTime>) -> Option<u64> {
    let sequence = u64::from_be_bytes(identifier.try_into().ok()?);
    sent(sequence).map(|_| sequence)
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
