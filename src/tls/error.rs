//! What can go wrong.

use std::io;
use std::path::PathBuf;

use crate::config::Problems;

/// Why files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// One cannot be read.
    #[error("reading {path}: {source}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One is no text that anybody wrote.
    #[error("reading {path}: larger than {limit} bytes", path = path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Bytes that are read.
        limit: u64,
    },
    /// The web config file says something that it may not.
    #[error("{}", problems.display(file))]
    Web {
        /// Which.
        file: String,
        /// What.
        problems: Problems,
    },
    /// What was read is not what it should be.
    #[error("{what} {problem}")]
    Unusable {
        /// What it should be, and where it was read.
        what: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// There is nobody to believe.
    #[error("the system has no CA certificates{why}: install ca-certificates, or give tls.ca_file")]
    NoSystemRoots {
        /// What went wrong, in parentheses; empty: nothing.
        why: String,
    },
    /// This program was built without the feature `tls`.
    #[error("this build has no TLS: build it with the feature `tls`")]
    NoTls,
}

/// Why a connection is not one that can be believed.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct TlsError {
    /// What a caller may treat differently.
    pub cause: Cause,
    /// A sentence, with the remedy where there is one.
    pub what: String,
}

/// What went wrong with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The server's certificate, or one that it depends on, is no longer valid.
    Expired,
    /// It is not yet valid; or our clock is behind.
    NotYetValid,
    /// Nobody whom we trust signed it.
    UnknownIssuer,
    /// It is another host's.
    WrongName,
    /// It cannot be used for some other reason.
    BadCertificate,
    /// The server wants one from us, and we have none.
    ClientCertificateRequired,
    /// The server did not take ours.
    ClientCertificateRefused,
    /// What came back is not TLS.
    NotTls,
    /// The two sides do not agree, for example on a version.
    Protocol,
    /// The connection broke.
    Io,
}
