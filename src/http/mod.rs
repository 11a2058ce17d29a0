//! HTTP/1.1 server and client, independent of the routes that are served.
//!
//! * [`server`] — connections, their limits, graceful shutdown;
//! * [`client`] — a single request to an agent, within a deadline;
//! * [`auth`] — signatures that prove that a request comes from an agent of the mesh;
//! * [`web_config`] — the web config file: TLS, headers, and users (see [`basic`]).

mod accepted;
pub mod auth;
pub mod basic;
pub mod client;
pub mod server;
pub mod web_config;

pub use accepted::AcceptedConnection;
