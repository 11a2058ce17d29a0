//! A world whose truth is known: virtual clocks that drift and step, links that lose, delay, reorder, duplicate and
//! corrupt, drivers that wake late, and a ledger of what truly happened.
//!
//! Everything follows from a seed. Simulated minutes take milliseconds.

mod clock;
mod echo_host;
mod ledger;
mod link;
mod random;
mod world;

pub use clock::HostClock;
pub use echo_host::EchoHost;
pub use ledger::{Counts, Ledger};
pub use link::{Corruption, Delivery, Dropped, Jitter, Link, Loss, Packet, Queue, Rewrite};
pub use random::Random;
pub use world::{Host, Scheduling, SimResponder, World};
