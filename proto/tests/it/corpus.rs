//! Replays the corpora of the fuzz targets, and mutations of them.

use std::path::PathBuf;
use std::time::Duration;

use pathmeter_proto::key::Key;
use pathmeter_proto::sim::Random;
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::icmp::{IcmpEcho, IcmpVersion};
use pathmeter_proto::wire::icmp_extensions::IcmpExtensions;
use pathmeter_proto::wire::quoted_header::{QuotedChecksum, QuotedHeader};
use pathmeter_proto::wire::stream::{self, Seal, Welcome, WelcomeStatus};
use pathmeter_proto::wire::tcp::{EmptySegment, SegmentTimestamps};
use pathmeter_proto::wire::tlv::{self, SessionRecord};
use pathmeter_proto::wire::websocket::MessageFormat;
use pathmeter_proto::wire::{Goodbye, NtpTime, ReplyFate, ReverseOutcome, ReverseTrace};

use super::conservation::scaled;
use super::fuzzed::{HELLO, SECRET, TARGETS, WELCOME, run};
use super::manual::{PROBER, arrival, at, base, keys, request, responder, seal_extensions, send_request};

/// Minimum number of committed seeds per target.
const SEEDS: usize = 36;

fn folder(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder(target)).unwrap_or_else(|error| panic!("{target}: {error}"));
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut seeds: Vec<(String, Vec<u8>)> =
        paths.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect();
    seeds.sort();
    seeds
}

#[test]
fn corpora_violate_no_invariant() {
    for (target, _) in TARGETS {
        let seeds = seeds(target);
        assert!(seeds.len() >= SEEDS, "{target} has {} seeds", seeds.len());
        for (path, seed) in seeds {
            let outcome = std::panic::catch_unwind(|| run(target, &seed));
            assert!(outcome.is_ok(), "{path}");
        }
    }
}

#[test]
fn mutations_of_the_corpora_violate_no_invariant() {
    for (target, _) in TARGETS {
        let seeds = seeds(target);
        for number in 0..scaled(20_000) {
            let mut random = Random::new(number);
            let (_, seed) = &seeds[random.below(seeds.len() as u64) as usize];
            let mut input = seed.clone();
            for _ in 0..=random.below(4) {
                mutate(&mut random, &mut input);
            }
            let outcome = std::panic::catch_unwind(|| run(target, &input));
            assert!(outcome.is_ok(), "{target}, mutation {number}: {input:02x?}");
        }
    }
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        bytes.push(random.draw() as u8);
        return;
    }
    let at = random.below(bytes.len() as u64) as usize;
    match random.below(7) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.draw() as u8,
        2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5) as usize],
        3 => bytes.truncate(at),
        4 => bytes.insert(at, random.draw() as u8),
        5 => drop(bytes.remove(at)),
        _ => {
            let piece = bytes[at..].iter().copied().take(1 + random.below(200) as usize).collect::<Vec<u8>>();
            let to = random.below(bytes.len() as u64) as usize;
            bytes.splice(to..to, piece);
        }
    }
}

/// A message for the targets that read streams.
const MESSAGE: Message = Message { sequence: 70_000, timestamp: NtpTime(0xe7bd_5f00_1999_99ab) };

