use std::net::SocketAddr;

use super::*;
use crate::machine::IcmpError;
use crate::probe_budget::Expected;
use crate::probe_budget::{ProbeLimits, TokenRate};
use crate::time::WallTime;
use crate::wire::{ReplyFate, ReverseOutcome};

const SECOND: u64 = 1_000_000_000;
const PROBER: ([u8; 4], u16) = ([192, 0, 2, 1], 40_000);

fn at(nanos: u64) -> Timestamp {
    Timestamp::from_nanos(1_000 * SECOND + nanos)
}

fn now(at: Timestamp) -> Now {
    let epoch = WallTime::from_nanos(1_767_225_600 * SECOND);
    Now { at, drained: at, wall: WallOffset::between(Timestamp::from_nanos(0), epoch) }
}

fn arrival(at: Timestamp) -> Arrival {
    Arrival {
        at,
        by: TimestampSource::Kernel,
        from: PROBER.into(),
        to: None,
        flow: 0,
        ttl: Some(250),
        tos: Some(0),
        icmp: None,
    }
}

fn responder() -> StampResponder {
    let policy = Policy { open: true, rate: 1 << 40, rate_per_source: 1 << 40, ..Policy::default() };
    StampResponder::new(policy, None, 1_024)
}

/// A request with the session record for one session, or without it.
fn request(sequence: u32, session: Option<u32>) -> Vec<u8> {
    let mut out = Vec::new();
    let timestamp = NtpTime(0xeeaa_bfe0_0000_0000 + u64::from(sequence));
    Request { sequence, timestamp, error: ERROR_ESTIMATE, ssid: 7 }.encode(Mode::Open, &mut out);
    if let Some(session) = session {
        let request = tlv::SessionRecord { session, ..tlv::SessionRecord::default() };
        request.write(tlv::append(&mut out, tlv::SESSION, tlv::SessionRecord::BYTES).value_mut(&mut out));
    }
    tlv::append(&mut out, tlv::FOLLOW_UP, FollowUp::BYTES);
    out
}

type Sent = (Send, Vec<u8>);

/// Steps until the responder waits: the reply, the counts of sources, and the end of the wait.
fn drive(
    responder: &mut StampResponder,
    time: Timestamp,
    drops: &mut HostDrops,
) -> (Option<Sent>, Vec<usize>, Timestamp) {
    let (mut sent, mut sources) = (None, Vec::new());
    loop {
        let mut arena = Vec::new();
        match responder.step(now(time), drops, &mut arena) {
            Step::Send(send) => sent = Some((send, arena)),
            Step::Report(ResponderReport::Sources(count)) => sources.push(count),
            Step::Report(ResponderReport::Answered) => {}
            Step::Report(report @ ResponderReport::Refused(_)) => panic!("{report:?}"),
            Step::Wait(until) => return (sent, sources, until),
            Step::Finished => panic!("a responder does not finish by itself"),
        }
    }
}

fn request_reply(responder: &mut StampResponder, request: &[u8], time: Timestamp) -> Sent {
    responder.received(request, &arrival(time));
    drive(responder, time, &mut HostDrops::default()).0.expect("it is answered")
}

fn read(reply: &[u8]) -> Reply {
    Reply::decode(reply, Mode::Open).unwrap()
}

fn followed(reply: &[u8]) -> Option<FollowUp> {
    let found = tlv::walk(reply, 44).find(|found| found.kind == tlv::FOLLOW_UP).unwrap();
    FollowUp::read(found.value(reply))
}

