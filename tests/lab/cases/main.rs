//! The real program on networks whose truth is known: what it exports is what the wires did.
//!
//! Each file in `scenarios/` is a trial; what takes more than a bad link is written here as code. It needs root or
//! unprivileged user namespaces, and says so where it has neither.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod agent;
mod equal_cost;
mod hostile;
mod lab_itself;
mod mesh;
mod path_mtu;
mod play;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use pathmeter_lab::script::Script;

/// Set, what cannot be run here is a failure.
const REQUIRED: &str = "PATHMETER_LAB_REQUIRED";
/// Set, the scenarios that take long are run too.
const LONG: &str = "PATHMETER_LAB_LONG";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // Before there is a second thread.
    let privilege = if arguments.list { None } else { Some(pathmeter_lab::enter()) };
    let mut is_skipped = false;
    if let Some(Err(reason)) = &privilege {
        eprintln!("skipped: the lab has no place here: {reason}");
        if std::env::var_os(REQUIRED).is_some() {
            return ExitCode::FAILURE;
        }
        is_skipped = true;
    }
    if std::env::var_os(lab_itself::VICTIM).is_some() {
        lab_itself::be_a_victim();
    }
    let trials = scenarios().into_iter().chain(others());
    let trials = trials.map(|trial| {
        let is_ignored = trial.has_ignored_flag();
        trial.with_ignored_flag(is_ignored || is_skipped)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

fn scenarios() -> Vec<Trial> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/scenarios");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let trial = |file: &std::path::PathBuf| {
        let text = fs::read_to_string(file).unwrap();
        let script = Script::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let is_long = script.long && std::env::var_os(LONG).is_none();
        Trial::test(name, move || {
            play::play(&script);
            Ok(())
        })
        .with_ignored_flag(is_long)
    };
    files.iter().map(trial).collect()
}

/// Trials that are code.
fn others() -> Vec<Trial> {
    let trial = |name: &str, play: fn()| {
        Trial::test(name, move || {
            play();
            Ok(())
        })
    };
    vec![
        trial("busy", hostile::busy),
        trial("stopped_prober", hostile::stopped_prober),
        trial("stopped_responder", hostile::stopped_responder),
        trial("full_queue_at_the_responder", hostile::full_queue_at_the_responder),
        trial("full_queue_at_the_prober", hostile::full_queue_at_the_prober),
        trial("wrong_clocks", hostile::wrong_clocks),
        trial("suspended", hostile::suspended),
        trial("planted", hostile::planted),
        trial("two_at_a_time", lab_itself::two_at_a_time),
        trial("unprivileged", lab_itself::unprivileged),
        trial("nothing_outlives_a_crash", lab_itself::nothing_outlives_a_crash),
        trial("a_black_hole_for_large_datagrams", path_mtu::black_hole),
        trial("a_router_that_says_too_big", path_mtu::router_that_speaks),
        trial("one_bad_uplink_in_a_mesh", mesh::one_bad_uplink),
        trial("one_way_of_four_is_lossy", equal_cost::one_way_of_four_is_lossy),
    ]
}
