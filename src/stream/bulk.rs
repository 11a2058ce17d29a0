//! Connections to the agent port that another thread serves.

use std::fmt;
use std::net::{SocketAddr, TcpStream};

use pathmeter_proto::wire::stream::GREETING_BYTES;

/// A connection to the agent port that begins a bandwidth run.
#[derive(Debug)]
pub struct BulkConnection {
    /// The connection, in non-blocking mode.
    pub stream: TcpStream,
    /// The address of the client.
    pub source: SocketAddr,
    /// The bytes that were read from it.
    pub greeting: [u8; GREETING_BYTES],
}

/// Passes a connection to the thread that serves it. Does not block.
pub struct BulkHandler(pub Box<dyn Fn(BulkConnection) + Send + Sync>);

impl fmt::Debug for BulkHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BulkHandler")
    }
}