/// Valid inputs of a target, from which its corpus is made.
fn valid(target: &str) -> Vec<Vec<u8>> {
    let keys = keys(SECRET);
    let key = Some(keys.current());
    let open =
        [request(1, 5, None), base(1, 7, None), reverse_request(2, 3, None), reverse_request(3, 0, None)];
    let keyed = [request(1, 5, key), base(1, 7, key), reverse_request(2, 3, key), reverse_request(3, 0, key)];
    let reply = |request: &Vec<u8>, keys| {
        send_request(&mut responder(keys), request, &arrival(PROBER, at(0))).bytes()
    };
    let open_replies = open.iter().map(|request| reply(request, None));
    let keyed_replies = keyed.iter().map(|request| reply(request, Some(keys.clone())));
    let requests = [open.clone(), keyed.clone()].concat();
    match target {
        "decode_stamp" => requests.iter().cloned().chain(open_replies).chain(keyed_replies).collect(),
        "decode_tlv" => {
            let replies = requests.iter().cloned().chain(open_replies).chain(keyed_replies);
            replies.chain([reply_with_answers()]).collect()
        }
        "decode_goodbye" => [
            "",
            "ams-1",
            "fra-1.example.net",
            "a-name-of-sixty-four-bytes-which-is-the-longest-that-there-can-be",
        ]
        .map(|name| {
            let goodbye = Goodbye { name: name.into(), boot_id: 7, at: WallTime::from_nanos(9) };
            let mut bytes = goodbye.encode(&keys.derive(Goodbye::PURPOSE));
            // The target signs.
            bytes.truncate(bytes.len() - 16);
            bytes
        })
        .into(),
        "decode_icmp" => [(IcmpVersion::V4, 32), (IcmpVersion::V6, 64), (IcmpVersion::V4, 33)]
            .into_iter()
            .flat_map(|(version, size)| {
                let echo = IcmpEcho { session: 7, timestamp: NtpTime(1 << 40), sequence: 70_000, ssid: 9 };
                let mut request = Vec::new();
                echo.encode(version, size, &mut request);
                let mut reply = request.clone();
                reply[0] = version.reply();
                [request, reply]
            })
            .collect(),
        "decode_icmp_extensions" => extension_structures(),
        "decode_tcp" => segments_and_reports(),
        "decode_quoted_header" => quotations(),
        "decode_greeting" => {
            let keys = keys.derive(stream::PURPOSE);
            let refusal = Welcome { status: WelcomeStatus::Unlisted, ..WELCOME };
            [
                HELLO.encode(None),
                HELLO.encode(Some(&keys)),
                WELCOME.encode(&HELLO, None),
                WELCOME.encode(&HELLO, Some(keys.current())),
                refusal.encode(&HELLO, None),
            ]
            .map(Vec::from)
            .into()
        }
        "decode_stream" => {
            let keys = keys.derive(stream::PURPOSE);
            let seals = [None, Some(keys.current())].map(|key| Seal::of(key, &HELLO, &WELCOME));
            let messages = seals.iter().flat_map(|seal| {
                let mut request = Vec::new();
                seal.request(MESSAGE, HELLO.message_bytes, &mut request);
                let mut reply = request.clone();
                seal.reply(
                    &mut reply,
                    WallTime::from_nanos(1 << 60),
                    WallTime::from_nanos((1 << 60) + 9_000),
                );
                [request, reply]
            });
            messages.collect()
        }
        "decode_websocket" => [
            (MessageFormat::Text, 96),
            (MessageFormat::Text, 130),
            (MessageFormat::Binary, 16),
            (MessageFormat::Binary, 40),
        ]
        .map(|(format, bytes)| format.encode(MESSAGE, bytes))
        .into(),
        "key_file" => {
            let hex = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
            let files = [
                hex.to_owned(),
                format!("# mesh\n\n{SECRET}\n"),
                format!("{hex}\r\n  {SECRET}\t\n"),
                format!("{hex}\n{hex}\n{hex}"),
                "short".into(),
            ];
            files.map(String::into_bytes).into()
        }
        "responder" => [0x02, 0x11, 0x13, 0x76].map(|flags| conversation(flags, &requests)).into(),
        "prober" | "icmp_prober" => [0x02, 0x03, 0x8a, 0x93, 0xe4].map(events).into(),
        "tracer" => [0x02, 0x07, 0x4e, 0xdb, 0x64].map(trace_events).into(),
        "enumerator" => [0x02, 0x03, 0x06, 0x00, 0x03].map(enumeration_events).into(),
        _ => panic!("{target} is not a target"),
    }
}

