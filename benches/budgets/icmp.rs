//! What an echo costs towards hosts that answer ICMP: the loop alone, without an agent around it.
//!
//! On loopback the host that answers is this one, and does it within our system calls: its time is in the figure.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use pathmeter::datagram::{Duties, EVENTS, Event, Handle, NewPath, PathId, SourceChoice, StampNames};
use pathmeter::metrics::echo::EchoSeries;
use pathmeter_proto::dscp::Dscp;
use pathmeter_proto::echo::{Spec, Wire};

use super::agent::target;
use super::bare::per_echo;
use super::process::cpu_of;
use super::report::{Row, median};

const ROUNDS: usize = 3;
const ROUND: Duration = Duration::from_secs(4);
/// Until every path has sent.
const SETTLED: Duration = Duration::from_secs(3);
const COUNTS: [u32; 2] = [1_000, 10_000];

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    COUNTS.into_iter().map(row).collect()
}

fn row(count: u32) -> io::Result<Row> {
    let (sender, mut events) = tokio::sync::mpsc::channel(EVENTS);
    let prober = Handle::spawn("bench", Duties::default(), StampNames::detect(), sender)?;
    let series = Arc::new(EchoSeries::new("bench", "loopback", "ipv4", 1));
    for number in 0..count {
        prober.add(path(number, &series));
    }
    sleep(SETTLED);
    while let Ok(event) = events.try_recv() {
        if let Event::Failed { error, .. } = event {
            return Err(io::Error::other(error));
        }
    }
    let mut costs = Vec::new();
    for _ in 0..ROUNDS {
        let (cpu, answered) = (cpu_of(std::process::id())?, series.ok.get());
        sleep(ROUND);
        let answered = u32::try_from(series.ok.get() - answered).map_err(io::Error::other)?;
        costs.push(per_echo(cpu_of(std::process::id())? - cpu, answered.into()));
    }
    prober.stop(Duration::ZERO);
    while !prober.is_finished() {
        sleep(Duration::from_millis(1));
    }
    Ok(Row::new(format!("CPU per ICMP echo with the answer, {count} paths at 1/s"), median(costs), "µs"))
}

fn path(number: u32, series: &Arc<EchoSeries>) -> NewPath {
    NewPath {
        id: PathId(number.into()),
        spec: Spec {
            to: (target(number), 0).into(),
            wire: Wire::Icmp,
            interval: Duration::from_secs(1),
            ssids: vec![0],
            size: None,
            dscp: Dscp::default(),
            late_after: Duration::from_secs(1),
            lost_after: Duration::from_secs(3),
            transmit_stamps: true,
            count: None,
            seed: number.into(),
        },
        from: SourceChoice { address: Ipv4Addr::UNSPECIFIED.into(), port: 0, dont_fragment: false },
        series: Arc::clone(series),
        path_mtu: None,
        absent_since: None,
        tap: None,
    }
}