#[test]
fn sources_of_the_last_30_to_60_seconds_are_counted() {
    let mut sources = SourceCount::default();
    let host = |last: u8| IpAddr::from([192, 0, 2, last]);
    assert_eq!((sources.next_rotation(), sources.rotate(at(0))), (Timestamp::NEVER, None));
    assert_eq!(sources.add(host(1), at(0)), Some(1));
    assert_eq!(sources.add("::ffff:192.0.2.1".parse().unwrap(), at(1)), None, "the same host");
    assert_eq!(sources.add(host(2), at(2)), Some(2));
    let half = at(30 * SECOND);
    assert_eq!(sources.next_rotation(), half);
    assert_eq!(sources.rotate(half - Duration::from_nanos(1)), None);
    assert_eq!(sources.rotate(half), Some(2));
    assert_eq!(sources.add(host(2), half), None, "it is known from the previous half");
    assert_eq!(sources.add(host(3), half), Some(3));
    assert_eq!(sources.rotate(at(60 * SECOND)), Some(2), "the first sent nothing for one half");
    assert_eq!(sources.add(host(1), at(60 * SECOND)), Some(3));
    assert_eq!(sources.rotate(at(90 * SECOND)), Some(1));
    assert_eq!(sources.next_rotation(), at(120 * SECOND));
    assert_eq!(sources.rotate(at(120 * SECOND)), Some(0));
    assert_eq!(sources.next_rotation(), Timestamp::NEVER);
}

#[test]
fn sources_are_counted_up_to_a_limit() {
    let mut sources = SourceCount::default();
    let add = |sources: &mut SourceCount, index: u32| {
        sources.add(IpAddr::from((0x0a00_0000 + index).to_be_bytes()), at(0))
    };
    for index in 0..65_536 {
        assert_eq!(add(&mut sources, index), Some(index as usize + 1));
    }
    assert_eq!((add(&mut sources, 65_536), sources.count), (None, 65_536));
    sources.rotate(at(30 * SECOND));
    assert_eq!(add(&mut sources, 65_536), Some(65_537), "each half has its own limit");
}

#[test]
fn count_of_sources_is_reported_when_it_changes_and_at_each_rotation() {
    let mut responder = responder();
    assert_eq!(drive(&mut responder, at(0), &mut HostDrops::default()).2, Timestamp::NEVER);
    responder.received(&request(0, Some(1)), &arrival(at(0)));
    let (sent, sources, until) = drive(&mut responder, at(0), &mut HostDrops::default());
    assert!(sent.is_some());
    assert_eq!((sources, until), (vec![1], at(30 * SECOND)));
    let (_, sources, until) = drive(&mut responder, until, &mut HostDrops::default());
    assert_eq!((sources, until), (vec![1], at(60 * SECOND)));
    let (_, sources, until) = drive(&mut responder, until, &mut HostDrops::default());
    assert_eq!((sources, until), (vec![0], Timestamp::NEVER));
}

#[test]
fn every_sixteenth_reply_requests_a_timestamp_and_later_replies_carry_it() {
    let mut responder = responder();
    let mut last: Option<(SendId, Timestamp)> = None;
    for number in 0..40_u32 {
        let time = at(u64::from(number) * SECOND);
        let (send, reply) = request_reply(&mut responder, &request(number, Some(1)), time);
        assert_eq!(send.timestamp, number % 16 == 1, "reply {number}");
        assert_eq!(read(&reply).sequence, number);
        let expected = last.map(|(id, left)| FollowUp {
            sequence: u32::try_from(id.0 & 0xffff_ffff).unwrap(),
            timestamp: NtpTime::from(now(left).wall.wall(left)),
        });
        assert_eq!(followed(&reply), expected, "reply {number}");
        responder.sent(send.id, time, TimestampSource::User);
        if send.timestamp {
            let left = time + Duration::from_micros(20);
            responder.sent(send.id, left, TimestampSource::Kernel);
            last = Some((send.id, left));
        }
    }
}

