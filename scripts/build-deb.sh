#!/usr/bin/env bash
# Builds pathmeter_VERSION_ARCHITECTURE.deb from a built program, and prints its path. The package is for the
# Debian release of this host.
#   build-deb.sh [PROGRAM]    default: target/release/pathmeter
# Environment: DEBFULLNAME, DEBEMAIL: maintainer; OUT: output folder, default target/debian; SYSTEMD_VERSION:
# systemd version of the target hosts, default that of this host.
set -euo pipefail
cd "$(dirname "$0")/.."
# Packed files are world-readable, whatever the umask of the caller.
umask 022

program=${1:-target/release/pathmeter}
[ -x "$program" ] || { echo "error: $program does not exist: run make build first" >&2; exit 1; }
version=$("$program" --version | cut -d' ' -f2)-1
maintainer="${DEBFULLNAME:-pathmeter developers} <${DEBEMAIL:-pathmeter@example.org}>"
architecture=$(dpkg --print-architecture)
systemd=${SYSTEMD_VERSION:-$(systemctl --version | awk 'NR == 1 { print $2 }')}
out=${OUT:-target/debian}
# dpkg-shlibdeps requires the layout of a source package.
source=$out/source tree=$out/source/debian/pathmeter
rm -rf "$source" "$out"/pathmeter_*.deb
mkdir -p "$tree"

put() { install -D -m "$1" "$2" "$tree/$3"; }
put 0755 "$program" usr/bin/pathmeter
strip --strip-unneeded --remove-section=.comment "$tree/usr/bin/pathmeter"
units=usr/lib/systemd/system
put 0644 deploy/systemd/pathmeter.service $units/pathmeter.service
put 0644 deploy/systemd/pathmeter.socket $units/pathmeter.socket
put 0644 deploy/systemd/pathmeter.sysusers usr/lib/sysusers.d/pathmeter.conf
put 0644 deploy/systemd/pathmeter.sysctl usr/lib/sysctl.d/60-pathmeter.conf
put 0644 deploy/systemd/pathmeter.default etc/default/pathmeter
put 0644 deploy/debian/config.yaml etc/pathmeter/config.yaml
doc=usr/share/doc/pathmeter
put 0644 config.example.yaml $doc/config.example.yaml
find docs -name "*.md" -printf "%P\n" | while read -r page; do put 0644 "docs/$page" "$doc/$page"; done
drop_ins=deploy/systemd/pathmeter.service.d
put 0644 $drop_ins/icmp.conf.example $doc/examples/pathmeter.service.d/icmp.conf.example
# Type=notify-reload exists since systemd 253; older versions would not know how to reload.
if [ "$systemd" -ge 253 ]; then
  put 0644 $drop_ins/notify-reload.conf.example $units/pathmeter.service.d/notify-reload.conf
  sysusers='systemd (>= 253) | systemd-standalone-sysusers (>= 253)'
else
  put 0644 $drop_ins/notify-reload.conf.example $doc/examples/pathmeter.service.d/notify-reload.conf.example
  sysusers='systemd | systemd-standalone-sysusers'
fi
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

mkdir "$tree/DEBIAN"
printf 'Source: pathmeter\n\nPackage: pathmeter\nArchitecture: any\n' > "$source/debian/control"
depends=$(cd "$source" && dpkg-shlibdeps -O debian/pathmeter/usr/bin/pathmeter | sed -n 's/^shlibs:Depends=//p')
size=$(du -sk --exclude=DEBIAN "$tree" | cut -f1)
sed -e "s/@VERSION@/$version/; s/@ARCHITECTURE@/$architecture/; s/@SIZE@/$size/; s/@DEPENDS@/$depends/" \
  -e "s/@MAINTAINER@/$maintainer/; s/@SYSUSERS@/$sysusers/" deploy/debian/control.in > "$tree/DEBIAN/control"
for script in postinst prerm postrm; do install -m 0755 "deploy/debian/$script" "$tree/DEBIAN/$script"; done
(cd "$tree" && find etc -type f -printf '/%p\n' | sort) > "$tree/DEBIAN/conffiles"
(cd "$tree" && find . -path ./DEBIAN -prune -o -type f ! -path './etc/*' -printf '%P\0' | sort -z | xargs -0 md5sum) \
  > "$tree/DEBIAN/md5sums"

deb=$out/pathmeter_${version}_$architecture.deb
dpkg-deb --root-owner-group --build "$tree" "$deb" >/dev/null
rm -rf "$source"
echo "$deb"
