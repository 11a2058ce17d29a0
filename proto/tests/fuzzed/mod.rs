//! What must hold for any bytes at all. Each function is the body of the fuzz target of its name, and of an ordinary test
//! that replays its corpus.

mod machines;

use machines::{icmp_prober, prober, responder};

use pathmeter_proto::key::Keys;
use pathmeter_proto::wire::icmp::{self, Echo, Version};
use pathmeter_proto::wire::stamp::{self, Mode, Reply, Request};
use pathmeter_proto::wire::tlv::{self, ClassOfService, FollowUp, Session};
use pathmeter_proto::wire::{Goodbye, NtpTime};

/// The key of every corpus.
pub(crate) const SECRET: &str = "0123456789abcdef";

type Body = fn(&[u8]);

/// The fuzz targets by their names.
pub(crate) const TARGETS: [(&str, Body); 8] = [
    ("decode_stamp", decode_stamp),
    ("decode_tlv", decode_tlv),
    ("decode_goodbye", decode_goodbye),
    ("decode_icmp", decode_icmp),
    ("key_file", key_file),
    ("responder", responder),
    ("prober", prober),
    ("icmp_prober", icmp_prober),
];

/// Runs the target of that name.
///
/// # Panics
/// If something does not hold that must, or there is no such target.
pub(crate) fn run(target: &str, bytes: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, body) = found.expect("every target has its body");
    body(bytes);
}

fn keys() -> Keys {
    Keys::parse(SECRET).expect("it is a key")
}

/// A base packet: what is read is written as it was, and proven only by the key.
pub(crate) fn decode_stamp(bytes: &[u8]) {
    let keys = keys();
    let mode = stamp::guess_mode(bytes);
    assert!(mode == Mode::Open || bytes.len() >= 112);
    assert!(!stamp::is_authenticated_reply(bytes, &keys) || mode == Mode::Open);
    let _ = stamp::ssids(bytes);
    for mode in [Mode::Open, Mode::Authenticated] {
        let request = Request::decode(bytes, mode);
        assert_eq!(request.is_ok(), bytes.len() >= mode.base_bytes());
        if let Ok(request) = request {
            let mut written = Vec::new();
            request.encode(mode, &mut written);
            assert_eq!(Request::decode(&written, mode), Ok(request));
        }
        let Ok(reply) = Reply::decode(bytes, mode) else { continue };
        let _ = (reply.turnaround(), reply.sent());
        let mut written = vec![0xff; mode.base_bytes()];
        reply.write(mode, &mut written);
        assert_eq!(Reply::decode(&written, mode), Ok(reply));
        stamp::seal(&mut written, mode, Some(keys.current()));
        assert_eq!(stamp::verify(&written, &keys).is_ok(), mode == Mode::Authenticated);
    }
}

/// Extensions: they lie one behind the other within the datagram, and what is read is written as it was.
pub(crate) fn decode_tlv(bytes: &[u8]) {
    let keys = keys();
    for base in [0, Mode::Open.base_bytes(), Mode::Authenticated.base_bytes()] {
        let mut end = base;
        for found in tlv::walk(bytes, base) {
            assert_eq!(found.at, end);
            end = found.end();
            assert!(end <= bytes.len());
            let value = found.value(bytes);
            assert_eq!(value.len(), found.len);
            let mut written = vec![0; value.len().max(52)];
            if let Ok(session) = Session::read(value) {
                session.write(&mut written);
                assert_eq!(Session::read(&written), Ok(session));
            }
            if let Some(class) = ClassOfService::read(value) {
                class.write(&mut written);
                assert_eq!(ClassOfService::read(&written), Some(class));
            }
            if let Some(follow_up) = FollowUp::read(value) {
                assert_ne!(follow_up.timestamp, NtpTime(0));
                follow_up.write(&mut written);
                assert_eq!(FollowUp::read(&written), Some(follow_up));
            }
        }
        let is_over = tlv::next(bytes, end).is_none_or(|next| next.is_err());
        assert!(is_over, "a walk goes to the end or to the first that is malformed");
        if base > 0 && bytes.len() >= base && tlv::are_proven(bytes, base, &keys) {
            let kinds: Vec<u8> = tlv::walk(bytes, base).map(|found| found.kind).collect();
            let bare = kinds.is_empty() || kinds == [tlv::PADDING];
            assert!(bare || kinds.contains(&tlv::HMAC), "{kinds:?}");
        }
    }
}

/// A goodbye: as it came, and signed so that more than its signature is looked at.
pub(crate) fn decode_goodbye(bytes: &[u8]) {
    let keys = keys().derive(Goodbye::PURPOSE);
    let mut signed = bytes.to_vec();
    signed.extend_from_slice(&keys.current().mac_128(&[bytes]));
    for datagram in [bytes, &signed] {
        let Ok(goodbye) = Goodbye::decode(datagram, &keys) else { continue };
        assert!(goodbye.name.len() <= Goodbye::NAME_BYTES_MAX);
        assert_eq!(goodbye.encode(&keys), datagram);
        for at in 0..datagram.len() {
            let mut changed = datagram.to_vec();
            changed[at] ^= 1;
            assert!(Goodbye::decode(&changed, &keys).is_err(), "byte {at}");
        }
    }
}

/// An echo: what is read is written as it was, and has an identifier and a session.
pub(crate) fn decode_icmp(bytes: &[u8]) {
    let _ = icmp::is_intact(bytes);
    assert_eq!(icmp::identifier(bytes).is_some(), bytes.len() >= 6);
    let size = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    for version in [Version::V4, Version::V6] {
        let (request, reply) = (Echo::decode_request(bytes, version), Echo::decode_reply(bytes, version));
        assert!(request.is_err() || reply.is_err());
        let Ok(echo) = request.or(reply) else { continue };
        assert_eq!(icmp::ssid(bytes), Some(echo.ssid));
        let mut written = Vec::new();
        echo.encode(version, size, &mut written);
        icmp::identify(&mut written, icmp::identifier(bytes).expect("it is long enough"));
        assert!(icmp::is_intact(&written));
        assert_eq!(Echo::decode_request(&written, version), Ok(echo));
    }
}

/// A key file: what is accepted holds one or two keys, and what is said about one depends on no letter of a key.
pub(crate) fn key_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let masked: String = text.chars().map(|c| if c.is_ascii_alphanumeric() { 'x' } else { c }).collect();
    match (Keys::parse(&text), Keys::parse(&masked)) {
        (Ok(keys), Ok(_)) => {
            assert!((1..=2).contains(&keys.all().count()));
            let tag = keys.current().mac(&[b"x"]);
            assert!(keys.verifying(&[b"x"], &tag).is_some());
        }
        (Err(error), Err(same)) => assert_eq!(error, same),
        (found, masked) => panic!("{found:?}, and masked {masked:?}"),
    }
}

/// Bytes that are read as choices; zeros at the end.
#[derive(Debug)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(count.min(self.0.len()));
        self.0 = left;
        taken
    }

    fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }
}
