//! Echo between two datagram loops of this process, on loopback.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::echo::{Quirks, Report, Spec, Verdict, Wire};
use pathmeter_proto::machine::StampedBy;

use super::{DatagramEcho, responder};
use crate::datagram::{self, Access, Binding, Socket, SourceChoice, StampNames};
use crate::loops::{EVENTS_PENDING_MAX, NewPath};
use crate::metrics::echo::EchoSeries;
use crate::paths::PathId;

/// What a prober learns of a responder in this process, on loopback.
fn measure(stamps: StampNames) -> Vec<Report> {
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let (sender, _events) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
    let binding = Binding { address: (loopback, 0).into(), dont_fragment: false, errors: false };
    let socket = Socket::bind(&binding, stamps).unwrap();
    let to = socket.address();
    let policy = Policy { open: true, rate: 1_000_000, rate_per_source: 1_000_000, ..Policy::default() };
    let service = responder(vec![socket], Access { policy, keys: None }, 8, Arc::default());
    let responder = datagram::spawn("responder", vec![service], stamps, sender.clone()).unwrap();
    let prober = datagram::spawn("prober", Vec::new(), stamps, sender).unwrap();
    let (tap, reports) = channel();
    let echo = DatagramEcho {
        spec: Spec {
            to,
            wire: Wire::Stamp { keys: None, quirks: Quirks::default() },
            interval: Duration::from_millis(5),
            ssids: vec![0; 4],
            size: None,
            dscp: pathmeter_proto::dscp::Dscp::DEFAULT,
            late_after: Duration::from_secs(10),
            lost_after: Duration::from_secs(10),
            transmit_stamps: true,
            count: Some(40),
            seed: 1,
        },
        source: SourceChoice { address: loopback, port: 0, dont_fragment: false },
        series: Arc::new(EchoSeries::new("once", "here", "ipv4", 4)),
        path_mtu: None,
        tap: Some(tap),
    };
    prober.start(NewPath { id: PathId(1), task: echo.into_task(), peer_left_at: None });
    // The loop drops its end when the path has finished.
    let learnt = reports.iter().collect();
    prober.stop(Duration::ZERO);
    responder.stop(Duration::ZERO);
    learnt
}

#[test]
fn transmit_stamps_find_their_datagrams_by_name_and_in_looped_frames() {
    let mut ways = vec![StampNames::Looped];
    ways.extend(Some(StampNames::detect()).filter(|found| *found == StampNames::Named));
    for stamps in ways {
        let learnt = measure(stamps);
        let mut answered = 0;
        for report in &learnt {
            if let Report::Decided { verdict, sample, .. } = report {
                assert_eq!(*verdict, Verdict::Ok, "{stamps:?}");
                let by = sample.unwrap();
                assert_eq!((by.transmit, by.receive), (StampedBy::Kernel, StampedBy::Kernel), "{stamps:?}");
                answered += 1;
            }
        }
        let sent = learnt.iter().filter(|report| matches!(report, Report::Sent { .. })).count();
        assert!(answered > 0 && answered == sent, "{stamps:?}: {answered} of {sent} were answered");
    }
}
