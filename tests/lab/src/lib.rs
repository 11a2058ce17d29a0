//! Networks whose truth is known.
//!
//! A [`Net`] is a handful of network namespaces joined by veth pairs. A cable may have a [`Wire`] in it: a thread between
//! two packet sockets that asks the simulator's own link model what becomes of each frame, and remembers it. What a
//! program says about the network can then be compared with what was done to its datagrams ([`truth`]).
//!
//! Nothing outlives the process, however it ends: namespaces are held by file descriptors and have no names, and the
//! programs in them are killed by the kernel when the thread that started them is gone. Two labs can run at a time.
//!
//! It needs Linux, `ip` from iproute2, and either root or unprivileged user namespaces. What goes wrong here is a
//! broken test, so functions panic with a sentence instead of returning errors.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod agent;
pub mod connection;
pub mod exchange;
pub mod frame;
mod namespace;
mod net;
mod offload;
mod page;
pub mod pki;
mod privilege;
mod program;
pub mod scenario;
pub mod truth;
mod wait;
mod web;
mod wire;

pub use agent::{AgentProcess, CONFIG, LOG, SendRequest, clear_environment};
pub use namespace::Namespace;
pub use net::{Cable, Net, Plan};
pub use page::Page;
pub use privilege::{LabUnavailable, Privilege, drop_net_raw, enter};
pub use program::{CpuLoad, Program};
pub use wait::{DEADLINE, eventually};
pub use web::{Response, get, request};
pub use wire::{DatagramHead, DeliveredCopy, LogEntry, Wire, WireDirection};
