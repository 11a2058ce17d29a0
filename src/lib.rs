//! The daemon: sockets, tasks, files, signals, HTTP. What is decided is decided in `pathmeter-proto`.

pub mod answering;
pub mod api;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod datagram;
pub mod discovery;
pub mod fleet;
pub mod http;
pub mod identity;
pub mod journal;
pub mod keys;
pub mod logging;
pub mod metrics;
pub mod peers;
pub mod resolver;
pub mod roster;
pub mod runtime;
pub mod settings;
pub mod stream;
pub mod systemd;
pub mod tls;
pub mod websocket;
