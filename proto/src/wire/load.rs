//! Datagrams of bandwidth runs, on the agent port.
//!
//! ```text
//!  0 header of the agent port, kind 2   6 u8 type   7 u8 zero   8 u64 lease
//!
//! type 1 request, 64 bytes: the prober asks to use its address and port
//! 16 16 bytes cookie, zeros in the first request   32 16 bytes zero
//! 48 16 bytes HMAC-SHA-256/128 over bytes 0..48
//!
//! type 2 cookie, 64 bytes: the responder's reply to a request without a valid cookie
//! 16 16 bytes cookie   32 16 bytes zero   48 HMAC
//!
//! type 3 accepted, 64 bytes: the reply to a request with a valid cookie
//! 16 32 bytes zero   48 HMAC
//!
//! type 4 load, 40 bytes or more: payload of the run
//! 16 u32 sequence number, from 0   20 u32 zero   24 u64 nanoseconds since the start, when its batch was sent
//! 32 u16 train   34 u16 position in the train   36 u16 length of the train; zeros outside of trains
//! 38 u16 zero   40 filler
//! ```
//!
//! The keys are derived from the secret of the lease, one for each end. A cookie shows that the prober
//! receives what is sent to its address and port. Load is not signed: it is accepted only from the address
//! and port that were proven, and with the lease.

use super::agent::{AgentKind, HEADER_BYTES};
use super::{DecodeError, array, put, require, u16_at, u32_at, u64_at};
use crate::bandwidth::RunEnd;
use crate::bandwidth::lease::LeaseId;
use crate::key::Key;

/// Length in bytes of all datagrams but load.
pub const HANDSHAKE_BYTES: usize = 64;

/// Minimum length in bytes of a load datagram.
pub const LOAD_BYTES_MIN: usize = 40;

const TAG_AT: usize = 48;
const TAG_BYTES: usize = 16;
const FIELD: &str = "datagram of a bandwidth run";

/// A cookie, which only its receiver knows.
pub type Cookie = [u8; 16];

/// A datagram that begins a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handshake {
    /// The prober asks to use its address and port.
    Request {
        /// The cookie from the responder; `None` in the first request.
        cookie: Option<Cookie>,
    },
    /// The prober must repeat its request with this cookie.
    Cookie(Cookie),
    /// The run may use the address and port.
    Accepted,
}

impl Handshake {
    const fn number(&self) -> u8 {
        match self {
            Self::Request { .. } => 1,
            Self::Cookie(_) => 2,
            Self::Accepted => 3,
        }
    }

    /// Encodes and signs a datagram.
    #[must_use]
    pub fn encode(&self, lease: LeaseId, key: &LoadKey) -> [u8; HANDSHAKE_BYTES] {
        let mut out = [0; HANDSHAKE_BYTES];
        write_head(&mut out, self.number(), lease);
        match self {
            Self::Request { cookie: Some(cookie) } | Self::Cookie(cookie) => put(&mut out, 16, cookie),
            Self::Request { cookie: None } | Self::Accepted => {}
        }
        let tag = key.0.mac_128(&[&out[..TAG_AT]]);
        put(&mut out, TAG_AT, &tag);
        out
    }

    /// Decodes a datagram and verifies its HMAC.
    ///
    /// # Errors [`DecodeError::Unauthentic`] if it was not signed by the other end; other errors if it does
    /// not begin a run.
    pub fn decode(bytes: &[u8], key: &LoadKey) -> Result<Self, DecodeError> {
        let kind = LoadKind::read(bytes)?;
        if !matches!(kind, LoadKind::Handshake(_)) || bytes.len() != HANDSHAKE_BYTES {
            return Err(DecodeError::Unrecognized { field: FIELD });
        }
        let tag: [u8; TAG_BYTES] = array(bytes, TAG_AT);
        if !key.0.verify(&[&bytes[..TAG_AT]], &tag) {
            return Err(DecodeError::Unauthentic { field: FIELD });
        }
        let cookie: Cookie = array(bytes, 16);
        match bytes[6] {
            1 => Ok(Self::Request { cookie: (cookie != Cookie::default()).then_some(cookie) }),
            2 => Ok(Self::Cookie(cookie)),
            3 => Ok(Self::Accepted),
            _ => Err(DecodeError::Unrecognized { field: FIELD }),
        }
    }
}

