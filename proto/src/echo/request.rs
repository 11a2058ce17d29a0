//! Encoding of a prober's requests.

use std::sync::Arc;

use crate::key::{Key, Keys};
use crate::time::WallTime;
use crate::wire::stamp::{self, ERROR_ESTIMATE, Mode, Request};
use crate::wire::tlv::{self, ClassOfService, FollowUp, HEADER_BYTES, HMAC_VALUE_BYTES, SessionRecord, Tlv};
use crate::wire::{NtpTime, ReverseTrace};

/// Extensions that a responder is assumed to support.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestExtensions {
    /// All: the session record, class of service, follow-up telemetry.
    All,
    /// Those of a STAMP reflector: class of service.
    ClassOfService,
    /// None: base STAMP, or TWAMP-Light.
    None,
}

/// Length in bytes of the shortest datagram with all extensions. `size` must be at least this for losses to
/// have a direction and for the received DSCP to be reported.
#[must_use]
pub const fn bytes_at_least(mode: Mode) -> usize {
    let hmac = match mode {
        Mode::Open => 0,
        Mode::Authenticated => HEADER_BYTES + HMAC_VALUE_BYTES as usize,
    };
    mode.base_bytes() + SESSION_BYTES + CLASS_BYTES + FOLLOW_UP_BYTES + hmac
}

const SESSION_BYTES: usize = HEADER_BYTES + SessionRecord::BYTES as usize;
const CLASS_BYTES: usize = HEADER_BYTES + ClassOfService::BYTES as usize;
const FOLLOW_UP_BYTES: usize = HEADER_BYTES + FollowUp::BYTES as usize;

/// The packet mode: authenticated if there are keys.
pub(super) fn mode(keys: Option<&Arc<Keys>>) -> Mode {
    if keys.is_some() { Mode::Authenticated } else { Mode::Open }
}

/// The contents of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestContents {
    pub(crate) mode: Mode,
    pub(crate) sequence: u32,
    pub(crate) at: WallTime,
    pub(crate) ssid: u16,
    pub(crate) flow: u8,
    pub(crate) session: u32,
    pub(crate) sent: u32,
    /// Whether to ask for a reply without the padding.
    pub(crate) is_brief: bool,
    pub(crate) dscp: u8,
    /// Requested length in bytes. Extensions that do not fit are left out, the session record last.
    pub(crate) size: Option<u16>,
    pub(crate) extensions: RequestExtensions,
    /// The extension for traces of the way back. It needs a request without a `size`.
    pub(crate) reverse: Option<ReverseTrace>,
}

/// What an encoded request contains.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EncodedRequest {
    /// T1.
    pub(crate) timestamp: NtpTime,
    /// Whether the session record fits.
    pub(crate) carries_session: bool,
}

/// Appends a request to `out`.
pub(crate) fn encode(contents: &RequestContents, key: Option<&Key>, out: &mut Vec<u8>) -> EncodedRequest {
    let RequestContents { mode, sequence, ssid, .. } = *contents;
    let (start, base) = (out.len(), mode.base_bytes());
    let timestamp = NtpTime::from(contents.at);
    Request { sequence, timestamp, error: ERROR_ESTIMATE, ssid }.encode(mode, out);
    stamp::seal(&mut out[start..], mode, key);
    let plan = ExtensionPlan::of(contents);
    if plan.session {
        let session = SessionRecord {
            flow: contents.flow.into(),
            session: contents.session,
            is_brief: contents.is_brief,
            count_or_first: contents.sent,
            ..SessionRecord::default()
        };
        session.write(tlv::append(out, tlv::SESSION, SessionRecord::BYTES).value_mut(out));
    }
    if plan.class {
        let class = ClassOfService { wanted: contents.dscp, ..ClassOfService::default() };
        class.write(tlv::append(out, tlv::CLASS_OF_SERVICE, ClassOfService::BYTES).value_mut(out));
    }
    if plan.follow_up {
        tlv::append(out, tlv::FOLLOW_UP, FollowUp::BYTES);
    }
    if let Some(reverse) = &contents.reverse {
        reverse.write(tlv::append(out, tlv::REVERSE_TRACE, ReverseTrace::BYTES).value_mut(out));
    }
    if let (true, Some(key)) = (plan.hmac, key) {
        let hmac = tlv::append(out, tlv::HMAC, HMAC_VALUE_BYTES);
        tlv::seal(&mut out[start..], base, Tlv { at: hmac.at - start, ..hmac }, key);
    }
    if let Some(padding) = plan.padding {
        tlv::append(out, tlv::PADDING, padding);
    }
    EncodedRequest { timestamp, carries_session: plan.session }
}

