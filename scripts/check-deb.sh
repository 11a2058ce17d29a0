#!/usr/bin/env bash
# Installs a package in a minimal root, runs it, removes and purges it, and compares the files. Needs root and
# mmdebstrap.
#   check-deb.sh [PACKAGE]    default: the package of make deb
set -euo pipefail
cd "$(dirname "$0")/.."

deb=${1:-$(ls target/debian/pathmeter_*.deb)}
work=$(mktemp -d)
root=$work/root
trap 'rm -rf "$work"' EXIT
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
# Essential packages and the dependencies of the package only, so that a missing dependency is detected.
mmdebstrap --quiet --mode=root --variant=essential --include=systemd,init-system-helpers "$suite" "$root" \
  >"$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
# A policy that no service starts.
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
cp "$deb" "$root/pathmeter.deb"

fail() { echo "error: $*" >&2; exit 1; }
files() { (cd "$root" && find . -xdev ! -path './proc/*' ! -path './var/lib/dpkg/*' ! -path './var/log/*' -printf '%p %M\n' | sort); }
in_root() { chroot "$root" "$@"; }

before=$(files)
in_root dpkg -i /pathmeter.deb >/dev/null
[ "$(in_root dpkg-query -W -f '${db:Status-Abbrev}' pathmeter)" = 'ii ' ] || fail "the package is not installed"
in_root dpkg --verify pathmeter
in_root pathmeter --version
in_root pathmeter check /etc/pathmeter/config.yaml
in_root getent passwd pathmeter
in_root test -L /etc/systemd/system/multi-user.target.wants/pathmeter.service || fail "the unit is not enabled"
# The shipped configuration must run, as the user of the unit.
unshare --net --pid --fork --kill-child bash -c '
  ip link set lo up
  chroot --userspec=pathmeter:pathmeter "$1" pathmeter run 2>&1 &
  for _ in {1..50}; do
    chroot "$1" pathmeter healthcheck 2>/dev/null && exit
    sleep 0.2
  done
  exit 1' - "$root" >"$work/log" || { cat "$work/log" >&2; fail "the program does not run"; }

# An edited configuration must survive an upgrade and a removal.
echo '# edited' >> "$root/etc/pathmeter/config.yaml"
in_root dpkg -i /pathmeter.deb >/dev/null
in_root dpkg -r pathmeter >/dev/null
grep -q edited "$root/etc/pathmeter/config.yaml" || fail "an edited configuration was not kept"
[ ! -e "$root/usr/bin/pathmeter" ] || fail "removing left the program"
in_root dpkg -P pathmeter >/dev/null 2>"$work/log"
# The user stays, and so do the backups of the password files.
left=$(diff <(echo "$before") <(files) | grep '^[<>]' |
  grep -vE ' \./etc/(passwd|group|shadow|gshadow)-? |\./etc/\.pwd\.lock ' || true)
[ -z "$left" ] || fail "purging left a difference:"$'\n'"$left"
echo "installed, ran, removed and purged: only the user is left"
