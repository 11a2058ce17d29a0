//! Reads what routers quote of the probes of traces, if `trace.quoted_headers` is set.

use std::io;
use std::sync::Arc;

use tracing::warn;

use crate::quoted_headers::{QuotationReader, QuotedHeaders};

/// The reader of quoted headers.
#[derive(Debug)]
pub(super) struct Quotations {
    headers: Arc<QuotedHeaders>,
    /// `None`: not configured, or not possible.
    reader: Option<QuotationReader>,
    /// Whether it was tried in vain, and said.
    has_failed: bool,
}

impl Quotations {
    /// Nothing is read until it is configured.
    pub(super) fn new(headers: Arc<QuotedHeaders>) -> Self {
        Self { headers, reader: None, has_failed: false }
    }

    /// Starts or stops reading. Says once if it is not possible.
    pub(super) fn apply(&mut self, is_configured: bool) {
        if !is_configured {
            self.reader = None;
            self.headers.clear();
        } else if self.reader.is_none() && !self.has_failed {
            match QuotationReader::open() {
                Ok(reader) => self.reader = Some(reader),
                Err(error) => {
                    self.has_failed = true;
                    warn!(
                        %error,
                        capability = "CAP_NET_RAW",
                        "headers that routers quote are not read: traces do not show them"
                    );
                }
            }
        }
    }

    /// Waits for quotations and keeps them; without end if none are read.
    pub(super) async fn receive(&mut self) {
        let received = match &self.reader {
            Some(reader) => reader.receive(&self.headers).await,
            None => std::future::pending::<io::Result<()>>().await,
        };
        if let Err(error) = received {
            warn!(%error, "headers that routers quote are no longer read");
            (self.reader, self.has_failed) = (None, true);
        }
    }
}
