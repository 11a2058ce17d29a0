//! Which tools measure round trips correctly.

use std::collections::BTreeMap;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::CpuLoad;
use pathmeter_lab::exchange::{Exchange, Exchanges, RequestId};

use crate::commands::Commands;
use crate::host_pair::HostPair;
use crate::table::{NO_VALUE, mean, quantile, short, table};
use crate::tools::{ProbeRun, RequestRef, TIMED, ToolReport};

const INTERVAL: Duration = Duration::from_millis(3);
/// Time for the last replies.
const SETTLE_TIME: Duration = Duration::from_millis(1_200);
const BURNERS_PER_CORE: usize = 2;
/// With fewer samples p99.9 would be one of the largest four.
const SAMPLES_FOR_P999: usize = 5_000;

/// Measures on an idle host.
pub(crate) fn idle(span: Duration, commands: &mut Commands) -> io::Result<String> {
    measure(span, commands)
}

/// Measures on a host with busy loops.
pub(crate) fn loaded(span: Duration, commands: &mut Commands) -> io::Result<String> {
    let _burners = CpuLoad::per_core(BURNERS_PER_CORE);
    measure(span, commands)
}

/// Runs one tool after the other, because some would disturb the others.
fn measure(span: Duration, commands: &mut Commands) -> io::Result<String> {
    let run = ProbeRun { interval: INTERVAL, span };
    let mut rows = Vec::new();
    for tool in commands.present(&TIMED) {
        let mut pair = HostPair::new()?;
        pair.use_jittery_link();
        let tool = (tool.start)(&mut pair, run)?;
        sleep(span + SETTLE_TIME);
        let (name, protocol) = (tool.name(), tool.protocol());
        let report = tool.finish(&pair)?;
        commands.record(&pair);
        rows.push(row(name, &report, &pair.truth(protocol)));
    }
    let head =
        ["program", "round trips", "mean", "p50", "p99", "p99.9", "largest", "uncertainty of the truth, p99"];
    Ok(table(head, &rows))
}

/// Errors of a tool in microseconds.
fn row(name: &str, report: &ToolReport, truth: &Exchanges) -> [String; 8] {
    let truth = TruthIndex::of(truth);
    let pairs = report.round_trips.iter().filter_map(|timed| {
        let wire_time = truth.find(timed.of)?.round_trip()?;
        #[expect(clippy::cast_precision_loss, reason = "below a second")]
        Some(((timed.nanos - wire_time.nanos as f64) / 1e3, wire_time.uncertainty as f64 / 1e3))
    });
    let (errors, mut uncertainties): (Vec<f64>, Vec<f64>) = pairs.unzip();
    assert!(
        errors.len() * 100 >= report.round_trips.len() * 99 && !errors.is_empty(),
        "{name} reported {} round trips, of which the wire knows {}",
        report.round_trips.len(),
        errors.len()
    );
    let mut sizes: Vec<f64> = errors.iter().copied().map(f64::abs).collect();
    sizes.sort_by(f64::total_cmp);
    uncertainties.sort_by(f64::total_cmp);
    let size = |q| short(quantile(&sizes, q));
    [
        name.to_owned(),
        errors.len().to_string(),
        format!("{}{}", if mean(&errors) > 0.0 { "+" } else { "" }, short(mean(&errors))),
        size(0.5),
        size(0.99),
        if sizes.len() < SAMPLES_FOR_P999 { NO_VALUE.to_owned() } else { size(0.999) },
        size(1.0),
        short(quantile(&uncertainties, 0.99)),
    ]
}

/// Requests by the references that tools report.
struct TruthIndex<'a> {
    all: Vec<(&'a RequestId, &'a Exchange)>,
    by_sequence: BTreeMap<u32, &'a Exchange>,
}

impl<'a> TruthIndex<'a> {
    fn of(truth: &'a Exchanges) -> Self {
        let by_sequence = truth.iter().map(|(name, exchange)| (name.sequence, exchange)).collect();
        Self { all: truth.iter().collect(), by_sequence }
    }

    fn find(&self, which: RequestRef) -> Option<&'a Exchange> {
        match which {
            RequestRef::Sequence(sequence) => self.by_sequence.get(&sequence).copied(),
            RequestRef::Between(target, from, to) => {
                let matches = |(name, exchange): &&(&RequestId, &Exchange)| {
                    name.target == target && (from..=to).contains(&exchange.sent_at)
                };
                self.all.iter().find(matches).map(|(_, exchange)| *exchange)
            }
        }
    }
}
