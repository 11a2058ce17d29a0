use super::*;

const LOCAL: ([u8; 4], u16) = ([192, 0, 2, 1], 50_000);
const PEER: ([u8; 4], u16) = ([198, 51, 100, 7], 443);
const RTT: Duration = Duration::from_millis(10);
const CONNECTION: Packets = Packets::Segments(1);

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
}

fn healthy(bytes: u64) -> Delivered {
    Delivered { sent: bytes, acknowledged: bytes + SYN, is_recovering: false, rtt_min: RTT }
}

/// What the peer sends: a segment with this many bytes that acknowledges this many.
fn segment(acknowledged: u32, sent: u32, bytes: u32) -> ReceivedSegment {
    ReceivedSegment {
        source_port: PEER.1,
        destination_port: LOCAL.1,
        next_sequence: 7_000 + sent + bytes,
        acknowledgment: (u32::MAX - 150).wrapping_add(acknowledged),
        is_empty: bytes == 0,
    }
}

/// A connection on which 100 bytes were echoed.
fn connected() -> ConnectionProbes {
    let mut probes = ConnectionProbes::new(at(0));
    assert_eq!((probes.change(at(0)), probes.in_use), (None, None));
    probes.opened(LOCAL.into(), PEER.into(), at(0));
    probes.delivered(healthy(100), at(0));
    assert_eq!(probes.received(segment(100, 0, 100), 60, at(0)), None);
    assert_eq!((probes.change(at(0)), probes.in_use), (None, Some(CONNECTION)));
    probes
}

/// The same, after a segment that has done no harm.
fn proven() -> ConnectionProbes {
    let mut probes = connected();
    test(&mut probes, at(0));
    probes.delivered(healthy(200), at(1));
    probes.received(segment(200, 100, 100), 60, at(1));
    probes
}

/// Sends the segment before the first probe, and returns its TTL and the segment.
fn test(probes: &mut ConnectionProbes, now: Timestamp) -> (u8, [u8; 20]) {
    let step = probes.step(1, now);
    let ProbeStep::Test { ttl, segment } = step else { panic!("{step:?}") };
    probes.tested(ttl);
    (ttl, segment)
}

/// Sends a probe, and returns its segment.
fn send(probes: &mut ConnectionProbes, ttl: u8, now: Timestamp) -> [u8; 20] {
    let step = probes.step(ttl, now);
    let ProbeStep::Segment(segment) = step else { panic!("{step:?}") };
    probes.sent(ttl, vec![ttl], now);
    segment
}

/// What a router reports of a segment.
fn report(segment: &[u8; 20]) -> Vec<u8> {
    let mut message = vec![11, 0, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 1, 6, 0, 0];
    message.extend([LOCAL.0, PEER.0].concat());
    message.extend(&segment[..8]);
    let words = message.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let checksum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

fn router(ttl: u8) -> IpAddr {
    [10, 0, 0, ttl].into()
}

fn answer(ttl: u8, router: Option<IpAddr>) -> Option<ProbeAnswer> {
    Some(ProbeAnswer { identifier: vec![ttl], router, extensions: Vec::new() })
}

#[test]
fn segments_are_below_the_window_by_their_ttl_and_routers_answer_each_once() {
    let mut probes = proven();
    for ttl in [1, 2, 9, 30] {
        let sent = send(&mut probes, ttl, at(10));
        let found = ReceivedSegment::decode(&sent).unwrap();
        let ReceivedSegment { acknowledgment: unacknowledged, next_sequence: expected, .. } =
            segment(200, 100, 100);
        assert_eq!(unacknowledged.wrapping_sub(found.next_sequence), ttl.into());
        assert_eq!((found.acknowledgment, found.is_empty), (expected, true));
        let forged = ConnectionProbes::message_received;
        let mut other = sent;
        other[7] ^= 0x40;
        assert_eq!(forged(&mut probes, &report(&other), router(ttl)), None, "another sequence number");
        assert_eq!(probes.message_received(&report(&sent), router(ttl)), answer(ttl, Some(router(ttl))));
        assert_eq!(probes.message_received(&report(&sent), router(77)), None, "only the first answer");
    }
}

#[test]
fn late_answers_are_recognized_also_after_the_connection_has_moved_on() {
    let mut probes = proven();
    let first = send(&mut probes, 1, at(10));
    let second = send(&mut probes, 2, at(20));
    probes.received(segment(300, 200, 100), 60, at(30));
    let third = send(&mut probes, 2, at(40));
    assert_ne!(second, third);
    for (sent, ttl) in [(first, 1), (second, 2), (third, 2)] {
        assert_eq!(probes.message_received(&report(&sent), router(ttl)), answer(ttl, Some(router(ttl))));
    }
}

#[test]
fn repeated_acknowledgment_is_the_answer_of_the_peer_to_the_latest_probe() {
    let mut probes = proven();
    send(&mut probes, DESTINATION, at(10));
    assert_eq!(probes.received(segment(200, 200, 0), 60, at(12)), None, "it came before the probe arrived");
    let mut probes = proven();
    send(&mut probes, DESTINATION, at(10));
    assert_eq!(probes.received(segment(200, 200, 50), 60, at(20)), None, "data");
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(20)), None, "it acknowledges data");
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(20)), answer(DESTINATION, None));
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(21)), None, "only once");
    let sent = send(&mut probes, 4, at(600));
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(610)), answer(4, None), "it is behind 3 routers");
    assert_eq!(probes.message_received(&report(&sent), router(4)), None);
}

