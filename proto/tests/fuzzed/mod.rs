//! Invariants for arbitrary input. Each function is the body of the fuzz target of the same name, and of a
//! test that replays its corpus.

mod enumerator;
mod machines;
mod tracer;

use enumerator::enumerator;
use machines::{icmp_prober, prober, responder};
use tracer::tracer;

use pathmeter_proto::key::{KeyId, Keys};
use pathmeter_proto::time::WallTime;
use pathmeter_proto::wire::icmp::{self, IcmpEcho, IcmpVersion};
use pathmeter_proto::wire::icmp_extensions::{IcmpExtension, IcmpExtensions};
use pathmeter_proto::wire::quoted_header::{QuotedChecksum, QuotedHeader, QuotedProtocol};
use pathmeter_proto::wire::stamp::{self, Mode, Reply, Request};
use pathmeter_proto::wire::stream::{self, DecodedReply, GreetingProof, Hello, Seal, Welcome, WelcomeStatus};
use pathmeter_proto::wire::tcp::{EmptySegment, ExpiredSegment, ReceivedSegment};
use pathmeter_proto::wire::tlv::{self, ClassOfService, FollowUp, SessionRecord};
use pathmeter_proto::wire::websocket::MessageFormat;
use pathmeter_proto::wire::{Goodbye, NtpTime, ReverseTrace};

/// The key of every corpus.
pub(crate) const SECRET: &str = "0123456789abcdef";

type Body = fn(&[u8]);

/// The fuzz targets by their names.
pub(crate) const TARGETS: [(&str, Body); 16] = [
    ("decode_stamp", decode_stamp),
    ("decode_tlv", decode_tlv),
    ("decode_goodbye", decode_goodbye),
    ("decode_icmp", decode_icmp),
    ("decode_icmp_extensions", decode_icmp_extensions),
    ("decode_tcp", decode_tcp),
    ("decode_quoted_header", decode_quoted_header),
    ("decode_greeting", decode_greeting),
    ("decode_stream", decode_stream),
    ("decode_websocket", decode_websocket),
    ("key_file", key_file),
    ("responder", responder),
    ("prober", prober),
    ("icmp_prober", icmp_prober),
    ("tracer", tracer),
    ("enumerator", enumerator),
];

/// Runs the fuzz target `target`.
///
/// # Panics
/// If an invariant is violated, or the target does not exist.
pub(crate) fn run(target: &str, bytes: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, body) = found.expect("the target exists");
    body(bytes);
}

fn keys() -> Keys {
    Keys::parse(SECRET).expect("the key is valid")
}

/// Base packets: encoding the decoded fields and decoding them again gives the same fields, and only the key
/// authenticates.
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

/// Extensions: they follow each other within the datagram, and encoded values decode to the same values.
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
            let mut written = vec![0; value.len().max(ReverseTrace::BYTES.into())];
            if let Ok(session) = SessionRecord::read(value) {
                session.write(&mut written);
                assert_eq!(SessionRecord::read(&written), Ok(session));
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
            if let Ok(reverse) = ReverseTrace::read(value) {
                reverse.write(&mut written);
                assert_eq!(ReverseTrace::read(&written), Ok(reverse));
            }
        }
        let is_over = tlv::next(bytes, end).is_none_or(|next| next.is_err());
        assert!(is_over, "a walk ends at the end or at the first malformed extension");
        if base > 0 && bytes.len() >= base && tlv::are_authentic(bytes, base, &keys) {
            let kinds: Vec<u8> = tlv::walk(bytes, base).map(|found| found.kind).collect();
            let bare = kinds.is_empty() || kinds == [tlv::PADDING];
            assert!(bare || kinds.contains(&tlv::HMAC), "{kinds:?}");
        }
    }
}

/// Goodbyes: the input as it is, and with a valid signature, so that the other checks are reached.
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

/// ICMP echoes: encoding and decoding agree, and identifier and session identifier are found.
pub(crate) fn decode_icmp(bytes: &[u8]) {
    let _ = icmp::is_intact(bytes);
    assert_eq!(icmp::identifier(bytes).is_some(), bytes.len() >= 6);
    let size = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    for version in [IcmpVersion::V4, IcmpVersion::V6] {
        let Ok(echo) = IcmpEcho::decode_reply(bytes, version) else { continue };
        assert_eq!(icmp::ssid(bytes), Some(echo.ssid));
        let mut written = Vec::new();
        echo.encode(version, size, &mut written);
        icmp::identify(&mut written, icmp::identifier(bytes).expect("it is long enough"));
        assert!(icmp::is_intact(&written));
        assert!(IcmpEcho::decode_reply(&written, version).is_err(), "a request is not a reply");
        written[0] = version.reply();
        assert_eq!(IcmpEcho::decode_reply(&written, version), Ok(echo));
    }
}

