use super::super::segments::tests::time_exceeded;
use super::*;
use crate::trace::CLAMPED_FOR;
use crate::wire::tcp::SegmentTimestamps;

const LOCAL: ([u8; 4], u16) = ([192, 0, 2, 1], 50_000);
const PEER: ([u8; 4], u16) = ([198, 51, 100, 7], 443);

fn at(milliseconds: u64) -> Timestamp {
    Timestamp::from_nanos(1_000_000_000_000 + milliseconds * 1_000_000)
}

pub(super) fn healthy(bytes: u64) -> Delivered {
    Delivered { sent: bytes, acknowledged: bytes + SYN, is_recovering: false }
}

/// What the peer sends: a segment with this many bytes that acknowledges this many.
fn segment(acknowledged: u32, sent: u32, bytes: u32) -> ReceivedSegment {
    ReceivedSegment {
        source_port: PEER.1,
        destination_port: LOCAL.1,
        // Both numbers wrap around.
        next_sequence: (u32::MAX - 150).wrapping_add(sent + bytes),
        acknowledgment: (u32::MAX - 250).wrapping_add(acknowledged),
        is_empty: bytes == 0,
        timestamps: Some(SegmentTimestamps { value: 40 + sent, echo: 30 + acknowledged }),
        has_sack: false,
    }
}

/// A connection with this number on which 100 bytes were echoed over this many routers.
fn open(probes: &mut ConnectionProbes, number: u64, routers: u8, now: Timestamp) {
    probes.opened(number, LOCAL.into(), PEER.into(), now);
    probes.delivered(healthy(100), now);
    assert_eq!(probes.received(segment(100, 0, 100), 64 - routers, now), None);
}

/// A connection that is not verified yet.
fn connected() -> ConnectionProbes {
    let mut probes = ConnectionProbes::new(30, at(0));
    assert_eq!((probes.change(at(0)), probes.in_use), (None, None));
    open(&mut probes, 1, 4, at(0));
    probes
}

/// Sends the segment that verifies the connection, and returns its TTL and the segment.
fn test(probes: &mut ConnectionProbes, now: Timestamp) -> (u8, Vec<u8>) {
    let (ttl, segment) = probes.test(now).expect("it is due");
    probes.tested(ttl, now);
    assert_eq!(probes.test(now), None, "it is sent once");
    (ttl, segment)
}

/// A connection that was verified 600 ms ago.
fn verified() -> ConnectionProbes {
    let mut probes = connected();
    test(&mut probes, at(0));
    probes.delivered(healthy(200), at(1));
    probes.received(segment(200, 100, 100), 60, at(1));
    assert_eq!((probes.change(at(600)), probes.in_use), (None, Some(Packets::Segments(1))));
    probes
}

/// Sends a probe, and returns its segment.
fn send(probes: &mut ConnectionProbes, ttl: u8, now: Timestamp) -> Vec<u8> {
    let step = probes.step(ttl, now);
    let ProbeStep::Segment(segment) = step else { panic!("{step:?}") };
    probes.sent(ttl, vec![ttl], now);
    segment
}

/// The reply to this echo of a hundred bytes.
pub(super) fn echo_reply(number: u32) -> ReceivedSegment {
    segment(number * 100, number * 100 - 100, 100)
}

/// The acknowledgment after that echo, repeated.
pub(super) fn repeated(number: u32) -> ReceivedSegment {
    segment(number * 100, number * 100, 0)
}

/// What a router reports of a segment.
pub(super) fn report(segment: &[u8]) -> Vec<u8> {
    time_exceeded([LOCAL.0, PEER.0], segment, |_| {})
}

fn router(ttl: u8) -> IpAddr {
    [10, 0, 0, ttl].into()
}

fn answer(ttl: u8, router: Option<IpAddr>) -> Option<ProbeAnswer> {
    Some(ProbeAnswer { identifier: vec![ttl], router, extensions: Vec::new() })
}

