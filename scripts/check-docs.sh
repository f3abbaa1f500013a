#!/bin/sh
# Checks that what the documents point to is there: relative links, and paths of this
# repository in backquotes. Code moves, and documents are the last to hear of it.
set -eu
cd "$(dirname "$0")/.."

missing=$(mktemp)
trap 'rm -f "$missing"' EXIT

# The changelog tells of the past, and generated files are not there yet.
find . -name '*.md' -o -name llms.txt | grep -Ev '^\./(bin/|CHANGELOG\.md|\.github/)' | sort | while read -r doc; do
	dir=$(dirname "$doc")
	grep -o '](\([^)]*\))' "$doc" | sed 's/^](//; s/)$//; s/#.*//' | grep -Ev '^$|^[a-z]+://' | sort -u | while read -r link; do
		[ -e "$dir/$link" ] || echo "$doc: link to $link"
	done
	# A path may end in * or in NNNN, for any file.
	grep -o '`[A-Za-z0-9_./*-]*`' "$doc" | tr -d '`' | sort -u |
		grep -E '^(internal|manager|cmd|docs|scripts|test|bench|examples|\.ci|\.github)/[A-Za-z0-9_./*-]*$' | while read -r path; do
		pattern=$(printf '%s' "$path" | sed 's/NNNN[A-Za-z_]*/*/; s/NAME/*/')
		# shellcheck disable=SC2086 # it is a pattern
		ls -d $pattern >/dev/null 2>&1 || echo "$doc: path $path"
	done
done >"$missing"

if [ -s "$missing" ]; then
	cat "$missing" >&2
	echo 'check-docs: these point to nothing' >&2
	exit 1
fi
