//! The load of runs over UDP: its sockets, and the thread that sends and receives it.

mod socket;
mod thread;

pub(crate) use socket::share_port;
pub(super) use socket::{Reception, open, open_for};
pub(super) use thread::{LoadFlow, LoadThread, ReceivedLoad};
