//! Events as they happen, for clients that stay connected.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{EventLog, Latest, StoredEvent};

/// Reads the events of a log, those that are kept and then the new ones. A slow reader delays nobody: it
/// misses the events that are no longer kept when it reads on.
#[derive(Debug)]
pub struct EventFeed {
    log: Arc<EventLog>,
    latest: watch::Receiver<Latest>,
    /// The number of the last event that was read.
    after: u64,
    unread: VecDeque<StoredEvent>,
    _permit: OwnedSemaphorePermit,
}

/// What a feed reads.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedItem {
    /// An event.
    Event(StoredEvent),
    /// So many events before the next one are no longer kept.
    Missed(u64),
}

impl EventFeed {
    /// A feed of the events with a number above `after`; `None`: of new ones only. Returns `None` if there
    /// already are [`FEEDS_MAX`](super::FEEDS_MAX).
    pub fn new(log: &Arc<EventLog>, after: Option<u64>) -> Option<Self> {
        let permit = Arc::clone(&log.feeds).try_acquire_owned().ok()?;
        let latest = log.latest.subscribe();
        let newest = latest.borrow().number;
        // A higher number is from another run of the agent, whose numbers are not those of this one.
        let after = after.filter(|after| *after <= newest).unwrap_or(newest);
        Some(Self { log: Arc::clone(log), latest, after, unread: VecDeque::new(), _permit: permit })
    }

    /// Waits for the next item; `None` when the log is closed. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Option<FeedItem> {
        while self.unread.is_empty() {
            let after = self.after;
            let is_next = |latest: &Latest| latest.number > after || latest.is_closed;
            let latest = *self.latest.wait_for(is_next).await.ok()?;
            if latest.number == after {
                return None;
            }
            self.unread.extend(self.log.after(after));
        }
        let number = self.unread.front()?.number;
        let missed = number - 1 - self.after;
        if missed > 0 {
            self.after = number - 1;
            return Some(FeedItem::Missed(missed));
        }
        self.after = number;
        self.unread.pop_front().map(FeedItem::Event)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use serde::Serialize;

    use super::super::{EVENTS_MAX, EventType, FEEDS_MAX};
    use super::*;

    #[derive(Serialize)]
    struct Sampled {}

    impl EventType for Sampled {
        const NAME: &'static str = "sampled";
    }

    fn add(log: &EventLog, count: usize) {
        (0..count).for_each(|_| log.add(&Sampled {}));
    }

    /// What can be read without waiting: numbers of events, and negative ones for missed events.
    fn read(feed: &mut EventFeed) -> Vec<i64> {
        let mut found = Vec::new();
        while let Some(item) = feed.next().now_or_never() {
            found.push(match item {
                Some(FeedItem::Event(event)) => i64::try_from(event.number).unwrap(),
                Some(FeedItem::Missed(count)) => -i64::try_from(count).unwrap(),
                None => return [found, vec![0]].concat(),
            });
        }
        found
    }

    #[test]
    fn feed_reads_each_event_once_and_ends_with_the_log() {
        let log = Arc::new(EventLog::default());
        add(&log, 3);
        let mut all = EventFeed::new(&log, Some(0)).unwrap();
        let mut some = EventFeed::new(&log, Some(2)).unwrap();
        let mut new = EventFeed::new(&log, None).unwrap();
        let mut of_another_run = EventFeed::new(&log, Some(99)).unwrap();
        assert_eq!(read(&mut all), [1, 2, 3]);
        assert_eq!(read(&mut some), [3]);
        assert_eq!((read(&mut new), read(&mut of_another_run)), (vec![], vec![]));
        add(&log, 2);
        log.close();
        for feed in [&mut all, &mut some, &mut new, &mut of_another_run] {
            assert_eq!(read(feed), [4, 5, 0], "0: the end");
        }
        assert_eq!(read(&mut EventFeed::new(&log, Some(4)).unwrap()), [5, 0]);
    }

    #[test]
    fn slow_reader_is_told_how_many_events_it_missed() {
        let log = Arc::new(EventLog::default());
        let mut feed = EventFeed::new(&log, None).unwrap();
        add(&log, EVENTS_MAX + 7);
        let found = read(&mut feed);
        assert_eq!((found[0], found[1], found.len()), (-7, 8, EVENTS_MAX + 1));
    }

    #[test]
    fn number_of_feeds_is_limited() {
        let log = Arc::new(EventLog::default());
        let mut feeds: Vec<EventFeed> = (0..FEEDS_MAX).filter_map(|_| EventFeed::new(&log, None)).collect();
        assert_eq!(feeds.len(), FEEDS_MAX);
        assert!(EventFeed::new(&log, None).is_none());
        feeds.pop();
        assert!(EventFeed::new(&log, None).is_some());
    }
}
