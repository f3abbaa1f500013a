#!/bin/sh
# Installs what the host lacks, through its package manager, after saying what and
# why. Run by somebody who may not install, it prints the one line to run instead.
#
#   install-deps.sh run    what it takes to run VMs
#   install-deps.sh test   the same, and what the tests check our work with
set -eu

purpose=${1:-run}
missing=''  # packages
reasons=''  # one line each

# need PROGRAM PACKAGE WHY: notes the package if the program can't be found.
# Debian keeps system programs out of other users' PATH.
need() {
	if PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; then
		return
	fi
	missing="$missing $2"
	reasons="$reasons  $2: $3
"
}

if command -v apt-get >/dev/null 2>&1; then
	qemu=qemu-system-x86 img=qemu-utils e2fs=e2fsprogs ssh=openssh-client
	install='apt-get install -y --no-install-recommends'
	refresh='apt-get update'
elif command -v dnf >/dev/null 2>&1; then
	qemu=qemu-system-x86-core img=qemu-img e2fs=e2fsprogs ssh=openssh-clients
	install='dnf install -y'
	refresh=':'
elif command -v pacman >/dev/null 2>&1; then
	qemu=qemu-system-x86 img=qemu-img e2fs=e2fsprogs ssh=openssh
	install='pacman -S --noconfirm --needed'
	refresh='pacman -Sy'
else
	echo "install-deps: no package manager that this script knows (apt-get, dnf, pacman)." >&2
	echo "Install QEMU (qemu-system-x86_64), e2fsprogs and an SSH client by hand." >&2
	exit 1
fi

need qemu-system-x86_64 "$qemu" 'runs the VMs'
need mke2fs "$e2fs" 'makes the root file system of the default image'
if [ "$purpose" = test ]; then
	need qemu-img "$img" 'checks the disks that we make'
	need mkfs.xfs xfsprogs 'makes a file system on which copies of disks share blocks'
	need ssh "$ssh" 'logs in to VMs the way users do'
fi

[ -n "$missing" ] || exit 0

echo "This host lacks:"
printf '%s' "$reasons"
if [ "$(id -u)" -ne 0 ]; then
	echo "Run this, then try again:"
	echo "  sudo sh -c '$refresh && $install$missing'"
	exit 1
fi
echo "Installing$missing ..."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086 # both are lists of words
if ! { $refresh && DEBIAN_FRONTEND=noninteractive $install $missing; } >"$log" 2>&1; then
	tail -n 15 "$log" >&2
	echo "install-deps: $install$missing did not succeed; see above." >&2
	exit 1
fi
