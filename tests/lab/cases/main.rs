//! The real program on networks whose truth is known: what it exports is what the wires did.
//!
//! Each file in `scenarios/` is a trial. What takes more than bad links is an act, written here as code. It needs root or
//! unprivileged user namespaces, and says so where it has neither.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod agent;
mod discovery;
mod equal_cost;
mod hostile;
mod icmp;
mod lab_itself;
mod mesh;
mod path_mtu;
mod play;
mod streams;
mod watched;
mod websocket;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use pathmeter_lab::script::{Act, Script};

use crate::play::Inconclusive;

/// Set, what cannot be run here is a failure.
const REQUIRED: &str = "PATHMETER_LAB_REQUIRED";
/// Set, the scenarios that take an hour are run too.
const LONG: &str = "PATHMETER_LAB_LONG";
/// A scenario is played so often before it counts as one that can prove nothing.
const ATTEMPTS: usize = 3;
/// The exit code where there is no place for a lab: what automake calls skipped.
const NO_PLACE: u8 = 77;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before there is a second thread.
    let place = pathmeter_lab::enter();
    if let Err(reason) = &place {
        eprintln!("skipped: the lab has no place here: {reason}");
        if is_set(REQUIRED) {
            return NO_PLACE.into();
        }
    }
    if let Some(dir) = std::env::var_os(lab_itself::VICTIM) {
        lab_itself::be_a_victim(Path::new(&dir));
    }
    let trials =
        [scenarios(), promises(), names(), hosts(), streams(), fleets()].into_iter().flatten().map(|trial| {
            let is_ignored = trial.has_ignored_flag() || place.is_err();
            trial.with_ignored_flag(is_ignored)
        });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some()
}

fn scenarios() -> Vec<Trial> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/scenarios");
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| scenario(file)).collect()
}

fn scenario(file: &Path) -> Trial {
    let text = fs::read_to_string(file).unwrap();
    let script = Script::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let name = file.file_stem().unwrap().to_string_lossy().into_owned();
    let takes_too_long = script.long && !is_set(LONG);
    // Without the feature the program's clocks cannot be disturbed.
    let lacks_the_drill =
        matches!(script.act, Act::WrongClocks | Act::Suspend) && !cfg!(feature = "clock-faults");
    let act = act(script.act);
    played(&name, move || act(&script)).with_ignored_flag(takes_too_long || lacks_the_drill)
}

/// A trial that is played again while it proves nothing.
fn played(name: &str, play: impl Fn() -> Result<(), Inconclusive> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        for _ in 1..ATTEMPTS {
            match play() {
                Ok(()) => return Ok(()),
                Err(Inconclusive(why)) => eprintln!("to be played again, for it proves nothing: {why}"),
            }
        }
        play().map_err(|Inconclusive(why)| format!("{ATTEMPTS} plays proved nothing; the last: {why}").into())
    })
}

fn act(act: Act) -> fn(&Script) -> Result<(), Inconclusive> {
    match act {
        Act::Phases => play::phases,
        Act::Busy => hostile::busy,
        Act::StopProber => hostile::stopped_prober,
        Act::StopResponder => hostile::stopped_responder,
        Act::DrownProber => hostile::drowned_prober,
        Act::DrownResponder => hostile::drowned_responder,
        Act::WrongClocks => hostile::wrong_clocks,
        Act::Suspend => hostile::suspended,
        Act::Planted => hostile::planted,
        Act::OneBadWay => equal_cost::one_bad_way,
        Act::OneBadUplink => mesh::one_bad_uplink,
        Act::MtuBlackHole => path_mtu::black_hole,
        Act::MtuRouter => path_mtu::router,
    }
}

fn trial(name: &str, try_it: fn()) -> Trial {
    Trial::test(name, move || {
        try_it();
        Ok(())
    })
}

/// Hosts that answer ICMP, measured by the loop itself.
fn hosts() -> Vec<Trial> {
    vec![
        trial("icmp_timestamps", icmp::timestamps),
        trial("icmp_closed", icmp::closed),
        trial("icmp_thousand_hosts", icmp::thousand_hosts),
        trial("icmp_others", icmp::others),
        trial("icmp_flooded", icmp::flooded),
        trial("icmp_lossy", icmp::lossy),
        trial("icmp_refused", icmp::refused),
    ]
}

/// Echo over connections.
fn streams() -> Vec<Trial> {
    vec![
        played("tcp_lossy", streams::tcp_lossy),
        played("tcp_blackout", streams::tcp_blackout),
        played("tcp_given_up", streams::tcp_given_up),
        played("tcp_bottleneck", streams::tcp_bottleneck),
        played("websocket_lossy", streams::websocket_lossy),
        played("http_lossy", streams::http_lossy),
    ]
}

/// What Prometheus, our rules and our dashboards make of a fleet.
fn fleets() -> Vec<Trial> {
    let is_long = !is_set(LONG);
    vec![
        trial("hastened", watched::haste::times),
        played("watched", watched::fast),
        played("watched_for_an_hour", watched::live).with_ignored_flag(is_long),
    ]
}

/// Agents that find each other in the DNS.
fn names() -> Vec<Trial> {
    vec![
        trial("names_in_the_dns", discovery::dns),
        trial("services_in_the_dns", discovery::services),
        trial("one_family_in_the_dns", discovery::one_family),
    ]
}

/// What the lab promises of itself, and what takes a second host and no bad link.
fn promises() -> Vec<Trial> {
    vec![
        trial("two_at_a_time", lab_itself::two_at_a_time),
        trial("unprivileged", lab_itself::unprivileged),
        trial("nothing_outlives_a_crash", lab_itself::nothing_outlives_a_crash),
        trial("websocket_strangers", websocket::strangers),
    ]
}
