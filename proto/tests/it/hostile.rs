//! How a responder handles hostile datagrams.

use pathmeter_proto::admission::{Policy, Refusal};
use pathmeter_proto::echo::StampResponder;
use pathmeter_proto::key::Key;
use pathmeter_proto::machine::Machine;
use pathmeter_proto::sim::Random;
use pathmeter_proto::wire::stamp::{self, Mode};
use pathmeter_proto::wire::tlv::{self, ClassOfService, SessionRecord};

use super::manual::{
    Outcome, PROBER, arrival, at, base, keys, mode, policy, record, request, responder, seal_extensions,
    send_request,
};

const SECRET: &str = "0123456789abcdef";
/// A second source.
const OTHER: ([u8; 4], u16) = ([198, 51, 100, 9], 50_000);

fn garbage(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.draw().to_be_bytes()[0]).collect()
}

fn refused(why: Refusal) -> Outcome {
    Outcome { reply: None, refusal: Some(why) }
}

#[test]
fn garbage_gets_no_reply_if_a_key_is_required_and_never_a_longer_one() {
    let mut random = Random::new(1);
    let (mut open, mut closed) = (responder(None), responder(Some(keys(SECRET))));
    for len in 0..2_000 {
        let datagram = garbage(&mut random, len);
        let from = arrival(PROBER, at(len as u64));
        assert_eq!(send_request(&mut closed, &datagram, &from), refused(Refusal::Unlisted), "{len} bytes");
        let outcome = send_request(&mut open, &datagram, &from);
        match &outcome.reply {
            Some((_, reply)) => assert_eq!(reply.len(), len),
            None => assert_eq!((len < 44, outcome.refusal), (true, Some(Refusal::Malformed)), "{len} bytes"),
        }
    }
}

#[test]
fn truncated_request_is_answered_only_if_the_rest_is_valid() {
    let keys = keys(SECRET);
    let whole = request(1, 5, None);
    for len in 0..whole.len() {
        let outcome = send_request(&mut responder(None), &whole[..len], &arrival(PROBER, at(0)));
        match outcome.reply {
            Some((_, reply)) => assert!(len >= 44 && reply.len() == len, "{len} bytes"),
            None => assert!(len < 44, "{len} bytes"),
        }
    }
    let whole = request(1, 5, Some(keys.current()));
    for len in 0..whole.len() {
        let outcome =
            send_request(&mut responder(Some(keys.clone())), &whole[..len], &arrival(PROBER, at(0)));
        // Up to three bytes after the base packet are filler, and the base packet has its own HMAC.
        assert_eq!(outcome.reply.is_some(), (112..=115).contains(&len), "{len} bytes: {:?}", outcome.refusal);
        let reason = if len < 112 { Refusal::Unlisted } else { Refusal::Unauthentic };
        assert!(outcome.refusal.is_none_or(|why| why == reason), "{len} bytes: {:?}", outcome.refusal);
    }
}

#[test]
fn oversized_request_gets_a_reply_of_the_same_length() {
    let mut random = Random::new(2);
    for bytes in [9_000, 65_507] {
        for key in [None, Some(Key::new(SECRET.as_bytes()))] {
            let keys = key.is_some().then(|| keys(SECRET));
            let mut padded = request(3, 5, key.as_ref());
            let left = bytes - padded.len() - tlv::HEADER_BYTES;
            tlv::append(&mut padded, tlv::PADDING, u16::try_from(left).unwrap());
            let reply = send_request(&mut responder(keys.clone()), &padded, &arrival(PROBER, at(0))).bytes();
            assert_eq!(reply.len(), bytes);
            assert_eq!(record(&reply, mode(key.as_ref())).highest, 3);
            let mut wild = base(3, 7, key.as_ref());
            wild.extend(garbage(&mut random, bytes - wild.len()));
            let outcome = send_request(&mut responder(keys), &wild, &arrival(PROBER, at(0)));
            assert_eq!(outcome.reply.is_some(), key.is_none(), "an unauthenticated request is not answered");
        }
    }
}

