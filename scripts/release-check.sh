#!/bin/sh
# Checks that a release is reproducible: builds what is committed twice, in different
# directories, at different times, once without anything that was compiled before, and
# compares the bytes: release-check.sh [GORELEASER]. With goreleaser it also checks
# .goreleaser.yaml, and compares goreleaser's binaries with ours.
set -eu
cd "$(dirname "$0")/.."

goreleaser=${1:-}
version=v0.0.0 # goreleaser's, where there is no tag
dir=$(mktemp -d)
trap 'chmod -R u+w "$dir" 2>/dev/null || true; rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -n "$(git status --porcelain)" ]; then
	echo 'release-check: notice: there are changes that are not committed; they are not part of what is built'
fi
if [ -n "$goreleaser" ]; then
	"$goreleaser" check
else
	echo 'release-check: notice: there is no goreleaser; .goreleaser.yaml is not checked'
fi

# checkout DIR: what is committed, with what Go and goreleaser ask git for.
checkout() {
	git clone -q --no-tags "file://$PWD" "$1"
	git -C "$1" -c advice.detachedHead=false checkout -q "$(git rev-parse HEAD)"
}

# sums DIR: a line for each file, but for the overlays, which are no part of a release.
sums() {
	(cd "$1" && find . -type f ! -name overlay.json -exec sha256sum {} + | sort -k 2)
}

echo 'release-check: building once ...'
checkout "$dir/a"
(cd "$dir/a" && scripts/release-build.sh bin/release "$version" all)
echo 'release-check: building again, elsewhere and from nothing ...'
checkout "$dir/another place"
(cd "$dir/another place" && umask 077 && TZ=Pacific/Auckland LANG=C.UTF-8 GOCACHE="$dir/cache" GOFLAGS=-p=2 \
	scripts/release-build.sh bin/release "$version" all)

sums "$dir/a/bin/release" >"$dir/a.sums"
sums "$dir/another place/bin/release" >"$dir/b.sums"
if ! diff "$dir/a.sums" "$dir/b.sums" >"$dir/diff"; then
	cat "$dir/diff" >&2
	echo 'release-check: the same commit gave different bytes' >&2
	exit 1
fi
grep -E '/(smolvm|smolvm-agent)$' "$dir/a.sums"

if [ -n "$goreleaser" ]; then
	echo 'release-check: building by goreleaser ...'
	(cd "$dir/a" && "$goreleaser" release --snapshot --clean --skip=publish >"$dir/log" 2>&1) || {
		tail -n 40 "$dir/log" >&2
		exit 1
	}
	for arch in amd64 arm64; do
		cmp "$dir"/a/bin/dist/smolvm_linux_"$arch"_*/smolvm "$dir/another place/bin/release/$arch/smolvm"
	done
	(cd "$dir/a/bin/dist" && sha256sum --quiet -c SHA256SUMS && tar tzf smolvm_*_linux_amd64.tar.gz)
fi
echo "release-check: $(wc -l <"$dir/a.sums") files are the same bytes"
