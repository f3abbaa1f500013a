#!/usr/bin/env bash
# Compares the backends on a host whose KVM works, and prints a table to paste, with what the
# host is. Needs Go, QEMU and, to compare it, firecracker in PATH.
#
#   scripts/bench-kvm.sh [-runs N]
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory build >/dev/null
firecracker=$(firecracker --version 2>/dev/null | head -n 1) || firecracker='no Firecracker'
echo "$(bin/smolvm version | head -n 1), $(qemu-system-"$(uname -m)" --version | head -n 1), $firecracker"
echo "$(uname -srm), $(nproc) CPUs of $(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1), load $(cut -d' ' -f1 /proc/loadavg)"
echo
${GO:-go} run ./bench backends "$@"
