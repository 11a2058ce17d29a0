#!/usr/bin/env bash
# Runs tests and closes with the runner's summary: nextest where it is installed, cargo's own runner otherwise.
#   run-tests.sh          all of them; the lab's only where it has a place
#   run-tests.sh lab      the lab's, and it must have one
#   run-tests.sh lab-long the lab's that take an hour
set -euo pipefail
cd "$(dirname "$0")/.."

peers="$PWD/target/peers/stamp-suite/bin"
[ -x "$peers/stamp-suite" ] && export PATHMETER_STAMP_SUITE="$peers/stamp-suite"
# Python's websockets and Node's ws are found below target/peers by the tests themselves.

what=(--workspace) only=()
case "${1:-all}" in
  all) ;;
  lab) what=(--test lab); export PATHMETER_LAB_REQUIRED=1 ;;
  lab-long) what=(--test lab) only=(hour); export PATHMETER_LAB_REQUIRED=1 PATHMETER_LAB_LONG=1 ;;
  *) echo "error: $1 is no set of tests (all, lab, lab-long)" >&2; exit 2 ;;
esac

if command -v cargo-nextest >/dev/null; then
  exec cargo nextest run --locked --all-features --no-fail-fast "${what[@]}" "${only[@]}"
fi
if [ "${1:-all}" = all ]; then
  cargo test --locked --all-features --no-fail-fast --workspace --lib --bins --test it
fi
# One at a time: some of the lab's trials keep every core busy.
exec cargo test --locked --all-features --test lab -- "${only[@]}" --test-threads 1
