//! HTTP/1.1, and nothing about what is served: our routes use this, and this does not know them.
//!
//! * [`server`] — connections, their limits, a graceful stop;
//! * [`client`] — one request to one agent, within a deadline;
//! * [`auth`] — how such a request proves that it comes from the mesh;
//! * [`web_config`] — how the port is served: TLS, headers, and the users of [`basic`].

pub mod auth;
pub mod basic;
pub mod client;
pub mod server;
pub mod web_config;