#[test]
fn segments_are_below_the_window_by_their_ttl_and_routers_answer_each_once() {
    let mut probes = verified();
    for ttl in [1, 2, 9, 30] {
        let sent = send(&mut probes, ttl, at(610));
        let found = ReceivedSegment::decode(&sent).unwrap();
        let latest = segment(200, 100, 100);
        assert_eq!(latest.acknowledgment.wrapping_sub(found.next_sequence), ttl.into());
        assert_eq!((found.acknowledgment, found.is_empty), (latest.next_sequence, true));
        let (sent_at, seen) = (found.timestamps.unwrap(), latest.timestamps.unwrap());
        assert!(sent_at.value > seen.echo && sent_at.echo == seen.value, "{sent_at:?}, {seen:?}");
        let mut other = sent.clone();
        other[7] ^= 0x40;
        assert_eq!(probes.message_received(&report(&other), router(ttl)), None, "another sequence number");
        assert_eq!(probes.message_received(&report(&sent), router(ttl)), answer(ttl, Some(router(ttl))));
        assert_eq!(probes.message_received(&report(&sent), router(77)), None, "only the first answer");
    }
}

#[test]
fn late_answers_are_recognized_also_after_the_connection_has_moved_on() {
    let mut probes = verified();
    let first = send(&mut probes, 1, at(600));
    let second = send(&mut probes, 2, at(1_200));
    probes.received(segment(300, 200, 100), 60, at(1_300));
    let third = send(&mut probes, 2, at(1_800));
    assert_ne!(second, third);
    for (sent, ttl) in [(first, 1), (second, 2), (third, 2)] {
        assert_eq!(probes.message_received(&report(&sent), router(ttl)), answer(ttl, Some(router(ttl))));
    }
}

#[test]
fn repeated_acknowledgment_is_the_answer_of_the_peer_to_the_latest_probe() {
    let repeated = segment(200, 200, 0);
    let asked = || {
        let mut probes = verified();
        send(&mut probes, DESTINATION, at(610));
        probes
    };
    assert_eq!(asked().received(repeated, 60, at(609)), None, "sooner than the probe was sent");
    assert_eq!(asked().received(repeated, 60, at(1_200)), None, "too late");
    let of_loss = ReceivedSegment { has_sack: true, ..repeated };
    assert_eq!(asked().received(of_loss, 60, at(620)), None, "it is about data");
    let mut probes = asked();
    assert_eq!(probes.received(segment(200, 200, 50), 60, at(620)), None, "data");
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(620)), None, "it acknowledges data");
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(620)), answer(DESTINATION, None));
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(621)), None, "only once");
    let sent = send(&mut probes, 4, at(1_200));
    assert_eq!(probes.received(segment(250, 250, 0), 60, at(1_210)), answer(4, None), "behind 3 routers");
    assert_eq!(probes.message_received(&report(&sent), router(4)), None);
}

#[test]
fn segments_that_were_overtaken_do_not_hide_the_next_answer() {
    let mut probes = verified();
    send(&mut probes, DESTINATION, at(610));
    assert_eq!(probes.received(segment(100, 0, 100), 60, at(615)), None, "overtaken");
    assert_eq!(probes.received(segment(200, 199, 0), 60, at(616)), None, "a keep-alive");
    assert_eq!(probes.received(segment(200, 200, 0), 60, at(620)), answer(DESTINATION, None));
}

/// Linux does not repeat an acknowledgment twice within half a second, whether the first one has arrived or
/// not.
#[test]
fn probes_that_may_reach_the_peer_are_half_a_second_apart() {
    let mut probes = verified();
    for ttl in 1..=3 {
        let sent = send(&mut probes, ttl, at(600));
        probes.message_received(&report(&sent), router(ttl)).unwrap();
    }
    send(&mut probes, DESTINATION, at(610));
    for is_answered in [false, true] {
        if is_answered {
            probes.received(segment(200, 200, 0), 60, at(620)).unwrap();
        }
        for ttl in 1..=3 {
            assert!(matches!(probes.step(ttl, at(621)), ProbeStep::Segment(_)), "a router answers: {ttl}");
        }
        for ttl in [4, DESTINATION] {
            let earliest = at(if is_answered { 1_170 } else { 1_160 });
            assert_eq!(probes.step(ttl, at(621)), ProbeStep::Wait(earliest));
            assert!(matches!(probes.step(ttl, earliest), ProbeStep::Segment(_)));
        }
    }
}

/// A router that does not answer any more may have left the route, which is then shorter.
#[test]
fn ttl_whose_router_is_silent_may_reach_the_peer() {
    let mut probes = verified();
    let sent = send(&mut probes, 3, at(600));
    probes.message_received(&report(&sent), router(3)).unwrap();
    send(&mut probes, 3, at(610));
    assert_eq!(probes.received(segment(200, 200, 0), 60, at(620)), None, "a router was expected");
    send(&mut probes, 3, at(1_200));
    assert_eq!(probes.received(segment(200, 200, 0), 60, at(1_210)), answer(3, None));
}

