//! Connections built by hand.

use pathmeter_proto::sim::Dropped;
use pathmeter_proto::wire::Message;

use super::*;
use crate::frame::Datagram;
use crate::wire::{DatagramHead, DeliveredCopy};

const MS: u64 = 1_000_000;
const START: u64 = 1_800_000_000_000 * MS;
const CLIENT: &str = "10.0.0.1:40000";
const SERVER: &str = "10.0.0.2:9863";
/// Sequence number before the first byte of each stream: it wraps around within the first message.
const FIRST: u32 = u32::MAX - 60;

/// A segment that enters at a millisecond, and is delivered 20 ms later or lost.
fn entry(way: WireDirection, at: u64, from: usize, tcp_payload: &[u8], is_lost: bool) -> LogEntry {
    let (source, destination) = match way {
        WireDirection::Forward => (CLIENT, SERVER),
        WireDirection::Reverse => (SERVER, CLIENT),
    };
    let sequence = FIRST.wrapping_add(u32::try_from(from).unwrap());
    let mut datagram = Datagram::segment(source.parse().unwrap(), destination.parse().unwrap(), sequence);
    if tcp_payload.is_empty() {
        let segment = datagram.segment.as_mut().unwrap();
        (segment.sequence, segment.is_syn) = (FIRST.wrapping_sub(1), true);
    }
    let at = START + at * MS;
    let delivered_at = Some((at + 20 * MS, at + 20 * MS + 10));
    let exit = DeliveredCopy { delivered_at, damage: None, tos: 0, ttl: 64 };
    let outcome = if is_lost { Err(Dropped::Lost) } else { Ok([Some(exit), None]) };
    let head = DatagramHead { datagram, payload: [0; 128] };
    LogEntry {
        direction: way,
        at,
        head,
        tcp_payload: (!tcp_payload.is_empty()).then(|| tcp_payload.into()),
        outcome,
    }
}

/// A message scheduled, or a reply written, at a millisecond.
fn message(sequence: u64, at: u64) -> Vec<u8> {
    let timestamp = NtpTime::from(WallTime::from_nanos(START + at * MS)).0.to_be_bytes();
    let mut bytes = vec![0; 56];
    bytes[8..16].copy_from_slice(&sequence.to_be_bytes());
    bytes[16..24].copy_from_slice(&timestamp);
    bytes[32..40].copy_from_slice(&timestamp);
    bytes
}

fn opened() -> Vec<LogEntry> {
    let [to_server, to_client] = [WireDirection::Forward, WireDirection::Reverse];
    vec![
        entry(to_server, 0, 0, &[], false),
        entry(to_client, 20, 0, &[], false),
        entry(to_server, 40, 0, &[1; 48], false),
        entry(to_client, 60, 0, &[2; 48], false),
    ]
}

fn single_connection(log: &[LogEntry]) -> Connection {
    let mut all = Connection::of(log, WireDirection::Forward, SERVER.parse().unwrap());
    assert_eq!(all.len(), 1);
    all.pop().unwrap()
}

const TCP: MessageProtocol = MessageProtocol::Tcp { bytes: 56 };

/// The first of three messages is lost and retransmitted after the others.
fn with_a_retransmission() -> Vec<LogEntry> {
    let [to_server, to_client] = [WireDirection::Forward, WireDirection::Reverse];
    let mut log = opened();
    log.push(entry(to_server, 100, 48, &message(0, 100), true));
    log.push(entry(to_server, 120, 104, &message(1, 120), false));
    log.push(entry(to_server, 140, 160, &message(2, 140), false));
    log.push(entry(to_server, 180, 48, &message(0, 100), false));
    for sequence in 0..3 {
        log.push(entry(to_client, 200, 48 + 56 * sequence, &message(sequence as u64, 200), false));
    }
    log
}

#[test]
fn bytes_behind_a_gap_are_delivered_with_the_missing_bytes() {
    let exchanges = single_connection(&with_a_retransmission()).exchanges(TCP);
    let least: Vec<u64> = exchanges.iter().map(|exchange| exchange.round_trip().unwrap().0 / MS).collect();
    assert_eq!(least, [120, 100, 80]);
    assert_eq!(exchanges.iter().map(|exchange| exchange.sequence).collect::<Vec<_>>(), [0, 1, 2]);
    // They were read 0.01 ms after the missing one arrived at 200 ms.
    let lateness: Vec<u64> = exchanges.iter().map(|exchange| exchange.lateness_max(7 * MS)).collect();
    assert_eq!(lateness, [7 * MS; 3]);
    let uncertainty = |exchange: &MessageExchange| exchange.round_trip().map(|(least, most)| most - least);
    assert_eq!(exchanges.iter().filter_map(uncertainty).collect::<Vec<_>>(), [20, 20, 20]);
}

#[test]
fn retransmissions_are_counted_in_segments_and_bytes() {
    let segments = single_connection(&with_a_retransmission()).to_server.segments;
    let expected =
        SegmentCounts { data: 5, retransmitted: 1, retransmitted_bytes: 56, dropped: 1, dropped_bytes: 56 };
    assert_eq!(segments, expected);
    // Two lost segments may be retransmitted as one, cut at another position.
    let mut log = opened();
    let both = [message(0, 100), message(1, 120)].concat();
    log.push(entry(WireDirection::Forward, 100, 48, &both[..56], true));
    log.push(entry(WireDirection::Forward, 120, 104, &both[56..], true));
    log.push(entry(WireDirection::Forward, 180, 48, &both, false));
    let found = single_connection(&log);
    let expected =
        SegmentCounts { data: 4, retransmitted: 1, retransmitted_bytes: 112, dropped: 2, dropped_bytes: 112 };
    assert_eq!(found.to_server.segments, expected);
    assert!(found.exchanges(TCP).iter().all(|exchange| !exchange.is_answered()));
}