/// What a datagram of a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadKind {
    /// A [`Handshake`] of this lease.
    Handshake(LeaseId),
    /// [`Load`] of this lease.
    Load(LeaseId),
}

impl LoadKind {
    /// Reads the kind and the lease of a datagram, and ignores the rest.
    ///
    /// # Errors
    /// [`DecodeError`] if it is of no bandwidth run.
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        const UNRECOGNIZED: DecodeError = DecodeError::Unrecognized { field: FIELD };
        match AgentKind::read(bytes)? {
            AgentKind::Bandwidth => {}
            AgentKind::Goodbye => return Err(UNRECOGNIZED),
        }
        require(bytes, LOAD_BYTES_MIN, FIELD)?;
        let lease = LeaseId(u64_at(bytes, 8));
        match bytes[HEADER_BYTES] {
            1..=3 => Ok(Self::Handshake(lease)),
            4 => Ok(Self::Load(lease)),
            _ => Err(UNRECOGNIZED),
        }
    }
}

/// The head of a datagram of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequence number, from 0.
    pub sequence: u32,
    /// When its batch was sent, in nanoseconds since the start by the sender's clock.
    pub sent_at: u64,
    /// Its place in a train; `None`: it is not in a train.
    pub place: Option<TrainPlace>,
}

/// The place of a datagram in a train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainPlace {
    /// Number of the train.
    pub train: u16,
    /// Position of the datagram in it, from 0.
    pub position: u16,
    /// Number of datagrams in it, at least 1.
    pub length: u16,
}

/// What a receiver has measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadResult {
    /// Datagrams that a router marked because of congestion (ECN CE, RFC 3168).
    pub congestion_marks: u32,
    /// Whether the host of the receiver dropped datagrams: it is slower than the path.
    pub is_host_limited: bool,
    /// How much longer datagrams took at the end than at the beginning, in microseconds; `None`: too few
    /// arrived.
    pub delay_growth: Option<i32>,
    /// What the trains tell; `None`: nothing, or there were none.
    pub dispersion: Option<Dispersion>,
}

/// What the trains of a run tell. Rates in bytes of payload per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dispersion {
    /// The rate, within 5 %; `None` if the trains do not agree.
    pub rate: Option<u64>,
    /// The rate is at least this.
    pub low: u64,
    /// The rate is at most this; `None`: the sender may have been slower than the path.
    pub high: Option<u64>,
    /// The rate that a token bucket admits after its burst; `None`: none was seen.
    pub sustained: Option<u64>,
}

impl Load {
    /// Writes the head to a datagram of at least [`LOAD_BYTES_MIN`] bytes.
    pub fn write(&self, lease: LeaseId, datagram: &mut [u8]) {
        write_head(datagram, 4, lease);
        put(datagram, 16, &self.sequence.to_be_bytes());
        put(datagram, 20, &[0; 4]);
        put(datagram, 24, &self.sent_at.to_be_bytes());
        let TrainPlace { train, position, length } = self.place.unwrap_or_default();
        put(datagram, 32, &train.to_be_bytes());
        put(datagram, 34, &position.to_be_bytes());
        put(datagram, 36, &length.to_be_bytes());
        put(datagram, 38, &[0; 2]);
    }

    /// Reads the head of a datagram of a lease.
    ///
    /// # Errors
    /// [`DecodeError`] if it is no load of this lease.
    pub fn read(datagram: &[u8], lease: LeaseId) -> Result<Self, DecodeError> {
        if LoadKind::read(datagram)? != LoadKind::Load(lease) {
            return Err(DecodeError::Unrecognized { field: FIELD });
        }
        let (train, position, length) = (u16_at(datagram, 32), u16_at(datagram, 34), u16_at(datagram, 36));
        let place = (position < length).then_some(TrainPlace { train, position, length });
        Ok(Self { sequence: u32_at(datagram, 16), sent_at: u64_at(datagram, 24), place })
    }
}

