//! Messages of bandwidth runs over TCP, on the agent port.
//!
//! ```text
//! message, 80 bytes
//!  0 u32 magic "pmbw"   4 u8 version 1   5 u8 kind   6 u16 number
//!  8 40 bytes fields of the kind, unused ones zero
//! 48 16 bytes text, padded with zeros
//! 64 16 bytes HMAC-SHA-256/128 over the u64 number of messages that this end has sent on the connection
//!    before, and bytes 0..64; zeros in a refusal
//!
//! kind 1 activate   number: 0 of the control connection, 1 to 64 of a data connection;  8 u64 lease
//! kind 2 activated  number: 0 granted, 1 invalid lease, 2 number taken, 3 wrong HMAC;   8 u64 lease
//! kind 3 start      no fields
//! kind 4 progress   8 u64 bytes received   16 u64 nanoseconds since the start
//! kind 5 result     number: why it ended
//!                   8 u64 bytes   16 u64 nanoseconds   24 u64 retransmitted bytes   32 u32 segments
//!                   in milliseconds: 36 u32 busy   40 u32 limited by the window   44 u32 by the buffer
//!                  48 text: the congestion control
//! kind 6 stop       number: why
//! kind 7 result of a receiver of datagrams
//!                  number: why it ended, plus 256 if its host dropped some
//!                   8 u64 bytes   16 u64 nanoseconds   24 u32 congestion marks
//!                  28 i32 growth of the delay in microseconds, -2³¹ if unknown
//!                  in bytes per second, 0 if unknown: 32 u64 rate of the trains   40 u64 at least
//!                  48 u64 at most   56 u64 after a burst
//! ```
//!
//! The keys are derived from the secret of the lease, one for each end. The secret is in the response to the
//! request for the lease, so a correct HMAC shows that the client was granted the lease. The handshake of TCP
//! shows that it receives what is sent to its address.

use super::load::{Dispersion, LoadResult};
use super::{DecodeError, array, put, require, u16_at, u32_at, u64_at};
use crate::bandwidth::lease::LeaseId;
use crate::bandwidth::{RunEnd, StopReason};
use crate::key::Key;

/// Length of a message in bytes.
pub const MESSAGE_BYTES: usize = 80;

/// Maximum number of a data connection.
pub const CONNECTIONS_MAX: u16 = 64;

const MAGIC: u32 = u32::from_be_bytes(*b"pmbw");
const VERSION: u8 = 1;
const TEXT_AT: usize = 48;
const TAG_AT: usize = 64;
const TAG_BYTES: usize = 16;
/// Added to the number of a load message if the host of the receiver dropped datagrams.
const HOST_LIMITED: u16 = 256;

/// Whether the first bytes of a connection are those of a bandwidth run.
#[must_use]
pub fn is_bandwidth(greeting: &[u8]) -> bool {
    greeting.len() >= 4 && u32_at(greeting, 0) == MAGIC
}

/// A message of a bandwidth run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunMessage {
    /// The first message of each connection of the prober.
    Activate {
        /// The lease.
        lease: LeaseId,
        /// 0: the control connection; others: a data connection.
        connection: u16,
    },
    /// The response to [`Activate`](Self::Activate).
    Activated {
        /// The lease.
        lease: LeaseId,
        /// Whether the connection belongs to the run.
        status: ActivationStatus,
    },
    /// All data connections are open: the sender begins.
    Start,
    /// How far the run is. It also shows that the end is alive.
    Progress {
        /// Bytes over all data connections: received in order; or, from a sender, known to have arrived.
        bytes: u64,
        /// Nanoseconds since the start.
        nanos: u64,
    },
    /// The result of one end.
    Result(RunResult),
    /// The run must stop at once.
    Stop(StopReason),
}

/// Whether a connection belongs to the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActivationStatus {
    /// It does.
    Granted,
    /// There is no such lease, or it has ended.
    Invalid,
    /// The lease has no connection of this number left.
    Taken,
    /// The HMAC is wrong.
    Unauthentic,
}