#[test]
fn connection_is_used_when_it_has_delivered_data_after_a_first_segment() {
    let mut probes = connected();
    let (ttl, sent) = test(&mut probes, at(1));
    assert_eq!(ttl, 4, "it reaches the last router that is expected");
    assert_eq!(probes.message_received(&report(&sent), router(4)), None, "it is no probe");
    for (delivered, reason) in [
        (healthy(100), "nothing was sent since"),
        (Delivered { sent: 200, ..healthy(100) }, "it is in flight"),
        (Delivered { sent: 200, acknowledged: 100 + SYN, ..healthy(100) }, "the kernel counts the SYN"),
    ] {
        probes.delivered(delivered, at(10));
        assert!(probes.has_unverified_segments(), "{reason}");
        assert_eq!((probes.change(at(10)), probes.refusal(at(10))), (None, Some(OwnFlowRefusal::TooNew)));
        assert!(matches!(probes.step(2, at(10)), ProbeStep::Wait(_)), "{reason}");
    }
    probes.delivered(healthy(101), at(30));
    assert!(!probes.has_unverified_segments());
    assert_eq!((probes.change(at(30)), probes.refusal(at(30))), (None, None));
    send(&mut probes, 2, at(600));
    assert!(probes.has_unverified_segments());
    assert_eq!(probes.change(at(31)), None, "it stays in use");
}

#[test]
fn first_segment_has_an_allowed_ttl() {
    for (routers, hops_max, expected) in [(0, 30, 1), (1, 30, 1), (9, 30, 9), (9, 3, 3)] {
        let mut probes = ConnectionProbes::new(hops_max, at(0));
        open(&mut probes, 1, routers, at(0));
        assert_eq!(test(&mut probes, at(0)).0, expected, "{routers}, {hops_max}");
    }
}

/// Of one who knows the addresses and ports, but not the sequence numbers.
#[test]
fn forged_segments_have_no_effect() {
    let mut probes = verified();
    send(&mut probes, DESTINATION, at(610));
    let forged = ReceivedSegment { acknowledgment: 54_321, next_sequence: 0x8000_0000, ..segment(0, 0, 0) };
    for _ in 0..3 {
        assert_eq!(probes.received(forged, 60, at(611)), None);
    }
    assert_eq!(probes.received(segment(200, 200, 0), 60, at(620)), answer(DESTINATION, None));
    let sent = ReceivedSegment::decode(&send(&mut probes, 2, at(1_200))).unwrap();
    assert_eq!(sent.acknowledgment, segment(200, 200, 0).next_sequence);
}

#[test]
fn nothing_is_sent_while_the_connection_sends_again() {
    let recovering = Delivered { is_recovering: true, ..healthy(300) };
    let mut probes = connected();
    probes.delivered(recovering, at(20));
    assert_eq!(probes.test(at(20)), None);
    let mut probes = verified();
    probes.delivered(recovering, at(620));
    assert!(matches!(probes.step(1, at(620)), ProbeStep::Wait(_)));
    probes.delivered(healthy(300), at(630));
    assert!(matches!(probes.step(1, at(630)), ProbeStep::Segment(_)));
}

#[test]
fn probes_wait_for_a_connection_and_are_then_sent_without_one() {
    let mut probes = ConnectionProbes::new(30, at(0));
    assert_eq!(probes.step(1, at(100)), ProbeStep::Wait(at(3_000)));
    assert_eq!((probes.change(at(2_999)), probes.step(1, at(2_999))), (None, ProbeStep::Wait(at(3_019))));
    assert_eq!((probes.change(at(3_000)), probes.step(1, at(3_000))), (None, ProbeStep::Syn));
    assert_eq!(probes.refusal(at(3_000)), Some(OwnFlowRefusal::NoConnection));
    open(&mut probes, 1, 4, at(4_000));
    test(&mut probes, at(4_000));
    assert_eq!((probes.change(at(4_010)), probes.step(1, at(4_010))), (None, ProbeStep::Syn));
    probes.delivered(healthy(200), at(4_020));
    assert_eq!((probes.change(at(4_020)), probes.change(at(4_020))), (Some(FlowChange::Replaced), None));
    assert!(probes.is_on_connection());
    assert!(matches!(probes.step(1, at(5_000)), ProbeStep::Segment(_)));
}