#[test]
fn timestamp_that_arrives_after_sixteen_more_replies_is_not_sent() {
    for (later, is_sent) in [(15, true), (16, false)] {
        let mut responder = responder();
        request_reply(&mut responder, &request(0, Some(1)), at(0));
        let (second, _) = request_reply(&mut responder, &request(1, Some(1)), at(1));
        for number in 0..later {
            request_reply(&mut responder, &request(2 + number, Some(1)), at(2));
        }
        responder.sent(second.id, at(3), TimestampSource::Kernel);
        let (_, reply) = request_reply(&mut responder, &request(100, Some(1)), at(4));
        assert_eq!(followed(&reply).is_some(), is_sent, "{later} later");
    }
}

#[test]
fn timestamp_of_one_session_is_not_sent_to_another() {
    let mut responder = responder();
    for session in [1, 2] {
        request_reply(&mut responder, &request(0, Some(session)), at(0));
    }
    let (first, _) = request_reply(&mut responder, &request(1, Some(1)), at(1));
    responder.sent(first.id, at(2), TimestampSource::Kernel);
    let (_, other) = request_reply(&mut responder, &request(1, Some(2)), at(3));
    assert_eq!(followed(&other), None);
    let (_, own) = request_reply(&mut responder, &request(2, Some(1)), at(3));
    assert_eq!(followed(&own).map(|follow_up| follow_up.sequence), Some(1));
}

#[test]
fn third_party_session_begins_again_after_15_minutes_or_at_a_far_lower_number() {
    let replies = |sequence: u32, silence: Duration| {
        let mut responder = responder();
        request_reply(&mut responder, &request(1_000, None), at(0));
        request_reply(&mut responder, &request(1_001, None), at(0));
        let (_, reply) = request_reply(&mut responder, &request(sequence, None), at(0) + silence);
        read(&reply).sequence
    };
    let quarter = Duration::from_secs(900);
    assert_eq!(replies(1_002, quarter), 2);
    assert_eq!(replies(1_002, quarter + Duration::from_nanos(1)), 0);
    assert_eq!(replies(1_001 - 127, Duration::ZERO), 2);
    assert_eq!(replies(1_001 - 128, Duration::ZERO), 0);
    let mut responder = responder();
    request_reply(&mut responder, &request(1_000, Some(1)), at(0));
    let (_, reply) = request_reply(&mut responder, &request(5, Some(1)), at(0) + 2 * quarter);
    assert_eq!(read(&reply).sequence, 1, "a pathmeter session is identified by its number");
}

#[test]
fn t3_is_updated_when_a_reply_leaves_a_microsecond_or_more_after_it_was_written() {
    for (waited, is_updated) in [(0, false), (999, false), (1_000, true), (5_000_000, true)] {
        let mut responder = responder();
        let (send, mut reply) = request_reply(&mut responder, &request(0, Some(1)), at(0));
        let made = read(&reply);
        assert_eq!(made.turnaround(), 0);
        responder.before_send(SendId(99), &mut reply, now(at(waited)));
        assert_eq!(read(&reply), made, "the reply has another id");
        responder.before_send(send.id, &mut reply, now(at(waited)));
        let expected = if is_updated { i64::try_from(waited).unwrap() } else { 0 };
        assert_eq!(read(&reply).turnaround(), expected);
        responder.before_send(send.id, &mut reply, now(at(waited + SECOND)));
        assert_eq!(read(&reply).turnaround(), expected, "each reply is updated once");
    }
}

#[test]
fn t3_of_the_latest_64_replies_can_be_updated() {
    let mut responder = responder();
    let sent: Vec<Sent> =
        (0..65).map(|number| request_reply(&mut responder, &request(number, Some(1)), at(0))).collect();
    for (index, (send, mut reply)) in sent.into_iter().enumerate() {
        responder.before_send(send.id, &mut reply, now(at(5_000)));
        assert_eq!(read(&reply).turnaround(), if index == 0 { 0 } else { 5_000 }, "reply {index}");
    }
}

