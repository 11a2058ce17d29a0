//! Events to one client, from the upgrade to its closing.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Message, Utf8Bytes};

use super::client::{CLOSE_TIMEOUT, STALL_TIMEOUT};
use crate::event_log::{EventFeed, FeedItem};

/// A client that has neither sent nor received anything for this time is pinged, and disconnected if it is
/// silent for as long again.
const PING_AFTER: Duration = Duration::from_secs(30);

/// Largest message that a client may send; nothing but control frames is expected.
const RECEIVED_BYTES_MAX: usize = 1 << 10;

/// Sends every item of the feed as a text message until the feed or the client ends.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(stream: S, mut feed: EventFeed) {
    let config = WebSocketConfig::default()
        .read_buffer_size(RECEIVED_BYTES_MAX)
        .write_buffer_size(0)
        .max_message_size(Some(RECEIVED_BYTES_MAX))
        .max_frame_size(Some(RECEIVED_BYTES_MAX));
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    let mut is_ping_pending = false;
    let sent = loop {
        let message = tokio::select! {
            item = feed.next() => match item.as_ref().map(text) {
                Some(text) => Message::text(text),
                None => break socket.close(Some(GOING_AWAY)),
            },
            received = socket.next() => match received {
                Some(Ok(message)) if !message.is_close() => {
                    is_ping_pending = false;
                    // The library has queued the pong.
                    match timeout(STALL_TIMEOUT, socket.flush()).await {
                        Ok(Ok(())) => continue,
                        Ok(Err(_)) | Err(_) => return,
                    }
                }
                Some(Ok(_) | Err(_)) | None => break socket.close(None),
            },
            () = tokio::time::sleep(PING_AFTER) => {
                if std::mem::replace(&mut is_ping_pending, true) {
                    break socket.close(Some(IDLE));
                }
                Message::Ping(Bytes::new())
            }
        };
        match timeout(STALL_TIMEOUT, socket.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    };
    // The client may have gone.
    let _ = timeout(CLOSE_TIMEOUT, sent).await;
    let _ = timeout(CLOSE_TIMEOUT, async { while let Some(Ok(_)) = socket.next().await {} }).await;
}

const GOING_AWAY: CloseFrame =
    CloseFrame { code: CloseCode::Away, reason: Utf8Bytes::from_static("going away") };

const IDLE: CloseFrame = CloseFrame { code: CloseCode::Away, reason: Utf8Bytes::from_static("idle") };

fn text(item: &FeedItem) -> String {
    match item {
        FeedItem::Event(event) => json!(event).to_string(),
        FeedItem::Missed(count) => json!({"missed": count}).to_string(),
    }
}
