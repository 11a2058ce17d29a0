//! A simulator with known ground truth: virtual clocks that drift and step, links that lose, delay, reorder,
//! duplicate and corrupt datagrams, drivers that wake late, and a ledger of the true events.
//!
//! A run is determined by its seed. Simulated minutes take milliseconds.

mod clock;
mod echo_host;
mod ledger;
mod link;
mod random;
mod routers;
mod trace_world;
mod world;

pub use clock::HostClock;
pub use echo_host::EchoHost;
pub use ledger::{Counts, Ledger};
pub use link::{Corruption, Delivery, Dropped, Jitter, Link, Loss, Packet, Queue, Rewrite};
pub use random::Random;
pub use routers::{Answers, Balance, Rejects, RouterNetwork, Segment, SimRouter, Transit};
pub use trace_world::TraceWorld;
pub use world::{Host, Scheduling, SimResponder, World};