/// A request that asks for a reply with this TTL; 0: for answers of routers.
fn reverse_request(sequence: u32, ttl: u8, key: Option<&Key>) -> Vec<u8> {
    let mut out = base(sequence, 7, key);
    let record = SessionRecord { session: 5, count_or_first: sequence, ..SessionRecord::default() };
    record.write(tlv::append(&mut out, tlv::SESSION, SessionRecord::BYTES).value_mut(&mut out));
    let reverse = ReverseTrace { ttl, expected: Some([10, 0, 0, 3].into()), ..ReverseTrace::default() };
    reverse.write(tlv::append(&mut out, tlv::REVERSE_TRACE, ReverseTrace::BYTES).value_mut(&mut out));
    seal_extensions(&mut out, key);
    out
}

/// Structures with labels, with interfaces that have all fields, and with both beside an unknown object.
fn extension_structures() -> Vec<Vec<u8>> {
    let stack = [0x03, 0xe8, 0x40, 0x01, 0x05, 0xdc, 0xfb, 0xfe];
    let v4 =
        [&[0, 0, 2, 1, 0, 1, 0, 0, 192, 0, 2, 1, 16][..], b"GigabitEth0/1\0\0", &[0, 0, 5, 220]].concat();
    let v6 = [&[0, 2, 0, 0, 0x20, 1, 0x0d, 0xb8][..], &[0; 11], &[7, 8], b"ge-0/0\0"].concat();
    let longest = [[64].as_slice(), "ü".repeat(32).as_bytes().get(..63).unwrap_or_default()].concat();
    [
        &[(1, 1, &stack[..])][..],
        &[(2, 0x0f, &v4), (2, 0xc6, &v6)],
        &[(1, 1, &stack[4..]), (9, 9, &[1, 2, 3]), (2, 0x88, &[0, 0, 0, 7]), (2, 0x42, &longest)],
        &[],
    ]
    .map(IcmpExtensions::encode)
    .into()
}

