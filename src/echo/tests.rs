//! Echo between two datagram loops of this process, on loopback.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use pathmeter_proto::admission::Policy;
use pathmeter_proto::echo::{EchoReport, EchoSpec, Quirks, Verdict, WireFormat};
use pathmeter_proto::machine::TimestampSource;

use super::{DatagramEcho, responder};
use crate::datagram::{self, Access, Binding, Socket, SourceChoice, TimestampMatching};
use crate::loops::{EVENTS_PENDING_MAX, NewPath};
use crate::metrics::echo::EchoSeries;
use crate::paths::PathId;

/// Measures a responder in this process over loopback, and returns the reports.
fn measure(timestamps: TimestampMatching) -> Vec<EchoReport> {
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let (sender, _events) = tokio::sync::mpsc::channel(EVENTS_PENDING_MAX);
    let address = (loopback, 0).into();
    let binding = Binding { address, dont_fragment: false, errors: true, destinations: true };
    let socket = Socket::bind(&binding, timestamps).unwrap();
    let to = socket.address();
    let policy = Policy { open: true, rate: 1_000_000, rate_per_source: 1_000_000, ..Policy::default() };
    let service = responder(vec![socket], Access { policy, keys: None }, 8, Arc::default(), Arc::default());
    let responder = datagram::spawn("responder", vec![service], timestamps, sender.clone()).unwrap();
    let prober = datagram::spawn("prober", Vec::new(), timestamps, sender).unwrap();
    let (report_sender, report_receiver) = channel();
    let echo = DatagramEcho {
        spec: EchoSpec {
            to,
            wire: WireFormat::Stamp { keys: None, quirks: Quirks::default() },
            interval: Duration::from_millis(5),
            ssids: vec![0; 4],
            size: None,
            dscp: pathmeter_proto::dscp::Dscp::DEFAULT,
            late_after: Duration::from_secs(10),
            lost_after: Duration::from_secs(10),
            tx_timestamps: true,
            count: Some(40),
            seed: 1,
        },
        source: SourceChoice { address: loopback, port: 0, dont_fragment: false },
        series: Arc::new(EchoSeries::new("once", "here", "ipv4", 4)),
        path_mtu: None,
        reports: Some(report_sender),
        followed: Arc::default(),
    };
    prober.start(NewPath { id: PathId(1), task: echo.into_task(), peer_left_at: None });
    // The loop drops its sender when the path has finished.
    let reports = report_receiver.iter().collect();
    prober.stop(Duration::ZERO);
    responder.stop(Duration::ZERO);
    reports
}

#[test]
fn transmit_timestamps_are_matched_by_id_and_by_looped_frame() {
    let mut matchings = vec![TimestampMatching::ByPayload];
    matchings.extend(Some(TimestampMatching::detect()).filter(|found| *found == TimestampMatching::ById));
    for timestamps in matchings {
        let reports = measure(timestamps);
        let mut answered = 0;
        for report in &reports {
            if let EchoReport::Decided { verdict, sample, .. } = report {
                assert_eq!(*verdict, Verdict::Ok, "{timestamps:?}");
                let by = sample.unwrap();
                assert_eq!(
                    (by.transmit, by.receive),
                    (TimestampSource::Kernel, TimestampSource::Kernel),
                    "{timestamps:?}"
                );
                answered += 1;
            }
        }
        let sent = reports.iter().filter(|report| matches!(report, EchoReport::Sent { .. })).count();
        assert!(answered > 0 && answered == sent, "{timestamps:?}: {answered} of {sent} were answered");
    }
}