#[test]
fn reply_reports_arrivals_and_host_drops() {
    let mut responder = responder();
    let mut drops = HostDrops::default();
    drops.add(0, at(0), at(1), 5);
    for sequence in [10, 12, 11, 11] {
        request_reply(&mut responder, &request(sequence, Some(3)), at(0));
    }
    responder.received(&request(13, Some(3)), &arrival(at(7)));
    let (_, reply) = drive(&mut responder, at(7), &mut drops).0.unwrap();
    let found = tlv::walk(&reply, 44).find(|found| found.kind == tlv::SESSION).unwrap();
    let expected = tlv::SessionRecord {
        flow: 0,
        session: 3,
        is_reply: true,
        is_brief: false,
        count_or_first: 10,
        unique: 4,
        duplicates: 1,
        reordered: 1,
        highest: 13,
        bitmap: 0b1111,
        host_drops: 5,
    };
    assert_eq!(tlv::SessionRecord::read(found.value(&reply)), Ok(expected));
    let read = read(&reply);
    let wall = |time: Timestamp| NtpTime::from(now(time).wall.wall(time));
    assert_eq!((read.received, read.timestamp), (wall(at(7)), wall(at(7))));
    assert_eq!((read.ssid, read.error, read.sender_ttl), (7, ERROR_ESTIMATE, 250));
    let request = Request::decode(&request(13, None), Mode::Open).unwrap();
    let answered = (read.sender_sequence, read.sender_timestamp, read.sender_error);
    assert_eq!(answered, (13, request.timestamp, ERROR_ESTIMATE));
}

#[test]
fn flags_of_a_reply_show_which_extensions_were_recognised() {
    let mut request = request(0, Some(1));
    tlv::append(&mut request, tlv::PADDING, 3);
    tlv::append(&mut request, tlv::CLASS_OF_SERVICE, 3);
    tlv::append(&mut request, tlv::FOLLOW_UP, 15);
    tlv::append(&mut request, tlv::SESSION, 52);
    tlv::append(&mut request, 77, 1);
    let last = tlv::append(&mut request, tlv::PADDING, 9);
    request.pop();
    let unknown = tlv::UNRECOGNIZED;
    // The flag of an extension that cannot be read is added to the sender's flags.
    for set in [unknown, unknown | tlv::MALFORMED] {
        request[last.at] = set;
        let (_, reply) = request_reply(&mut responder(), &request, at(0));
        let flags: Vec<u8> = tlv::walk(&reply, 44).map(|found| found.flags).collect();
        assert_eq!(flags, [0, 0, 0, unknown, unknown, unknown, unknown]);
        assert_eq!(reply[last.at], unknown | tlv::MALFORMED);
    }
}

#[test]
fn changed_policy_applies_to_the_next_request_and_sessions_stay() {
    let mut responder = responder();
    request_reply(&mut responder, &request(0, Some(1)), at(0));
    responder.change(Policy::default(), None);
    responder.received(&request(1, Some(1)), &arrival(at(1)));
    let mut step = || responder.step(now(at(1)), &mut HostDrops::default(), &mut Vec::new());
    assert_eq!(step(), Step::Report(ResponderReport::Refused(Refusal::Unlisted)));
    assert_eq!(responder.sessions(), 1);
}

#[test]
fn reply_to_a_request_without_class_of_service_has_the_dscp_that_arrived() {
    let mut responder = responder();
    responder.received(&request(0, Some(1)), &Arrival { tos: Some(46 << 2 | 3), ..arrival(at(0)) });
    let (send, _) = drive(&mut responder, at(0), &mut HostDrops::default()).0.expect("it is answered");
    assert_eq!(send.tos, 46 << 2);
}

#[test]
fn responder_has_nothing_in_flight_and_finishes_when_stopped() {
    let mut responder = responder();
    request_reply(&mut responder, &request(0, Some(1)), at(0));
    assert_eq!(responder.in_flight(), 0);
    responder.stop();
    let step = responder.step(now(at(1)), &mut HostDrops::default(), &mut Vec::new());
    assert_eq!(step, Step::Finished);
}

