use std::net::{Ipv4Addr, SocketAddr};
use std::thread::sleep;

use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{EchoSpec, Quirks, WireFormat};

use super::super::SourceChoice;
use super::super::socket::{Binding, Socket};
use super::*;
use crate::echo::DatagramEcho;
use crate::loops::NewPath;
use crate::metrics::echo::EchoSeries;

const PATHS: u32 = 1_000;
const INTERVAL: Duration = Duration::from_millis(200);

/// A loop with `PATHS` paths to a socket that is not read.
fn loop_with_paths(to: SocketAddr, series: &Arc<EchoSeries>) -> DatagramLoop {
    let (sender, _) = tokio::sync::mpsc::channel(1);
    let wakeup = Arc::new(EventFd::new().unwrap());
    let timestamps = TimestampMatching::detect();
    let mut datagram_loop = DatagramLoop::new(Vec::new(), timestamps, wakeup, sender, Arc::default());
    for n in 0..PATHS {
        let spec = EchoSpec {
            to,
            wire: WireFormat::Stamp { keys: None, quirks: Quirks::default() },
            interval: INTERVAL,
            ssids: vec![0],
            size: None,
            dscp: Dscp::DEFAULT,
            late_after: Duration::from_secs(10),
            lost_after: Duration::from_secs(10),
            tx_timestamps: true,
            count: None,
            seed: n.into(),
        };
        let source = SourceChoice { address: Ipv4Addr::LOCALHOST.into(), port: 0, dont_fragment: false };
        let echo = DatagramEcho {
            spec,
            source,
            series: Arc::clone(series),
            path_mtu: None,
            reports: None,
            followed: Arc::default(),
        };
        let task = echo.into_task();
        datagram_loop.start(NewPath { id: PathId(n.into()), task, peer_left_at: None }).unwrap();
    }
    datagram_loop
}

#[test]
fn delayed_loop_reads_between_its_sends() {
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let binding = Binding { address, dont_fragment: false, errors: false, destinations: true };
    let unread = Socket::bind(&binding, TimestampMatching::detect()).unwrap();
    let series = Arc::new(EchoSeries::new("held", "up", "ipv4", 1));
    let mut datagram_loop = loop_with_paths(unread.address(), &series);
    let mut receive_batch = ReceiveBatch::new();
    // The first send of each path, at most 1.5 intervals after its start, is due by then: as many timers
    // fire.
    sleep(INTERVAL * 2);
    let mut turns = 0;
    while turns == 0 || datagram_loop.is_behind {
        let before = datagram_loop.traffic.sent;
        datagram_loop.run_turn(&mut receive_batch);
        let sent = datagram_loop.traffic.sent - before;
        assert!(sent <= 256, "{sent} sent in one turn");
        turns += 1;
    }
    assert!(turns >= 4, "{turns} turns for {PATHS} paths");
}
