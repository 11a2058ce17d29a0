#!/usr/bin/env bash
# Makes target/debian/pathmeter_VERSION_ARCHITECTURE.deb of a built program. Whoever publishes it sets DEBFULLNAME and DEBEMAIL.
#   build-deb.sh [PROGRAM]    PROGRAM: default target/release/pathmeter
set -euo pipefail
cd "$(dirname "$0")/.."

program=${1:-target/release/pathmeter}
[ -x "$program" ] || { echo "error: $program is not there: run make build first" >&2; exit 1; }
version=$("$program" --version | cut -d' ' -f2)-1
maintainer="${DEBFULLNAME:-pathmeter developers} <${DEBEMAIL:-pathmeter@localhost}>"
architecture=$(dpkg --print-architecture)
out=target/debian
tree=$out/tree
rm -rf "$tree"
mkdir -p "$tree"

put() { install -D -m "$1" "$2" "$tree/$3"; }
put 0755 "$program" usr/bin/pathmeter
put 0644 deploy/systemd/pathmeter.service lib/systemd/system/pathmeter.service
put 0644 deploy/systemd/pathmeter.socket lib/systemd/system/pathmeter.socket
put 0644 deploy/systemd/pathmeter.sysusers usr/lib/sysusers.d/pathmeter.conf
put 0644 deploy/systemd/pathmeter.sysctl usr/lib/sysctl.d/60-pathmeter.conf
put 0644 deploy/systemd/pathmeter.default etc/default/pathmeter
put 0644 deploy/debian/config.yaml etc/pathmeter/config.yaml
doc=usr/share/doc/pathmeter
put 0644 config.example.yaml $doc/config.example.yaml
for page in docs/*.md; do put 0644 "$page" "$doc/$(basename "$page")"; done
for drop_in in deploy/systemd/pathmeter.service.d/*; do
  put 0644 "$drop_in" "$doc/examples/pathmeter.service.d/$(basename "$drop_in")"
done
sed -e '/@MIT@/{r LICENSE-MIT
d}' deploy/debian/copyright | sed -e '/^MIT License/,$ { s/^$/./; s/^/ / }' > "$tree/$doc/copyright"
gzip -9n < CHANGELOG.md > "$tree/$doc/changelog.gz"
printf 'pathmeter (%s) unstable; urgency=medium\n\n  * What changed is in changelog.gz.\n\n -- %s  %s\n' \
  "$version" "$maintainer" "$(date -R ${SOURCE_DATE_EPOCH:+-d @$SOURCE_DATE_EPOCH})" | gzip -9n > "$tree/$doc/changelog.Debian.gz"
put 0644 deploy/debian/lintian-overrides usr/share/lintian/overrides/pathmeter

man=$tree/usr/share/man/man1
mkdir -p "$man"
"$program" man "$man"
gzip -9n "$man"/*.1
mkdir -p "$tree/usr/share/bash-completion/completions" "$tree/usr/share/zsh/vendor-completions" \
  "$tree/usr/share/fish/vendor_completions.d"
"$program" completions bash > "$tree/usr/share/bash-completion/completions/pathmeter"
"$program" completions zsh > "$tree/usr/share/zsh/vendor-completions/_pathmeter"
"$program" completions fish > "$tree/usr/share/fish/vendor_completions.d/pathmeter.fish"

# dpkg-shlibdeps wants to be in a source package.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
mkdir "$source/debian"
printf 'Source: pathmeter\n\nPackage: pathmeter\nArchitecture: any\n' > "$source/debian/control"
binary=$(realpath "$tree/usr/bin/pathmeter")
depends=$(cd "$source" && dpkg-shlibdeps -O "$binary" | sed -n 's/^shlibs:Depends=//p')

mkdir "$tree/DEBIAN"
size=$(du -sk --exclude=DEBIAN "$tree" | cut -f1)
sed -e "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@SIZE@/$size/; s/@DEPENDS@/$depends/; s/@MAINTAINER@/$maintainer/" \
  deploy/debian/control.in > "$tree/DEBIAN/control"
for script in postinst prerm postrm; do install -m 0755 "deploy/debian/$script" "$tree/DEBIAN/$script"; done
(cd "$tree" && find etc -type f -printf '/%p\n' | sort) > "$tree/DEBIAN/conffiles"
(cd "$tree" && find . -path ./DEBIAN -prune -o -type f ! -path './etc/*' -printf '%P\0' | sort -z | xargs -0 md5sum) \
  > "$tree/DEBIAN/md5sums"

deb=$out/pathmeter_${version}_$architecture.deb
dpkg-deb --root-owner-group --build "$tree" "$deb" >/dev/null
echo "$deb"
