#!/bin/sh
# From a fresh checkout to a command in a VM: installs what the host lacks, builds
# smolvm and its default image, runs a command in a new VM, removes the VM, and does the
# same in a clone. What is there already is used again, so a second run takes seconds.
set -eu
cd "$(dirname "$0")/.."

smolvm=bin/smolvm
vm=quickstart-$$
created=''
phases='' # a line for each: seconds, and what was done
log=$(mktemp)

cleanup() {
	status=$?
	trap - EXIT
	if [ -n "$created" ]; then
		"$smolvm" rm -f "$vm" >/dev/null || true
	fi
	rm -f "$log"
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
	echo "quickstart: $1" >&2
	exit 1
}

# now prints hundredths of a second since the host was booted; date(1) has no
# fractions everywhere.
now() {
	read -r uptime _ </proc/uptime
	echo "${uptime%.*}${uptime#*.}"
}

# phase WHAT COMMAND...: runs a command, and notes how long it took.
phase() {
	what=$1
	shift
	echo "==> $what"
	began=$(now)
	"$@"
	took=$(($(now) - began))
	phases="$phases$(printf '%5d.%02d s  %s' $((took / 100)) $((took % 100)) "$what")
"
}

install_programs() {
	scripts/install-deps.sh run || exit 1
	command -v make >/dev/null 2>&1 ||
		fail 'there is no make, which builds smolvm; install it by the package manager of this host'
	check_go
}

# Go fetches the release that go.mod asks for by itself, from 1.21 on.
check_go() {
	command -v "${GO:-go}" >/dev/null 2>&1 ||
		fail "there is no Go, which smolvm is written in; install it as https://go.dev/doc/install says"
	version=$("${GO:-go}" env GOVERSION) # as in go1.26.0; empty before Go 1.16
	minor=${version#go1.}
	minor=${minor%%[!0-9]*}
	[ "${minor:-0}" -ge 21 ] ||
		fail "${version:-this Go} is too old to build smolvm; install a newer one as https://go.dev/doc/install says"
}

build() {
	echo '    (the first time, about a minute)'
	make --no-print-directory build >"$log" 2>&1 || {
		tail -n 20 "$log" >&2
		fail 'make build did not succeed; see above'
	}
}

# Otherwise it is made in the background, after a first start.
build_template() { "$smolvm" template build >/dev/null; }

build_image() { "$smolvm" image build >/dev/null; }

start_vm() {
	created=yes
	"$smolvm" create --name "$vm" >/dev/null
	"$smolvm" start "$vm" >/dev/null
}

remove_vm() {
	"$smolvm" rm "$vm" >/dev/null
	created=''
}

phase 'Install what this host lacks' install_programs
phase 'Build smolvm' build
phase 'Prepare the default image' build_image
phase 'Start a VM' start_vm
phase 'Run uname -a in it' "$smolvm" exec "$vm" -- uname -a
phase 'Remove the VM' remove_vm
phase 'Keep a frozen VM as the template of all later ones' build_template
phase 'Run uname -n in a new VM, which is a clone, and remove that' "$smolvm" run -- uname -n

printf '\n%s\n' "$phases"
cat <<'END'
It works. Try next:
  bin/smolvm run -- cat /etc/os-release      a command in a VM of its own
  echo hi | bin/smolvm run -- cat            the same, in a pipe
  bin/smolvm run                             a shell in a VM of its own
  bin/smolvm run --timings -- true           how it was started, and how long that took
  bin/smolvm doctor                          what this host can do
  bin/smolvm --help                          all the commands
END
