//! Placeholder types for builds without the feature `tls`. They cannot be created.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::{FileError, TlsError, Trust, WatchedFiles};
use crate::config::web::WebTls;

/// Establishes TLS connections; not available in this build.
#[derive(Debug, Clone, PartialEq)]
pub struct Connector(Infallible);

impl Connector {
    /// Always fails.
    ///
    /// # Errors
    /// Always [`FileError::NoTls`].
    pub fn new(_: &Trust) -> Result<Self, FileError> {
        Err(FileError::NoTls)
    }

    /// Always fails.
    ///
    /// # Errors
    /// Always [`FileError::NoTls`].
    pub fn read(_: &Trust, _: &mut WatchedFiles) -> Result<Self, FileError> {
        Err(FileError::NoTls)
    }

    /// Never called.
    pub fn follow(&self, _: &Self) {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    #[expect(clippy::unused_async, reason = "as in a build with TLS")]
    pub async fn connect<S>(&self, _: S, _: &str) -> Result<TlsStream<S>, TlsError> {
        match self.0 {}
    }

    /// Never called.
    #[must_use]
    pub fn explain(&self, _: &(dyn Error + 'static)) -> Option<TlsError> {
        match self.0 {}
    }
}

/// Accepts TLS connections; not available in this build.
#[derive(Debug, Clone)]
pub struct Acceptor(Infallible);

impl Acceptor {
    /// Always fails.
    ///
    /// # Errors
    /// Always [`FileError::NoTls`].
    pub fn read(_: &WebTls, _: &mut WatchedFiles) -> Result<Self, FileError> {
        Err(FileError::NoTls)
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    #[expect(clippy::unused_async, reason = "as in a build with TLS")]
    pub async fn accept(&self, _: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        match self.0 {}
    }

    /// Never called.
    #[must_use]
    pub fn certificate_expiry(&self) -> Option<u64> {
        match self.0 {}
    }
}

/// TLS stream; not available in this build.
#[derive(Debug)]
pub struct TlsStream<S> {
    never: Infallible,
    _stream: PhantomData<S>,
}

impl<S> TlsStream<S> {
    /// Never called.
    pub(super) fn get_ref(&self) -> &S {
        match self.never {}
    }

    /// Never called.
    #[must_use]
    pub fn certificate_expiry(&self) -> Option<u64> {
        match self.never {}
    }

    /// Never called.
    #[must_use]
    pub fn version(&self) -> Option<&'static str> {
        match self.never {}
    }
}

impl<S: Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.never {}
    }
}

impl<S: Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        match self.never {}
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.never {}
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.never {}
    }
}