#[test]
fn brief_reply_leaves_out_only_trailing_padding() {
    for keys in [None, Some(keys(SECRET))] {
        let key = keys.as_ref().map(|keys| keys.current().clone());
        let (mode, mut padded) = (mode(key.as_ref()), base(3, 7, key.as_ref()));
        let requested = SessionRecord { session: 5, is_brief: true, ..SessionRecord::default() };
        requested.write(tlv::append(&mut padded, tlv::SESSION, SessionRecord::BYTES).value_mut(&mut padded));
        seal_extensions(&mut padded, key.as_ref());
        let kept = padded.len();
        tlv::append(&mut padded, tlv::PADDING, 8_000);
        let reply = send_request(&mut responder(keys.clone()), &padded, &arrival(PROBER, at(0))).bytes();
        assert_eq!(reply.len(), kept);
        let record = record(&reply, mode);
        assert!(record.is_reply && record.is_brief && record.highest == 3);
        assert!(keys.is_none_or(|keys| tlv::are_authentic(&reply, mode.base_bytes(), &keys)));
    }
}

#[test]
fn authenticated_request_with_a_changed_bit_gets_no_reply() {
    let keys = keys(SECRET);
    let whole = request(1, 5, Some(keys.current()));
    let flags_of_hmac = whole.len() - 20;
    let untouched = send_request(&mut responder(Some(keys.clone())), &whole, &arrival(PROBER, at(0)));
    for bit in 0..whole.len() * 8 {
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let outcome = send_request(&mut responder(Some(keys.clone())), &changed, &arrival(PROBER, at(0)));
        if bit / 8 == flags_of_hmac {
            // The HMAC does not cover its own flags; they are ignored, and the reply has its own.
            assert_eq!(outcome, untouched, "bit {bit}");
        } else {
            assert_eq!(outcome.reply, None, "bit {bit}");
        }
    }
}

#[test]
fn changed_request_of_a_listed_peer_is_never_recorded_as_authentic() {
    let keys = keys(SECRET);
    let whole = request(9, 5, Some(keys.current()));
    for bit in (0..whole.len() * 8).filter(|bit| bit / 8 != whole.len() - 20) {
        let mut changed = whole.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let mut responder = StampResponder::new(policy(true), Some(keys.clone()), 8);
        let outcome = send_request(&mut responder, &changed, &arrival(PROBER, at(0)));
        if let Some((_, reply)) = outcome.reply {
            // The datagram looks like an open request, which a listed source may send; the prober detects it
            // in the reply.
            assert!(stamp::verify(&reply, &keys).is_err(), "bit {bit}");
        }
        let next = request(11, 5, Some(keys.current()));
        let reply = send_request(&mut responder, &next, &arrival(PROBER, at(1))).bytes();
        assert_eq!(record(&reply, Mode::Authenticated).first_and_unique(), (11, 1), "bit {bit}");
    }
}

trait FirstAndUnique {
    fn first_and_unique(&self) -> (u32, u32);
}

impl FirstAndUnique for SessionRecord {
    fn first_and_unique(&self) -> (u32, u32) {
        (self.count_or_first, self.unique)
    }
}

#[test]
fn only_padding_may_follow_the_hmac() {
    let keys = keys(SECRET);
    let whole = request(1, 5, Some(keys.current()));
    let mut padded = whole.clone();
    tlv::append(&mut padded, tlv::PADDING, 8);
    assert!(
        send_request(&mut responder(Some(keys.clone())), &padded, &arrival(PROBER, at(0))).reply.is_some()
    );
    for kind in [tlv::SESSION, tlv::CLASS_OF_SERVICE, tlv::HMAC, 200] {
        let mut appended = whole.clone();
        let value = tlv::append(&mut appended, kind, SessionRecord::BYTES);
        SessionRecord { session: 6, ..SessionRecord::default() }.write(value.value_mut(&mut appended));
        let outcome = send_request(&mut responder(Some(keys.clone())), &appended, &arrival(PROBER, at(0)));
        assert_eq!(outcome, refused(Refusal::Unauthentic), "type {kind}");
    }
}

