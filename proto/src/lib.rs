//! What pathmeter decides. Nothing here acts: no socket, no clock, no thread, no environment, no randomness but a seed.
//!
//! * [`machine`]: the contract between a protocol and whoever drives it
//! * [`time`], [`grid`]: clocks that cannot be mixed up, and when to send
//! * [`wire`]: bytes to values and back
//! * [`key`], [`prefix`], [`admission`]: who may take part, and how fast
//! * [`selection`]: which peers an agent measures, where not all measure all
//! * [`stats`]: small estimators that every kind of probe shares
//! * [`echo`]: one datagram a slot, one verdict a datagram
//! * [`mtu`]: the longest packet that a path carries in one piece
//! * [`goodbye`]: peers that announce their stop
//! * [`sim`] (feature `sim`): virtual clocks, bad links, and a ledger of what truly happened
#![forbid(unsafe_code)]

pub mod admission;
pub mod dscp;
pub mod echo;
pub mod goodbye;
pub mod key;
pub mod machine;
pub mod mtu;
pub mod prefix;
pub mod schedule;
pub mod selection;
#[cfg(feature = "sim")]
pub mod sim;
pub mod stats;
pub mod time;
pub mod wire;
