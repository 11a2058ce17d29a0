//! Echo over datagrams: one datagram a slot, one verdict a datagram.
//!
//! * [`Prober`] sends on a grid and decides what became of each datagram
//! * [`Responder`] answers, and tells each prober what it received, so that a loss has a direction

mod absence;
mod flow;
mod heard;
mod knowledge;
mod outcome;
mod prober;
mod request;
mod responder;
mod sessions;
mod told;
mod view;

pub use outcome::{Class, Direction, Mismatch, Report, Sample, Verdict};
pub use prober::{Prober, Spec, Wire};
pub use request::bytes_at_least;
pub(crate) use request::{Contents, Extensions, encode};
pub use responder::{Responder, ResponderReport};
pub(crate) use told::Told;
