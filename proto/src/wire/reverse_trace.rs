//! The STAMP extension for traces of the way back.
//!
//! A request asks for a reply whose TTL ends at a router on the way back. That router answers the responder,
//! which passes the answers on in later replies.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use super::{DecodeError, array, put, require, u32_at, u64_at};
use crate::time::nanos;

/// The value of the extension (type 253, from the range for private use; version 1).
///
/// ```text
///  0 u32 magic "pmrt"   4 u8 version 1   5 u8 flags (1: reply, 2: deferred)
///  6 u8 TTL of the reply; 0: not limited   7 u8 if deferred: for how long, in tenths of a second, rounded up
///  8 u128 request: the router expected at this TTL, zero if unknown; an IPv4 address is mapped (RFC 4291)
/// 24 three outcomes of 28 bytes: u32 sequence number of the request · u128 router · u64 nanoseconds
/// ```
/// Without a router, the nanoseconds are a code: 0 empty, 1 wanted (in a request), 2 not answered yet,
/// 3 unknown. Request and reply have the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReverseTrace {
    /// Whether this is a reply.
    pub is_reply: bool,
    /// In a reply: its TTL was not limited although the request asked for it, because the router may not be
    /// asked before this time has passed. `None`: it was limited, or not to be.
    pub deferred: Option<Duration>,
    /// The TTL of the reply; 0: not limited.
    pub ttl: u8,
    /// The router at which that TTL is expected to end; `None` if it is not known.
    pub expected: Option<IpAddr>,
    /// What became of earlier replies of this session: wanted in a request, and told in its reply.
    pub outcomes: [Option<ReverseOutcome>; Self::OUTCOMES],
}

/// What became of a reply with a limited TTL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReverseOutcome {
    /// Sequence number of the request that asked for that reply.
    pub sequence: u32,
    /// What became of it.
    pub fate: ReplyFate,
}

/// What became of a reply with a limited TTL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyFate {
    /// The prober wants to know it.
    Wanted,
    /// It was sent, and no router has answered yet.
    Unanswered,
    /// There is no such reply: its request has not arrived, or arrived too long ago.
    Unknown,
    /// A router answered.
    Answered {
        /// The router.
        router: IpAddr,
        /// Time from the reply to the router's answer.
        rtt: Duration,
    },
}

impl ReverseTrace {
    /// Number of outcomes in one extension.
    pub const OUTCOMES: usize = 3;
    /// Length of the value in bytes.
    pub const BYTES: u16 = 108;
    const MAGIC: u32 = u32::from_be_bytes(*b"pmrt");
    const VERSION: u8 = 1;
    const REPLY: u8 = 0x01;
    const DEFERRED: u8 = 0x02;
    const OUTCOMES_AT: usize = 24;
    const OUTCOME_BYTES: usize = 28;
    const WANTED: u64 = 1;
    const UNANSWERED: u64 = 2;
    const UNKNOWN: u64 = 3;

    /// Writes the value; `value` must have at least [`ReverseTrace::BYTES`] bytes.
    pub fn write(&self, value: &mut [u8]) {
        put(value, 0, &Self::MAGIC.to_be_bytes());
        let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
        let flags = flag(self.is_reply, Self::REPLY) | flag(self.deferred.is_some(), Self::DEFERRED);
        let tenths = self.deferred.map_or(0, |time| time.as_millis().div_ceil(100));
        put(value, 4, &[Self::VERSION, flags, self.ttl, u8::try_from(tenths).unwrap_or(u8::MAX)]);
        put(value, 8, &self.expected.map_or([0; 16], octets));
        for (index, outcome) in self.outcomes.iter().enumerate() {
            let at = Self::OUTCOMES_AT + index * Self::OUTCOME_BYTES;
            put(value, at, &[0; Self::OUTCOME_BYTES]);
            let Some(ReverseOutcome { sequence, fate }) = outcome else { continue };
            let (router, nanos) = match fate {
                ReplyFate::Wanted => ([0; 16], Self::WANTED),
                ReplyFate::Unanswered => ([0; 16], Self::UNANSWERED),
                ReplyFate::Unknown => ([0; 16], Self::UNKNOWN),
                ReplyFate::Answered { router, rtt } => (octets(*router), nanos(*rtt)),
            };
            put(value, at, &sequence.to_be_bytes());
            put(value, at + 4, &router);
            put(value, at + 20, &nanos.to_be_bytes());
        }
    }

