//! Replays the corpora of the fuzz targets, and mutations of them.

use std::path::PathBuf;

use pathmeter_proto::sim::Random;
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::Message;
use pathmeter_proto::wire::icmp::{IcmpEcho, IcmpVersion};
use pathmeter_proto::wire::stream::{self, Seal, Welcome, WelcomeStatus};
use pathmeter_proto::wire::websocket::MessageFormat;
use pathmeter_proto::wire::{Goodbye, NtpTime};

use super::conservation::scaled;
use super::fuzzed::{HELLO, SECRET, TARGETS, WELCOME, run};
use super::manual::{PROBER, arrival, at, base, keys, request, responder, send_request};

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
    let requests = [request(1, 5, None), base(1, 7, None), request(1, 5, key), base(1, 7, key)];
    let is_keyed = |index: usize| index >= 2;
    let replies = requests.iter().enumerate().map(|(index, request)| {
        let keys = is_keyed(index).then(|| keys.clone());
        send_request(&mut responder(keys), request, &arrival(PROBER, at(0))).bytes()
    });
    match target {
        "decode_stamp" | "decode_tlv" => requests.iter().cloned().chain(replies).collect(),
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
        _ => panic!("{target} is not a target"),
    }
}

/// Records for the target `responder`: each request from two sources, followed by its reply sent back.
fn conversation(flags: u8, requests: &[Vec<u8>]) -> Vec<u8> {
    let mut out = vec![flags];
    for from in [1, 200] {
        for request in requests {
            let [high, low] = (request.len() as u16).to_be_bytes();
            out.extend([from, 5, 0, high, low]);
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
