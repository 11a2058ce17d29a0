//! Test networks whose true loss and delay are known.
//!
//! A [`Net`] is a set of network namespaces joined by veth pairs. A cable may have a [`Wire`] in it: a thread
//! between two packet sockets that passes each frame through the simulator's link model and logs the outcome.
//! What a program reports about the network can then be compared with what happened to its datagrams
//! ([`truth`]).
//!
//! Nothing outlives the process, however it ends: namespaces are held by file descriptors and have no names,
//! and the kernel kills the programs in them when the thread that started them ends. Several labs can run at
//! the same time.
//!
//! The lab needs Linux, `ip` from iproute2, and either root or unprivileged user namespaces. An error here
//! means a broken test, so functions panic with a message instead of returning errors.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod agent;
pub mod connection;
pub mod exchange;
mod forged_error;
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
mod wire_router;

pub use agent::{AgentProcess, CONFIG, LOG, SendRequest, clear_environment};
pub use forged_error::ForgedError;
pub use namespace::Namespace;
pub use net::{Cable, Net, NetPlan};
pub use page::MetricsPage;
pub use privilege::{LabUnavailable, Privilege, drop_net_raw, enter};
pub use program::{CpuLoad, Program};
pub use wait::{DEADLINE, eventually};
pub use web::{Response, get, request};
pub use wire::{DatagramHead, DeliveredCopy, LogEntry, Wire, WireDirection};
pub use wire_router::WireRouter;
