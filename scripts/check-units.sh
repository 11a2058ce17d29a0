#!/usr/bin/env bash
# What systemd thinks of the units, as the package installs them.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp deploy/systemd/pathmeter.socket "$folder"
# The program need not be installed where this is checked.
sed 's,/usr/bin/pathmeter,/bin/true,' deploy/systemd/pathmeter.service > "$folder/pathmeter.service"
said=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$folder/pathmeter.service" "$folder/pathmeter.socket" 2>&1 |
  grep -F pathmeter || true)
[ -z "$said" ] || { echo "error: $said" >&2; exit 1; }
for drop_in in deploy/systemd/pathmeter.service.d/*.example; do
  mkdir -p "$folder/pathmeter.service.d"
  cp "$drop_in" "$folder/pathmeter.service.d/$(basename "$drop_in" .example)"
done
# Which of systemd 253 is known from then on.
said=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$folder/pathmeter.service" 2>&1 | grep -F pathmeter |
  grep -v notify-reload || true)
[ -z "$said" ] || { echo "error: $said" >&2; exit 1; }
echo "the units are in order"