fn write_head(out: &mut [u8], number: u8, lease: LeaseId) {
    AgentKind::Bandwidth.write(out);
    put(out, HEADER_BYTES, &[number, 0]);
    put(out, 8, &lease.0.to_be_bytes());
}

/// Signs the datagrams of one end.
#[derive(Debug, Clone)]
pub struct LoadKey(Key);

impl LoadKey {
    /// The key of `end`, from the secret of the lease.
    #[must_use]
    pub fn new(secret: &[u8; 16], end: RunEnd) -> Self {
        let purpose = match end {
            RunEnd::Prober => "pathmeter bandwidth datagram v1 prober",
            RunEnd::Responder => "pathmeter bandwidth datagram v1 responder",
        };
        Self(Key::new(secret).derive(purpose))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: LeaseId = LeaseId(0x0102_0304_0506_0708);
    const SECRET: [u8; 16] = [7; 16];

    #[test]
    fn handshake_is_read_by_the_other_end_only() {
        let (prober, responder) =
            (LoadKey::new(&SECRET, RunEnd::Prober), LoadKey::new(&SECRET, RunEnd::Responder));
        for handshake in [
            Handshake::Request { cookie: None },
            Handshake::Request { cookie: Some([9; 16]) },
            Handshake::Cookie([3; 16]),
            Handshake::Accepted,
        ] {
            let bytes = handshake.encode(LEASE, &prober);
            assert_eq!(LoadKind::read(&bytes), Ok(LoadKind::Handshake(LEASE)));
            assert_eq!(Handshake::decode(&bytes, &prober), Ok(handshake));
            let unauthentic = Err(DecodeError::Unauthentic { field: FIELD });
            assert_eq!(Handshake::decode(&bytes, &responder), unauthentic);
            assert!(Load::read(&bytes, LEASE).is_err());
            for at in 0..HANDSHAKE_BYTES {
                let mut changed = bytes;
                changed[at] ^= 1;
                assert!(Handshake::decode(&changed, &prober).is_err(), "byte {at}");
                assert!(Handshake::decode(&bytes[..at], &prober).is_err(), "{at} bytes");
            }
            let longer = [bytes.as_slice(), &[0]].concat();
            assert!(Handshake::decode(&longer, &prober).is_err());
        }
    }

    #[test]
    fn fields_are_at_the_offsets_of_the_table() {
        let place = TrainPlace { train: 0x1112, position: 0x0304, length: 0x0506 };
        let load = Load { sequence: 0x2122_2324, sent_at: 0x3132_3334_3536_3738, place: Some(place) };
        let mut datagram = [0xff; 48];
        load.write(LEASE, &mut datagram);
        let found: String = datagram.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            found,
            "706d616701020400010203040506070821222324000000003132333435363738111203040506\
             0000ffffffffffffffff"
        );
        assert_eq!(Load::read(&datagram, LEASE), Ok(load));
        assert!(Load::read(&datagram, LeaseId(1)).is_err());
        assert!(Load::read(&datagram[..39], LEASE).is_err());
        let alone = Load { place: None, ..load };
        alone.write(LEASE, &mut datagram);
        assert_eq!(Load::read(&datagram, LEASE), Ok(alone));
    }

    #[test]
    fn other_datagrams_of_the_agent_port_are_no_load() {
        let mut datagram = [0; LOAD_BYTES_MIN];
        Load::default().write(LEASE, &mut datagram);
        for (at, byte) in [(0, 0), (4, 2), (5, 1), (6, 0), (6, 5)] {
            let mut changed = datagram;
            changed[at] = byte;
            assert!(LoadKind::read(&changed).is_err(), "byte {at}");
        }
    }
}