const ROUTER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));

/// A request of a session with this extension.
fn extended_request(sequence: u32, session: u32, asked: &ReverseTrace) -> Vec<u8> {
    let mut out = request(sequence, Some(session));
    asked.write(tlv::append(&mut out, tlv::REVERSE_TRACE, ReverseTrace::BYTES).value_mut(&mut out));
    out
}

/// A request of a session that asks for a reply with this TTL.
fn reverse_request(sequence: u32, session: u32, ttl: u8) -> Vec<u8> {
    extended_request(sequence, session, &ReverseTrace { ttl, ..ReverseTrace::default() })
}

fn reverse_of(reply: &[u8]) -> ReverseTrace {
    let found = tlv::walk(reply, 44).find(|found| found.kind == tlv::REVERSE_TRACE).unwrap();
    assert!(found.is_understood());
    ReverseTrace::read(found.value(reply)).unwrap()
}

/// What became of the reply to the request `wanted` of a session.
fn fate(responder: &mut StampResponder, wanted: u32, session: u32, time: Timestamp) -> ReplyFate {
    let outcome = ReverseOutcome { sequence: wanted, fate: ReplyFate::Wanted };
    let asked = ReverseTrace { outcomes: [Some(outcome), None, None], ..ReverseTrace::default() };
    let (send, reply) = request_reply(responder, &extended_request(1_000, session, &asked), time);
    assert_eq!(send.ttl, SENT_TTL);
    let [Some(found), None, None] = reverse_of(&reply).outcomes else { panic!("one outcome") };
    assert_eq!(found.sequence, wanted);
    found.fate
}

fn expired(to: SocketAddr, time: Timestamp) -> Arrival {
    let icmp = Some(IcmpError {
        router: ROUTER,
        kind: IcmpKind::TtlExceeded,
        code: 0,
        mtu: None,
        extensions_at: None,
    });
    Arrival { from: to, icmp, ..arrival(time) }
}

#[test]
fn reply_has_the_ttl_that_is_asked_for_and_the_length_of_its_request() {
    let mut responder = responder();
    for ttl in 1..=64 {
        let asked = reverse_request(ttl.into(), 1, ttl);
        let (send, reply) = request_reply(&mut responder, &asked, at(u64::from(ttl) * 10 * SECOND));
        assert_eq!((send.ttl, send.timestamp, reply.len()), (ttl, true, asked.len()));
        let found = reverse_of(&reply);
        assert_eq!((found.is_reply, found.deferred, found.ttl), (true, None, ttl));
    }
}

#[test]
fn outcome_of_a_reply_is_told_to_its_session_only() {
    let mut responder = responder();
    let (send, reply) = request_reply(&mut responder, &reverse_request(5, 1, 3), at(0));
    responder.sent(send.id, at(1_000), TimestampSource::Kernel);
    assert_eq!(fate(&mut responder, 5, 1, at(2_000)), ReplyFate::Unanswered);
    responder.received(&reply[..60], &expired(PROBER.into(), at(5_001_000)));
    let answered = ReplyFate::Answered { router: ROUTER, rtt: Duration::from_millis(5) };
    for _ in 0..5 {
        assert_eq!(fate(&mut responder, 5, 1, at(SECOND)), answered, "as often as it is wanted");
    }
    assert_eq!(fate(&mut responder, 5, 2, at(SECOND)), ReplyFate::Unknown, "another session");
    assert_eq!(fate(&mut responder, 6, 1, at(SECOND)), ReplyFate::Unknown, "no such request");
    assert_eq!(fate(&mut responder, 5, 1, at(5 * SECOND + 1_000)), answered);
    assert_eq!(fate(&mut responder, 5, 1, at(5 * SECOND + 1_001)), ReplyFate::Unknown, "too long ago");
}

