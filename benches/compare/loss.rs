//! Who counts losses right.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::exchange::{Exchanges, Fates};

use crate::commands::Commands;
use crate::exported;
use crate::lane::Lane;
use crate::table::{or_nothing, table};
use crate::tools::{Asker, COUNTED, Run, Said};

const INTERVAL: Duration = Duration::from_millis(10);
/// Before the link becomes bad, so that handshakes succeed.
const CALM: Duration = Duration::from_secs(2);
/// Behind it, until everybody has given up what was lost.
const CALM_AGAIN: Duration = Duration::from_secs(5);

/// All at once, each in a pair of namespaces of its own: nobody sees another's datagrams, and a tenth of a core is enough
/// for all of them together.
pub(crate) fn measure(bad: Duration, commands: &mut Commands) -> io::Result<String> {
    let run = Run { interval: INTERVAL, span: CALM + bad + CALM_AGAIN };
    // Programs are dropped before the network that they are in.
    let mut lanes: Vec<(Box<dyn Asker>, Lane)> = Vec::new();
    for contender in commands.present(&COUNTED) {
        let mut lane = Lane::new()?;
        lanes.push(((contender.start)(&mut lane, run)?, lane));
    }
    sleep(CALM);
    lanes.iter().for_each(|(_, lane)| lane.become_lossy());
    sleep(bad);
    lanes.iter().for_each(|(_, lane)| lane.become_calm());
    sleep(CALM_AGAIN);
    let (mut rows, mut shown) = (Vec::new(), Vec::new());
    for (asker, lane) in lanes {
        let (name, protocol) = (asker.name(), asker.protocol());
        let said = asker.finish(&lane)?;
        commands.note(&lane);
        let truth = lane.truth(protocol);
        let truth = said.until.map_or_else(|| truth.clone(), |end| truth.before(end));
        rows.push(row(name, &said, &truth));
        shown.extend(exported::row(name, &said, &truth));
    }
    let head = [
        "program",
        "sent",
        "lost",
        "said",
        "error",
        "forward",
        "said",
        "reverse",
        "said",
        "duplicates",
        "said",
        "reordered",
        "said",
    ];
    Ok(table(head, &rows) + "\n" + &exported::table(&shown))
}

fn row(name: &str, said: &Said, truth: &Exchanges) -> [String; 13] {
    let Fates { sent, lost_forward, lost_reverse, ignored, duplicates, reordered } = truth.fates();
    // No fault of the network, but a reply that never came for who asked.
    let name = match ignored {
        0 => name.to_owned(),
        ignored => format!("{name} ({ignored} more ignored by its responder)"),
    };
    let lost = lost_forward + lost_reverse;
    let error = i128::from(said.lost) - i128::from(lost);
    let direction = |index: usize| or_nothing(said.directions.map(|directions| directions[index]));
    [
        name,
        sent.to_string(),
        lost.to_string(),
        said.lost.to_string(),
        if error == 0 { "0".to_owned() } else { format!("**{error:+}**") },
        lost_forward.to_string(),
        direction(0),
        lost_reverse.to_string(),
        direction(1),
        duplicates.to_string(),
        or_nothing(said.duplicates),
        reordered.to_string(),
        or_nothing(said.reordered),
    ]
}
