//! Responses of the API.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::Value;

use crate::http::server::Body;

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A response with a body of one type.
pub(super) fn with_type(content_type: HeaderValue, body: Full<Bytes>) -> Response<Body> {
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// A response of plain text.
pub(super) fn text(status: StatusCode, text_body: &str) -> Response<Body> {
    let mut response = with_type(TEXT, Full::from(text_body.to_owned()));
    *response.status_mut() = status;
    response
}

/// A response of JSON.
pub(super) fn json(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => with_type(JSON, Full::from(body)),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

/// A response of JSON, or the problem of the request.
pub(super) fn json_or_problem(value: Result<Value, String>) -> Response<Body> {
    match value {
        Ok(value) => json(&value),
        Err(problem) => text(StatusCode::BAD_REQUEST, &problem),
    }
}
