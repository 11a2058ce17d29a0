//! The protocol logic of pathmeter, without I/O: no sockets, clocks, threads or environment. Randomness comes
//! only from seeds that the caller passes. Times and received bytes are arguments, so every run can be
//! repeated exactly.
//!
//! * [`machine`]: the contract between a protocol and its driver
//! * [`time`], [`schedule`]: one type per clock, and the send schedule
//! * [`token_bucket`]: rate limits
//! * [`wire`]: encoding and decoding of packets and messages
//! * [`key`], [`prefix`], [`admission`]: authentication, allowed sources and rate limits
//! * [`selection`]: which peers an agent measures when a full mesh is too large
//! * [`stats`]: small estimators that all kinds of probes share
//! * [`echo`]: one datagram or message per slot, one verdict for each
//! * [`mtu`]: path MTU discovery
//! * [`trace`]: which routers a flow passes, and when that changes
//! * [`bandwidth`]: leases, budgets and limits of bandwidth runs, and their results
//! * [`dscp`]: class of service names and code points
//! * [`goodbye`]: announcements of peers that are about to stop
//! * [`sim`] (feature `sim`): virtual clocks, impaired links and a ledger of the true events
#![forbid(unsafe_code)]

pub mod admission;
pub mod bandwidth;
pub mod dscp;
pub mod echo;
pub mod goodbye;
pub mod key;
pub mod load;
pub mod machine;
pub mod mtu;
pub mod prefix;
pub mod probe_budget;
pub mod schedule;
pub mod selection;
#[cfg(feature = "sim")]
pub mod sim;
pub mod stats;
pub mod time;
pub mod token_bucket;
pub mod trace;
pub mod wire;
