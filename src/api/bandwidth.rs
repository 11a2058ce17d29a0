//! Leases of bandwidth runs, and their stop.

use std::net::IpAddr;

use hyper::header::RETRY_AFTER;
use hyper::{Response, StatusCode};
use serde_json::json;

use super::response::{json, text};
use super::status::{SignatureStatus, Status};
use crate::bulk::{LeaseAnswer, LeaseRequest, Leases, RefusalReason};
use crate::http::server::Body;

/// Answers a request for a lease.
pub(super) fn lease(
    leases: &Leases,
    status: &Status,
    client: IpAddr,
    proof: &SignatureStatus,
    body: &[u8],
) -> Response<Body> {
    let access = status.answers(client, proof);
    let answer = match serde_json::from_slice::<LeaseRequest>(body) {
        _ if !access.answers => LeaseAnswer::Refused {
            reason: RefusalReason::NotAllowed,
            detail: access.reason.unwrap_or_default(),
            retry_after_seconds: None,
        },
        Ok(request) => leases.request(client, request),
        Err(error) => {
            return text(
                StatusCode::BAD_REQUEST,
                &format!("the body is not a request for a lease: {error}\n"),
            );
        }
    };
    let (code, retry_after) = match &answer {
        LeaseAnswer::Granted(_) => (StatusCode::OK, None),
        // The header has whole seconds, and the client must be faster.
        LeaseAnswer::Waiting { .. } => (StatusCode::ACCEPTED, None),
        LeaseAnswer::Refused { reason, retry_after_seconds, .. } => {
            (status_of(*reason), *retry_after_seconds)
        }
    };
    let mut response = json(&answer);
    *response.status_mut() = code;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let seconds = retry_after.map(|seconds| seconds.ceil() as u64);
    response.headers_mut().extend(seconds.map(|seconds| (RETRY_AFTER, seconds.into())));
    response
}

/// Stops all runs.
pub(super) fn stop(leases: &Leases, client: IpAddr, proof: &SignatureStatus) -> Response<Body> {
    if !client.is_loopback() && *proof != SignatureStatus::Valid {
        let reason = "runs are stopped only from loopback, or signed with the mesh key\n";
        return text(StatusCode::FORBIDDEN, reason);
    }
    json(&json!({"stopped": leases.stop_all()}))
}

const fn status_of(reason: RefusalReason) -> StatusCode {
    match reason {
        RefusalReason::NotAllowed | RefusalReason::Disabled => StatusCode::FORBIDDEN,
        RefusalReason::Invalid => StatusCode::BAD_REQUEST,
        RefusalReason::Budget | RefusalReason::QueueFull => StatusCode::TOO_MANY_REQUESTS,
        RefusalReason::Stopping
        | RefusalReason::Stopped
        | RefusalReason::QuietHours
        | RefusalReason::Other => StatusCode::SERVICE_UNAVAILABLE,
    }
}
