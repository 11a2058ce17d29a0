//! Tests of the real program on real sockets of the loopback interface, one module per feature.
//!
//! Tests assert counts and order, never latency or speed. No test sleeps and hopes: every wait is for a
//! condition, with a deadline. Tests run in parallel, each with loopback addresses of its own.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod fixture;

mod answering;
mod architecture;
mod bad_input;
mod bandwidth;
mod cli;
#[cfg(feature = "clock-faults")]
mod clock;
mod discovery;
mod drift;
mod http;
mod limits;
mod loopback;
mod probe_all;
#[cfg(feature = "tls")]
mod reference;
mod reload;
mod scrape;
mod shutdown;
mod stamp_suite;
mod state_dir;
mod streams;
mod supervised;
#[cfg(feature = "tls")]
mod tls;
mod trace;
mod websocket;
