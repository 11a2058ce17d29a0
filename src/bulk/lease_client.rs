//! Requests a lease from a responder, and waits for its turn.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use pathmeter_proto::bandwidth::lease::ABSENT_AFTER;
use tokio::time::sleep;

use super::leases::{Grant, LeaseAnswer, LeaseRequest, RefusalReason};
use crate::clock::Clock;
use crate::http::client::{Client, ClientError};

/// The path of requests for leases.
pub const LEASES: &str = "/api/v1/bandwidth/leases";

/// Requests leases from one responder.
#[derive(Debug, Clone)]
pub struct LeaseClient {
    /// Signs the requests.
    pub client: Client,
    /// The HTTP port of the responder.
    pub to: SocketAddr,
    /// The value of the `Host` header.
    pub host: String,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The request failed.
    #[error("requesting a lease: {0}")]
    Request(#[from] ClientError),
    /// The responder has no leases, or answered something else.
    #[error("{host} does not grant leases: {status} {text}; is it a pathmeter agent of this version?")]
    Unsupported {
        /// The responder.
        host: String,
        /// The status of its response.
        status: StatusCode,
        /// The beginning of its response.
        text: String,
    },
    /// The responder refuses the run.
    #[error("{host} refuses the run: {detail}")]
    Refused {
        /// The responder.
        host: String,
        /// The cause.
        reason: RefusalReason,
        /// The cause and the remedy in words.
        detail: String,
        /// When a request may succeed.
        retry_after: Option<Duration>,
    },
}

/// A place in the queue of a responder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueuePlace {
    /// 1 for the next one.
    pub position: usize,
    /// The time until the run can begin if those before it take as long as they may, in seconds.
    pub expected_start_seconds: f64,
}

/// Limits of the time after which a request is repeated, whatever the responder says.
const REPEAT_MIN: Duration = Duration::from_millis(50);
const REPEAT_MAX: Duration = Duration::from_secs(10);

/// The time after which a request is repeated, from the seconds of a [`LeaseAnswer::Waiting`].
pub fn repeat_after(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(REPEAT_MAX).clamp(REPEAT_MIN, REPEAT_MAX)
}

/// Pause after a request that failed while the client waits.
const REPEAT_AFTER_ERROR: Duration = Duration::from_millis(200);

/// Bytes of an unexpected response that are shown.
const SHOWN_BYTES: usize = 200;

impl LeaseClient {
    /// Requests a lease once.
    ///
    /// # Errors
    /// [`LeaseError::Request`] and [`LeaseError::Unsupported`].
    pub async fn request(&self, request: &LeaseRequest) -> Result<LeaseAnswer, LeaseError> {
        let body = serde_json::to_vec(request).expect("a request has only names that JSON can write");
        let response = self.client.send(self.to, &self.host, Method::POST, LEASES, Bytes::from(body)).await?;
        serde_json::from_slice(&response.body).map_err(|_| {
            let shown = &response.body[..response.body.len().min(SHOWN_BYTES)];
            let text = String::from_utf8_lossy(shown).replace(char::is_control, " ").trim().to_owned();
            LeaseError::Unsupported { host: self.host.clone(), status: response.status, text }
        })
    }

    /// Requests a lease and waits for its turn. `on_place` is called with each place in the queue.
    ///
    /// # Errors
    /// [`LeaseError`].
    pub async fn acquire(
        &self,
        mut request: LeaseRequest,
        mut on_place: impl FnMut(QueuePlace),
    ) -> Result<Grant, LeaseError> {
        let mut answered_at = Clock::now();
        loop {
            let answer = match self.request(&request).await {
                // The place is kept for a while.
                Err(LeaseError::Request(_))
                    if request.lease.is_some() && Clock::now().since(answered_at) < ABSENT_AFTER =>
                {
                    sleep(REPEAT_AFTER_ERROR).await;
                    continue;
                }
                answer => answer?,
            };
            answered_at = Clock::now();
            match answer {
                LeaseAnswer::Granted(grant) => return Ok(grant),
                LeaseAnswer::Waiting { lease, position, expected_start_seconds, repeat_after_seconds } => {
                    request.lease = Some(lease);
                    on_place(QueuePlace { position, expected_start_seconds });
                    sleep(repeat_after(repeat_after_seconds)).await;
                }
                LeaseAnswer::Refused { reason, detail, retry_after_seconds } => {
                    let retry_after =
                        retry_after_seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                    let detail = detail.replace(char::is_control, " ");
                    return Err(LeaseError::Refused { host: self.host.clone(), reason, detail, retry_after });
                }
            }
        }
    }
}
