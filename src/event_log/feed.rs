//! Events as they happen, for clients that stay connected.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};

use pathmeter_proto::admission::rate_limit_key;
use tokio::sync::watch;

use super::{EventLog, FEEDS_MAX, FEEDS_PER_SOURCE_MAX, Latest, StoredEvent};

/// Reads the events of a log, those that are kept and then the new ones. A slow reader delays no other: it
/// misses the events that are no longer kept when it reads on.
#[derive(Debug)]
pub struct EventFeed {
    log: Arc<EventLog>,
    latest: watch::Receiver<Latest>,
    /// The number of the last event that was read.
    after: u64,
    unread: VecDeque<StoredEvent>,
    source: IpAddr,
}

/// The limit that prevents another feed, with its number of feeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedLimit {
    /// Of all clients.
    Total(usize),
    /// Of one source.
    Source(usize),
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
    /// A feed of the events with a number above `after`; `None`: of new ones only. `client` is who reads it.
    ///
    /// # Errors
    /// [`FeedLimit`], if there already are [`FEEDS_MAX`], or [`FEEDS_PER_SOURCE_MAX`] of the client.
    pub fn new(log: &Arc<EventLog>, after: Option<u64>, client: IpAddr) -> Result<Self, FeedLimit> {
        let source = rate_limit_key(client);
        let mut feeds = log.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if feeds.values().sum::<usize>() >= FEEDS_MAX {
            return Err(FeedLimit::Total(FEEDS_MAX));
        }
        let of_source = feeds.entry(source).or_default();
        if *of_source >= FEEDS_PER_SOURCE_MAX {
            return Err(FeedLimit::Source(FEEDS_PER_SOURCE_MAX));
        }
        *of_source += 1;
        drop(feeds);
        let latest = log.latest.subscribe();
        let newest = latest.borrow().number;
        // A higher number is from another run of the agent, whose numbers are not those of this one.
        let after = after.filter(|after| *after <= newest).unwrap_or(newest);
        Ok(Self { log: Arc::clone(log), latest, after, unread: VecDeque::new(), source })
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

impl Drop for EventFeed {
    fn drop(&mut self) {
        let mut feeds = self.log.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        let remaining = feeds.remove(&self.source).unwrap_or(1) - 1;
        if remaining > 0 {
            feeds.insert(self.source, remaining);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use serde::Serialize;

    use super::super::{EVENTS_MAX, EventType};
    use super::*;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

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
        let mut all = EventFeed::new(&log, Some(0), CLIENT).unwrap();
        let mut some = EventFeed::new(&log, Some(2), CLIENT).unwrap();
        let mut new = EventFeed::new(&log, None, CLIENT).unwrap();
        let mut of_another_run = EventFeed::new(&log, Some(99), CLIENT).unwrap();
        assert_eq!(read(&mut all), [1, 2, 3]);
        assert_eq!(read(&mut some), [3]);
        assert_eq!((read(&mut new), read(&mut of_another_run)), (vec![], vec![]));
        add(&log, 2);
        log.close();
        for feed in [&mut all, &mut some, &mut new, &mut of_another_run] {
            assert_eq!(read(feed), [4, 5, 0], "0: the end");
        }
        assert_eq!(read(&mut EventFeed::new(&log, Some(4), CLIENT).unwrap()), [5, 0]);
    }

    #[test]
    fn slow_reader_is_told_how_many_events_it_missed() {
        let log = Arc::new(EventLog::default());
        let mut feed = EventFeed::new(&log, None, CLIENT).unwrap();
        add(&log, EVENTS_MAX + 7);
        let found = read(&mut feed);
        assert_eq!((found[0], found[1], found.len()), (-7, 8, EVENTS_MAX + 1));
    }

    #[test]
    fn number_of_feeds_is_limited_in_total_and_by_source() {
        let log = Arc::new(EventLog::default());
        let open = |last: usize| EventFeed::new(&log, None, [10, 0, 0, u8::try_from(last).unwrap()].into());
        let mut feeds: Vec<EventFeed> = (0..FEEDS_PER_SOURCE_MAX).map(|_| open(1).unwrap()).collect();
        assert_eq!(open(1).unwrap_err(), FeedLimit::Source(FEEDS_PER_SOURCE_MAX));
        feeds.extend((FEEDS_PER_SOURCE_MAX..FEEDS_MAX).map(|last| open(last).unwrap()));
        assert_eq!(open(2).unwrap_err(), FeedLimit::Total(FEEDS_MAX));
        feeds.pop();
        assert_eq!(open(1).unwrap_err(), FeedLimit::Source(FEEDS_PER_SOURCE_MAX));
        assert!(open(2).is_ok());
        drop(feeds);
        assert!(log.feeds.lock().unwrap().is_empty());
    }
}
