//! TCP_INFO of connections that a library reads and writes.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use tokio::net::TcpStream;

use super::kernel;
use crate::metrics::stream::TcpInfo;

/// A duplicate descriptor of a connection, dropped with it.
#[derive(Debug)]
pub(super) struct TcpInfoReader {
    socket: OwnedFd,
    source: Option<SocketAddr>,
}

impl TcpInfoReader {
    pub(super) fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self { socket: stream.as_fd().try_clone_to_owned()?, source: stream.local_addr().ok() })
    }

    pub(super) fn read(&self) -> Option<TcpInfo> {
        kernel::tcp_info(&self.socket)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn source(&self) -> Option<SocketAddr> {
        self.source
    }
}
