//! The agent: sockets, tasks, files, signals, HTTP, and the command line. The protocol and the verdicts are
//! in `pathmeter-proto`.

pub mod answering;
pub mod api;
pub mod bandwidth;
pub mod bulk;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod datagram;
pub mod discovery;
pub mod echo;
pub mod event_log;
pub mod fleet;
pub mod http;
pub mod identity;
pub mod identity_poller;
pub mod keys;
pub mod local_routes;
pub mod logging;
pub mod loops;
pub mod metrics;
pub mod paths;
pub mod poller;
pub mod probe;
pub mod quoted_headers;
pub mod resolver;
pub mod roster;
pub mod route_record;
pub mod runtime;
#[cfg(test)]
mod sample;
pub mod settings;
pub mod state_dir;
pub mod stream;
pub mod systemd;
pub mod tls;
pub mod trace;
pub mod trace_log;
pub mod websocket;
