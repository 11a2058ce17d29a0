#!/usr/bin/env bash
# Runs all tests and closes with the runner's summary: nextest where it is installed, cargo's own runner otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."

peers="$PWD/target/peers/bin"
[ -x "$peers/stamp-suite" ] && export PATHMETER_STAMP_SUITE="$peers/stamp-suite"

if command -v cargo-nextest >/dev/null; then
  cargo nextest run --locked --workspace --all-features --no-fail-fast
else
  cargo test --locked --workspace --all-features --no-fail-fast --lib --bins --tests
fi
