#!/bin/sh
# Checks for known vulnerabilities that smolvm's code can reach: vuln.sh GOVULNCHECK.
# The database is fetched from vuln.go.dev, or, where that can't be reached, as a module
# from the Go module proxy. Where neither can, it says so and succeeds: that is not a
# fault of the code. It fails if there is a finding for Linux. One in Go's own library is
# only told, unless STRICT is set: which release of Go builds is chosen by go.mod's line
# toolchain, and a release that came out today is no fault of the change that is checked.
set -eu
cd "$(dirname "$0")/.."

govulncheck=$1
go=${GO:-go}
out=$(mktemp)
trap 'rm -f "$out"' EXIT

db=https://vuln.go.dev
# With the database at hand it tells the database's age.
if ! "$govulncheck" -version 2>/dev/null | grep -q '^DB updated:'; then
	echo 'vuln.go.dev can not be reached; asking the Go module proxy for its database ...'
	dir=$(cd / && "$go" mod download -json golang.org/x/vulndb@latest 2>/dev/null |
		sed -n 's/^[[:space:]]*"Dir": "\(.*\)",$/\1/p') || dir=''
	if [ -z "$dir" ]; then
		echo 'notice: the database of vulnerabilities can not be reached; nothing was checked'
		exit 0
	fi
	db=file://$dir/data/osv
fi
# It exits with 3 if there are findings; see `go doc golang.org/x/vuln/cmd/govulncheck`.
status=0
"$govulncheck" -db "$db" ./... >"$out" 2>&1 || status=$?
cat "$out"
[ "$status" -eq 3 ] || exit "$status"

# Findings that name systems, and Linux not among them, are not ours.
count() {
	awk -v standard="$1" '
		/^Vulnerability #/ { n++ }
		/^ *Platforms: / { elsewhere[n] = ($0 !~ /linux/) }
		/^ *Standard library$/ { inGo[n] = 1 }
		END { for (i = 1; i <= n; i++) if (!elsewhere[i] && inGo[i] + 0 == standard) count++; print count + 0 }
	' "$out"
}
modules=$(count 0)
standard=$(count 1)
if [ "$standard" -gt 0 ]; then
	echo "notice: $standard of these are in Go itself: name a newer release in go.mod's line toolchain" >&2
	[ -z "${STRICT:-}" ] || exit 3
fi
if [ "$modules" -gt 0 ]; then
	echo "$modules of these are in modules that we use, and can be reached on Linux" >&2
	exit 3
fi
[ "$standard" -gt 0 ] || echo 'none of these is for Linux'
