#!/usr/bin/env bash
# Installs the programs that the tests measure against, below target/peers, and prints where they are. Quick when they are
# there already. --only NAME… installs some: stamp-suite, python (websockets, prometheus_client), node (ws),
# grafana (the types of its dashboards, grafana-foundation-sdk).
set -euo pipefail
cd "$(dirname "$0")/.."

stamp_suite=1.0.0
websockets=15.0.1
prometheus_client=0.26.0
ws=8.18.3
# Of Grafana 11.6.
grafana_foundation_sdk='1769699379!11.6.0'
root="$PWD/target/peers"
wanted=(stamp-suite python node grafana)
[ "${1:-}" = --only ] && wanted=("${@:2}")

install_stamp_suite() {
  local program="$root/bin/stamp-suite"
  if [ "$("$program" --version 2>/dev/null)" != "stamp-suite $stamp_suite" ]; then
    cargo install stamp-suite --version "$stamp_suite" --locked --root "$root" >&2
  fi
  echo "$program"
}

# Of the first Python that can make one.
make_venv() {
  local python
  for python in python3 /usr/bin/python3; do
    rm -rf "$1"
    "$python" -m venv "$1" >/dev/null 2>&1 && return
  done
  return 1
}

# A virtual environment below $root: its folder, then packages as NAME==VERSION.
install_from_pypi() {
  local home="$root/$1" program="$root/$1/bin/python3"
  local there='import importlib.metadata as m, sys
sys.exit(any(m.version(name) != version for name, version in (one.split("==") for one in sys.argv[1:])))'
  if ! "$program" -c "$there" "${@:2}" 2>/dev/null; then
    if ! make_venv "$home"; then
      ./scripts/install-packages.sh python3-venv >&2
      make_venv "$home" || { echo "error: no python3 can make a virtual environment" >&2; exit 1; }
    fi
    "$program" -m pip install --quiet --disable-pip-version-check "${@:2}" >&2
  fi
  echo "$program"
}

install_node() {
  local home="$root/node"
  if ! grep -qs "\"version\": \"$ws\"" "$home/node_modules/ws/package.json"; then
    # Node may be from elsewhere than Debian, and have its npm with it.
    command -v node >/dev/null || ./scripts/install-packages.sh nodejs >&2
    command -v npm >/dev/null || ./scripts/install-packages.sh npm >&2
    mkdir -p "$home"
    npm install --prefix "$home" --no-save --no-audit --no-fund --ignore-scripts --loglevel error "ws@$ws" >&2
  fi
  echo "$home/node_modules/ws"
}

for peer in "${wanted[@]}"; do
  case "$peer" in
    stamp-suite) install_stamp_suite ;;
    python) install_from_pypi python "websockets==$websockets" "prometheus-client==$prometheus_client" ;;
    grafana) install_from_pypi grafana "grafana-foundation-sdk==$grafana_foundation_sdk" ;;
    node) install_node ;;
    *) echo "error: $peer is no peer (stamp-suite, python, node, grafana)" >&2; exit 2 ;;
  esac
done
