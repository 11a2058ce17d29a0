//! Programs that trace a route once, and their arguments.

use std::path::Path;

use super::{package, version_of};

/// A program, and the arguments before the target.
#[derive(Clone, Copy)]
pub(crate) struct Traceroute {
    pub(crate) program: &'static str,
    pub(crate) arguments: &'static [&'static str],
}

pub(crate) const TRACEROUTE: &str = "traceroute";
pub(crate) const MTR: &str = "mtr";
pub(crate) const SCAMPER: &str = "scamper";
pub(crate) const TRIPPY: &str = "trip";
pub(crate) const FTR: &str = "ftr";

/// Without names of routers, because the lab has no DNS server.
pub(crate) const TRACEROUTES: [Traceroute; 8] = [
    Traceroute { program: TRACEROUTE, arguments: &["-n"] },
    Traceroute { program: TRACEROUTE, arguments: &["-n", "-q1", "-N32", "-w1"] },
    Traceroute { program: MTR, arguments: &["-n", "-r", "-c1"] },
    Traceroute { program: MTR, arguments: &["-n", "-r", "-c1", "-G1", "-Z1"] },
    Traceroute { program: SCAMPER, arguments: &["-i"] },
    Traceroute { program: TRIPPY, arguments: &["-m", "csv", "-C", "1"] },
    Traceroute {
        program: TRIPPY,
        arguments: &["-m", "csv", "-C", "1", "-i", "100ms", "-T", "300ms", "-g", "20ms"],
    },
    Traceroute { program: FTR, arguments: &["--json", "--no-enrich", "--no-rdns"] },
];

/// The crates of programs from crates.io.
const CRATES: [(&str, &str); 2] = [(TRIPPY, "trippy"), (FTR, "ftr")];

/// Where the program is: in `PATH`, or where `scripts/install-test-peers.sh` installs it.
pub(crate) fn path(program: &str) -> String {
    let Some((_, crate_name)) = CRATES.iter().find(|(name, _)| *name == program) else {
        return program.to_owned();
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers");
    root.join(crate_name).join("bin").join(program).display().to_string()
}

/// The programs with their versions.
pub(crate) fn versions() -> impl Iterator<Item = (&'static str, Option<String>)> {
    let packages = [(TRACEROUTE, "traceroute"), (MTR, "mtr-tiny"), (SCAMPER, "scamper")];
    let from_crates_io = CRATES.into_iter().map(|(program, crate_name)| {
        let version = version_of(&path(program));
        (program, version.map(|version| format!("{version} ({crate_name} of crates.io)")))
    });
    packages.map(|(program, name)| (program, package(name))).into_iter().chain(from_crates_io)
}
