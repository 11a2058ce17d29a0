#!/usr/bin/env bash
# Installs the programs that the tests measure against, below target/peers, and prints where they are. Quick when they are
# there already.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.0.0
root="$PWD/target/peers"
program="$root/bin/stamp-suite"

if [ "$("$program" --version 2>/dev/null)" != "stamp-suite $version" ]; then
  cargo install stamp-suite --version "$version" --locked --root "$root" >&2
fi
echo "$program"
