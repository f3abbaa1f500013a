#!/bin/sh
# Builds what a release is made of: release-build.sh OUT VERSION parts|all. The parts are
# the agents, with which .goreleaser.yaml builds the binaries, the manual pages and the
# completions; with "all", the binaries too, as .goreleaser.yaml builds them.
#
# The same commit, version and releases of Go and gzip give the same bytes, wherever and
# whenever it runs: `make release-check` tries that.
set -eu
umask 022
cd "$(dirname "$0")/.."

out=$1 version=$2 what=$3
go=${GO:-go}
embedded=internal/agent/embedded
export CGO_ENABLED=0 GOOS=linux LC_ALL=C
# Go writes the commit into the binaries, whatever the user's settings are.
export GOFLAGS=-buildvcs=true GOAMD64=v1 GOARM64=v8.0
# The date in the manual pages.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH TZ=UTC

rm -rf "$out"
for arch in amd64 arm64; do
	mkdir -p "$out/$arch"
	GOARCH=$arch "$go" build -trimpath -ldflags "-s -w -X main.version=$version" -o "$out/$arch/smolvm-agent" ./cmd/smolvm-agent
	gzip -9nc "$out/$arch/smolvm-agent" >"$out/$arch/smolvm-agent.gz"
	sha256sum <"$out/$arch/smolvm-agent" | cut -d' ' -f1 >"$out/$arch/smolvm-agent.sha256"
	# Each binary embeds its own agent, though they are built at the same time: the
	# compiler is told to read it from another place.
	cat >"$out/$arch/overlay.json" <<END
{"Replace": {
	"$embedded/smolvm-agent.gz": "$out/$arch/smolvm-agent.gz",
	"$embedded/smolvm-agent.sha256": "$out/$arch/smolvm-agent.sha256"
}}
END
	[ "$what" = all ] || continue
	GOARCH=$arch "$go" build -trimpath -tags=embedagent -overlay="$out/$arch/overlay.json" \
		-ldflags "-s -w -X main.version=$version" -o "$out/$arch/smolvm" ./cmd/smolvm
done

# This host's program prints them.
(unset GOOS; GOFLAGS='' "$go" build -o "$out/smolvm-host" ./cmd/smolvm)
"$out/smolvm-host" man "$out/man"
gzip -9n "$out"/man/*.1
mkdir -p "$out/completions"
for shell in bash zsh fish; do
	"$out/smolvm-host" completion "$shell" >"$out/completions/smolvm.$shell"
done
rm "$out/smolvm-host"
