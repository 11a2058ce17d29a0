//! Which tools count losses correctly.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::exchange::{Exchanges, OutcomeCounts};

use crate::commands::Commands;
use crate::exported;
use crate::host_pair::HostPair;
use crate::table::{or_no_value, table};
use crate::tools::{COUNTED, MeasuringTool, ProbeRun, ToolReport};

const INTERVAL: Duration = Duration::from_millis(10);
/// Before the loss, so that handshakes succeed.
const PERFECT_BEFORE: Duration = Duration::from_secs(2);
/// After the loss, until all tools have decided about lost requests.
const PERFECT_AFTER: Duration = Duration::from_secs(5);

/// Runs all tools at the same time, each in namespaces of its own: they do not see each other's datagrams,
/// and together they need a tenth of a core.
pub(crate) fn measure(lossy: Duration, commands: &mut Commands) -> io::Result<String> {
    let run = ProbeRun { interval: INTERVAL, span: PERFECT_BEFORE + lossy + PERFECT_AFTER };
    // Programs are dropped before their network.
    let mut pairs: Vec<(Box<dyn MeasuringTool>, HostPair)> = Vec::new();
    for tool in commands.present(&COUNTED) {
        let mut pair = HostPair::new()?;
        pairs.push(((tool.start)(&mut pair, run)?, pair));
    }
    sleep(PERFECT_BEFORE);
    pairs.iter().for_each(|(_, pair)| pair.use_lossy_link());
    sleep(lossy);
    pairs.iter().for_each(|(_, pair)| pair.use_perfect_link());
    sleep(PERFECT_AFTER);
    let (mut rows, mut shown) = (Vec::new(), Vec::new());
    for (tool, pair) in pairs {
        let (name, protocol) = (tool.name(), tool.protocol());
        let report = tool.finish(&pair)?;
        commands.record(&pair);
        let truth = pair.truth(protocol);
        let truth = report.until.map_or_else(|| truth.clone(), |end| truth.before(end));
        rows.push(row(name, &report, &truth));
        shown.extend(exported::row(name, &report, &truth));
    }
    let head = [
        "program",
        "sent",
        "lost",
        "reported",
        "error",
        "forward",
        "reported",
        "reverse",
        "reported",
        "duplicates",
        "reported",
        "reordered",
        "reported",
    ];
    Ok(table(head, &rows) + "\n" + &exported::table(&shown))
}

fn row(name: &str, report: &ToolReport, truth: &Exchanges) -> [String; 13] {
    let OutcomeCounts { sent, lost_forward, lost_reverse, ignored, duplicates, reordered } = truth.counts();
    // Not a fault of the network, but a missing reply for the tool.
    let name = match ignored {
        0 => name.to_owned(),
        ignored => format!("{name} ({ignored} more ignored by its responder)"),
    };
    let lost = lost_forward + lost_reverse;
    let error = i128::from(report.lost) - i128::from(lost);
    let direction = |index: usize| or_no_value(report.directions.map(|directions| directions[index]));
    [
        name,
        sent.to_string(),
        lost.to_string(),
        report.lost.to_string(),
        if error == 0 { "0".to_owned() } else { format!("**{error:+}**") },
        lost_forward.to_string(),
        direction(0),
        lost_reverse.to_string(),
        direction(1),
        duplicates.to_string(),
        or_no_value(report.duplicates),
        reordered.to_string(),
        or_no_value(report.reordered),
    ]
}
