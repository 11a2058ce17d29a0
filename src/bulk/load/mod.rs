//! The load of runs over UDP: its sockets, and the thread that sends and receives it.

mod socket;
mod thread;

pub use socket::SharedPort;
pub(super) use socket::{Reception, open, open_for};
pub(super) use thread::{LoadFlow, LoadThread, ReceivedLoad};