#[test]
fn replay_from_another_address_is_refused_and_a_new_request_is_answered() {
    let keys = keys(SECRET);
    let mut responder = responder(Some(keys.clone()));
    let mut signed = |sequence, from, ms| {
        let datagram = request(sequence, 5, Some(keys.current()));
        send_request(&mut responder, &datagram, &arrival(from, at(ms)))
    };
    for sequence in 0..10 {
        assert!(signed(sequence, PROBER, sequence.into()).reply.is_some());
    }
    for captured in 0..10 {
        assert_eq!(signed(captured, OTHER, 20), refused(Refusal::Replay), "sequence number {captured}");
    }
    let rebound = (PROBER.0, 40_001);
    let (send, reply) = signed(10, rebound, 30).reply.expect("a NAT rebinding is accepted");
    assert_eq!(send.to, rebound.into());
    assert_eq!(record(&reply, Mode::Authenticated).unique, 11, "it is the same session");
    assert_eq!(signed(9, PROBER, 31), refused(Refusal::Replay), "an old request of the previous binding");
}

#[test]
fn unauthentic_and_unlisted_sources_are_refused_with_their_own_reason() {
    let (right, wrong) = (keys(SECRET), keys("fedcba9876543210"));
    let mut closed = responder(Some(right.clone()));
    let from = arrival(PROBER, at(0));
    let outcome = send_request(&mut closed, &request(0, 5, Some(wrong.current())), &from);
    assert_eq!(outcome, refused(Refusal::Unauthentic));
    assert_eq!(send_request(&mut closed, &request(0, 5, None), &from), refused(Refusal::Unlisted));
    assert!(send_request(&mut closed, &request(0, 5, Some(right.current())), &from).reply.is_some());
    let mut listing = policy(false);
    listing.prefixes = vec!["192.0.2.0/24".parse().unwrap()];
    listing.peers = [[203, 0, 113, 7].into()].into();
    let mut listed = StampResponder::new(listing, None, 8);
    let sources = [(PROBER.0, true), ([203, 0, 113, 7], true), (OTHER.0, false)];
    for (session, (source, is_listed)) in (0..).zip(sources) {
        let outcome =
            send_request(&mut listed, &request(0, session, None), &arrival((source, 40_000), at(0)));
        let expected = (!is_listed).then_some(Refusal::Unlisted);
        assert_eq!(outcome.refusal, expected, "{source:?}");
    }
    assert_eq!(listed.sessions(), 2);
}

/// A request with random extensions: known and unknown types, right and wrong lengths, lengths beyond the
/// end.
fn wild_request(random: &mut Random, key: Option<&Key>) -> Vec<u8> {
    let sequence = u32::try_from(random.below(300)).unwrap();
    let mut out = base(sequence, 7, key);
    for _ in 0..random.below(6) {
        let known = [tlv::PADDING, tlv::CLASS_OF_SERVICE, tlv::FOLLOW_UP, tlv::HMAC, tlv::SESSION, 3, 240];
        let kind = known[usize::try_from(random.below(7)).unwrap()];
        let len = [0, 4, 16, 52, random.below(70)][usize::try_from(random.below(5)).unwrap()];
        let found = tlv::append(&mut out, kind, u16::try_from(len).unwrap());
        let value = garbage(random, found.len);
        found.value_mut(&mut out).copy_from_slice(&value);
        if kind == tlv::SESSION && len == 52 {
            let session = u32::try_from(random.below(3)).unwrap();
            let (is_reply, is_brief) = (random.chance(0.1), random.chance(0.3));
            SessionRecord { session, is_reply, is_brief, ..SessionRecord::default() }
                .write(found.value_mut(&mut out));
        }
        out[found.at] = random.draw().to_be_bytes()[0];
        if random.chance(0.1) {
            out[found.at + 3] ^= 0x40;
        }
    }
    if random.chance(0.7) {
        seal_extensions(&mut out, key);
    }
    if random.chance(0.3) {
        tlv::append(&mut out, tlv::PADDING, u16::try_from(random.below(2_000)).unwrap());
    }
    out
}

