//! The daemon: sockets, tasks, files, signals, HTTP. What is decided is decided in `pathmeter-proto`.

pub mod config;
