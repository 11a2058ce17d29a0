#!/usr/bin/env bash
# Installs the package in a root of its own, tries it, removes and purges it, and looks what is left. Needs root and debootstrap.
set -euo pipefail
cd "$(dirname "$0")/.."

deb=$(ls target/debian/pathmeter_*.deb)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
debootstrap --variant=minbase --include=systemd,init-system-helpers,libsystemd0 "$suite" "$root" >"$root.log" 2>&1 ||
  { tail "$root.log" >&2; exit 1; }
rm -f "$root.log"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
cp "$deb" "$root/pathmeter.deb"

files() { (cd "$root" && find . -xdev ! -path './proc/*' ! -path './var/lib/dpkg/*' ! -path './var/log/*' | sort); }
in_root() { chroot "$root" "$@"; }

before=$(files)
in_root dpkg -i /pathmeter.deb >/dev/null
in_root pathmeter --version
in_root pathmeter check /etc/pathmeter/config.yaml
in_root getent passwd pathmeter
in_root test -L /etc/systemd/system/multi-user.target.wants/pathmeter.service
in_root dpkg -r pathmeter >/dev/null
[ -e "$root/etc/pathmeter/config.yaml" ] || { echo "error: removing took the configuration" >&2; exit 1; }
[ ! -e "$root/usr/bin/pathmeter" ] || { echo "error: removing left the program" >&2; exit 1; }
in_root dpkg -P pathmeter >/dev/null
# The user stays, and with it what the password files keep of their last state.
left=$(diff <(echo "$before") <(files) | grep '^[<>]' | grep -vE ' \./etc/(passwd|group|shadow|gshadow)-?$|\./etc/\.pwd\.lock$' || true)
[ -z "$left" ] || { echo "error: purging left a difference:" >&2; echo "$left" >&2; exit 1; }
echo "installed, tried, removed and purged: nothing is left"
