#!/usr/bin/env bash
# Runs the tests that need no VM under the race detector, as make race does, and counts which
# statements of the engine run, in the shims, workers and other programs that tests start
# too: the go command has them write their counters where the test does. What a process ran
# that is killed is not counted. Fails below the least.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}
least=80.0 # percent of the statements
export CGO_ENABLED=1

# The engine: what an operation on a VM comes through between the contract and the VMM.
engine=()
for room in manager internal/{backing,budget,datadir,identity,machine,session,shim,snapshot,start,store,teardown,template,warmpool,worker}; do
	[ ! -d "$room" ] || engine+=("./$room/...")
done
packages=$($go list -f '{{if .GoFiles}}{{.ImportPath}}{{end}}' "${engine[@]}")
mapfile -t users < <($go list "${engine[@]}" ./internal/cli/... ./shim/...) # whose tests run it
mapfile -t others < <($go list ./... | grep -vxF -f <(printf '%s\n' "${users[@]}"))

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
read -ra race <<<"${RACE:--race}"
tests=("$go" test "${race[@]}" -short -parallel 4 -timeout 20m)
"${tests[@]}" "${others[@]}"
"${tests[@]}" -covermode=atomic -coverprofile="$dir/profile" -coverpkg="${packages//$'\n'/,}" "${users[@]}" |
	sed -E '/^coverage: /d; s/\tcoverage: .*//; /^\t[^\t]*\t*$/d'

# A line is "file:block statements count", once for each package whose tests have it.
awk -v least="$least" -v FS='[: ]' '
	NR > 1 && $1 ~ /\// {
		block = $1 ":" $2
		statements[block] = $3
		if ($4 > 0) ran[block] = 1
	}
	END {
		for (block in statements) {
			name = block; sub(/\/[^\/]*$/, "", name)
			all[name] += statements[block]; total += statements[block]
			if (block in ran) { some[name] += statements[block]; covered += statements[block] }
		}
		for (name in all) printf "%5.1f %% %s\n", 100 * some[name] / all[name], name | "sort -k3"
		close("sort -k3")
		percent = total ? 100 * covered / total : 0
		printf "engine coverage: %.1f %%\n", percent
		if (percent < least) {
			printf "at least %s %% must be covered\n", least > "/dev/stderr"
			exit 1
		}
	}' "$dir/profile"