    /// Decodes a value. Longer values are accepted, because later versions may append fields.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`]; [`DecodeError::Unrecognized`] if another vendor uses type 253;
    /// [`DecodeError::Version`].
    pub fn read(value: &[u8]) -> Result<Self, DecodeError> {
        require(value, usize::from(Self::BYTES), "reverse trace")?;
        if u32_at(value, 0) != Self::MAGIC {
            return Err(DecodeError::Unrecognized { field: "reverse trace" });
        }
        if value[4] != Self::VERSION {
            return Err(DecodeError::Version { found: value[4], supported: Self::VERSION });
        }
        let outcome = |index: usize| {
            let at = Self::OUTCOMES_AT + index * Self::OUTCOME_BYTES;
            let nanos = u64_at(value, at + 20);
            let fate = match (address(array(value, at + 4)), nanos) {
                (Some(router), _) => ReplyFate::Answered { router, rtt: Duration::from_nanos(nanos) },
                (None, Self::WANTED) => ReplyFate::Wanted,
                (None, Self::UNANSWERED) => ReplyFate::Unanswered,
                (None, Self::UNKNOWN) => ReplyFate::Unknown,
                (None, _) => return None,
            };
            Some(ReverseOutcome { sequence: u32_at(value, at), fate })
        };
        Ok(Self {
            is_reply: value[5] & Self::REPLY != 0,
            deferred: (value[5] & Self::DEFERRED != 0).then(|| Duration::from_millis(100) * value[7].into()),
            ttl: value[6],
            expected: address(array(value, 8)),
            outcomes: std::array::from_fn(outcome),
        })
    }
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn address(octets: [u8; 16]) -> Option<IpAddr> {
    let address = Ipv6Addr::from(octets);
    (!address.is_unspecified()).then(|| IpAddr::V6(address).to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> ReverseTrace {
        let answered = |sequence, router: &str, nanos| {
            let fate =
                ReplyFate::Answered { router: router.parse().unwrap(), rtt: Duration::from_nanos(nanos) };
            Some(ReverseOutcome { sequence, fate })
        };
        ReverseTrace {
            is_reply: true,
            deferred: Some(Duration::from_millis(1_300)),
            ttl: 7,
            expected: Some([192, 0, 2, 1].into()),
            outcomes: [
                answered(0x0102_0304, "198.51.100.9", 0x0506),
                None,
                answered(5, "2001:db8::9", u64::MAX),
            ],
        }
    }

    #[test]
    fn encoded_value_decodes_to_its_fields() {
        let outcome = |sequence, fate| Some(ReverseOutcome { sequence, fate });
        let fates = [ReplyFate::Wanted, ReplyFate::Unanswered, ReplyFate::Unknown];
        let outcomes = fates.map(|fate| outcome(9, fate));
        for expected in [ReverseTrace::default(), reply(), ReverseTrace { outcomes, ..reply() }] {
            let mut value = vec![0xff; 108];
            expected.write(&mut value);
            assert_eq!(ReverseTrace::read(&value), Ok(expected));
        }
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let mut value = vec![0xff; 108];
        reply().write(&mut value);
        let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = [
            "706d7274 0103070d 00000000000000000000ffffc0000201",
            "01020304 00000000000000000000ffffc6336409 0000000000000506",
            "00000000 00000000000000000000000000000000 0000000000000000",
            "00000005 20010db8000000000000000000000009 ffffffffffffffff",
        ];
        assert_eq!(hex, expected.concat().replace(' ', ""));
    }

    #[test]
    fn other_values_are_rejected() {
        let mut value = vec![0; 108];
        assert!(matches!(ReverseTrace::read(&value), Err(DecodeError::Unrecognized { .. })));
        ReverseTrace::default().write(&mut value);
        value[4] = 2;
        assert_eq!(ReverseTrace::read(&value), Err(DecodeError::Version { found: 2, supported: 1 }));
        assert!(matches!(ReverseTrace::read(&value[..107]), Err(DecodeError::Truncated { .. })));
    }
}