#[test]
fn out_of_order_segment_has_entered_when_earlier_bytes_have() {
    let mut log = opened();
    log.push(entry(WireDirection::Forward, 120, 104, &message(1, 119), false));
    log.push(entry(WireDirection::Forward, 121, 48, &message(0, 118), false));
    log.push(entry(WireDirection::Forward, 122, 160, &message(2, 122), false));
    log.push(entry(WireDirection::Forward, 130, 104, &message(1, 119), false));
    let found = single_connection(&log);
    let exchanges = found.exchanges(TCP);
    assert_eq!(exchanges.iter().map(|exchange| exchange.sequence).collect::<Vec<_>>(), [0, 1, 2]);
    let entered = exchanges.iter().map(|exchange| (exchange.to_server.entered.unwrap() - START) / MS);
    assert_eq!(entered.collect::<Vec<_>>(), [121, 121, 122]);
    assert_eq!((found.to_server.segments.data, found.to_server.segments.retransmitted), (5, 1));
}

#[test]
fn arrival_is_uncertain_until_the_reply_if_others_arrived_within_5_ms() {
    let mut log = opened();
    // The third has a neighbour only before it, and the fourth has none.
    for (sequence, entered, replied) in [(0, 100, 130), (1, 104, 140), (2, 108, 150), (3, 140, 162)] {
        let from = 48 + 56 * usize::try_from(sequence).unwrap();
        log.push(entry(WireDirection::Forward, entered, from, &message(sequence, entered), false));
        log.push(entry(WireDirection::Reverse, replied, from, &message(sequence, replied), false));
    }
    let exchanges = single_connection(&log).exchanges(TCP);
    let lateness = exchanges.iter().map(|exchange| exchange.lateness_max(7 * MS) / MS);
    assert_eq!(lateness.collect::<Vec<_>>(), [10, 16, 22, 0]);
}

#[test]
fn delayed_message_counts_from_its_scheduled_departure() {
    let mut log = opened();
    log.push(entry(WireDirection::Forward, 400, 48, &message(0, 100), false));
    // The responder's 80 ms do not count; the 20 ms that its reply waited do.
    log.push(entry(WireDirection::Reverse, 520, 48, &message(0, 500), false));
    let exchanges = single_connection(&log).exchanges(TCP);
    assert_eq!(exchanges[0].lateness_max(0), 80 * MS);
    assert_eq!(exchanges[0].waited(), Some(300 * MS));
    assert_eq!(exchanges[0].round_trip().map(|(least, _)| least), Some(360 * MS));
    assert_eq!(exchanges[0].elapsed().map(|(least, _)| least), Some(440 * MS));
}

#[test]
fn websocket_messages_are_found_after_the_upgrade_and_unmasked() {
    let format = MessageFormat::Binary;
    let timestamp = NtpTime::from(WallTime::from_nanos(START + 100 * MS));
    let body = format.encode(Message { sequence: 7, timestamp }, 200);
    let mask = [9, 8, 7, 6];
    let masked = body.iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b);
    let to_server: Vec<u8> = [0x82, 0xfe, 0, 200].into_iter().chain(mask).chain(masked).collect();
    let to_client: Vec<u8> = [0x82, 126, 0, 200].into_iter().chain(body.iter().copied()).collect();
    let mut log = opened();
    log.truncate(2);
    log.push(entry(WireDirection::Forward, 40, 0, b"GET /ws HTTP/1.1\r\n\r\n", false));
    log.push(entry(WireDirection::Reverse, 60, 0, b"HTTP/1.1 101 \r\n\r\n", false));
    log.push(entry(WireDirection::Forward, 100, 20, &to_server, false));
    log.push(entry(WireDirection::Reverse, 130, 17, &to_client, false));
    let exchanges = single_connection(&log).exchanges(MessageProtocol::WebSocket { format, bytes: 200 });
    assert_eq!((exchanges.len(), exchanges[0].sequence, exchanges[0].scheduled_at), (1, 7, START + 100 * MS));
    // The reply does not carry the responder's time.
    assert_eq!(exchanges[0].round_trip(), Some((50 * MS, 50 * MS + 10)));
}

#[test]
fn new_connection_from_the_same_port_is_a_second_connection() {
    let mut log = opened();
    let mut retransmitted = entry(WireDirection::Forward, 900, 0, &[], false);
    retransmitted.head.datagram.segment.as_mut().unwrap().sequence = 5;
    log.push(entry(WireDirection::Forward, 800, 0, &[], false));
    log.push(retransmitted);
    let all = Connection::of(&log, WireDirection::Forward, SERVER.parse().unwrap());
    assert_eq!(all.len(), 2);
    // The SYN entered twice.
    assert_eq!((all[0].to_server.segments.retransmitted, all[1].to_server.segments.retransmitted), (1, 0));
}