/// Linux does not repeat an acknowledgment twice within half a second.
#[test]
fn probes_that_may_reach_the_peer_are_half_a_second_apart() {
    let mut probes = proven();
    let sent = send(&mut probes, 3, at(10));
    probes.message_received(&report(&sent), router(3)).unwrap();
    send(&mut probes, DESTINATION, at(20));
    probes.received(segment(200, 200, 0), 60, at(30)).unwrap();
    for ttl in 1..=3 {
        assert!(matches!(probes.step(ttl, at(31)), ProbeStep::Segment(_)), "a router has answered: {ttl}");
    }
    for ttl in [4, DESTINATION] {
        assert_eq!(probes.step(ttl, at(31)), ProbeStep::Wait(at(580)));
        assert!(matches!(probes.step(ttl, at(580)), ProbeStep::Segment(_)));
    }
}

#[test]
fn first_probe_waits_until_the_connection_has_delivered_data_after_another_segment() {
    let mut probes = connected();
    assert!(!probes.is_in_doubt());
    send(&mut probes, DESTINATION, at(0));
    assert!(!probes.is_in_doubt(), "its TTL is not limited");
    let (ttl, segment) = test(&mut probes, at(1));
    assert_eq!(ttl, 4, "it reaches the last router that is expected");
    assert_eq!(probes.message_received(&report(&segment), router(4)), None, "it is no probe");
    assert!(probes.is_in_doubt());
    assert!(matches!(probes.step(2, at(2)), ProbeStep::Wait(_)));
    probes.delivered(healthy(100), at(10));
    assert!(matches!(probes.step(2, at(10)), ProbeStep::Wait(_)), "nothing was sent since");
    probes.delivered(Delivered { sent: 200, ..healthy(100) }, at(20));
    assert!(matches!(probes.step(2, at(20)), ProbeStep::Wait(_)), "it is in flight");
    probes.delivered(healthy(200), at(30));
    assert!(!probes.is_in_doubt());
    send(&mut probes, 2, at(31));
    assert!(probes.is_in_doubt());
    send(&mut probes, 3, at(32));
    probes.delivered(healthy(200), at(40));
    assert!(probes.is_in_doubt(), "the kernel counts the SYN");
    probes.delivered(healthy(201), at(40));
    assert!(!probes.is_in_doubt());
}

#[test]
fn peer_without_routers_is_probed_too() {
    let mut probes = ConnectionProbes::new(at(0));
    probes.opened(LOCAL.into(), PEER.into(), at(0));
    probes.delivered(healthy(100), at(0));
    probes.received(segment(100, 0, 100), 64, at(0));
    probes.change(at(0));
    assert_eq!(test(&mut probes, at(0)).0, 1);
}