/// What one end of a run knows when it has ended. The receiver knows the bytes and the time; the sender knows
/// the rest, as the kernel counts it in `TCP_INFO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunResult {
    /// Why it ended.
    pub reason: StopReason,
    /// Bytes of payload over all data connections: received in order; or, from a sender, known to have
    /// arrived.
    pub bytes: u64,
    /// Nanoseconds from the start to the end.
    pub nanos: u64,
    /// Statistics of the sender of a connection; zeros from a receiver.
    pub sender: SenderStatistics,
    /// What a receiver of datagrams has measured; `None` from all others.
    pub load: Option<LoadResult>,
}

/// What the kernel of the sender counted, over all data connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SenderStatistics {
    /// Bytes that were retransmitted.
    pub bytes_retransmitted: u64,
    /// Segments that were retransmitted.
    pub retransmits: u32,
    /// Milliseconds in which there was data to send or to be acknowledged; the mean of all connections.
    pub busy_ms: u32,
    /// Milliseconds in which the window of the receiver limited it.
    pub window_limited_ms: u32,
    /// Milliseconds in which the send buffer limited it.
    pub buffer_limited_ms: u32,
    /// Name of the congestion control, at most 16 bytes of ASCII.
    pub congestion_control: String,
}

/// Signs the messages of one end on one connection, or verifies them.
#[derive(Debug, Clone)]
pub struct MessageSeal {
    key: Key,
    count: u64,
}

impl MessageSeal {
    /// The seal of messages that `end` sends, from the secret of the lease.
    #[must_use]
    pub fn new(secret: &[u8; 16], end: RunEnd) -> Self {
        let purpose = match end {
            RunEnd::Prober => "pathmeter bandwidth v1 prober",
            RunEnd::Responder => "pathmeter bandwidth v1 responder",
        };
        Self { key: Key::new(secret).derive(purpose), count: 0 }
    }

    /// Encodes and signs the next message.
    pub fn encode(&mut self, message: &RunMessage) -> [u8; MESSAGE_BYTES] {
        let mut out = message.encode();
        let tag = self.key.mac_128(&[&self.count.to_be_bytes(), &out[..TAG_AT]]);
        self.count += 1;
        put(&mut out, TAG_AT, &tag);
        out
    }

    /// Verifies and decodes the next message.
    ///
    /// # Errors
    /// [`DecodeError::Unauthentic`] if its HMAC is wrong; other errors if it cannot be decoded.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<RunMessage, DecodeError> {
        let message = RunMessage::decode(bytes)?;
        let tag: [u8; TAG_BYTES] = array(bytes, TAG_AT);
        if !self.key.verify(&[&self.count.to_be_bytes(), &bytes[..TAG_AT]], &tag) {
            return Err(DecodeError::Unauthentic { field: "message of a bandwidth run" });
        }
        self.count += 1;
        Ok(message)
    }
}

