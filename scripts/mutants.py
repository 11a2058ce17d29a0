#!/usr/bin/env python3
"""Mutation tests: changes the code that decides verdicts in one place at a time, and runs the tests of proto.

  mutants.py                      all files listed below: hours on two cores
  mutants.py FILE...              the mutants of these files or globs, such as proto/src/echo/flow/mod.rs
  mutants.py --shard 3/20 [FILE]  the fourth of twenty parts

Each mutant is tested by the unit tests, those that they miss by the simulations with a tenth of their seeds, and those
that these miss with all seeds. What .cargo/mutants.toml excludes is not counted. Fails below 95 %.
"""

import argparse
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

VERSION = "27.1.0"
FILES = ["admission.rs", "probe_budget.rs", "schedule.rs", "echo/**", "mtu/**", "stats/**", "trace/**", "wire/**"]
WANTED = 0.95
# A mutant in an endless loop may allocate memory without limit.
MEMORY_MAX = 8 << 30
ROOT = pathlib.Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "target" / "mutants-found"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pathmeter"
PASSES = [
    ("unit tests", ["--lib"], "0.1"),
    ("simulations, a tenth", ["--test", "it"], "0.1"),
    ("simulations, all", ["--test", "it"], "1"),
]


def command():
    """The environment for cargo, with the required version of cargo-mutants first in PATH."""
    own = CACHE / "mutants" / VERSION
    path = f"{own / 'bin'}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(["cargo", "mutants", "--version"], capture_output=True, text=True, env={**os.environ, "PATH": path})
    if found.stdout.split() != ["cargo-mutants", VERSION]:
        crate = f"cargo-mutants@{VERSION}"
        subprocess.run(["cargo", "install", "--locked", "--root", own, crate], check=True)
    return {**os.environ, "PATH": path, "RUST_BACKTRACE": "0"}


def selection(files):
    return [argument for file in files for argument in ("--file", file)]


def run(number, arguments, environment):
    """Runs one pass over the selected mutants; returns their outcomes by name."""
    title, tests, times = PASSES[number]
    print(f"== {title}", flush=True)
    output = OUTPUT / str(number)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    tests = [f"--cargo-test-arg={argument}" for argument in tests]
    call = ["cargo", "mutants", "--package", "pathmeter-proto", "--colors", "never", "--output", output]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    done = subprocess.run(
        [*call, *tests, *arguments], cwd=ROOT, env={**environment, "SIM_TIMES": times}, preexec_fn=limit
    )
    # 2: some were missed, 3: some took too long.
    if done.returncode not in (0, 2, 3):
        sys.exit(f"error: cargo mutants failed with {done.returncode}; see {output}/mutants.out")
    outcomes = {}
    for kind in ("caught", "missed", "timeout", "unviable"):
        for name in (output / "mutants.out" / f"{kind}.txt").read_text().splitlines():
            outcomes[name] = kind
    return outcomes


def table(outcomes):
    """Prints the counts per directory; returns the detected share of viable mutants."""
    counts = {}
    for name, kind in outcomes.items():
        path = pathlib.PurePath(name.split(":", 1)[0])
        place = str(path if path.parent.name == "src" else path.parent)
        for row in (place, "together"):
            counts.setdefault(row, dict.fromkeys(("caught", "timeout", "missed", "unviable"), 0))[kind] += 1
    print(f"{'':24}{'mutants':>10}{'unviable':>10}{'detected':>10}{'missed':>10}{'rate':>10}")
    share = 1.0
    for place in sorted(counts, key=lambda row: (row == "together", row)):
        found = counts[place]
        # A mutant that makes a test run forever is detected.
        noticed = found["caught"] + found["timeout"]
        viable = noticed + found["missed"]
        share = noticed / viable if viable else 1.0
        print(
            f"{place:24}{sum(found.values()):10}{found['unviable']:10}{noticed:10}{found['missed']:10}{share:10.1%}"
        )
    return share


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", default=[f"proto/src/{file}" for file in FILES])
    parser.add_argument("--shard", metavar="K/N")
    options = parser.parse_args()
    environment = command()
    files = selection(options.files)
    outcomes = run(0, [*files, *(["--shard", options.shard] if options.shard else [])], environment)
    for number in range(1, len(PASSES)):
        missed = [name for name, kind in outcomes.items() if kind == "missed"]
        if not missed:
            break
        names = [argument for name in missed for argument in ("--re", f"^{re.escape(name)}$")]
        found = run(number, [*files, *names], environment)
        # Patterns for names may match deleted fields as well: only mutants that were missed count.
        outcomes.update((name, kind) for name, kind in found.items() if outcomes.get(name) == "missed")
    share = table(outcomes)
    for name, kind in sorted(outcomes.items()):
        if kind == "missed":
            print(f"missed: {name}")
    if share < WANTED:
        sys.exit(f"error: {share:.1%} detected, {WANTED:.0%} required")


if __name__ == "__main__":
    main()
