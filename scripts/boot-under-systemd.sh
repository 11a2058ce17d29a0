#!/usr/bin/env bash
# Boots Debian with its systemd in a container (systemd-nspawn), installs the package there, and tests what
# needs a running systemd: the scripts of the package, notify, reload, key rotation, socket activation,
# watchdog, stop.
#   boot-under-systemd.sh [SUITE [PROGRAM]]    default: the suite of this host, target/release/pathmeter
# Since Debian 13 (trixie) systemd has Type=notify-reload, and the package uses it. Needs root, mmdebstrap and
# systemd-container.
set -euo pipefail

on_the_host() {
  cd "$(dirname "$0")/.."
  local suite=${1:-$(. /etc/os-release && echo "$VERSION_CODENAME")} program=${2:-target/release/pathmeter}
  work=$(mktemp -d)
  root=$work/root
  trap 'rm -rf "$work"' EXIT
  mmdebstrap --quiet --mode=root --variant=essential --include=systemd,init-system-helpers "$suite" "$root" \
    >"$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
  local systemd
  systemd=$(chroot "$root" systemctl --version | awk 'NR == 1 { print $2 }')
  OUT=$work SYSTEMD_VERSION=$systemd ./scripts/build-deb.sh "$program" >/dev/null
  mv "$work"/pathmeter_*.deb "$root/pathmeter.deb"
  cp "$0" "$root/trial"
  cat > "$root/etc/systemd/system/trial.service" <<'END'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/trial inside
ExecStopPost=/usr/bin/systemctl poweroff --force
StandardOutput=file:/trial.log
StandardError=file:/trial.err
END
  mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
  ln -s ../trial.service "$root/etc/systemd/system/multi-user.target.wants/trial.service"
  echo "$suite with systemd $systemd"
  # Do not register the container: this host may not run systemd. The container uses unified cgroups.
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 timeout 600 systemd-nspawn --quiet --register=no --keep-unit --private-network --boot \
    --directory "$root" >"$work/console" 2>&1 </dev/null || true
  [ -e "$root/trial.log" ] || { tail -n 30 "$work/console" >&2; echo "error: the container did not boot" >&2; exit 1; }
  cat "$root/trial.log"
  if grep -q '^FAILED' "$root/trial.log" || ! grep -q '^all was tried$' "$root/trial.log"; then
    cat "$root/trial.err" >&2
    exit 1
  fi
}

unit=pathmeter.service

ok() { echo "ok      $*"; }
fail() {
  echo "FAILED  $*"
  journalctl --no-pager -n 15 -o cat -u $unit -u pathmeter.socket | sed 's/^/        | /'
}
# check WORDS -- COMMAND: that a command succeeds
check() {
  local words=()
  while [ "$1" != -- ]; do words+=("$1"); shift; done
  shift
  if "$@"; then ok "${words[*]}"; else fail "${words[*]}: $*"; fi
}
property() { systemctl show --value -p "$1" "${2:-$unit}"; }
# is PROPERTY VALUE: that a property of the service has this value
is() {
  local value
  value=$(property "$1")
  if [ "$value" = "$2" ]; then ok "$1=$value"; else fail "$1=$value, and not $2"; fi
}
# eventually COMMAND: that it succeeds within 20 s
eventually() {
  for _ in {1..100}; do
    "$@" && return
    sleep 0.2
  done
  return 1
}
is_state() { [ "$(property ActiveState)" = "$1" ]; }
logged() { journalctl --sync; journalctl --no-pager -o cat -u $unit --after-cursor="$mark" | grep -qF -e "$1"; }
not_logged() { ! logged "$1"; }
# Log messages count from here on.
mark_log() { journalctl --sync; mark=$(journalctl -n 1 --show-cursor --no-pager | sed -n 's/^-- cursor: //p'); }
# ask ADDRESS PATH: the response of the HTTP port
ask() {
  exec 5<>"/dev/tcp/$1/9862" || return
  printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&5
  cat <&5
  exec 5<&- 5>&-
}
serves() { ask "$1" /metrics 2>/dev/null | grep -q '^pathmeter_build_info'; }
metric() { ask 127.0.0.1 /metrics 2>/dev/null | sed -n "s/^$1 //p"; }
configure() { cat > /etc/pathmeter/config.yaml; }