#[test]
fn probes_wait_while_the_connection_sends_again() {
    let mut probes = proven();
    probes.delivered(Delivered { is_recovering: true, ..healthy(300) }, at(20));
    assert!(matches!(probes.step(1, at(20)), ProbeStep::Wait(_)));
    probes.delivered(healthy(300), at(30));
    assert!(matches!(probes.step(1, at(30)), ProbeStep::Segment(_)));
}

#[test]
fn probes_wait_for_a_connection_and_are_then_sent_without_one() {
    let mut probes = ConnectionProbes::new(at(0));
    assert_eq!((probes.change(at(2_999)), probes.step(1, at(2_999))), (None, ProbeStep::Wait(at(3_019))));
    assert_eq!(probes.step(1, at(100)), ProbeStep::Wait(at(3_000)));
    assert_eq!((probes.change(at(3_000)), probes.step(1, at(3_000))), (None, ProbeStep::Syn));
    probes.opened(LOCAL.into(), PEER.into(), at(4_000));
    assert_eq!((probes.change(at(4_000)), probes.step(1, at(4_000))), (None, ProbeStep::Syn));
    probes.received(segment(100, 0, 100), 60, at(4_010));
    assert_eq!(probes.change(at(4_010)), None, "the kernel does not say how it delivers data");
    probes.delivered(healthy(100), at(4_010));
    assert_eq!(probes.change(at(4_010)), Some(FlowChange::Replaced));
    assert!(probes.is_on_connection());
    assert!(matches!(probes.step(1, at(4_010)), ProbeStep::Test { .. }));
}

#[test]
fn new_connection_is_another_flow_and_an_ended_one_is_waited_for() {
    let mut probes = proven();
    let sent = send(&mut probes, 1, at(10));
    probes.closed(at(20));
    assert_eq!((probes.change(at(20)), probes.step(1, at(20))), (None, ProbeStep::Wait(at(3_020))));
    assert_eq!(probes.message_received(&report(&sent), router(1)), None, "there is none");
    probes.opened(LOCAL.into(), PEER.into(), at(1_000));
    assert_eq!(probes.change(at(1_000)), None);
    assert!(matches!(probes.step(1, at(1_000)), ProbeStep::Wait(_)), "where it stands is not known");
    probes.delivered(healthy(100), at(1_010));
    probes.received(segment(100, 0, 100), 60, at(1_010));
    assert_eq!((probes.change(at(1_010)), probes.change(at(1_010))), (Some(FlowChange::Replaced), None));
    assert!(matches!(probes.step(1, at(1_010)), ProbeStep::Test { .. }));
    probes.closed(at(2_000));
    assert_eq!(probes.change(at(4_999)), None);
    assert_eq!(
        (probes.change(at(5_000)), probes.step(1, at(5_000))),
        (Some(FlowChange::Replaced), ProbeStep::Syn)
    );
}

/// A connection that stalls after a segment: until the kernel's deadline, or until the echoes give it up.
fn stall(probes: &mut ConnectionProbes, from: u64, is_given_up: bool) {
    probes.opened(LOCAL.into(), PEER.into(), at(from));
    probes.delivered(healthy(100), at(from));
    probes.received(segment(100, 0, 100), 60, at(from));
    probes.change(at(from));
    test(probes, at(from));
    for tick in 1..if is_given_up { 20 } else { 60 } {
        probes.delivered(Delivered { sent: 200, ..healthy(100) }, at(from + 100 * tick));
    }
    if !is_given_up {
        let change = probes.change(at(from + 6_000));
        assert!(matches!(change, Some(FlowChange::Replaced | FlowChange::GivenUp)), "{change:?}");
        probes.change(at(from + 6_000));
        assert_eq!(probes.step(1, at(from + 6_000)), ProbeStep::Syn);
    }
    probes.closed(at(from + 7_000));
}

