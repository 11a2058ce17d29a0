//! Interoperability with stamp-suite 1.0.0, from packets captured on loopback.
//!
//! Its sender measured its stateless reflector, with session identifier 0x1234 and, if authenticated,
//! [`KEY`].

use std::sync::Arc;

use pathmeter_proto::echo::{EchoReport, EchoSpec, Quirks, Verdict, WireFormat};
use pathmeter_proto::key::{Key, Keys};
use pathmeter_proto::wire::stamp::{self, Mode, Reply, Request};
use pathmeter_proto::wire::tlv::{self, ClassOfService};

use super::conservation::{MS, spec};
use super::manual::{PROBER, TestProber, arrival, at, mode, responder, send_request};

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const CAPTURES: [Capture; 4] = [
    Capture {
        what: "open",
        mode: Mode::Open,
        tos: 0,
        request: "00000000eeaabfe099b1fffe0001123400000000000000000000000000000000000000000000000000000000",
        reply: "00000000eeaabfe099b98cdc00011234eeaabfe099b8f17000000000eeaabfe099b1fffe00010000ff000000",
        extensions: &[],
    },
    Capture {
        what: "open, with class of service and padding",
        mode: Mode::Open,
        tos: 0xb8,
        request: "00000000eeaac0af20af9aef000112340000000000000000000000000000000000000000000000000000000080040004\
             b8000000800100084f17ce0953075c4b",
        reply: "00000000eeaac0af20b6d40d00011234eeaac0af20b5b2b600000000eeaac0af20af9aef00010000ff00000000040004\
             bae03000000100084f17ce0953075c4b",
        extensions: &[tlv::CLASS_OF_SERVICE, tlv::PADDING],
    },
    Capture {
        what: "authenticated",
        mode: Mode::Authenticated,
        tos: 0,
        request: "00000000000000000000000000000000eeaabfe6799cc229000112340000000000000000000000000000000000000000\
             0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000009a34\
             ff077b519831c95dba13bc99661f",
        reply: "00000000000000000000000000000000eeaabfe679a337db0001123400000000eeaabfe679a26a0400000000000000000000\
             0000000000000000000000000000eeaabfe6799cc2290001000000000000ff000000000000000000000000000000950aa04c\
             1f32221584730520c6d591d7",
        extensions: &[],
    },
    Capture {
        what: "authenticated, with class of service",
        mode: Mode::Authenticated,
        tos: 0xb8,
        request: "00000000000000000000000000000000eeaabfe935923c69000112340000000000000000000000000000000000000000\
             0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000004880\
             b463d5191f1b365965e4c335f88d80040004b8000000800800109e9537c65bcf44992a087cfb7b98556d",
        reply: "00000000000000000000000000000000eeaabfe9359bd56a0001123400000000eeaabfe9359a5cde00000000000000000000\
             0000000000000000000000000000eeaabfe935923c690001000000000000ff000000000000000000000000000000ea525783\
             3ebbdcd4785c33a7ede81f3f00040004bae03000000800107d8044be0eb48bcf8ffcfc73ac3ba37c",
        extensions: &[tlv::CLASS_OF_SERVICE, tlv::HMAC],
    },
];

struct Capture {
    what: &'static str,
    mode: Mode,
    tos: u8,
    request: &'static str,
    reply: &'static str,
    /// Types of the extensions, in order.
    extensions: &'static [u8],
}