/// The extensions that a request will have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ExtensionPlan {
    session: bool,
    class: bool,
    follow_up: bool,
    hmac: bool,
    /// Length of the padding's value in bytes.
    padding: Option<u16>,
}

impl ExtensionPlan {
    fn of(contents: &RequestContents) -> Self {
        let (session, class) = match contents.extensions {
            RequestExtensions::All => (true, true),
            RequestExtensions::ClassOfService => (false, true),
            RequestExtensions::None => (false, false),
        };
        let full = Self { session, class, follow_up: session, hmac: false, padding: None };
        let candidates = [
            full,
            Self { follow_up: false, ..full },
            Self { follow_up: false, class: false, ..full },
            Self { follow_up: false, class: false, session: false, ..full },
        ];
        let fitted = candidates.iter().find_map(|plan| plan.fit(contents));
        fitted.unwrap_or(Self { session: false, class: false, follow_up: false, hmac: false, padding: None })
    }

    /// This plan at the requested length; `None` if it does not fit.
    fn fit(mut self, contents: &RequestContents) -> Option<Self> {
        let extended = self.session || self.class || self.follow_up;
        self.hmac = extended && contents.mode == Mode::Authenticated;
        let bytes = contents.mode.base_bytes()
            + usize::from(self.session) * SESSION_BYTES
            + usize::from(self.class) * CLASS_BYTES
            + usize::from(self.follow_up) * FOLLOW_UP_BYTES
            + usize::from(self.hmac) * (HEADER_BYTES + usize::from(HMAC_VALUE_BYTES));
        let Some(size) = contents.size else { return Some(self) };
        match usize::from(size).checked_sub(bytes)? {
            0 => {}
            left => self.padding = Some(u16::try_from(left.checked_sub(HEADER_BYTES)?).ok()?),
        }
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(mode: Mode, size: Option<u16>, extensions: RequestExtensions) -> RequestContents {
        RequestContents {
            mode,
            sequence: 1,
            at: WallTime::from_nanos(1_800_000_000_000_000_000),
            ssid: 2,
            flow: 3,
            session: 4,
            sent: 5,
            is_brief: false,
            dscp: 46,
            size,
            extensions,
            reverse: None,
        }
    }

    #[test]
    fn request_has_the_requested_length() {
        let key = Key::new(b"0123456789abcdef");
        for mode in [Mode::Open, Mode::Authenticated] {
            for extensions in
                [RequestExtensions::All, RequestExtensions::ClassOfService, RequestExtensions::None]
            {
                for size in 116..1_500 {
                    let mut out = vec![9; 3];
                    encode(&contents(mode, Some(size), extensions), Some(&key), &mut out);
                    assert_eq!(out.len(), 3 + usize::from(size), "{mode:?} {extensions:?} {size}");
                }
            }
        }
        let mut smallest = Vec::new();
        encode(&contents(Mode::Open, Some(44), RequestExtensions::All), None, &mut smallest);
        assert_eq!(smallest.len(), 44);
    }

    #[test]
    fn request_without_a_length_has_all_extensions() {
        let key = Key::new(b"0123456789abcdef");
        for mode in [Mode::Open, Mode::Authenticated] {
            let mut out = Vec::new();
            encode(&contents(mode, None, RequestExtensions::All), Some(&key), &mut out);
            assert_eq!(out.len(), bytes_at_least(mode));
            let kinds: Vec<u8> = tlv::walk(&out, mode.base_bytes()).map(|t| t.kind).collect();
            let hmac = [tlv::HMAC].into_iter().filter(|_| mode == Mode::Authenticated);
            let expected = [tlv::SESSION, tlv::CLASS_OF_SERVICE, tlv::FOLLOW_UP].into_iter().chain(hmac);
            assert_eq!(kinds, expected.collect::<Vec<u8>>());
        }
    }

    /// The type of an extension and the length of its value.
    type Extension = (u8, usize);

    fn kinds(contents: &RequestContents, key: &Key) -> (Vec<Extension>, bool) {
        let mut out = Vec::new();
        let encoded = encode(contents, Some(key), &mut out);
        let base = contents.mode.base_bytes();
        assert_eq!(encoded.timestamp, NtpTime::from(contents.at));
        (tlv::walk(&out, base).map(|found| (found.kind, found.len)).collect(), encoded.carries_session)
    }

    #[test]
    fn extensions_that_do_not_fit_are_left_out_the_session_record_last() {
        let key = Key::new(b"0123456789abcdef");
        const SESSION: Extension = (tlv::SESSION, 52);
        const CLASS: Extension = (tlv::CLASS_OF_SERVICE, 4);
        const FOLLOW_UP: Extension = (tlv::FOLLOW_UP, 16);
        const HMAC: Extension = (tlv::HMAC, 16);
        let padding = |bytes| (tlv::PADDING, bytes);
        let open: [(Option<u16>, &[Extension]); 14] = [
            (None, &[SESSION, CLASS, FOLLOW_UP]),
            (Some(133), &[SESSION, CLASS, FOLLOW_UP, padding(1)]),
            (Some(132), &[SESSION, CLASS, FOLLOW_UP, padding(0)]),
            // Padding has a header of four bytes.
            (Some(131), &[SESSION, CLASS, padding(19)]),
            (Some(128), &[SESSION, CLASS, FOLLOW_UP]),
            (Some(127), &[SESSION, CLASS, padding(15)]),
            (Some(108), &[SESSION, CLASS]),
            (Some(107), &[SESSION, padding(3)]),
            (Some(104), &[SESSION, padding(0)]),
            (Some(100), &[SESSION]),
            (Some(99), &[padding(51)]),
            (Some(48), &[padding(0)]),
            (Some(44), &[]),
            (Some(43), &[]),
        ];
        for (size, expected) in open {
            let found = kinds(&contents(Mode::Open, size, RequestExtensions::All), &key);
            assert_eq!(found, (expected.to_vec(), expected.contains(&SESSION)), "{size:?} bytes");
        }
        let authenticated: [(Option<u16>, &[Extension]); 6] = [
            (None, &[SESSION, CLASS, FOLLOW_UP, HMAC]),
            (Some(220), &[SESSION, CLASS, FOLLOW_UP, HMAC, padding(0)]),
            (Some(216), &[SESSION, CLASS, FOLLOW_UP, HMAC]),
            (Some(196), &[SESSION, CLASS, HMAC]),
            (Some(188), &[SESSION, HMAC]),
            // Padding alone needs no HMAC.
            (Some(187), &[padding(71)]),
        ];
        for (size, expected) in authenticated {
            let found = kinds(&contents(Mode::Authenticated, size, RequestExtensions::All), &key);
            assert_eq!(found, (expected.to_vec(), expected.contains(&SESSION)), "{size:?} bytes");
        }
        let class = kinds(&contents(Mode::Authenticated, None, RequestExtensions::ClassOfService), &key);
        assert_eq!(class, (vec![CLASS, HMAC], false));
        assert_eq!(
            kinds(&contents(Mode::Authenticated, None, RequestExtensions::None), &key),
            (vec![], false)
        );
        assert_eq!([Mode::Open, Mode::Authenticated].map(bytes_at_least), [128, 216]);
    }

    #[test]
    fn encoded_request_decodes_to_its_contents_and_is_authenticated() {
        let keys = Keys::parse("0123456789abcdef").unwrap();
        for mode in [Mode::Open, Mode::Authenticated] {
            let expected = RequestContents { is_brief: true, ..contents(mode, None, RequestExtensions::All) };
            let mut out = vec![9; 5];
            encode(&expected, Some(keys.current()), &mut out);
            let out = &out[5..];
            let request = Request::decode(out, mode).unwrap();
            let timestamp = NtpTime::from(expected.at);
            assert_eq!(request, Request { sequence: 1, timestamp, error: ERROR_ESTIMATE, ssid: 2 });
            let base = mode.base_bytes();
            let values: Vec<&[u8]> = tlv::walk(out, base).map(|found| found.value(out)).collect();
            let session = SessionRecord {
                flow: 3,
                session: 4,
                is_brief: true,
                count_or_first: 5,
                ..SessionRecord::default()
            };
            assert_eq!(SessionRecord::read(values[0]), Ok(session));
            let class = ClassOfService { wanted: 46, ..ClassOfService::default() };
            assert_eq!(ClassOfService::read(values[1]), Some(class));
            assert_eq!(values[2], [0; 16]);
            if mode == Mode::Authenticated {
                assert!(stamp::verify(out, &keys).is_ok() && tlv::are_authentic(out, base, &keys));
            }
        }
    }
}
