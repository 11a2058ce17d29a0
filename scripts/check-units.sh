#!/usr/bin/env bash
# Checks the systemd units as the package installs them.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp deploy/systemd/pathmeter.socket "$folder"
# The program need not be installed for this check.
sed 's,/usr/bin/pathmeter,/bin/true,' deploy/systemd/pathmeter.service > "$folder/pathmeter.service"
problems=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$folder/pathmeter.service" "$folder/pathmeter.socket" 2>&1 |
  grep -F pathmeter || true)
[ -z "$problems" ] || { echo "error: $problems" >&2; exit 1; }
for drop_in in deploy/systemd/pathmeter.service.d/*.example; do
  mkdir -p "$folder/pathmeter.service.d"
  cp "$drop_in" "$folder/pathmeter.service.d/$(basename "$drop_in" .example)"
done
# Type=notify-reload exists since systemd 253.
problems=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$folder/pathmeter.service" 2>&1 | grep -F pathmeter |
  grep -v notify-reload || true)
[ -z "$problems" ] || { echo "error: $problems" >&2; exit 1; }
echo "the units are valid"
