//! What pathmeter decides. Nothing here acts.
#![forbid(unsafe_code)]

pub mod dscp;
pub mod key;
pub mod prefix;