/// Length of the reply to a request: the last session record decides.
fn length_of_reply(request: &[u8], mode: Mode) -> usize {
    let base = mode.base_bytes();
    let ours = tlv::walk(request, base).filter(|found| found.kind == tlv::SESSION).last();
    let record = ours.and_then(|found| SessionRecord::read(found.value(request)).ok());
    match record.is_some_and(|record| record.is_brief) {
        true => tlv::bytes_before_padding(request, base),
        false => request.len(),
    }
}

#[test]
fn reply_is_never_longer_than_its_request_and_goes_to_its_source() {
    let keys = keys(SECRET);
    let (mut answered, mut refusals, mut brief) = (0, 0, 0);
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let key = random.chance(0.5).then(|| keys.current());
        let mut responder = StampResponder::new(policy(true), key.map(|_| keys.clone()), 4);
        for _ in 0..random.between(1, 4) {
            let datagram = wild_request(&mut random, key);
            let from = ([192, 0, 2, 1 + random.draw().to_be_bytes()[0] % 3], 40_000);
            let mut arrival = arrival(from, at(0));
            arrival.to = Some([192, 0, 2, 99].into());
            arrival.tos = Some(random.draw().to_be_bytes()[0]);
            let Some((send, reply)) = send_request(&mut responder, &datagram, &arrival).reply else {
                refusals += 1;
                continue;
            };
            answered += 1;
            assert_eq!(reply.len(), length_of_reply(&datagram, mode(key)), "SIM_SEED={seed}");
            assert!(reply.len() <= datagram.len(), "SIM_SEED={seed}");
            brief += usize::from(reply.len() < datagram.len());
            assert_eq!((send.to, send.from, send.ttl), (from.into(), arrival.to, 255), "SIM_SEED={seed}");
            if key.is_some() {
                assert!(stamp::verify(&reply, &keys).is_ok(), "SIM_SEED={seed}");
            }
        }
    }
    assert!(answered > 20_000 && refusals > 5_000, "{answered} answered, {refusals} refused");
    assert!(brief > 100, "{brief} were briefer");
}

/// Sends a forged datagram that seems to come from the second of two responders to the first, and transports
/// replies between the two. Returns the number of replies.
fn ping_pong(ports: [u16; 2], known: &[u16], forged: &[u8]) -> usize {
    let knowing = |own: u16| {
        let reflector_ports = known.iter().copied().chain([own, stamp::PORT]).collect();
        StampResponder::new(Policy { reflector_ports, ..policy(true) }, None, 8)
    };
    let mut responders = [knowing(ports[0]), knowing(ports[1])];
    let mut datagram = forged.to_vec();
    for replies in 0..50 {
        let (to, from) = (replies % 2, (replies + 1) % 2);
        let source = ([203, 0, 113, u8::try_from(from).unwrap()], ports[from]);
        let outcome = send_request(&mut responders[to], &datagram, &arrival(source, at(replies as u64)));
        let Some((_, reply)) = outcome.reply else { return replies };
        datagram = reply;
    }
    50
}

#[test]
fn forged_request_causes_no_loop_between_two_responders() {
    for forged in [request(0, 5, None), base(0, 7, None), vec![0; 44], vec![0x80; 1_400]] {
        assert_eq!(ping_pong([862, 862], &[], &forged), 0, "both on the STAMP port");
        assert_eq!(ping_pong([9_862, 9_862], &[], &forged), 0, "both on the agent port");
        assert_eq!(ping_pong([9_862, 862], &[], &forged), 0, "agent port, STAMP port");
        assert!(ping_pong([862, 9_862], &[], &forged) <= 1, "STAMP port, agent port");
        assert_eq!(ping_pong([7_000, 9_862], &[9_862], &forged), 0, "a configured reflector port");
        assert!(ping_pong([9_862, 7_000], &[9_862], &forged) <= 1, "the reverse direction");
    }
    assert_eq!(
        ping_pong([7_000, 8_000], &[], &request(0, 5, None)),
        1,
        "a reply with a session record is recognised"
    );
}

