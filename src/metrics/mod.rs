//! Everything that has a metric name. Nothing outside this folder has one.
//!
//! Paths, loops and the responder keep their own atomics and are written by [`text`]; the few metrics of the process are
//! in a `prometheus` registry. Both come out as one sorted page, each family once.

pub mod agent;
mod discovery;
mod distribution;
pub mod echo;
pub mod group;
mod page;
pub mod path_mtu;
mod process;
pub mod stream;
pub mod text;
pub mod websocket;

pub use discovery::ProviderCounts;
pub use page::{Directory, Exporter, Page, ProbeInfo, Responders};
pub use process::{HttpCounts, PeerState, ProcessMetrics, TlsCounts};
pub use text::Format;
