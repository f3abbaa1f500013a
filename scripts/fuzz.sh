#!/bin/sh
# Runs every fuzz target for some time: fuzz.sh TIME. The parsers of what guests send, and
# of the files that users bring, have one. It stops at the first failure; the input is
# kept in the package's testdata/fuzz, to be committed with the fix.
set -eu
cd "$(dirname "$0")/.."

time=$1
go=${GO:-go}
grep -rl --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file" | while read -r target; do
		echo "$target in ${file#./}"
		"$go" test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$(dirname "$file")" </dev/null
	done
done