#[test]
fn returned_reply_is_refused() {
    for keys in [None, Some(keys(SECRET))] {
        let key = keys.as_ref().map(|keys| keys.current().clone());
        let mut responder = StampResponder::new(policy(true), keys, 8);
        for sent in [request(0, 5, key.as_ref()), base(0, 7, key.as_ref())] {
            let is_known = key.is_some() || sent.len() > 44;
            let reply = send_request(&mut responder, &sent, &arrival(PROBER, at(0))).bytes();
            for from in [PROBER, OTHER] {
                let outcome = send_request(&mut responder, &reply, &arrival(from, at(1)));
                // Without key and session record, a reply looks like a request except for its port.
                assert_eq!(outcome == refused(Refusal::Reflection), is_known, "{outcome:?}");
            }
        }
    }
}

#[test]
fn invalid_hmac_extension_is_flagged_as_not_recognised() {
    let mut datagram = base(0, 7, None);
    tlv::append(&mut datagram, tlv::FOLLOW_UP, 16);
    tlv::append(&mut datagram, tlv::HMAC, 16);
    for keys in [None, Some(keys(SECRET))] {
        let reply =
            send_request(&mut StampResponder::new(policy(true), keys, 8), &datagram, &arrival(PROBER, at(0)))
                .bytes();
        let flags: Vec<(u8, u8)> = tlv::walk(&reply, 44).map(|found| (found.kind, found.flags)).collect();
        assert_eq!(flags, [(tlv::FOLLOW_UP, 0), (tlv::HMAC, tlv::UNRECOGNIZED)], "open mode has no key");
    }
}

#[test]
fn multicast_source_is_never_answered() {
    let outcome =
        send_request(&mut responder(None), &request(0, 5, None), &arrival(([224, 0, 0, 1], 40_000), at(0)));
    assert_eq!(outcome, refused(Refusal::Reflection));
}

#[test]
fn rate_limit_per_source_does_not_affect_other_sources() {
    let rates = Policy { rate: 10_000, rate_per_source: 100, ..policy(true) };
    let mut responder = StampResponder::new(rates, None, 8);
    let (mut fast, mut slow) = (0, 0);
    for millisecond in 0..10_000_u64 {
        let sequence = u32::try_from(millisecond).unwrap();
        let outcome =
            send_request(&mut responder, &request(sequence, 1, None), &arrival(PROBER, at(millisecond)));
        fast += u64::from(outcome.reply.is_some());
        assert!(outcome.refusal.is_none_or(|why| why == Refusal::SourceRate));
        if millisecond % 20 == 0 {
            let outcome =
                send_request(&mut responder, &request(sequence, 2, None), &arrival(OTHER, at(millisecond)));
            slow += u64::from(outcome.reply.is_some());
        }
    }
    assert!((1_000..=1_026).contains(&fast), "{fast} of 10,000 answered at 100/s");
    assert_eq!(slow, 500);
}

#[test]
fn flood_from_many_sources_is_answered_at_the_total_rate() {
    let rates = Policy { rate: 1_000, rate_per_source: 1_000, ..policy(true) };
    let mut responder = StampResponder::new(rates, None, 64);
    let (mut answered, mut refusals) = (0, 0);
    for i in 0..20_000_u32 {
        let [_, a, b, c] = i.to_be_bytes();
        let from = arrival(([10, a, b, c], 40_000), at(u64::from(i) / 20));
        match send_request(&mut responder, &base(i, 7, None), &from).refusal {
            None => answered += 1,
            Some(why) => {
                assert_eq!(why, Refusal::TotalRate);
                refusals += 1;
            }
        }
    }
    assert!((1_000..=1_250).contains(&answered), "{answered} answered in a second at 1,000/s");
    assert_eq!(answered + refusals, 20_000);
}