/// TCP segments and what ICMP errors quote of them: only what the input has is read, and what a segment says
/// does not depend on what follows a quotation.
pub(crate) fn decode_tcp(bytes: &[u8]) {
    if let Ok(segment) = ReceivedSegment::decode(bytes) {
        let shorter = ReceivedSegment::decode(&bytes[..bytes.len() - 1]);
        let is_counted = shorter.map(|shorter| segment.next_sequence.wrapping_sub(shorter.next_sequence));
        assert!(is_counted.is_err() || is_counted == Ok(1), "each byte of data counts");
        assert_eq!(segment.is_empty, is_counted.is_err(), "it ends with its header");
    }
    for version in [IcmpVersion::V4, IcmpVersion::V6] {
        let message = intact(bytes, version);
        let Ok(expired) = ExpiredSegment::decode(&message, version) else { continue };
        assert_eq!(expired.source.is_ipv4(), version == IcmpVersion::V4);
        assert_eq!(expired.source.is_ipv4(), expired.destination.is_ipv4());
        if let Some(extensions) = expired.extensions {
            assert!(message.ends_with(extensions) && !extensions.is_empty());
        }
        let segment =
            EmptySegment { sequence: expired.sequence, acknowledgment: 1, window: 2, timestamps: None };
        let written = segment.encode(expired.source, expired.destination);
        let found = ReceivedSegment::decode(&written).expect("it is a segment");
        assert_eq!((found.next_sequence, found.source_port), (expired.sequence, expired.source.port()));
        assert!(found.is_empty && !found.has_sack && found.timestamps.is_none());
    }
}

/// An ICMP message with a valid checksum, so that the other checks are reached; that of ICMPv6 is not checked.
fn intact(bytes: &[u8], version: IcmpVersion) -> Vec<u8> {
    let mut message = bytes.to_vec();
    if let (IcmpVersion::V4, Some(checksum)) = (version, message.get_mut(2..4)) {
        checksum.fill(0);
        let words = message
            .chunks(2)
            .map(|word| u64::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)])));
        let sum: u64 = words.sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("the carries were added");
        message[2..4].copy_from_slice(&(!sum).to_be_bytes());
    }
    message
}

/// Headers that ICMP errors quote: fields stay within their ranges, and a checksum says something only about
/// the whole packet: not if a byte is missing, nor if one follows.
pub(crate) fn decode_quoted_header(bytes: &[u8]) {
    for version in [IcmpVersion::V4, IcmpVersion::V6] {
        let message = intact(bytes, version);
        let Ok(header) = QuotedHeader::decode(&message, version) else { continue };
        assert_eq!(header.source.is_ipv4(), version == IcmpVersion::V4);
        assert_eq!(header.source.is_ipv4(), header.destination.is_ipv4());
        assert!(header.ecn <= 3);
        assert!(header.protocol != QuotedProtocol::Icmp || header.destination.port() == 0);
        let longer = [&message[..], &[1]].concat();
        for other in [&message[..message.len() - 1], &longer] {
            let Ok(other) = QuotedHeader::decode(&intact(other, version), version) else { continue };
            let checksums = [header.checksum, other.checksum];
            assert!(checksums.contains(&QuotedChecksum::Unknown), "only one of them is the packet");
            assert_eq!(other, QuotedHeader { checksum: other.checksum, ..header });
        }
    }
}

/// Extensions of ICMP errors: the input as it is, without its checksum, and with a valid one, so that the
/// other checks are reached. Fields stay within their ranges, and there are not more of them than bytes.
pub(crate) fn decode_icmp_extensions(bytes: &[u8]) {
    let mut unchecked = bytes.to_vec();
    if let Some(checksum) = unchecked.get_mut(2..4) {
        checksum.fill(0);
    }
    let payload = [&[0; 100][..], bytes].concat();
    assert_eq!(IcmpExtensions::unannounced_at(&payload[..100], 28), None);
    if IcmpExtensions::unannounced_at(&payload, 28).is_some() {
        assert!(bytes.len() > 4 && IcmpExtensions::decode(bytes).is_ok());
    }
    let is_valid = IcmpExtensions::decode(bytes).is_ok();
    let Ok(extensions) = IcmpExtensions::decode(&unchecked) else {
        assert!(!is_valid, "only the checksum was removed");
        return;
    };
    let mut fields_bytes = 0;
    for extension in extensions {
        match extension {
            IcmpExtension::Label(label) => {
                fields_bytes += label.to_bytes().len();
                assert!(label.label < 1 << 20 && label.traffic_class < 8);
                let again = IcmpExtensions::encode(&[(1, 1, &label.to_bytes())]);
                let read: Vec<_> = IcmpExtensions::decode(&again).expect("it was just encoded").collect();
                assert_eq!(read, [extension]);
            }
            IcmpExtension::Interface(interface) => {
                fields_bytes += 4 + interface.name.map_or(0, str::len);
                let is_name = |name: &str| (1..=63).contains(&name.len()) && !name.contains('\0');
                assert!(interface.name.is_none_or(is_name));
            }
        }
    }
    assert!(fields_bytes <= bytes.len(), "{fields_bytes} of {} bytes", bytes.len());
}

