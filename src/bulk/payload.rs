//! The payload of one end of a run: connections, or a load over UDP.

use std::io;

use pathmeter_proto::bandwidth::StopReason;
use pathmeter_proto::load::DATAGRAM_BYTES;
use pathmeter_proto::load::check::is_congested;
use pathmeter_proto::wire::bandwidth::SenderStatistics;

use super::load::{LoadFlow, ReceivedLoad};
use super::streams::Streams;

/// What one end sends or receives.
#[derive(Debug)]
pub(super) enum Payload {
    /// Over TCP connections.
    Streams(Streams),
    /// Over UDP.
    Load {
        /// The load.
        flow: LoadFlow,
        /// What this end has measured as its receiver; `None`: it is the sender, or the load has not ended.
        received: Option<ReceivedLoad>,
    },
}

impl Payload {
    pub(super) fn load(flow: LoadFlow) -> Self {
        Self::Load { flow, received: None }
    }

    pub(super) fn is_stream(&self) -> bool {
        matches!(self, Self::Streams(_))
    }

    /// Bytes that were sent or received by this end.
    pub(super) fn done(&self) -> u64 {
        match self {
            Self::Streams(streams) => streams.done(),
            Self::Load { flow, .. } => flow.bytes(),
        }
    }

    /// Bytes that count for the limits of the run: those of [`done`](Self::done), and duplicates.
    pub(super) fn used(&self) -> u64 {
        match self {
            Self::Streams(streams) => streams.done(),
            Self::Load { flow, .. } => flow.bytes_with_duplicates(),
        }
    }

    /// Bytes that have arrived at the other end, as far as this end knows; `None`: it does not know.
    pub(super) fn delivered(&self) -> Option<u64> {
        match self {
            Self::Streams(streams) => Some(streams.delivered()),
            Self::Load { .. } => None,
        }
    }

    /// Waits until everything was sent, or received over all connections, and returns why it ended. Can be
    /// cancelled without loss.
    pub(super) async fn ended(&mut self) -> io::Result<StopReason> {
        match self {
            Self::Streams(streams) => streams.ended().await.map(|()| StopReason::Bytes),
            Self::Load { flow, .. } => flow.ended().await,
        }
    }

    /// Sends no more. What was passed to the kernel is still sent.
    pub(super) async fn end_sending(&mut self) {
        match self {
            Self::Streams(streams) => streams.end_sending().await,
            // It ends by itself when its time is over.
            Self::Load { .. } => {}
        }
    }

    /// Ends everything at once.
    pub(super) async fn stop(&mut self) {
        match self {
            Self::Streams(streams) => streams.reset().await,
            Self::Load { flow, received } => {
                let ended = flow.stop().await;
                *received = received.or(ended);
            }
        }
    }

    /// Why the receiver of a load must end it: routers mark its datagrams, or this host drops them.
    pub(super) fn harm(&self) -> Option<StopReason> {
        let Self::Load { flow, .. } = self else { return None };
        let (marks, datagrams) = (flow.congestion_marks(), flow.bytes() / DATAGRAM_BYTES as u64);
        if is_congested(marks, datagrams) {
            return Some(StopReason::Congestion);
        }
        flow.has_dropped().then_some(StopReason::Host)
    }

    /// What this end has measured as the receiver of a load that has ended.
    pub(super) fn received(&self) -> Option<ReceivedLoad> {
        match self {
            Self::Streams(_) => None,
            Self::Load { received, .. } => *received,
        }
    }

    /// What the kernel of a sender has counted; zeros for a receiver and over UDP.
    pub(super) fn sender_statistics(&self, is_sender: bool) -> SenderStatistics {
        match self {
            Self::Streams(streams) if is_sender => streams.sender_statistics(),
            Self::Streams(_) | Self::Load { .. } => SenderStatistics::default(),
        }
    }
}