#[test]
fn refused_request_uses_no_session_and_no_token() {
    let keys = keys(SECRET);
    let rates = Policy { rate: 64, rate_per_source: 64, ..policy(false) };
    let mut responder = StampResponder::new(rates, Some(keys.clone()), 8);
    for i in 0..1_000 {
        send_request(&mut responder, &request(i, i, None), &arrival(PROBER, at(0)));
    }
    assert_eq!(responder.sessions(), 0);
    for i in 0..16 {
        let outcome =
            send_request(&mut responder, &request(i, 5, Some(keys.current())), &arrival(PROBER, at(0)));
        assert!(outcome.reply.is_some(), "{i}");
    }
}

#[test]
fn session_table_is_bounded_and_evicts_the_least_recently_used() {
    let mut responder = StampResponder::new(policy(true), None, 100);
    for session in 0..5_000 {
        assert!(
            send_request(&mut responder, &request(0, session, None), &arrival(PROBER, at(0))).reply.is_some()
        );
        // One session stays active.
        let reply =
            send_request(&mut responder, &request(session + 1, 0, None), &arrival(PROBER, at(0))).bytes();
        assert_eq!(record(&reply, Mode::Open).unique, session + 2);
        assert!(responder.sessions() <= 100);
    }
    let reply = send_request(&mut responder, &request(9, 1, None), &arrival(PROBER, at(0))).bytes();
    assert_eq!(record(&reply, Mode::Open).first_and_unique(), (9, 1), "an evicted session begins again");
}

#[test]
fn session_continues_across_a_sequence_number_wrap() {
    let mut responder = responder(None);
    for i in 0..200_u32 {
        let sequence = (u32::MAX - 99).wrapping_add(i);
        let (_, reply) =
            send_request(&mut responder, &request(sequence, 5, None), &arrival(PROBER, at(i.into())))
                .reply
                .unwrap();
        let known = record(&reply, Mode::Open);
        assert_eq!((known.highest, known.unique, known.count_or_first), (sequence, i + 1, u32::MAX - 99));
        assert_eq!((known.duplicates, known.reordered), (0, 0));
        let bits = if i >= 127 { u128::MAX } else { (1 << (i + 1)) - 1 };
        assert_eq!(known.bitmap, bits, "at {sequence}");
        assert_eq!(stamp::Reply::decode(&reply, Mode::Open).unwrap().sequence, i, "replies are counted");
    }
    assert_eq!(responder.sessions(), 1);
}

#[test]
fn reply_has_the_requested_class_of_service_and_no_ecn_bits() {
    for wanted in 0..64 {
        let mut datagram = base(0, 7, None);
        let class = ClassOfService { wanted, ..ClassOfService::default() };
        class.write(tlv::append(&mut datagram, tlv::CLASS_OF_SERVICE, 4).value_mut(&mut datagram));
        let mut arrival = arrival(PROBER, at(0));
        arrival.tos = Some(10 << 2 | 3);
        let (send, reply) = send_request(&mut responder(None), &datagram, &arrival).reply.unwrap();
        assert_eq!(send.tos, wanted << 2, "no ECN bits: routers set them");
        let found = tlv::walk(&reply, 44).next().unwrap();
        let class = ClassOfService::read(found.value(&reply)).unwrap();
        assert_eq!(class, ClassOfService { wanted, received: 10, ecn: 3 });
    }
}

#[test]
fn icmp_error_is_not_a_request() {
    use pathmeter_proto::machine::{HostDrops, IcmpError, IcmpKind, Step};
    let mut responder = responder(None);
    let error = IcmpError {
        router: [192, 0, 2, 3].into(),
        kind: IcmpKind::Other,
        code: 0,
        mtu: None,
        extensions_at: None,
    };
    let mut quoted = arrival(PROBER, at(0));
    quoted.icmp = Some(error);
    responder.received(&request(0, 5, None), &quoted);
    let step = responder.step(super::manual::now(at(0)), &mut HostDrops::default(), &mut Vec::new());
    assert!(matches!(step, Step::Wait(_)), "{step:?}");
    assert_eq!(responder.sessions(), 0);
}
