//! Errors of TLS files and connections.

use std::io;
use std::path::PathBuf;

use crate::config::Problems;

/// Why TLS could not be set up from files.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// A file cannot be read.
    #[error("reading {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Underlying error.
        source: io::Error,
    },
    /// A file exceeds the size limit.
    #[error("reading {path}: larger than {limit} bytes", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Size limit in bytes.
        limit: u64,
    },
    /// The web config file is invalid.
    #[error("{}", problems.display(file))]
    Web {
        /// The file.
        file: String,
        /// All problems found in it.
        problems: Problems,
    },
    /// The contents of a file cannot be used.
    #[error("{what} {problem}")]
    Unusable {
        /// Expected contents, and the file.
        what: String,
        /// The problem, and the remedy.
        problem: String,
    },
    /// The system has no trusted CA certificates.
    #[error("no CA certificates found on this system{why}; install ca-certificates, or set tls.ca_file")]
    NoSystemRoots {
        /// The error, in parentheses; empty if there was none.
        why: String,
    },
    /// This program was built without the feature `tls`.
    #[error("this build has no TLS; build it with the feature `tls`")]
    NoTls,
}

/// Why a TLS connection failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct TlsError {
    /// Cause, for callers that treat causes differently.
    pub cause: Cause,
    /// Message for users, with the remedy if there is one.
    pub what: String,
}

/// Cause of a failed TLS connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The server's certificate, or one in its chain, has expired.
    Expired,
    /// The certificate is not valid yet, or the local clock is behind.
    NotYetValid,
    /// The certificate is signed by an unknown CA.
    UnknownIssuer,
    /// The certificate is not valid for the server's name.
    WrongName,
    /// The certificate cannot be used for another reason.
    BadCertificate,
    /// The server requires a client certificate, and none is configured.
    ClientCertificateRequired,
    /// The server rejected the client certificate.
    ClientCertificateRefused,
    /// The response is not TLS.
    NotTls,
    /// The handshake failed, for example because no version is supported by both sides.
    Protocol,
    /// I/O error on the connection.
    Io,
}
