//! The daemon: sockets, tasks, files, signals, HTTP. What is decided is decided in `pathmeter-proto`.

pub mod clock;
pub mod config;
pub mod datagram;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod systemd;
