//! The daemon: sockets, tasks, files, signals, HTTP. What is decided is decided in `pathmeter-proto`.

pub mod config;
pub mod http;
pub mod logging;
pub mod systemd;
