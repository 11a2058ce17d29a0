//! Echo: one datagram or message a slot, one verdict each.
//!
//! * [`Prober`] sends datagrams on a grid and decides what became of each
//! * [`StreamProber`] does the same over connections, and decides when to make and when to give up one
//! * [`Responder`] answers, and tells each prober what it received, so that a loss has a direction

mod absence;
mod flow;
mod loss_evidence;
mod outcome;
mod prober;
mod profile;
mod reply;
mod reply_extensions;
mod request;
mod responder;
mod responder_kind;
mod sessions;
mod spec;
mod stream;

pub use outcome::{Class, Direction, EchoReport, Mismatch, RoundTrip, Verdict};
pub use prober::Prober;
pub use profile::{Profile, Quirks, ReflectorTimes};
pub(crate) use reply_extensions::ReplyExtensions;
pub use request::bytes_at_least;
pub(crate) use request::{RequestContents, RequestExtensions, encode};
pub use responder::{ResponderReport, StampResponder};
pub use spec::{EchoSpec, WireFormat};
pub use stream::{StreamProber, StreamReply, StreamSpec, StreamStep};