/// TCP segments, and what routers report of them, also with extensions.
fn segments_and_reports() -> Vec<Vec<u8>> {
    let segment = |source: &str, destination: &str| {
        let segment =
            EmptySegment { sequence: 70_000, acknowledgment: 80_000, window: 501, timestamps: None };
        segment.encode(source.parse().unwrap(), destination.parse().unwrap())
    };
    let v4 = segment("192.0.2.1:9862", "198.51.100.7:50000");
    let v6 = segment("[2001:db8::1]:9862", "[2001:db8:1::7]:50000");
    let timestamps = Some(SegmentTimestamps { value: 7, echo: 9 });
    let mut options = EmptySegment { sequence: 1, acknowledgment: 2, window: 3, timestamps }
        .encode("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap());
    options[12] = 11 << 4;
    options.extend([1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    let mut data = v4.clone();
    data[12] = 8 << 4;
    data.extend([1; 20]);
    let v4_header = [0x45, 0, 0, 40, 0, 0, 0, 0, 1, 6, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7];
    let v6_header = [&[0x60, 0, 0, 0, 0, 20, 6, 1][..], &[0x20; 32]].concat();
    let report = |head: [u8; 8], header: &[u8], segment: &[u8]| [&head, header, segment].concat();
    let mut labelled = report([11, 0, 0, 0, 0, 32, 0, 0], &v4_header, &v4);
    labelled.resize(8 + 128, 0);
    labelled.extend(&extension_structures()[0]);
    vec![
        report([11, 0, 0, 0, 0, 0, 0, 0], &v4_header, &v4[..8]),
        v4,
        options,
        data,
        report([3, 0, 0, 0, 0, 0, 0, 0], &v6_header, &v6),
        labelled,
    ]
}

/// ICMP errors that quote whole packets with right checksums: UDP and TCP over both versions of IP, and an echo
/// request.
fn quotations() -> Vec<Vec<u8>> {
    let udp = [0x9c, 0x40, 0x03, 0x5e, 0, 12, 0xaf, 0x34, 0x61, 0x62, 0x63, 0x64];
    let udp_v6 = [0x9c, 0x40, 0x03, 0x5e, 0, 12, 0x3f, 0xf6, 0x61, 0x62, 0x63, 0x64];
    let tcp = |source: &str, destination: &str| {
        let segment =
            EmptySegment { sequence: 70_000, acknowledgment: 80_000, window: 501, timestamps: None };
        segment.encode(source.parse().unwrap(), destination.parse().unwrap())
    };
    let mut echo = Vec::new();
    IcmpEcho { session: 7, timestamp: NtpTime(1 << 40), sequence: 70_000, ssid: 9 }.encode(
        IcmpVersion::V4,
        32,
        &mut echo,
    );
    let v4 = |protocol: u8, packet: &[u8]| {
        let total = 20 + packet.len() as u8;
        let header = [0x45, 0xba, 0, total, 0, 0, 0x40, 0, 1, protocol, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7];
        [&[11, 0, 0, 0, 0, 0, 0, 0], &header[..], packet].concat()
    };
    let v6 = |protocol: u8, packet: &[u8]| {
        let mut header = vec![0x6b, 0xa1, 0x23, 0x45, 0, packet.len() as u8, protocol, 1];
        for last in [[0, 1], [1, 7]] {
            header.extend([0x20, 0x01, 0x0d, 0xb8, 0, last[0], 0, 0, 0, 0, 0, 0, 0, 0, 0, last[1]]);
        }
        [&[3, 0, 0, 0, 0, 0, 0, 0], &header[..], packet].concat()
    };
    vec![
        v4(17, &udp),
        v6(17, &udp_v6),
        v4(6, &tcp("192.0.2.1:9862", "198.51.100.7:50000")),
        v6(6, &tcp("[2001:db8::1]:9862", "[2001:db8:1::7]:50000")),
        v4(1, &echo),
    ]
}

#[test]
fn quotations_have_right_checksums() {
    for mut message in quotations() {
        let version = if message[0] == 11 { IcmpVersion::V4 } else { IcmpVersion::V6 };
        if version == IcmpVersion::V4 {
            let checksum = !ones_complement_sum(&message);
            message[2..4].copy_from_slice(&checksum.to_be_bytes());
        }
        let header = QuotedHeader::decode(&message, version).unwrap();
        assert_eq!((header.checksum, header.dscp.value(), header.ecn), (QuotedChecksum::Right, 46, 2));
    }
}

fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A reply whose extension for the way back has all fields.
fn reply_with_answers() -> Vec<u8> {
    let answer = |sequence: u32, router: &str| {
        let (router, rtt) = (router.parse().unwrap(), Duration::from_micros(1_234));
        Some(ReverseOutcome { sequence, fate: ReplyFate::Answered { router, rtt } })
    };
    let reverse = ReverseTrace {
        is_reply: true,
        deferred: Some(Duration::from_millis(1_300)),
        ttl: 3,
        expected: Some("2001:db8::3".parse().unwrap()),
        outcomes: [answer(1, "10.0.0.1"), answer(2, "2001:db8::2"), None],
    };
    let mut out = base(3, 7, None);
    reverse.write(tlv::append(&mut out, tlv::REVERSE_TRACE, ReverseTrace::BYTES).value_mut(&mut out));
    out
}

/// Records for the target `responder`: each request from two sources, followed by its reply sent back.
fn conversation(flags: u8, requests: &[Vec<u8>]) -> Vec<u8> {
    let mut out = vec![flags];
    for from in [1, 200] {
        for request in requests {
            let [high, low] = (request.len() as u16).to_be_bytes();
            // A router answers the reply.
            out.extend([from, 5, 16, high, low]);
            out.extend(request);
            out.extend([from, 0, 4, 0, 0]);
        }
    }
    out
}

/// Records for the target `prober`: slots, replies, duplicates, damaged replies, transmit timestamps, ICMP
/// errors.
fn events(flags: u8) -> Vec<u8> {
    let wait = [1, 2];
    let reply = [2, 0, 0, 9];
    let twice = [2, 0, 16, 0];
    let damaged = [2, 1, 9, 0, 30, 7, 0];
    let timestamp = [5, 3, 0];
    let quoted = [10, 0, 200];
    let mut out = vec![flags];
    for piece in [
        &wait[..],
        &reply,
        &wait,
        &timestamp,
        &twice,
        &wait,
        &damaged,
        &quoted,
        &wait,
        &[9],
        &wait,
        &[1, 255],
        &reply,
    ] {
        out.extend_from_slice(piece);
    }
    out.extend([6, 1, 2, 7, 0, 6, 11, 3, 1, 100, 4, 3, 0, 1, 2, 3, 8, 2, 0, 0, 0]);
    out
}

/// Records for the target `tracer`: traces of both directions whose routers are the known ones, others, or
/// alternate; then damaged replies and extensions, errors that quote anything, and findings.
fn trace_events(flags: u8) -> Vec<u8> {
    let mut out = vec![flags, 29];
    // The destination is five routers away, also on the way back.
    out.extend([3, 0, 0, 5, 0]);
    for round in 0..4 {
        for step in 0..45 {
            // A router answers the latest probe, or the reply to it.
            let router = [32, 32, 48, 48 + step % 2][round];
            out.extend([7, 60, 0, 5, router]);
            out.extend([3, 0, 0, 5, router]);
            out.extend([[0, 3], [1, 3]][usize::from(step > 12)]);
        }
        out.extend([9, 3, 0, 2, 1, 15, 1, 0]);
    }
    // A router that attaches labels and an interface: to a quotation, and to one that is cut inside of it.
    out.extend([7, 60, 0, 5, 200, 60, 3, 0xe8, 0x40, 1, 5, 0xdc, 0xfb, 0xfe, 0x0c]);
    out.extend([7, 60, 0, 5, 200, 20, 3, 0xe8, 0x40, 1, 5, 0xdc, 0xfb, 0xfe, 0x02]);
    // Damaged bytes, a damaged extension, a truncated reply sealed again, and a reply that arrives twice.
    out.extend([3, 0, 0x81, 5, 0, 30, 7, 0, 3, 1, 0x84, 5, 2, 5, 2, 7, 20, 0, 3, 2, 0x98, 5, 0, 120, 0]);
    out.extend([3, 0, 0xa0, 5, 0, 6, 4, 0, 1, 2, 3, 4, 8, 3, 0, 9, 9, 9, 5, 1, 7, 0, 2, 5, 1, 7, 1, 8, 5, 2]);
    out.extend([14, 0, 0, 9, 14, 0, 1, 4, 15, 1, 7, 1, 10, 10, 1, 20, 11, 0, 10, 13, 2, 60, 12, 2, 7]);
    out
}

/// Records for the target `enumerator`: routers of hops of different widths answer; then the destination does,
/// to the end; with time for unanswered probes in between, damaged replies, short quotations, garbage, and
/// refused and withdrawn probes.
fn enumeration_events(flags: u8) -> Vec<u8> {
    let mut out = vec![flags, 96, 12];
    for width in [0, 1, 3, 0] {
        for _ in 0..6 {
            out.extend([2, 40, width, 0, 10]);
        }
        out.extend([1, 110, 6, 0, 9, 3, 0, 6, 60, 9, 1, 1, 8, 0]);
    }
    out.extend([5, 1, 0, 30, 2, 7, 3, 1, 2, 3, 9, 0, 10, 1, 20, 10, 11, 1, 110]);
    for _ in 0..60 {
        for latest in 0..6 {
            out.extend([5, 0, 0, 0, latest]);
        }
        out.extend([0, 100, 1, 30]);
    }
    out
}

#[test]
#[ignore = "rewrites fuzz/corpus: run it when the wire format has changed"]
fn write_seeds() {
    for (target, _) in TARGETS {
        let valid = valid(target);
        let mut random = Random::new(target.len() as u64);
        std::fs::create_dir_all(folder(target)).unwrap();
        for number in 0..SEEDS {
            let mut seed = valid[number % valid.len()].clone();
            if number >= valid.len() {
                for _ in 0..=random.below(3) {
                    mutate(&mut random, &mut seed);
                }
            }
            std::fs::write(folder(target).join(format!("seed-{number:02}")), seed).unwrap();
        }
    }
}
