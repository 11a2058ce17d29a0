//! Who measures round trips right.

use std::collections::BTreeMap;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use pathmeter_lab::Burners;
use pathmeter_lab::exchange::{Exchange, Exchanges, Name};

use crate::commands::Commands;
use crate::lane::Lane;
use crate::table::{NOTHING, mean, quantile, short, table};
use crate::tools::{Run, Said, TIMED, Which};

const INTERVAL: Duration = Duration::from_millis(3);
/// For the last replies.
const REST: Duration = Duration::from_millis(1_200);
const BURNERS_PER_CORE: usize = 2;
/// Of fewer values p99.9 would be one of the four largest.
const ENOUGH: usize = 5_000;

/// On a host that does nothing else.
pub(crate) fn idle(span: Duration, commands: &mut Commands) -> io::Result<String> {
    measure(span, commands)
}

/// On a host whose processors have other things to do.
pub(crate) fn loaded(span: Duration, commands: &mut Commands) -> io::Result<String> {
    let _burners = Burners::per_core(BURNERS_PER_CORE);
    measure(span, commands)
}

/// One program after the other: some of them would disturb the rest.
fn measure(span: Duration, commands: &mut Commands) -> io::Result<String> {
    let run = Run { interval: INTERVAL, span };
    let mut rows = Vec::new();
    for contender in commands.present(&TIMED) {
        let mut lane = Lane::new()?;
        lane.become_jittery();
        let asker = (contender.start)(&mut lane, run)?;
        sleep(span + REST);
        let (name, protocol) = (asker.name(), asker.protocol());
        let said = asker.finish(&lane)?;
        commands.note(&lane);
        rows.push(row(name, &said, &lane.truth(protocol)));
    }
    let head =
        ["program", "round trips", "mean", "p50", "p99", "p99.9", "largest", "the truth's own doubt, p99"];
    Ok(table(head, &rows))
}

/// Errors in microseconds.
fn row(name: &str, said: &Said, truth: &Exchanges) -> [String; 8] {
    let truth = Truth::of(truth);
    let pairs = said.round_trips.iter().filter_map(|timed| {
        let took = truth.find(timed.of)?.round_trip()?;
        #[expect(clippy::cast_precision_loss, reason = "below a second")]
        Some(((timed.nanos - took.nanos as f64) / 1e3, took.doubt as f64 / 1e3))
    });
    let (errors, mut doubts): (Vec<f64>, Vec<f64>) = pairs.unzip();
    assert!(
        errors.len() * 100 >= said.round_trips.len() * 99 && !errors.is_empty(),
        "{name} told {} round trips, and the wire knows {} of them",
        said.round_trips.len(),
        errors.len()
    );
    let mut sizes: Vec<f64> = errors.iter().copied().map(f64::abs).collect();
    sizes.sort_by(f64::total_cmp);
    doubts.sort_by(f64::total_cmp);
    let size = |q| short(quantile(&sizes, q));
    [
        name.to_owned(),
        errors.len().to_string(),
        format!("{}{}", if mean(&errors) > 0.0 { "+" } else { "" }, short(mean(&errors))),
        size(0.5),
        size(0.99),
        if sizes.len() < ENOUGH { NOTHING.to_owned() } else { size(0.999) },
        size(1.0),
        short(quantile(&doubts, 0.99)),
    ]
}

/// Requests by what a program may say of them.
struct Truth<'a> {
    all: Vec<(&'a Name, &'a Exchange)>,
    by_sequence: BTreeMap<u32, &'a Exchange>,
}

impl<'a> Truth<'a> {
    fn of(truth: &'a Exchanges) -> Self {
        let by_sequence = truth.iter().map(|(name, exchange)| (name.sequence, exchange)).collect();
        Self { all: truth.iter().collect(), by_sequence }
    }

    fn find(&self, which: Which) -> Option<&'a Exchange> {
        match which {
            Which::Sequence(sequence) => self.by_sequence.get(&sequence).copied(),
            Which::Between(target, from, to) => {
                let is_meant = |(name, exchange): &&(&Name, &Exchange)| {
                    name.target == target && (from..=to).contains(&exchange.left)
                };
                self.all.iter().find(is_meant).map(|(_, exchange)| *exchange)
            }
        }
    }
}
