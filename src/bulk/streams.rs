//! The data connections of a run over TCP.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::TcpCongestion};
use pathmeter_proto::wire::bandwidth::SenderStatistics;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::plan::EndpointPlan;
use super::transfer::{self, ByteCount};
use crate::stream::{delivered_bytes, read_tcp_info};

/// The data connections of one end, on which it sends or receives.
#[derive(Debug)]
pub(super) struct Streams {
    data: Vec<Arc<TcpStream>>,
    bytes: Arc<ByteCount>,
    transfers: JoinSet<io::Result<()>>,
    /// Bytes that had been delivered before the payload: the messages of the data connections.
    delivered_before: u64,
}

impl Streams {
    /// Begins to send or to receive.
    pub(super) fn new(data: Vec<TcpStream>, plan: &EndpointPlan) -> Self {
        let data: Vec<_> = data.into_iter().map(Arc::new).collect();
        // A receiver reads somewhat faster than the sender may send, so that it limits only one that sends
        // more.
        let rate_max = plan.rate_max.map(|rate| if plan.is_sender { rate } else { rate / 4 * 5 });
        let bytes = Arc::new(ByteCount::new(plan.bytes_max, rate_max));
        let delivered_before = data.iter().filter_map(|stream| delivered_bytes(&**stream)).sum();
        let mut transfers = JoinSet::new();
        for stream in &data {
            let (stream, bytes, is_sender) = (Arc::clone(stream), Arc::clone(&bytes), plan.is_sender);
            transfers.spawn(async move {
                match is_sender {
                    true => transfer::send(&stream, &bytes).await,
                    false => transfer::receive(&stream, &bytes).await,
                }
            });
        }
        Self { data, bytes, transfers, delivered_before }
    }

    /// Bytes that were passed to the kernel, or received from it.
    pub(super) fn done(&self) -> u64 {
        self.bytes.done()
    }

    /// Bytes that have arrived at the other end, over all connections.
    pub(super) fn delivered(&self) -> u64 {
        let all: u64 = self.data.iter().filter_map(|stream| delivered_bytes(&**stream)).sum();
        all.saturating_sub(self.delivered_before)
    }

    /// Waits until all connections have sent or received everything. Can be cancelled without loss.
    ///
    /// # Errors
    /// A connection has failed.
    pub(super) async fn ended(&mut self) -> io::Result<()> {
        let mut has_ended = false;
        while let Some(joined) = self.transfers.join_next().await {
            joined.map_err(io::Error::other)??;
            has_ended = true;
        }
        // Once is enough.
        if has_ended { Ok(()) } else { std::future::pending().await }
    }

    /// Sends no more, and ends the connections when the kernel has sent what it has.
    pub(super) async fn end_sending(&mut self) {
        self.transfers.shutdown().await;
        for stream in &self.data {
            // It may have ended already.
            let _ = SockRef::from(&**stream).shutdown(std::net::Shutdown::Write);
        }
    }

    /// Closes the connections. The kernel discards what it has not sent yet.
    pub(super) async fn reset(&mut self) {
        self.transfers.shutdown().await;
        for stream in self.data.drain(..) {
            // Without the option the kernel sends the rest.
            let _ = SockRef::from(&*stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// The statistics of the kernel, over all connections.
    pub(super) fn sender_statistics(&self) -> SenderStatistics {
        let mut sum = SenderStatistics::default();
        let (mut busy, mut window, mut buffer) = (0, 0, 0);
        for stream in &self.data {
            if sum.congestion_control.is_empty()
                && let Ok(name) = getsockopt(&stream.as_fd(), TcpCongestion)
            {
                sum.congestion_control = name.to_string_lossy().into_owned();
            }
            let Some(info) = read_tcp_info(&**stream) else { continue };
            let retransmits = u32::try_from(info.retransmits).unwrap_or(u32::MAX);
            sum.retransmits = sum.retransmits.saturating_add(retransmits);
            sum.bytes_retransmitted += info.bytes_retransmitted;
            busy += info.busy;
            window += info.window_limited;
            buffer += info.buffer_limited;
        }
        let mean_ms = |micros: u64| {
            let connections = u64::try_from(self.data.len()).unwrap_or(u64::MAX).max(1);
            u32::try_from(micros / connections / 1_000).unwrap_or(u32::MAX)
        };
        (sum.busy_ms, sum.window_limited_ms, sum.buffer_limited_ms) =
            (mean_ms(busy), mean_ms(window), mean_ms(buffer));
        sum
    }
}
