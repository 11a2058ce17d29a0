#!/usr/bin/env bash
# Runs a command unless it has succeeded before with the same files: for self-tests whose result depends on
# nothing else. Successes are recorded in ${XDG_CACHE_HOME:-~/.cache}/pathmeter/passed.
#   run-if-changed.sh FILE_OR_FOLDER… -- COMMAND…
set -euo pipefail
cd "$(dirname "$0")/.."

inputs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [ -e "$1" ] || { echo "error: run-if-changed.sh: $1 does not exist; correct the call in the Makefile" >&2; exit 2; }
  inputs+=("$1")
  shift
done
[ $# -gt 1 ] || { sed -n '2,4s/^# \?//p' "$0" >&2; exit 2; }
shift

passed="${XDG_CACHE_HOME:-$HOME/.cache}/pathmeter/passed"
# Names and contents: a renamed file is a change.
content=$(find "${inputs[@]}" -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum)
mark=$passed/$(printf '%s\n' "$*" "$content" | sha256sum | cut -c1-32)
if [ -e "$mark" ]; then
  echo "skipped, passed before with the same files: $*"
  exit
fi
"$@"
mkdir -p "$passed"
touch "$mark"