#[test]
fn only_the_first_extension_with_a_possible_ttl_is_answered() {
    let mut responder = responder();
    for ttl in [65, 255] {
        let (send, reply) = request_reply(&mut responder, &reverse_request(0, 1, ttl), at(0));
        let found = tlv::walk(&reply, 44).find(|found| found.kind == tlv::REVERSE_TRACE).unwrap();
        assert_eq!((send.ttl, found.flags), (SENT_TTL, tlv::UNRECOGNIZED));
    }
    let mut twice = reverse_request(0, 1, 7);
    let second = ReverseTrace { ttl: 9, ..ReverseTrace::default() };
    second.write(tlv::append(&mut twice, tlv::REVERSE_TRACE, ReverseTrace::BYTES).value_mut(&mut twice));
    let (send, reply) = request_reply(&mut responder, &twice, at(0));
    let flags: Vec<u8> = tlv::walk(&reply, 44)
        .filter(|found| found.kind == tlv::REVERSE_TRACE)
        .map(|found| found.flags)
        .collect();
    assert_eq!((send.ttl, flags), (7, vec![0, tlv::UNRECOGNIZED]));
}

#[test]
fn other_agents_cannot_fill_the_queue_of_a_router() {
    let budget = Arc::new(Mutex::new(ProbeBudget::default()));
    let policy = Policy { open: true, rate: 1 << 40, rate_per_source: 1 << 40, ..Policy::default() };
    let mut responder = StampResponder::with_probe_budget(policy, None, 1 << 16, Arc::clone(&budget));
    for session in 0..20_000_u32 {
        // Each names another router.
        let expected = Some(IpAddr::from((0x0a00_0000 + session).to_be_bytes()));
        let asked = ReverseTrace { ttl: 1, expected, ..ReverseTrace::default() };
        let (send, _) = request_reply(&mut responder, &extended_request(0, session, &asked), at(0));
        assert_eq!(send.ttl == 1, session < 5, "{session}: the burst of one router");
    }
    let first = Expected::Unknown { ttl: 1, is_v4: true };
    let (time, _) = budget.lock().unwrap().reserve(first, at(0));
    assert!(time.since(at(0)) <= ProbeBudget::HORIZON + Duration::from_secs(2), "{time:?}");
    let other = Expected::Unknown { ttl: 2, is_v4: true };
    assert_eq!(budget.lock().unwrap().reserve(other, at(0)), (at(0), None), "nor the agent's own rate");
}

#[test]
fn error_is_an_answer_only_if_it_quotes_the_reply_with_its_t3() {
    let arrivals = |reply: &[u8]| {
        let mut other_time = reply.to_vec();
        other_time[11] ^= 1;
        let mut other_number = reply.to_vec();
        other_number[3] ^= 1;
        let elsewhere = SocketAddr::from(([192, 0, 2, 7], 40_000));
        let late = expired(PROBER.into(), at(5 * SECOND + 1));
        let refused = Arrival {
            icmp: Some(IcmpError {
                router: ROUTER,
                kind: IcmpKind::Prohibited,
                code: 0,
                mtu: None,
                extensions_at: None,
            }),
            ..arrival(at(1))
        };
        let from_router = expired(PROBER.into(), at(1));
        [
            (other_time, from_router),
            (other_number, from_router),
            (reply[..11].to_vec(), from_router),
            (reply.to_vec(), expired(elsewhere, at(1))),
            (reply.to_vec(), late),
            (reply.to_vec(), refused),
        ]
    };
    let mut responder = responder();
    let (_, reply) = request_reply(&mut responder, &reverse_request(0, 1, 1), at(0));
    for (quoted, arrival) in arrivals(&reply) {
        responder.received(&quoted, &arrival);
        assert_eq!(fate(&mut responder, 0, 1, at(2)), ReplyFate::Unanswered, "{arrival:?}");
    }
    responder.received(&reply[..12], &expired(PROBER.into(), at(1)));
    assert!(matches!(fate(&mut responder, 0, 1, at(2)), ReplyFate::Answered { .. }));
}