inside() {
  local pid starts served cut refused
  # A failed check is reported, and the rest still runs.
  set +e
  export TERM=dumb
  mark_log

  echo "--- install"
  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
  chmod +x /usr/sbin/policy-rc.d
  dpkg -i /pathmeter.deb >&2
  is UnitFileState enabled
  is ActiveState inactive
  rm /usr/sbin/policy-rc.d
  dpkg -P pathmeter >&2
  dpkg -i /pathmeter.deb >&2
  is UnitFileState enabled
  is ActiveState active
  is SubState running
  if [ "$(systemctl --version | awk 'NR == 1 { print $2 }')" -ge 253 ]; then is Type notify-reload; else is Type notify; fi
  is NRestarts 0
  is User pathmeter
  check "status text: $(property StatusText)" -- eventually has_status
  check "the agent serves" -- eventually serves 127.0.0.1
  check "the sandbox forbids nothing that the agent needs" -- not_logged "cannot raise the limit"

  echo "--- sandbox"
  pid=$(property MainPID)
  check "no capability" -- grep -q '^CapEff:.0000000000000000$' "/proc/$pid/status"
  check "no new privileges" -- grep -q '^NoNewPrivs:.1$' "/proc/$pid/status"
  check "system calls are filtered" -- grep -q '^Seccomp:.2$' "/proc/$pid/status"
  check "the limit of open files is that of the unit" -- grep -q '^Max open files  *16384  *16384' "/proc/$pid/limits"

  echo "--- reload, and a key that is rotated"
  (umask 027 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > /etc/pathmeter/mesh.key)
  chgrp pathmeter /etc/pathmeter/mesh.key
  configure <<'END'
key_file: /etc/pathmeter/mesh.key
agent: {grace: 5s}
targets: [{name: silent, address: 127.0.0.1, port: 9}, {name: self, address: 127.0.0.1}]
probes: [{name: fast, targets: [silent], interval: 100ms}, {name: ping, protocol: icmp, targets: [self], interval: 100ms}]
END
  mark_log
  check "a new configuration is accepted" -- systemctl reload $unit
  # Before systemd 253 systemctl does not wait for the reload.
  [ "$(property Type)" != notify-reload ] || check "it is in force when systemctl returns" -- logged "configuration reloaded"
  check "the new configuration is applied" -- eventually logged "configuration reloaded"
  check "the key is readable: $(stat -c '%A %U:%G' /etc/pathmeter/mesh.key)" -- [ "$(metric pathmeter_config_last_reload_successful)" = 1 ]
  mark_log
  echo "the key of next year" > /etc/pathmeter/mesh.key
  systemctl reload $unit
  check "a rotated key is accepted" -- eventually logged "configuration reloaded"
  mark_log
  chmod 0600 /etc/pathmeter/mesh.key
  systemctl reload $unit || true
  check "a key readable only by root is refused" -- eventually logged "Permission denied"
  is ActiveState active
  check "the previous configuration stays in force" -- [ "$(metric pathmeter_config_last_reload_successful)" = 0 ]
  chmod 0640 /etc/pathmeter/mesh.key
  systemctl reload $unit
  is MainPID "$pid"
  is NRestarts 0

  echo "--- icmp"
  # An empty group range.
  echo '1 0' > /proc/sys/net/ipv4/ping_group_range
  mkdir -p /etc/systemd/system/$unit.d
  cp /usr/share/doc/pathmeter/examples/$unit.d/icmp.conf.example /etc/systemd/system/$unit.d/icmp.conf
  systemctl restart $unit
  check "without CAP_NET_RAW there is no ping socket" -- logged "a path is not measured"
  mark_log
  systemctl daemon-reload
  systemctl restart $unit
  check "with CAP_NET_RAW there is one" -- eventually pings
  check "CAP_NET_RAW is the only capability" -- grep -q '^CapEff:.0000000000002000$' "/proc/$(property MainPID)/status"
  check "no warning" -- not_logged "a path is not measured"
  rm /etc/systemd/system/$unit.d/icmp.conf
  systemctl daemon-reload

  echo "--- watchdog"
  printf '[Service]\nWatchdogSec=2s\n' > /etc/systemd/system/$unit.d/watchdog.conf
  systemctl daemon-reload
  systemctl restart $unit
  pid=$(property MainPID)
  mark_log
  sleep 6
  is NRestarts 0
  is MainPID "$pid"
  kill -STOP "$pid"
  check "a stalled agent is restarted" -- eventually restarted 1
  check "the watchdog restarted it" -- logged "Watchdog timeout"
  is NRestarts 1
  check "the agent serves again" -- eventually serves 127.0.0.1
  rm /etc/systemd/system/$unit.d/watchdog.conf
  systemctl daemon-reload
  systemctl restart $unit
  kill -KILL "$(property MainPID)"
  check "a killed agent is restarted" -- eventually restarted 1
  check "the agent serves again" -- eventually serves 127.0.0.1

  echo "--- stop"
  local begin end
  sleep 2
  mark_log
  begin=$(date +%s%N)
  systemctl stop $unit
  end=$(date +%s%N)
  check "stopped within the grace period and a margin: $(((end - begin) / 1000000)) ms" -- [ $(((end - begin) / 1000000)) -lt 12000 ]
  is Result success
  is ExecMainStatus 0
  check "the stop is logged" -- logged "stopped"

  echo "--- socket activation"
  systemctl enable --now pathmeter.socket >&2
  is ActiveState inactive
  mark_log
  check "the first scrape starts the agent, IPv4" -- serves 127.0.0.1
  is ActiveState active
  check "the agent took the sockets" -- logged "using the HTTP sockets from the service manager"
  check "IPv6 is served" -- serves ::1
  check "an IPv4 client has its IPv4 address" -- client_is 127.0.0.1 '"address":"127.0.0.1"'
  check "an IPv6 client has its IPv6 address" -- client_is ::1 '"address":"::1"'
  # Scrapes continuously during three restarts: scrapes in between wait, and none is refused. A scrape that a
  # stopping agent had accepted but not read yet is cut off.
  (
    served=0 cut=0 refused=0
    while [ ! -e /run/enough ]; do
      if ! (exec 5<>/dev/tcp/127.0.0.1/9862) 2>/dev/null; then
        refused=$((refused + 1))
      elif serves 127.0.0.1; then
        served=$((served + 1))
      else
        cut=$((cut + 1))
      fi
    done
    echo "$served $cut $refused" > /run/scrapes
  ) &
  for _ in 1 2 3; do systemctl restart $unit; sleep 1; done
  touch /run/enough
  wait
  read -r served cut refused < /run/scrapes
  check "scrapes over three restarts: $served served, $cut cut, $refused refused" -- \
    eval '[ "$served" -gt 3 ] && [ "$cut" -le 3 ] && [ "$refused" = 0 ]'

  echo "--- a configuration that is refused"
  echo 'no: configuration' | configure
  systemctl restart $unit 2>/dev/null || true
  eventually is_state failed
  is ExecMainStatus 78
  starts=$(property NRestarts)
  sleep 5
  is NRestarts "$starts"
  # No agent takes the connection, so systemd starts it again until its limit.
  serves 127.0.0.1
  check "a scrape does not restart it endlessly" -- [ "$(property Result pathmeter.socket)" = trigger-limit-hit ]
  configure < /dev/null
  check "after the correction, both are started again" -- systemctl start pathmeter.socket $unit
  check "the agent serves on the socket" -- eventually serves ::1
  check "the socket is open" -- [ "$(property SubState pathmeter.socket)" = running ]
  systemctl stop pathmeter.socket $unit
  systemctl disable pathmeter.socket >&2

  echo "--- remove"
  systemctl start $unit
  pid=$(property MainPID)
  dpkg -r pathmeter >&2
  check "the program has ended" -- [ ! -e "/proc/$pid" ]
  is LoadState not-found
  rm -r /etc/pathmeter/mesh.key /etc/systemd/system/$unit.d
  dpkg -P pathmeter >&2
  check "nothing is left: $(find / -xdev -name '*pathmeter*' ! -path '/proc/*' ! -path /pathmeter.deb | tr '\n' ' ')" -- \
    [ -z "$(find / -xdev -name '*pathmeter*' ! -path '/proc/*' ! -path /pathmeter.deb)" ]
  check "no unit has failed" -- [ -z "$(systemctl --failed --no-legend --no-pager)" ]
  echo "all checks ran"
}

has_status() { [[ $(property StatusText) == measuring* ]]; }
restarted() { [ "$(property NRestarts)" -ge "$1" ] && is_state active; }
pings() { [ "$(metric 'pathmeter_echo_rtt_seconds_count{probe="ping",peer="self",family="ipv4"}')" -gt 10 ] 2>/dev/null; }
client_is() { ask "$1" /api/v1/agent | grep -qF "$2"; }

if [ "${1:-}" = inside ]; then inside; else on_the_host "$@"; fi
