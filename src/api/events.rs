//! The route `/api/v1/events`: a list, or a stream of server-sent events (WHATWG HTML section 9.2).

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use hyper::header::{ACCEPT, HeaderMap, HeaderName};
use serde_json::json;
use tokio::time::timeout;

use crate::event_log::{EventFeed, FeedItem};
use crate::http::server::Body;

/// The header with which a browser that reconnects says which event it received last.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Time without an event after which a comment is sent, so that proxies keep the connection.
const COMMENT_AFTER: Duration = Duration::from_secs(15);

/// The number after which events are requested; `None` if the request contains none. A header with the last
/// event counts more than the query, which stays the same when a browser reconnects.
///
/// # Errors
/// What is wrong with the query.
pub(super) fn requested_after(headers: &HeaderMap, query: Option<&str>) -> Result<Option<u64>, String> {
    let last = headers.get(LAST_EVENT_ID).and_then(|value| value.to_str().ok()?.parse().ok());
    let Some(query) = query else { return Ok(last) };
    let number = query.strip_prefix("after=").and_then(|number| number.parse().ok());
    let number = number.ok_or_else(|| {
        format!("query {query} is invalid; allowed: after=N, where N is the number of an event\n")
    })?;
    Ok(Some(last.unwrap_or(number)))
}

/// Whether the client asks for a stream.
pub(super) fn wants_stream(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let mut types = accepted.flat_map(|value| value.split(','));
    types.any(|one| one.split(';').next().is_some_and(|name| name.trim() == "text/event-stream"))
}

/// A body with the items of a feed until it ends.
pub(super) fn stream_of(feed: EventFeed) -> Body {
    let frames = stream::unfold(Some(feed), |feed| async {
        let mut feed = feed?;
        match timeout(COMMENT_AFTER, feed.next()).await {
            Ok(Some(item)) => Some((frame(block(&item)), Some(feed))),
            Ok(None) => None,
            Err(_) => Some((frame(":\n\n".to_owned()), Some(feed))),
        }
    });
    StreamBody::new(frames).boxed_unsync()
}

fn frame(text: String) -> Result<Frame<Bytes>, Infallible> {
    Ok(Frame::data(text.into()))
}

fn block(item: &FeedItem) -> String {
    match item {
        FeedItem::Event(event) => format!("id: {}\ndata: {}\n\n", event.number, json!(event)),
        FeedItem::Missed(count) => format!("data: {}\n\n", json!({"missed": count})),
    }
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn last_event_of_a_reconnecting_client_counts_more_than_the_query() {
        let mut headers = HeaderMap::new();
        let after = |headers: &HeaderMap, query| requested_after(headers, query).map_err(|_| ());
        assert_eq!(after(&headers, None), Ok(None));
        assert_eq!(after(&headers, Some("after=3")), Ok(Some(3)));
        for invalid in ["after=", "after=x", "since=3", "after=3&after=4", ""] {
            assert_eq!(after(&headers, Some(invalid)), Err(()), "{invalid}");
        }
        headers.insert(LAST_EVENT_ID, HeaderValue::from_static("7"));
        assert_eq!(after(&headers, Some("after=3")), Ok(Some(7)));
        assert_eq!(after(&headers, None), Ok(Some(7)));
        headers.insert(LAST_EVENT_ID, HeaderValue::from_static("seven"));
        assert_eq!(after(&headers, Some("after=3")), Ok(Some(3)));
    }

    #[test]
    fn stream_is_sent_only_on_request() {
        for (accept, expected) in [
            ("text/event-stream", true),
            ("text/html, text/event-stream;q=0.9", true),
            ("*/*", false),
            ("application/json", false),
        ] {
            let headers = [(ACCEPT, HeaderValue::from_static(accept))].into_iter().collect();
            assert_eq!(wants_stream(&headers), expected, "{accept}");
        }
        assert!(!wants_stream(&HeaderMap::new()));
    }
}
