//! Echo measurements: one datagram or message per slot, one verdict for each.
//!
//! * [`Prober`] sends datagrams on a schedule and decides what became of each
//! * [`StreamProber`] does the same over connections, and decides when to open and when to give up a
//!   connection
//! * [`StampResponder`] replies, and tells each prober what it received, so that the direction of a loss is
//!   known

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
pub(crate) use profile::credible_turnaround;
pub use profile::{Profile, Quirks, ReflectorTimes};
pub(crate) use reply_extensions::ReplyExtensions;
pub use request::bytes_at_least;
pub(crate) use request::{RequestContents, RequestExtensions, encode};
pub use responder::{ResponderReport, StampResponder};
pub use spec::{EchoSpec, WireFormat};
pub use stream::{StreamProber, StreamReply, StreamSpec, StreamStep};
