#!/usr/bin/env bash
# Runs tests and ends with the summary of the runner: nextest if installed, otherwise cargo's own runner.
#   run-tests.sh          all tests; the lab only where it can run
#   run-tests.sh lab      the lab; fails where it cannot run
#   run-tests.sh lab-long the trials of the lab that take ten minutes or an hour
set -euo pipefail
cd "$(dirname "$0")/.."

peers="$PWD/target/peers/stamp-suite/bin"
[ -x "$peers/stamp-suite" ] && export PATHMETER_STAMP_SUITE="$peers/stamp-suite"
# The tests themselves find Python's websockets and Node's ws in target/peers.

what=(--workspace) only=()
case "${1:-all}" in
  all) ;;
  lab) what=(--test lab); export PATHMETER_LAB_REQUIRED=1 ;;
  lab-long) what=(--test lab) only=(minutes hour); export PATHMETER_LAB_REQUIRED=1 PATHMETER_LAB_LONG=1 ;;
  *) echo "error: unknown set of tests $1 (use all, lab or lab-long)" >&2; exit 2 ;;
esac

if command -v cargo-nextest >/dev/null; then
  exec cargo nextest run --locked --all-features --no-fail-fast "${what[@]}" "${only[@]}"
fi
if [ "${1:-all}" = all ]; then
  cargo test --locked --all-features --no-fail-fast --workspace --lib --bins --test it
fi
# One at a time: some trials of the lab keep every core busy.
for name in "${only[@]:-}"; do
  cargo test --locked --all-features --test lab -- ${name:+"$name"} --test-threads 1
done
