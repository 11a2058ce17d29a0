//! The real program on real sockets: one module for each promise.
//!
//! Counts and order are asserted, never latency or speed. Nothing sleeps for luck: every wait is for a condition, with a
//! deadline. Tests run side by side, each with loopback addresses of its own.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod fixture;

mod answering;
mod architecture;
mod bad_input;
mod cli;
#[cfg(feature = "clock-faults")]
mod clock;
mod discovery;
mod drift;
mod http;
mod loopback;
#[cfg(feature = "tls")]
mod reference;
mod reload;
mod scrape;
mod shutdown;
mod stamp_suite;
mod streams;
mod supervised;
#[cfg(feature = "tls")]
mod tls;
mod websocket;