/// A server that closes each connection after some messages.
#[test]
fn connections_that_end_soon_are_traced_without_them() {
    for messages in [1, 2, 5] {
        let mut probes = ConnectionProbes::new(30, at(0));
        let (mut changes, mut now) = (Vec::new(), 0);
        for number in 0..100 {
            open(&mut probes, number, 4, at(now));
            test(&mut probes, at(now));
            for message in 1..=messages {
                changes.extend(probes.change(at(now)));
                now += 1_000;
                if message < messages {
                    probes.delivered(healthy(100 + 100 * message), at(now));
                }
            }
            probes.ended(ConnectionEnd::Closed, at(now));
            changes.extend(probes.change(at(now)));
        }
        // The first one may have been used.
        assert!(changes.len() <= 1, "{messages}: {changes:?}");
        assert_eq!(probes.step(1, at(now)), ProbeStep::Syn);
    }
}

#[test]
fn kernel_that_does_not_count_bytes_is_named() {
    let mut probes = ConnectionProbes::new(30, at(0));
    probes.opened(1, LOCAL.into(), PEER.into(), at(0));
    probes.received(segment(100, 0, 100), 60, at(0));
    assert_eq!((probes.test(at(0)), probes.refusal(at(0))), (None, Some(OwnFlowRefusal::NotCounted)));
    probes.change(at(0));
    assert_eq!(probes.step(1, at(0)), ProbeStep::Syn);
}

#[test]
fn next_connection_is_another_flow_and_is_waited_for() {
    let mut probes = verified();
    let sent = send(&mut probes, 1, at(20_000));
    probes.ended(ConnectionEnd::Closed, at(20_010));
    assert_eq!((probes.change(at(20_010)), probes.step(1, at(20_010))), (None, ProbeStep::Wait(at(23_010))));
    assert_eq!(probes.message_received(&report(&sent), router(1)), None, "there is none");
    open(&mut probes, 2, 4, at(21_000));
    test(&mut probes, at(21_000));
    assert!(matches!(probes.step(1, at(21_000)), ProbeStep::Wait(_)), "it is not verified");
    probes.delivered(healthy(200), at(21_010));
    assert_eq!((probes.change(at(21_010)), probes.change(at(21_010))), (Some(FlowChange::Replaced), None));
    assert!(matches!(probes.step(1, at(22_000)), ProbeStep::Segment(_)));
    probes.ended(ConnectionEnd::Closed, at(23_000));
    assert_eq!(probes.change(at(25_999)), None);
    assert_eq!(probes.change(at(26_000)), Some(FlowChange::Replaced));
    assert_eq!(probes.step(1, at(26_000)), ProbeStep::Syn);
}

#[test]
fn answers_to_probes_of_the_earlier_ports_are_not_passed_on() {
    let mut probes = verified();
    let sent = send(&mut probes, 1, at(610));
    let stuck = Delivered { sent: 300, ..healthy(200) };
    (0..60).for_each(|tick| probes.delivered(stuck, at(700 + 100 * tick)));
    assert_eq!(probes.change(at(6_700)), Some(FlowChange::Replaced));
    assert_eq!(probes.message_received(&report(&sent), router(1)), None);
}

/// How a connection ends after a segment that it does not survive.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// The kernel reports that nothing is acknowledged.
    Stalls,
    /// The echoes give it up sooner.
    TimesOut,
    /// A firewall resets it.
    IsReset,
}

fn die(probes: &mut ConnectionProbes, number: u64, from: u64, death: Death) {
    open(probes, number, 4, at(from));
    test(probes, at(from));
    let in_flight = Delivered { sent: 200, ..healthy(100) };
    match death {
        Death::Stalls => {
            (1..60).for_each(|tick| probes.delivered(in_flight, at(from + 100 * tick)));
            probes.ended(ConnectionEnd::TimedOut, at(from + 7_000));
        }
        Death::TimesOut => {
            probes.delivered(in_flight, at(from + 100));
            probes.ended(ConnectionEnd::TimedOut, at(from + 2_000));
        }
        Death::IsReset => probes.ended(ConnectionEnd::Reset, at(from + 20)),
    }
}