#[test]
fn quotation_of_a_reply_whose_t3_was_updated_is_recognised() {
    let mut responder = responder();
    let (send, mut reply) = request_reply(&mut responder, &reverse_request(0, 1, 1), at(0));
    let written = reply.clone();
    responder.before_send(send.id, &mut reply, now(at(1_000_000)));
    assert_ne!(reply, written);
    responder.received(&written, &expired(PROBER.into(), at(2_000_000)));
    assert_eq!(fate(&mut responder, 0, 1, at(3_000_000)), ReplyFate::Unanswered);
    responder.received(&reply, &expired(PROBER.into(), at(2_000_000)));
    assert!(matches!(fate(&mut responder, 0, 1, at(3_000_000)), ReplyFate::Answered { .. }));
}

#[test]
fn router_that_may_not_be_asked_yet_has_a_turn_for_each_session() {
    let mut responder = responder();
    let mut ask = |sequence, session, time| {
        let (send, reply) = request_reply(&mut responder, &reverse_request(sequence, session, 1), at(time));
        let found = reverse_of(&reply);
        assert_eq!(send.ttl, if found.deferred.is_some() { SENT_TTL } else { 1 });
        found.deferred.map(|time| time.as_millis())
    };
    for session in 1..6 {
        assert_eq!(ask(0, session, 0), None, "five in a burst");
    }
    assert_eq!(ask(0, 6, 0), Some(1_300), "1.25 s, in tenths of a second");
    assert_eq!(ask(0, 7, 0), Some(2_500));
    assert_eq!(ask(1, 6, SECOND), Some(300), "the same turn");
    assert_eq!(ask(2, 6, 1_300_000_000), None);
    assert_eq!(ask(1, 7, 2_400_000_000), None, "a little early");
    assert_eq!(ask(2, 7, 2_400_000_000), Some(1_400), "the next turn");
}

#[test]
fn reply_that_ends_at_a_router_does_not_repeat_what_its_request_says_about_answers() {
    let mut asked = reverse_request(0, 1, 3);
    let found = tlv::walk(&asked, 44).find(|found| found.kind == tlv::REVERSE_TRACE).unwrap();
    let fate = ReplyFate::Answered { router: ROUTER, rtt: Duration::from_millis(1) };
    let outcomes = [Some(ReverseOutcome { sequence: 9, fate }); 3];
    let forged = ReverseTrace { ttl: 3, outcomes, ..ReverseTrace::default() };
    forged.write(found.value_mut(&mut asked));
    let (_, reply) = request_reply(&mut responder(), &asked, at(0));
    assert_eq!(reverse_of(&reply).outcomes, [None; 3]);
}

#[test]
fn answers_to_the_latest_1024_limited_replies_are_kept() {
    let unlimited = TokenRate::UNLIMITED;
    let limits =
        ProbeLimits { router_v4: unlimited, router_v6: unlimited, agent: unlimited, others: unlimited };
    let policy = Policy { open: true, rate: 1 << 40, rate_per_source: 1 << 40, ..Policy::default() };
    let budget = Arc::new(Mutex::new(ProbeBudget::new(limits)));
    let mut responder = StampResponder::with_probe_budget(policy, None, 1_024, budget);
    let replies: Vec<Vec<u8>> = (0..1_025)
        .map(|sequence| request_reply(&mut responder, &reverse_request(sequence, 1, 3), at(0)).1)
        .collect();
    for reply in &replies[..2] {
        responder.received(reply, &expired(PROBER.into(), at(1)));
    }
    assert_eq!(fate(&mut responder, 0, 1, at(2)), ReplyFate::Unknown);
    assert!(matches!(fate(&mut responder, 1, 1, at(2)), ReplyFate::Answered { .. }));
}
