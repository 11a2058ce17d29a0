//! Delay growth of a load over simulated links.

use pathmeter_proto::load::delay_growth::DelayGrowth;
use pathmeter_proto::sim::{Jitter, Link, Packet, Queue, Random};
use pathmeter_proto::time::Timestamp;

/// The growth in milliseconds after `millis` of 1,228-byte packets at `percent` of the rate of a link.
fn growth(percent: u64, millis: u64, jitter: Jitter, seed: u64) -> i64 {
    let rate = 50_000_000;
    let mut link = Link::perfect(3_000_000);
    (link.queue, link.jitter) = (Some(Queue { rate, burst: 0, room: 1 << 20 }), jitter);
    let (mut random, mut found) = (Random::new(seed), DelayGrowth::default());
    let gap = 1_228 * 8 * 1_000_000_000 * 100 / (rate * percent);
    for number in 0..millis * 1_000_000 / gap {
        let sent_at = number * gap;
        let packet = Packet { bytes: 1_228, tos: 0, ttl: 64 };
        if let Ok([Some(delivery), _]) = link.pass(&mut random, sent_at, packet) {
            // The clock of the receiver is an hour ahead.
            found.add(sent_at, Timestamp::from_nanos(3_600_000_000_000 + delivery.at));
        }
    }
    found.growth().unwrap() / 1_000_000
}

#[test]
fn queue_grows_above_the_rate_of_a_link_only() {
    for seed in 0..30 {
        for jitter in [Jitter::None, Jitter::Uniform(4_000_000)] {
            assert_eq!(growth(95, 500, jitter, seed), 0, "{seed}");
            // Three quarters of 5 % of 500 ms.
            let above = growth(105, 500, jitter, seed);
            assert!((17..=20).contains(&above), "{seed}: {above}");
        }
    }
}