/// The greetings of the connection for which the corpora are made.
pub(crate) const HELLO: Hello = Hello { message_bytes: 64, nonce: [7; 16] };
pub(crate) const WELCOME: Welcome = Welcome { status: WelcomeStatus::Granted, nonce: [9; 16] };

/// The same bytes with one changed bit, chosen by their sum.
fn changed(bytes: &[u8]) -> Vec<u8> {
    let sum: usize = bytes.iter().map(|byte| usize::from(*byte)).sum();
    let mut changed = bytes.to_vec();
    changed[sum % bytes.len()] ^= 1 << (sum % 8);
    changed
}

/// Greetings of streams: encoding and decoding agree, and only the key authenticates.
pub(crate) fn decode_greeting(bytes: &[u8]) {
    let keys = keys().derive(stream::PURPOSE);
    if let Ok((hello, proof)) = Hello::decode(bytes, Some(&keys)) {
        assert!(Welcome::decode(bytes, &HELLO, None).is_err(), "a hello is not a welcome");
        assert_eq!(proof == GreetingProof::None, bytes[32..48] == [0; 16]);
        for (signer, proof) in [(None, GreetingProof::None), (Some(&keys), GreetingProof::By(KeyId::Current))]
        {
            assert_eq!(Hello::decode(&hello.encode(signer), Some(&keys)), Ok((hello, proof)));
        }
        let changed = Hello::decode(&changed(&hello.encode(Some(&keys))), Some(&keys));
        assert!(!matches!(changed, Ok((_, GreetingProof::By(_)))), "{changed:?}");
    }
    for key in [None, Some(keys.current())] {
        let Ok(welcome) = Welcome::decode(bytes, &HELLO, key) else { continue };
        let written = welcome.encode(&HELLO, key);
        assert_eq!(Welcome::decode(&written, &HELLO, key), Ok(welcome));
        let granted =
            Welcome { status: WelcomeStatus::Granted, ..welcome }.encode(&HELLO, Some(keys.current()));
        let changed = Welcome::decode(&changed(&granted), &HELLO, Some(keys.current()));
        assert!(!changed.is_ok_and(|welcome| welcome.status == WelcomeStatus::Granted));
    }
}

/// Messages of streams: a reply repeats its request, and with a key every change is detected.
pub(crate) fn decode_stream(bytes: &[u8]) {
    let keys = keys().derive(stream::PURPOSE);
    let [open, sealed] = [None, Some(keys.current())].map(|key| Seal::of(key, &HELLO, &WELCOME));
    for seal in [&open, &sealed] {
        assert!(seal.check_request(bytes).is_err() || seal.read_reply(bytes).is_err());
        assert!(open.check_request(bytes).is_ok() || seal.check_request(bytes).is_err());
        assert!(open.read_reply(bytes).is_ok() || seal.read_reply(bytes).is_err());
    }
    let mut reply = bytes.to_vec();
    let message = if open.check_request(bytes).is_ok() {
        open.reply(&mut reply, WallTime::from_nanos(0), WallTime::from_nanos(0));
        open.read_reply(&reply).expect("it was just written").message
    } else if let Ok(echoed) = open.read_reply(bytes) {
        echoed.message
    } else {
        return;
    };
    let length = u32::try_from(bytes.len()).expect("inputs are short");
    for seal in [&open, &sealed] {
        let mut frame = Vec::new();
        seal.request(message, length, &mut frame);
        assert_eq!((seal.check_request(&frame), frame.len()), (Ok(()), bytes.len()));
        seal.reply(&mut frame, WallTime::from_nanos(1_000), WallTime::from_nanos(3_500));
        assert_eq!(seal.read_reply(&frame), Ok(DecodedReply { message, turnaround: 2_500 }));
        let changed = sealed.read_reply(&changed(&frame));
        assert!(changed.is_err(), "{changed:?}");
    }
    // With the padding of the input.
    sealed.reply(&mut reply, WallTime::from_nanos(1_000), WallTime::from_nanos(3_500));
    assert_eq!(sealed.read_reply(&reply), Ok(DecodedReply { message, turnaround: 2_500 }));
    assert!(sealed.read_reply(&changed(&reply)).is_err());
}

/// WebSocket messages: an accepted message equals the sent one byte for byte.
pub(crate) fn decode_websocket(bytes: &[u8]) {
    for format in [MessageFormat::Text, MessageFormat::Binary] {
        for length in [bytes.len(), format.bytes_min(), 0] {
            let Ok(message) = format.decode(bytes, length) else { continue };
            assert_eq!(format.encode(message, length), bytes);
            assert_ne!(format.decode(&changed(bytes), length), Ok(message));
            for other in [format.bytes_min(), 300] {
                assert_eq!(format.decode(&format.encode(message, other), other), Ok(message));
            }
        }
    }
}

/// Key files: an accepted file has one or two keys, and an error does not depend on the characters of a key.
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

/// Input bytes that are read as choices; zeros at the end.
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