impl RunMessage {
    /// Encodes a message with an HMAC of zeros: of a refusal.
    #[must_use]
    pub fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut out = [0; MESSAGE_BYTES];
        let (kind, number) = match self {
            Self::Activate { connection, .. } => (1, *connection),
            Self::Activated { status, .. } => (2, status.code()),
            Self::Start => (3, 0),
            Self::Progress { .. } => (4, 0),
            Self::Result(RunResult { reason, load: None, .. }) => (5, code_of(*reason)),
            Self::Result(RunResult { reason, load: Some(load), .. }) => {
                (7, code_of(*reason) | if load.is_host_limited { HOST_LIMITED } else { 0 })
            }
            Self::Stop(reason) => (6, code_of(*reason)),
        };
        put(&mut out, 0, &MAGIC.to_be_bytes());
        put(&mut out, 4, &[VERSION, kind]);
        put(&mut out, 6, &number.to_be_bytes());
        match self {
            Self::Activate { lease, .. } | Self::Activated { lease, .. } => {
                put(&mut out, 8, &lease.0.to_be_bytes());
            }
            Self::Progress { bytes, nanos } => {
                put(&mut out, 8, &bytes.to_be_bytes());
                put(&mut out, 16, &nanos.to_be_bytes());
            }
            Self::Result(RunResult { bytes, nanos, load: Some(load), .. }) => {
                put(&mut out, 8, &bytes.to_be_bytes());
                put(&mut out, 16, &nanos.to_be_bytes());
                put(&mut out, 24, &load.congestion_marks.to_be_bytes());
                put(&mut out, 28, &load.delay_growth.unwrap_or(i32::MIN).to_be_bytes());
                if let Some(Dispersion { rate, low, high, sustained }) = load.dispersion {
                    let rates = [rate.unwrap_or(0), low, high.unwrap_or(0), sustained.unwrap_or(0)];
                    for (rate, at) in rates.into_iter().zip((32..).step_by(8)) {
                        put(&mut out, at, &rate.to_be_bytes());
                    }
                }
            }
            Self::Result(RunResult { bytes, nanos, sender, load: None, .. }) => {
                put(&mut out, 8, &bytes.to_be_bytes());
                put(&mut out, 16, &nanos.to_be_bytes());
                put(&mut out, 24, &sender.bytes_retransmitted.to_be_bytes());
                put(&mut out, 32, &sender.retransmits.to_be_bytes());
                put(&mut out, 36, &sender.busy_ms.to_be_bytes());
                put(&mut out, 40, &sender.window_limited_ms.to_be_bytes());
                put(&mut out, 44, &sender.buffer_limited_ms.to_be_bytes());
                let name = sender.congestion_control.as_bytes();
                put(&mut out, TEXT_AT, &name[..name.len().min(TAG_AT - TEXT_AT)]);
            }
            Self::Start | Self::Stop(_) => {}
        }
        out
    }

    /// Decodes a message without verifying its HMAC.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not a message of a bandwidth run.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        const FIELD: &str = "message of a bandwidth run";
        const UNRECOGNIZED: DecodeError = DecodeError::Unrecognized { field: FIELD };
        require(bytes, MESSAGE_BYTES, FIELD)?;
        if u32_at(bytes, 0) != MAGIC {
            return Err(UNRECOGNIZED);
        }
        if bytes[4] != VERSION {
            return Err(DecodeError::Version { found: bytes[4], supported: VERSION });
        }
        let number = u16_at(bytes, 6);
        let reason = || reason_of(number).ok_or(UNRECOGNIZED);
        let lease = LeaseId(u64_at(bytes, 8));
        match bytes[5] {
            1 if number <= CONNECTIONS_MAX => Ok(Self::Activate { lease, connection: number }),
            2 => {
                let status = ActivationStatus::ALL.into_iter().find(|status| status.code() == number);
                Ok(Self::Activated { lease, status: status.ok_or(UNRECOGNIZED)? })
            }
            3 => Ok(Self::Start),
            4 => Ok(Self::Progress { bytes: u64_at(bytes, 8), nanos: u64_at(bytes, 16) }),
            5 => {
                let text: [u8; TAG_AT - TEXT_AT] = array(bytes, TEXT_AT);
                let name = text.split(|byte| *byte == 0).next().unwrap_or(&[]);
                let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-".contains(byte);
                if !name.iter().all(is_name) {
                    return Err(UNRECOGNIZED);
                }
                let sender = SenderStatistics {
                    bytes_retransmitted: u64_at(bytes, 24),
                    retransmits: u32_at(bytes, 32),
                    busy_ms: u32_at(bytes, 36),
                    window_limited_ms: u32_at(bytes, 40),
                    buffer_limited_ms: u32_at(bytes, 44),
                    congestion_control: String::from_utf8_lossy(name).into_owned(),
                };
                let (bytes, nanos) = (u64_at(bytes, 8), u64_at(bytes, 16));
                Ok(Self::Result(RunResult { reason: reason()?, bytes, nanos, sender, load: None }))
            }
            6 => Ok(Self::Stop(reason()?)),
            7 => {
                let known = |at: usize| Some(u64_at(bytes, at)).filter(|rate| *rate > 0);
                let dispersion = known(40).map(|low| Dispersion {
                    rate: known(32),
                    low,
                    high: known(48),
                    sustained: known(56),
                });
                let delay_growth = i32::from_be_bytes(array(bytes, 28));
                let load = LoadResult {
                    congestion_marks: u32_at(bytes, 24),
                    is_host_limited: number & HOST_LIMITED != 0,
                    delay_growth: Some(delay_growth).filter(|growth| *growth > i32::MIN),
                    dispersion,
                };
                Ok(Self::Result(RunResult {
                    reason: reason_of(number & !HOST_LIMITED).ok_or(UNRECOGNIZED)?,
                    bytes: u64_at(bytes, 8),
                    nanos: u64_at(bytes, 16),
                    sender: SenderStatistics::default(),
                    load: Some(load),
                }))
            }
            _ => Err(UNRECOGNIZED),
        }
    }
}