#[test]
fn segments_are_given_up_for_a_day_after_two_connections_have_stalled() {
    for (first, second) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut probes = ConnectionProbes::new(at(0));
        stall(&mut probes, 0, first);
        assert_eq!((probes.given_up_until, probes.stalls), (None, 1));
        stall(&mut probes, 10_000, second);
        if second {
            assert_eq!(probes.change(at(17_000)), Some(FlowChange::GivenUp));
        }
        assert_ne!(probes.change(at(20_000)), Some(FlowChange::GivenUp), "it is told once");
        let until = probes.given_up_until.unwrap();
        assert!(until >= at(15_000) + CLAMPED_FOR);
        probes.opened(LOCAL.into(), PEER.into(), at(21_000));
        probes.delivered(healthy(100), at(21_000));
        probes.received(segment(100, 0, 100), 60, at(21_000));
        probes.change(at(21_000));
        assert_eq!(probes.step(1, at(21_000)), ProbeStep::Syn, "at once");
        assert_eq!(probes.change(until), Some(FlowChange::Replaced), "it is tried again");
        assert!(matches!(probes.step(1, until), ProbeStep::Test { .. }));
    }
}

#[test]
fn connections_that_end_without_data_in_flight_or_recover_are_not_stalled() {
    let mut probes = ConnectionProbes::new(at(0));
    for from in [0, 10_000, 20_000] {
        probes.opened(LOCAL.into(), PEER.into(), at(from));
        probes.delivered(healthy(100), at(from));
        probes.received(segment(100, 0, 100), 60, at(from));
        probes.change(at(from));
        test(&mut probes, at(from));
        probes.closed(at(from + 100));
    }
    assert_eq!(probes.stalls, 0);
    stall(&mut probes, 30_000, true);
    assert_eq!(probes.stalls, 1);
    probes.opened(LOCAL.into(), PEER.into(), at(40_000));
    probes.delivered(healthy(100), at(40_000));
    probes.received(segment(100, 0, 100), 60, at(40_000));
    probes.change(at(40_000));
    test(&mut probes, at(40_000));
    probes.delivered(Delivered { sent: 200, ..healthy(100) }, at(40_100));
    probes.delivered(healthy(200), at(44_900));
    assert_eq!(probes.stalls, 0, "the next connection has borne a segment");
}

/// A device that is on the way only of small TTLs.
#[test]
fn segments_with_larger_ttls_do_not_excuse_stalls_after_smaller_ones() {
    let mut probes = ConnectionProbes::new(at(0));
    for (from, ttl) in [(0, 9), (20_000, 9)] {
        probes.opened(LOCAL.into(), PEER.into(), at(from));
        probes.delivered(healthy(100), at(from));
        probes.received(segment(100, 0, 100), 60, at(from));
        probes.change(at(from));
        test(&mut probes, at(from));
        probes.delivered(healthy(200), at(from + 100));
        send(&mut probes, ttl, at(from + 200));
        probes.delivered(Delivered { sent: 300, ..healthy(200) }, at(from + 300));
        probes.closed(at(from + 1_000));
    }
    assert!(probes.given_up_until.is_some());
}

/// An outage stalls a connection, too: without a segment in doubt that is not held against segments.
#[test]
fn stalled_connection_is_left_alone_until_it_delivers_again() {
    let mut probes = proven();
    for tick in 0..60 {
        probes.delivered(Delivered { sent: 300, ..healthy(200) }, at(1_000 + 100 * tick));
    }
    assert_eq!(probes.stalls, 0);
    assert_eq!(probes.change(at(7_000)), Some(FlowChange::Replaced));
    assert_eq!(probes.step(1, at(7_000)), ProbeStep::Syn);
    probes.delivered(healthy(300), at(7_100));
    assert_eq!(probes.change(at(7_100)), Some(FlowChange::Replaced));
    assert!(matches!(probes.step(1, at(7_100)), ProbeStep::Segment(_)));
}

#[test]
fn number_of_segments_that_are_remembered_is_limited() {
    let mut probes = proven();
    let segments: Vec<[u8; 20]> = (1..=100).map(|ttl| send(&mut probes, ttl, at(10))).collect();
    let kept = segments.iter().filter(|sent| probes.message_received(&report(sent), router(1)).is_some());
    assert_eq!(kept.count(), SENT_MAX);
}
