# The targets of the README. Each works on a fresh checkout.
.PHONY: help quickstart build test test-dev test-kernel test-kvm compat race cover test-deps lint vuln fuzz bench bench-net bench-kernel soak release-check clean

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# No cgo: one static binary that runs on any Linux of its architecture.
export CGO_ENABLED = 0

# Go fetches the release that go.mod names, also where a distribution has turned that off.
export GOTOOLCHAIN ?= auto

# Where go install puts tools; bin/ is not under version control.
TOOLS         := $(CURDIR)/bin/tools
GOLANGCI_LINT := $(TOOLS)/golangci-lint-v2.15.0
GOVULNCHECK   := $(TOOLS)/govulncheck-v1.9.0
GORELEASER    := $(TOOLS)/goreleaser-v2.15.1
EMBEDDED      := internal/agent/embedded

help:
	@echo 'make quickstart  install what is missing, build, and run a command in a first VM'
	@echo 'make build       build bin/smolvm and bin/smolvm-agent'
	@echo 'make test        run all tests, on real VMs, and on KVM'
	@echo 'make test-kvm    run its part that needs KVM, in a VM where this host has none'
	@echo 'make test-kernel build a kernel for guests, and boot it'
	@echo 'make test-dev    run tests in images that take minutes to build: dev, and one with systemd'
	@echo 'make compat      run VMs of the previous build by this one, and the other way round'
	@echo 'make race        run the tests that need no VM under the race detector'
	@echo 'make cover       the same, and how much of the engine they run, which has a least'
	@echo 'make lint        check formatting and documents, and run the linters'
	@echo 'make vuln        look for known vulnerabilities that our code reaches'
	@echo 'make fuzz        run every fuzz target, FUZZTIME (10s) each'
	@echo 'make bench       measure against bare QEMU, as ratios within one run'
	@echo 'make bench-net   measure networks against slirp4netns and a bare TAP interface'
	@echo 'make bench-kernel  measure a kernel built for guests against the distribution’s'
	@echo 'make soak        save and restore busy VMs for half an hour, and check what comes of it'
	@echo 'make release-check  build the release twice, and compare the bytes'
	@echo 'make clean       remove what was built'

quickstart:
	@scripts/quickstart.sh

build:
	@mkdir -p bin
	$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/smolvm-agent ./cmd/smolvm-agent
	@gzip -9nc bin/smolvm-agent > $(EMBEDDED)/smolvm-agent.gz
	@sha256sum < bin/smolvm-agent | cut -d' ' -f1 > $(EMBEDDED)/smolvm-agent.sha256
	$(GO) build -trimpath -tags embedagent -ldflags '-s -w -X main.version=$(VERSION)' -o bin/smolvm ./cmd/smolvm

# Packages whose tests boot VMs, as many at once as a host of two cores bears: they run one
# after the other.
VM_TESTS := ./manager/... ./internal/cli/... ./internal/shim/... ./internal/vmm/qemu/... ./test/...

test: test-deps
	$(GO) test -timeout 25m $$($(GO) list ./... | grep -vxF "$$($(GO) list $(VM_TESTS))")
	$(GO) test -p 1 -timeout 25m $(VM_TESTS)
	@$(MAKE) --no-print-directory test-kvm KVMTEST=engine

# What needs KVM: in a VM whose emulated CPU has virtualization, unless this host's KVM works.
# Part of make test are the jobs of the engine (KVMTEST=engine). By itself it also runs the suites
# of the backends, for a quarter of an hour. KVMTEST chooses one package, with flags of its tests,
# as in KVMTEST="./internal/vmm/qemu -run TestConformance/q35". It says what it does, as it is not
# to be left out in silence.
KVMTEST ?= all

test-kvm: export SMOLVM_TEST_KVM = $(value KVMTEST)
test-kvm: test-deps
	$(GO) test -count=1 -v -timeout 80m -run '^TestBed$$' ./internal/kvmtest