#[test]
fn segments_are_disabled_for_a_day_after_two_connections_have_died_of_them() {
    let deaths = [Death::Stalls, Death::TimesOut, Death::IsReset];
    for (first, second) in deaths.into_iter().flat_map(|first| deaths.map(|second| (first, second))) {
        let mut probes = ConnectionProbes::new(30, at(0));
        die(&mut probes, 1, 0, first);
        assert_ne!(probes.change(at(9_000)), Some(FlowChange::Stalled));
        die(&mut probes, 2, 10_000, second);
        assert_eq!(probes.change(at(20_000)), Some(FlowChange::Stalled), "{first:?}, {second:?}");
        assert_ne!(probes.change(at(20_000)), Some(FlowChange::Stalled), "it is reported once");
        open(&mut probes, 3, 4, at(21_000));
        assert_eq!(
            (probes.test(at(21_000)), probes.refusal(at(21_000))),
            (None, Some(OwnFlowRefusal::Stalled))
        );
        probes.change(at(21_000));
        assert_eq!(probes.step(1, at(21_000)), ProbeStep::Syn);
        test(&mut probes, at(21_000) + CLAMPED_FOR);
    }
}

/// A device near this host that lets larger TTLs pass, such as that of the first segment of each connection.
#[test]
fn device_that_reacts_to_small_ttls_only_is_noticed_too() {
    let mut probes = ConnectionProbes::new(30, at(0));
    for (number, from) in [(1, 0), (2, 30_000)] {
        open(&mut probes, number, 4, at(from));
        test(&mut probes, at(from));
        probes.delivered(healthy(200), at(from + 100));
        probes.change(at(from + 15_000));
        send(&mut probes, 2, at(from + 15_000));
        probes.delivered(Delivered { sent: 300, ..healthy(200) }, at(from + 15_100));
        probes.ended(ConnectionEnd::TimedOut, at(from + 18_000));
    }
    assert_eq!(probes.change(at(60_000)), Some(FlowChange::Stalled));
}

#[test]
fn ends_that_segments_do_not_explain_are_no_stalls() {
    let mut probes = ConnectionProbes::new(30, at(0));
    for number in 0..10 {
        let from = 10_000 * number;
        open(&mut probes, number, 4, at(from));
        test(&mut probes, at(from));
        match number % 3 {
            0 => probes.ended(ConnectionEnd::TimedOut, at(from + 100)),
            1 => probes.ended(ConnectionEnd::Reset, at(from + 1_001)),
            _ => {
                probes.delivered(Delivered { sent: 200, ..healthy(100) }, at(from + 100));
                probes.ended(ConnectionEnd::Closed, at(from + 200));
            }
        }
        assert_ne!(probes.change(at(from + 5_000)), Some(FlowChange::Stalled));
    }
    assert!(!probes.stalls.is_disabled(at(200_000)));
}

/// An outage of a connection whose segments have done no harm is not held against segments.
#[test]
fn connection_that_delivers_nothing_is_left_alone_until_it_does() {
    let mut probes = verified();
    for tick in 0..60 {
        probes.delivered(Delivered { sent: 300, ..healthy(200) }, at(1_000 + 100 * tick));
    }
    assert_eq!(probes.refusal(at(7_000)), Some(OwnFlowRefusal::NotDelivering));
    assert_eq!(probes.change(at(7_000)), Some(FlowChange::Replaced));
    assert_eq!(probes.step(1, at(7_000)), ProbeStep::Syn);
    probes.delivered(healthy(300), at(7_100));
    assert_eq!(probes.change(at(7_100)), Some(FlowChange::Replaced));
    assert!(matches!(probes.step(1, at(7_100)), ProbeStep::Segment(_)));
}

/// Some systems discard segments below the window without an answer.
#[test]
fn peer_that_does_not_answer_segments_is_traced_without_them_for_an_hour() {
    let mut probes = verified();
    let mut last = 0;
    for tick in 1..=u64::from(UNANSWERED_MAX) + 1 {
        last = 600 * tick;
        assert_eq!(probes.refusal(at(last)), None, "{tick}");
        send(&mut probes, DESTINATION, at(last));
    }
    assert_eq!(probes.refusal(at(last)), Some(OwnFlowRefusal::NotAnswered));
    assert_eq!(probes.change(at(last)), Some(FlowChange::Replaced));
    assert_eq!(probes.step(1, at(last)), ProbeStep::Syn);
    assert_eq!(probes.refusal(at(last) + SILENT_FOR), None);
}

#[test]
fn number_of_segments_that_are_remembered_is_limited() {
    let mut probes = verified();
    let sent = (1..=100).map(|ttl| send(&mut probes, ttl, at(1_000 * u64::from(ttl))));
    let segments: Vec<Vec<u8>> = sent.collect();
    let kept = segments.iter().filter(|sent| probes.message_received(&report(sent), router(1)).is_some());
    assert_eq!(kept.count(), SENT_MAX);
}
