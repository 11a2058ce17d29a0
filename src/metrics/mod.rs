//! All exported metrics. Metric names are defined only in this module.
//!
//! Paths, loops and responders keep their own atomics, which [`text`] writes; the few metrics of the process
//! are in a `prometheus` registry. Both are rendered as one page, sorted by name, with each family once.

pub mod agent;
pub mod bandwidth;
mod block;
mod directory;
mod discovery;
mod distribution;
pub mod echo;
pub mod group;
pub mod host_load;
mod labels;
mod page;
pub mod path_mtu;
mod process;
mod registry;
#[cfg(test)]
pub mod sample;
pub mod stream;
pub mod text;
pub mod trace;
pub mod trace_hops;
pub mod websocket;

pub use block::{AnySeries, Blocks, Series};
pub use directory::{PeerInfo, ProbeInfo};
pub use discovery::ProviderCounts;
pub use page::{Exporter, Page, Responders};
pub use process::{HttpCounts, PeerState, ProcessMetrics, TlsCounts};
pub use text::ExpositionFormat;