# What smolvm image kernel builds, for a quarter of an hour of a processor the first time: whether
# guests can do with it what Docker and smolvm need, and whether QEMU and Firecracker run it as they do
# the distribution's, with KVM too. No part of make test.
test-kernel: build test-deps
	kernel="$$(bin/smolvm image kernel --no-use)" && export SMOLVM_TEST_KERNEL="$$kernel" && \
	$(GO) test -count=1 -v -timeout 30m -run '^TestKernelOfOurs' ./manager && \
	$(GO) test -count=1 -timeout 30m ./internal/vmm/qemu && \
	$(MAKE) --no-print-directory test-kvm

# What make test does in a small image of packages, in the image dev, which takes minutes to build, and
# a VM whose init is systemd.
test-dev: test-deps
	SMOLVM_TEST_DEV=1 $(GO) test -count=1 -v -timeout 40m ./examples/suite
	SMOLVM_TEST_DEV=1 $(GO) test -count=1 -v -timeout 20m -run '^TestSystemd$$' ./manager

# Part of make test. A shallow clone lacks the commit of the previous build; it is fetched
# from where the clone came from, if that can be reached.
compat: test-deps
	@git cat-file -e "$$(cat test/compat/PREVIOUS)" 2>/dev/null || git fetch -q --depth 1 origin "$$(cat test/compat/PREVIOUS)" || true
	$(GO) test -count=1 -timeout 15m -v ./test/compat

# The race detector also checks pointers as they are converted, but for SQLite, which is C in Go
# and does little else: its tests take less than half the time without. The tables for
# debuggers are a fifth of what linking the test programs takes, and make lint vets.
RACE := -race -gcflags=modernc.org/...=-d=checkptr=0 -ldflags=-w -vet=off

# What needs no VM, under the race detector, which needs a C compiler. Much of it waits for
# processes: hence more tests at once than processors.
race:
	CGO_ENABLED=1 $(GO) test $(RACE) -short -parallel 4 -timeout 20m ./...

# The same, with the statements of the engine counted.
cover:
	@GO='$(GO)' RACE='$(RACE)' scripts/cover.sh

test-deps:
	@scripts/install-deps.sh test

lint: $(GOLANGCI_LINT)
	@scripts/check-docs.sh
	@test -z "$$(gofmt -l .)" || { echo 'gofmt would change:'; gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GOLANGCI_LINT) run ./...

$(GOLANGCI_LINT):
	@echo 'Building golangci-lint (once, about two minutes) ...'
	@mkdir -p $(TOOLS)
	GOBIN=$(TOOLS) $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
	@mv $(TOOLS)/golangci-lint $@

vuln: $(GOVULNCHECK)
	@GO='$(GO)' scripts/vuln.sh $(GOVULNCHECK)

$(GOVULNCHECK):
	@mkdir -p $(TOOLS)
	GOBIN=$(TOOLS) $(GO) install golang.org/x/vuln/cmd/govulncheck@v1.9.0
	@mv $(TOOLS)/govulncheck $@

FUZZTIME ?= 10s

fuzz:
	@GO='$(GO)' scripts/fuzz.sh $(FUZZTIME)

bench: build test-deps
	$(GO) run ./bench $(BENCH)

# ROUNDS is how often each network is measured, by turns; a round takes about half a minute.
ROUNDS ?= 5

bench-net:
	SMOLVM_BENCH_NETWORK=$(ROUNDS) $(GO) test ./bench -run TestNetwork -count=1 -v -timeout=30m

# Builds the kernel in the user's data directory, unless it is there.
bench-kernel: build test-deps
	$(GO) run ./bench kernels -kernel "$$(bin/smolvm image kernel --no-use)" $(BENCH)

# SOAK is its flags: see bench/soak.go.
soak: build test-deps
	$(GO) run ./bench soak $(SOAK)

# The release's bytes must not depend on where and when it is built.
release-check: $(GORELEASER)
	@GO='$(GO)' scripts/release-check.sh $(GORELEASER)

$(GORELEASER):
	@echo 'Building goreleaser (once, some minutes) ...'
	@mkdir -p $(TOOLS)
	GOBIN=$(TOOLS) $(GO) install github.com/goreleaser/goreleaser/v2@v2.15.1
	@mv $(TOOLS)/goreleaser $@

clean:
	rm -rf bin $(EMBEDDED)/smolvm-agent.gz $(EMBEDDED)/smolvm-agent.sha256
