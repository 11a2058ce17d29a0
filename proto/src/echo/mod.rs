//! Echo: one datagram or message a slot, one verdict each.
//!
//! * [`Prober`] sends datagrams on a grid and decides what became of each
//! * [`StreamProber`] does the same over connections, and decides when to make and when to give up one
//! * [`Responder`] answers, and tells each prober what it received, so that a loss has a direction

mod absence;
mod flow;
mod heard;
mod knowledge;
mod outcome;
mod prober;
mod profile;
mod request;
mod responder;
mod sessions;
mod spec;
mod stream;
mod told;
mod view;

pub use outcome::{Class, Direction, Mismatch, Report, Sample, Verdict};
pub use prober::Prober;
pub use profile::{Profile, Quirks, ReflectorTimes};
pub use request::bytes_at_least;
pub(crate) use request::{Contents, Extensions, encode};
pub use responder::{Responder, ResponderReport};
pub use spec::{Spec, Wire};
pub use stream::{Answer, StreamProber, StreamSpec, StreamStep};
pub(crate) use told::Told;