impl ActivationStatus {
    const ALL: [Self; 4] = [Self::Granted, Self::Invalid, Self::Taken, Self::Unauthentic];

    const fn code(self) -> u16 {
        match self {
            Self::Granted => 0,
            Self::Invalid => 1,
            Self::Taken => 2,
            Self::Unauthentic => 3,
        }
    }
}

const fn code_of(reason: StopReason) -> u16 {
    match reason {
        StopReason::Bytes => 1,
        StopReason::Time => 2,
        StopReason::Delay => 3,
        StopReason::Loss => 4,
        StopReason::Lease => 5,
        StopReason::Peer => 6,
        StopReason::Operator => 7,
        StopReason::Congestion => 8,
        StopReason::Host => 9,
    }
}

fn reason_of(code: u16) -> Option<StopReason> {
    StopReason::ALL.into_iter().find(|reason| code_of(*reason) == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: [u8; 16] = [7; 16];

    fn result() -> RunMessage {
        let sender = SenderStatistics {
            bytes_retransmitted: 6_000,
            retransmits: 4,
            busy_ms: 998,
            window_limited_ms: 20,
            buffer_limited_ms: 3,
            congestion_control: "cubic".to_owned(),
        };
        RunMessage::Result(RunResult {
            reason: StopReason::Delay,
            bytes: 1 << 40,
            nanos: 1_000_000_007,
            sender,
            load: None,
        })
    }

    fn load(load: LoadResult) -> RunMessage {
        RunMessage::Result(RunResult {
            reason: StopReason::Host,
            bytes: 5,
            nanos: 6,
            sender: SenderStatistics::default(),
            load: Some(load),
        })
    }

    const DISPERSION: Dispersion =
        Dispersion { rate: Some(0x11), low: 0x12, high: Some(0x13), sustained: Some(0x14) };
    const LOAD: LoadResult = LoadResult {
        congestion_marks: 0x15,
        is_host_limited: true,
        delay_growth: Some(-2),
        dispersion: Some(DISPERSION),
    };

    fn messages() -> Vec<RunMessage> {
        let lease = LeaseId(0x0102_0304_0506_0708);
        let mut messages = vec![
            RunMessage::Activate { lease, connection: 0 },
            RunMessage::Activate { lease, connection: CONNECTIONS_MAX },
            RunMessage::Start,
            RunMessage::Progress { bytes: 12_345_678_901, nanos: 250_000_000 },
            result(),
            load(LOAD),
            load(LoadResult::default()),
            load(LoadResult {
                dispersion: Some(Dispersion { rate: None, high: None, sustained: None, ..DISPERSION }),
                ..LOAD
            }),
        ];
        messages.extend(ActivationStatus::ALL.map(|status| RunMessage::Activated { lease, status }));
        messages.extend(StopReason::ALL.map(RunMessage::Stop));
        messages
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        let (mut sender, mut receiver) =
            (MessageSeal::new(&SECRET, RunEnd::Prober), MessageSeal::new(&SECRET, RunEnd::Prober));
        for message in messages() {
            let bytes = sender.encode(&message);
            assert_eq!(receiver.decode(&bytes), Ok(message.clone()));
            assert_eq!(RunMessage::decode(&bytes), Ok(message.clone()));
            assert_eq!(RunMessage::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn format_is_the_documented_one() {
        let bytes = result().encode();
        let expected = "706d6277 01 05 0003 0000010000000000 000000003b9aca07 0000000000001770 00000004\
                        000003e6 00000014 00000003 6375626963 0000000000000000000000";
        let hex: String = bytes[..64].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.replace(' ', ""));
        assert_eq!(bytes[64..], [0; 16]);
        let hex: String = load(LOAD).encode()[..64].iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "706d6277 01 07 0109 0000000000000005 0000000000000006 00000015 fffffffe\
                        0000000000000011 0000000000000012 0000000000000013 0000000000000014";
        assert_eq!(hex, expected.replace(' ', ""));
        assert!(is_bandwidth(&bytes) && !is_bandwidth(b"pmst") && !is_bandwidth(b"pmb"));
    }

    #[test]
    fn forged_repeated_and_reflected_messages_are_not_authentic() {
        const UNAUTHENTIC: Result<RunMessage, DecodeError> =
            Err(DecodeError::Unauthentic { field: "message of a bandwidth run" });
        let mut sender = MessageSeal::new(&SECRET, RunEnd::Prober);
        let receiver = MessageSeal::new(&SECRET, RunEnd::Prober);
        let first = sender.encode(&RunMessage::Start);
        let second = sender.encode(&RunMessage::Start);
        for at in [6, 8, 63, 64, 79] {
            let mut changed = first;
            changed[at] ^= 1;
            assert_eq!(receiver.clone().decode(&changed), UNAUTHENTIC, "byte {at}");
        }
        assert_eq!(receiver.clone().decode(&second), UNAUTHENTIC, "out of order");
        let mut repeated = receiver;
        assert!(repeated.decode(&first).is_ok());
        assert_eq!(repeated.decode(&first), UNAUTHENTIC, "repeated");
        assert_eq!(MessageSeal::new(&SECRET, RunEnd::Responder).decode(&first), UNAUTHENTIC, "reflected");
        assert_eq!(MessageSeal::new(&[8; 16], RunEnd::Prober).decode(&first), UNAUTHENTIC, "other lease");
        assert_eq!(
            MessageSeal::new(&SECRET, RunEnd::Prober).decode(&RunMessage::Start.encode()),
            UNAUTHENTIC
        );
    }

    #[test]
    fn other_bytes_are_no_message() {
        let good = result().encode();
        let changed = |at: usize, byte: u8| {
            let mut changed = good;
            changed[at] = byte;
            RunMessage::decode(&changed)
        };
        for len in 0..MESSAGE_BYTES {
            assert!(matches!(RunMessage::decode(&good[..len]), Err(DecodeError::Truncated { .. })), "{len}");
        }
        assert_eq!(changed(4, 2), Err(DecodeError::Version { found: 2, supported: 1 }));
        let unrecognized = Err(DecodeError::Unrecognized { field: "message of a bandwidth run" });
        for (at, byte) in [(0, 0), (5, 0), (5, 8), (7, 0), (7, 10), (6, 1), (48, b'\n'), (52, 0xff)] {
            assert_eq!(changed(at, byte), unrecognized, "byte {at}");
        }
        let mut activate = RunMessage::Activate { lease: LeaseId(1), connection: 1 }.encode();
        activate[7] = 65;
        assert_eq!(RunMessage::decode(&activate), unrecognized);
        activate[5] = 2;
        assert_eq!(RunMessage::decode(&activate), unrecognized, "no such status");
    }

    #[test]
    fn long_name_of_a_congestion_control_is_cut() {
        let RunMessage::Result(mut result) = result() else { panic!() };
        result.sender.congestion_control = "a23456789b123456789".to_owned();
        let RunMessage::Result(read) = RunMessage::decode(&RunMessage::Result(result).encode()).unwrap()
        else {
            panic!()
        };
        assert_eq!(read.sender.congestion_control, "a23456789b123456");
    }
}