impl Capture {
    fn keys(&self) -> Option<Arc<Keys>> {
        (self.mode == Mode::Authenticated).then(|| Arc::new(Keys::parse(KEY).unwrap()))
    }
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn kinds(datagram: &[u8], mode: Mode) -> Vec<u8> {
    tlv::walk(datagram, mode.base_bytes()).map(|found| found.kind).collect()
}

#[test]
fn captured_packets_decode_to_their_fields() {
    for Capture { what, mode, request, reply, extensions, .. } in CAPTURES {
        let (request, reply) = (bytes(request), bytes(reply));
        assert_eq!(stamp::guess_mode(&request), mode, "{what}");
        let request_fields = Request::decode(&request, mode).unwrap();
        assert_eq!(
            (request_fields.sequence, request_fields.error, request_fields.ssid),
            (0, 1, 0x1234),
            "{what}"
        );
        let reply_fields = Reply::decode(&reply, mode).unwrap();
        assert_eq!((reply_fields.sequence, reply_fields.error, reply_fields.ssid), (0, 1, 0x1234), "{what}");
        assert_eq!((reply_fields.sender_sequence, reply_fields.sender_ttl), (0, 255), "{what}");
        assert_eq!(
            (reply_fields.sender_timestamp, reply_fields.sender_error),
            (request_fields.timestamp, request_fields.error),
            "{what}"
        );
        assert!(
            (1_000..1_000_000).contains(&reply_fields.turnaround()),
            "{what}: {} ns",
            reply_fields.turnaround()
        );
        for datagram in [&request, &reply] {
            assert_eq!(kinds(datagram, mode), extensions, "{what}");
            let class =
                tlv::walk(datagram, mode.base_bytes()).find(|found| found.kind == tlv::CLASS_OF_SERVICE);
            if let Some(class) = class {
                let received = if datagram == &reply { 46 } else { 0 };
                let expected = ClassOfService { wanted: 46, received, ecn: 0 };
                assert_eq!(ClassOfService::read(class.value(datagram)), Some(expected), "{what}");
            }
        }
    }
}

#[test]
fn captured_hmacs_equal_those_of_this_implementation() {
    let key = Key::new(&bytes(KEY));
    let mut sealed = 0;
    for capture in CAPTURES.iter().filter(|capture| capture.mode == Mode::Authenticated) {
        for original in [bytes(capture.request), bytes(capture.reply)] {
            let keys = capture.keys().unwrap();
            assert!(stamp::verify(&original, &keys).is_ok(), "{}", capture.what);
            assert!(tlv::are_authentic(&original, 112, &keys), "{}", capture.what);
            let mut ours = original.clone();
            ours[96..112].fill(0);
            stamp::seal(&mut ours, Mode::Authenticated, Some(&key));
            if let Some(hmac) = tlv::walk(&original, 112).find(|found| found.kind == tlv::HMAC) {
                hmac.value_mut(&mut ours).fill(0);
                tlv::seal(&mut ours, 112, hmac, &key);
                sealed += 1;
            }
            assert_eq!(ours, original, "{}", capture.what);
        }
    }
    assert_eq!(sealed, 2);
}

#[test]
fn captured_requests_are_answered_with_the_same_layout() {
    for capture in CAPTURES {
        let (what, mode) = (capture.what, capture.mode);
        let mut arrival = arrival(PROBER, at(0));
        (arrival.ttl, arrival.tos) = (Some(255), Some(capture.tos));
        let (request, theirs) = (bytes(capture.request), bytes(capture.reply));
        let outcome = send_request(&mut responder(capture.keys()), &request, &arrival);
        let (send, ours) = outcome.reply.unwrap_or_else(|| panic!("{what}: {:?}", outcome.refusal));
        assert_eq!((ours.len(), send.tos), (theirs.len(), capture.tos), "{what}");
        assert!(capture.keys().is_none_or(|keys| stamp::verify(&ours, &keys).is_ok()), "{what}");
        assert!(capture.keys().is_none_or(|keys| tlv::are_authentic(&ours, 112, &keys)), "{what}");
        // Equal to its own reply byte by byte, except the timestamps, the error estimate, the HMACs, and the
        // reserved bits of the class of service, which stamp-suite sets.
        let base: &[std::ops::Range<usize>] = match mode {
            Mode::Open => &[4..14, 16..24],
            Mode::Authenticated => &[16..26, 32..40, 96..112],
        };
        let mut differing = base.to_vec();
        for found in tlv::walk(&theirs, mode.base_bytes()) {
            match found.kind {
                tlv::HMAC => differing.push(found.at + 4..found.end()),
                tlv::CLASS_OF_SERVICE => differing.push(found.at + 6..found.at + 8),
                _ => {}
            }
        }
        for (at, (our, their)) in ours.iter().zip(&theirs).enumerate() {
            let may_differ = differing.iter().any(|range| range.contains(&at));
            assert!(our == their || may_differ, "{what}: byte {at} is {our:#x}, not {their:#x}");
        }
    }
}

#[test]
fn captured_replies_are_accepted() {
    for capture in CAPTURES {
        let keys = capture.keys();
        let mut prober = TestProber::new(EchoSpec {
            ssids: vec![0x1234],
            wire: WireFormat::Stamp { keys: keys.clone(), quirks: Quirks::default() },
            tx_timestamps: false,
            ..spec(1, 20 * MS, 1, 10)
        });
        let request = Request::decode(&prober.datagram(), capture.mode).unwrap();
        let mut reply = bytes(capture.reply);
        let timestamp = if keys.is_some() { 64 } else { 28 };
        reply[timestamp..timestamp + 8].copy_from_slice(&request.timestamp.0.to_be_bytes());
        let key = keys.as_ref().map(|keys| keys.current());
        stamp::seal(&mut reply, mode(key), key);
        let found = prober.receives(&reply);
        let is_answer =
            |report: &EchoReport| matches!(report, EchoReport::Decided { verdict: Verdict::Ok, .. });
        assert!(found.iter().any(is_answer), "{}: {found:?}", capture.what);
        let kind = if capture.extensions.is_empty() { "twamp-light" } else { "stamp" };
        assert_eq!(prober.prober.responder(), Some(kind), "{}", capture.what);
    }
}
